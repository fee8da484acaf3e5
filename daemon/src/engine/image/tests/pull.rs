use super::*;
use crate::engine::{
    ErrorKind,
    image::registry::testing::{TestImage, TestRegistry, descriptor, gzip, noise, tar_of},
};

fn two_layers() -> TestImage {
    TestImage::new(&[&[("a", b"one"), ("dir/b", b"two")], &[("c", b"three")]])
}

#[tokio::test]
async fn a_pulled_image_is_there_with_its_layers_and_names() {
    let (registry, here) = (TestRegistry::start().await, Fixture::new());
    let image = two_layers();
    let digest = registry.add("a/b:1", &image);
    let name = registry.name("a/b:1");
    let messages = here.pull(&name).await.unwrap();
    let told = statuses(&messages);
    let repository = registry.name("a/b");
    assert_eq!((told[0], messages[0]["id"].as_str()), ("Pulling from a/b", Some("1")));
    assert_eq!(
        told[told.len() - 2..],
        [format!("Digest: {digest}"), format!("Status: Downloaded newer image for {name}")]
    );
    let (_, compressed) = &image.layers[0];
    let layer = Digest::of(compressed).short();
    let of_layer: Vec<_> = messages
        .iter()
        .filter(|m| m["id"] == layer.as_str())
        .map(|m| m["status"].as_str().unwrap())
        .collect();
    for step in [
        "Pulling fs layer",
        "Downloading",
        "Verifying Checksum",
        "Download complete",
        "Extracting",
        "Pull complete",
    ] {
        assert!(of_layer.contains(&step), "{of_layer:?} lacks {step}");
    }
    assert_eq!(of_layer.last(), Some(&"Pull complete"));

    let inspect = here.images.inspect(&name, None).unwrap();
    assert_eq!(inspect.id, image.id().to_string());
    assert_eq!(inspect.repo_tags, std::slice::from_ref(&name));
    assert_eq!(inspect.repo_digests, [format!("{repository}@{digest}")]);
    assert_eq!(inspect.root_fs.layers.len(), 2);
    assert_eq!(inspect.size, 11);
    assert_eq!(here.actions(), ["pull"]);
    assert_eq!(here.events.lock().unwrap()[0].id, name);
    let file = here
        .images
        .layers()
        .path(&here.layers().into_iter().find(|l| l.hex() == image.layers[0].0.hex()).unwrap());
    assert_eq!(std::fs::read(file.join("dir/b")).unwrap(), b"two");

    let again = here.pull(&name).await.unwrap();
    assert_eq!(statuses(&again).last(), Some(&format!("Status: Image is up to date for {name}").as_str()));
    assert_eq!(registry.seen(&Digest::of(compressed).to_string()), 1);

    let by_digest = format!("{repository}@{digest}");
    here.pull(&by_digest).await.unwrap();
    let here = here.reopen();
    assert_eq!(here.images.inspect(&by_digest, None).unwrap().id, image.id().to_string());
    assert_eq!(here.tags(), [name]);
}

#[tokio::test]
async fn layers_that_are_here_are_not_fetched_again() {
    let (registry, here) = (TestRegistry::start().await, Fixture::new());
    let shared: &[(&str, &[u8])] = &[("a", b"one")];
    registry.add("a:1", &TestImage::new(&[shared]));
    let second = TestImage::new(&[shared, &[("b", b"two")]]);
    registry.add("b:1", &second);
    here.pull(&registry.name("a:1")).await.unwrap();
    let messages = here.pull(&registry.name("b:1")).await.unwrap();
    assert!(statuses(&messages).contains(&"Already exists"));
    assert_eq!(registry.seen(&Digest::of(&second.layers[0].1).to_string()), 1);
    let options = ListOptions { all: false, filters: &Filters::default(), shared_size: true };
    assert!(here.images.list(options).unwrap().iter().all(|image| image.shared_size == 3));
    assert_eq!(here.images.usage().await.unwrap().0, 6);
}

