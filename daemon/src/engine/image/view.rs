//! What users see of images: list, inspect, history, disk usage.

use std::{collections::HashMap, sync::Arc};

use bulkhead_rootfs::layers::DiffId;
use jiff::{SignedDuration, Timestamp};

use super::{
    catalog::{Catalog, Image},
    platform::Platform,
    reference::Reference,
    store::Store,
};
use crate::{
    api::types::{
        Filters,
        container::DriverData,
        image::{HistoryItem, Inspect, Metadata, RootFs, Summary},
    },
    engine::{Error, Result},
};

/// The filters that [`list`] knows.
pub const LIST_FILTERS: [&str; 6] = ["dangling", "label", "before", "since", "reference", "until"];
/// The filters that prune knows.
pub const PRUNE_FILTERS: [&str; 4] = ["dangling", "label", "label!", "until"];

/// How layers are kept, for people: the name of the storage driver.
pub const STORAGE_DRIVER: &str = "bulkhead";

/// What `GET /images/json` asks for.
#[derive(Debug, Clone, Copy)]
pub struct ListOptions<'a> {
    /// Also what others were built on.
    pub all: bool,
    /// Of [`LIST_FILTERS`].
    pub filters: &'a Filters,
    /// Count what images share.
    pub shared_size: bool,
}

/// `GET /images/json`, newest first.
///
/// # Errors
/// A bad filter, or one that names no image.
pub(super) fn list(store: &Store, options: ListOptions<'_>) -> Result<Vec<Summary>> {
    let ListOptions { all, filters, shared_size } = options;
    let containers = store.containers();
    let catalog = store.catalog();
    let dangling = filters.boolean("dangling", false)?;
    let before = earliest([until(filters)?, bound(&catalog, filters, "before", Ord::min)?]);
    let since = bound(&catalog, filters, "since", Ord::max)?;
    let shares = shared_size.then(|| layer_uses(&catalog));
    let mut found = Vec::new();
    for image in catalog.images() {
        let created = image.config.created;
        if before.is_some_and(|before| created.is_none_or(|at| at >= before))
            || since.is_some_and(|since| created.is_none_or(|at| at <= since))
            || !filters.labels("label", &image.config.labels())
        {
            continue;
        }
        let (tags, digests) = names(&catalog, image, filters)?;
        let has_children = catalog.children(&image.id).next().is_some();
        if tags.is_empty() && digests.is_empty() {
            let hidden = has_children && !all;
            if hidden || (filters.contains("dangling") && !dangling) || filters.contains("reference") {
                continue;
            }
        }
        if dangling && (!tags.is_empty() || has_children) {
            continue;
        }
        found.push(Summary {
            containers: count(containers.iter().filter(|container| container.image == image.id).count()),
            created: created.map_or(0, Timestamp::as_second),
            id: image.id.to_string(),
            labels: image.config.config.as_ref().and_then(|config| config.labels.clone()),
            parent_id: image.record.parent.map_or_else(String::new, |parent| parent.to_string()),
            repo_digests: digests,
            repo_tags: tags,
            shared_size: shares.as_ref().map_or(-1, |uses| bytes(shared(image, uses))),
            size: bytes(image.size()),
            virtual_size: 0,
        });
    }
    found.sort_by_key(|summary| std::cmp::Reverse(summary.created));
    Ok(found)
}

/// `GET /images/{name}/json`.
///
/// # Errors
/// No such image, or not for `platform`.
pub(super) fn inspect(store: &Store, name: &str, platform: Option<&Platform>) -> Result<Inspect> {
    let catalog = store.catalog();
    let image = for_platform(&catalog, name, platform)?;
    let config = &image.config;
    let (repo_tags, repo_digests) = names(&catalog, image, &Filters::default())?;
    let message = config.history.last().map(|step| step.comment.clone()).unwrap_or_default();
    Ok(Inspect {
        id: image.id.to_string(),
        repo_tags,
        repo_digests,
        parent: image.record.parent.map_or_else(String::new, |parent| parent.to_string()),
        comment: if config.comment.is_empty() { message } else { config.comment.clone() },
        created: config.created.map_or_else(String::new, |at| at.to_string()),
        docker_version: config.docker_version.clone(),
        author: config.author.clone(),
        config: config.config.clone().unwrap_or_default().into(),
        architecture: config.architecture.clone(),
        variant: config.variant.clone(),
        os: if config.os.is_empty() { "linux".to_owned() } else { config.os.clone() },
        os_version: config.os_version.clone(),
        size: bytes(image.size()),
        virtual_size: 0,
        graph_driver: DriverData { data: None, name: STORAGE_DRIVER.to_owned() },
        root_fs: RootFs {
            kind: config.rootfs.as_ref().map_or_else(String::new, |rootfs| rootfs.kind.clone()),
            layers: config.layers().iter().map(ToString::to_string).collect(),
        },
        metadata: image
            .record
            .last_tagged
            .map_or_else(Metadata::default, |at| Metadata { last_tag_time: at.to_string() }),
    })
}

