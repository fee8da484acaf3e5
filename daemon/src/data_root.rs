//! The data root is one daemon's at a time, and nobody else's to look into.

use std::{
    fs::{DirBuilder, File, OpenOptions, Permissions},
    io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::PathBuf,
};

use rustix::fs::FlockOperation;

use crate::layout::Layout;

/// A data root that is this daemon's for as long as this lives.
#[derive(Debug)]
pub struct DataRoot {
    _lock: File,
}

/// Why a data root cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum DataRootError {
    /// Two daemons on one data root would each take the other's containers for dead.
    #[error("the data root {0} is in use by another daemon")]
    InUse(PathBuf),
    /// The directory or its lock could not be made.
    #[error("the data root {path} cannot be used: {source}")]
    Io {
        /// The directory.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

impl DataRoot {
    /// Makes the directory where it is missing, shuts others out of it, and locks it. The lock goes with the
    /// process, however that ends.
    ///
    /// # Errors
    /// [`DataRootError`].
    pub fn open(layout: &Layout) -> Result<Self, DataRootError> {
        let path = &layout.data_root;
        let failed = |source| DataRootError::Io { path: path.clone(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed)?;
        std::fs::set_permissions(path, Permissions::from_mode(0o700)).map_err(failed)?;
        let mut options = OpenOptions::new();
        let lock = options
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(layout.lock())
            .map_err(failed)?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self { _lock: lock }),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(DataRootError::InUse(path.clone())),
            Err(errno) => Err(failed(errno.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_data_root_has_one_daemon_and_is_shut_to_others() {
        let parent = tempfile::tempdir().unwrap();
        let layout = Layout { data_root: parent.path().join("a/b"), exec_root: parent.path().join("run") };
        std::fs::create_dir_all(&layout.data_root).unwrap();
        let first = DataRoot::open(&layout).unwrap();
        assert_eq!(std::fs::metadata(&layout.data_root).unwrap().permissions().mode() & 0o777, 0o700);
        assert!(matches!(DataRoot::open(&layout), Err(DataRootError::InUse(_))));
        drop(first);
        DataRoot::open(&layout).unwrap();
    }
}
