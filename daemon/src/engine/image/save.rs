//! `docker save`: images as one archive that is both Docker's form and an OCI image layout.
//!
//! ```text
//!  blobs/sha256/<hex>    configurations as they came, manifests, layers as they came (uncompressed)
//!  index.json            OCI: a manifest for each name, and one for an image without a name
//!  manifest.json         Docker's: configurations, names, layers
//!  oci-layout            OCI: the version
//!  repositories          Docker's oldest: name, tag, topmost layer
//! ```
//! The same images make the same bytes: entries are sorted, and times are those of the images. Nothing is spooled:
//! every size is known before.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, Read, Write},
    sync::Arc,
};

use bulkhead_rootfs::layers::DiffId;
use bulkhead_tar::{Entry, Kind, Writer};
use bytes::{Bytes, BytesMut};
use futures_util::{Stream, stream};
use serde::Serialize;
use serde_json::json;
use tokio::sync::mpsc;

use super::{
    ImageStore,
    catalog::{Catalog, Image},
    config::MAX_CONFIG,
    digest::Digest,
    errors,
    files::Folder,
    platform::Platform,
    pull::blocking,
    reference::{AnyReference, Reference},
    view,
};
use crate::engine::{Error, Result};

/// Bytes that are handed on at a time, and how many such pieces may wait.
const PIECE: usize = 64 << 10;
const PIECES: usize = 4;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// An image to be saved.
struct Saved {
    image: Arc<Image>,
    names: Vec<Reference>,
    /// The configuration as it came.
    config: Vec<u8>,
    layers: Vec<(DiffId, u64)>,
}

/// What a blob is.
enum Blob {
    Bytes(Vec<u8>),
    Layer(DiffId, u64),
}

impl ImageStore {
    /// The images of these names, each name's tags or one, as an archive.
    ///
    /// # Errors
    /// No such image; a layer's archive is not there. An error may also come later, as an item: the archive is then
    /// not whole.
    pub async fn save(
        self: &Arc<Self>,
        names: &[String],
        platform: Option<&Platform>,
    ) -> Result<impl Stream<Item = Result<Bytes>> + Send + 'static> {
        if names.is_empty() {
            return Err(Error::invalid("no image was named"));
        }
        let chosen = {
            let catalog = self.store.catalog();
            if let Some(platform) = platform {
                for name in names {
                    view::for_platform(&catalog, name, Some(platform))?;
                }
            }
            choose(&catalog, names)?
        };
        let this = Arc::clone(self);
        let (sender, pieces) = mpsc::channel(PIECES);
        let (saved, pin) = blocking({
            let this = Arc::clone(self);
            move || {
                let layers: Vec<DiffId> =
                    chosen.iter().flat_map(|(image, _)| image.config.layers().to_vec()).collect();
                let pin = this.store.pin(&layers);
                let saved = chosen.into_iter().map(|(image, names)| this.saved(image, names));
                Ok((saved.collect::<Result<Vec<_>>>()?, pin))
            }
        })
        .await?;
        tokio::task::spawn_blocking(move || {
            let _pin = pin;
            let out = Pieces { sender: sender.clone(), buffer: BytesMut::with_capacity(PIECE) };
            match this.write(&saved, out) {
                Ok(()) => saved.iter().for_each(|saved| this.announce_id("save", &saved.image.id)),
                // The client has gone.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
                Err(error) => drop(sender.blocking_send(Err(Error::internal(error.to_string())))),
            }
        });
        Ok(stream::unfold(pieces, |mut pieces| async { Some((pieces.recv().await?, pieces)) }))
    }

    /// Looks whether all of an image is there.
    fn saved(&self, image: Arc<Image>, names: Vec<Reference>) -> Result<Saved> {
        let config = self.store.files().read(Folder::Configs, &image.id.hex(), MAX_CONFIG);
        let config = config.map_err(|error| errors::storage(&error))?;
        let config = config.ok_or_else(|| Error::not_found(format!("No such image: {}", image.id)))?;
        let layer = |id: &DiffId| {
            // Opened to see that it can be.
            self.layers().archive(id).map_err(|error| Error::internal(error.to_string()))?;
            let info = self.layers().info(id).map_err(|error| Error::internal(error.to_string()))?;
            Ok((*id, info.stream_bytes))
        };
        let layers = image.config.layers().iter().map(layer).collect::<Result<Vec<_>>>()?;
        Ok(Saved { image, names, config, layers })
    }

    fn write(&self, saved: &[Saved], out: impl Write) -> io::Result<()> {
        let mut blobs: BTreeMap<String, (Blob, i64)> = BTreeMap::new();
        let (mut index, mut items, mut repositories) = (Vec::new(), Vec::new(), BTreeMap::new());
        for image in saved {
            let time = image.image.config.created.map_or(0, jiff::Timestamp::as_second);
            for (id, size) in &image.layers {
                blobs.entry(id.hex()).or_insert((Blob::Layer(*id, *size), time));
            }
            let manifest = serde_json::to_vec(&image.manifest())?;
            index.extend(image.index_entries(&manifest));
            items.push(image.item());
            image.add_to(&mut repositories);
            blobs.insert(Digest::of(&manifest).hex(), (Blob::Bytes(manifest), 0));
            blobs.insert(image.image.id.hex(), (Blob::Bytes(image.config.clone()), time));
        }
        let mut tar = Writer::new(out);
        for name in ["blobs/", "blobs/sha256/"] {
            tar.entry(&entry(name.to_owned(), Kind::Directory, 0o755, 0), 0)?;
        }
        for (hex, (blob, time)) in &blobs {
            let entry = entry(format!("blobs/sha256/{hex}"), Kind::File, 0o644, *time);
            match blob {
                Blob::Bytes(bytes) => {
                    tar.entry(&entry, bytes.len() as u64)?;
                    tar.data(bytes)?;
                }
                Blob::Layer(id, size) => {
                    tar.entry(&entry, *size)?;
                    let mut archive = self.layers().archive(id).map_err(io::Error::other)?;
                    copy(&mut archive, &mut tar)?;
                }
            }
        }
        let mut document = |name: &str, value: &serde_json::Value| {
            let bytes = serde_json::to_vec(value)?;
            tar.entry(&entry(name.to_owned(), Kind::File, 0o644, 0), bytes.len() as u64)?;
            tar.data(&bytes)
        };
        document("index.json", &json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": index}))?;
        document("manifest.json", &json!(items))?;
        document("oci-layout", &json!({"imageLayoutVersion": "1.0.0"}))?;
        if !repositories.is_empty() {
            document("repositories", &json!(repositories))?;
        }
        tar.finish().map(drop)
    }
}

