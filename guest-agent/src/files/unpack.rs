//! From an archive to a container's files.
//!
//! Names of the archive are cleaned first ([`EntryPath`]): none leads out of the directory by itself. The
//! directory of each entry is then opened by the container's own root, so that links on the way lead somewhere in
//! the container, as they do for the container's own processes, and nowhere else; the entry itself is made in that
//! open directory under one name, which is not followed.

use std::{
    io::{Read, Seek, SeekFrom, Write},
    os::fd::OwnedFd,
};

use bulkhead_agent_api::{AgentError, ErrorKind};
use bulkhead_tar::{Entry, EntryPath, Kind, Reader, shown};
use rustix::{
    fs::{
        AtFlags, Dir, FileType, Gid, Mode, OFlags, StatVfsMountFlags, Timespec, Timestamps, UTIME_NOW, Uid,
    },
    io::Errno,
};

use super::{
    About, Failure, bad_archive,
    pack::MAX_DEPTH,
    root::{self, Root, look_at, open_directory},
    xattrs,
};
use crate::{
    error::{Result, internal, invalid},
    users::Database,
};

/// Bytes of directories' names whose times are set at the end: what comes into them changes them until then.
const MAX_TIMES: usize = 16 << 20;

/// So many zeros of a file and more become a hole.
const HOLE: usize = 4096;

/// How it is unpacked.
#[derive(Clone, Copy)]
pub(super) struct Options<'a> {
    /// Whether a directory must stay one, and everything else must not become one.
    pub(super) keep_kinds: bool,
    /// Docker's `user[:group]` who is to own everything.
    pub(super) owner: Option<&'a str>,
}

/// A directory to unpack in.
pub(super) struct Target<'a> {
    root: &'a Root,
    /// The directory with all links resolved; empty for the root.
    base: Vec<u8>,
    keep_kinds: bool,
    owner: Option<(u32, u32)>,
}

impl<'a> Target<'a> {
    /// Checks that something may be unpacked there.
    pub(super) fn open(
        root: &'a Root,
        path: &str,
        options: Options<'_>,
        read_only_root: bool,
    ) -> Result<Self> {
        let name = path.as_bytes();
        let dir = root.open(name, OFlags::PATH).about("lstat", name)?;
        let found = rustix::fs::fstat(&dir).about("lstat", name)?;
        if FileType::from_raw_mode(found.st_mode) != FileType::Directory {
            return Err(invalid("extraction point is not a directory"));
        }
        let top = root.open(b"", OFlags::PATH).and_then(rustix::fs::fstat).about("lstat", b"/")?;
        let of_the_root = found.st_dev == top.st_dev;
        let flags = rustix::fs::fstatvfs(&dir).about("statfs", name)?.f_flag;
        if flags.contains(StatVfsMountFlags::RDONLY) || (of_the_root && read_only_root) {
            let what = if of_the_root { "container rootfs" } else { "mounted volume" };
            return Err(invalid(format!("{what} is marked read-only")));
        }
        let owner = options.owner.map(|user| Database::read().resolve(user)).transpose()?;
        let owner = owner.map(|identity| (identity.uid, identity.gid));
        let mut base = root.resolve(name)?;
        if base == b"/" {
            base.clear();
        }
        Ok(Self { root, base, keep_kinds: options.keep_kinds, owner })
    }

    /// Unpacks.
    pub(super) fn unpack(&self, archive: impl Read) -> std::result::Result<(), Failure> {
        let mut unpacker = Unpacker {
            target: self,
            current: None,
            times: Vec::new(),
            remembered: 0,
            buffer: vec![0; 64 << 10],
        };
        let mut archive = Reader::new(archive);
        while let Some(entry) = archive.next().map_err(bad_archive)? {
            unpacker.entry(&entry, &mut archive)?;
        }
        unpacker.set_times();
        Ok(())
    }
}

struct Unpacker<'a> {
    target: &'a Target<'a>,
    /// The directory of the last entry.
    current: Option<(EntryPath, OwnedFd)>,
    /// Directories' times.
    times: Vec<(EntryPath, (i64, u32))>,
    remembered: usize,
    buffer: Vec<u8>,
}

