//! Files in the window (virtio 1.3, 5.11.6.4): SETUPMAPPING and REMOVEMAPPING.
//!
//! ```text
//!   guest: a page of a file is touched ─▶ SETUPMAPPING(node, where in the file, where in the window)
//!          the range is used for another file, or the file forgotten ─▶ REMOVEMAPPING(where in the window)
//! ```
//!
//! Linux maps files in ranges of 2 MiB, each of which takes as much of the window, however small the file is. So the
//! server names the files that are worth it ([`wire::ATTR_DAX`]); others are read, as without a window.
//!
//! What is mapped is saved by node. A restored window is empty, and is filled share by share, as they get their
//! directories; a share whose mapped files are not there is refused, for the guest would find zeros in their place.

use std::{collections::BTreeMap, os::fd::AsFd, sync::Arc};

use rustix::io::Errno;

use super::{
    backend::{Result, S_IFMT, S_IFREG},
    inodes::ShareId,
    server::Server,
    wire::{self, Attr},
};
use crate::window::{GRANULE, Window};

/// The smallest file that is mapped, in bytes: one that is smaller costs the guest less to read than a range costs.
pub(super) const SMALLEST: u64 = 256 << 10;

/// The alignment of mappings as a power of two.
pub(super) const ALIGNMENT: u16 = GRANULE.trailing_zeros() as u16;

/// The window of a device, where it has one, and what is in it.
#[derive(Debug, Default)]
pub(super) struct Mappings {
    window: Option<Arc<Window>>,
    /// By the place in the window: a node, and the place in its file; both in bytes, granules' beginnings.
    mapped: BTreeMap<u64, (u64, u64)>,
}

impl Mappings {
    pub(super) fn set_window(&mut self, window: Arc<Window>) {
        self.window = Some(window);
    }

    pub(super) fn window(&self) -> Option<&Arc<Window>> {
        self.window.as_ref()
    }

    /// What is mapped: place in the window, node, place in the file.
    pub(super) fn list(&self) -> Vec<(u64, u64, u64)> {
        self.mapped.iter().map(|(&at, &(node, offset))| (at, node, offset)).collect()
    }

    /// Lets go of everything.
    pub(super) fn clear(&mut self) {
        if self.mapped.is_empty() {
            return;
        }
        self.mapped.clear();
        if let Some(window) = &self.window {
            // Fails only where the process has no more mappings, which this makes fewer.
            let _ = window.clear_all();
        }
    }

    /// The flag for a file with these attributes.
    pub(super) fn flags(&self, attr: &Attr) -> u32 {
        let worth_it = attr.mode & S_IFMT == S_IFREG && attr.size >= SMALLEST;
        if worth_it && self.window.is_some() { wire::ATTR_DAX } else { 0 }
    }
}

impl Server {
    /// SETUPMAPPING.
    pub(super) fn map(&mut self, node: u64, request: &wire::SetupmappingIn) -> Result<()> {
        let window = Arc::clone(self.mappings.window().ok_or(Errno::NOSYS)?);
        if request.flags & wire::SETUPMAPPING_WRITE != 0 {
            return Err(Errno::ROFS);
        }
        let (at, offset) = (request.moffset, request.foffset);
        granules(at, request.len, window.size())?;
        // One granule at a time, as Linux does it: more would be read under the device's lock for as long as a guest
        // likes.
        if request.len != GRANULE || !offset.is_multiple_of(GRANULE) {
            return Err(Errno::INVAL);
        }
        let file = self.regular_file(node)?;
        let size = file_size(file.as_fd())?;
        if offset >= size {
            return Err(Errno::INVAL);
        }
        self.mappings.mapped.remove(&at);
        window.map(at, file.as_fd(), offset, size)?;
        self.mappings.mapped.insert(at, (node, offset));
        Ok(())
    }

    /// REMOVEMAPPING, of one range.
    pub(super) fn unmap(&mut self, request: &wire::RemovemappingOne) -> Result<()> {
        let window = Arc::clone(self.mappings.window().ok_or(Errno::NOSYS)?);
        granules(request.moffset, request.len, window.size())?;
        let range = request.moffset..request.moffset + request.len;
        let gone: Vec<u64> = self.mappings.mapped.range(range).map(|(&at, _)| at).collect();
        for at in gone {
            self.mappings.mapped.remove(&at);
            window.clear(at)?;
        }
        Ok(())
    }

    /// Takes over what was mapped when the device was saved; it is mapped when the shares come. False where that
    /// contradicts the nodes or the window.
    pub(super) fn remember_mappings(&mut self, saved: Vec<(u64, u64, u64)>) -> bool {
        let size = self.mappings.window().map_or(0, |window| window.size());
        let possible = |&(at, node, offset): &(u64, u64, u64)| {
            granules(at, GRANULE, size).is_ok()
                && offset.is_multiple_of(GRANULE)
                && self.inodes.get(node).is_none_or(|node| node.kind == S_IFREG)
        };
        if !saved.iter().all(possible) {
            return false;
        }
        self.mappings.mapped = saved.into_iter().map(|(at, node, offset)| (at, (node, offset))).collect();
        true
    }

    /// Maps what a restored share had in the window.
    pub(super) fn map_again(&mut self, share: ShareId) -> Result<()> {
        let Some(window) = self.mappings.window().cloned() else { return Ok(()) };
        for (at, node, offset) in self.mappings.list() {
            if self.inodes.get(node).is_some_and(|node| node.share == share) {
                let file = self.regular_file(node)?;
                window.map(at, file.as_fd(), offset, file_size(file.as_fd())?)?;
            }
        }
        Ok(())
    }
}

/// Whether a range is one of granules of the window.
fn granules(start: u64, length: u64, size: u64) -> Result<()> {
    let whole = length > 0 && start.is_multiple_of(GRANULE) && length.is_multiple_of(GRANULE);
    let inside = start.checked_add(length).is_some_and(|end| end <= size);
    if whole && inside { Ok(()) } else { Err(Errno::INVAL) }
}

fn file_size(file: std::os::fd::BorrowedFd<'_>) -> Result<u64> {
    let stat = rustix::fs::fstat(file).map_err(|_| Errno::IO)?;
    u64::try_from(stat.st_size).map_err(|_| Errno::IO)
}
