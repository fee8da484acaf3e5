//! Images on disk and in memory.
//!
//! ```text
//!  <root>/
//!    configs/<64 hex digits>      an image's configuration as it came; its digest is the image's id
//!    manifests/<64 hex digits>    manifests as they came
//!    records/<64 hex digits>      [`Record`] of the image of that id
//!    tables/references.json       name → image
//!    damaged/  tmp/
//! ```
//!
//! What is written first is needed first: **layers, manifest, record, configuration, name**; removal goes the
//! other way. So wherever a crash falls, an image that is there is whole, and what is left over is swept:
//! layers by [`Store::collect_layers`], records and manifests of no image when the store is opened. A file
//! that does not have the digest it is named by, or an image that lacks a layer, is set aside with a warning.
//!
//! A layer is **in use** if an image's configuration names it, a container has it, or it is *pinned*: a pull
//! pins what it is about to need before it looks whether it is there, so nothing vanishes under it.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard},
};

use bulkhead_rootfs::layers::{DiffId, LayerError, LayerStore};
use serde::{Deserialize, Serialize};

use super::{
    catalog::{Catalog, Image, Record},
    config::{ImageConfig, MAX_CONFIG},
    digest::Digest,
    errors,
    files::{Files, Folder},
    reference::Reference,
};
use crate::engine::{Error, Result};

/// The largest manifest that is kept, in bytes.
pub(super) const MAX_MANIFEST: usize = 4 << 20;

/// The largest table of names that is read: some hundred thousand names.
const MAX_TABLE: usize = 256 << 20;
const MAX_RECORD: usize = 1 << 20;
const TABLE: &str = "references.json";
const TABLE_VERSION: u32 = 1;

/// A container, as far as images are concerned.
#[derive(Debug, Clone)]
pub struct ContainerUse {
    /// Its id.
    pub id: String,
    /// The image it was made of.
    pub image: Digest,
    /// The layers it stands on; they stay while it does, whatever becomes of the image.
    pub layers: Vec<DiffId>,
    /// Running, paused or restarting.
    pub running: bool,
}

/// Tells which containers there are, at the moment of the call.
pub type Containers = Arc<dyn Fn() -> Vec<ContainerUse> + Send + Sync>;

/// The store. Every method that changes something may block on the disk.
pub(super) struct Store {
    files: Files,
    layers: Arc<LayerStore>,
    catalog: Mutex<Catalog>,
    /// How often each layer is pinned.
    pins: Mutex<HashMap<DiffId, usize>>,
    /// Held while layers are removed, and while a pin is set.
    gate: Mutex<()>,
    /// Shared by imports: what they bring has no name before it is there, and could be taken for garbage.
    imports: RwLock<()>,
    containers: OnceLock<Containers>,
}

#[derive(Serialize, Deserialize)]
struct Table {
    version: u32,
    references: BTreeMap<Reference, Digest>,
}

impl Store {
    /// Reads what is in `root`, sets damaged things aside.
    ///
    /// # Errors
    /// The directory cannot be made or read.
    pub(super) fn open(root: PathBuf, layers: Arc<LayerStore>) -> Result<Self> {
        let files = Files::open(root).map_err(|error| errors::storage(&error))?;
        let images = load_images(&files, &layers).map_err(|error| errors::storage(&error))?;
        let references = load_references(&files).map_err(|error| errors::storage(&error))?;
        let catalog = Catalog::new(images, references);
        sweep(&files, &catalog).map_err(|error| errors::storage(&error))?;
        Ok(Self {
            files,
            layers,
            catalog: Mutex::new(catalog),
            pins: Mutex::default(),
            gate: Mutex::default(),
            imports: RwLock::default(),
            containers: OnceLock::new(),
        })
    }

    /// Where containers are asked for; until this is called there are none. Only the first call counts.
    pub(super) fn connect(&self, containers: Containers) {
        let _ = self.containers.set(containers);
    }

    /// The containers that there are.
    pub(super) fn containers(&self) -> Vec<ContainerUse> {
        self.containers.get().map_or_else(Vec::new, |containers| containers())
    }

