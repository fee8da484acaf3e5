use super::*;
use crate::engine::{
    ErrorKind,
    image::registry::testing::{TestImage, descriptor, gzip, tar_of},
};

fn streams(messages: &[Value]) -> String {
    messages.iter().filter_map(|message| message["stream"].as_str()).collect()
}

async fn load(here: &Fixture, archive: Vec<u8>) -> Result<Vec<Value>> {
    finish(here.images.load(body(&archive), None, true)).await
}

/// As `docker save` writes it, `layers` as they are to lie in it.
fn docker_archive(image: &TestImage, tags: &Value, layers: &[Vec<u8>]) -> Vec<u8> {
    let names: Vec<_> = (0..layers.len()).map(|number| format!("{number}/layer.tar")).collect();
    let manifest =
        serde_json::json!([{"Config": "config.json", "RepoTags": tags, "Layers": names}]).to_string();
    let mut files: Vec<(&str, &[u8])> = vec![("config.json", &image.config)];
    files.extend(names.iter().zip(layers).map(|(name, layer)| (name.as_str(), layer.as_slice())));
    files.push(("manifest.json", manifest.as_bytes()));
    tar_of(&files)
}

const FILES: &[(&str, &[u8])] = &[("a", b"one")];

#[tokio::test]
async fn docker_archives_are_loaded() {
    let image = TestImage::new(&[FILES]);
    for (layer, packed) in [(tar_of(FILES), false), (gzip(&tar_of(FILES)), true)] {
        let here = Fixture::new();
        let archive = docker_archive(&image, &serde_json::json!(["busybox:1", "other/name:2"]), &[layer]);
        let archive = if packed { gzip(&archive) } else { archive };
        let messages = load(&here, archive).await.unwrap();
        assert_eq!(streams(&messages), "Loaded image: busybox:1\nLoaded image: other/name:2\n");
        assert_eq!(here.images.inspect("busybox:1", None).unwrap().id, image.id().to_string());
        assert_eq!(here.tags(), ["busybox:1", "other/name:2"]);
        assert_eq!(here.actions(), ["load"]);
    }
}

#[tokio::test]
async fn an_image_without_a_name_is_told_by_its_id() {
    let (here, image) = (Fixture::new(), TestImage::new(&[FILES]));
    let messages = load(&here, docker_archive(&image, &Value::Null, &[tar_of(FILES)])).await.unwrap();
    assert_eq!(streams(&messages), format!("Loaded image ID: {}\n", image.id()));
}

