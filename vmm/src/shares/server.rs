//! The operations, on node ids and handles.
//!
//! From the guest come node ids, handles and single names, nothing else that could lead anywhere. A name is used
//! in a directory that is a descriptor, and follows nothing; a node's file is its descriptor, opened for reading or
//! writing through the kernel's own list of this process's descriptors. Who may do what was checked by the
//! guest's kernel; what is made here for a process gets its user and group.

use std::{
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bulkhead_vmm_api::share::Caching;
use rustix::{
    fs::{AtFlags, FileType, Gid, Mode, OFlags, RenameFlags, SeekFrom, Timespec, Timestamps, Uid},
    io::Errno,
};

use super::{
    Result,
    handles::{Handle, Handles, Open},
    index,
    locks::Owners,
    nodes::{Nodes, S_IFDIR, S_IFLNK, S_IFMT, S_IFREG, Stat, open_beneath, open_name},
};
use crate::devices::virtio::fs::{
    directory::{self, Listing},
    server::check_name,
    wire::{Attr, AttrOut, EntryOut, FileLock, InHeader, MknodIn, OpenOut, ROOT_ID, SetattrIn, fattr, fopen},
};

/// The longest symbolic link target.
const MAX_TARGET: usize = 4095;
/// The longest extended attribute and list of their names (`XATTR_SIZE_MAX`, `XATTR_LIST_MAX`).
pub(super) const MAX_XATTR: usize = 64 << 10;

/// How long the guest may keep what it may keep.
const SHORT: Duration = Duration::from_secs(1);

/// A share.
#[derive(Debug)]
pub(super) struct Share {
    pub(super) name: String,
    pub(super) read_only: bool,
    pub(super) caching: Caching,
}

/// The server.
pub(super) struct Server {
    shares: Vec<Share>,
    nodes: Mutex<Nodes>,
    pub(super) handles: Handles,
    pub(super) owners: Owners,
    /// This process's `/proc/self/fd`.
    own_files: OwnedFd,
}

/// A node's file, and where it is.
pub(super) struct Found<'a> {
    pub(super) share: &'a Share,
    index: usize,
    kind: u32,
    pub(super) file: Arc<OwnedFd>,
}

impl Server {
    /// A server of shares with these roots. `own_files` is this process's `/proc/self/fd`.
    pub(super) fn new(
        shares: Vec<(Share, OwnedFd)>,
        own_files: OwnedFd,
        guest_memory: u64,
        open_files: usize,
    ) -> Self {
        let (shares, roots) = shares.into_iter().unzip();
        let nodes = Mutex::new(Nodes::new(roots, guest_memory, open_files));
        Self { shares, nodes, handles: Handles::default(), owners: Owners::default(), own_files }
    }

    /// Forgets all that the guest knew: it begins anew, or is gone.
    pub(super) fn forget_all(&self) {
        self.nodes().clear();
        self.handles.clear();
        self.owners.clear();
    }