    /// The images and names, locked: look and go.
    pub(super) fn catalog(&self) -> MutexGuard<'_, Catalog> {
        lock(&self.catalog)
    }

    /// The layers' own store.
    pub(super) fn layers(&self) -> &Arc<LayerStore> {
        &self.layers
    }

    /// The directory's files.
    pub(super) fn files(&self) -> &Files {
        &self.files
    }

    /// Keeps `layers` in the store, those that are there and those that will come, until the pin is dropped.
    pub(super) fn pin(self: &Arc<Self>, layers: &[DiffId]) -> Pin {
        let _gate = lock(&self.gate);
        let mut pins = lock(&self.pins);
        for layer in layers {
            *pins.entry(*layer).or_default() += 1;
        }
        Pin { store: Arc::clone(self), layers: layers.to_vec() }
    }

    /// Keeps layers of no name from being swept until the guard is dropped.
    pub(super) fn importing(&self) -> RwLockReadGuard<'_, ()> {
        self.imports.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds an image whose layers are in the store and pinned. One that is there already keeps its record,
    /// and gets the manifest in addition.
    ///
    /// # Errors
    /// The disk's; a layer is missing.
    pub(super) fn add(&self, raw: &[u8], config: ImageConfig, manifest: Option<&[u8]>) -> Result<Arc<Image>> {
        let id = Digest::of(raw);
        let layer_sizes = layer_sizes(&self.layers, &config).map_err(|error| errors::layer(&error))?;
        let mut catalog = self.catalog();
        let known = catalog.get(&id).map(|image| image.record.clone());
        let mut record = known.clone().unwrap_or_default();
        if let Some(manifest) = manifest {
            let digest = Digest::of(manifest);
            if record.manifests.insert(digest) {
                self.write(Folder::Manifests, &digest.hex(), manifest)?;
            }
        }
        if known.as_ref() != Some(&record) {
            self.write_record(&id, &record)?;
        }
        if known.is_none() {
            self.write(Folder::Configs, &id.hex(), raw)?;
        }
        Ok(catalog.insert(Image { id, config, layer_sizes, record }))
    }

    /// Changes what is recorded of an image.
    ///
    /// # Errors
    /// The disk's; there is no such image.
    pub(super) fn update_record(&self, id: &Digest, change: impl FnOnce(&mut Record)) -> Result<()> {
        let mut catalog = self.catalog();
        let image = catalog.get(id).ok_or_else(|| Error::not_found(format!("No such image: {id}")))?;
        let mut record = image.record.clone();
        change(&mut record);
        let image = Image {
            id: *id,
            config: image.config.clone(),
            layer_sizes: image.layer_sizes.clone(),
            record: record.clone(),
        };
        self.write_record(id, &record)?;
        catalog.insert(image);
        Ok(())
    }

    /// Names an image; the image that had the name until now.
    ///
    /// # Errors
    /// The disk's; there is no such image.
    pub(super) fn name(&self, references: &[Reference], id: Digest) -> Result<Vec<Option<Digest>>> {
        let mut catalog = self.catalog();
        if catalog.get(&id).is_none() {
            return Err(Error::not_found(format!("No such image: {id}")));
        }
        let before: Vec<_> = references.iter().map(|name| catalog.set_reference(name, id)).collect();
        if before.iter().all(|before| *before == Some(id)) {
            return Ok(before);
        }
        if let Err(error) = self.write_table(&catalog) {
            // As it was on disk, so it is in memory; backwards, should a name stand there twice.
            for (reference, before) in references.iter().zip(&before).rev() {
                match before {
                    Some(id) => drop(catalog.set_reference(reference, *id)),
                    None => drop(catalog.remove_reference(reference)),
                }
            }
            return Err(error);
        }
        Ok(before)
    }

    /// Takes names away; those that do not exist are no error.
    ///
    /// # Errors
    /// The disk's.
    pub(super) fn unname(&self, references: &[Reference]) -> Result<()> {
        let mut catalog = self.catalog();
        let before: Vec<_> = references.iter().map(|name| catalog.remove_reference(name)).collect();
        if before.iter().all(Option::is_none) {
            return Ok(());
        }
        if let Err(error) = self.write_table(&catalog) {
            for (reference, id) in references.iter().zip(before) {
                if let Some(id) = id {
                    catalog.set_reference(reference, id);
                }
            }
            return Err(error);
        }
        Ok(())
    }

    /// Removes an image that has no names, and those of its layers that nothing else uses; the chain ids of
    /// these.
    ///
    /// # Errors
    /// The disk's.
    pub(super) fn remove(&self, id: &Digest) -> Result<Vec<Digest>> {
        let (config, manifests) = {
            let mut catalog = self.catalog();
            let Some(image) = catalog.get(id).cloned() else { return Ok(vec![]) };
            self.files.remove(Folder::Configs, &id.hex()).map_err(|error| errors::storage(&error))?;
            catalog.remove(id);
            let manifests: Vec<_> = (image.record.manifests.iter().copied())
                .filter(|digest| !catalog.images().any(|other| other.record.manifests.contains(digest)))
                .collect();
            (image.config.clone(), manifests)
        };
        // The image is gone; what cannot be removed now is swept later.
        for (folder, name) in std::iter::once((Folder::Records, *id))
            .chain(manifests.into_iter().map(|digest| (Folder::Manifests, digest)))
        {
            if let Err(error) = self.files.remove(folder, &name.hex()) {
                tracing::warn!(image = %id, %error, "a file of a removed image stays until the next start");
            }
        }
        let removed = self.remove_unused(config.layers().iter().copied());
        let chain = config.chain_ids();
        // Top first, as Docker lists them.
        Ok(config
            .layers()
            .iter()
            .zip(chain)
            .rev()
            .filter(|(l, _)| removed.contains(l))
            .map(|(_, c)| c)
            .collect())
    }

    /// Removes every layer that is not in use: after a failed pull, after a container of a removed image
    /// went, and at start once the containers are known. The bytes that came free.
    ///
    /// # Errors
    /// The layer store cannot be read.
    pub(super) fn collect_layers(&self) -> Result<u64> {
        let Ok(_sweep) = self.imports.try_write() else {
            tracing::debug!("an import is under way: layers are swept the next time");
            return Ok(0);
        };
        let all = self.layers.list().map_err(|error| errors::layer(&error))?;
        let size = |layer: &DiffId| self.layers.info(layer).map_or(0, |info| info.size);
        let sizes: HashMap<_, _> = all.iter().map(|layer| (*layer, size(layer))).collect();
        Ok(self.remove_unused(all).iter().filter_map(|layer| sizes.get(layer)).sum())
    }

    fn remove_unused(&self, candidates: impl IntoIterator<Item = DiffId>) -> HashSet<DiffId> {
        let _gate = lock(&self.gate);
        let mut used: HashSet<DiffId> = self.containers().into_iter().flat_map(|c| c.layers).collect();
        used.extend(lock(&self.pins).keys());
        used.extend(self.catalog().images().flat_map(|image| image.config.layers().to_vec()));
        let doomed: HashSet<_> = candidates.into_iter().filter(|layer| !used.contains(layer)).collect();
        for layer in &doomed {
            if let Err(error) = self.layers.remove(layer) {
                tracing::warn!(%layer, %error, "an unused layer could not be removed");
            }
        }
        doomed
    }

    fn write(&self, folder: Folder, name: &str, bytes: &[u8]) -> Result<()> {
        self.files.write(folder, name, bytes).map_err(|error| errors::storage(&error))
    }

    fn write_record(&self, id: &Digest, record: &Record) -> Result<()> {
        self.write(Folder::Records, &id.hex(), &encode(record)?)
    }

    fn write_table(&self, catalog: &Catalog) -> Result<()> {
        let table = Table { version: TABLE_VERSION, references: catalog.references().clone() };
        self.write(Folder::Tables, TABLE, &encode(&table)?)
    }
}