impl Unpacker<'_> {
    fn entry<R: Read>(&mut self, entry: &Entry, archive: &mut Reader<R>) -> std::result::Result<(), Failure> {
        let bad = |problem: String| invalid(format!("{:?}: {problem}", shown(&entry.name)));
        let path = EntryPath::clean(&entry.name).map_err(bad)?;
        let Some((parent, name)) = path.split() else {
            // The directory itself, which is as it is.
            return match entry.kind {
                Kind::Directory => Ok(()),
                _ => Err(bad("it would take the place of the directory".into()).into()),
            };
        };
        self.enter(&parent)?;
        let about = |what: &'static str| move |error: Errno| super::failed(what, &entry.name, &error.into());
        let dir = self.dir()?;
        let there = look_at(dir, &name).map_err(about("lstat"))?;
        let there = there.map(|(_, found)| FileType::from_raw_mode(found.st_mode));
        let (was, is) = (there == Some(FileType::Directory), entry.kind == Kind::Directory);
        if self.target.keep_kinds && there.is_some() && was != is {
            let (old, new) =
                if was { ("directory", "non-directory") } else { ("non-directory", "directory") };
            let at = shown(&[&self.target.base[..], b"/", path.as_bytes()].concat());
            let message = format!("cannot overwrite {old} {at:?} with {new} {:?}", shown(&self.target.base));
            return Err(internal(message).into());
        }
        if there.is_some() && !(was && is) {
            remove(dir, &name, 0).map_err(about("unlinkat"))?;
        }
        match &entry.kind {
            Kind::Directory => self.directory(&path, &name, entry, was),
            Kind::File => self.file(&name, entry, archive),
            Kind::HardLink(target) => self.hard_link(&name, entry, target),
            Kind::Symlink(target) => {
                rustix::fs::symlinkat(&target[..], dir, &name[..]).map_err(about("symlink"))?;
                self.finish_small(&name, entry)
            }
            Kind::Fifo => self.node(&name, entry, FileType::Fifo, 0),
            Kind::CharDevice(device) => self.node(
                &name,
                entry,
                FileType::CharacterDevice,
                rustix::fs::makedev(device.major, device.minor),
            ),
            Kind::BlockDevice(device) => self.node(
                &name,
                entry,
                FileType::BlockDevice,
                rustix::fs::makedev(device.major, device.minor),
            ),
        }
    }

    fn directory(
        &mut self,
        path: &EntryPath,
        name: &[u8],
        entry: &Entry,
        there: bool,
    ) -> std::result::Result<(), Failure> {
        let dir = self.dir()?;
        if !there {
            rustix::fs::mkdirat(dir, name, Mode::RWXU).about("mkdir", &entry.name)?;
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let made = rustix::fs::openat(dir, name, flags, Mode::empty()).about("open", &entry.name)?;
        self.set_owner_and_mode(&made, entry)?;
        self.remembered += path.as_bytes().len() + 64;
        self.times.push((path.clone(), entry.mtime));
        if self.remembered > MAX_TIMES {
            // Some may change again; to remember all of them is not possible.
            self.set_times();
        }
        Ok(())
    }

    fn file<R: Read>(
        &mut self,
        name: &[u8],
        entry: &Entry,
        archive: &mut Reader<R>,
    ) -> std::result::Result<(), Failure> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let made = rustix::fs::openat(self.dir()?, name, flags, Mode::RUSR | Mode::WUSR);
        let mut file = root::file(made.about("open", &entry.name)?);
        let size = archive.left();
        let mut buffer = std::mem::take(&mut self.buffer);
        let written = loop {
            let count = match archive.read_data(&mut buffer) {
                Ok(0) => {
                    break file
                        .set_len(size)
                        .map_err(|error| super::failed("truncate", &entry.name, &error).into());
                }
                Ok(count) => count,
                Err(error) => break Err(bad_archive(error)),
            };
            let part = &buffer[..count];
            let done = if count >= HOLE && part.iter().all(|byte| *byte == 0) {
                file.seek(SeekFrom::Current(count as i64)).map(drop)
            } else {
                file.write_all(part)
            };
            if let Err(error) = done {
                break Err(super::failed("write", &entry.name, &error).into());
            }
        };
        self.buffer = buffer;
        written?;
        let file = OwnedFd::from(file);
        self.set_owner_and_mode(&file, entry)?;
        rustix::fs::futimens(&file, &timestamps(entry.mtime)).about("chtimes", &entry.name)?;
        Ok(())
    }

    fn hard_link(&mut self, name: &[u8], entry: &Entry, target: &[u8]) -> std::result::Result<(), Failure> {
        let bad =
            |problem: String| invalid(format!("{:?}: its hard link target: {problem}", shown(&entry.name)));
        let path = EntryPath::clean(target).map_err(bad)?;
        let Some((parent, target_name)) = path.split() else {
            return Err(bad("is the directory".into()).into());
        };
        let from = self.open_below(&parent).about("link", target)?;
        rustix::fs::linkat(from, &target_name[..], self.dir()?, name, AtFlags::empty())
            .about("link", &entry.name)?;
        Ok(())
    }

    fn node(
        &mut self,
        name: &[u8],
        entry: &Entry,
        kind: FileType,
        device: rustix::fs::Dev,
    ) -> std::result::Result<(), Failure> {
        let mode = Mode::from_raw_mode(entry.mode & 0o7777);
        rustix::fs::mknodat(self.dir()?, name, kind, mode, device).about("mknod", &entry.name)?;
        self.finish_small(name, entry)
    }

    /// Owner and times of what cannot be opened.
    fn finish_small(&self, name: &[u8], entry: &Entry) -> std::result::Result<(), Failure> {
        let (uid, gid) = self.owner(entry);
        let dir = self.dir()?;
        rustix::fs::chownat(dir, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW).about("lchown", &entry.name)?;
        rustix::fs::utimensat(dir, name, &timestamps(entry.mtime), AtFlags::SYMLINK_NOFOLLOW)
            .about("chtimes", &entry.name)?;
        Ok(())
    }

    /// In this order: a change of the owner takes capabilities and set-id bits away.
    fn set_owner_and_mode(&self, file: &OwnedFd, entry: &Entry) -> Result<()> {
        let (uid, gid) = self.owner(entry);
        rustix::fs::fchown(file, uid, gid).about("lchown", &entry.name)?;
        xattrs::write(file, &entry.xattrs).about("setxattr", &entry.name)?;
        rustix::fs::fchmod(file, Mode::from_raw_mode(entry.mode & 0o7777)).about("chmod", &entry.name)
    }

    fn owner(&self, entry: &Entry) -> (Option<Uid>, Option<Gid>) {
        let (uid, gid) = self.target.owner.unwrap_or((entry.uid, entry.gid));
        // All bits set is "leave it" to the kernel, and nobody's number.
        let known = |id: u32| (id != u32::MAX).then_some(id);
        (known(uid).map(Uid::from_raw), known(gid).map(Gid::from_raw))
    }

    fn dir(&self) -> Result<&OwnedFd> {
        self.current.as_ref().map(|(_, dir)| dir).ok_or_else(|| internal("no directory was entered"))
    }

    /// Makes an entry's directory the current one, and makes what is missing of it.
    fn enter(&mut self, parent: &EntryPath) -> Result<()> {
        if self.current.as_ref().is_some_and(|(path, _)| path == parent) {
            return Ok(());
        }
        let dir = match self.open_below(parent) {
            Err(Errno::NOENT) => self.make(parent)?,
            other => other.about("open", parent.as_bytes())?,
        };
        self.current = Some((parent.clone(), dir));
        Ok(())
    }

    fn make(&self, path: &EntryPath) -> Result<OwnedFd> {
        let mut done = EntryPath::default();
        let mut dir = self.open_below(&done).about("open", path.as_bytes())?;
        for part in path.components() {
            done.push(part).map_err(invalid)?;
            dir = match self.open_below(&done) {
                Err(Errno::NOENT) => {
                    let mode = Mode::from_raw_mode(0o755);
                    match rustix::fs::mkdirat(&dir, part, mode) {
                        // A link to nothing.
                        Err(Errno::EXIST) => {
                            let message = format!("mkdir {}: file exists", shown(path.as_bytes()));
                            return Err(AgentError { kind: ErrorKind::Internal, message });
                        }
                        made => made.about("mkdir", path.as_bytes())?,
                    }
                    self.open_below(&done).about("open", path.as_bytes())?
                }
                other => other.about("open", path.as_bytes())?,
            };
        }
        Ok(dir)
    }

    fn open_below(&self, path: &EntryPath) -> rustix::io::Result<OwnedFd> {
        let whole = [&self.target.base[..], b"/", path.as_bytes()].concat();
        self.target.root.open(&whole, OFlags::PATH | OFlags::DIRECTORY)
    }

    /// Best effort: a directory may have been moved away by whoever else works there.
    fn set_times(&mut self) {
        for (path, mtime) in self.times.drain(..).rev() {
            if let Ok(dir) = open_for_times(self.target, &path) {
                let _ = rustix::fs::futimens(dir, &timestamps(mtime));
            }
        }
        self.remembered = 0;
    }
}

