//! Shares of kind layer: unpacked image layers (crate `bulkhead-layer-format`), immutable.
//!
//! On the host there are files and directories only; what the guest sees stands in an extended attribute.
//! Only size, allocation, times and hard links are the host file's own. A file without that attribute does
//! not belong to a layer, and is an I/O error.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::Duration,
};

use bulkhead_layer_format::{MAX_ENCODED, Meta, XATTR};
use rustix::{
    fs::{FileType, OFlags},
    io::Errno,
};

use super::{
    backend::{Backend, Result, S_IFDIR, S_IFLNK, S_IFMT, S_IFREG, Stat, open_beneath},
    wire::Attr,
};

/// The longest symbolic link target.
const MAX_TARGET: usize = 4095;

/// A layer never changes: the guest need never ask again.
const FOREVER: Duration = Duration::from_secs(10 * 365 * 86_400);

/// The layer backend; it has no state.
#[derive(Debug)]
pub(super) struct Layer;

impl Backend for Layer {
    fn open(&self, dir: BorrowedFd<'_>, path: &[u8]) -> Result<OwnedFd> {
        open_beneath(dir, path, OFlags::RDONLY).map_err(|errno| match errno {
            // The guest's own name was wrong, or the VMM has come to a limit.
            Errno::NOENT
            | Errno::NOTDIR
            | Errno::NAMETOOLONG
            | Errno::MFILE
            | Errno::NFILE
            | Errno::NOMEM => errno,
            _ => Errno::IO,
        })
    }

    fn stat(&self, file: BorrowedFd<'_>) -> Result<Stat> {
        let host = rustix::fs::fstat(file).map_err(|_| Errno::IO)?;
        let meta = meta(file)?;
        let host_is_directory = FileType::from_raw_mode(host.st_mode) == FileType::Directory;
        if host_is_directory != (meta.mode & S_IFMT == S_IFDIR) {
            return Err(Errno::IO);
        }
        let has_content = matches!(meta.mode & S_IFMT, S_IFREG | S_IFLNK) || host_is_directory;
        let nanos = |nanos| u32::try_from(nanos).unwrap_or(0);
        let attr = Attr {
            ino: 0,
            size: if has_content { u64::try_from(host.st_size).unwrap_or(0) } else { 0 },
            blocks: if has_content { u64::try_from(host.st_blocks).unwrap_or(0) } else { 0 },
            atime: host.st_mtime.cast_unsigned(),
            mtime: host.st_mtime.cast_unsigned(),
            ctime: host.st_ctime.cast_unsigned(),
            atimensec: nanos(host.st_mtime_nsec),
            mtimensec: nanos(host.st_mtime_nsec),
            ctimensec: nanos(host.st_ctime_nsec),
            mode: meta.mode,
            nlink: u32::try_from(host.st_nlink).unwrap_or(u32::MAX),
            uid: meta.uid,
            gid: meta.gid,
            rdev: meta.rdev,
            blksize: 4096,
            flags: 0,
        };
        Ok(Stat { device: host.st_dev, inode: host.st_ino, attr, bare: meta.xattrs.is_empty() })
    }

    fn kind(&self, dir: BorrowedFd<'_>, name: &[u8], host: FileType) -> Result<u32> {
        if host == FileType::Directory {
            return Ok(S_IFDIR);
        }
        Ok(meta(self.open(dir, name)?.as_fd())?.mode & S_IFMT)
    }

    fn read_link(&self, file: BorrowedFd<'_>) -> Result<Vec<u8>> {
        let mut target = vec![0; MAX_TARGET];
        let length = rustix::io::pread(file, &mut target[..], 0).map_err(|_| Errno::IO)?;
        target.truncate(length);
        Ok(target)
    }

    fn xattr(&self, file: BorrowedFd<'_>, name: &[u8]) -> Result<Vec<u8>> {
        let xattrs = meta(file)?.xattrs;
        xattrs.into_iter().find(|(other, _)| other == name).map(|(_, value)| value).ok_or(Errno::NODATA)
    }

    fn xattr_names(&self, file: BorrowedFd<'_>) -> Result<Vec<u8>> {
        let mut names = Vec::new();
        for (name, _) in meta(file)?.xattrs {
            names.extend(name);
            names.push(0);
        }
        Ok(names)
    }

    fn validity(&self) -> Duration {
        FOREVER
    }
}

fn meta(file: BorrowedFd<'_>) -> Result<Meta> {
    let mut buffer = [0; MAX_ENCODED];
    let length = rustix::fs::fgetxattr(file, XATTR, &mut buffer[..]).map_err(|_| Errno::IO)?;
    let meta = Meta::decode(buffer.get(..length).ok_or(Errno::IO)?).map_err(|_| Errno::IO)?;
    // Linux takes a node whose mode names no kind for broken and reports it as such; so does this.
    let known = matches!(meta.mode & S_IFMT, 0o010_000 | 0o020_000 | 0o040_000 | 0o060_000)
        || matches!(meta.mode & S_IFMT, 0o100_000 | 0o120_000 | 0o140_000);
    if known { Ok(meta) } else { Err(Errno::IO) }
}