    fn nodes(&self) -> MutexGuard<'_, Nodes> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A node's file.
    pub(super) fn node(&self, id: u64) -> Result<Found<'_>> {
        if id == ROOT_ID {
            // Nothing is done with the list of shares but to list it.
            return Err(Errno::PERM);
        }
        let mut nodes = self.nodes();
        let (index, kind) = nodes.get(id)?;
        let file = nodes.file(id)?;
        let share = self.shares.get(index).ok_or(Errno::STALE)?;
        Ok(Found { share, index, kind, file })
    }

    /// A directory in which something is about to be changed.
    fn writable_directory(&self, id: u64, name: &[u8]) -> Result<Found<'_>> {
        check_name(name)?;
        let found = self.directory(id)?;
        if found.share.read_only { Err(Errno::ROFS) } else { Ok(found) }
    }

    fn directory(&self, id: u64) -> Result<Found<'_>> {
        Some(self.node(id)?).filter(|found| found.kind == S_IFDIR).ok_or(Errno::NOTDIR)
    }

    /// A node that is about to be changed.
    fn writable(&self, id: u64) -> Result<Found<'_>> {
        Some(self.node(id)?).filter(|found| !found.share.read_only).ok_or(Errno::ROFS)
    }

    /// LOOKUP.
    pub(super) fn look_up(&self, parent: u64, name: &[u8]) -> Result<EntryOut> {
        check_name(name)?;
        if parent == ROOT_ID {
            let index = self.shares.iter().position(|share| share.name.as_bytes() == name);
            return self.enter_share(index.ok_or(Errno::NOENT)?);
        }
        let found = self.directory(parent)?;
        match open_name(&*found.file, name) {
            Ok(file) => self.remember(&found, parent, name, file),
            // In a directory that was removed there is nothing; but there may be another of its name.
            Err(Errno::NOENT) => self.still_there(parent, &Stat::of(&*found.file)?).and(Err(Errno::NOENT)),
            Err(errno) => Err(errno),
        }
    }

    fn enter_share(&self, index: usize) -> Result<EntryOut> {
        let share = self.shares.get(index).ok_or(Errno::NOENT)?;
        let mut nodes = self.nodes();
        let root = nodes.root(index)?;
        let stat = Stat::of(&*root)?;
        let id = nodes.found(index, ROOT_ID, b"", &stat)?;
        Ok(entry(id, share, &mut nodes, &stat))
    }

    /// Makes a node of a file that was found or made.
    fn remember(&self, parent: &Found<'_>, id: u64, name: &[u8], file: OwnedFd) -> Result<EntryOut> {
        let stat = Stat::of(&file)?;
        let mut nodes = self.nodes();
        let node = nodes.found(parent.index, id, name, &stat)?;
        nodes.keep_open(node, file);
        Ok(entry(node, parent.share, &mut nodes, &stat))
    }

    /// FORGET.
    pub(super) fn forget(&self, node: u64, count: u64) {
        self.nodes().forget(node, count);
    }

    /// GETATTR, and the time of birth.
    pub(super) fn attributes(&self, node: u64, handle: Option<u64>) -> Result<(AttrOut, Option<(i64, u32)>)> {
        if node == ROOT_ID {
            return Ok((AttrOut { attr: self.root_attr(), ..AttrOut::default() }, None));
        }
        // An open file is still there when its name is not.
        let handle = handle.and_then(|number| self.handles.get(number, node).ok());
        let (share, stat) = match handle.as_deref().map(|handle| (&handle.open, self.nodes().get(node))) {
            Some((Open::File(file), Ok((share, _)))) => (self.shares.get(share), Stat::of(file)?),
            _ => {
                let found = self.node(node)?;
                let stat = Stat::of(&*found.file)?;
                self.still_there(node, &stat)?;
                (Some(found.share), stat)
            }
        };
        Ok((self.told(share.ok_or(Errno::STALE)?, &stat), stat.born))
    }

    /// Checks that a file which the guest knows by a name has one. Where somebody else has removed or replaced it, the
    /// guest's name is out of date: at ESTALE its kernel looks it up again, and goes on with what is there now.
    fn still_there(&self, node: u64, stat: &Stat) -> Result<()> {
        let gone = stat.attr.nlink == 0 && !self.nodes().may_be_nameless(node) && !self.handles.has(node);
        if gone { Err(Errno::STALE) } else { Ok(()) }
    }

    fn told(&self, share: &Share, stat: &Stat) -> AttrOut {
        let attr = Attr { ino: self.nodes().inode_number(stat), ..stat.attr };
        AttrOut { attr_valid: attributes_valid(share, stat).as_secs(), attr, ..AttrOut::default() }
    }

    fn root_attr(&self) -> Attr {
        let nlink = u32::try_from(self.shares.len() + 2).unwrap_or(u32::MAX);
        Attr { ino: ROOT_ID, mode: S_IFDIR | 0o555, nlink, blksize: 4096, ..Attr::default() }
    }

    /// SETATTR.
    pub(super) fn set_attributes(&self, node: u64, set: &SetattrIn) -> Result<AttrOut> {
        let found = self.writable(node)?;
        let has = |flag: u32| set.valid & flag != 0;
        let handle = if has(fattr::FH) { self.handles.get(set.fh, node).ok() } else { None };
        if has(fattr::UID | fattr::GID) {
            let owner = has(fattr::UID).then(|| Uid::from_raw(set.uid));
            let group = has(fattr::GID).then(|| Gid::from_raw(set.gid));
            rustix::fs::chownat(&*found.file, c"", owner, group, AtFlags::EMPTY_PATH)?;
        }
        // After the owner, whose change takes rights away.
        if has(fattr::MODE) {
            if found.kind == S_IFLNK {
                return Err(Errno::OPNOTSUPP);
            }
            let mode = Mode::from_raw_mode(set.mode & 0o7777);
            rustix::fs::chmodat(&self.own_files, number(&found.file), mode, AtFlags::empty())?;
        }
        if has(fattr::SIZE) {
            if found.kind != S_IFREG {
                return Err(Errno::INVAL);
            }
            match handle.as_deref().map(Handle::file) {
                Some(Ok(file)) => rustix::fs::ftruncate(file, set.size)?,
                _ => rustix::fs::ftruncate(self.open_again(&found.file, OFlags::WRONLY)?, set.size)?,
            }
        }
        if has(fattr::ATIME | fattr::MTIME | fattr::ATIME_NOW | fattr::MTIME_NOW) {
            let time = |value, now, seconds: u64, nanos: u32| {
                let nanos = match (has(now), has(value)) {
                    (true, _) => rustix::fs::UTIME_NOW,
                    (false, true) => nanos.into(),
                    (false, false) => rustix::fs::UTIME_OMIT,
                };
                Timespec { tv_sec: seconds.cast_signed(), tv_nsec: nanos }
            };
            let times = Timestamps {
                last_access: time(fattr::ATIME, fattr::ATIME_NOW, set.atime, set.atimensec),
                last_modification: time(fattr::MTIME, fattr::MTIME_NOW, set.mtime, set.mtimensec),
            };
            rustix::fs::utimensat(&self.own_files, number(&found.file), &times, AtFlags::empty())?;
        }
        Ok(self.told(found.share, &Stat::of(&*found.file)?))
    }

    /// READLINK.
    pub(super) fn read_link(&self, node: u64) -> Result<Vec<u8>> {
        let found = self.node(node)?;
        if found.kind != S_IFLNK {
            return Err(Errno::INVAL);
        }
        let mut target = rustix::fs::readlinkat(&*found.file, c"", Vec::new())?.into_bytes();
        target.truncate(MAX_TARGET);
        Ok(target)
    }

    /// MKNOD.
    pub(super) fn make_node(&self, by: &InHeader, asked: &MknodIn, name: &[u8]) -> Result<EntryOut> {
        let parent = self.writable_directory(by.nodeid, name)?;
        let kind = FileType::from_raw_mode(asked.mode);
        // Devices are no affair of a share's; 0:0 is overlayfs's mark of what was removed.
        match kind {
            FileType::RegularFile | FileType::Fifo | FileType::Socket => {}
            FileType::CharacterDevice if asked.rdev == 0 => {}
            _ => return Err(Errno::PERM),
        }
        let mode = Mode::from_raw_mode(asked.mode & 0o777);
        rustix::fs::mknodat(&*parent.file, name, kind, mode, 0)?;
        self.made(&parent, by, name, asked.mode)
    }

    /// MKDIR.
    pub(super) fn make_directory(&self, by: &InHeader, mode: u32, name: &[u8]) -> Result<EntryOut> {
        let parent = self.writable_directory(by.nodeid, name)?;
        rustix::fs::mkdirat(&*parent.file, name, Mode::from_raw_mode(mode & 0o1777))?;
        self.made(&parent, by, name, 0)
    }

    /// SYMLINK.
    pub(super) fn make_link(&self, by: &InHeader, name: &[u8], target: &[u8]) -> Result<EntryOut> {
        if target.is_empty() || target.len() > MAX_TARGET {
            return Err(if target.is_empty() { Errno::NOENT } else { Errno::NAMETOOLONG });
        }
        let parent = self.writable_directory(by.nodeid, name)?;
        rustix::fs::symlinkat(target, &*parent.file, name)?;
        self.made(&parent, by, name, 0)
    }

    /// Gives what was just made its owner, and the rights that making it did not.
    fn made(&self, parent: &Found<'_>, by: &InHeader, name: &[u8], mode: u32) -> Result<EntryOut> {
        let file = open_name(&*parent.file, name)?;
        self.own(parent, by, &file)?;
        if mode & 0o7000 != 0 && mode & S_IFMT != S_IFLNK {
            let rights = Mode::from_raw_mode(mode & 0o7777);
            rustix::fs::chmodat(&self.own_files, number(&file), rights, AtFlags::empty())?;
        }
        self.remember(parent, by.nodeid, name, file)
    }

    /// Gives a new file to who made it, unless its directory says whose group it is.
    fn own(&self, parent: &Found<'_>, by: &InHeader, file: &OwnedFd) -> Result<()> {
        let inherited = Stat::of(&*parent.file)?.attr.mode & 0o2000 != 0;
        let group = (!inherited).then(|| Gid::from_raw(by.gid));
        rustix::fs::chownat(file, c"", Some(Uid::from_raw(by.uid)), group, AtFlags::EMPTY_PATH)
    }

    /// LINK.
    pub(super) fn link(&self, parent: u64, old: u64, name: &[u8]) -> Result<EntryOut> {
        let directory = self.writable_directory(parent, name)?;
        let file = self.node(old)?;
        if file.index != directory.index {
            return Err(Errno::XDEV);
        }
        if file.kind == S_IFDIR {
            return Err(Errno::PERM);
        }
        let follow = AtFlags::SYMLINK_FOLLOW;
        rustix::fs::linkat(&self.own_files, number(&file.file), &*directory.file, name, follow)?;
        self.remember(&directory, parent, name, open_name(&*directory.file, name)?)
    }

    /// UNLINK and RMDIR.
    pub(super) fn remove(&self, parent: u64, name: &[u8], directory: bool) -> Result<()> {
        let found = self.writable_directory(parent, name)?;
        let flags = if directory { AtFlags::REMOVEDIR } else { AtFlags::empty() };
        // One after the other: what lies where is only known while nobody moves it.
        let mut nodes = self.nodes();
        let stat = Stat::of_name(&*found.file, name)?;
        let node = nodes.before_removal(found.index, &stat);
        rustix::fs::unlinkat(&*found.file, name, flags)?;
        if let Some(node) = node {
            nodes.removed(node, parent, name);
        }
        Ok(())
    }

    /// RENAME and RENAME2.
    pub(super) fn rename(&self, from: (u64, &[u8]), to: (u64, &[u8]), flags: u32) -> Result<()> {
        let flags = RenameFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        let (source, target) =
            (self.writable_directory(from.0, from.1)?, self.writable_directory(to.0, to.1)?);
        if source.index != target.index {
            return Err(Errno::XDEV);
        }
        let mut nodes = self.nodes();
        let moved = Stat::of_name(&*source.file, from.1)?;
        let moved = nodes.before_removal(source.index, &moved);
        let there = Stat::of_name(&*target.file, to.1).ok();
        let there = there.and_then(|stat| nodes.before_removal(target.index, &stat));
        rustix::fs::renameat_with(&*source.file, from.1, &*target.file, to.1, flags)?;
        // Two names of one file: both stay.
        if moved.is_some() && moved == there {
            return Ok(());
        }
        if let Some(there) = there {
            if flags.contains(RenameFlags::EXCHANGE) {
                nodes.renamed(there, to, from);
            } else {
                nodes.removed(there, to.0, to.1);
            }
        }
        if let Some(moved) = moved {
            nodes.renamed(moved, from, to);
        }
        Ok(())
    }

    /// OPEN.
    pub(super) fn open(&self, node: u64, flags: u32) -> Result<OpenOut> {
        let found = self.node(node)?;
        if found.kind != S_IFREG {
            return Err(if found.kind == S_IFDIR { Errno::ISDIR } else { Errno::NXIO });
        }
        let flags = open_flags(flags);
        if found.share.read_only && writes(flags) {
            return Err(Errno::ROFS);
        }
        self.still_there(node, &Stat::of(&*found.file)?)?;
        let file = self.open_again(&found.file, flags)?;
        self.opened(found.share, node, file)
    }

    fn opened(&self, share: &Share, node: u64, file: OwnedFd) -> Result<OpenOut> {
        let fh = self.handles.insert(node, Open::File(file))?;
        let open_flags = match share.caching {
            Caching::Consistent => fopen::DIRECT_IO | fopen::PARALLEL_DIRECT_WRITES,
            Caching::Cached => 0,
        };
        Ok(OpenOut { fh, open_flags, backing_id: 0 })
    }

    /// OPENDIR.
    pub(super) fn open_directory(&self, node: u64) -> Result<OpenOut> {
        let open = if node == ROOT_ID {
            Open::Root
        } else {
            let found = self.directory(node)?;
            let flags = OFlags::RDONLY | OFlags::DIRECTORY;
            Open::Directory(Mutex::new(open_beneath(&*found.file, b".", flags, 0)?))
        };
        Ok(OpenOut { fh: self.handles.insert(node, open)?, ..OpenOut::default() })
    }

    /// CREATE.
    pub(super) fn create(
        &self,
        by: &InHeader,
        flags: u32,
        mode: u32,
        name: &[u8],
    ) -> Result<(EntryOut, OpenOut)> {
        let parent = self.writable_directory(by.nodeid, name)?;
        let exclusive = OFlags::from_bits_retain(flags).contains(OFlags::EXCL);
        let flags = open_flags(flags);
        let new = flags | OFlags::CREATE | OFlags::EXCL;
        match open_beneath(&*parent.file, name, new, mode & 0o777) {
            Ok(file) => {
                self.own(&parent, by, &file)?;
                if mode & 0o7000 != 0 {
                    rustix::fs::fchmod(&file, Mode::from_raw_mode(mode & 0o7777))?;
                }
                let entry = self.remember(&parent, by.nodeid, name, self.path_of(&file)?)?;
                let opened = self.opened(parent.share, entry.nodeid, file);
                Ok((entry, opened.inspect_err(|_| self.forget(entry.nodeid, 1))?))
            }
            Err(Errno::EXIST) if !exclusive => {
                let entry = self.look_up(by.nodeid, name)?;
                let opened = self.open(entry.nodeid, flags.bits());
                Ok((entry, opened.inspect_err(|_| self.forget(entry.nodeid, 1))?))
            }
            Err(errno) => Err(errno),
        }
    }

    /// TMPFILE: a file without a name, which may get one by LINK.
    pub(super) fn create_nameless(
        &self,
        by: &InHeader,
        flags: u32,
        mode: u32,
    ) -> Result<(EntryOut, OpenOut)> {
        let parent = self.writable_directory(by.nodeid, b"nameless")?;
        let exclusive = OFlags::from_bits_retain(flags) & OFlags::EXCL;
        let flags = open_flags(flags) - OFlags::TRUNC;
        let file = open_beneath(&*parent.file, b".", flags | exclusive | OFlags::TMPFILE, mode & 0o777)?;
        self.own(&parent, by, &file)?;
        if mode & 0o7000 != 0 {
            rustix::fs::fchmod(&file, Mode::from_raw_mode(mode & 0o7777))?;
        }
        let stat = Stat::of(&file)?;
        let entry = {
            let held = self.path_of(&file)?;
            let mut nodes = self.nodes();
            let node = nodes.found(parent.index, by.nodeid, b"", &stat)?;
            nodes.keep_open(node, held);
            nodes.lose(node);
            entry(node, parent.share, &mut nodes, &stat)
        };
        let opened = self.opened(parent.share, entry.nodeid, file);
        Ok((entry, opened.inspect_err(|_| self.forget(entry.nodeid, 1))?))
    }

    /// Opens a file that is open, as another open file.
    pub(super) fn open_again(&self, file: &OwnedFd, flags: OFlags) -> Result<OwnedFd> {
        let flags = flags | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
        rustix::fs::openat(&self.own_files, number(file), flags, Mode::empty())
    }

    fn path_of(&self, file: &OwnedFd) -> Result<OwnedFd> {
        rustix::fs::openat(&self.own_files, number(file), OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
    }

    /// For STATFS and SYNCFS: the share's file.
    pub(super) fn sync(&self, node: u64) -> Result<()> {
        if node != ROOT_ID {
            let found = self.node(node)?;
            return self.sync_share(found.share, &found.file, found.kind);
        }
        for (index, share) in self.shares.iter().enumerate() {
            let root = self.nodes().root(index)?;
            let kind = Stat::of(&*root)?.kind();
            self.sync_share(share, &root, kind)?;
        }
        Ok(())
    }

    fn sync_share(&self, share: &Share, file: &OwnedFd, kind: u32) -> Result<()> {
        if share.read_only || !matches!(kind, S_IFDIR | S_IFREG) {
            return Ok(());
        }
        rustix::fs::syncfs(self.open_again(file, OFlags::RDONLY)?)
    }

    /// An extended attribute's value.
    pub(super) fn xattr(&self, node: u64, name: &[u8]) -> Result<Vec<u8>> {
        let file = self.with_xattrs(node, false)?.ok_or(Errno::NODATA)?;
        let mut value = vec![0; MAX_XATTR];
        let length = rustix::fs::fgetxattr(&file, name, &mut value[..])?;
        value.truncate(length);
        Ok(value)
    }

    /// The names of all extended attributes.
    pub(super) fn xattr_names(&self, node: u64) -> Result<Vec<u8>> {
        let Some(file) = self.with_xattrs(node, false)? else { return Ok(Vec::new()) };
        let mut names = vec![0; MAX_XATTR];
        let length = rustix::fs::flistxattr(&file, &mut names[..])?;
        names.truncate(length);
        Ok(names)
    }

    /// SETXATTR, and REMOVEXATTR where there is no value.
    pub(super) fn set_xattr(&self, node: u64, name: &[u8], value: Option<(&[u8], u32)>) -> Result<()> {
        let file = self.with_xattrs(node, true)?.ok_or(Errno::PERM)?;
        match value {
            None => rustix::fs::fremovexattr(&file, name),
            Some((value, flags)) => {
                let flags = rustix::fs::XattrFlags::from_bits(flags).ok_or(Errno::INVAL)?;
                rustix::fs::fsetxattr(&file, name, value, flags)
            }
        }
    }

    /// A node open for its extended attributes; None where it is of a kind that cannot be opened for them.
    fn with_xattrs(&self, node: u64, write: bool) -> Result<Option<OwnedFd>> {
        if node == ROOT_ID {
            return Ok(None);
        }
        let found = if write { self.writable(node)? } else { self.node(node)? };
        if !matches!(found.kind, S_IFREG | S_IFDIR) {
            return Ok(None);
        }
        self.open_again(&found.file, OFlags::RDONLY).map(Some)
    }

    /// Whether it is SQLite's lock of an index, see [`super::index`].
    pub(super) fn is_index_lock(&self, node: u64, lock: &FileLock) -> bool {
        index::is_meant(lock)
            && self.nodes().name_ends_with(node, index::SUFFIX)
            && self.node(node).is_ok_and(|found| !found.share.read_only)
    }

    /// For a process's locks: the file opened once more.
    pub(super) fn open_for_locks(&self, node: u64) -> Result<OwnedFd> {
        let found = self.node(node)?;
        if found.kind != S_IFREG {
            return Err(Errno::INVAL);
        }
        match self.open_again(&found.file, OFlags::RDWR) {
            Err(Errno::ROFS | Errno::ACCESS | Errno::PERM | Errno::TXTBSY) => {
                self.open_again(&found.file, OFlags::RDONLY)
            }
            opened => opened,
        }
    }

    /// READDIR, and READDIRPLUS when `plus` is set: the entries from a cookie on, as many as have room. The
    /// cookies are the host directory's own.
    pub(super) fn read_directory(
        &self,
        node: u64,
        handle: u64,
        cookie: u64,
        room: usize,
        plus: bool,
    ) -> Result<Vec<u8>> {
        let handle = self.handles.get(handle, node)?;
        let mut listing = Listing::new(room, plus);
        let directory = match &handle.open {
            Open::File(_) => return Err(Errno::NOTDIR),
            Open::Root => {
                self.list_shares(cookie, &mut listing);
                return Ok(listing.finish());
            }
            Open::Directory(directory) => directory.lock().unwrap_or_else(PoisonError::into_inner),
        };
        let (index, is_share_root) = {
            let nodes = self.nodes();
            (nodes.get(node)?.0, nodes.is_share_root(node))
        };
        let share = self.shares.get(index).ok_or(Errno::STALE)?;
        if i64::try_from(cookie).is_err() {
            return Err(Errno::INVAL);
        }
        rustix::fs::seek(&*directory, SeekFrom::Start(cookie)).map_err(|_| Errno::INVAL)?;
        let own = Stat::of(&*directory)?;
        let mut anything = false;
        directory::for_each(directory.as_fd(), room, |host| {
            let (name, cookie) = (host.name, host.cookie);
            anything = true;
            if !listing.has_room(name) {
                return false;
            }
            let kind = host.kind.as_raw_mode() & S_IFMT;
            if name == b"." || name == b".." {
                let above = name == b".." && is_share_root;
                let ino = if above { ROOT_ID } else { self.nodes().inode_beside(&own, host.inode) };
                return listing.add(None, ino, cookie, name, S_IFDIR);
            }
            if plus && let Ok(stat) = Stat::of_name(&*directory, name) {
                let mut nodes = self.nodes();
                if let Ok(id) = nodes.found(index, node, name, &stat) {
                    let entry = entry(id, share, &mut nodes, &stat);
                    return listing.add(Some(entry), entry.attr.ino, cookie, name, stat.kind());
                }
            }
            let ino = self.nodes().inode_beside(&own, host.inode);
            listing.add(None, ino, cookie, name, kind)
        })?;
        let entries = listing.finish();
        // Nothing would say that the directory ends here.
        if anything && entries.is_empty() { Err(Errno::INVAL) } else { Ok(entries) }
    }

    fn list_shares(&self, cookie: u64, listing: &mut Listing) {
        for (position, name) in (1..).zip([".", ".."]) {
            if cookie < position && !listing.add(None, ROOT_ID, position, name.as_bytes(), S_IFDIR) {
                return;
            }
        }
        for (index, share) in self.shares.iter().enumerate() {
            let position = index as u64 + 3;
            if position <= cookie {
                continue;
            }
            if !listing.has_room(share.name.as_bytes()) {
                return;
            }
            let entry = listing.wants_entries().then(|| self.enter_share(index).ok()).flatten();
            let (ino, kind) = entry.map_or((position, 0), |entry| (entry.attr.ino, entry.attr.mode & S_IFMT));
            listing.add(entry, ino, position, share.name.as_bytes(), kind);
        }
    }

    #[cfg(test)]
    pub(super) fn known(&self) -> usize {
        self.nodes().len()
    }
}