#[tokio::test]
async fn two_pulls_at_once_fetch_a_layer_once() {
    let (registry, here) = (TestRegistry::start().await, Fixture::new());
    let image = TestImage::new(&[&[("a", &noise(300_000))]]);
    registry.add("a:1", &image);
    registry.add("a:2", &image);
    let (one, two) = (registry.name("a:1"), registry.name("a:2"));
    let (first, second) = tokio::join!(here.pull(&one), here.pull(&two));
    first.unwrap();
    second.unwrap();
    assert_eq!(registry.seen(&Digest::of(&image.layers[0].1).to_string()), 1);
    assert_eq!(here.tags(), [one, two]);
}

#[tokio::test]
async fn an_index_gives_the_platforms_image() {
    let (registry, here) = (TestRegistry::start().await, Fixture::new());
    let (amd, arm) = (two_layers(), TestImage::for_platform(&[&[("x", b"arm")]], "arm64"));
    let entry = |name: &str, image: &TestImage, architecture: &str| {
        registry.add(name, image);
        let mut entry = descriptor("application/vnd.oci.image.manifest.v1+json", &image.manifest());
        entry["platform"] = serde_json::json!({"os": "linux", "architecture": architecture});
        entry
    };
    let entries = [entry("x:arm", &arm, "arm64"), entry("x:amd", &amd, "amd64")];
    let index = serde_json::json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": entries});
    let digest = registry.add_manifest("x:all", index.to_string().as_bytes());
    let name = registry.name("x:all");
    here.pull_as(&name, None, Some("linux/amd64")).await.unwrap();
    let inspect = here.images.inspect(&name, None).unwrap();
    assert_eq!(inspect.id, amd.id().to_string());
    assert_eq!(inspect.repo_digests, [format!("{}@{digest}", registry.name("x"))]);
    here.pull_as(&name, None, Some("linux/arm64")).await.unwrap();
    assert_eq!(here.images.inspect(&name, None).unwrap().id, arm.id().to_string());
    let error = here.pull_as(&name, None, Some("linux/s390x")).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::NotFound);
    assert_eq!(error.message, "no matching manifest for linux/s390x in the manifest list entries");
    let wanted = Platform::parse("linux/amd64").unwrap();
    let error = here.images.resolve_for_create(&name, Some(&wanted)).await.unwrap_err();
    assert_eq!(
        error.message,
        format!(
            "image with reference {name} was found but its platform (linux/arm64) does not match the specified platform (linux/amd64)"
        )
    );
    assert!(here.images.resolve_for_create(&name, None).await.unwrap().warning.is_some());
    let single = registry.name("x:arm");
    let told = here.pull_as(&single, None, Some("linux/amd64")).await.unwrap();
    assert!(statuses(&told).last().unwrap().starts_with("WARNING: image with reference"));
}

#[tokio::test]
async fn all_tags_are_pulled_when_none_is_named() {
    let (registry, here) = (TestRegistry::start().await, Fixture::new());
    registry.add("a:1", &TestImage::new(&[&[("a", b"1")]]));
    registry.add("a:2", &TestImage::new(&[&[("a", b"2")]]));
    here.pull(&registry.name("a")).await.unwrap();
    assert_eq!(here.tags(), [registry.name("a:1"), registry.name("a:2")]);
}

#[tokio::test]
async fn what_is_missing_is_said_before_anything_else() {
    let (registry, here) = (TestRegistry::start().await, Fixture::new());
    let name = registry.name("busybox:nosuch");
    let mut messages = here.images.pull(PullRequest {
        reference: Reference::parse(&name).unwrap(),
        platform: None,
        credentials: None,
    });
    let error = messages.recv().await.unwrap().unwrap_err();
    assert_eq!(error.kind, ErrorKind::NotFound);
    assert_eq!(error.message, format!("manifest for {name} not found: manifest unknown: manifest unknown"));
    here.assert_empty();
}

