//! The engine: containers, images, execs, logs and events, as Docker's users know them. Never mentions
//! HTTP or KVM. It may use `api::types` (Docker's vocabulary as data) and `sandbox`.
//!
//! [`Engine`]'s methods are the whole of what handlers may call; each is one API operation.

mod checkpoint;
pub mod container;
pub mod error;
pub mod events;
pub mod exec;
pub mod files;
mod fork;
pub mod image;
mod info;
pub(crate) mod limits;
pub mod logs;
mod metrics;
pub mod mounts;
pub mod network;
mod open;
mod pressure;
mod reload;
pub mod spec;
pub mod store;
pub mod volume;

use std::{os::unix::fs::MetadataExt, sync::Arc};

use bulkhead_rootfs::layers::LayerStore;
use bytes::Bytes;
use container::{joining::Company, record::Record};
use tokio::sync::mpsc;

pub use error::{Error, ErrorKind, Result};

use crate::{
    config::Config,
    layout::Layout,
    phases::{Timeline, Timelines},
    sandbox,
};

/// Names a container in a call: full id, unambiguous prefix of an id, or name (with or without `/`).
pub type Name<'a> = &'a str;

/// A frame of container output, not yet in any wire form.
#[derive(Debug, Clone)]
pub struct Output {
    /// Where it came from.
    pub stream: logs::Stream,
    /// At most 32 KiB.
    pub bytes: Bytes,
}

/// A client's connection to a process's stdio, after `attach` or `exec start`.
pub struct Attachment {
    /// Whether the output is a terminal's (raw on the wire) or multiplexed.
    pub terminal: bool,
    /// Where the client's input goes, None if it asked for none. Bytes sent are the process's; dropping the
    /// sender after the client's half-close is its end of input (by Docker's `StdinOnce` rules).
    pub stdin: Option<mpsc::Sender<Bytes>>,
    /// What the client gets, bounded: a client that does not read holds the process's output back. It ends
    /// when the process has ended and everything was delivered.
    pub output: mpsc::Receiver<Output>,
}

/// What `attach` asks for.
#[derive(Debug, Clone, Copy, Default)]
pub struct AttachOptions {
    /// Replay the log first.
    pub logs: bool,
    /// Follow what comes.
    pub stream: bool,
    /// Send input.
    pub stdin: bool,
    /// Get stdout.
    pub stdout: bool,
    /// Get stderr.
    pub stderr: bool,
}

/// `wait`'s condition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WaitCondition {
    /// Answers at once for a container that does not run (and for a created one).
    #[default]
    NotRunning,
    /// The next exit, whatever the state now.
    NextExit,
    /// The container's removal.
    Removed,
}

/// The engine. Every method may be called from any task. The methods of containers are in
/// [`container`], those of execs in [`exec`].
pub struct Engine {
    shared: Arc<Shared>,
}

impl Engine {
    /// Loads all state below the data root, takes over running sandboxes, discards what is nobody's, and starts
    /// what restart policies say.
    ///
    /// # Errors
    /// The data root cannot be used.
    pub async fn open(config: Arc<Config>) -> Result<Arc<Self>> {
        Ok(Arc::new(Self { shared: open::open(config).await? }))
    }

    /// Says what only the engine finds wrong with a configuration, for `--validate`. Touches nothing.
    ///
    /// # Errors
    /// In the user's words.
    pub fn validate(config: &Config) -> Result<()> {
        open::registry_settings(config).validate().map_err(|error| Error::invalid(error.to_string()))?;
        logs::validate(&config.log_driver, &config.log_opts)?;
        spec::validate_daemon(config)
    }

    /// Ends its tasks once their records are on disk; containers go on running.
    pub async fn close(&self) {
        for container in self.shared.registry.all() {
            let (done, closed) = tokio::sync::oneshot::channel();
            if container.tell(container::Command::Close(done)).await {
                let _ = closed.await;
            }
        }
        if let Some(templates) = &self.shared.templates {
            templates.close().await;
        }
    }

    /// The daemon's settings.
    pub fn config(&self) -> &Config {
        &self.shared.config
    }

    /// The daemon's settings with those that were read anew.
    pub fn settings(&self) -> Arc<Config> {
        self.shared.live.now()
    }

    /// Images: pull, load, list, inspect, tag, remove and the rest.
    pub fn images(&self) -> &Arc<image::ImageStore> {
        &self.shared.images
    }

    /// Where the time of recent creates, starts and ends went; of one container, or of all, those removed since
    /// included.
    ///
    /// # Errors
    /// No such container.
    pub fn phases(&self, container: Option<Name<'_>>) -> Result<Vec<Arc<Timeline>>> {
        let container = container.map(|name| self.shared.registry.find(name)).transpose()?;
        Ok(self.shared.timelines.of(container.as_ref().map(|container| container.id())))
    }

