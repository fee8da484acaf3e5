//! What a container that is being created gets mounted: its own wishes over those of others over the image's.

use std::{collections::BTreeSet, path::Path, sync::Arc};

use super::{
    Mount, Source,
    parse::{self, Wanted, WantedSource},
};
use crate::{
    api::types::container::{Config, HostConfig},
    engine::{Error, Result, Shared, volume::store::Pin},
};

/// The most mounts of a container.
const MOST: usize = 256;

/// Checks what can be checked without looking at anything.
///
/// # Errors
/// A text that is not valid, or cannot be honoured; two mounts at one place.
pub(crate) fn check(config: &Config, host: &HostConfig) -> Result<()> {
    let own = wanted(host)?;
    let mut seen: BTreeSet<String> = BTreeSet::new();
    for target in host.tmpfs.iter().flatten().map(|(target, _)| target) {
        seen.insert(super::super::spec::clean_target(target)?);
    }
    for mount in &own {
        if !seen.insert(mount.destination.clone()) {
            return Err(Error::invalid(format!("Duplicate mount point: {}", mount.destination)));
        }
    }
    for target in config.volumes.iter().flatten().map(|(target, _)| target) {
        super::super::spec::clean_target(target)?;
    }
    for from in host.volumes_from.iter().flatten() {
        parse::volumes_from(from)?;
    }
    // Where there are no volumes, no driver is looked for.
    let named = own.iter().any(|mount| matches!(mount.source, WantedSource::Volume { .. }));
    if named || config.volumes.as_ref().is_some_and(|volumes| !volumes.is_empty()) {
        crate::engine::volume::check_driver(&host.volume_driver)?;
    }
    Ok(())
}

/// The mounts that the request itself names.
fn wanted(host: &HostConfig) -> Result<Vec<Wanted>> {
    let binds = host.binds.iter().flatten().map(|text| parse::bind(text));
    let mounts = host.mounts.iter().flatten().filter_map(|mount| parse::mount(mount).transpose());
    binds.chain(mounts).collect()
}

/// The container's mounts: volumes are made where there are none, and pinned until the container is known.
///
/// # Errors
/// Those of [`check`]; a container or file of the host that is not there.
pub(crate) fn resolve(
    shared: &Arc<Shared>,
    config: &Config,
    host: &HostConfig,
) -> Result<(Vec<Mount>, Vec<Pin>)> {
    let mut resolution = Resolution { shared, mounts: Vec::new(), pins: Vec::new() };
    for text in host.volumes_from.iter().flatten() {
        let (container, read_only) = parse::volumes_from(text)?;
        let record = shared.registry.find(container)?.view().record;
        for mount in &record.mounts {
            resolution.inherit(mount, read_only)?;
        }
    }
    for mount in wanted(host)? {
        resolution.add(mount)?;
    }
    let tmpfs = host.tmpfs.iter().flatten().map(|(target, _)| target);
    let more = host.mounts.iter().flatten().filter(|mount| mount.kind == "tmpfs").map(|mount| &mount.target);
    let taken: BTreeSet<String> =
        tmpfs.chain(more).filter_map(|target| super::super::spec::clean_target(target).ok()).collect();
    for target in config.volumes.iter().flatten().map(|(target, _)| target) {
        let destination = super::super::spec::clean_target(target)?;
        let there = resolution.mounts.iter().any(|mount| mount.destination == destination);
        if !there && !taken.contains(&destination) {
            let (source, mode) = (WantedSource::volume(None), String::new());
            resolution.add(Wanted { destination, source, read_only: false, mode, cached: false })?;
        }
    }
    let Resolution { mut mounts, pins, .. } = resolution;
    mounts.retain(|mount| !taken.contains(&mount.destination));
    if mounts.len() > MOST {
        return Err(Error::invalid(format!("{} mounts are over the limit of {MOST}", mounts.len())));
    }
    Ok((mounts, pins))
}

struct Resolution<'a> {
    shared: &'a Arc<Shared>,
    mounts: Vec<Mount>,
    pins: Vec<Pin>,
}

impl Resolution<'_> {
    /// Takes over another container's mount.
    fn inherit(&mut self, theirs: &Mount, read_only: bool) -> Result<()> {
        let mut mount = Mount { read_only: theirs.read_only || read_only, ..theirs.clone() };
        if let Source::Volume { name, anonymous, .. } = &mut mount.source {
            // It goes with the container that it was made for, if at all.
            *anonymous = false;
            let volume = self.shared.volumes.get(name);
            let volume = volume.ok_or_else(|| crate::engine::volume::store::no_such(name))?;
            let (_, pin, _) = self.shared.volumes.create((*volume).clone())?;
            self.pins.push(pin);
        }
        self.replace(mount);
        Ok(())
    }

    fn add(&mut self, wanted: Wanted) -> Result<()> {
        let Wanted { destination, source, read_only, mode, cached } = wanted;
        let source = match source {
            WantedSource::Bind { path, create, non_recursive, propagation } => {
                if !create && std::fs::symlink_metadata(&path).is_err() {
                    return Err(Error::invalid(format!(
                        "invalid mount config for type \"bind\": bind source path does not exist: {path}"
                    )));
                }
                if create {
                    make_directory(Path::new(&path))?;
                }
                Source::Bind { path, create, non_recursive, propagation }
            }
            WantedSource::Volume { name, no_copy, subpath, labels, options } => {
                let (volume, pin) = self.shared.volume(name.as_deref(), labels, options)?;
                self.pins.push(pin);
                let mountpoint = self.shared.volumes.mountpoint(&volume).display().to_string();
                let anonymous = name.is_none();
                Source::Volume { name: volume.name.clone(), mountpoint, subpath, anonymous, no_copy }
            }
        };
        self.replace(Mount { destination, source, read_only, mode, cached });
        Ok(())
    }

    fn replace(&mut self, mount: Mount) {
        self.mounts.retain(|other| other.destination != mount.destination);
        self.mounts.push(mount);
    }
}

/// Makes the directory that a `-v` names, where there is nothing.
pub(super) fn make_directory(path: &Path) -> Result<()> {
    if std::fs::symlink_metadata(path).is_ok() {
        return Ok(());
    }
    std::fs::create_dir_all(path).map_err(|error| {
        Error::internal(format!("error while creating mount source path '{}': {error}", path.display()))
    })
}