#[tokio::test]
async fn nobody_there_is_connection_refused() {
    let here = Fixture::new();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let error = here.pull(&format!("{address}/x:1")).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Internal);
    assert_eq!(
        error.message,
        format!("Get \"http://{address}/v2/\": dial tcp {address}: connect: connection refused")
    );
}

#[tokio::test]
async fn tokens_are_fetched_with_the_clients_credentials() {
    let (registry, here) = (TestRegistry::start().await, Fixture::new());
    registry.add("private/a:1", &two_layers());
    registry.state().manners.tokens = Some(("user".into(), "pass word".into()));
    let name = registry.name("private/a:1");
    let login = |password: &str| Credentials {
        username: "user".into(),
        password: password.into(),
        ..Credentials::default()
    };
    let error = here.pull_as(&name, Some(login("wrong")), None).await.unwrap_err();
    assert!(error.message.ends_with("unauthorized: incorrect username or password"), "{}", error.message);
    here.pull_as(&name, Some(login("pass word")), None).await.unwrap();
    assert_eq!(here.tags(), std::slice::from_ref(&name));
    assert!(
        registry.state().log.iter().filter(|line| line.contains("Basic")).all(|line| line.contains("/token"))
    );

    registry.state().manners.deny = true;
    let error = here.pull_as(&name, Some(login("pass word")), None).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::NotFound);
    let repository = registry.name("private/a");
    assert_eq!(
        error.message,
        format!(
            "pull access denied for {repository}, repository does not exist or may require 'docker login': denied: requested access to the resource is denied"
        )
    );
}

#[tokio::test]
async fn basic_authentication_is_answered() {
    let (registry, here) = (TestRegistry::start().await, Fixture::new());
    registry.add("a:1", &two_layers());
    registry.state().manners.basic = Some("Basic dTpw".into());
    let name = registry.name("a:1");
    let error = here.pull(&name).await.unwrap_err();
    assert!(error.message.ends_with("no basic auth credentials"), "{}", error.message);
    let login = Credentials { username: "u".into(), password: "p".into(), ..Credentials::default() };
    here.pull_as(&name, Some(login), None).await.unwrap();
}

#[tokio::test]
async fn a_cut_blob_goes_on_where_it_was_cut() {
    for ignore_range in [false, true] {
        let (registry, here) = (TestRegistry::start().await, Fixture::new());
        registry.add("a:1", &TestImage::new(&[&[("a", &noise(200_000))]]));
        registry.state().manners.ignore_range = ignore_range;
        let name = registry.name("a:1");
        // The configuration comes first and is small: it is never cut.
        registry.state().manners.cut = Some((70_000, 2));
        here.pull(&name).await.unwrap();
        assert!(registry.seen("bytes=70000-") >= 1, "{:?}", registry.state().log);
        assert_eq!(here.images.inspect(&name, None).unwrap().size, 200_000);
    }
}

#[tokio::test]
async fn a_registry_that_is_cut_for_good_leaves_nothing() {
    let (registry, here) = (TestRegistry::start().await, Fixture::new());
    // One layer comes whole, the other never does.
    registry.add("a:1", &TestImage::new(&[&[("b", b"small")], &[("a", &noise(200_000))]]));
    registry.state().manners.cut = Some((1000, usize::MAX));
    let error = here.pull(&registry.name("a:1")).await.unwrap_err();
    assert!(error.message.starts_with("Get \"http://"), "{}", error.message);
    here.assert_empty();
    registry.state().manners.cut = None;
    here.pull(&registry.name("a:1")).await.unwrap();
}

