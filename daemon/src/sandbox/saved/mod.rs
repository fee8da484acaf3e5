//! A saved machine: a directory of three files.
//!
//! ```text
//!   Writing ── files given to the VMM ──▶ commit ── digests, 0400, flushed, manifest, rename ──▶ SavedMachine
//!      │ dropped: nothing is left            │
//!      └─ unlink ──▶ OpenMachine             └─ open: manifest, size, time, inode ──▶ OpenMachine
//!                                               verify: the digests too
//! ```
//!
//! | name | what |
//! |---|---|
//! | `state` | vCPUs, interrupt controllers, clock, devices: the VMM's own form |
//! | `memory` | guest memory, sparse |
//! | `manifest.json` | [`Manifest`] |
//!
//! A machine that goes on maps `memory` copy-on-write for its whole life, so the file must never change: it is
//! read-only, root's, and a VMM gets it as a descriptor that cannot write. Removing it is harmless.

mod digest;
mod shape;

use std::{
    fs::{self, DirBuilder, File, OpenOptions, Permissions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

pub use digest::Digests;
use digest::Fingerprint;
use serde::{Deserialize, Serialize};

#[cfg(test)]
pub(crate) use shape::sample;
pub use shape::{MachineSpec, Shape};

const STATE: &str = "state";
const MEMORY: &str = "memory";
const MANIFEST: &str = "manifest.json";

/// Version of [`Manifest`].
const VERSION: u32 = 1;

const MAX_MANIFEST: u64 = 64 << 10;

/// The largest state file: what is in it does not grow with memory.
const MAX_STATE: u64 = 64 << 20;

/// Why a saved machine cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SavedError {
    /// It is not there, or the disk fails.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It is not what was written.
    #[error("it is damaged: {0}")]
    Damaged(String),
    /// Of another version of this daemon.
    #[error("it has version {0} of the form, and this daemon knows version {VERSION}")]
    Version(u32),
}

/// What is in a saved machine's directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    version: u32,
    shape: Shape,
    state: SavedFile,
    memory: SavedFile,
}

/// A file as it was when it was finished.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedFile {
    /// See [`digest::of_sparse`].
    sha256: String,
    fingerprint: Fingerprint,
}

impl SavedFile {
    fn of(file: &File) -> io::Result<Self> {
        let sha256 = digest::of_sparse(file)?;
        Ok(Self { sha256, fingerprint: Fingerprint::of(&file.metadata()?) })
    }
}

/// How thoroughly a saved machine is looked at before it is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Check {
    /// Size, time of change, inode: microseconds. For what was verified since the daemon started.
    Fingerprint,
    /// Every byte.
    Digest,
}

/// A finished saved machine.
#[derive(Debug, Clone)]
pub struct SavedMachine {
    path: PathBuf,
    manifest: Manifest,
}

/// A saved machine's files, open for reading.
#[derive(Debug)]
pub struct OpenMachine {
    pub(super) state: File,
    pub(super) memory: File,
}

impl OpenMachine {
    /// For one more machine.
    ///
    /// # Errors
    /// No more descriptors.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { state: self.state.try_clone()?, memory: self.memory.try_clone()? })
    }
}

impl SavedMachine {
    /// Reads the manifest of the directory `path`.
    ///
    /// # Errors
    /// [`SavedError`].
    pub fn read(path: &Path) -> Result<Self, SavedError> {
        let mut text = Vec::new();
        open_plain(&path.join(MANIFEST))?.take(MAX_MANIFEST).read_to_end(&mut text)?;
        let damaged = |error: serde_json::Error| SavedError::Damaged(format!("its manifest: {error}"));
        let loose: serde_json::Value = serde_json::from_slice(&text).map_err(damaged)?;
        match loose.get("version").and_then(serde_json::Value::as_u64) {
            Some(version) if version == u64::from(VERSION) => {}
            Some(version) => return Err(SavedError::Version(u32::try_from(version).unwrap_or(u32::MAX))),
            None => return Err(SavedError::Damaged("its manifest has no version".into())),
        }
        let manifest = serde_json::from_slice(&text).map_err(damaged)?;
        Ok(Self { path: path.to_owned(), manifest })
    }