impl Saved {
    fn manifest(&self) -> serde_json::Value {
        let layers = self
            .layers
            .iter()
            .map(|(id, size)| json!({"mediaType": LAYER, "digest": id.to_string(), "size": size}));
        json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": {"mediaType": CONFIG, "digest": self.image.id.to_string(), "size": self.config.len()},
            "layers": layers.collect::<Vec<_>>(),
        })
    }

    fn index_entries(&self, manifest: &[u8]) -> Vec<serde_json::Value> {
        let platform = self.image.config.platform();
        let mut of = json!({"os": platform.os, "architecture": platform.architecture});
        if let Some(variant) = &platform.variant {
            of["variant"] = json!(variant);
        }
        let digest = Digest::of(manifest).to_string();
        let entry = json!({"mediaType": MANIFEST, "digest": digest, "size": manifest.len(), "platform": of});
        if self.names.is_empty() {
            return vec![entry];
        }
        let named = |name: &Reference| {
            let mut entry = entry.clone();
            entry["annotations"] = json!({
                "io.containerd.image.name": name.to_string(),
                "org.opencontainers.image.ref.name": name.tag().unwrap_or_default(),
            });
            entry
        };
        self.names.iter().map(named).collect()
    }

    fn item(&self) -> Item {
        let blob = |hex: String| format!("blobs/sha256/{hex}");
        let source = |(id, size): &(DiffId, u64)| {
            (id.to_string(), json!({"mediaType": LAYER, "size": size, "digest": id.to_string()}))
        };
        Item {
            config: blob(self.image.id.hex()),
            repo_tags: (!self.names.is_empty()).then(|| self.names.iter().map(Reference::familiar).collect()),
            layers: self.layers.iter().map(|(id, _)| blob(id.hex())).collect(),
            layer_sources: self.layers.iter().map(source).collect(),
        }
    }

    fn add_to(&self, repositories: &mut BTreeMap<String, BTreeMap<String, String>>) {
        let Some((top, _)) = self.layers.last() else { return };
        for name in &self.names {
            let tags = repositories.entry(name.repository().familiar().into_owned()).or_default();
            tags.insert(name.tag().unwrap_or_default().to_owned(), top.hex());
        }
    }
}

/// An entry of `manifest.json`.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Item {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
    layer_sources: BTreeMap<String, serde_json::Value>,
}

/// The images that names stand for, in the order of their ids, and under which names each is saved. A name without
/// a tag is all of its tags; an id is no name.
fn choose(catalog: &Catalog, names: &[String]) -> Result<Vec<(Arc<Image>, Vec<Reference>)>> {
    let mut chosen: BTreeMap<Digest, BTreeSet<Reference>> = BTreeMap::new();
    for name in names {
        let reference = match AnyReference::parse(name)? {
            AnyReference::Id(_) => None,
            AnyReference::Named(reference) => Some(reference),
        };
        let tags: Vec<(&Reference, &Digest)> = match &reference {
            Some(reference) if reference.is_name_only() => catalog
                .references()
                .iter()
                .filter(|(have, _)| have.repository() == reference.repository() && have.tag().is_some())
                .collect(),
            _ => Vec::new(),
        };
        for (tag, id) in &tags {
            chosen.entry(**id).or_default().insert((*tag).clone());
        }
        if tags.is_empty() {
            let id = catalog.resolve(name)?.id;
            let names = chosen.entry(id).or_default();
            // A digest names it, and nothing is named by it when it is loaded.
            names.extend(reference.filter(|name| name.tag().is_some() && catalog.named(name) == Some(id)));
        }
    }
    let found = |(id, names): (Digest, BTreeSet<Reference>)| {
        let image = catalog.get(&id).ok_or_else(|| Error::not_found(format!("No such image: {id}")))?;
        Ok((Arc::clone(image), names.into_iter().collect()))
    };
    chosen.into_iter().map(found).collect()
}

fn entry(name: String, kind: Kind, mode: u32, time: i64) -> Entry {
    Entry { name: name.into_bytes(), kind, mode, uid: 0, gid: 0, mtime: (time, 0), xattrs: Vec::new() }
}

fn copy<W: Write>(from: &mut impl Read, to: &mut Writer<W>) -> io::Result<()> {
    let mut buffer = vec![0; PIECE];
    loop {
        match from.read(&mut buffer)? {
            0 => return Ok(()),
            count => to.data(&buffer[..count])?,
        }
    }
}

/// From a thread that writes to a task that sends.
pub(super) struct Pieces {
    sender: mpsc::Sender<Result<Bytes>>,
    buffer: BytesMut,
}

impl Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(PIECE - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..count]);
        if self.buffer.len() == PIECE {
            self.flush()?;
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let piece = self.buffer.split().freeze();
        self.buffer.reserve(PIECE);
        self.sender.blocking_send(Ok(piece)).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}
