//! The image store's files: each appears by one rename, whole and on disk.

use std::{
    fs::{self, DirBuilder, File},
    io::{self, Read, Write},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

/// A folder of the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Folder {
    /// Image configurations as they came, named by digest: an image is there if its configuration is.
    Configs,
    /// Manifests as they came, named by digest.
    Manifests,
    /// What this engine knows of an image, named by the image's digest.
    Records,
    /// The table of tags, and nothing else.
    Tables,
}

impl Folder {
    const ALL: [Self; 4] = [Self::Configs, Self::Manifests, Self::Records, Self::Tables];

    const fn name(self) -> &'static str {
        match self {
            Self::Configs => "configs",
            Self::Manifests => "manifests",
            Self::Records => "records",
            Self::Tables => "tables",
        }
    }
}

const TMP: &str = "tmp";
const DAMAGED: &str = "damaged";

/// The store's directory.
#[derive(Debug)]
pub(super) struct Files {
    root: PathBuf,
    next: AtomicU64,
}

impl Files {
    /// Makes what is missing and empties `tmp`.
    ///
    /// # Errors
    /// The filesystem's.
    pub(super) fn open(root: PathBuf) -> io::Result<Self> {
        let mut builder = DirBuilder::new();
        builder.recursive(true).mode(0o700);
        for folder in Folder::ALL {
            builder.create(root.join(folder.name()))?;
        }
        builder.create(root.join(DAMAGED))?;
        let tmp = root.join(TMP);
        builder.create(&tmp)?;
        for entry in fs::read_dir(&tmp)? {
            fs::remove_file(entry?.path())?;
        }
        Ok(Self { root, next: AtomicU64::new(0) })
    }

    /// Writes a file, or replaces it; when this returns it is on disk.
    ///
    /// # Errors
    /// The filesystem's; then the file is as it was.
    pub(super) fn write(&self, folder: Folder, name: &str, bytes: &[u8]) -> io::Result<()> {
        let (mut file, temporary) = self.temporary()?;
        let target = self.path(folder, name);
        file.write_all(bytes)
            .and_then(|()| file.sync_all())
            .and_then(|()| fs::rename(temporary.path(), &target))
            .and_then(|()| self.sync(folder))
            .map_err(|error| at(&target, "write", &error))
    }

    /// Reads a file of at most `cap` bytes; None if there is none.
    ///
    /// # Errors
    /// The filesystem's, or it is larger.
    pub(super) fn read(&self, folder: Folder, name: &str, cap: usize) -> io::Result<Option<Vec<u8>>> {
        let path = self.path(folder, name);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(at(&path, "open", &error)),
        };
        let mut bytes = Vec::new();
        file.take(cap as u64 + 1).read_to_end(&mut bytes).map_err(|error| at(&path, "read", &error))?;
        if bytes.len() > cap {
            return Err(at(&path, "read", &io::Error::other(format!("it has more than {cap} bytes"))));
        }
        Ok(Some(bytes))
    }

    /// Removes a file; that there is none is no error.
    ///
    /// # Errors
    /// The filesystem's.
    pub(super) fn remove(&self, folder: Folder, name: &str) -> io::Result<()> {
        let path = self.path(folder, name);
        match fs::remove_file(&path) {
            Ok(()) => self.sync(folder),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(at(&path, "remove", &error)),
        }
    }

    /// The names of a folder's files.
    ///
    /// # Errors
    /// The filesystem's.
    pub(super) fn list(&self, folder: Folder) -> io::Result<Vec<String>> {
        let names: io::Result<Vec<_>> = fs::read_dir(self.root.join(folder.name()))?
            .map(|entry| entry.map(|entry| entry.file_name().to_string_lossy().into_owned()))
            .collect();
        let mut names = names?;
        names.sort_unstable();
        Ok(names)
    }

    /// Puts a file out of the way, where people can look at it.
    ///
    /// # Errors
    /// The filesystem's.
    pub(super) fn set_aside(&self, folder: Folder, name: &str) -> io::Result<()> {
        let target = self.root.join(DAMAGED).join(format!("{}-{name}", folder.name()));
        fs::rename(self.path(folder, name), target)?;
        self.sync(folder)
    }

    /// A file of no name to others, gone when the [`Temporary`] is dropped or the store next opened.
    ///
    /// # Errors
    /// The filesystem's.
    pub(super) fn temporary(&self) -> io::Result<(File, Temporary)> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let path = self.root.join(TMP).join(number.to_string());
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .map_err(|error| at(&path, "open", &error))?;
        Ok((file, Temporary(path)))
    }

    fn path(&self, folder: Folder, name: &str) -> PathBuf {
        self.root.join(folder.name()).join(name)
    }

    fn sync(&self, folder: Folder) -> io::Result<()> {
        File::open(self.root.join(folder.name()))?.sync_all()
    }
}

/// A temporary file's name; dropped, it takes the file with it unless that was renamed.
#[derive(Debug)]
pub(super) struct Temporary(PathBuf);

impl Temporary {
    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // What stays is removed when the store is opened the next time.
        let _ = fs::remove_file(&self.0);
    }
}

/// As Docker words it: `write /path: no space left on device`. The kind stays.
fn at(path: &Path, action: &str, error: &io::Error) -> io::Error {
    io::Error::new(
        error.kind(),
        format!("{action} {}: {}", path.display(), super::errors::describe_io(error)),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_come_whole_and_go() {
        let dir = tempfile::tempdir().unwrap();
        let files = Files::open(dir.path().join("image")).unwrap();
        assert_eq!(files.read(Folder::Configs, "a", 10).unwrap(), None);
        files.write(Folder::Configs, "a", b"one").unwrap();
        files.write(Folder::Configs, "a", b"two").unwrap();
        assert_eq!(files.read(Folder::Configs, "a", 3).unwrap().unwrap(), b"two");
        assert!(files.read(Folder::Configs, "a", 2).is_err());
        assert_eq!(files.list(Folder::Configs).unwrap(), ["a"]);
        assert!(fs::read_dir(dir.path().join("image/tmp")).unwrap().next().is_none());
        files.remove(Folder::Configs, "a").unwrap();
        files.remove(Folder::Configs, "a").unwrap();
        assert!(files.list(Folder::Configs).unwrap().is_empty());
    }

    #[test]
    fn what_a_crash_left_is_swept() {
        let dir = tempfile::tempdir().unwrap();
        let files = Files::open(dir.path().to_owned()).unwrap();
        std::mem::forget(files.temporary().unwrap());
        drop(Files::open(dir.path().to_owned()).unwrap());
        assert!(fs::read_dir(dir.path().join(TMP)).unwrap().next().is_none());
    }
}
