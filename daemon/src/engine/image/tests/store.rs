use std::fs;

use super::*;
use crate::engine::ErrorKind;

fn container(id: &str, image: Digest, running: bool) -> ContainerUse {
    ContainerUse { id: id.repeat(64), image, layers: vec![], running }
}

async fn connect(here: &Fixture, containers: Vec<ContainerUse>) {
    here.images.connect(Arc::new(move || containers.clone())).await;
}

fn listed(here: &Fixture, filters: &[(&str, &str)]) -> Vec<String> {
    let mut all = Filters::default();
    for (key, value) in filters {
        all.insert(*key, *value);
    }
    let options = ListOptions { all: false, filters: &all, shared_size: false };
    let mut names: Vec<_> = (here.images.list(options).unwrap().into_iter())
        .map(|image| image.repo_tags.first().cloned().unwrap_or(image.id))
        .collect();
    names.sort_unstable();
    names
}

const FORCE: RemoveOptions = RemoveOptions { force: true, keep_parents: false };
const PLAIN: RemoveOptions = RemoveOptions { force: false, keep_parents: false };

fn lines(items: &[DeleteItem]) -> Vec<String> {
    let kind = |item: &DeleteItem| match item.untagged.as_str() {
        "" => format!("-{}", item.deleted),
        name => format!("~{name}"),
    };
    items.iter().map(kind).collect()
}

#[tokio::test]
async fn names_go_one_by_one_and_the_image_with_the_last() {
    let here = Fixture::new();
    let id = here.import("a:1", &[("f", b"x")]).await;
    let layer = here.layers()[0];
    here.images.tag("a:1", &Reference::parse("b").unwrap()).await.unwrap();
    assert_eq!(lines(&here.images.remove("a:1", PLAIN).await.unwrap()), ["~a:1"]);
    assert_eq!(here.tags(), ["b:latest"]);
    let removed = here.images.remove("b", PLAIN).await.unwrap();
    assert_eq!(lines(&removed), ["~b:latest".to_owned(), format!("-{id}"), format!("-{layer}")]);
    here.assert_empty();
    assert_eq!(here.actions(), ["tag", "import", "tag", "untag", "untag", "delete"]);
    let error = here.images.remove("b", PLAIN).await.unwrap_err();
    assert_eq!((error.kind, error.message.as_str()), (ErrorKind::NotFound, "No such image: b:latest"));
}

#[tokio::test]
async fn conflicts_have_dockers_words() {
    let here = Fixture::new();
    let id = here.import("a:1", &[("f", b"x")]).await;
    let short = id.short();
    connect(&here, vec![container("c", id, false)]).await;
    let told = |result: Result<Vec<DeleteItem>>| {
        let error = result.unwrap_err();
        assert_eq!(error.kind, ErrorKind::Conflict);
        error.message
    };
    assert_eq!(
        told(here.images.remove("a:1", PLAIN).await),
        format!(
            "conflict: unable to remove repository reference \"a:1\" (must force) - container cccccccccccc is using its referenced image {short}"
        )
    );
    assert_eq!(
        told(here.images.remove(&short, PLAIN).await),
        format!(
            "conflict: unable to delete {short} (must be forced) - image is being used by stopped container cccccccccccc"
        )
    );
    here.images.tag("a:1", &Reference::parse("b:1").unwrap()).await.unwrap();
    assert_eq!(
        told(here.images.remove(&short, PLAIN).await),
        format!(
            "conflict: unable to delete {short} (must be forced) - image is referenced in multiple repositories"
        )
    );
    // One name of two may go though a container uses the image.
    assert_eq!(lines(&here.images.remove("b:1", PLAIN).await.unwrap()), ["~b:1"]);

    let here = Fixture::new();
    let id = here.import("a:1", &[("f", b"x")]).await;
    connect(&here, vec![container("d", id, true)]).await;
    assert_eq!(
        told(here.images.remove(&id.to_string(), FORCE).await),
        format!(
            "conflict: unable to delete {} (cannot be forced) - image is being used by running container dddddddddddd",
            id.short()
        )
    );
    // By name and with force only the name goes.
    assert_eq!(lines(&here.images.remove("a:1", FORCE).await.unwrap()), ["~a:1"]);
    assert_eq!(here.images.count(), 1);
}

