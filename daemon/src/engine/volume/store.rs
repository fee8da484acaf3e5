//! Volumes on disk.
//!
//! ```text
//!   volumes/NAME/          0701
//!     volume.json          what it is; written last, removed first
//!     _data/               0755 at first: what guests and host see
//!     disk.img             instead of _data, of a volume that is a disk
//! ```
//!
//! A directory without `volume.json` is what a creation or a removal left when the daemon died, and is removed.

use std::{
    collections::BTreeMap,
    fs::{self, DirBuilder, File},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::engine::{Error, Result};

const META: &str = "volume.json";
const DATA: &str = "_data";
const DISK: &str = "disk.img";

/// The longest name, as a file system takes it.
const MAX_NAME: usize = 255;

/// A volume as it is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Volume {
    /// Its name.
    pub(crate) name: String,
    /// When it was made.
    pub(crate) created: Timestamp,
    /// None: none were given.
    pub(crate) labels: Option<BTreeMap<String, String>>,
    /// The driver's options, checked.
    pub(crate) options: Option<BTreeMap<String, String>>,
}

impl Volume {
    /// The directory of the host that it stands for, where that is not its own.
    pub(crate) fn device(&self) -> Option<&str> {
        self.options.as_ref()?.get("device").map(String::as_str)
    }
}

/// All volumes.
#[derive(Debug)]
pub(crate) struct VolumeStore {
    root: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    volumes: BTreeMap<String, Arc<Volume>>,
    /// How many creations of containers are about to use each.
    pinned: BTreeMap<String, usize>,
}

/// Keeps a volume from being removed until its user is known.
#[derive(Debug)]
pub(crate) struct Pin {
    store: Arc<VolumeStore>,
    name: String,
}

impl Drop for Pin {
    fn drop(&mut self) {
        let mut state = self.store.lock();
        if let Some(count) = state.pinned.get_mut(&self.name) {
            *count -= 1;
            if *count == 0 {
                state.pinned.remove(&self.name);
            }
        }
    }
}

/// A directory with a disk that is no volume's yet; removed when dropped.
struct Prepared(PathBuf);

impl Drop for Prepared {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "a directory stays behind until the next start");
        }
    }
}