    /// Events: publish and subscribe.
    pub fn events(&self) -> &events::Events {
        &self.shared.events
    }
}

/// What the engine's parts share.
pub(crate) struct Shared {
    pub(crate) config: Arc<Config>,
    pub(crate) events: Arc<events::Events>,
    pub(crate) images: Arc<image::ImageStore>,
    pub(crate) volumes: Arc<volume::store::VolumeStore>,
    pub(crate) networks: network::Networks,
    pub(crate) registry: container::registry::Registry,
    pub(crate) execs: exec::Execs,
    /// None: every microVM is booted.
    pub(crate) templates: Option<Arc<sandbox::template::Templates>>,
    /// What the files that machines are made of hold.
    pub(crate) digests: Arc<sandbox::Digests>,
    /// What an earlier daemon left running.
    pub(crate) adopted: sandbox::Adopted,
    pub(crate) timelines: Timelines,
    pub(crate) health_checks: container::health::Counts,
    /// What a reload may change.
    pub(crate) live: reload::Live,
}

impl Shared {
    pub(crate) fn layout(&self) -> &Layout {
        &self.config.layout
    }

    pub(crate) fn layers(&self) -> &LayerStore {
        self.images.layers()
    }

    /// The runtime spec and files of a container.
    ///
    /// `binds` are the places of its shares: destination, the share's name, whether read-only.
    pub(crate) fn spec(
        &self,
        record: &Record,
        binds: &[(String, String, bool)],
    ) -> Result<spec::ContainerSpec> {
        self.spec_among(record, binds, None)
    }

    /// What a container is made of that runs in another's machine.
    ///
    /// # Errors
    /// As for [`Shared::spec`].
    pub(crate) fn spec_among(
        &self,
        record: &Record,
        binds: &[(String, String, bool)],
        company: Option<&Company>,
    ) -> Result<spec::ContainerSpec> {
        // A host without one has no name servers to tell of.
        let resolv_conf = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
        // Who is called what, and whom it asks for names, goes with the network.
        let networked = company.map_or(record, |company| &company.network);
        let mut facts = self.networks.facts(networked);
        network::links::add(self, networked, &mut facts);
        if company.is_some() {
            facts.environment.clear();
        }
        spec::container(&spec::Facts {
            id: &record.id,
            config: &record.config,
            host: &record.host_config,
            names: &networked.host_config,
            pid_of: company.and_then(|company| company.pid),
            ipc_of: company.and_then(|company| company.ipc.as_ref()),
            daemon: &self.config,
            network: &facts,
            resolv_conf: &resolv_conf,
            binds,
        })
    }

    /// Publishes a container's event: its labels, image and name, and what belongs to the action.
    pub(crate) fn publish<const N: usize>(&self, record: &Record, action: &str, more: [(String, String); N]) {
        let mut attributes = record.config.labels.clone().unwrap_or_default();
        attributes.insert("image".into(), record.config.image.clone());
        attributes.insert("name".into(), record.name.clone());
        attributes.extend(more);
        self.events.publish("container", action, &record.id, attributes);
    }

    /// Forgets a container that is gone.
    pub(crate) fn forget(&self, id: &str) {
        self.registry.remove(id);
        self.execs.forget(id);
        // Its layers may have been the last thing of an image that was removed before it.
        let images = Arc::clone(&self.images);
        tokio::spawn(async move { images.collect_layers_soon().await });
    }

    /// Bytes that a container's disk takes on the host beyond the empty template's.
    pub(crate) async fn disk_usage(&self, id: &str) -> u64 {
        let (disk, template) = (self.layout().container_disk(id), self.layout().disk_template());
        let allocated =
            |path: &std::path::Path| std::fs::metadata(path).map_or(0, |meta| meta.blocks() * 512);
        tokio::task::spawn_blocking(move || allocated(&disk).saturating_sub(allocated(&template)))
            .await
            .unwrap_or_default()
    }

    /// `SizeRw` and `SizeRootFs` of a container.
    pub(crate) async fn sizes(&self, record: &Record) -> (i64, i64) {
        let own = self.disk_usage(&record.id).await;
        let layers = record.layers.iter().filter_map(|id| self.layers().info(id).ok());
        let root = layers.fold(own, |sum, layer| sum.saturating_add(layer.size));
        (i64::try_from(own).unwrap_or(i64::MAX), i64::try_from(root).unwrap_or(i64::MAX))
    }
}
