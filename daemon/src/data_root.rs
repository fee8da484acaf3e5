//! The data root and the exec root are one daemon's at a time, and the former nobody else's to look into.

use std::{
    fs::{DirBuilder, File, OpenOptions, Permissions},
    io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use rustix::fs::FlockOperation;

use crate::layout::Layout;

/// A data root and an exec root that are this daemon's for as long as this lives.
#[derive(Debug)]
pub struct DataRoot {
    _locks: [File; 2],
}

/// Why a data root cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum DataRootError {
    /// Two daemons on one data root would each take the other's containers for dead, on one exec root each
    /// other's microVMs for nobody's.
    #[error("the directory {0} is in use by another daemon")]
    InUse(PathBuf),
    /// The directory or its lock could not be made.
    #[error("the directory {path} cannot be used: {source}")]
    Io {
        /// The directory.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

impl DataRoot {
    /// Makes the directories where they are missing, shuts others out of the data root, and locks both. The
    /// locks go with the process, however that ends.
    ///
    /// # Errors
    /// [`DataRootError`].
    pub fn open(layout: &Layout) -> Result<Self, DataRootError> {
        let data = claim(&layout.data_root, layout.lock(), 0o700)?;
        let private = std::fs::set_permissions(&layout.data_root, Permissions::from_mode(0o700));
        private.map_err(|source| DataRootError::Io { path: layout.data_root.clone(), source })?;
        let exec = claim(&layout.exec_root, layout.exec_root.join("lock"), 0o711)?;
        Ok(Self { _locks: [data, exec] })
    }
}

fn claim(path: &Path, lock: PathBuf, mode: u32) -> Result<File, DataRootError> {
    let failed = |source| DataRootError::Io { path: path.to_owned(), source };
    DirBuilder::new().recursive(true).mode(mode).create(path).map_err(failed)?;
    let mut options = OpenOptions::new();
    let lock = options.create(true).truncate(false).write(true).mode(0o600).open(lock).map_err(failed)?;
    match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(lock),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(DataRootError::InUse(path.to_owned())),
        Err(errno) => Err(failed(errno.into())),
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
        for shared in [
            Layout { data_root: parent.path().join("other"), ..layout.clone() },
            Layout { exec_root: parent.path().join("other-run"), ..layout.clone() },
        ] {
            assert!(matches!(DataRoot::open(&shared), Err(DataRootError::InUse(_))));
        }
        drop(first);
        DataRoot::open(&layout).unwrap();
    }
}