#[tokio::test]
async fn oci_layouts_are_loaded() {
    let (here, image) = (Fixture::new(), TestImage::new(&[FILES]));
    let manifest = image.manifest();
    let mut entry = descriptor("application/vnd.oci.image.manifest.v1+json", &manifest);
    entry["annotations"] = serde_json::json!({"io.containerd.image.name": "docker.io/library/busybox:9"});
    let index = serde_json::json!({"schemaVersion": 2, "manifests": [entry]}).to_string();
    let path = |bytes: &[u8]| format!("blobs/sha256/{}", Digest::of(bytes).hex());
    let (m, c, l) = (path(&manifest), path(&image.config), path(&image.layers[0].1));
    let archive = |config: &[u8]| {
        tar_of(&[
            ("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#),
            ("index.json", index.as_bytes()),
            (&m, &manifest),
            (&c, config),
            (&l, &image.layers[0].1),
        ])
    };
    let error = load(&here, archive(b"{}")).await.unwrap_err();
    assert!(error.message.contains("does not have its digest"), "{}", error.message);
    here.assert_empty();
    let messages = load(&here, archive(&image.config)).await.unwrap();
    assert_eq!(streams(&messages), "Loaded image: busybox:9\n");
    assert_eq!(here.images.inspect("busybox:9", None).unwrap().id, image.id().to_string());
}

#[tokio::test]
async fn bad_archives_are_refused_and_leave_nothing() {
    let image = TestImage::new(&[FILES]);
    let tags = serde_json::json!(["x:1"]);
    let good = docker_archive(&image, &tags, &[tar_of(FILES)]);
    for (archive, part) in [
        (b"no archive".to_vec(), "no manifest.json"),
        (good[..good.len() / 2].to_vec(), "EOF"),
        (tar_of(&[("manifest.json", b"null")]), "manifest cannot be null"),
        (tar_of(&[("manifest.json", b"{}")]), ""),
        (tar_of(&[("manifest.json", br#"[{"Config":"../../../etc/passwd"}]"#)]), "no such file"),
        (tar_of(&[("repositories", b"{}")]), "before 1.10"),
        (docker_archive(&image, &tags, &[]), "layers length mismatch: expected 0, got 1"),
        (docker_archive(&image, &tags, &[tar_of(&[("b", b"two")])]), "invalid diffID for layer 0"),
        (docker_archive(&image, &serde_json::json!(["Bad"]), &[tar_of(FILES)]), "invalid tag \"Bad\""),
    ] {
        let here = Fixture::new();
        let error = load(&here, archive).await.unwrap_err();
        assert!(error.message.contains(part), "{} lacks {part}", error.message);
        here.assert_empty();
    }
}

#[tokio::test]
async fn a_body_that_breaks_off_leaves_nothing() {
    let here = Fixture::new();
    let half = tar_of(&[("a", &[7; 5000])]);
    let pieces = vec![Ok(Bytes::from(half[..3000].to_vec())), Err(std::io::Error::other("gone"))];
    let result = here.images.import(ImportRequest::default(), futures_util::stream::iter(pieces)).await;
    assert!(result.unwrap_err().message.contains("the transfer was cut off"));
    here.assert_empty();
}

#[tokio::test]
async fn a_tar_is_imported_as_an_image_of_one_layer() {
    let here = Fixture::new();
    let request = ImportRequest {
        reference: Some(Reference::parse("busybox").unwrap()),
        message: "Imported from -".into(),
        changes: vec!["CMD [\"sh\"]".into(), "ENV A=b".into()],
        ..ImportRequest::default()
    };
    let id = here.images.import(request.clone(), body(&gzip(&tar_of(FILES)))).await.unwrap();
    let inspect = here.images.inspect("busybox:latest", None).unwrap();
    assert_eq!((inspect.id.as_str(), inspect.comment.as_str()), (id.to_string().as_str(), "Imported from -"));
    assert_eq!((inspect.config.cmd, inspect.config.env), (Some(vec!["sh".into()]), Some(vec!["A=b".into()])));
    assert_eq!((inspect.architecture, inspect.os), (Platform::host().architecture, "linux".to_owned()));
    assert_eq!((inspect.size, inspect.root_fs.layers.len()), (3, 1));
    assert!(!inspect.metadata.last_tag_time.starts_with("0001"));
    assert_eq!(here.actions(), ["tag", "import"]);
    let history = here.images.history("busybox", None).unwrap();
    assert_eq!((history.len(), history[0].size, history[0].id.clone()), (1, 3, id.to_string()));
    assert_eq!(history[0].tags, Some(vec!["busybox:latest".to_owned()]));

    let bad = ImportRequest { changes: vec!["RUN x".into()], ..request };
    let error = here.images.import(bad, body(&[])).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Invalid);
}

#[tokio::test]
async fn one_document_named_ever_so_often_does_not_exhaust_memory() {
    let here = Fixture::new();
    let item = serde_json::json!({"Config": "config.json", "RepoTags": [], "Layers": []});
    let manifest = serde_json::Value::Array(vec![item; 900]).to_string();
    let config = vec![b' '; 1 << 20];
    let archive = tar_of(&[("config.json", &config), ("manifest.json", manifest.as_bytes())]);
    let error = load(&here, archive).await.unwrap_err();
    assert!(error.message.contains("has more than"), "{}", error.message);
}
