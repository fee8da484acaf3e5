//! Directory listings: the host's entries in, FUSE's out.

use std::{mem::MaybeUninit, os::fd::BorrowedFd};

use rustix::{fs::RawDir, io::Errno};

use super::{
    backend::Result,
    server::HostEntry,
    wire::{Dirent, EntryOut, Wire},
};

/// The most bytes of entries taken from the host at a time.
const MOST: usize = 32 << 10;
/// Room for at least one entry of the longest name.
const LEAST: usize = 512;

/// A reply to READDIR or READDIRPLUS that is being put together.
pub(crate) struct Listing {
    bytes: Vec<u8>,
    room: usize,
    plus: bool,
}

impl Listing {
    /// A listing of at most `room` bytes, with an [`EntryOut`] before each entry when `plus` is set.
    pub(crate) fn new(room: usize, plus: bool) -> Self {
        Self { bytes: Vec::new(), room, plus }
    }

    /// Whether entries are to be looked up.
    pub(crate) fn wants_entries(&self) -> bool {
        self.plus
    }

    /// Whether an entry of that name still has room. Asked before it is looked up: a look-up that the guest
    /// does not hear of would never be forgotten.
    pub(crate) fn has_room(&self, name: &[u8]) -> bool {
        let fixed = if self.plus { EntryOut::SIZE + Dirent::SIZE } else { Dirent::SIZE };
        self.bytes.len() + (fixed + name.len()).next_multiple_of(8) <= self.room
    }

    /// Adds an entry; false when it has no room. `mode` holds its kind, or 0 when that is not known.
    pub(crate) fn add(
        &mut self,
        entry: Option<EntryOut>,
        ino: u64,
        cookie: u64,
        name: &[u8],
        mode: u32,
    ) -> bool {
        let Ok(namelen) = u32::try_from(name.len()) else { return false };
        if !self.has_room(name) {
            return false;
        }
        if self.plus {
            // With node id 0 the kernel takes name and kind alone.
            entry.unwrap_or_default().put(&mut self.bytes);
        }
        // DT_* are the kind's bits of a mode, shifted (`fs_types.h`).
        Dirent { ino, off: cookie, namelen, kind: mode >> 12 }.put(&mut self.bytes);
        self.bytes.extend(name);
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
        true
    }

    pub(crate) fn finish(self) -> Vec<u8> {
        self.bytes
    }
}

/// Hands out a directory's entries from its present position on, until `each` answers false or `room` bytes
/// of the host's form have been seen (whose entries are smaller than FUSE's, so that these fill a reply).
pub(crate) fn for_each(
    dir: BorrowedFd<'_>,
    room: usize,
    mut each: impl FnMut(HostEntry<'_>) -> bool,
) -> Result<()> {
    let mut buffer = vec![MaybeUninit::uninit(); room.clamp(LEAST, MOST)];
    let mut entries = RawDir::new(dir, &mut buffer);
    while let Some(entry) = entries.next() {
        let entry = entry.map_err(|_| Errno::IO)?;
        let go_on = each(HostEntry {
            name: entry.file_name().to_bytes(),
            inode: entry.ino(),
            cookie: entry.next_entry_cookie(),
            kind: entry.file_type(),
        });
        if !go_on || entries.is_buffer_empty() {
            break;
        }
    }
    Ok(())
}
