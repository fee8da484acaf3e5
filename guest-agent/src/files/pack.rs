//! From a tree of files to an archive.
//!
//! The tree may change while it is walked, on purpose too. Each file is opened once, without rights and without
//! following it; all else is done with what was opened: a name that becomes a link in between leads nowhere, and a
//! directory that is moved is read where it is. What vanishes is left out; what shrinks is filled with zeros, what
//! grows is cut: the header has gone out by then.

use std::{
    collections::HashMap,
    io::{Read, Write},
    os::fd::OwnedFd,
};

use bulkhead_tar::{Device, Entry, Kind, Writer};
use rustix::{
    fs::{Dir, FileType, OFlags, Stat},
    io::Errno,
};

use super::{
    About, Failure,
    root::{self, Root, look_at, open_directory},
    too_many, xattrs,
};
use crate::error::{Result, internal};

/// Bytes of names that are remembered to recognise hard links.
const MAX_LINK_BYTES: usize = 64 << 20;

/// How deep a tree may be.
pub(super) const MAX_DEPTH: usize = 2048;

/// File systems of the kernel's own making, whose content is nobody's files: their numbers in `statfs`.
const OF_THE_KERNEL: [u64; 11] = [
    0x9fa0,      // proc
    0x6265_6572, // sysfs
    0x6367_7270, // cgroup2
    0x1cd1,      // devpts
    0x1980_0202, // mqueue
    0xcafe_4a11, // bpf
    0x6462_6720, // debugfs
    0x7472_6163, // tracefs
    0x7363_6673, // securityfs
    0x9584_58f6, // hugetlbfs
    0x4249_4e4d, // binfmt_misc
];

/// Which mounts below the tree's root belong to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mounts {
    /// None: there are none.
    None,
    /// Those that hold files: neither `/proc` and its kind nor `/dev`, of which the directory alone is packed.
    Ordinary,
}

/// Packs `file` and what is below it, under `name`; `/` stands for an archive of a root.
pub(super) fn pack<W: Write>(
    root: &Root,
    file: &OwnedFd,
    name: &str,
    mounts: Mounts,
    out: W,
) -> std::result::Result<(), Failure> {
    let found = rustix::fs::fstat(file).about("lstat", name.as_bytes())?;
    let mut packer = Packer::new(root, out);
    packer.mounts = mounts;
    packer.at_root = name == "/" || name == ".";
    let mut path = if name == "/" { Vec::new() } else { name.as_bytes().to_vec() };
    if mounts == Mounts::None {
        // What is in it, and not the directory itself, whose place whoever unpacks it decides.
        packer.bare = true;
        let dir = Dir::new(open_directory(file).about("open", b"/")?).about("read", b"/")?;
        packer.below(dir, &found, &mut path, 0)?;
    } else {
        packer.add(file, &found, &mut path, 0)?;
    }
    packer.finish()
}

/// Writes entries.
pub(super) struct Packer<'a, W> {
    root: &'a Root,
    out: Writer<W>,
    links: Links,
    buffer: Vec<u8>,
    mounts: Mounts,
    /// Whether names begin without a slash.
    bare: bool,
    /// Whether the archive is of a whole root, so that `dev` in it is what it is.
    at_root: bool,
}

impl<'a, W: Write> Packer<'a, W> {
    pub(super) fn new(root: &'a Root, out: W) -> Self {
        let (links, buffer) = (Links::default(), vec![0; 64 << 10]);
        Self { root, out: Writer::new(out), links, buffer, mounts: Mounts::None, bare: false, at_root: false }
    }

    pub(super) fn finish(self) -> std::result::Result<(), Failure> {
        self.out.finish().map(drop).map_err(Failure::Peer)
    }

    fn add(
        &mut self,
        file: &OwnedFd,
        found: &Stat,
        path: &mut Vec<u8>,
        depth: usize,
    ) -> std::result::Result<(), Failure> {
        if FileType::from_raw_mode(found.st_mode) != FileType::Directory {
            return self.file(file, found, path);
        }
        if depth > MAX_DEPTH {
            return Err(internal(format!("{}: directories lie too deep", bulkhead_tar::shown(path))).into());
        }
        let dir = open_directory(file).about("open", path)?;
        self.directory(&dir, found, path)?;
        let dir = Dir::new(dir).about("read", path)?;
        self.below(dir, found, path, depth)
    }

    /// A directory's files.
    fn below(
        &mut self,
        mut dir: Dir,
        parent: &Stat,
        path: &mut Vec<u8>,
        depth: usize,
    ) -> std::result::Result<(), Failure> {
        let length = path.len();
        while let Some(item) = dir.read() {
            let item = item.about("read", path)?;
            let name = item.file_name().to_bytes();
            if matches!(name, b"." | b"..") {
                continue;
            }
            let looked = dir.fd().and_then(|dir| look_at(dir, name)).about("lstat", path)?;
            let Some((file, found)) = looked else { continue };
            if !(self.bare && path.is_empty()) {
                path.push(b'/');
            }
            path.extend(name);
            let directory = FileType::from_raw_mode(found.st_mode) == FileType::Directory;
            if directory && found.st_dev != parent.st_dev && self.is_left_out(&file, name, depth)? {
                let dir = open_directory(&file).about("open", path)?;
                self.directory(&dir, &found, path)?;
            } else {
                self.add(&file, &found, path, depth + 1)?;
            }
            path.truncate(length);
        }
        Ok(())
    }