fn open_for_times(target: &Target<'_>, path: &EntryPath) -> rustix::io::Result<OwnedFd> {
    let whole = [&target.base[..], b"/", path.as_bytes()].concat();
    let dir = target.root.open(&whole, OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW)?;
    open_directory(&dir)
}

fn timestamps((seconds, nanos): (i64, u32)) -> Timestamps {
    Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_NOW },
        last_modification: Timespec { tv_sec: seconds, tv_nsec: nanos.into() },
    }
}

/// Removes what has a name, and all below it.
fn remove(dir: &OwnedFd, name: &[u8], depth: usize) -> rustix::io::Result<()> {
    match rustix::fs::unlinkat(dir, name, AtFlags::empty()) {
        Err(Errno::ISDIR) => {}
        Err(Errno::NOENT) => return Ok(()),
        other => return other,
    }
    if depth > MAX_DEPTH {
        return Err(Errno::NAMETOOLONG);
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let inner = rustix::fs::openat(dir, name, flags, Mode::empty())?;
    let mut items = Dir::read_from(&inner)?;
    while let Some(item) = items.read() {
        let item = item?;
        let below = item.file_name().to_bytes();
        if !matches!(below, b"." | b"..") {
            remove(&inner, below, depth + 1)?;
        }
    }
    rustix::fs::unlinkat(dir, name, AtFlags::REMOVEDIR)
}
