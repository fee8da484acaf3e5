//! Creates a container: its record and its disk; nothing is booted.

use std::{io, path::Path, sync::Arc};

use bulkhead_rootfs::disk;
use jiff::Timestamp;

use super::{Actor, names, record::Record};
use crate::{
    api::types::container::{CreateRequest, CreateResponse},
    engine::{
        Error, Result, Shared,
        image::ImageForContainer,
        limits,
        mounts::{self, Mount},
        network, spec, store,
        volume::store::Pin,
    },
    phases::{Stage, Timeline, TimelineKind},
    units,
};

/// Creates it. On an error nothing is left.
pub(super) async fn create(
    shared: &Arc<Shared>,
    name: Option<&str>,
    mut request: CreateRequest,
) -> Result<CreateResponse> {
    let id = names::new_id();
    let timeline = shared.timelines.begin(&id, TimelineKind::Create);
    if request.config.image.is_empty() {
        return Err(Error::invalid("invalid reference format"));
    }
    let image = shared.images.resolve_for_create(&request.config.image, None).await?;
    let ImageForContainer { id: image_id, config: image_config, layers, warning, pin } = image;
    if let Some(config) = &image_config.config {
        spec::merge_image(&mut request.config, config);
    }
    spec::fill(&mut request, &id, &shared.config);
    let CreateRequest { config, host_config, networking_config } = request;
    let mut warnings: Vec<String> = warning.into_iter().collect();
    warnings.extend(spec::validate(&config, &host_config)?);
    warnings.extend(limits::check(&config, &host_config, &shared.layout().data_root, false)?);
    let networks = network::attach::attachments(
        &shared.networks,
        &shared.config,
        &config,
        &host_config,
        &networking_config,
    )?;
    warnings.extend(network::attach::warnings(&shared.networks, &networks));
    network::ports::wanted(&config, &host_config)?;
    let size = disk_size(&host_config)?;
    timeline.mark(Stage::Resolved);

    let name = match name {
        Some(name) if !name.is_empty() => shared.registry.reserve(name, &id)?,
        _ => shared.registry.reserve_any(&id)?,
    };
    let mut record = Record::new(id.clone(), name, image_id, Timestamp::now());
    record.layers = layers;
    record.config = config;
    record.host_config = host_config;
    record.networks = networks;
    // Held until the registry tells of them.
    let pins = match resolve_mounts(shared, &record).await {
        Ok((mounts, pins)) => {
            record.mounts = mounts;
            pins
        }
        Err(error) => {
            shared.registry.remove(&id);
            return Err(error);
        }
    };
    if let Err(error) = lay_down(shared, &record, size, &timeline).await {
        shared.registry.remove(&id);
        drop(pins);
        shared.remove_anonymous(&record).await;
        return Err(error);
    }
    let (actor, container) = Actor::new(Arc::clone(shared), record.clone());
    shared.registry.insert(container);
    // From here on the registry tells of the layers.
    drop((pin, pins));
    shared.publish(&record, "create", []);
    tokio::spawn(actor.run(false));
    Ok(CreateResponse { id, warnings })
}

/// What is to be mounted, off the runtime's threads: volumes and directories are made.
async fn resolve_mounts(shared: &Arc<Shared>, record: &Record) -> Result<(Vec<Mount>, Vec<Pin>)> {
    let (shared, config, host) = (Arc::clone(shared), record.config.clone(), record.host_config.clone());
    tokio::task::spawn_blocking(move || mounts::resolve(&shared, &config, &host))
        .await
        .unwrap_or_else(|error| Err(Error::internal(error.to_string())))
}

/// `--storage-opt size=`, in bytes rounded up to whole blocks.
fn disk_size(host: &crate::api::types::container::HostConfig) -> Result<Option<u64>> {
    let Some(text) = host.storage_opt.as_ref().and_then(|options| options.get("size")) else {
        return Ok(None);
    };
    let size = units::size(text)
        .and_then(|size| size.checked_next_multiple_of(disk::BLOCK))
        .filter(|size| (disk::MIN_SIZE..=disk::MAX_SIZE).contains(size));
    size.map(Some).ok_or_else(|| {
        Error::invalid(format!("invalid --storage-opt size: '{text}': a size from 32m to 8t is expected"))
    })
}

/// Makes the directory, the disk and the record, in this order.
async fn lay_down(
    shared: &Arc<Shared>,
    record: &Record,
    size: Option<u64>,
    timeline: &Arc<Timeline>,
) -> Result<()> {
    let (layout, record, timeline) = (shared.layout().clone(), record.clone(), Arc::clone(timeline));
    let made = tokio::task::spawn_blocking(move || {
        let made = store::create(&layout, &record.id)
            .and_then(|()| make_disk(&layout.disk_template(), &layout.container_disk(&record.id), size))
            .inspect(|()| timeline.mark(Stage::Disk))
            .and_then(|()| record.write(&layout.container_record(&record.id)));
        timeline.mark(Stage::Recorded);
        if made.is_err()
            && let Err(error) = store::delete(&layout, &record.id)
        {
            tracing::error!(container = record.id, %error, "what is left of a failed creation could not be removed");
        }
        made
    });
    let made = made.await.unwrap_or_else(|error| Err(io::Error::other(error)));
    made.map_err(|error| {
        Error::internal(format!("failed to create the container's layer: {}", host_words(&error)))
    })
}

fn make_disk(template: &Path, disk_path: &Path, size: Option<u64>) -> io::Result<()> {
    match size {
        None => disk::clone(template, disk_path).map(drop).map_err(io::Error::other),
        Some(size) => disk::template(disk_path, size, disk::Purpose::WritableLayer).map_err(io::Error::other),
    }
}

/// The error as Docker's users know it: without Rust's number of it.
fn host_words(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::ENOSPC) => "no space left on device".into(),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::types::container::HostConfig;

    #[test]
    fn sizes_have_bounds() {
        let host = |size: &str| HostConfig {
            storage_opt: Some([("size".to_owned(), size.to_owned())].into()),
            ..HostConfig::default()
        };
        assert_eq!(disk_size(&host("33554433")).unwrap(), Some(33_554_432 + disk::BLOCK));
        assert!(disk_size(&host("1m")).unwrap_err().message.contains("from 32m"));
        assert_eq!(disk_size(&HostConfig::default()).unwrap(), None);
    }
}