    /// What it is made of.
    pub fn shape(&self) -> &Shape {
        &self.manifest.shape
    }

    /// Its directory.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes that it takes on disk.
    pub fn disk_usage(&self) -> u64 {
        let blocks = |name: &str| fs::metadata(self.path.join(name)).map_or(0, |meta| meta.blocks() * 512);
        blocks(STATE).saturating_add(blocks(MEMORY))
    }

    /// Opens its files, if they are what was written. A check of digests blocks for long.
    ///
    /// # Errors
    /// [`SavedError`].
    pub(crate) fn open(&self, check: Check) -> Result<OpenMachine, SavedError> {
        let open = |name: &str, expected: &SavedFile| -> Result<File, SavedError> {
            let file = open_plain(&self.path.join(name))?;
            let damaged = |what: &str| SavedError::Damaged(format!("{name} {what}"));
            let metadata = file.metadata()?;
            match check {
                Check::Fingerprint if Fingerprint::of(&metadata) != expected.fingerprint => {
                    return Err(damaged("was changed or replaced"));
                }
                Check::Fingerprint => {}
                // Elsewhere than where it was made (a copy, a backup) it has another inode.
                Check::Digest => {
                    if metadata.len() != expected.fingerprint.size {
                        return Err(damaged("has another size"));
                    }
                    if digest::of_sparse(&file)? != expected.sha256 {
                        return Err(damaged("has another content"));
                    }
                }
            }
            Ok(file)
        };
        let state = open(STATE, &self.manifest.state)?;
        if state.metadata()?.len() > MAX_STATE {
            return Err(SavedError::Damaged("its state is too large".into()));
        }
        let memory = open(MEMORY, &self.manifest.memory)?;
        Ok(OpenMachine { state, memory })
    }

    /// Removes it from disk. Machines that go on from it are not disturbed.
    ///
    /// # Errors
    /// The disk's.
    pub(crate) fn remove(&self) -> io::Result<()> {
        remove(&self.path)
    }
}

/// Removes a directory; that it is gone already is no error.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

fn open_plain(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "not a regular file"));
    }
    Ok(file)
}

/// A machine that is being saved. Dropped, nothing of it is left.
#[derive(Debug)]
pub(crate) struct Writing {
    path: PathBuf,
    /// For the VMM: empty and writable.
    pub(crate) state: File,
    /// Likewise.
    pub(crate) memory: File,
    finished: bool,
}