impl VolumeStore {
    /// Opens the store and clears up after a daemon that died.
    ///
    /// # Errors
    /// The disk's.
    pub(crate) fn open(root: PathBuf) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o701).create(&root)?;
        let mut volumes = BTreeMap::new();
        for entry in fs::read_dir(&root)? {
            let path = entry?.path();
            match read(&path.join(META)) {
                Ok(volume) if path.file_name().is_some_and(|name| *name == *volume.name) => {
                    volumes.insert(volume.name.clone(), Arc::new(volume));
                }
                Ok(_) => tracing::warn!(path = %path.display(), "a volume of another name is left alone"),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    tracing::info!(path = %path.display(), "what is left of a half-made or half-removed volume is removed");
                    if let Err(error) = fs::remove_dir_all(&path) {
                        tracing::error!(path = %path.display(), %error, "it could not be removed");
                    }
                }
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "a damaged volume is left alone");
                }
            }
        }
        Ok(Self { root, state: Mutex::new(State { volumes, pinned: BTreeMap::new() }) })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All, by name.
    pub(crate) fn all(&self) -> Vec<Arc<Volume>> {
        self.lock().volumes.values().cloned().collect()
    }

    /// One.
    pub(crate) fn get(&self, name: &str) -> Option<Arc<Volume>> {
        self.lock().volumes.get(name).cloned()
    }

    /// Where its files are, or its disk, for people; of one that stands for a directory of the host too.
    pub(crate) fn mountpoint(&self, volume: &Volume) -> PathBuf {
        let content = if volume.disk_size().is_some() { DISK } else { DATA };
        self.root.join(&volume.name).join(content)
    }

    /// The directory that guests see, or the disk that they are given.
    pub(crate) fn source(&self, volume: &Volume) -> PathBuf {
        volume.device().map_or_else(|| self.mountpoint(volume), PathBuf::from)
    }

    /// Makes a volume, or finds the one of that name; pinned either way. Whether it is new.
    ///
    /// # Errors
    /// A name that is none; the disk's.
    pub(crate) fn create(self: &Arc<Self>, volume: Volume) -> Result<(Arc<Volume>, Pin, bool)> {
        check_name(&volume.name)?;
        let failed = |error: io::Error| {
            Error::internal(format!("create {}: error while creating volume: {error}", volume.name))
        };
        // A disk takes a while, and others are not to wait for it.
        let prepared = match volume.disk_size() {
            Some(size) if self.get(&volume.name).is_none() => Some(self.prepare(size).map_err(failed)?),
            _ => None,
        };
        let mut state = self.lock();
        let (volume, new) = match state.volumes.get(&volume.name) {
            Some(existing) => (Arc::clone(existing), false),
            None => {
                self.lay_down(&volume, prepared.as_ref()).map_err(failed)?;
                let volume = Arc::new(volume);
                state.volumes.insert(volume.name.clone(), Arc::clone(&volume));
                (volume, true)
            }
        };
        *state.pinned.entry(volume.name.clone()).or_default() += 1;
        Ok((Arc::clone(&volume), Pin { store: Arc::clone(self), name: volume.name.clone() }, new))
    }

    /// Makes a disk in a directory that nothing refers to.
    fn prepare(&self, size: u64) -> io::Result<Prepared> {
        let directory =
            Prepared(self.root.join(format!(".disk-{}", crate::engine::container::names::new_id())));
        DirBuilder::new().mode(0o700).create(&directory.0)?;
        super::disk::make(&directory.0.join(DISK), size)?;
        Ok(directory)
    }

    fn lay_down(&self, volume: &Volume, disk: Option<&Prepared>) -> io::Result<()> {
        let directory = self.root.join(&volume.name);
        let made = (|| {
            DirBuilder::new().mode(0o701).create(&directory)?;
            match disk {
                Some(disk) => fs::rename(disk.0.join(DISK), directory.join(DISK))?,
                None => DirBuilder::new().mode(0o755).create(directory.join(DATA))?,
            }
            let new = directory.join("volume.json.new");
            let mut file = File::create_new(&new)?;
            file.write_all(&serde_json::to_vec(volume)?)?;
            file.sync_all()?;
            fs::rename(&new, directory.join(META))?;
            File::open(&directory)?.sync_all()?;
            File::open(&self.root)?.sync_all()
        })();
        if made.is_err() {
            let _ = fs::remove_dir_all(&directory);
        }
        made
    }

    /// Removes a volume and everything in it, unless containers use it: those that `users` names, asked while nobody
    /// can begin to, or one that is being made.
    ///
    /// # Errors
    /// There is none; it is in use; the disk's.
    pub(crate) fn remove(&self, name: &str, users: impl FnOnce() -> Vec<String>) -> Result<()> {
        {
            let mut state = self.lock();
            if !state.volumes.contains_key(name) {
                return Err(no_such(name));
            }
            if state.pinned.contains_key(name) {
                return Err(Error::conflict(format!("remove {name}: volume is in use")));
            }
            let users = users();
            if !users.is_empty() {
                let users = users.join(", ");
                return Err(Error::conflict(format!("remove {name}: volume is in use - [{users}]")));
            }
            let failed = |error: io::Error| Error::internal(format!("remove {name}: {error}"));
            fs::remove_file(self.root.join(name).join(META)).map_err(failed)?;
            File::open(self.root.join(name)).and_then(|file| file.sync_all()).map_err(failed)?;
            state.volumes.remove(name);
            // Out of the way, so that one of the same name can be made while this is being removed.
            let aside = self.aside(name);
            fs::rename(self.root.join(name), &aside).map_err(failed)?;
        }
        let aside = self.aside(name);
        fs::remove_dir_all(&aside).map_err(|error| Error::internal(format!("remove {name}: {error}")))
    }

    /// A name that no volume can have.
    fn aside(&self, name: &str) -> PathBuf {
        self.root.join(format!(".{}", name.get(..MAX_NAME - 1).unwrap_or(name)))
    }

    /// Bytes that its files have, each counted once, links not followed; of a disk, those that it takes on the host.
    pub(crate) fn size(&self, name: &str) -> u64 {
        let mut seen = std::collections::HashSet::new();
        let mut size = 0u64;
        let Some(volume) = self.get(name) else { return 0 };
        let place = self.mountpoint(&volume);
        if volume.disk_size().is_some() {
            return fs::metadata(place).map_or(0, |meta| meta.blocks().saturating_mul(512));
        }
        let mut pending = vec![place];
        while let Some(directory) = pending.pop() {
            for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
                let Ok(meta) = entry.metadata() else { continue };
                if meta.is_dir() {
                    pending.push(entry.path());
                } else if meta.nlink() < 2 || seen.insert((meta.dev(), meta.ino())) {
                    size = size.saturating_add(if meta.is_file() { meta.len() } else { 0 });
                }
            }
        }
        size
    }
}

