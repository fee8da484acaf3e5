//! `docker rmi` and `docker image prune`: which names and images go, and what stands in the way.
//!
//! By **name**: the name goes, and the image with it if that was its last (unless a container uses it: then
//! it needs force, and even so stays for a running one). By **id**: all its names go if they are of one
//! repository, then the image. Images that others were built on, and images of running containers, are never
//! removed; force overrides several names and stopped containers. An ancestor that nothing needs any more goes
//! along unless `noprune`.

use super::{
    catalog::Catalog,
    digest::Digest,
    reference::Reference,
    store::{ContainerUse, Store},
};
use crate::{
    api::types::{
        Filters,
        image::{DeleteItem, PruneReport},
    },
    engine::{Error, ErrorKind, Result},
};

/// What is announced of a removal.
pub(super) type Announce<'a> = &'a dyn Fn(&'static str, &Digest);

/// How to remove.
#[derive(Debug, Clone, Copy, Default)]
pub struct RemoveOptions {
    /// In spite of several names, and of stopped containers.
    pub force: bool,
    /// Ancestors stay.
    pub keep_parents: bool,
}

/// Which conflicts count.
#[derive(Clone, Copy)]
struct Conflicts {
    names: bool,
    stopped: bool,
}

struct Conflict {
    hard: bool,
    in_use: bool,
    message: String,
}

/// One removal under way.
struct Removal<'a> {
    store: &'a Store,
    announce: Announce<'a>,
    items: Vec<DeleteItem>,
}

/// `DELETE /images/{name}`.
///
/// # Errors
/// No such image; a conflict in Docker's words; the disk's.
pub(super) fn remove(
    store: &Store,
    name: &str,
    options: RemoveOptions,
    announce: Announce<'_>,
) -> Result<Vec<DeleteItem>> {
    let containers = store.containers();
    let (id, names) = {
        let catalog = store.catalog();
        let id = catalog.resolve(name)?.id;
        (id, names_of(&catalog, &id))
    };
    let mut removal = Removal { store, announce, items: vec![] };
    let by_id = id.to_string().starts_with(name) || id.hex().starts_with(name);
    let mut quiet = false;
    if !by_id {
        if !options.force
            && of_one_repository(&names)
            && let Some(container) = containers.iter().find(|container| container.image == id)
        {
            return Err(Error::conflict(format!(
                "conflict: unable to remove repository reference \"{name}\" (must force) - container {} is \
                     using its referenced image {}",
                short(&container.id),
                id.short()
            )));
        }
        if removal.untag(&id, &Reference::parse(name)?.or_latest())? > 0 {
            return Ok(removal.items);
        }
        quiet = true;
    } else if of_one_repository(&names) {
        let counts = Conflicts { names: false, stopped: !options.force };
        if let Some(conflict) = conflict(&store.catalog(), &containers, &id, counts) {
            return Err(conflict.error(&id));
        }
        removal.untag_all(&id, &names)?;
    }
    removal.delete(&id, &containers, options, quiet)?;
    Ok(removal.items)
}

/// `POST /images/prune`: the images without a name, or (`dangling=false`) all that no container uses.
///
/// # Errors
/// A bad filter.
pub(super) fn prune(store: &Store, filters: &Filters, announce: Announce<'_>) -> Result<PruneReport> {
    let dangling = filters.boolean("dangling", true)?;
    let until = super::view::until(filters)?;
    let before: u64 = stored_bytes(store)?;
    let candidates: Vec<(Digest, Vec<Reference>)> = {
        let catalog = store.catalog();
        (catalog.images())
            .filter(|image| {
                let labels = image.config.labels();
                let old_enough = until.is_none_or(|until| image.config.created.is_some_and(|at| at <= until));
                old_enough && filters.labels("label", &labels) && filters.no_labels("label!", &labels)
            })
            .map(|image| (image.id, names_of(&catalog, &image.id)))
            .filter(|(id, names)| !names.is_empty() || catalog.children(id).next().is_none())
            .filter(|(_, names)| !dangling || names.iter().all(|name| name.tag().is_none()))
            .collect()
    };
    let mut items = Vec::new();
    for (id, names) in candidates {
        let targets: Vec<String> =
            if names.is_empty() { vec![id.hex()] } else { names.iter().map(ToString::to_string).collect() };
        for target in targets {
            match remove(store, &target, RemoveOptions::default(), announce) {
                Ok(removed) => items.extend(removed),
                // In use, or gone along with another.
                Err(error) if matches!(error.kind, ErrorKind::Conflict | ErrorKind::NotFound) => {}
                Err(error) => tracing::warn!(image = %id, %error, "an image could not be pruned"),
            }
        }
    }
    let space_reclaimed = before.saturating_sub(stored_bytes(store)?);
    Ok(PruneReport { images_deleted: (!items.is_empty()).then_some(items), space_reclaimed })
}