#[tokio::test]
async fn a_containers_layers_outlive_its_image() {
    let here = Fixture::new();
    let id = here.import("a:1", &[("f", b"x")]).await;
    let alive =
        Arc::new(Mutex::new(vec![ContainerUse { layers: here.layers(), ..container("c", id, false) }]));
    let containers = Arc::clone(&alive);
    here.images.connect(Arc::new(move || containers.lock().unwrap().clone())).await;
    let removed = here.images.remove("a:1", FORCE).await.unwrap();
    assert_eq!(lines(&removed), ["~a:1".to_owned(), format!("-{id}")]);
    assert_eq!(here.layers().len(), 1);
    alive.lock().unwrap().clear();
    here.images.collect_layers_soon().await;
    here.assert_empty();
}

#[tokio::test]
async fn a_pin_keeps_layers_until_the_container_is_recorded() {
    let here = Fixture::new();
    here.import("a:1", &[("f", b"x")]).await;
    let resolved = here.images.resolve_for_create("a:1", None).await.unwrap();
    here.images.remove("a:1", PLAIN).await.unwrap();
    assert_eq!(here.layers(), resolved.layers);
    drop(resolved);
    here.images.collect_layers_soon().await;
    here.assert_empty();
}

#[tokio::test]
async fn ancestors_are_kept_by_their_children_and_go_with_them() {
    let here = Fixture::new();
    let parent = here.import("p:1", &[("f", b"x")]).await;
    let child = here.import("c:1", &[("f", b"y")]).await;
    here.images.store.update_record(&child, |record| record.parent = Some(parent)).unwrap();
    let error = here.images.remove(&parent.hex(), FORCE).await.unwrap_err();
    assert!(
        error.message.ends_with("(cannot be forced) - image has dependent child images"),
        "{}",
        error.message
    );
    // With its name gone it is hidden, and then goes along.
    assert_eq!(lines(&here.images.remove("p:1", PLAIN).await.unwrap()), ["~p:1"]);
    assert_eq!(listed(&here, &[]), ["c:1"]);
    assert_eq!(here.images.history("c:1", None).unwrap()[0].id, child.to_string());
    let removed = here.images.remove("c:1", PLAIN).await.unwrap();
    assert!(lines(&removed).contains(&format!("-{parent}")));
    here.assert_empty();
}

#[tokio::test]
async fn prune_takes_the_nameless_or_all_that_is_unused() {
    let here = Fixture::new();
    let old = here.import("a:1", &[("f", b"old")]).await;
    let new = here.import("a:1", &[("f", b"new")]).await;
    assert_eq!(listed(&here, &[("dangling", "true")]), [old.to_string()]);
    let report = here.images.prune(&Filters::default()).await.unwrap();
    assert_eq!(report.space_reclaimed, 3);
    assert_eq!(lines(&report.images_deleted.unwrap())[0], format!("-{old}"));
    assert_eq!(here.images.prune(&Filters::default()).await.unwrap().images_deleted, None);

    let mut all = Filters::default();
    all.insert("dangling", "false");
    let mut labelled = all.clone();
    labelled.insert("label", "nosuch");
    assert_eq!(here.images.prune(&labelled).await.unwrap().images_deleted, None);
    connect(&here, vec![container("c", new, false)]).await;
    here.import("b:1", &[("f", b"other")]).await;
    here.images.prune(&all).await.unwrap();
    assert_eq!(here.tags(), ["a:1"]);
    let mut bad = Filters::default();
    bad.insert("dangling", "maybe");
    assert_eq!(here.images.prune(&bad).await.unwrap_err().kind, ErrorKind::Invalid);
}

