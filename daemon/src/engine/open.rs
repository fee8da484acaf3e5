//! Opens the engine: what is on disk is loaded, what runs is taken over, what is nobody's goes.
//!
//! ```text
//!   directories ─▶ disk template ─▶ images ─▶ records ─▶ adopt running sandboxes (all at once)
//!     ─▶ discard every other sandbox ─▶ tell images which layers are in use ─▶ actors: restart policies
//! ```

use std::{
    collections::HashSet,
    fs::DirBuilder,
    io,
    os::unix::fs::DirBuilderExt,
    path::Path,
    sync::{Arc, Weak},
    time::Duration,
};

use bulkhead_rootfs::{disk, layers::LayerStore};
use tokio::task::JoinSet;

use super::{
    Error, Result, Shared,
    container::{Actor, record::Record, registry::Registry, state::State},
    events::Events,
    exec::Execs,
    image::{self, ContainerUse, ImageStore},
    store,
};
use crate::{config::Config, layout::Layout, sandbox};

/// How long sandboxes that are nobody's may take to power off.
const SWEEP_WITHIN: Duration = Duration::from_secs(10);

pub(super) async fn open(config: Arc<Config>) -> Result<Arc<Shared>> {
    let events = Arc::new(Events::default());
    let (images, records) = tokio::task::spawn_blocking({
        let (config, events) = (Arc::clone(&config), Arc::clone(&events));
        move || open_stores(&config, events)
    })
    .await
    .map_err(|error| Error::internal(error.to_string()))??;
    let shared =
        Arc::new(Shared { config, events, images, registry: Registry::default(), execs: Execs::default() });

    let actors = adopt(&shared, records).await;
    let kept: HashSet<String> = actors.iter().filter_map(Actor::sandbox).collect();
    let sandboxes = shared.layout().sandboxes();
    sandbox::sweep(&sandboxes, &kept, SWEEP_WITHIN)
        .await
        .map_err(|error| failed("look through", &sandboxes, &error))?;

    let weak = Arc::downgrade(&shared);
    shared.images.connect(Arc::new(move || containers_in_use(&weak))).await;
    for actor in actors {
        tokio::spawn(actor.run(true));
    }
    Ok(shared)
}

fn failed(what: &str, path: &Path, error: &io::Error) -> Error {
    Error::internal(format!("cannot {what} {}: {error}", path.display()))
}

fn open_stores(config: &Config, events: Arc<Events>) -> Result<(Arc<ImageStore>, Vec<Record>)> {
    let layout = &config.layout;
    for (path, mode) in [
        (layout.data_root.clone(), 0o700),
        (layout.tmp(), 0o700),
        (layout.containers(), 0o700),
        (layout.exec_root.clone(), 0o711),
        (layout.sandboxes(), 0o700),
    ] {
        let made = DirBuilder::new().recursive(true).mode(mode).create(&path);
        made.map_err(|error| failed("make", &path, &error))?;
    }
    make_template(layout, u64::from(config.vm.disk_gib) << 30)?;
    let layers = LayerStore::open(layout.layers())
        .map_err(|error| Error::internal(format!("the layer store cannot be opened: {error}")))?;
    let images = ImageStore::open(image::Options {
        root: layout.images(),
        layers: Arc::new(layers),
        registries: image::RegistrySettings {
            mirrors: config.registry_mirrors.clone(),
            insecure: config.insecure_registries.clone(),
            ..image::RegistrySettings::default()
        },
        downloads: config.max_concurrent_downloads,
        listener: Arc::new(move |event| events.publish("image", event.action, &event.id, event.attributes)),
    })?;
    let containers = layout.containers();
    let records = store::load(layout).map_err(|error| failed("read", &containers, &error))?;
    Ok((images, records))
}

/// Makes the disk that writable layers are clones of, anew when its size is to be another.
fn make_template(layout: &Layout, size: u64) -> Result<()> {
    let path = layout.disk_template();
    if std::fs::metadata(&path).is_ok_and(|meta| meta.len() == size) {
        return Ok(());
    }
    disk::template(&path, size)
        .map_err(|error| Error::internal(format!("the template disk cannot be made: {error}")))
}

/// Makes an actor for each record and lets all take over their sandboxes at once.
async fn adopt(shared: &Arc<Shared>, records: Vec<Record>) -> Vec<Actor> {
    let mut tasks = JoinSet::new();
    for mut record in records {
        // Names are unique on disk, unless somebody was at it by hand.
        if shared.registry.reserve(&record.name, &record.id).is_err()
            && let Ok(name) = shared.registry.reserve_any(&record.id)
        {
            tracing::warn!(container = record.id, old = record.name, new = name, "a name is in use twice");
            record.name = name;
        }
        let (mut actor, container) = Actor::new(Arc::clone(shared), record);
        shared.registry.insert(container);
        tasks.spawn(async move {
            actor.adopt().await;
            actor
        });
    }
    let mut actors = Vec::new();
    while let Some(actor) = tasks.join_next().await {
        match actor {
            Ok(actor) => actors.push(actor),
            Err(error) => tracing::error!(%error, "a container could not be taken over"),
        }
    }
    actors
}

fn containers_in_use(shared: &Weak<Shared>) -> Vec<ContainerUse> {
    let Some(shared) = shared.upgrade() else { return Vec::new() };
    let containers = shared.registry.all().into_iter();
    containers
        .map(|container| {
            let record = container.view().record;
            ContainerUse {
                id: record.id.clone(),
                image: record.image,
                layers: record.layers.clone(),
                running: matches!(
                    record.life.state,
                    State::Running(_) | State::Restarting(_) | State::Starting(_)
                ),
            }
        })
        .collect()
}