    /// Whether a mounted directory's content is no files of anybody's.
    fn is_left_out(&self, file: &OwnedFd, name: &[u8], depth: usize) -> Result<bool> {
        if self.mounts == Mounts::None {
            return Ok(false);
        }
        let kind = rustix::fs::fstatfs(file).about("statfs", name)?.f_type as u64;
        let devices = self.at_root && depth == 0 && name == b"dev";
        Ok(devices || OF_THE_KERNEL.contains(&kind))
    }

    /// A directory's own entry; it is open for reading.
    pub(super) fn directory(
        &mut self,
        dir: &OwnedFd,
        found: &Stat,
        path: &[u8],
    ) -> std::result::Result<(), Failure> {
        let xattrs = xattrs::read(dir).about("getxattr", path)?;
        let entry = Entry { xattrs, ..entry([path, b"/"].concat(), Kind::Directory, found) };
        self.out.entry(&entry, 0).map_err(Failure::Peer)
    }

    /// An empty file's entry, for what an archive says by a name.
    pub(super) fn mark(&mut self, name: Vec<u8>, found: &Stat) -> std::result::Result<(), Failure> {
        let entry = Entry { mode: 0, uid: 0, gid: 0, ..entry(name, Kind::File, found) };
        self.out.entry(&entry, 0).map_err(Failure::Peer)
    }

    /// The entry of anything but a directory, with its content. Sockets are nobody's files.
    pub(super) fn file(
        &mut self,
        file: &OwnedFd,
        found: &Stat,
        path: &[u8],
    ) -> std::result::Result<(), Failure> {
        let kind = FileType::from_raw_mode(found.st_mode);
        if kind == FileType::Socket || kind == FileType::Unknown {
            return Ok(());
        }
        if found.st_nlink > 1
            && let Some(target) = self.links.seen(found, path)?
        {
            let entry = entry(path.to_vec(), Kind::HardLink(target), found);
            return self.out.entry(&entry, 0).map_err(Failure::Peer);
        }
        let device =
            Device { major: rustix::fs::major(found.st_rdev), minor: rustix::fs::minor(found.st_rdev) };
        let kind = match kind {
            FileType::RegularFile => return self.regular(file, found, path),
            FileType::Symlink => Kind::Symlink(
                rustix::fs::readlinkat(file, c"", Vec::new()).about("readlink", path)?.into_bytes(),
            ),
            FileType::CharacterDevice => Kind::CharDevice(device),
            FileType::BlockDevice => Kind::BlockDevice(device),
            _ => Kind::Fifo,
        };
        self.out.entry(&entry(path.to_vec(), kind, found), 0).map_err(Failure::Peer)
    }

    fn regular(&mut self, file: &OwnedFd, found: &Stat, path: &[u8]) -> std::result::Result<(), Failure> {
        let opened = match self.root.reopen(file, OFlags::RDONLY) {
            Ok(opened) => opened,
            // On a share, removed in between.
            Err(Errno::NOENT | Errno::STALE) => return Ok(()),
            Err(error) => return Err(error).about("open", path)?,
        };
        let size = u64::try_from(found.st_size).unwrap_or(0);
        let xattrs = xattrs::read(&opened).about("getxattr", path)?;
        let entry = Entry { xattrs, ..entry(path.to_vec(), Kind::File, found) };
        self.out.entry(&entry, size).map_err(Failure::Peer)?;
        let mut content = root::file(opened).take(size);
        loop {
            let count = match content.read(&mut self.buffer) {
                Ok(0) => return Ok(()),
                Ok(count) => count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(super::failed("read", path, &error).into()),
            };
            self.out.data(&self.buffer[..count]).map_err(Failure::Peer)?;
        }
    }
}

fn entry(name: Vec<u8>, kind: Kind, found: &Stat) -> Entry {
    Entry {
        name,
        kind,
        mode: found.st_mode & 0o7777,
        uid: found.st_uid,
        gid: found.st_gid,
        mtime: (found.st_mtime, 0),
        xattrs: Vec::new(),
    }
}

/// Files with several names that have been packed.
#[derive(Default)]
struct Links {
    names: HashMap<(u64, u64), Vec<u8>>,
    bytes: usize,
}

impl Links {
    /// The name that it was packed under, or it is noted.
    fn seen(&mut self, found: &Stat, path: &[u8]) -> Result<Option<Vec<u8>>> {
        if let Some(name) = self.names.get(&(found.st_dev, found.st_ino)) {
            return Ok(Some(name.clone()));
        }
        self.bytes += path.len() + 64;
        if self.bytes > MAX_LINK_BYTES {
            return Err(too_many("files with hard links"));
        }
        self.names.insert((found.st_dev, found.st_ino), path.to_vec());
        Ok(None)
    }
}
