//! The store's directory: what is in it, and how layers come and go.

use std::{
    fs::{self, DirBuilder, File},
    io::{self, Read},
    os::{fd::OwnedFd, unix::fs::DirBuilderExt},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};

use super::{
    DiffId, LayerError, Limits,
    split::LayerArchive,
    unpack::{self, Places, UnpackError, Unpacked},
};

/// What is known of an unpacked layer; stored beside its tree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerInfo {
    /// The layer's name.
    pub diff_id: DiffId,
    /// Bytes of file content, as Docker counts a layer's size: each entry's, hard links not again.
    pub size: u64,
    /// Entries of the archive.
    pub entries: u64,
    /// Length of the uncompressed archive in bytes.
    pub stream_bytes: u64,
}

/// A directory of unpacked layers. One process owns it; threads share it freely.
#[derive(Debug)]
pub struct LayerStore {
    dir: PathBuf,
    next_temporary: AtomicU64,
}

const TMP: &str = "tmp";
const ROOT: &str = "root";
const TRASH: &str = "trash";
const SPLIT: &str = "archive.split";
const KEPT: &str = "kept";
const INFO: &str = "info.json";

impl LayerStore {
    /// Opens the store in `dir`, makes it when it is not there (mode 0700: a layer's files are readable by
    /// all, as each VMM has a user of its own, so the way to them is not), and deletes what an earlier process
    /// left unfinished.
    ///
    /// # Errors
    /// The directory cannot be made, read or cleaned.
    pub fn open(dir: impl Into<PathBuf>) -> Result<Self, LayerError> {
        let store = Self { dir: dir.into(), next_temporary: AtomicU64::new(0) };
        let tmp = store.dir.join(TMP);
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&tmp)
            .map_err(|error| store.failed("making the directory", error))?;
        let cleaning = |error| store.failed("removing what was left unfinished", error);
        for entry in fs::read_dir(&tmp).map_err(cleaning)? {
            remove_tree(&entry.map_err(cleaning)?.path()).map_err(cleaning)?;
        }
        Ok(store)
    }

    /// Unpacks a layer whose diff id is known. When it is there already, `reader` is not read at all. Several
    /// calls for one layer may run at a time: one wins, all succeed.
    ///
    /// `reader` gives the *uncompressed* archive, see [`super::decompress`]. The call blocks until the layer
    /// is on disk.
    ///
    /// # Errors
    /// See [`LayerError`]; a failed unpack leaves nothing.
    pub fn unpack(
        &self,
        diff_id: &DiffId,
        reader: impl Read,
        limits: &Limits,
    ) -> Result<LayerInfo, LayerError> {
        if self.contains(diff_id) {
            return self.info(diff_id);
        }
        self.unpack_stream(Some(diff_id), reader, limits)
    }

    /// Unpacks a layer whose diff id is not known beforehand (`docker load` of old archives,
    /// `docker import`); the answer names it.
    ///
    /// # Errors
    /// As for [`LayerStore::unpack`].
    pub fn import(&self, reader: impl Read, limits: &Limits) -> Result<LayerInfo, LayerError> {
        self.unpack_stream(None, reader, limits)
    }

    /// Whether the layer is here, whole.
    #[must_use]
    pub fn contains(&self, diff_id: &DiffId) -> bool {
        self.layer_dir(diff_id).join(INFO).is_file()
    }

    /// What is known of a layer.
    ///
    /// # Errors
    /// [`LayerError::NotFound`], or its record cannot be read.
    pub fn info(&self, diff_id: &DiffId) -> Result<LayerInfo, LayerError> {
        let bytes = fs::read(self.layer_dir(diff_id).join(INFO)).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => LayerError::NotFound(*diff_id),
            _ => self.failed(&format!("reading the record of {diff_id}"), error),
        })?;
        serde_json::from_slice(&bytes)
            .map_err(|error| self.failed(&format!("reading the record of {diff_id}"), error.into()))
    }

    /// The directory that holds the layer's tree, whether or not it is there.
    #[must_use]
    pub fn path(&self, diff_id: &DiffId) -> PathBuf {
        self.layer_dir(diff_id).join(ROOT)
    }

    /// The layer's tree as an `O_PATH` directory, to be handed to a VMM
    /// (`bulkhead_vmm_api::Request::AttachShare`).
    ///
    /// # Errors
    /// [`LayerError::NotFound`], or it cannot be opened.
    pub fn open_root(&self, diff_id: &DiffId) -> Result<OwnedFd, LayerError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::open(self.path(diff_id), flags, Mode::empty()).map_err(|errno| match errno {
            rustix::io::Errno::NOENT => LayerError::NotFound(*diff_id),
            errno => self.failed(&format!("opening {diff_id}"), errno.into()),
        })
    }

    /// The layer's archive, uncompressed, as it came.
    ///
    /// # Errors
    /// [`LayerError::NotFound`], [`LayerError::NoArchive`], or it cannot be opened.
    pub fn archive(&self, diff_id: &DiffId) -> Result<LayerArchive, LayerError> {
        let failed = |error| self.failed(&format!("reading the archive of {diff_id}"), error);
        let dir = self.layer_dir(diff_id);
        let split = match File::open(dir.join(SPLIT)) {
            Ok(split) => split,
            Err(error) if error.kind() == io::ErrorKind::NotFound && self.contains(diff_id) => {
                return Err(LayerError::NoArchive(*diff_id));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(LayerError::NotFound(*diff_id));
            }
            Err(error) => return Err(failed(error)),
        };
        LayerArchive::open(split, self.open_root(diff_id)?, &dir.join(KEPT), *diff_id).map_err(failed)
    }

    /// Removes a layer. Whoever has it open (a running VMM) keeps a directory that empties; so the caller
    /// removes only what no container uses. Removing what is not there is no error.
    ///
    /// # Errors
    /// The store's filesystem failed. The layer is gone from the store in any case but that of a failed
    /// rename.
    pub fn remove(&self, diff_id: &DiffId) -> Result<(), LayerError> {
        let doomed = self.temporary();
        match fs::rename(self.layer_dir(diff_id), &doomed) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(self.failed(&format!("removing {diff_id}"), error)),
        }
        remove_tree(&doomed).map_err(|error| self.failed(&format!("removing {diff_id}"), error))
    }

    /// Every layer, in the order of their ids.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn list(&self) -> Result<Vec<DiffId>, LayerError> {
        let failed = |error| self.failed("listing", error);
        let mut layers = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            layers.extend(name.to_str().and_then(DiffId::from_hex).filter(|id| self.contains(id)));
        }
        layers.sort_unstable();
        Ok(layers)
    }

    /// The sum of [`LayerInfo::size`] of every layer.
    ///
    /// # Errors
    /// The directory or a record cannot be read.
    pub fn size(&self) -> Result<u64, LayerError> {
        self.list()?.iter().try_fold(0_u64, |sum, id| match self.info(id) {
            Ok(info) => Ok(sum.saturating_add(info.size)),
            // Removed between the listing and now.
            Err(LayerError::NotFound(_)) => Ok(sum),
            Err(error) => Err(error),
        })
    }

    fn unpack_stream(
        &self,
        expected: Option<&DiffId>,
        reader: impl Read,
        limits: &Limits,
    ) -> Result<LayerInfo, LayerError> {
        let temporary = Temporary(self.temporary());
        let within = |name: &str| temporary.0.join(name);
        let places =
            Places { root: within(ROOT), trash: within(TRASH), split: within(SPLIT), kept: within(KEPT) };
        for dir in [&temporary.0, &places.root, &places.trash] {
            fs::create_dir(dir).map_err(|error| self.failed("making a directory", error))?;
        }
        let unpacked = unpack::unpack(reader, limits, &places).map_err(|error| match error {
            UnpackError::Layer(LayerError::Store { action, source, .. }) => self.failed(&action, source),
            UnpackError::Layer(error) => error,
            UnpackError::Store(action, error) => self.failed(&action, error),
        })?;
        let Unpacked { diff_id, size, entries, stream_bytes } = unpacked;
        if let Some(expected) = expected.filter(|expected| **expected != diff_id) {
            return Err(LayerError::WrongDigest { expected: *expected, actual: diff_id });
        }
        let info = LayerInfo { diff_id, size, entries, stream_bytes };
        self.publish(&temporary.0, &info)
            .map_err(|error| self.failed(&format!("putting {diff_id} into place"), error))?;
        Ok(info)
    }

    /// Makes an unpacked layer durable and visible, unless another unpack of it was faster.
    fn publish(&self, temporary: &Path, info: &LayerInfo) -> io::Result<()> {
        fs::write(temporary.join(INFO), serde_json::to_vec(info)?)?;
        let layer = self.layer_dir(&info.diff_id);
        rustix::fs::syncfs(File::open(temporary)?)?;
        match fs::rename(temporary, &layer) {
            Ok(()) => File::open(&self.dir)?.sync_all(),
            Err(_) if self.contains(&info.diff_id) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn layer_dir(&self, diff_id: &DiffId) -> PathBuf {
        self.dir.join(diff_id.hex())
    }

    fn temporary(&self) -> PathBuf {
        let number = self.next_temporary.fetch_add(1, Ordering::Relaxed);
        self.dir.join(TMP).join(number.to_string())
    }

    fn failed(&self, action: &str, source: io::Error) -> LayerError {
        let full =
            [rustix::io::Errno::NOSPC, rustix::io::Errno::DQUOT].map(|errno| Some(errno.raw_os_error()));
        if full.contains(&source.raw_os_error()) {
            return LayerError::NoSpace { path: self.dir.clone(), source };
        }
        LayerError::Store { path: self.dir.clone(), action: action.to_owned(), source }
    }
}

/// A directory below `tmp` that goes when this is dropped, unless it was renamed away.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        // What stays is removed when the store is opened the next time.
        let _ = remove_tree(&self.0);
    }
}

fn remove_tree(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layers::LayerErrorKind;

    #[test]
    fn a_full_filesystem_is_reported_as_such() {
        let dir = tempfile::tempdir().unwrap();
        let store = LayerStore::open(dir.path()).unwrap();
        for errno in [rustix::io::Errno::NOSPC, rustix::io::Errno::DQUOT] {
            assert_eq!(store.failed("writing", errno.into()).kind(), LayerErrorKind::NoSpace);
        }
        assert_eq!(store.failed("writing", rustix::io::Errno::IO.into()).kind(), LayerErrorKind::Store);
    }
}
