//! Images: where they come from, how they are kept, what they are called.
//!
//! ```text
//!   pull (registry)  load (archive)  import, commit (tar)  list inspect history usage
//!          └──────────────┴─────────────┘                             ▲
//!                         ▼                                           │
//!    layers ─▶ manifest ─▶ record ─▶ configuration ─▶ name  =  `store` (disk) + `catalog` (memory)
//!                                                                     ▼
//!                                                      tag, remove, prune, resolve_for_create
//! ```
//!
//! [`ImageStore`] is all that the rest of the engine sees. Nothing here knows HTTP servers or containers:
//! what containers there are is asked through [`ImageStore::connect`], what happens is told through the
//! callback in [`Options`].

mod archive;
mod asking;
mod catalog;
mod changes;
mod commit;
pub mod config;
pub mod digest;
mod errors;
pub(in crate::engine) mod feed;
mod fetch;
mod files;
mod import;
mod load;
mod pattern;
pub mod platform;
pub mod progress;
mod pull;
mod push;
pub mod reference;
pub mod registry;
mod remove;
mod save;
mod store;
#[cfg(test)]
mod tests;
mod view;

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use bulkhead_rootfs::layers::{DiffId, LayerStore};

pub use asking::SEARCH_FILTERS;
pub use commit::{CommitRequest, Committed};
pub use config::{ImageConfig, RunConfig};
pub use digest::Digest;
pub use import::ImportRequest;
pub use platform::Platform;
pub use progress::{Message, Messages};
pub use pull::PullRequest;
pub use push::PushRequest;
pub use reference::Reference;
pub use registry::{Credentials, RegistrySettings};
pub use remove::RemoveOptions;
pub use store::{ContainerUse, Containers, Pin};
pub(crate) use view::until;
pub use view::{LIST_FILTERS, ListOptions, PRUNE_FILTERS, STORAGE_DRIVER};

use crate::{
    api::types::{
        Filters,
        image::{DeleteItem, HistoryItem, Inspect, PruneReport, Summary},
    },
    engine::{Error, Result},
};
use fetch::Transfers;
use pull::blocking;
use registry::Registries;
use store::Store;

/// Layers that are fetched at a time, as dockerd's `max-concurrent-downloads`.
pub const DEFAULT_DOWNLOADS: usize = 3;

/// What happened to an image, for `GET /events`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageEvent {
    /// `pull`, `tag`, `untag`, `delete`, `load`, `import`, `prune`.
    pub action: &'static str,
    /// The image's id; a pull's reference; nothing for a prune.
    pub id: String,
    /// Labels, `name`, a prune's `reclaimed`.
    pub attributes: BTreeMap<String, String>,
}

/// Hears of events; called from any thread, must not block.
pub type Listener = Arc<dyn Fn(ImageEvent) + Send + Sync>;

/// What an image store needs.
pub struct Options {
    /// Its directory, `<data-root>/image`.
    pub root: PathBuf,
    /// The layers' store.
    pub layers: Arc<LayerStore>,
    /// For pulls.
    pub registries: RegistrySettings,
    /// Layers that are fetched at a time: `max-concurrent-downloads`.
    pub downloads: usize,
    /// Who hears what happens.
    pub listener: Listener,
}

/// Everything about images. One a daemon.
pub struct ImageStore {
    store: Arc<Store>,
    registries: Registries,
    transfers: Transfers,
    listener: Listener,
    pruning: AtomicBool,
}

/// What a container is made of.
#[derive(Debug)]
pub struct ImageForContainer {
    /// The image.
    pub id: Digest,
    /// Its configuration; [`ImageConfig::config`] is what the container's is merged with.
    pub config: ImageConfig,
    /// Its layers, bottom first.
    pub layers: Vec<DiffId>,
    /// What to warn of at create: the image is for another platform than the host's.
    pub warning: Option<String>,
    /// Keeps the layers until the container is recorded, and then may go: from there on
    /// [`ImageStore::connect`]'s callback tells of them.
    pub pin: Pin,
}

impl ImageStore {
    /// Opens the store. Reads every image's configuration: call it where blocking is allowed.
    ///
    /// # Errors
    /// The directory cannot be read; a registry setting is malformed.
    pub fn open(options: Options) -> Result<Arc<Self>> {
        let registries =
            Registries::new(options.registries).map_err(|error| Error::invalid(error.to_string()))?;
        Ok(Arc::new(Self {
            store: Arc::new(Store::open(options.root, options.layers)?),
            registries,
            transfers: Transfers::new(options.downloads),
            listener: options.listener,
            pruning: AtomicBool::new(false),
        }))
    }

    /// Takes other settings for registries.
    ///
    /// # Errors
    /// They are malformed; then those of before stay.
    pub fn reload(&self, settings: RegistrySettings) -> Result<()> {
        self.registries.reload(settings).map_err(|error| Error::invalid(error.to_string()))
    }

    /// Tells the store where to ask for containers, and sweeps layers that neither they nor images use. To be
    /// called once all containers are known.
    pub async fn connect(&self, containers: Containers) {
        self.store.connect(containers);
        self.collect_layers_soon().await;
    }

    /// Removes layers that nothing uses: for the engine to call after a container was removed.
    pub async fn collect_layers_soon(&self) {
        let store = Arc::clone(&self.store);
        if let Err(error) = blocking(move || store.collect_layers()).await {
            tracing::warn!(%error, "unused layers could not be removed");
        }
    }

    /// The layers' store.
    pub fn layers(&self) -> &Arc<LayerStore> {
        self.store.layers()
    }