fn entry(nodeid: u64, share: &Share, nodes: &mut Nodes, stat: &Stat) -> EntryOut {
    EntryOut {
        nodeid,
        entry_valid: SHORT.as_secs(),
        attr_valid: attributes_valid(share, stat).as_secs(),
        attr: Attr { ino: nodes.inode_number(stat), ..stat.attr },
        ..EntryOut::default()
    }
}

/// Sizes and times of files are asked for each time where others may write them. What directories are holds for
/// as long as their names do: each step of a path would be a request otherwise.
fn attributes_valid(share: &Share, stat: &Stat) -> Duration {
    match share.caching {
        Caching::Consistent if stat.kind() != S_IFDIR => Duration::ZERO,
        _ => SHORT,
    }
}

/// What of a guest's flags is passed on. Appending is each write's own affair.
fn open_flags(flags: u32) -> OFlags {
    const PASSED: OFlags = OFlags::RWMODE.union(OFlags::TRUNC).union(OFlags::SYNC).union(OFlags::DSYNC);
    OFlags::from_bits_retain(flags) & PASSED
}

fn writes(flags: OFlags) -> bool {
    flags & OFlags::RWMODE != OFlags::RDONLY || flags.contains(OFlags::TRUNC)
}

/// A descriptor's name in `/proc/self/fd`.
fn number(file: &OwnedFd) -> String {
    file.as_raw_fd().to_string()
}
