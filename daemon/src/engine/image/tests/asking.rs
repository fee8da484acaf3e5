//! Logging in, looking at what a registry has, and searching.

use super::*;
use crate::engine::{
    ErrorKind,
    image::{
        Credentials, SEARCH_FILTERS,
        registry::testing::{TestImage, TestRegistry, descriptor},
    },
};

fn user(password: &str) -> Credentials {
    Credentials { username: "user".into(), password: password.into(), ..Credentials::default() }
}

#[tokio::test]
async fn a_login_is_checked_and_may_give_a_token_instead_of_the_password() {
    let (registry, here) = (TestRegistry::start().await, Fixture::new());
    let server = registry.address.to_string();
    assert_eq!(here.images.login(&server, &user("any")).await.unwrap(), "", "nobody is asked for anything");

    registry.state().manners.tokens = Some(("user".into(), "good".into()));
    let error = here.images.login(&server, &user("bad")).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Unauthorized);
    assert!(error.message.contains("incorrect username or password"), "{}", error.message);
    let token = here.images.login(&format!("http://{server}/v1/"), &user("good")).await.unwrap();
    assert_eq!(token, "identity");
    // The token is as good as the password, and is sent in its place.
    let known = Credentials { identity_token: token, ..Credentials::default() };
    here.images.login(&server, &known).await.unwrap();
    registry.add("private/a:1", &TestImage::new(&[&[("file", b"text")]]));
    here.pull_as(&registry.name("private/a:1"), Some(known), None).await.unwrap();

    registry.state().manners.tokens = None;
    registry.state().manners.basic = Some("Basic dXNlcjpnb29k".into());
    here.images.login(&server, &user("good")).await.unwrap();
    for wrong in [user("bad"), Credentials::default()] {
        let error = here.images.login(&server, &wrong).await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::Unauthorized, "{}", error.message);
    }
}

#[tokio::test]
async fn what_a_registry_has_is_told_with_its_platforms() {
    let (registry, here) = (TestRegistry::start().await, Fixture::new());
    let (amd, arm) = (TestImage::new(&[&[("a", b"1")]]), TestImage::for_platform(&[&[("a", b"2")]], "arm64"));
    let digest = registry.add("some/image:one", &amd);
    registry.add("some/image:arm", &arm);
    let found = here.images.distribution(&registry.name("some/image:one"), None).await.unwrap();
    assert_eq!(found.descriptor.digest, digest.to_string());
    assert_eq!(found.descriptor.media_type, "application/vnd.oci.image.manifest.v1+json");
    assert_eq!(found.descriptor.size, i64::try_from(amd.manifest().len()).unwrap());
    assert_eq!(found.platforms.iter().map(|p| p.architecture.as_str()).collect::<Vec<_>>(), ["amd64"]);

    let entry = |image: &TestImage, architecture: &str| {
        let mut entry = descriptor("application/vnd.oci.image.manifest.v1+json", &image.manifest());
        entry["platform"] = serde_json::json!({"os": "linux", "architecture": architecture});
        entry
    };
    let index =
        serde_json::json!({"schemaVersion": 2, "manifests": [entry(&amd, "amd64"), entry(&arm, "arm64")]});
    registry.add_manifest("some/image:latest", index.to_string().as_bytes());
    let found = here.images.distribution(&registry.name("some/image"), None).await.unwrap();
    assert_eq!(found.descriptor.media_type, "application/vnd.oci.image.index.v1+json");
    assert_eq!(
        found.platforms.iter().map(|p| p.architecture.as_str()).collect::<Vec<_>>(),
        ["amd64", "arm64"]
    );

    let error = here.images.distribution(&registry.name("some/image:none"), None).await.unwrap_err();
    assert_eq!(
        (error.kind, error.message.as_str()),
        (ErrorKind::NotFound, "manifest unknown: manifest unknown")
    );
    assert_eq!(here.images.distribution("Not Valid", None).await.unwrap_err().kind, ErrorKind::Invalid);
}

#[tokio::test]
async fn an_index_is_searched_and_its_results_filtered() {
    let (registry, here) = (TestRegistry::start().await, Fixture::new());
    let term = registry.name("word & more");
    let search = |filters: &str, limit| {
        let filters = Filters::parse(filters, &SEARCH_FILTERS).unwrap();
        let (images, term) = (Arc::clone(&here.images), term.clone());
        async move { images.search(&term, limit, &filters, None).await }
    };
    let names = |results: Vec<crate::api::types::image::SearchResult>| {
        results.into_iter().map(|result| result.name).collect::<Vec<_>>()
    };
    assert_eq!(names(search("", None).await.unwrap()), ["official", "starred"]);
    assert_eq!(registry.seen("/v1/search?q=word%20%26%20more&n=25"), 1);
    assert_eq!(names(search(r#"{"is-official":["true"]}"#, Some(5)).await.unwrap()), ["official"]);
    assert_eq!(names(search(r#"{"stars":["3"]}"#, Some(5)).await.unwrap()), ["starred"]);
    for limit in [-1, 101] {
        let error = search("", Some(limit)).await.unwrap_err();
        assert_eq!(error.message, format!("limit {limit} is outside the range of [1, 100]"));
    }
}
