//! Digests of files, holes skipped, and a memory of those that have not changed.

use std::{
    collections::HashMap,
    fs::{File, Metadata},
    io,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use rustix::{fs::SeekFrom, io::Errno};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// What is read and hashed at once, aligned: where a file system has its holes must not show.
const CHUNK: u64 = 64 << 10;

/// By what a file is known to be the one that was looked at before, without reading it: whoever changes a
/// file's content changes its time, and whoever replaces it its inode. It tells damage by people and programs;
/// a failing disk is told by the digest alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Fingerprint {
    /// Bytes.
    pub(crate) size: u64,
    device: u64,
    inode: u64,
    modified_s: i64,
    modified_ns: i64,
}

impl Fingerprint {
    /// Of an open file.
    pub(crate) fn of(metadata: &Metadata) -> Self {
        Self {
            size: metadata.len(),
            device: metadata.dev(),
            inode: metadata.ino(),
            modified_s: metadata.mtime(),
            modified_ns: metadata.mtime_nsec(),
        }
    }
}

/// SHA-256 over a file's length and each chunk of it that is not all zeros, with its place; holes cost nothing.
///
/// # Errors
/// The disk's.
pub(crate) fn of_sparse(file: &File) -> io::Result<String> {
    let size = file.metadata()?.len();
    let mut digest = Sha256::new();
    digest.update(size.to_le_bytes());
    let mut buffer = vec![0; usize::try_from(CHUNK).unwrap_or_default()];
    let mut position = 0;
    while position < size {
        let data = match rustix::fs::seek(file, SeekFrom::Data(position)) {
            Ok(data) => data,
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        position = data / CHUNK * CHUNK;
        let length = (size - position).min(CHUNK);
        let chunk =
            usize::try_from(length).ok().and_then(|length| buffer.get_mut(..length)).unwrap_or_default();
        file.read_exact_at(chunk, position)?;
        if chunk.iter().any(|byte| *byte != 0) {
            digest.update(position.to_le_bytes());
            digest.update(&*chunk);
        }
        position += length;
    }
    Ok(hex::encode(digest.finalize()))
}

/// Digests of programs and kernels, each read once as long as it does not change.
#[derive(Debug, Default)]
pub struct Digests(Mutex<HashMap<PathBuf, (Fingerprint, String)>>);

impl Digests {
    /// The digest of a file that was looked at before and is the same; costs one stat.
    pub(crate) fn known(&self, path: &Path) -> Option<String> {
        let now = Fingerprint::of(&std::fs::metadata(path).ok()?);
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(path).filter(|(then, _)| *then == now).map(|(_, digest)| digest.clone())
    }

    /// The digest of a file, read if need be. Blocks.
    ///
    /// # Errors
    /// The file cannot be read.
    pub(crate) fn read(&self, path: &Path) -> io::Result<String> {
        if let Some(digest) = self.known(path) {
            return Ok(digest);
        }
        let file = File::open(path)?;
        let fingerprint = Fingerprint::of(&file.metadata()?);
        let digest = of_sparse(&file)?;
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.insert(path.to_owned(), (fingerprint, digest.clone()));
        Ok(digest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_and_its_place_count_and_holes_do_not() {
        let base = tempfile::tempdir().unwrap();
        let file = |name: &str, writes: &[(u64, &[u8])]| {
            let file = File::options().read(true).write(true).create_new(true).open(base.path().join(name));
            let file = file.unwrap();
            file.set_len(4 << 20).unwrap();
            for (at, bytes) in writes {
                file.write_all_at(bytes, *at).unwrap();
            }
            of_sparse(&file).unwrap()
        };
        let one = file("a", &[(1 << 20, b"data")]);
        let dense: &[(u64, &[u8])] = &[(0, &[0; 4096]), (1 << 20, b"data"), (3 << 20, &[0; 4096])];
        assert_eq!(file("b", dense), one);
        assert_eq!(file("b2", &[((1 << 20) - 8, &[0; 8]), (1 << 20, b"data")]), one);
        for (name, writes) in [
            ("c", &[(1_u64 << 20, &b"datb"[..])][..]),
            ("d", &[((1 << 20) + CHUNK, b"data")]),
            ("e", &[]),
            ("f", &[(1 << 20, b"data"), ((4 << 20) - 1, b"x")]),
        ] {
            assert_ne!(file(name, writes), one, "{name}");
        }
    }

    #[test]
    fn a_file_that_changes_is_read_again() {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().join("kernel");
        let digests = Digests::default();
        assert!(digests.known(&path).is_none() && digests.read(&path).is_err());
        std::fs::write(&path, "one").unwrap();
        assert!(digests.known(&path).is_none());
        let first = digests.read(&path).unwrap();
        assert_eq!(digests.known(&path), Some(first.clone()));
        std::fs::write(&path, "three").unwrap();
        assert!(digests.known(&path).is_none());
        assert_ne!(digests.read(&path).unwrap(), first);
    }
}