/// Holds layers in the store while it lives.
pub struct Pin {
    store: Arc<Store>,
    layers: Vec<DiffId>,
}

impl std::fmt::Debug for Pin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Pin").field(&self.layers).finish()
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        let mut pins = lock(&self.store.pins);
        for layer in &self.layers {
            if let Some(count) = pins.get_mut(layer) {
                *count -= 1;
                if *count == 0 {
                    pins.remove(layer);
                }
            }
        }
    }
}

/// A panic elsewhere leaves the maps whole: every change of theirs is one insertion or removal.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn encode(value: &impl Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec_pretty(value).map_err(|error| Error::internal(error.to_string()))
}

fn layer_sizes(layers: &LayerStore, config: &ImageConfig) -> Result<Vec<u64>, LayerError> {
    config.layers().iter().map(|layer| layers.info(layer).map(|info| info.size)).collect()
}

fn load_images(files: &Files, layers: &LayerStore) -> std::io::Result<Vec<Image>> {
    let mut images = Vec::new();
    for name in files.list(Folder::Configs)? {
        match load_image(files, layers, &name) {
            Ok(image) => images.push(image),
            Err(problem) => {
                tracing::warn!(image = name, problem, "a damaged image is set aside");
                files.set_aside(Folder::Configs, &name)?;
            }
        }
    }
    Ok(images)
}

