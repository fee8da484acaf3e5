//! The image store as a whole, without the rest of the daemon.

mod asking;
mod load;
mod pull;
mod real;
mod store;

use std::{
    convert::Infallible,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use bulkhead_rootfs::layers::{DiffId, LayerStore};
use bytes::Bytes;
use serde_json::Value;
use tempfile::TempDir;

use super::*;
use registry::Patience;

/// A store in a directory of its own, and what it announced.
struct Fixture {
    dir: TempDir,
    images: Arc<ImageStore>,
    events: Arc<Mutex<Vec<ImageEvent>>>,
}

impl Fixture {
    fn new() -> Self {
        Self::with(|_| ())
    }

    fn with(change: impl FnOnce(&mut RegistrySettings)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (images, events) = open(dir.path(), change);
        Self { dir, images, events }
    }

    /// As after a restart of the daemon.
    fn reopen(self) -> Self {
        let Self { dir, images, .. } = self;
        drop(images);
        let (images, events) = open(dir.path(), |_| ());
        Self { dir, images, events }
    }

    async fn pull(&self, name: &str) -> Result<Vec<Value>> {
        self.pull_as(name, None, None).await
    }

    async fn pull_as(
        &self,
        name: &str,
        credentials: Option<Credentials>,
        platform: Option<&str>,
    ) -> Result<Vec<Value>> {
        let reference = Reference::parse(name).unwrap();
        let platform = platform.map(|text| Platform::parse(text).unwrap());
        finish(self.images.pull(PullRequest { reference, platform, credentials })).await
    }

    async fn import(&self, name: &str, files: &[(&str, &[u8])]) -> Digest {
        let request =
            ImportRequest { reference: Some(Reference::parse(name).unwrap()), ..ImportRequest::default() };
        self.images.import(request, body(&registry::testing::tar_of(files))).await.unwrap()
    }

    fn tags(&self) -> Vec<String> {
        let options = ListOptions { all: true, filters: &Filters::default(), shared_size: false };
        let mut tags: Vec<_> =
            self.images.list(options).unwrap().into_iter().flat_map(|image| image.repo_tags).collect();
        tags.sort_unstable();
        tags
    }

    fn layers(&self) -> Vec<DiffId> {
        self.images.layers().list().unwrap()
    }

    fn actions(&self) -> Vec<&'static str> {
        self.events.lock().unwrap().iter().map(|event| event.action).collect()
    }

    /// Nothing was left: no image, no name, no layer, no temporary file.
    fn assert_empty(&self) {
        assert_eq!(self.images.count(), 0);
        assert_eq!(self.layers(), []);
        for folder in ["image/tmp", "image/configs", "image/manifests", "image/records", "layers/tmp"] {
            let path = self.dir.path().join(folder);
            let left: Vec<_> =
                std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            assert!(left.is_empty(), "{folder}: {left:?}");
        }
    }
}

fn open(
    dir: &Path,
    change: impl FnOnce(&mut RegistrySettings),
) -> (Arc<ImageStore>, Arc<Mutex<Vec<ImageEvent>>>) {
    let events = Arc::new(Mutex::new(Vec::new()));
    let heard = Arc::clone(&events);
    let quick = Duration::from_millis(1);
    let patience =
        Patience { attempts: 3, pause: quick, longest_pause: quick * 20, idle: Duration::from_secs(10) };
    let mut registries = RegistrySettings { patience, ..RegistrySettings::default() };
    change(&mut registries);
    let images = ImageStore::open(Options {
        root: dir.join("image"),
        layers: Arc::new(LayerStore::open(dir.join("layers")).unwrap()),
        registries,
        downloads: DEFAULT_DOWNLOADS,
        listener: Arc::new(move |event| heard.lock().unwrap().push(event)),
    })
    .unwrap();
    (images, events)
}

/// All messages; or the error, wherever it came.
async fn finish(mut messages: Messages) -> Result<Vec<Value>> {
    let mut all = Vec::new();
    while let Some(message) = messages.recv().await {
        all.push(serde_json::from_slice(&message?.line()).unwrap());
    }
    Ok(all)
}

fn body(bytes: &[u8]) -> impl futures_util::Stream<Item = Result<Bytes, Infallible>> + Send + use<> {
    let chunks: Vec<_> = bytes.chunks(4096).map(|chunk| Ok(Bytes::copy_from_slice(chunk))).collect();
    futures_util::stream::iter(chunks)
}

fn statuses(messages: &[Value]) -> Vec<&str> {
    messages.iter().filter_map(|message| message["status"].as_str()).collect()
}
