//! Open files, a bounded number of them: whatever is not among the most recently used is closed and opened
//! again by its path when it is needed.

use std::{
    collections::{BTreeMap, HashMap},
    os::fd::OwnedFd,
    sync::Arc,
};

/// The most files kept open, whatever the process's limit.
const MOST: usize = 4096;
/// The fewest, however low the limit is.
const FEWEST: usize = 16;

/// Open files by node id, the least recently used closed first.
#[derive(Debug)]
pub(crate) struct OpenFiles {
    capacity: usize,
    files: HashMap<u64, (Arc<OwnedFd>, u64)>,
    by_use: BTreeMap<u64, u64>,
    clock: u64,
}

impl OpenFiles {
    /// Room for a quarter of the file descriptors that the process may have, within bounds: other devices
    /// and shares need some too.
    pub(crate) fn within_limit() -> Self {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let quarter = limit.map_or(MOST, |limit| usize::try_from(limit / 4).unwrap_or(MOST));
        Self::new(quarter.clamp(FEWEST, MOST))
    }

    pub(crate) fn new(capacity: usize) -> Self {
        Self { capacity, files: HashMap::new(), by_use: BTreeMap::new(), clock: 0 }
    }

    /// The node's file if it is open.
    pub(crate) fn get(&mut self, node: u64) -> Option<Arc<OwnedFd>> {
        let (file, used) = self.files.get_mut(&node)?;
        self.by_use.remove(used);
        self.clock += 1;
        *used = self.clock;
        self.by_use.insert(self.clock, node);
        Some(Arc::clone(file))
    }

    /// Keeps a file open for the node.
    pub(crate) fn insert(&mut self, node: u64, file: Arc<OwnedFd>) {
        self.remove(node);
        while self.files.len() >= self.capacity
            && let Some((_, oldest)) = self.by_use.pop_first()
        {
            self.files.remove(&oldest);
        }
        self.clock += 1;
        self.files.insert(node, (file, self.clock));
        self.by_use.insert(self.clock, node);
    }

    /// Closes the node's file.
    pub(crate) fn remove(&mut self, node: u64) {
        if let Some((_, used)) = self.files.remove(&node) {
            self.by_use.remove(&used);
        }
    }

    /// Closes all.
    pub(crate) fn clear(&mut self) {
        self.files.clear();
        self.by_use.clear();
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        assert_eq!(self.files.len(), self.by_use.len());
        self.files.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_recently_used_goes_first() {
        let file = Arc::new(OwnedFd::from(std::fs::File::open("/").unwrap()));
        let mut files = OpenFiles::new(2);
        files.insert(1, Arc::clone(&file));
        files.insert(2, Arc::clone(&file));
        assert!(files.get(1).is_some());
        files.insert(3, Arc::clone(&file));
        assert!(files.get(2).is_none() && files.get(1).is_some() && files.get(3).is_some());
        files.insert(3, Arc::clone(&file));
        assert_eq!(files.len(), 2);
        files.remove(1);
        files.remove(1);
        assert_eq!(files.len(), 1);
        files.clear();
        assert_eq!(files.len(), 0);
    }
}
