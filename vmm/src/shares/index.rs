//! SQLite's write-ahead log, by one kernel at a time.
//!
//! Its index (`NAME-shm`) is memory that processes share by mapping the file. A guest's map is the guest's page cache,
//! so host and guest, or two guests, would each see an index of their own, and overwrite each other's log. Every
//! process that uses the index holds a shared lock of one byte of it, by which SQLite knows whether it is the first.
//! Here that lock is the whole guest's, and exclusive:
//!
//! ```text
//!   guest: process ─ shared ─┐
//!          process ─ shared ─┴─▶ Index ── exclusive, on the host's file ──▶ others: SQLITE_BUSY
//! ```
//!
//! So processes of one guest have the log together, those of the host too, and whoever comes second from elsewhere is
//! told that the database is locked. All other locks, and databases without such a log, are the same for everybody.

use std::{
    collections::HashMap,
    os::fd::OwnedFd,
    sync::{Mutex, MutexGuard, PoisonError},
};

use rustix::io::Errno;

use super::{Result, locks};
use crate::devices::virtio::fs::wire::{FileLock, LkIn};

/// How the file's name ends.
pub(super) const SUFFIX: &[u8] = b"-shm";

/// The byte: `UNIX_SHM_DMS` of SQLite's `os_unix.c`, part of its file format.
const BYTE: u64 = 128;

/// The most files, and processes that have one open.
const MOST: usize = 1024;

const F_RDLCK: u32 = libc::F_RDLCK as u32;
const F_WRLCK: u32 = libc::F_WRLCK as u32;
const F_UNLCK: u32 = libc::F_UNLCK as u32;

/// Whether it is the lock by which SQLite tells who has the index.
pub(super) fn is_meant(lock: &FileLock) -> bool {
    lock.start == BYTE && lock.end == BYTE
}

/// Whether an unlocking ends that lock among others.
pub(super) fn is_covered(lock: &FileLock) -> bool {
    lock.kind == F_UNLCK && lock.start <= BYTE && lock.end >= BYTE
}

/// The indexes that the guest has, by node.
#[derive(Debug, Default)]
pub(super) struct Indexes(Mutex<HashMap<u64, Index>>);

#[derive(Debug)]
struct Index {
    /// Holds the host's lock.
    _file: OwnedFd,
    holders: Vec<Holder>,
}

#[derive(Debug)]
struct Holder {
    owner: u64,
    handle: u64,
    kind: u32,
}

impl Indexes {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Index>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets an owner's lock; EAGAIN where another's is in the way, in the guest or elsewhere.
    pub(super) fn set(&self, node: u64, asked: &LkIn, open: impl FnOnce() -> Result<OwnedFd>) -> Result<()> {
        let (owner, handle, kind) = (asked.owner, asked.fh, asked.lock.kind);
        match kind {
            F_UNLCK => {
                self.closed(node, owner);
                return Ok(());
            }
            F_RDLCK | F_WRLCK => {}
            _ => return Err(Errno::INVAL),
        }
        let mut indexes = self.lock();
        if let Some(index) = indexes.get_mut(&node) {
            if index.conflict(owner, kind).is_some() {
                return Err(Errno::AGAIN);
            }
            if index.holders.len() >= MOST {
                return Err(Errno::NOLCK);
            }
            index.holders.retain(|holder| holder.owner != owner);
            index.holders.push(Holder { owner, handle, kind });
            return Ok(());
        }
        if indexes.len() >= MOST {
            return Err(Errno::NOLCK);
        }
        let file = open()?;
        locks::set(&file, &FileLock { kind: F_WRLCK, ..asked.lock })?;
        indexes.insert(node, Index { _file: file, holders: vec![Holder { owner, handle, kind }] });
        Ok(())
    }

    /// Which lock is in the way of one.
    pub(super) fn get(
        &self,
        node: u64,
        asked: &LkIn,
        open: impl FnOnce() -> Result<OwnedFd>,
    ) -> Result<FileLock> {
        if let Some(index) = self.lock().get(&node) {
            let kind = index.conflict(asked.owner, asked.lock.kind).unwrap_or(F_UNLCK);
            return Ok(FileLock { kind, pid: 0, ..asked.lock });
        }
        locks::get(&open()?, &asked.lock)
    }

    /// An owner has closed the file.
    pub(super) fn closed(&self, node: u64, owner: u64) {
        self.retain(node, |holder| holder.owner != owner);
    }