pub(crate) fn no_such(name: &str) -> Error {
    Error::not_found(format!("get {name}: no such volume"))
}

/// Checks a volume's name by Docker's rule.
///
/// # Errors
/// In its words.
pub(crate) fn check_name(name: &str) -> Result<()> {
    let first = |byte: u8| byte.is_ascii_alphanumeric();
    let rest = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
    let bytes = name.as_bytes();
    if bytes.len() == 1 {
        return Err(Error::invalid(
            "volume name is too short, names should be at least two alphanumeric characters",
        ));
    }
    let valid = bytes.first().is_some_and(|byte| first(*byte)) && bytes.iter().all(|byte| rest(*byte));
    if valid && name.len() <= MAX_NAME {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "create {name}: {name:?} includes invalid characters for a local volume name, only \
         \"[a-zA-Z0-9][a-zA-Z0-9_.-]\" are allowed. If you intended to pass a host directory, use absolute path"
    )))
}

fn read(path: &Path) -> io::Result<Volume> {
    Ok(serde_json::from_slice(&fs::read(path)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::ErrorKind;

    fn volume(name: &str) -> Volume {
        Volume { name: name.into(), created: Timestamp::UNIX_EPOCH, labels: None, options: None }
    }

    #[test]
    fn volumes_survive_a_restart_and_halves_do_not() {
        let base = tempfile::tempdir().unwrap();
        let root = base.path().join("volumes");
        let store = Arc::new(VolumeStore::open(root.clone()).unwrap());
        let (_, pin, new) = store.create(volume("data")).unwrap();
        assert!(new && !store.create(volume("data")).unwrap().2);
        fs::write(store.mountpoint(&volume("data")).join("file"), "12345").unwrap();
        fs::hard_link(
            store.mountpoint(&volume("data")).join("file"),
            store.mountpoint(&volume("data")).join("link"),
        )
        .unwrap();
        assert_eq!(store.size("data"), 5);
        fs::create_dir_all(root.join("half/_data")).unwrap();
        assert_eq!(store.remove("data", Vec::new).unwrap_err().kind, ErrorKind::Conflict);
        drop(pin);
        let used = store.remove("data", || vec!["c1".into(), "c2".into()]).unwrap_err();
        assert_eq!(used.message, "remove data: volume is in use - [c1, c2]");

        let store = Arc::new(VolumeStore::open(root.clone()).unwrap());
        assert_eq!(store.all().iter().map(|volume| volume.name.as_str()).collect::<Vec<_>>(), ["data"]);
        assert!(!root.join("half").exists());
        assert_eq!(store.get("data").as_deref(), Some(&volume("data")));
        store.remove("data", Vec::new).unwrap();
        assert_eq!(store.remove("data", Vec::new).unwrap_err().message, "get data: no such volume");
        assert_eq!(fs::read_dir(&root).unwrap().count(), 0);
    }

    #[test]
    fn names_are_dockers() {
        for name in ["ab", "A1_b.c-d", &"x".repeat(255)] {
            assert!(check_name(name).is_ok(), "{name}");
        }
        for name in ["", "a", ".a", "-a", "a/b", "a b", "..", &"x".repeat(256), "ä1"] {
            assert!(check_name(name).is_err(), "{name}");
        }
    }
}
