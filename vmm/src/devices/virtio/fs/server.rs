//! The file server: shares, what the guest knows of them, and the operations on both.
//!
//! ```text
//!  node 1 (synthetic, lists the shares)
//!    ├─ <share name>/  ─ Backend for its ShareKind ─ O_PATH root of the host
//!    └─ …
//! ```
//!
//! From the guest come node ids and single names, nothing else that could lead anywhere: a node's path is
//! known here, and every file is opened beneath its share's root.

use std::{
    collections::BTreeMap,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rustix::{
    fs::{FileType, SeekFrom},
    io::Errno,
};

use super::{
    backend::{Backend, Result, S_IFDIR, S_IFLNK, S_IFMT, S_IFREG, Stat},
    directory::{self, Listing},
    files::OpenFiles,
    inodes::{Inodes, Node, ShareId, budget},
    mapping::Mappings,
    shares::{Share, open_in},
    wire::{Attr, AttrOut, EntryOut, MAX_NAME, ROOT_ID},
};

/// The server of one device.
pub(super) struct Server {
    pub(super) shares: BTreeMap<ShareId, Share>,
    pub(super) last_share: ShareId,
    pub(super) inodes: Inodes,
    files: OpenFiles,
    pub(super) mappings: Mappings,
    /// The host's devices in the order they were met: their inode numbers must not meet in the guest.
    devices: Vec<u64>,
    /// When the set of shares changed last, since the epoch.
    pub(super) changed: Duration,
}

impl Server {
    pub(super) fn new() -> Self {
        Self {
            shares: BTreeMap::new(),
            last_share: 0,
            inodes: Inodes::new(budget(u64::MAX)),
            files: OpenFiles::within_limit(),
            mappings: Mappings::default(),
            devices: Vec::new(),
            changed: now(),
        }
    }

    /// Tells how much memory the guest has: what is kept of its knowledge is bounded by that.
    pub(super) fn serve_guest_of(&mut self, memory: u64) {
        self.inodes.set_budget(budget(memory));
    }

    /// Forgets all that the guest knew: it begins anew, or is gone.
    pub(super) fn forget_all(&mut self) {
        self.inodes.clear();
        self.files.clear();
        self.mappings.clear();
        self.shares.retain(|_, share| share.attached);
    }

    /// LOOKUP: node id 0 in the answer says that there is no such name, and for how long that is sure.
    pub(super) fn look_up(&mut self, parent: u64, name: &[u8]) -> Result<EntryOut> {
        check_name(name)?;
        if parent == ROOT_ID {
            let found = std::str::from_utf8(name).ok().and_then(|name| self.share_named(name));
            return self.enter_share(found.ok_or(Errno::NOENT)?);
        }
        let node = self.directory(parent)?;
        let (share_id, dir) = (node.share, self.open(parent)?);
        let share = self.shares.get(&share_id).filter(|share| share.attached).ok_or(Errno::NOENT)?;
        let backend = share.backend;
        match backend.open(dir.as_fd(), name) {
            Ok(file) => {
                let stat = backend.stat(file.as_fd())?;
                let entry = self.found(share_id, parent, name, &stat, backend.validity())?;
                self.files.insert(entry.nodeid, Arc::new(file));
                Ok(entry)
            }
            Err(Errno::NOENT) => {
                let (entry_valid, entry_valid_nsec) = validity(backend.validity());
                Ok(EntryOut { entry_valid, entry_valid_nsec, ..EntryOut::default() })
            }
            Err(errno) => Err(errno),
        }
    }

    /// FORGET.
    pub(super) fn forget(&mut self, node: u64, count: u64) {
        let files = &mut self.files;
        let mut share = None;
        self.inodes.forget(node, count, |gone, node| {
            files.remove(gone);
            share = Some(node.share);
        });
        if let Some(share) = share {
            self.drop_if_unused(share);
        }
    }

    /// GETATTR.
    pub(super) fn attributes(&mut self, node: u64) -> Result<AttrOut> {
        if node == ROOT_ID {
            return Ok(AttrOut { attr: self.root_attr(), ..AttrOut::default() });
        }
        let (backend, file) = self.file(node)?;
        let stat = backend.stat(file.as_fd())?;
        let (attr_valid, attr_valid_nsec) = validity(backend.validity());
        let attr = self.guest_attr(&stat);
        Ok(AttrOut { attr_valid, attr_valid_nsec, dummy: 0, attr })
    }

    /// READLINK.
    pub(super) fn read_link(&mut self, node: u64) -> Result<Vec<u8>> {
        if self.node(node)?.kind != S_IFLNK {
            return Err(Errno::INVAL);
        }
        let (backend, file) = self.file(node)?;
        backend.read_link(file.as_fd())
    }

    /// For READ: the file to read from.
    pub(super) fn regular_file(&mut self, node: u64) -> Result<Arc<OwnedFd>> {
        match self.node(node)?.kind {
            S_IFREG => self.open(node),
            S_IFDIR => Err(Errno::ISDIR),
            _ => Err(Errno::INVAL),
        }
    }

    /// LSEEK: where the next data or the next hole begins.
    pub(super) fn seek(&mut self, node: u64, offset: u64, whence: u32) -> Result<u64> {
        const SEEK_DATA: u32 = 3;
        const SEEK_HOLE: u32 = 4;
        let target = match whence {
            SEEK_DATA => SeekFrom::Data(offset),
            SEEK_HOLE => SeekFrom::Hole(offset),
            _ => return Err(Errno::INVAL),
        };
        if i64::try_from(offset).is_err() {
            return Err(Errno::INVAL);
        }
        rustix::fs::seek(&*self.regular_file(node)?, target)
    }

    /// GETXATTR. Overlayfs asks each file that it meets for one, so those without any are not opened for it.
    pub(super) fn xattr(&mut self, node: u64, name: &[u8]) -> Result<Vec<u8>> {
        if node == ROOT_ID || self.node(node)?.bare {
            return Err(Errno::NODATA);
        }
        let (backend, file) = self.file(node)?;
        backend.xattr(file.as_fd(), name)
    }

    /// LISTXATTR.
    pub(super) fn xattr_names(&mut self, node: u64) -> Result<Vec<u8>> {
        if node == ROOT_ID || self.node(node)?.bare {
            return Ok(Vec::new());
        }
        let (backend, file) = self.file(node)?;
        backend.xattr_names(file.as_fd())
    }

    /// ACCESS and the like: whether the node is known.
    pub(super) fn check_known(&self, node: u64) -> Result<()> {
        if node == ROOT_ID { Ok(()) } else { self.node(node).map(|_| ()) }
    }

    /// READDIR, and READDIRPLUS when `plus` is set: the entries from a cookie on, as many as have room.
    ///
    /// The cookies are the host directory's own, which stay the same as long as it does not change.
    pub(super) fn read_directory(
        &mut self,
        node: u64,
        cookie: u64,
        room: usize,
        plus: bool,
    ) -> Result<Vec<u8>> {
        let mut listing = Listing::new(room, plus);
        if node == ROOT_ID {
            self.list_shares(cookie, &mut listing);
            return Ok(listing.finish());
        }
        let known = self.directory(node)?;
        let (share_id, is_share_root) = (known.share, known.parent == ROOT_ID);
        let (backend, dir) = self.file(node)?;
        if i64::try_from(cookie).is_err() {
            return Err(Errno::INVAL);
        }
        rustix::fs::seek(&*dir, SeekFrom::Start(cookie)).map_err(|_| Errno::INVAL)?;
        let device = rustix::fs::fstat(&*dir).map_err(|_| Errno::IO)?.st_dev;
        let mut anything = false;
        directory::for_each(dir.as_fd(), room, |host| {
            let (name, cookie) = (host.name, host.cookie);
            anything = true;
            if !listing.has_room(name) {
                return false;
            }
            if name == b"." || name == b".." {
                let above = name == b".." && is_share_root;
                let ino = if above { ROOT_ID } else { self.inode_number(device, host.inode) };
                return listing.add(None, ino, cookie, name, S_IFDIR);
            }
            if plus && let Some((entry, kind)) = self.entry(share_id, node, &dir, name) {
                return listing.add(Some(entry), entry.attr.ino, cookie, name, kind);
            }
            // Of a file that cannot be read the name alone is told: using it gives the error.
            let kind = backend.kind(dir.as_fd(), name, host.kind).unwrap_or(0);
            listing.add(None, self.inode_number(device, host.inode), cookie, name, kind)
        })?;
        let entries = listing.finish();
        // Nothing would say that the directory ends here.
        if anything && entries.is_empty() { Err(Errno::INVAL) } else { Ok(entries) }
    }

    /// For READDIRPLUS: looks up a name of an open directory. Not kept open: a listing would drive out
    /// everything else.
    fn entry(&mut self, share: ShareId, parent: u64, dir: &OwnedFd, name: &[u8]) -> Option<(EntryOut, u32)> {
        let attached = self.shares.get(&share).filter(|share| share.attached)?;
        let backend = attached.backend;
        let stat = backend.stat(backend.open(dir.as_fd(), name).ok()?.as_fd()).ok()?;
        let entry = self.found(share, parent, name, &stat, backend.validity()).ok()?;
        Some((entry, stat.attr.mode & S_IFMT))
    }

    fn list_shares(&mut self, cookie: u64, listing: &mut Listing) {
        for (position, name) in [(1, "."), (2, "..")] {
            if cookie < position && !listing.add(None, ROOT_ID, position, name.as_bytes(), S_IFDIR) {
                return;
            }
        }
        let visible = self.shares.iter().filter(|(_, share)| share.attached);
        let names: Vec<_> = visible.map(|(&id, share)| (id, share.name.clone())).collect();
        for (id, name) in names {
            let position = u64::from(id) + 2;
            if position <= cookie {
                continue;
            }
            if !listing.has_room(name.as_bytes()) {
                return;
            }
            let entry = listing.wants_entries().then(|| self.enter_share(id).ok()).flatten();
            let ino = entry.map_or(position, |entry| entry.attr.ino);
            listing.add(entry, ino, position, name.as_bytes(), S_IFDIR);
        }
    }

    /// Looks up a share's root. Its name may vanish, so it is never cached.
    fn enter_share(&mut self, id: ShareId) -> Result<EntryOut> {
        let share = self.shares.get(&id).ok_or(Errno::NOENT)?;
        let backend = share.backend;
        let root = open_in(share, b".")?;
        let stat = backend.stat(root.as_fd())?;
        let mut entry = self.found(id, ROOT_ID, b"", &stat, backend.validity())?;
        (entry.entry_valid, entry.entry_valid_nsec) = (0, 0);
        Ok(entry)
    }

    /// Makes a node of a file that was found.
    fn found(
        &mut self,
        share: ShareId,
        parent: u64,
        name: &[u8],
        stat: &Stat,
        valid: Duration,
    ) -> Result<EntryOut> {
        let kind = stat.attr.mode & S_IFMT;
        let nodeid = self.inodes.found(share, parent, name, stat.inode, kind).map_err(|_| Errno::NFILE)?;
        if stat.bare {
            self.inodes.mark_bare(nodeid);
        }
        let (seconds, nanos) = validity(valid);
        Ok(EntryOut {
            nodeid,
            generation: 0,
            entry_valid: seconds,
            attr_valid: seconds,
            entry_valid_nsec: nanos,
            attr_valid_nsec: nanos,
            attr: self.guest_attr(stat),
        })
    }

    fn node(&self, id: u64) -> Result<&Node> {
        self.inodes.get(id).ok_or(Errno::STALE)
    }

    fn directory(&self, id: u64) -> Result<&Node> {
        Some(self.node(id)?).filter(|node| node.kind == S_IFDIR).ok_or(Errno::NOTDIR)
    }

    /// A node's file and who reads it.
    fn file(&mut self, id: u64) -> Result<(&'static dyn Backend, Arc<OwnedFd>)> {
        let share = self.node(id)?.share;
        let backend = self.shares.get(&share).ok_or(Errno::STALE)?.backend;
        Ok((backend, self.open(id)?))
    }

    /// Opens a node's file, or finds it open.
    fn open(&mut self, id: u64) -> Result<Arc<OwnedFd>> {
        if let Some(file) = self.files.get(id) {
            return Ok(file);
        }
        let node = self.inodes.get(id).ok_or(Errno::STALE)?;
        let share = self.shares.get(&node.share).ok_or(Errno::STALE)?;
        let path = self.inodes.path(id).ok_or(Errno::STALE)?;
        let file = open_in(share, &path).map_err(|errno| match errno {
            Errno::NOENT | Errno::NOTDIR => Errno::STALE,
            errno => errno,
        })?;
        // The same file as when it was found, or none.
        let host = rustix::fs::fstat(&file).map_err(|_| Errno::IO)?;
        if host.st_ino != node.key {
            return Err(Errno::STALE);
        }
        let file = Arc::new(file);
        self.files.insert(id, Arc::clone(&file));
        Ok(file)
    }

    fn guest_attr(&mut self, stat: &Stat) -> Attr {
        let ino = self.inode_number(stat.device, stat.inode);
        Attr { ino, flags: self.mappings.flags(&stat.attr), ..stat.attr }
    }

    /// The inode number that the guest sees: the host's own, told apart by device in the top byte.
    fn inode_number(&mut self, device: u64, inode: u64) -> u64 {
        let index = self.devices.iter().position(|&known| known == device).unwrap_or_else(|| {
            self.devices.push(device);
            self.devices.len() - 1
        });
        inode ^ ((index as u64) << 56)
    }

    fn root_attr(&self) -> Attr {
        let shares = self.shares.values().filter(|share| share.attached).count();
        let (seconds, nanos) = (self.changed.as_secs(), self.changed.subsec_nanos());
        Attr {
            ino: ROOT_ID,
            atime: seconds,
            mtime: seconds,
            ctime: seconds,
            atimensec: nanos,
            mtimensec: nanos,
            ctimensec: nanos,
            mode: S_IFDIR | 0o555,
            nlink: u32::try_from(shares + 2).unwrap_or(u32::MAX),
            blksize: 4096,
            ..Attr::default()
        }
    }

    #[cfg(test)]
    pub(super) fn limit_open_files(&mut self, capacity: usize) {
        self.files = OpenFiles::new(capacity);
    }
}

/// Checks a single name from the guest.
pub(crate) fn check_name(name: &[u8]) -> Result<()> {
    match name {
        b"" | b"." | b".." => Err(Errno::INVAL),
        _ if name.len() > MAX_NAME => Err(Errno::NAMETOOLONG),
        _ if name.iter().any(|byte| matches!(byte, b'/' | 0)) => Err(Errno::INVAL),
        _ => Ok(()),
    }
}

fn validity(duration: Duration) -> (u64, u32) {
    (duration.as_secs(), duration.subsec_nanos())
}

pub(super) fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// What the host takes a directory's entry for.
pub(crate) struct HostEntry<'a> {
    pub(crate) name: &'a [u8],
    pub(crate) inode: u64,
    pub(crate) cookie: u64,
    pub(crate) kind: FileType,
}