    /// A handle is released for good.
    pub(super) fn released(&self, node: u64, handle: u64) {
        self.retain(node, |holder| holder.handle != handle);
    }

    /// Ends all.
    pub(super) fn clear(&self) {
        self.lock().clear();
    }

    fn retain(&self, node: u64, keep: impl FnMut(&Holder) -> bool) {
        let mut indexes = self.lock();
        let Some(index) = indexes.get_mut(&node) else { return };
        index.holders.retain(keep);
        if index.holders.is_empty() {
            indexes.remove(&node);
        }
    }
}

impl Index {
    /// The kind of another owner's lock that excludes one.
    fn conflict(&self, owner: u64, kind: u32) -> Option<u32> {
        let others = self.holders.iter().filter(|holder| holder.owner != owner).map(|holder| holder.kind);
        others.into_iter().find(|&other| other == F_WRLCK || kind == F_WRLCK)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DMS: FileLock = FileLock { start: BYTE, end: BYTE, kind: F_RDLCK, pid: 0 };

    fn open(path: &std::path::Path) -> Result<OwnedFd> {
        Ok(std::fs::File::options().read(true).write(true).open(path).unwrap().into())
    }

    fn asked(owner: u64, kind: u32) -> LkIn {
        LkIn { fh: owner + 100, owner, lock: FileLock { kind, ..DMS }, lk_flags: 0, padding: 0 }
    }

    #[test]
    fn processes_of_one_guest_share_what_excludes_everybody_else() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (ours, theirs) = (Indexes::default(), Indexes::default());
        let open = || open(file.path());
        let host = open().unwrap();
        // As SQLite opens it: nobody there, exclusive, then shared.
        assert_eq!(ours.get(1, &asked(1, F_WRLCK), open).unwrap().kind, F_UNLCK);
        ours.set(1, &asked(1, F_WRLCK), open).unwrap();
        assert_eq!(ours.get(1, &asked(2, F_WRLCK), open).unwrap().kind, F_WRLCK);
        assert_eq!(ours.set(1, &asked(2, F_RDLCK), open), Err(Errno::AGAIN));
        ours.set(1, &asked(1, F_RDLCK), open).unwrap();
        // The second of the guest finds a shared one.
        assert_eq!(ours.get(1, &asked(2, F_WRLCK), open).unwrap().kind, F_RDLCK);
        ours.set(1, &asked(2, F_RDLCK), open).unwrap();
        // Host and other guests find an exclusive one.
        assert_eq!(locks::get(&host, &FileLock { kind: F_RDLCK, ..DMS }).unwrap().kind, F_WRLCK);
        assert_eq!(locks::set(&host, &DMS), Err(Errno::AGAIN));
        assert_eq!(theirs.get(9, &asked(1, F_WRLCK), open).unwrap().kind, F_WRLCK);
        assert_eq!(theirs.set(9, &asked(1, F_RDLCK), open), Err(Errno::AGAIN));
        // Until the last of the guest has gone, by whichever way.
        ours.closed(1, 1);
        assert_eq!(locks::set(&host, &DMS), Err(Errno::AGAIN));
        ours.released(1, 102);
        locks::set(&host, &DMS).unwrap();
        // And the other way round: SQLite sees a shared lock, and does not get its own.
        assert_eq!(ours.get(1, &asked(1, F_WRLCK), open).unwrap().kind, F_RDLCK);
        assert_eq!(ours.set(1, &asked(1, F_RDLCK), open), Err(Errno::AGAIN));
        drop(host);
        ours.set(1, &asked(1, F_RDLCK), open).unwrap();
        ours.set(1, &asked(1, F_UNLCK), open).unwrap();
        theirs.set(9, &asked(1, F_WRLCK), open).unwrap();
        assert_eq!(ours.set(1, &asked(1, 9), open), Err(Errno::INVAL));
    }

    #[test]
    fn only_that_byte_is_meant() {
        assert!(is_meant(&DMS) && !is_meant(&FileLock { end: 129, ..DMS }));
        assert!(is_covered(&FileLock { kind: F_UNLCK, start: 0, end: u64::MAX, pid: 0 }));
        assert!(!is_covered(&FileLock { kind: F_UNLCK, start: 120, end: 127, pid: 0 }));
        assert!(!is_covered(&DMS));
    }
}