    /// The image for a new container.
    ///
    /// # Errors
    /// No such image, or not for `platform`.
    pub async fn resolve_for_create(
        &self,
        name: &str,
        platform: Option<&Platform>,
    ) -> Result<ImageForContainer> {
        let (store, name, platform) = (Arc::clone(&self.store), name.to_owned(), platform.cloned());
        blocking(move || {
            loop {
                let find = || -> Result<_> {
                    let catalog = store.catalog();
                    let image = view::for_platform(&catalog, &name, platform.as_ref())?;
                    Ok((image.id, image.config.clone()))
                };
                let (id, config) = find()?;
                let pin = store.pin(config.layers());
                // Removed between the look and the pin: look again, it may have another image's name now.
                if store.catalog().get(&id).is_none() {
                    continue;
                }
                let (have, host) = (config.platform(), Platform::host());
                let warning = (platform.is_none() && !host.accepts(&have)).then(|| {
                    format!(
                        "The requested image's platform ({have}) does not match the detected host platform ({host}) \
                         and no specific platform was requested"
                    )
                });
                return Ok(ImageForContainer { id, layers: config.layers().to_vec(), config, warning, pin });
            }
        })
        .await
    }

    /// `GET /images/json`.
    ///
    /// # Errors
    /// A bad filter.
    pub fn list(&self, options: ListOptions<'_>) -> Result<Vec<Summary>> {
        view::list(&self.store, options)
    }

    /// `GET /images/{name}/json`.
    ///
    /// # Errors
    /// No such image.
    pub fn inspect(&self, name: &str, platform: Option<&Platform>) -> Result<Inspect> {
        view::inspect(&self.store, name, platform)
    }

    /// `GET /images/{name}/history`.
    ///
    /// # Errors
    /// No such image.
    pub fn history(&self, name: &str, platform: Option<&Platform>) -> Result<Vec<HistoryItem>> {
        view::history(&self.store, name, platform)
    }

    /// Bytes of all layers, and all images with what they share: the images' part of `GET /system/df`.
    ///
    /// # Errors
    /// The layer store cannot be read.
    pub async fn usage(&self) -> Result<(i64, Vec<Summary>)> {
        let store = Arc::clone(&self.store);
        blocking(move || view::usage(&store)).await
    }

    /// How many images there are.
    pub fn count(&self) -> usize {
        self.store.catalog().images().count()
    }

    /// The name that a container's image goes by in lists: `image` as the user gave it while it still means
    /// `id`, else the id.
    pub fn name_for_list(&self, image: &str, id: &Digest) -> String {
        let catalog = self.store.catalog();
        if catalog.resolve(image).is_ok_and(|found| found.id == *id) {
            image.to_owned()
        } else {
            id.to_string()
        }
    }

    /// `POST /images/{name}/tag`.
    ///
    /// # Errors
    /// No such image; `target` has a digest.
    pub async fn tag(self: &Arc<Self>, name: &str, target: &Reference) -> Result<()> {
        if target.digest().is_some() {
            return Err(Error::invalid("refusing to create a tag with a digest reference"));
        }
        if target.repository().familiar() == "sha256" {
            return Err(Error::invalid("refusing to create an ambiguous tag using digest algorithm as name"));
        }
        let id = self.store.catalog().resolve(name)?.id;
        self.set_tag(id, target.clone().or_latest()).await
    }

    async fn set_tag(self: &Arc<Self>, id: Digest, target: Reference) -> Result<()> {
        let this = Arc::clone(self);
        blocking(move || {
            this.store.name(std::slice::from_ref(&target), id)?;
            this.store.update_record(&id, |record| record.last_tagged = Some(jiff::Timestamp::now()))?;
            this.announce("tag", &id.to_string(), Some(&target.familiar()));
            Ok(())
        })
        .await
    }

    /// `DELETE /images/{name}`.
    ///
    /// # Errors
    /// No such image; a conflict.
    pub async fn remove(self: &Arc<Self>, name: &str, options: RemoveOptions) -> Result<Vec<DeleteItem>> {
        if name.trim().is_empty() {
            return Err(Error::invalid("image name cannot be blank"));
        }
        let (this, name) = (Arc::clone(self), name.to_owned());
        blocking(move || {
            remove::remove(&this.store, &name, options, &|action, id| this.announce_id(action, id))
        })
        .await
    }

    /// `POST /images/prune`, with [`PRUNE_FILTERS`].
    ///
    /// # Errors
    /// A bad filter; a prune is under way.
    pub async fn prune(self: &Arc<Self>, filters: &Filters) -> Result<PruneReport> {
        if self.pruning.swap(true, Ordering::AcqRel) {
            return Err(Error::conflict("a prune operation is already running"));
        }
        let (this, filters) = (Arc::clone(self), filters.clone());
        let result = blocking(move || {
            let result = remove::prune(&this.store, &filters, &|action, id| this.announce_id(action, id));
            this.pruning.store(false, Ordering::Release);
            result
        })
        .await;
        if let Ok(report) = &result {
            let attributes = BTreeMap::from([("reclaimed".to_owned(), report.space_reclaimed.to_string())]);
            (self.listener)(ImageEvent { action: "prune", id: String::new(), attributes });
        }
        result
    }

    fn announce_id(&self, action: &'static str, id: &Digest) {
        let id = id.to_string();
        self.announce(action, &id, Some(&id));
    }

    /// Tells the listener; an image that is still here lends its labels.
    fn announce(&self, action: &'static str, id: &str, name: Option<&str>) {
        let labels = |id: &str| self.store.catalog().resolve(id).map(|image| image.config.labels());
        let mut attributes = labels(id).unwrap_or_default();
        if let Some(name) = name {
            attributes.insert("name".to_owned(), name.to_owned());
        }
        (self.listener)(ImageEvent { action, id: id.to_owned(), attributes });
    }
}
