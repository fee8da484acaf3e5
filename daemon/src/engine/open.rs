//! Opens the engine: what is on disk is loaded, what runs is taken over, what is nobody's goes.
//!
//! ```text
//!   directories ─▶ disk template ─▶ images ─▶ records ─▶ networks ─▶ adopt running sandboxes (all at once)
//!     ─▶ discard every other sandbox ─▶ tell images which layers are in use ─▶ actors: restart policies
//! ```

use std::{
    collections::{BTreeMap, HashSet},
    fs::{DirBuilder, File},
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
    container::{Actor, health::Counts, record::Record, registry::Registry, state::State},
    events::Events,
    exec::Execs,
    image::{self, ContainerUse, ImageStore},
    network::Networks,
    pressure,
    reload::Live,
    store,
    volume::store::VolumeStore,
};
use crate::{
    config::Config,
    layout::Layout,
    phases::Timelines,
    sandbox::{
        self,
        template::{Bounds, News, Templates},
    },
};

/// How long sandboxes that are nobody's may take to power off.
const SWEEP_WITHIN: Duration = Duration::from_secs(10);

pub(super) async fn open(config: Arc<Config>) -> Result<Arc<Shared>> {
    let events = Arc::new(Events::default());
    let (images, volumes, records) = tokio::task::spawn_blocking({
        let (config, events) = (Arc::clone(&config), Arc::clone(&events));
        move || open_stores(&config, events)
    })
    .await
    .map_err(|error| Error::internal(error.to_string()))??;
    let daemon_id = std::fs::read_to_string(config.layout.daemon_id())
        .map_err(|error| failed("read", &config.layout.daemon_id(), &error))?;
    let networks = Networks::open(Arc::clone(&config), Arc::clone(&events), &daemon_id).await?;
    let digests = Arc::new(sandbox::Digests::default());
    let templates = open_templates(&config, &events, &digests)?;
    let (registry, execs) = (Registry::default(), Execs::default());
    let timelines = Timelines::default();
    let (health_checks, live) = (Counts::default(), Live::new(&config));
    let volumes = Arc::new(volumes);
    let shared = Arc::new(Shared {
        config,
        events,
        images,
        volumes,
        networks,
        registry,
        execs,
        templates,
        digests,
        timelines,
        health_checks,
        live,
    });

    let actors = adopt(&shared, records).await;
    let kept: HashSet<String> = actors.iter().filter_map(Actor::sandbox).collect();
    let sandboxes = shared.layout().sandboxes();
    sandbox::sweep(&sandboxes, &kept, SWEEP_WITHIN, &shared.config.vm.confinement)
        .await
        .map_err(|error| failed("look through", &sandboxes, &error))?;

    // Every running container is back in its networks.
    shared.networks.sweep().await;

    if let Some(templates) = &shared.templates {
        let vm = &shared.config.vm;
        templates.warm_up([vm.vmm.clone(), vm.kernel.clone(), vm.initramfs.clone()]);
    }
    let weak = Arc::downgrade(&shared);
    shared.images.connect(Arc::new(move || containers_in_use(&weak))).await;
    for actor in actors {
        tokio::spawn(actor.run(true));
    }
    tokio::spawn(super::network::egress::watch(Arc::downgrade(&shared)));
    tokio::spawn(pressure::watch(Arc::downgrade(&shared), shared.config.vm.reclaim_below_percent));
    Ok(shared)
}

fn failed(what: &str, path: &Path, error: &io::Error) -> Error {
    Error::internal(format!("cannot {what} {}: {error}", path.display()))
}

fn open_stores(config: &Config, events: Arc<Events>) -> Result<(Arc<ImageStore>, VolumeStore, Vec<Record>)> {
    let layout = &config.layout;
    // What a daemon that died was forking: its clones hold what they need open.
    match std::fs::remove_dir_all(layout.forks()) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(failed("empty", &layout.forks(), &error));
        }
        _ => {}
    }
    for path in [layout.containers(), layout.sandboxes(), layout.forks()] {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&path);
        made.map_err(|error| failed("make", &path, &error))?;
    }
    make_id(&layout.daemon_id()).map_err(|error| failed("write", &layout.daemon_id(), &error))?;
    make_template(layout, u64::from(config.vm.disk_gib) << 30)?;
    let layers = LayerStore::open(layout.layers())
        .map_err(|error| Error::internal(format!("the layer store cannot be opened: {error}")))?;
    let images = ImageStore::open(image::Options {
        root: layout.images(),
        layers: Arc::new(layers),
        registries: registry_settings(config),
        downloads: config.max_concurrent_downloads,
        listener: Arc::new(move |event| events.publish("image", event.action, &event.id, event.attributes)),
    })?;
    let containers = layout.containers();
    let records = store::load(layout).map_err(|error| failed("read", &containers, &error))?;
    let volumes = VolumeStore::open(layout.volumes());
    let volumes = volumes.map_err(|error| failed("open", &layout.volumes(), &error))?;
    Ok((images, volumes, records))
}

/// Opens the templates, unless they are not wanted; those of an earlier daemon that wanted them stay.
fn open_templates(
    config: &Config,
    events: &Arc<Events>,
    digests: &Arc<sandbox::Digests>,
) -> Result<Option<Arc<Templates>>> {
    if !config.vm.templates {
        return Ok(None);
    }
    let layout = &config.layout;
    let (path, sandboxes) = (layout.templates(), layout.sandboxes());
    let daemon = std::fs::read_to_string(layout.daemon_id()).unwrap_or_default().trim().to_owned();
    let events = Arc::clone(events);
    let listener = move |key: &str, news: &News| tell_of_template(&events, &daemon, key, news);
    let opened = Templates::open(path.clone(), sandboxes, Bounds::default(), Arc::clone(digests), listener);
    opened.map(Some).map_err(|error| failed("open", &path, &error))
}

