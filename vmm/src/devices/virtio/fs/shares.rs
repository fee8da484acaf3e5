//! The shares of a device: how they come, go, and come back after a restore.

use std::os::fd::{AsFd, OwnedFd};

use bulkhead_vmm_api::ShareKind;
use rustix::{fs::OFlags, io::Errno};

use super::{
    backend::{Backend, Result, open_beneath},
    inodes::ShareId,
    layer::Layer,
    server::{Server, check_name, now},
};

/// The most shares on one device: each holds a file descriptor.
pub(super) const MAX_SHARES: usize = 512;

/// Why a share could not be attached or detached.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// The name cannot be a file name.
    #[error("{0:?} cannot be a share's name")]
    Name(String),
    /// There is one of that name.
    #[error("a share named {0:?} is attached already")]
    Exists(String),
    /// There is none of that name.
    #[error("no share named {0:?} is attached")]
    NotFound(String),
    /// The device has as many as it can.
    #[error("the device has {MAX_SHARES} shares, which is the most")]
    TooMany,
    /// The directory is not what its kind says.
    #[error("the share {name:?} is not a readable directory of kind {kind:?}: {source}")]
    Unusable {
        /// The share's name.
        name: String,
        /// Its kind.
        kind: ShareKind,
        /// What failed.
        source: std::io::Error,
    },
}

/// A share.
pub(super) struct Share {
    pub(super) name: String,
    pub(super) kind: ShareKind,
    /// None after a restore, until the daemon has attached the directory again.
    root: Option<OwnedFd>,
    /// False once detached: the share stays for the nodes that are known, invisible.
    pub(super) attached: bool,
    pub(super) backend: &'static dyn Backend,
}

impl Share {
    pub(super) fn new(name: String, kind: ShareKind, root: Option<OwnedFd>, attached: bool) -> Self {
        let backend: &'static dyn Backend = match kind {
            ShareKind::Layer => &Layer,
        };
        Self { name, kind, root, attached, backend }
    }

    /// What [`Server::attach`] would take to attach it again.
    pub(super) fn into_parts(self) -> Option<(String, OwnedFd, ShareKind)> {
        let Self { name, kind, root, attached, .. } = self;
        root.filter(|_| attached).map(|root| (name, root, kind))
    }
}

impl Server {
    /// Adds a share, or gives one that was restored its directory.
    pub(super) fn attach(
        &mut self,
        name: &str,
        root: OwnedFd,
        kind: ShareKind,
    ) -> std::result::Result<(), ShareError> {
        if check_name(name.as_bytes()).is_err() {
            return Err(ShareError::Name(name.to_owned()));
        }
        let awaiting = self.share_named(name);
        if let Some(id) = awaiting
            && self.shares.get(&id).is_some_and(|share| share.root.is_some() || share.kind != kind)
        {
            return Err(ShareError::Exists(name.to_owned()));
        }
        if awaiting.is_none() && self.shares.len() >= MAX_SHARES {
            return Err(ShareError::TooMany);
        }
        let share = Share::new(name.to_owned(), kind, Some(root), true);
        open_in(&share, b".")
            .and_then(|file| share.backend.stat(file.as_fd()))
            .map_err(|errno| ShareError::Unusable { name: name.to_owned(), kind, source: errno.into() })?;
        self.changed = now();
        match awaiting {
            Some(id) => {
                self.shares.insert(id, share);
                self.meet_again(id);
                self.map_again(id).map_err(|errno| ShareError::Unusable {
                    name: name.to_owned(),
                    kind,
                    source: errno.into(),
                })?;
            }
            None => {
                self.last_share += 1;
                self.shares.insert(self.last_share, share);
            }
        }
        Ok(())
    }

    /// Hides a share: no name in it is found from now on, the nodes that the guest knows stay usable.
    pub(super) fn detach(&mut self, name: &str) -> std::result::Result<(), ShareError> {
        let id = self.share_named(name).ok_or_else(|| ShareError::NotFound(name.to_owned()))?;
        if let Some(share) = self.shares.get_mut(&id) {
            share.attached = false;
        }
        self.changed = now();
        self.drop_if_unused(id);
        Ok(())
    }

    pub(super) fn share_named(&self, name: &str) -> Option<ShareId> {
        let mut shares = self.shares.iter();
        shares.find(|(_, share)| share.attached && share.name == name).map(|(&id, _)| id)
    }

    pub(super) fn drop_if_unused(&mut self, id: ShareId) {
        let detached = self.shares.get(&id).is_some_and(|share| !share.attached);
        if detached && !self.inodes.knows_share(id) {
            self.shares.remove(&id);
        }
    }

    /// Finds the nodes of a restored share in the directory it has been given: the inode numbers may be
    /// others. What is not there is stale from now on.
    fn meet_again(&mut self, id: ShareId) {
        for node in self.inodes.of_share(id) {
            let (Some(share), Some(path)) = (self.shares.get(&id), self.inodes.path(node)) else { continue };
            let key = open_in(share, &path).and_then(|file| Ok(rustix::fs::fstat(&file)?.st_ino));
            self.inodes.set_key(node, key.unwrap_or(0));
        }
    }
}

/// Opens a path of a share.
pub(super) fn open_in(share: &Share, path: &[u8]) -> Result<OwnedFd> {
    let root = share.root.as_ref().ok_or(Errno::STALE)?;
    if path == b"." {
        return open_beneath(root.as_fd(), b".", OFlags::RDONLY | OFlags::DIRECTORY).map_err(|_| Errno::IO);
    }
    share.backend.open(root.as_fd(), path)
}