impl Removal<'_> {
    /// Takes a name away, and the digests of that repository if no tag is left there; how many names remain.
    fn untag(&mut self, id: &Digest, name: &Reference) -> Result<usize> {
        self.store.unname(std::slice::from_ref(name))?;
        (self.announce)("untag", id);
        self.items.push(DeleteItem::untagged(name.familiar()));
        let mut left = names_of(&self.store.catalog(), id);
        if name.digest().is_none() {
            let same = |other: &Reference| other.repository() == name.repository();
            if !left.iter().any(|other| same(other) && other.tag().is_some()) {
                let (digests, others): (Vec<_>, Vec<_>) = left.into_iter().partition(same);
                self.store.unname(&digests)?;
                self.items.extend(digests.iter().map(|digest| DeleteItem::untagged(digest.familiar())));
                left = others;
            }
        }
        Ok(left.len())
    }

    fn untag_all(&mut self, id: &Digest, names: &[Reference]) -> Result<()> {
        self.store.unname(names)?;
        for name in names {
            (self.announce)("untag", id);
            self.items.push(DeleteItem::untagged(name.familiar()));
        }
        Ok(())
    }

    /// Removes an image and, where it may, its ancestors. When `quiet`, an image that is still used simply
    /// stays.
    fn delete(
        &mut self,
        id: &Digest,
        containers: &[ContainerUse],
        options: RemoveOptions,
        quiet: bool,
    ) -> Result<()> {
        let (mut id, mut options, mut quiet) = (*id, options, quiet);
        loop {
            let (conflict, names, parent, dangling) = {
                let catalog = self.store.catalog();
                let counts = Conflicts { names: !options.force, stopped: !options.force };
                let names = names_of(&catalog, &id);
                let dangling = names.is_empty() && catalog.children(&id).next().is_none();
                let parent = catalog.get(&id).and_then(|image| image.record.parent);
                (conflict(&catalog, containers, &id, counts), names, parent, dangling)
            };
            if let Some(conflict) = conflict {
                if quiet && (!dangling || conflict.in_use) {
                    return Ok(());
                }
                return Err(conflict.error(&id));
            }
            self.untag_all(&id, &names)?;
            let removed = self.store.remove(&id)?;
            (self.announce)("delete", &id);
            self.items.push(DeleteItem::deleted(&id));
            self.items.extend(removed.iter().map(DeleteItem::deleted));
            match parent {
                Some(parent) if !options.keep_parents && self.store.catalog().get(&parent).is_some() => {
                    id = parent;
                    options.force = false;
                    quiet = true;
                }
                _ => return Ok(()),
            }
        }
    }
}

impl Conflict {
    fn error(&self, id: &Digest) -> Error {
        let force = if self.hard { "cannot be forced" } else { "must be forced" };
        Error::conflict(format!("conflict: unable to delete {} ({force}) - {}", id.short(), self.message))
    }
}

fn conflict(
    catalog: &Catalog,
    containers: &[ContainerUse],
    id: &Digest,
    counts: Conflicts,
) -> Option<Conflict> {
    if catalog.children(id).next().is_some() {
        return Some(Conflict {
            hard: true,
            in_use: false,
            message: "image has dependent child images".into(),
        });
    }
    let of_image = |running: bool| containers.iter().find(|c| c.image == *id && c.running == running);
    if let Some(container) = of_image(true) {
        let message = format!("image is being used by running container {}", short(&container.id));
        return Some(Conflict { hard: true, in_use: true, message });
    }
    if counts.names && !catalog.names_of(id).is_empty() {
        let message = "image is referenced in multiple repositories".into();
        return Some(Conflict { hard: false, in_use: false, message });
    }
    let container = of_image(false).filter(|_| counts.stopped)?;
    let message = format!("image is being used by stopped container {}", short(&container.id));
    Some(Conflict { hard: false, in_use: true, message })
}

/// Whether all names are of one repository with at most one tag among them. Without names: no.
fn of_one_repository(names: &[Reference]) -> bool {
    let mut repositories: Vec<_> = names.iter().map(Reference::repository).collect();
    repositories.dedup();
    repositories.len() == 1 && names.iter().filter(|name| name.tag().is_some()).count() <= 1
}

fn names_of(catalog: &Catalog, id: &Digest) -> Vec<Reference> {
    catalog.names_of(id).into_iter().cloned().collect()
}

fn short(id: &str) -> &str {
    id.get(..12).unwrap_or(id)
}

fn stored_bytes(store: &Store) -> Result<u64> {
    store.layers().size().map_err(|error| super::errors::layer(&error))
}