#[tokio::test]
async fn what_has_not_its_digest_is_refused() {
    let (registry, here) = (TestRegistry::start().await, Fixture::new());
    let image = two_layers();
    registry.add("a:1", &image);
    let (_, first) = &image.layers[0];
    let mut wrong = first.clone();
    let last = wrong.len() - 1;
    wrong[last] ^= 1;
    registry.corrupt_blob(&Digest::of(first), &wrong);
    let error = here.pull(&registry.name("a:1")).await.unwrap_err();
    let digest = Digest::of(first);
    let known = [
        format!("filesystem layer verification failed for digest {digest}"),
        // The decompressor has a checksum of its own.
        "failed to register layer: ".to_owned(),
    ];
    assert!(known.iter().any(|text| error.message.starts_with(text)), "{}", error.message);
    here.assert_empty();

    let plain = tar_of(&[("x", b"not compressed")]);
    let mut image = two_layers();
    image.layers.truncate(1);
    image.layers[0].1 = plain.clone();
    image.config = String::from_utf8(image.config)
        .unwrap()
        .replace(&image.layers[0].0.to_string(), &Digest::of(&plain).to_string())
        .into_bytes();
    let ids = format!(",\"{}\"", two_layers().layers[1].0);
    image.config = String::from_utf8(image.config).unwrap().replace(&ids, "").into_bytes();
    registry.add("a:2", &image);
    let mut other = plain.clone();
    other[0] = b'y';
    registry.corrupt_blob(&Digest::of(&plain), &other);
    let error = here.pull(&registry.name("a:2")).await.unwrap_err();
    assert_eq!(
        error.message,
        format!("filesystem layer verification failed for digest {}", Digest::of(&plain))
    );
    here.assert_empty();
}

#[tokio::test]
async fn layers_that_cannot_be_unpacked_leave_nothing() {
    let (registry, here) = (TestRegistry::start().await, Fixture::new());
    let whole = gzip(&tar_of(&[("a", &noise(50_000))]));
    for (name, bytes, part) in [
        ("cut:1", whole[..whole.len() / 2].to_vec(), "failed to register layer"),
        ("rubbish:1", b"\x1f\x8b\x08 no gzip at all".to_vec(), "failed to register layer"),
        ("other:1", gzip(&tar_of(&[("b", b"something else")])), "has the digest"),
        ("trailing:1", [whole.clone(), b"more".to_vec()].concat(), "failed to register layer"),
        ("xz:1", b"\xfd7zXZ\0 and so on".to_vec(), "xz compression is not supported"),
    ] {
        let mut image = TestImage::new(&[&[("a", &noise(50_000))]]);
        image.layers[0].1 = bytes;
        registry.add(name, &image);
        let error = here.pull(&registry.name(name)).await.unwrap_err();
        assert!(error.message.contains(part), "{name}: {}", error.message);
        here.assert_empty();
    }
}

