//! What a start makes of a container's mounts.

use std::{
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
};

use bulkhead_agent_api::{CopyUp, ForwardedSocket};

use super::{Mount, Source, resolve::make_directory};
use crate::{
    engine::{Error, Result, Shared},
    sandbox::ShareSpec,
};

/// The first host port of forwarded sockets; each mount has its own, by its place in the record.
pub(super) const FIRST_PORT: u32 = 4096;

/// What is mounted how.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// For the share server.
    pub(crate) shares: Vec<ShareSpec>,
    /// Bind mounts of the spec: destination, share, whether read-only.
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
    let gone: Vec<String> = plan.shares.extract_if(.., |share| gone(share)).map(|share| share.name).collect();
    plan.binds.retain(|(_, share, _)| !gone.contains(share));
    plan
}

impl Plan {
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
                let beneath = (!subpath.is_empty()).then(|| PathBuf::from(subpath));
                if first && !no_copy && beneath.is_none() && !mount.read_only && volume.device().is_none() {
                    self.copy_up.push(CopyUp { share: index.to_string(), path: mount.destination.clone() });
                }
                (shared.volumes.directory(&volume), beneath, true)
            }
        };
        self.binds.push((mount.destination.clone(), index.to_string(), mount.read_only));
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
