//! What the files of a share look like: one implementation for each kind of share.
//!
//! A backend knows files of the host, by descriptor, and never names a node. Whatever it opens lies beneath
//! the directory it is given: [`open_beneath`] is the only way in.

use std::{
    os::fd::{BorrowedFd, OwnedFd},
    time::Duration,
};

use rustix::{
    fs::{FileType, Mode, OFlags, ResolveFlags},
    io::Errno,
};

use super::wire::Attr;

/// The guest sees this error number.
pub(crate) type Result<T> = std::result::Result<T, Errno>;

/// The bits of a mode that say what kind of file it is.
pub(super) const S_IFMT: u32 = 0o170_000;
pub(super) const S_IFDIR: u32 = 0o040_000;
pub(super) const S_IFREG: u32 = 0o100_000;
pub(super) const S_IFLNK: u32 = 0o120_000;

/// A file's attributes, and which file of the host it is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stat {
    /// The host's device number.
    pub(super) device: u64,
    /// The host's inode number, unique on the device.
    pub(super) inode: u64,
    /// As the guest sees it; `ino` is set by the server.
    pub(super) attr: Attr,
    /// It has no extended attributes, and never will.
    pub(super) bare: bool,
}

/// The files of one kind of share.
///
/// A writable kind adds its operations here, with EROFS as what the others answer.
pub(super) trait Backend: Send + Sync {
    /// Opens the file at `path` beneath `dir` for reading.
    fn open(&self, dir: BorrowedFd<'_>, path: &[u8]) -> Result<OwnedFd>;

    /// An open file's attributes.
    fn stat(&self, file: BorrowedFd<'_>) -> Result<Stat>;

    /// The kind of the file `name` in `dir`, as `S_IFMT` bits; `host` is what the host takes it for.
    fn kind(&self, dir: BorrowedFd<'_>, name: &[u8], host: FileType) -> Result<u32>;

    /// A symbolic link's target.
    fn read_link(&self, file: BorrowedFd<'_>) -> Result<Vec<u8>>;

    /// The value of an extended attribute; ENODATA when there is none of that name.
    fn xattr(&self, file: BorrowedFd<'_>, name: &[u8]) -> Result<Vec<u8>>;

    /// The names of all extended attributes, each ended by a NUL.
    fn xattr_names(&self, file: BorrowedFd<'_>) -> Result<Vec<u8>>;

    /// For how long the guest may keep names, absent ones too, and attributes without asking again.
    fn validity(&self) -> Duration;
}

/// Opens a path below a directory, following nothing and leaving neither the directory nor its filesystem.
pub(super) fn open_beneath(dir: BorrowedFd<'_>, path: &[u8], flags: OFlags) -> Result<OwnedFd> {
    let resolve = ResolveFlags::BENEATH
        | ResolveFlags::NO_SYMLINKS
        | ResolveFlags::NO_MAGICLINKS
        | ResolveFlags::NO_XDEV;
    // A fifo or device that somebody put there neither blocks nor becomes a controlling terminal.
    let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
    rustix::fs::openat2(dir, path, flags, Mode::empty(), resolve)
}