/// A template's news are the daemon's: logged, and an event where an operator may have to act.
fn tell_of_template(events: &Events, daemon: &str, key: &str, news: &News) {
    let key = key.get(..12).unwrap_or(key);
    let (status, error) = match news {
        News::Built => ("built", None),
        News::Pruned => ("pruned", None),
        News::Failed(error) => ("failed", Some(error)),
        News::Discarded(error) => ("discarded", Some(error)),
    };
    match error {
        None => tracing::info!(template = key, status, "a template"),
        Some(error) => tracing::warn!(template = key, status, error, "a template is not used"),
    }
    let mut attributes =
        BTreeMap::from([("template".to_owned(), key.to_owned()), ("status".to_owned(), status.to_owned())]);
    if let Some(error) = error {
        attributes.insert("error".into(), error.clone());
    }
    events.publish("daemon", "template", daemon, attributes);
}

/// What the configuration says of registries.
pub(super) fn registry_settings(config: &Config) -> image::RegistrySettings {
    let mut settings = image::RegistrySettings {
        mirrors: config.registry_mirrors.clone(),
        insecure: config.insecure_registries.clone(),
        ..image::RegistrySettings::default()
    };
    settings.patience.attempts = u32::try_from(config.max_download_attempts).unwrap_or(u32::MAX);
    settings
}

/// Gives the daemon the id by which clients tell it from others, once: a random UUID.
fn make_id(path: &Path) -> io::Result<()> {
    if std::fs::metadata(path).is_ok_and(|meta| meta.len() > 0) {
        return Ok(());
    }
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(io::Error::other)?;
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let text = hex::encode(bytes);
    let parts = [(0, 8), (8, 12), (12, 16), (16, 20), (20, 32)].map(|(from, to)| &text[from..to]);
    let new = path.with_extension("new");
    std::fs::write(&new, format!("{}\n", parts.join("-")))?;
    File::open(&new)?.sync_all()?;
    std::fs::rename(&new, path)
}

/// Makes the disk that writable layers are clones of, anew when its size is to be another.
fn make_template(layout: &Layout, size: u64) -> Result<()> {
    let path = layout.disk_template();
    if std::fs::metadata(&path).is_ok_and(|meta| meta.len() == size) {
        return Ok(());
    }
    disk::template(&path, size, disk::Purpose::WritableLayer)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::Options,
        engine::{
            Engine, ErrorKind,
            container::{record, state::Rest},
        },
    };

    fn config(base: &Path, text: &str) -> Config {
        let file = base.join("daemon.json");
        std::fs::write(&file, text).unwrap();
        let mut config = Config::load(&Options::default(), Some(&file)).unwrap();
        config.layout = Layout { data_root: base.join("data"), exec_root: base.join("exec") };
        config.vm.disk_gib = 1;
        config
    }

    #[test]
    fn the_registries_settings_are_the_configurations() {
        let base = tempfile::tempdir().unwrap();
        let config = config(
            base.path(),
            r#"{"max-download-attempts": 7, "registry-mirrors": ["https://m"], "insecure-registries": ["r:5"]}"#,
        );
        let settings = registry_settings(&config);
        assert_eq!(settings.patience.attempts, 7);
        assert_eq!((settings.mirrors, settings.insecure), (vec!["https://m".into()], vec!["r:5".into()]));
    }

    #[test]
    fn what_would_fail_every_container_or_pull_fails_the_validation() {
        let base = tempfile::tempdir().unwrap();
        for (text, valid) in [
            ("{}", true),
            (r#"{"insecure-registries": ["10.0.0.0/99"]}"#, false),
            (r#"{"log-opts": {"max-size": "x"}}"#, false),
            (r#"{"default-ulimits": {"odd": {"Name": "odd", "Soft": 1, "Hard": 1}}}"#, false),
        ] {
            assert_eq!(Engine::validate(&config(base.path(), text)).is_ok(), valid, "{text}");
        }
    }

    #[test]
    fn a_daemon_keeps_its_id() {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().join("id");
        make_id(&path).unwrap();
        let id = std::fs::read_to_string(&path).unwrap();
        assert_eq!(id.trim().split('-').map(str::len).collect::<Vec<_>>(), [8, 4, 4, 4, 12]);
        make_id(&path).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), id);
    }

    #[tokio::test]
    async fn what_is_being_removed_is_not_renamed() {
        let base = tempfile::tempdir().unwrap();
        let config = config(base.path(), "{}");
        let mut record = record::sample("ab");
        record.life.state = State::Dead(Rest::Created(None));
        let layout = config.layout.clone();
        DirBuilder::new().recursive(true).create(layout.containers()).unwrap();
        store::create(&layout, &record.id).unwrap();
        record.write(&layout.container_record(&record.id)).unwrap();
        let engine = Engine::open(Arc::new(config)).await.unwrap();
        let error = engine.container_rename(&record.id, "other").await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::Conflict, "{error}");
        assert_eq!(Record::read(&layout.container_record(&record.id)).unwrap(), record);
        engine.container_remove("quiet_otter", false, false).await.unwrap();
        assert!(!layout.container(&record.id).exists());
    }
}