#[tokio::test]
async fn lists_are_filtered() {
    let here = Fixture::new();
    here.import("a:1", &[("f", b"1")]).await;
    let request = ImportRequest {
        reference: Some(Reference::parse("b/c:2").unwrap()),
        changes: vec!["LABEL x=y".into()],
        ..ImportRequest::default()
    };
    here.images.import(request, body(&registry::testing::tar_of(&[("f", b"2")]))).await.unwrap();
    for (filters, names) in [
        (&[][..], &["a:1", "b/c:2"][..]),
        (&[("reference", "a")], &["a:1"]),
        (&[("reference", "b/*:2")], &["b/c:2"]),
        (&[("label", "x")], &["b/c:2"]),
        (&[("label", "x=z")], &[]),
        (&[("since", "a:1")], &["b/c:2"]),
        (&[("before", "b/c:2")], &["a:1"]),
        (&[("dangling", "true")], &[]),
        (&[("until", "24h")], &[]),
        (&[("until", "2100-01-01T00:00:00Z")], &["a:1", "b/c:2"]),
    ] {
        assert_eq!(listed(&here, filters), names, "{filters:?}");
    }
    let mut bad = Filters::default();
    bad.insert("before", "nosuch");
    let options = ListOptions { all: false, filters: &bad, shared_size: false };
    assert_eq!(here.images.list(options).unwrap_err().message, "No such image: nosuch:latest");
}

#[tokio::test]
async fn tags_are_checked_and_move() {
    let here = Fixture::new();
    let one = here.import("a:1", &[("f", b"1")]).await;
    let two = here.import("b:1", &[("f", b"2")]).await;
    here.images.tag("b:1", &Reference::parse("a:1").unwrap()).await.unwrap();
    assert_eq!(here.images.inspect("a:1", None).unwrap().id, two.to_string());
    assert_eq!(here.images.inspect(&one.hex()[..12], None).unwrap().repo_tags, Vec::<String>::new());
    let digested = Reference::parse(&format!("a@{one}")).unwrap();
    assert_eq!(here.images.tag("b:1", &digested).await.unwrap_err().kind, ErrorKind::Invalid);
    let ambiguous = Reference::parse("sha256:abc").unwrap();
    assert_eq!(here.images.tag("b:1", &ambiguous).await.unwrap_err().kind, ErrorKind::Invalid);
    let error = here.images.tag("nosuch", &Reference::parse("x").unwrap()).await.unwrap_err();
    assert_eq!(error.message, "No such image: nosuch:latest");
    assert_eq!(here.images.name_for_list("a:1", &one), one.to_string());
    assert_eq!(here.images.name_for_list("a:1", &two), "a:1");
}

#[tokio::test]
async fn everything_survives_a_restart() {
    let here = Fixture::new();
    let id = here.import("a:1", &[("f", b"1")]).await;
    let before = here.images.inspect("a:1", None).unwrap();
    let here = here.reopen();
    assert_eq!(here.images.inspect("a:1", None).unwrap(), before);
    assert_eq!(here.images.resolve_for_create(&id.hex(), None).await.unwrap().layers, here.layers());
}

#[tokio::test]
async fn damage_is_set_aside_and_the_rest_goes_on() {
    let here = Fixture::new();
    here.import("a:1", &[("f", b"1")]).await;
    let damaged = here.import("b:1", &[("f", b"2")]).await;
    let lost = here.import("c:1", &[("f", b"3")]).await;
    let layer = here.images.resolve_for_create("c:1", None).await.unwrap().layers[0];
    here.images.layers().remove(&layer).unwrap();
    let configs = here.dir.path().join("image/configs");
    fs::write(configs.join(damaged.hex()), b"{}").unwrap();
    fs::write(configs.join("rubbish"), b"{}").unwrap();
    fs::write(here.dir.path().join("image/records").join(lost.hex()), b"[").unwrap();
    let here = here.reopen();
    assert_eq!(here.tags(), ["a:1"]);
    let aside = fs::read_dir(here.dir.path().join("image/damaged")).unwrap().count();
    assert_eq!(aside, 3);
    connect(&here, vec![]).await;
    assert_eq!(here.layers().len(), 1);

    fs::write(here.dir.path().join("image/tables/references.json"), b"{").unwrap();
    let here = here.reopen();
    assert_eq!((here.tags(), here.images.count()), (vec![], 1));
}

#[tokio::test]
async fn a_crash_before_the_name_leaves_an_image_without_one() {
    let here = Fixture::new();
    here.import("a:1", &[("f", b"1")]).await;
    fs::remove_file(here.dir.path().join("image/tables/references.json")).unwrap();
    fs::write(here.dir.path().join("image/manifests").join("0".repeat(64)), b"orphan").unwrap();
    let here = here.reopen();
    assert_eq!((here.tags(), here.images.count()), (vec![], 1));
    assert_eq!(fs::read_dir(here.dir.path().join("image/manifests")).unwrap().count(), 0);
}
