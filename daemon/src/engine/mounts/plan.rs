//! What a start makes of a container's mounts.

use std::{
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
};

use bulkhead_agent_api::{CopyUp, Disk, ForwardedSocket, VOLUME_DATA, VolumeDisk};

use super::{Mount, Source, resolve::make_directory};
use crate::{
    engine::{Error, Result, Shared, volume},
    sandbox::{ExtraDisk, SHARES, SandboxSpec, ShareSpec, extra_disk},
};

/// The first host port of forwarded sockets; each mount has its own, by its place in the record.
pub(super) const FIRST_PORT: u32 = 4096;

/// The most volumes of a container that are disks: each is a device of its machine.
const MOST_DISKS: usize = 8;

/// What is mounted how.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    /// For the share server.
    pub(crate) shares: Vec<ShareSpec>,
    /// For the machine: volumes that are disks, and where in the container their first content is.
    disks: Vec<(ExtraDisk, Option<String>)>,
    /// Bind mounts of the spec: destination, source below what the agent mounts, whether read-only.
    pub(crate) binds: Vec<(String, String, bool)>,
    /// For the agent.
    pub(crate) copy_up: Vec<CopyUp>,
    /// For the agent, and for [`super::sockets`].
    pub(crate) sockets: Vec<ForwardedSocket>,
}

/// Plans a start; `first` is whether the container has never run.
///
/// # Errors
/// What is to be mounted is not there.
pub(crate) fn plan(shared: &Shared, mounts: &[Mount], first: bool) -> Result<Plan> {
    let mut plan = Plan::default();
    for (index, mount) in mounts.iter().enumerate() {
        if let Source::Bind { path, create: true, .. } = &mount.source {
            make_directory(Path::new(path))?;
        }
        plan.add(shared, index, mount, first)?;
    }
    Ok(plan)
}

/// Plans a look at the files of a container that does not run. Nothing is made or filled for it, and what is not
/// there any more is left out: the rest can be looked at nonetheless.
pub(crate) fn plan_at_rest(shared: &Shared, mounts: &[Mount]) -> Plan {
    let mut plan = Plan::default();
    for (index, mount) in mounts.iter().enumerate() {
        let _ = plan.add(shared, index, mount, false);
    }
    plan.sockets.clear();
    let gone = |share: &ShareSpec| std::fs::metadata(share.whole_path()).is_err();
    let gone: Vec<String> =
        plan.shares.extract_if(.., |share| gone(share)).map(|share| bind_source(&share.name)).collect();
    plan.binds.retain(|(_, source, _)| !gone.contains(source));
    plan
}

/// Where a share is, below what the agent mounts.
fn bind_source(share: &str) -> String {
    format!("{SHARES}/{share}")
}

impl Plan {
    /// Gives a sandbox what it is to have.
    pub(crate) fn onto(self, spec: SandboxSpec) -> SandboxSpec {
        let disks: Vec<ExtraDisk> = self.disks.into_iter().map(|(disk, _)| disk).collect();
        let disk_slots = u8::try_from(disks.len()).unwrap_or(u8::MAX);
        SandboxSpec { shares: self.shares, disk_slots, disks, ..spec }
    }

    /// For the agent: the volumes that are disks.
    pub(crate) fn volume_disks(&self) -> Result<Vec<VolumeDisk>> {
        let disks = self.disks.iter().enumerate().map(|(slot, (disk, copy_up))| {
            let size = disk.file.metadata()?.len();
            let (read_only, copy_up) = (disk.read_only, copy_up.clone());
            Ok(VolumeDisk { disk: Disk { id: extra_disk(slot), size }, read_only, copy_up })
        });
        disks.collect()
    }

    fn add(&mut self, shared: &Shared, index: usize, mount: &Mount, first: bool) -> Result<()> {
        let (path, beneath, recursive) = match &mount.source {
            Source::Bind { path, non_recursive, .. } => {
                let path = PathBuf::from(path);
                if let Some(socket) = socket(&path, index, &mount.destination)? {
                    self.sockets.push(socket);
                    return Ok(());
                }
                (path, None, !non_recursive)
            }
            Source::Volume { name, subpath, no_copy, .. } => {
                let volume = shared.volumes.get(name);
                let volume = volume.ok_or_else(|| crate::engine::volume::store::no_such(name))?;
                let copy_up = first && !no_copy && subpath.is_empty() && !mount.read_only;
                if volume.disk_size().is_some() {
                    return self.add_disk(
                        &volume.name,
                        &shared.volumes.source(&volume),
                        subpath,
                        mount,
                        copy_up,
                    );
                }
                let beneath = (!subpath.is_empty()).then(|| PathBuf::from(subpath));
                if copy_up && volume.device().is_none() {
                    self.copy_up.push(CopyUp { share: index.to_string(), path: mount.destination.clone() });
                }
                (shared.volumes.source(&volume), beneath, true)
            }
        };
        self.binds.push((mount.destination.clone(), bind_source(&index.to_string()), mount.read_only));
        self.shares.push(ShareSpec {
            name: index.to_string(),
            path,
            beneath,
            read_only: mount.read_only,
            recursive,
            cached: mount.cached,
        });
        Ok(())
    }
}

impl Plan {
    fn add_disk(
        &mut self,
        name: &str,
        image: &Path,
        subpath: &str,
        mount: &Mount,
        copy_up: bool,
    ) -> Result<()> {
        let slot = self.disks.len();
        if slot >= MOST_DISKS {
            return Err(Error::invalid(format!(
                "a container cannot have more than {MOST_DISKS} volumes that are disks"
            )));
        }
        let file = volume::disk::open(name, image, mount.read_only)?;
        let mut source = format!("disks/{}/{VOLUME_DATA}", extra_disk(slot));
        if !subpath.is_empty() {
            source = format!("{source}/{subpath}");
        }
        self.binds.push((mount.destination.clone(), source, mount.read_only));
        let copy_up = copy_up.then(|| mount.destination.clone());
        self.disks.push((ExtraDisk { file, read_only: mount.read_only }, copy_up));
        Ok(())
    }
}

/// A socket of the host is listened to in the container.
fn socket(path: &Path, index: usize, destination: &str) -> Result<Option<ForwardedSocket>> {
    let meta = std::fs::metadata(path).map_err(|error| {
        Error::invalid(format!(
            "invalid mount config for type \"bind\": bind source path does not exist: {}: {error}",
            path.display()
        ))
    })?;
    if !meta.file_type().is_socket() {
        return Ok(None);
    }
    let port = u32::try_from(index).ok().and_then(|index| FIRST_PORT.checked_add(index));
    let port = port.ok_or_else(|| Error::invalid("too many mounts"))?;
    let (uid, gid, mode) = (meta.uid(), meta.gid(), meta.mode() & 0o777);
    Ok(Some(ForwardedSocket { path: destination.to_owned(), port, uid, gid, mode }))
}