/// `GET /images/{name}/history`, newest step first.
///
/// # Errors
/// No such image, or its configuration contradicts itself.
pub(super) fn history(store: &Store, name: &str, platform: Option<&Platform>) -> Result<Vec<HistoryItem>> {
    let catalog = store.catalog();
    let image = for_platform(&catalog, name, platform)?;
    let mut sizes = image.layer_sizes.iter();
    let mut items = Vec::with_capacity(image.config.history.len());
    for step in &image.config.history {
        let size = if step.empty_layer {
            0
        } else {
            *sizes.next().ok_or_else(|| Error::internal("too many non-empty layers in History section"))?
        };
        items.push(HistoryItem {
            comment: step.comment.clone(),
            created: step.created.map_or(0, Timestamp::as_second),
            created_by: step.created_by.clone(),
            id: "<missing>".to_owned(),
            size: bytes(size),
            tags: None,
        });
    }
    items.reverse();
    // The newest step made this image; older ones made its ancestors, as far as they are here.
    let mut ancestor = Some(image);
    for item in &mut items {
        let Some(image) = ancestor else { break };
        let tags: Vec<_> = tags_of(&catalog, image);
        item.id = image.id.to_string();
        item.tags = (!tags.is_empty()).then_some(tags);
        ancestor = image.record.parent.and_then(|parent| catalog.get(&parent)).map(Arc::as_ref);
    }
    Ok(items)
}

/// The images' part of `GET /system/df`: bytes of all layers, each once, and the images with what they share.
///
/// # Errors
/// The layer store cannot be read.
pub(super) fn usage(store: &Store) -> Result<(i64, Vec<Summary>)> {
    let size = store.layers().size().map_err(|error| super::errors::layer(&error))?;
    let options = ListOptions { all: false, filters: &Filters::default(), shared_size: true };
    Ok((bytes(size), list(store, options)?))
}

/// The image that `name` means, if it is for `platform`.
///
/// # Errors
/// There is none; Docker's words for one of another platform.
pub(super) fn for_platform<'a>(
    catalog: &'a Catalog,
    name: &str,
    platform: Option<&Platform>,
) -> Result<&'a Image> {
    let image = catalog.resolve(name)?;
    if let Some(wanted) = platform {
        let have = image.config.platform();
        if !wanted.accepts(&have) {
            let name = Reference::parse(name).map_or_else(|_| name.to_owned(), |name| name.familiar());
            return Err(Error::not_found(format!(
                "image with reference {name} was found but its platform ({have}) does not match the specified \
                 platform ({wanted})"
            )));
        }
    }
    Ok(image)
}

/// The filter `until`: a time, or how long ago.
///
/// # Errors
/// It is neither, or there are several.
pub(crate) fn until(filters: &Filters) -> Result<Option<Timestamp>> {
    let mut values = filters.get("until");
    let Some(text) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        return Err(Error::invalid("more than one until filter specified"));
    }
    moment(text)
        .map(Some)
        .ok_or_else(|| Error::invalid(format!("invalid value for until filter: \"{text}\"")))
}

/// RFC 3339, seconds since the epoch, a date, or a Go duration (`1h30m`) before now.
fn moment(text: &str) -> Option<Timestamp> {
    if let Ok(at) = text.parse() {
        return Some(at);
    }
    if let Ok(seconds) = text.parse::<i64>() {
        return Timestamp::from_second(seconds).ok();
    }
    if let Ok(date) = text.parse::<jiff::civil::DateTime>() {
        return date.to_zoned(jiff::tz::TimeZone::UTC).ok().map(|zoned| zoned.timestamp());
    }
    let duration: SignedDuration = text.parse().ok()?;
    Timestamp::now().checked_sub(duration).ok()
}

/// The creation time of the images that a filter names; of several the one that `choose` picks.
fn bound(
    catalog: &Catalog,
    filters: &Filters,
    key: &str,
    choose: fn(Timestamp, Timestamp) -> Timestamp,
) -> Result<Option<Timestamp>> {
    let mut found: Option<Timestamp> = None;
    for name in filters.get(key) {
        if let Some(at) = catalog.resolve(name)?.config.created {
            found = Some(found.map_or(at, |other| choose(other, at)));
        }
    }
    Ok(found)
}

fn earliest(times: [Option<Timestamp>; 2]) -> Option<Timestamp> {
    times.into_iter().flatten().min()
}

/// Familiar tags and digests that pass the filter `reference`.
fn names(catalog: &Catalog, image: &Image, filters: &Filters) -> Result<(Vec<String>, Vec<String>)> {
    let (mut tags, mut digests) = (Vec::new(), Vec::new());
    for name in catalog.names_of(&image.id) {
        let mut passes = !filters.contains("reference");
        for pattern in filters.get("reference") {
            passes |= name.matches(pattern)?;
        }
        if passes {
            if name.digest().is_some() { &mut digests } else { &mut tags }.push(name.familiar());
        }
    }
    Ok((tags, digests))
}

fn tags_of(catalog: &Catalog, image: &Image) -> Vec<String> {
    catalog
        .names_of(&image.id)
        .into_iter()
        .filter(|name| name.digest().is_none())
        .map(Reference::familiar)
        .collect()
}

/// How many images have each layer.
fn layer_uses(catalog: &Catalog) -> HashMap<DiffId, usize> {
    let mut uses = HashMap::new();
    for image in catalog.images() {
        let mut layers = image.config.layers().to_vec();
        layers.sort_unstable();
        layers.dedup();
        for layer in layers {
            *uses.entry(layer).or_default() += 1;
        }
    }
    uses
}

fn shared(image: &Image, uses: &HashMap<DiffId, usize>) -> u64 {
    let layers = image.config.layers().iter().zip(&image.layer_sizes);
    layers.filter(|(layer, _)| uses.get(layer).is_some_and(|count| *count > 1)).map(|(_, size)| size).sum()
}

fn bytes(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

fn count(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