impl Writing {
    /// Makes the directory `path`, which must not exist, and the empty files in it.
    ///
    /// # Errors
    /// The disk's.
    pub(crate) fn create(path: PathBuf) -> io::Result<Self> {
        DirBuilder::new().mode(0o700).create(&path)?;
        let create = |name: &str| {
            OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path.join(name))
        };
        let files = create(STATE).and_then(|state| Ok((state, create(MEMORY)?)));
        match files {
            Ok((state, memory)) => Ok(Self { path, state, memory, finished: false }),
            Err(error) => {
                let _ = remove(&path);
                Err(error)
            }
        }
    }

    /// Its directory, for what else belongs to it.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes it final and gives it its name, for good when this returns. Blocks for long. Nobody may be writing
    /// to the files any more whose word is not good for their content.
    ///
    /// # Errors
    /// The disk's; nothing is left.
    pub(crate) fn commit(mut self, shape: Shape, to: &Path) -> io::Result<SavedMachine> {
        for file in [&self.state, &self.memory] {
            file.set_permissions(Permissions::from_mode(0o400))?;
            file.sync_all()?;
        }
        let (state, memory) = (SavedFile::of(&self.state)?, SavedFile::of(&self.memory)?);
        let manifest = Manifest { version: VERSION, shape, state, memory };
        let mut file =
            OpenOptions::new().write(true).create_new(true).mode(0o400).open(self.path.join(MANIFEST))?;
        file.write_all(&serde_json::to_vec_pretty(&manifest)?)?;
        file.sync_all()?;
        File::open(&self.path)?.sync_all()?;
        fs::rename(&self.path, to)?;
        self.finished = true;
        if let Some(parent) = to.parent() {
            File::open(parent)?.sync_all()?;
        }
        Ok(SavedMachine { path: to.to_owned(), manifest })
    }

    /// Takes the files for machines that go on from them at once, and leaves nothing on disk but what those
    /// hold open.
    ///
    /// # Errors
    /// The files cannot be opened for reading.
    pub(crate) fn unlink(self) -> io::Result<OpenMachine> {
        let (state, memory) = (open_plain(&self.path.join(STATE))?, open_plain(&self.path.join(MEMORY))?);
        Ok(OpenMachine { state, memory })
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        if !self.finished
            && let Err(error) = remove(&self.path)
        {
            tracing::error!(path = %self.path.display(), %error, "an unfinished saved machine stays behind");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    fn saved(base: &Path, name: &str) -> SavedMachine {
        let writing = Writing::create(base.join("new")).unwrap();
        writing.memory.set_len(1 << 20).unwrap();
        writing.memory.write_all_at(b"memory", 4096).unwrap();
        writing.state.write_all_at(b"state", 0).unwrap();
        writing.commit(sample(1), &base.join(name)).unwrap()
    }

    #[test]
    fn what_was_written_is_opened_read_only_and_left_whole() {
        let base = tempfile::tempdir().unwrap();
        let machine = saved(base.path(), "m");
        let read = SavedMachine::read(&base.path().join("m")).unwrap();
        assert_eq!(read.manifest, machine.manifest);
        for check in [Check::Fingerprint, Check::Digest] {
            let open = read.open(check).unwrap();
            let mut bytes = [0; 6];
            open.memory.read_exact_at(&mut bytes, 4096).unwrap();
            assert_eq!(&bytes, b"memory");
            assert!(open.memory.write_all_at(b"x", 0).is_err());
        }
        let mode = |name: &str| fs::metadata(base.path().join("m").join(name)).unwrap().mode() & 0o777;
        assert_eq!([STATE, MEMORY, MANIFEST].map(mode), [0o400; 3]);
        assert!(!base.path().join("new").exists());
    }

    #[test]
    fn damage_is_told() {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().join("m");
        let machine = saved(base.path(), "m");
        // A copy has the same content in another place: only the digest knows that it is good.
        fs::copy(path.join(MEMORY), path.join("copy")).unwrap();
        fs::rename(path.join("copy"), path.join(MEMORY)).unwrap();
        assert!(matches!(machine.open(Check::Fingerprint), Err(SavedError::Damaged(_))));
        assert!(machine.open(Check::Digest).is_ok());
        let file = |name: &str| {
            fs::set_permissions(path.join(name), Permissions::from_mode(0o600)).unwrap();
            File::options().write(true).open(path.join(name)).unwrap()
        };
        file(MEMORY).write_all_at(b"n", 4097).unwrap();
        assert!(matches!(machine.open(Check::Digest), Err(SavedError::Damaged(_))));
        file(STATE).set_len(3).unwrap();
        for check in [Check::Fingerprint, Check::Digest] {
            let error = machine.open(check).unwrap_err();
            assert!(error.to_string().contains(STATE), "{error}");
        }
        fs::remove_file(path.join(STATE)).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", path.join(STATE)).unwrap();
        assert!(matches!(machine.open(Check::Digest), Err(SavedError::Io(_))));
        let manifest = file(MANIFEST);
        for text in [&b"{"[..], b"{}", b"{\"version\":2}", b"{\"version\":1}", &[b' '; 70_000]] {
            manifest.set_len(0).unwrap();
            manifest.write_all_at(text, 0).unwrap();
            assert!(SavedMachine::read(&path).is_err());
        }
        machine.remove().unwrap();
        machine.remove().unwrap();
        assert!(matches!(SavedMachine::read(&path), Err(SavedError::Io(_))));
    }

    #[test]
    fn an_unfinished_one_leaves_nothing_and_an_unlinked_one_its_open_files() {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().join("new");
        drop(Writing::create(path.clone()).unwrap());
        assert!(!path.exists());
        let writing = Writing::create(path.clone()).unwrap();
        assert!(Writing::create(path.clone()).is_err());
        writing.memory.write_all_at(b"memory", 0).unwrap();
        let open = writing.unlink().unwrap().try_clone().unwrap();
        assert!(!path.exists());
        let mut bytes = [0; 6];
        open.memory.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(&bytes, b"memory");
    }
}