fn load_image(files: &Files, layers: &LayerStore, name: &str) -> Result<Image, String> {
    let id = Digest::from_hex(name).map_err(|error| error.to_string())?;
    let raw = files.read(Folder::Configs, name, MAX_CONFIG).map_err(|error| error.to_string())?;
    let raw = raw.unwrap_or_default();
    if Digest::of(&raw) != id {
        return Err("the configuration does not have the digest it is named by".to_owned());
    }
    let config = ImageConfig::parse(&raw).map_err(|error| error.to_string())?;
    let layer_sizes = layer_sizes(layers, &config).map_err(|error| error.to_string())?;
    Ok(Image { id, config, layer_sizes, record: load_record(files, name) })
}

/// A record can be done without: the image is what its configuration says.
fn load_record(files: &Files, name: &str) -> Record {
    let read = files.read(Folder::Records, name, MAX_RECORD).map_err(|error| error.to_string());
    let parsed = read.and_then(|bytes| match bytes {
        Some(bytes) => serde_json::from_slice(&bytes).map_err(|error| error.to_string()),
        None => Ok(Record::default()),
    });
    parsed.unwrap_or_else(|problem| {
        tracing::warn!(image = name, problem, "an image's damaged record is set aside");
        if let Err(error) = files.set_aside(Folder::Records, name) {
            tracing::warn!(image = name, %error, "setting it aside failed");
        }
        Record::default()
    })
}

fn load_references(files: &Files) -> std::io::Result<BTreeMap<Reference, Digest>> {
    let Some(bytes) = files.read(Folder::Tables, TABLE, MAX_TABLE)? else { return Ok(BTreeMap::new()) };
    match serde_json::from_slice::<Table>(&bytes) {
        Ok(table) if table.version == TABLE_VERSION => Ok(table.references),
        Ok(table) => Err(std::io::Error::other(format!(
            "the table of image names has version {}, this program knows {TABLE_VERSION}",
            table.version
        ))),
        Err(error) => {
            tracing::warn!(%error, "the damaged table of image names is set aside: images are found by id only");
            files.set_aside(Folder::Tables, TABLE)?;
            Ok(BTreeMap::new())
        }
    }
}

/// Removes records and manifests of no image.
fn sweep(files: &Files, catalog: &Catalog) -> std::io::Result<()> {
    let manifests: HashSet<_> =
        catalog.images().flat_map(|image| &image.record.manifests).map(Digest::hex).collect();
    let images: HashSet<_> = catalog.images().map(|image| image.id.hex()).collect();
    for (folder, kept) in [(Folder::Records, images), (Folder::Manifests, manifests)] {
        for name in files.list(folder)?.iter().filter(|name| !kept.contains(*name)) {
            files.remove(folder, name)?;
        }
    }
    Ok(())
}
