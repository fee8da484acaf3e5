//! Against Debian's `docker-registry`, where it is installed.

use std::process::{Child, Command, Stdio};

use http::{Method, Request, header};
use http_body_util::{BodyExt, Full};
use hyper_util::{client::legacy, rt::TokioExecutor};

use super::*;
use crate::engine::image::registry::testing::{TestImage, noise};

struct Registry {
    child: Child,
    address: String,
    _dir: TempDir,
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn start() -> Option<Registry> {
    let dir = tempfile::tempdir().unwrap();
    let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let config = dir.path().join("config.yml");
    let root = dir.path().join("data");
    let text = format!(
        "version: 0.1\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: '{address}'}}\n",
        root.display()
    );
    std::fs::write(&config, text).unwrap();
    let child = Command::new("docker-registry")
        .arg("serve")
        .arg(&config)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let Ok(child) = child else {
        eprintln!("docker-registry is not installed: only the registry of these tests' own was asked");
        return None;
    };
    let registry = Registry { child, address, _dir: dir };
    while tokio::net::TcpStream::connect(&registry.address).await.is_err() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Some(registry)
}

/// Pushes with as little as the specification lets through.
async fn push(registry: &Registry, repository: &str, tag: &str, image: &TestImage) {
    let client: legacy::Client<_, Full<Bytes>> = legacy::Client::builder(TokioExecutor::new()).build_http();
    let send = async |method: Method, url: String, kind: &str, body: Vec<u8>| {
        let request = Request::builder().method(method).uri(&url).header(header::CONTENT_TYPE, kind);
        let response = client.request(request.body(Full::from(body)).unwrap()).await.unwrap();
        assert!(response.status().is_success(), "{url}: {}", response.status());
        let location =
            response.headers().get(header::LOCATION).map(|value| value.to_str().unwrap().to_owned());
        response.into_body().collect().await.unwrap();
        location
    };
    let base = format!("http://{}/v2/{repository}", registry.address);
    let blobs = image.layers.iter().map(|(_, bytes)| bytes).chain([&image.config]);
    for blob in blobs {
        let location = send(Method::POST, format!("{base}/blobs/uploads/"), "", vec![]).await.unwrap();
        let separator = if location.contains('?') { '&' } else { '?' };
        let url = format!("{location}{separator}digest={}", Digest::of(blob));
        send(Method::PUT, url, "application/octet-stream", blob.clone()).await;
    }
    let kind = "application/vnd.oci.image.manifest.v1+json";
    send(Method::PUT, format!("{base}/manifests/{tag}"), kind, image.manifest()).await;
}

#[tokio::test]
async fn debians_registry_is_understood() {
    let Some(registry) = start().await else { return };
    let image = TestImage::new(&[&[("bin/sh", &noise(700_000))], &[("etc/x", b"y")]]);
    push(&registry, "library/busybox", "latest", &image).await;
    let here = Fixture::with(|settings| settings.mirrors = vec![format!("http://{}", registry.address)]);
    here.pull("busybox:latest").await.unwrap();
    assert_eq!(here.images.inspect("busybox", None).unwrap().id, image.id().to_string());
    let name = format!("{}/library/busybox:nosuch", registry.address);
    let error = here.pull(&name).await.unwrap_err();
    assert_eq!(error.message, format!("manifest for {name} not found: manifest unknown: manifest unknown"));
    let name = format!("{}/nosuch/repo", registry.address);
    let error = here.pull(&name).await.unwrap_err();
    assert_eq!(
        error.message,
        format!("repository {name} not found: name unknown: repository name not known to registry")
    );
}