#[tokio::test]
async fn contradictions_of_manifest_and_configuration_are_refused() {
    let (registry, here) = (TestRegistry::start().await, Fixture::new());
    let mut image = two_layers();
    image.layers.pop();
    registry.add("a:1", &image);
    let error = here.pull(&registry.name("a:1")).await.unwrap_err();
    assert_eq!(error.message, "layers from manifest don't match image configuration");

    registry.add_manifest(
        "huge:1",
        format!("{{\"schemaVersion\":2,\"x\":\"{}\"}}", "y".repeat(5 << 20)).as_bytes(),
    );
    let error = here.pull(&registry.name("huge:1")).await.unwrap_err();
    assert!(error.message.contains("more than 4194304 bytes"), "{}", error.message);

    registry.add_manifest("old:1", br#"{"schemaVersion":1,"fsLayers":[]}"#);
    let error = here.pull(&registry.name("old:1")).await.unwrap_err();
    assert!(error.kind == ErrorKind::Invalid && error.message.contains("schema 1"), "{}", error.message);

    let image = two_layers();
    let digest = registry.add("lie:1", &image);
    let lie = registry.name(&format!("lie@{}", Digest::of(b"other")));
    assert!(here.pull(&lie).await.unwrap_err().message.contains("manifest unknown"));
    assert!(here.pull(&registry.name(&format!("lie@{digest}"))).await.is_ok());
}

#[tokio::test]
async fn busy_registries_are_asked_again_and_not_for_ever() {
    let (registry, here) = (TestRegistry::start().await, Fixture::new());
    registry.add("a:1", &two_layers());
    registry.state().manners.refuse = [(429, Some("0")), (503, None)].into();
    here.pull(&registry.name("a:1")).await.unwrap();
    registry.state().manners.refuse = [(429, Some("1000000")); 3].into();
    let error = here.pull(&registry.name("a:1")).await.unwrap_err();
    assert_eq!(error.message, "toomanyrequests: slow down");
    registry.state().manners.refuse = [(503, None); 3].into();
    let error = here.pull(&registry.name("a:1")).await.unwrap_err();
    assert_eq!(error.message, "received unexpected HTTP status: 503 Service Unavailable");
}

#[tokio::test]
async fn redirects_are_followed_without_the_authorization() {
    let (registry, store, here) = (TestRegistry::start().await, TestRegistry::start().await, Fixture::new());
    let image = two_layers();
    registry.add("a:1", &image);
    store.add("a:1", &image);
    registry.state().manners.tokens = Some((String::new(), String::new()));
    registry.state().manners.redirect = Some(format!("http://{}", store.address));
    here.pull(&registry.name("a:1")).await.unwrap();
    assert_eq!(store.seen("/blobs/"), 3);
    assert_eq!(store.seen("Bearer"), 0);
    assert!(registry.seen("Bearer") > 0);
    registry.state().manners.redirect = Some(format!("http://{}", registry.address));
    registry.add("loop:1", &TestImage::new(&[&[("z", b"z")]]));
    let error = here.pull(&registry.name("loop:1")).await.unwrap_err();
    assert!(error.message.ends_with("stopped after 10 redirects"), "{}", error.message);
}

#[tokio::test]
async fn the_hubs_images_come_from_a_mirror_without_credentials() {
    let registry = TestRegistry::start().await;
    let here = Fixture::with(|settings| settings.mirrors = vec![format!("http://{}", registry.address)]);
    registry.add("library/busybox:latest", &two_layers());
    registry.state().manners.tokens = Some((String::new(), String::new()));
    let login = Credentials { username: "u".into(), password: "p".into(), ..Credentials::default() };
    let messages = here.pull_as("busybox:latest", Some(login), None).await.unwrap();
    assert_eq!(statuses(&messages)[0], "Pulling from library/busybox");
    assert_eq!(here.tags(), ["busybox:latest"]);
    assert_eq!(registry.seen("Basic"), 0);
}

#[tokio::test]
async fn insecure_registries_may_have_any_certificate() {
    let certified = rcgen::generate_simple_self_signed(["somewhere.example".to_owned()]).unwrap();
    let key = rustls::pki_types::PrivateKeyDer::try_from(certified.signing_key.serialize_der()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certified.cert.der().clone()], key)
        .unwrap();
    let (registry, here) = (TestRegistry::start_tls(config).await, Fixture::new());
    registry.add("a:1", &two_layers());
    here.pull(&registry.name("a:1")).await.unwrap();
    // What it refuses behind TLS is not asked for in the clear.
    let error = here.pull(&registry.name("a:2")).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::NotFound);
}

#[tokio::test]
async fn a_client_that_goes_away_ends_the_pull() {
    let (registry, here) = (TestRegistry::start().await, Fixture::new());
    registry.add("a:1", &TestImage::new(&[&[("a", &noise(200_000))]]));
    registry.state().manners.stall = Some(100_000);
    let mut messages = here.images.pull(PullRequest {
        reference: Reference::parse(&registry.name("a:1")).unwrap(),
        platform: None,
        credentials: None,
    });
    let tmp = here.dir.path().join("layers/tmp");
    let busy = || std::fs::read_dir(&tmp).unwrap().next().is_some();
    while !busy() {
        tokio::select! {
            message = messages.recv() => drop(message.unwrap().unwrap()),
            () = tokio::time::sleep(Duration::from_millis(5)) => {}
        }
    }
    drop(messages);
    while busy() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    here.assert_empty();
    registry.state().manners.stall = None;
    here.pull(&registry.name("a:1")).await.unwrap();
}
