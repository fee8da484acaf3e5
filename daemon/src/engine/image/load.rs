//! `docker load`: images from an archive, as `docker save` and OCI tools write them.
//!
//! | in the archive | what it is |
//! |---|---|
//! | `manifest.json` | Docker's: a list of `{Config, RepoTags, Layers}`, paths within the archive |
//! | `index.json` | an OCI image layout: an index, and blobs below `blobs/sha256/` |
//!
//! The archive is spooled to a file below the store first: its list of images may be the last thing in it.

use std::{
    io::{self, Write},
    sync::Arc,
};

use bulkhead_rootfs::layers::{DiffId, LayerError, Limits, decompress};
use bytes::Bytes;
use futures_util::Stream;
use serde::Deserialize;

use super::{
    ImageStore,
    archive::Archive,
    config::{ImageConfig, MAX_CONFIG},
    digest::Digest,
    errors,
    feed::{Feed, Whole},
    platform::Platform,
    progress::{Message, Messages, Progress, Throttle},
    reference::Reference,
    registry::manifest::{Descriptor, Manifest, choose},
    store::MAX_MANIFEST,
};
use crate::{
    api::types::json,
    engine::{Error, Result},
};

/// The largest archive that is taken, uncompressed.
const MAX_ARCHIVE: u64 = 256 << 30;
/// Images of one archive.
const MAX_IMAGES: usize = 1000;
/// Indexes that may lie within each other.
const MAX_NESTING: usize = 3;
/// Bytes of all manifests and configurations of an archive: they are in memory together.
const MAX_DOCUMENTS: usize = 256 << 20;
const NAME: &str = "io.containerd.image.name";
const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// An entry of `manifest.json`.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
struct Item {
    config: String,
    repo_tags: Vec<String>,
    layers: Vec<String>,
}

/// An image of an archive, whichever way it was described.
struct Found {
    config: Vec<u8>,
    manifest: Option<Vec<u8>>,
    /// Paths within the archive, bottom first.
    layers: Vec<String>,
    names: Vec<String>,
}

/// One load under way, on a thread that may block.
struct Load<'a> {
    store: &'a Arc<ImageStore>,
    archive: Archive,
    progress: &'a Progress,
    platform: Option<Platform>,
    quiet: bool,
    /// What is left of [`MAX_DOCUMENTS`].
    documents: std::cell::Cell<usize>,
}

impl ImageStore {
    /// Loads the images of `body`, a tar archive that may be compressed. The messages end with the load.
    pub fn load<E: Send>(
        self: &Arc<Self>,
        body: impl Stream<Item = Result<Bytes, E>> + Send + 'static,
        platform: Option<Platform>,
        quiet: bool,
    ) -> Messages {
        let (progress, messages) = Progress::channel();
        let (store, feed) = (Arc::clone(self), Feed::of(body));
        tokio::spawn(async move {
            let (worker, sender) = (Arc::clone(&store), progress.clone());
            let result = super::pull::blocking(move || {
                let archive = spool(&worker, feed)?;
                let documents = MAX_DOCUMENTS.into();
                Load { store: &worker, archive, progress: &sender, platform, quiet, documents }.run()
            })
            .await;
            if let Err(error) = result {
                store.collect_layers_soon().await;
                progress.fail(error).await;
            }
        });
        messages
    }
}

/// Writes the body, decompressed, to a file that has no name any more.
fn spool(store: &ImageStore, feed: Feed) -> Result<Archive> {
    let storage = |error: io::Error| errors::storage(&error);
    let (mut file, name) = store.store.files().temporary().map_err(storage)?;
    drop(name);
    let ended = feed.ended();
    let reader = decompress(feed).map_err(storage)?;
    let mut reader = io::Read::take(Whole { reader, ended }, MAX_ARCHIVE + 1);
    let length =
        io::copy(&mut reader, &mut file).and_then(|length| file.flush().map(|()| length)).map_err(storage)?;
    if length > MAX_ARCHIVE {
        return Err(Error::invalid(format!("the archive has more than {MAX_ARCHIVE} bytes")));
    }
    Archive::index(file).map_err(storage)
}

