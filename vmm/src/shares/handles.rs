//! Open files and directories, by the handles that the guest has of them.

use std::{
    collections::HashMap,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, PoisonError},
};

use rustix::io::Errno;

use super::Result;

/// The most files that a guest may have open.
const MOST: usize = 24 * 1024;

/// An open file.
#[derive(Debug)]
pub(super) struct Handle {
    /// Of which node.
    pub(super) node: u64,
    /// What it is.
    pub(super) open: Open,
}

/// What is open.
#[derive(Debug)]
pub(super) enum Open {
    /// A regular file.
    File(OwnedFd),
    /// A directory; its position is moved by who holds the lock.
    Directory(Mutex<OwnedFd>),
    /// The directory that lists the shares.
    Root,
}

impl Handle {
    /// The file.
    ///
    /// # Errors
    /// It is a directory.
    pub(super) fn file(&self) -> Result<&OwnedFd> {
        match &self.open {
            Open::File(file) => Ok(file),
            Open::Directory(_) | Open::Root => Err(Errno::ISDIR),
        }
    }
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Handles(Mutex<Table>);

#[derive(Debug, Default)]
struct Table {
    open: HashMap<u64, Arc<Handle>>,
    last: u64,
}

impl Handles {
    /// Adds one and gives its number. Numbers are not used again.
    pub(super) fn insert(&self, node: u64, open: Open) -> Result<u64> {
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if table.open.len() >= MOST {
            return Err(Errno::NFILE);
        }
        table.last += 1;
        let number = table.last;
        table.open.insert(number, Arc::new(Handle { node, open }));
        Ok(number)
    }

    /// The handle of that number, which must be of the node.
    pub(super) fn get(&self, number: u64, node: u64) -> Result<Arc<Handle>> {
        let table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        table.open.get(&number).filter(|handle| handle.node == node).cloned().ok_or(Errno::BADF)
    }

    /// Whether the node is open. Looks at all: for what is rarely asked.
    pub(super) fn has(&self, node: u64) -> bool {
        let table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        table.open.values().any(|handle| handle.node == node)
    }

    /// Closes one. What is being done with it comes to its end first.
    pub(super) fn remove(&self, number: u64) {
        let removed = self.0.lock().unwrap_or_else(PoisonError::into_inner).open.remove(&number);
        // Outside of the lock: closing may take its time.
        drop(removed);
    }

    /// Closes all.
    pub(super) fn clear(&self) {
        let all = std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner).open);
        drop(all);
    }
}