impl Load<'_> {
    fn run(&self) -> Result<()> {
        let found = if self.archive.contains("manifest.json") {
            self.docker()?
        } else if self.archive.contains("index.json") {
            self.oci_layout()?
        } else if self.archive.contains("repositories") {
            let text = "the archive has Docker's format of before 1.10, which is not supported";
            return Err(Error::invalid(text));
        } else {
            return Err(Error::invalid("the archive has no manifest.json: it is not an image archive"));
        };
        let mut nameless = String::new();
        for image in found {
            let named = !image.names.is_empty();
            let Some(id) = self.image(&image)? else { continue };
            if !named {
                nameless.push_str(&format!("Loaded image ID: {id}\n"));
            }
        }
        if !nameless.is_empty() {
            self.progress.send_blocking(Message::stream(nameless));
        }
        Ok(())
    }

    fn docker(&self) -> Result<Vec<Found>> {
        let items: Option<Vec<Item>> =
            json::from_slice(&self.read("manifest.json", MAX_MANIFEST)?).map_err(bad)?;
        let null = || Error::invalid("invalid manifest, manifest cannot be null (but can be [])");
        let items = items.ok_or_else(null)?;
        if items.len() > MAX_IMAGES {
            return Err(Error::invalid(format!("the archive has more than {MAX_IMAGES} images")));
        }
        items
            .into_iter()
            .map(|item| {
                let config = self.read(&item.config, MAX_CONFIG)?;
                Ok(Found { config, manifest: None, layers: item.layers, names: item.repo_tags })
            })
            .collect()
    }

    fn oci_layout(&self) -> Result<Vec<Found>> {
        let index = Manifest::parse(&self.read("index.json", MAX_MANIFEST)?).map_err(bad)?;
        let Manifest::Index(entries) = index else { return Err(Error::invalid("index.json is no index")) };
        if entries.len() > MAX_IMAGES {
            return Err(Error::invalid(format!("the archive has more than {MAX_IMAGES} images")));
        }
        entries.iter().map(|entry| self.oci_image(entry)).collect()
    }

    fn oci_image(&self, entry: &Descriptor) -> Result<Found> {
        let platform = self.platform.clone().unwrap_or_else(Platform::host);
        let mut raw = self.blob(entry, MAX_MANIFEST)?;
        for _ in 0..MAX_NESTING {
            match Manifest::parse(&raw).map_err(bad)? {
                Manifest::Index(entries) => {
                    raw = self.blob(choose(&entries, &platform).map_err(bad)?, MAX_MANIFEST)?;
                }
                Manifest::Image(manifest) => {
                    return Ok(Found {
                        config: self.blob(&manifest.config, MAX_CONFIG)?,
                        manifest: Some(raw),
                        layers: manifest.layers.iter().map(|layer| blob_path(&layer.digest)).collect(),
                        names: names_in(entry),
                    });
                }
            }
        }
        Err(Error::invalid("indexes lie too deep within each other"))
    }

    /// Brings one image in; None if it is for another platform than asked for.
    fn image(&self, found: &Found) -> Result<Option<Digest>> {
        let config = ImageConfig::parse(&found.config)?;
        if self.platform.as_ref().is_some_and(|wanted| !wanted.accepts(&config.platform())) {
            return Ok(None);
        }
        let (expected, actual) = (found.layers.len(), config.layers().len());
        if expected != actual {
            return Err(Error::invalid(format!(
                "invalid manifest, layers length mismatch: expected {expected}, got {actual}"
            )));
        }
        let names = found.names.iter().map(|name| {
            Reference::parse(name)
                .ok()
                .filter(|name| name.tag().is_some() && name.digest().is_none())
                .ok_or_else(|| Error::invalid(format!("invalid tag {name:?}")))
        });
        let names: Vec<Reference> = names.collect::<Result<_>>()?;
        let pin = self.store.store.pin(config.layers());
        for (number, (path, diff_id)) in found.layers.iter().zip(config.layers()).enumerate() {
            if !self.store.layers().contains(diff_id) {
                self.layer(number, path, *diff_id)?;
            }
        }
        let image = self.store.store.add(&found.config, config, found.manifest.as_deref())?;
        drop(pin);
        let before = self.store.store.name(&names, image.id)?;
        for (name, before) in names.iter().zip(before) {
            let name = name.familiar();
            if let Some(before) = before.filter(|before| *before != image.id) {
                self.progress.send_blocking(Message::stream(format!(
                    "The image {name} already exists, renaming the old one with ID {before} to empty string\n"
                )));
            }
            self.progress.send_blocking(Message::stream(format!("Loaded image: {name}\n")));
        }
        self.store.announce_id("load", &image.id);
        Ok(Some(image.id))
    }

    fn layer(&self, number: usize, path: &str, diff_id: DiffId) -> Result<()> {
        let part = self.archive.open(path).map_err(|error| Error::invalid(error.to_string()))?;
        let counted = Counted {
            total: part.size(),
            part,
            current: 0,
            throttle: Throttle::default(),
            id: Digest::from_bytes(*diff_id.as_bytes()).short(),
            progress: (!self.quiet).then_some(self.progress),
        };
        let result = decompress(counted)
            .map_err(LayerError::Source)
            .and_then(|reader| self.store.layers().unpack(&diff_id, reader, &Limits::default()));
        match result {
            Ok(_) => Ok(()),
            Err(LayerError::WrongDigest { expected, actual }) => Err(Error::invalid(format!(
                "invalid diffID for layer {number}: expected \"{expected}\", got \"{actual}\""
            ))),
            Err(error) => Err(errors::layer(&error)),
        }
    }

    fn blob(&self, descriptor: &Descriptor, cap: usize) -> Result<Vec<u8>> {
        let bytes = self.read(&blob_path(&descriptor.digest), cap)?;
        if Digest::of(&bytes) == descriptor.digest {
            Ok(bytes)
        } else {
            Err(Error::invalid(format!("blob {} of the archive does not have its digest", descriptor.digest)))
        }
    }

    fn read(&self, path: &str, cap: usize) -> Result<Vec<u8>> {
        let left = self.documents.get();
        let bytes =
            self.archive.read(path, cap.min(left)).map_err(|error| Error::invalid(error.to_string()))?;
        self.documents.set(left - bytes.len());
        Ok(bytes)
    }
}

/// A layer in the archive, its reading told to the client.
struct Counted<'a> {
    part: super::archive::Part<'a>,
    total: u64,
    current: u64,
    throttle: Throttle,
    id: String,
    progress: Option<&'a Progress>,
}

impl io::Read for Counted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.part.read(buffer)?;
        self.current += count as u64;
        if let Some(progress) = self.progress
            && (self.throttle.ready() || self.current == self.total)
        {
            progress.send_blocking(Message::counts(&self.id, "Loading layer", self.current, self.total));
        }
        Ok(count)
    }
}

fn blob_path(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

/// The whole name that containerd's tools give, or a reference name that is more than a tag.
fn names_in(entry: &Descriptor) -> Vec<String> {
    let annotation = |key: &str| entry.annotations.as_ref().and_then(|notes| notes.get(key)).cloned();
    let name = annotation(NAME).or_else(|| annotation(REF_NAME).filter(|name| name.contains([':', '/'])));
    name.and_then(|name| Reference::parse(&name).ok())
        .filter(|name| name.digest().is_none())
        .map(|name| name.or_latest().to_string())
        .into_iter()
        .collect()
}

fn bad(problem: impl std::fmt::Display) -> Error {
    Error::invalid(problem.to_string())
}
