//! What the guest knows of the shares: node ids, and where each file lies.
//!
//! ```text
//!              LOOKUP, CREATE …: lookups += 1
//!   unknown ──────────────────────────────────▶ placed ── FORGET: lookups -= n, and 0, no child known ──▶ gone
//!                                                │  ▲
//!             the guest removes its name (or      │  │ found again, under another name
//!             puts another file there)            ▼  │
//!                                               lost: held open by a descriptor of its own, so that who has the
//!                                               file open can go on with it
//! ```
//!
//! A placed node is a parent and a name, not a descriptor: a guest knows more files than a process may have
//! open. When a file must be opened again, its path is walked name by name from the nearest ancestor that is
//! open, and each file on the way has to be the one that it was (device, inode, time of birth); what the host has
//! moved or replaced in the meantime is stale. Node ids count up and never come back.

use std::{
    collections::HashMap,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use rustix::{
    fs::{AtFlags, Mode, OFlags, ResolveFlags, StatxFlags},
    io::Errno,
};

use super::Result;
use crate::devices::virtio::fs::{
    files::OpenFiles,
    inodes::budget,
    wire::{Attr, ROOT_ID},
};

/// What a node costs beside its name, in bytes.
const NODE_COST: usize = 320;

/// The most files that are held open because they have no name any more.
const MOST_LOST: usize = 2048;

/// The bits of a mode that say what kind of file it is.
pub(super) const S_IFMT: u32 = 0o170_000;
pub(super) const S_IFDIR: u32 = 0o040_000;
pub(super) const S_IFREG: u32 = 0o100_000;
pub(super) const S_IFLNK: u32 = 0o120_000;

/// Which file of the host it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key {
    device: u64,
    inode: u64,
    /// Nanoseconds since the epoch, 0 where the file system does not know: inode numbers are used again.
    born: i128,
}

/// A file as the host describes it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stat {
    pub(super) key: Key,
    /// As the guest sees it, but for its inode number.
    pub(super) attr: Attr,
    /// Seconds and nanoseconds, where they are known.
    pub(super) born: Option<(i64, u32)>,
}

impl Stat {
    /// Of an open file, `O_PATH` or not.
    pub(super) fn of(file: impl AsFd) -> Result<Self> {
        Self::at(file, c"", AtFlags::EMPTY_PATH)
    }

    /// Of a name in a directory, which must be a single one; no link is followed.
    pub(super) fn of_name(directory: impl AsFd, name: &[u8]) -> Result<Self> {
        Self::at(directory, name, AtFlags::SYMLINK_NOFOLLOW)
    }

    fn at(directory: impl AsFd, path: impl rustix::path::Arg, flags: AtFlags) -> Result<Self> {
        let wanted = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
        let found = rustix::fs::statx(directory, path, flags | AtFlags::NO_AUTOMOUNT, wanted)?;
        let born = (found.stx_mask & StatxFlags::BTIME.bits() != 0)
            .then_some((found.stx_btime.tv_sec, found.stx_btime.tv_nsec));
        let attr = Attr {
            ino: 0,
            size: found.stx_size,
            blocks: found.stx_blocks,
            atime: found.stx_atime.tv_sec.cast_unsigned(),
            mtime: found.stx_mtime.tv_sec.cast_unsigned(),
            ctime: found.stx_ctime.tv_sec.cast_unsigned(),
            atimensec: found.stx_atime.tv_nsec,
            mtimensec: found.stx_mtime.tv_nsec,
            ctimensec: found.stx_ctime.tv_nsec,
            mode: u32::from(found.stx_mode),
            nlink: found.stx_nlink,
            uid: found.stx_uid,
            gid: found.stx_gid,
            rdev: device_number(found.stx_rdev_major, found.stx_rdev_minor),
            blksize: found.stx_blksize,
            flags: 0,
        };
        let device = rustix::fs::makedev(found.stx_dev_major, found.stx_dev_minor);
        let nanos =
            born.map_or(0, |(seconds, nanos)| i128::from(seconds) * 1_000_000_000 + i128::from(nanos));
        Ok(Self { key: Key { device, inode: found.stx_ino, born: nanos }, attr, born })
    }

    pub(super) fn kind(&self) -> u32 {
        self.attr.mode & S_IFMT
    }
}

/// Linux's 32-bit encoding of a device number.
fn device_number(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | ((major & 0xfff) << 8) | ((minor & !0xff) << 12)
}

/// A file that the guest knows.
#[derive(Debug)]
struct Node {
    share: usize,
    /// [`ROOT_ID`] for a share's root.
    parent: u64,
    name: Box<[u8]>,
    key: Key,
    kind: u32,
    lookups: u64,
    /// Known nodes whose parent this is.
    children: u64,
    /// The file of a node that is lost.
    held: Option<Arc<OwnedFd>>,
    lost: bool,
}

/// All nodes but the root.
pub(super) struct Nodes {
    nodes: HashMap<u64, Node>,
    by_key: HashMap<(usize, Key), u64>,
    last: u64,
    cost: usize,
    budget: usize,
    lost: usize,
    open: OpenFiles,
    /// The host's devices in the order they were met: their inode numbers must not meet in the guest.
    devices: Vec<u64>,
    /// The shares' roots.
    roots: Vec<Arc<OwnedFd>>,
}

impl Nodes {
    /// Of shares with these roots, for a guest of so much memory, with so many files open at most.
    pub(super) fn new(roots: Vec<OwnedFd>, guest_memory: u64, open: usize) -> Self {
        Self {
            nodes: HashMap::new(),
            by_key: HashMap::new(),
            last: ROOT_ID,
            cost: 0,
            budget: budget(guest_memory),
            lost: 0,
            open: OpenFiles::new(open),
            devices: Vec::new(),
            roots: roots.into_iter().map(Arc::new).collect(),
        }
    }

    /// Forgets everything, but never a node id.
    pub(super) fn clear(&mut self) {
        self.open.clear();
        (self.nodes, self.by_key) = (HashMap::new(), HashMap::new());
        (self.cost, self.lost) = (0, 0);
    }

    /// A share's root.
    pub(super) fn root(&self, share: usize) -> Result<Arc<OwnedFd>> {
        self.roots.get(share).cloned().ok_or(Errno::NOENT)
    }

    /// The share and kind of a node.
    pub(super) fn get(&self, id: u64) -> Result<(usize, u32)> {
        self.nodes.get(&id).map(|node| (node.share, node.kind)).ok_or(Errno::STALE)
    }

    /// Whether its name ends so.
    pub(super) fn name_ends_with(&self, id: u64, suffix: &[u8]) -> bool {
        self.nodes.get(&id).is_some_and(|node| node.name.ends_with(suffix))
    }

    /// Whether it has no name that the guest would go by: it has removed it itself, or never had one.
    pub(super) fn may_be_nameless(&self, id: u64) -> bool {
        self.nodes.get(&id).is_none_or(|node| node.lost || node.parent == ROOT_ID)
    }

    /// Whether it is the root of its share.
    pub(super) fn is_share_root(&self, id: u64) -> bool {
        self.nodes.get(&id).is_some_and(|node| node.parent == ROOT_ID)
    }

    /// The node of a file that was found under a name, known or new; its look-up count rises.
    pub(super) fn found(&mut self, share: usize, parent: u64, name: &[u8], stat: &Stat) -> Result<u64> {
        if let Some(&id) = self.by_key.get(&(share, stat.key)) {
            if self.nodes.get(&id).is_some_and(|node| node.lost) {
                self.place(id, parent, name);
            }
            if let Some(node) = self.nodes.get_mut(&id) {
                node.lookups = node.lookups.saturating_add(1);
            }
            return Ok(id);
        }
        if parent != ROOT_ID && !self.nodes.contains_key(&parent) {
            // Forgotten while it was looked at.
            return Err(Errno::STALE);
        }
        if self.cost + NODE_COST + name.len() > self.budget {
            return Err(Errno::NFILE);
        }
        self.last += 1;
        self.cost += NODE_COST + name.len();
        self.count_child(parent, 1);
        self.by_key.insert((share, stat.key), self.last);
        let node = Node {
            share,
            parent,
            name: name.into(),
            key: stat.key,
            kind: stat.kind(),
            lookups: 1,
            children: 0,
            held: None,
            lost: false,
        };
        self.nodes.insert(self.last, node);
        Ok(self.last)
    }

    /// FORGET.
    pub(super) fn forget(&mut self, id: u64, count: u64) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        node.lookups = node.lookups.saturating_sub(count);
        self.collect(id);
    }

    /// Removes a node that nobody knows, and then its parent if that was the last reason to keep it.
    fn collect(&mut self, id: u64) {
        let mut next = id;
        while let Some(node) = self.nodes.get(&next)
            && (node.lookups, node.children) == (0, 0)
            && let Some(node) = self.nodes.remove(&next)
        {
            if self.by_key.get(&(node.share, node.key)) == Some(&next) {
                self.by_key.remove(&(node.share, node.key));
            }
            self.open.remove(next);
            self.cost -= NODE_COST + node.name.len();
            self.lost -= usize::from(node.held.is_some());
            next = node.parent;
            self.count_child(next, -1);
        }
    }

    fn count_child(&mut self, parent: u64, by: i64) {
        if let Some(parent) = self.nodes.get_mut(&parent) {
            parent.children = parent.children.saturating_add_signed(by);
        }
    }

    /// Gives a node another place.
    fn place(&mut self, id: u64, parent: u64, name: &[u8]) {
        // The host may have turned around what lies in what: then there is no way down to it that ends.
        if self.is_below(parent, id) {
            return self.lose(id);
        }
        let Some(node) = self.nodes.get_mut(&id) else { return };
        let old = std::mem::replace(&mut node.parent, parent);
        self.cost = (self.cost + name.len()).saturating_sub(node.name.len());
        node.name = name.into();
        node.lost = false;
        self.lost -= usize::from(node.held.take().is_some());
        self.count_child(parent, 1);
        self.count_child(old, -1);
        self.collect(old);
    }

    /// Whether `id` is `above` or lies below it.
    fn is_below(&self, id: u64, above: u64) -> bool {
        let mut next = id;
        while let Some(node) = self.nodes.get(&next) {
            if next == above {
                return true;
            }
            next = node.parent;
        }
        false
    }

    /// A name is about to be removed, or replaced: the node that lies there, if it is known, with its file open.
    pub(super) fn before_removal(&mut self, share: usize, stat: &Stat) -> Option<u64> {
        let id = *self.by_key.get(&(share, stat.key))?;
        // Where it cannot be opened, it is stale from now on.
        let _ = self.file(id);
        Some(id)
    }

    /// The name is gone.
    pub(super) fn removed(&mut self, id: u64, parent: u64, name: &[u8]) {
        if self.nodes.get(&id).is_some_and(|node| node.parent == parent && *node.name == *name) {
            self.lose(id);
        }
    }

    /// The file has another name.
    pub(super) fn renamed(&mut self, id: u64, from: (u64, &[u8]), to: (u64, &[u8])) {
        let here = |node: &Node| node.lost || (node.parent, &*node.name) == from;
        if self.nodes.get(&id).is_some_and(here) {
            self.place(id, to.0, to.1);
        }
    }

    /// A node has no name any more, or none that is known.
    pub(super) fn lose(&mut self, id: u64) {
        let file = self.open.get(id);
        let room = self.lost < MOST_LOST;
        let Some(node) = self.nodes.get_mut(&id) else { return };
        node.lost = true;
        if room && node.held.is_none() && file.is_some() {
            node.held = file;
            self.lost += 1;
        }
    }

    /// A node's file as an `O_PATH` descriptor, open already or opened now.
    pub(super) fn file(&mut self, id: u64) -> Result<Arc<OwnedFd>> {
        let mut missing: Vec<u64> = Vec::new();
        let mut next = id;
        let mut file = loop {
            let node = self.nodes.get(&next).ok_or(Errno::STALE)?;
            if let Some(held) = &node.held {
                break Arc::clone(held);
            }
            if let Some(open) = self.open.get(next) {
                break open;
            }
            if node.parent == ROOT_ID {
                break Arc::clone(self.roots.get(node.share).ok_or(Errno::STALE)?);
            }
            if node.lost {
                return Err(Errno::STALE);
            }
            missing.push(next);
            next = node.parent;
        };
        for id in missing.into_iter().rev() {
            let node = self.nodes.get(&id).ok_or(Errno::STALE)?;
            let opened = open_name(&file, &node.name).map_err(|errno| match errno {
                Errno::MFILE | Errno::NFILE | Errno::NOMEM => errno,
                _ => Errno::STALE,
            })?;
            if Stat::of(&opened)?.key != node.key {
                return Err(Errno::STALE);
            }
            file = Arc::new(opened);
            self.open.insert(id, Arc::clone(&file));
        }
        Ok(file)
    }

    /// Keeps a file open that was just found.
    pub(super) fn keep_open(&mut self, id: u64, file: OwnedFd) {
        self.open.insert(id, Arc::new(file));
    }

    /// The inode number that the guest sees: the host's own, told apart by device in the top byte.
    pub(super) fn inode_number(&mut self, stat: &Stat) -> u64 {
        self.inode_on(stat.key.device, stat.key.inode)
    }

    /// Likewise, of an inode on the device of another file.
    pub(super) fn inode_beside(&mut self, stat: &Stat, inode: u64) -> u64 {
        self.inode_on(stat.key.device, inode)
    }

    fn inode_on(&mut self, device: u64, inode: u64) -> u64 {
        let index = self.devices.iter().position(|&known| known == device).unwrap_or_else(|| {
            self.devices.push(device);
            self.devices.len() - 1
        });
        inode ^ ((index as u64) << 56)
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.nodes.len()
    }
}

/// Opens a single name of a directory as what it is, following nothing.
pub(super) fn open_name(directory: impl AsFd, name: &[u8]) -> Result<OwnedFd> {
    open_beneath(directory, name, OFlags::PATH, 0)
}

/// Opens a name of a directory, following nothing and leaving it in no way.
pub(super) fn open_beneath(directory: impl AsFd, name: &[u8], flags: OFlags, mode: u32) -> Result<OwnedFd> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat2(directory, name, flags, Mode::from_raw_mode(mode), resolve)
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink, path::Path};

    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn root(path: &Path) -> OwnedFd {
        rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap()
    }

    /// A table with few files open, and its share's root.
    fn table(path: &Path) -> (Nodes, u64) {
        let mut nodes = Nodes::new(vec![root(path)], 64 << 20, 2);
        let stat = Stat::of(root(path)).unwrap();
        let id = nodes.found(0, ROOT_ID, b"", &stat).unwrap();
        (nodes, id)
    }

    fn find(nodes: &mut Nodes, parent: u64, name: &str) -> u64 {
        let directory = nodes.file(parent).unwrap();
        let stat = Stat::of_name(&directory, name.as_bytes()).unwrap();
        nodes.found(0, parent, name.as_bytes(), &stat).unwrap()
    }

    #[test]
    fn files_are_found_again_however_deep_and_only_if_they_are_the_same() {
        let base = tempfile::tempdir().unwrap();
        let (mut nodes, top) = table(base.path());
        let mut parent = top;
        let mut path = base.path().to_owned();
        for _ in 0..40 {
            // Deeper than any path may be long.
            path.push("d".repeat(120));
            let directory = nodes.file(parent).unwrap();
            rustix::fs::mkdirat(&directory, "d".repeat(120), Mode::from_raw_mode(0o755)).unwrap();
            parent = find(&mut nodes, parent, &"d".repeat(120));
        }
        assert_eq!(Stat::of(nodes.file(parent).unwrap()).unwrap().kind(), S_IFDIR);

        fs::write(base.path().join("a"), "1").unwrap();
        fs::write(base.path().join("b"), "2").unwrap();
        let a = find(&mut nodes, top, "a");
        let _ = nodes.file(a).unwrap();
        fs::rename(base.path().join("b"), base.path().join("a")).unwrap();
        nodes.open.clear();
        assert_eq!(nodes.file(a).unwrap_err(), Errno::STALE);
        symlink("/etc", base.path().join("l")).unwrap();
        let link = find(&mut nodes, top, "l");
        assert_eq!(Stat::of(nodes.file(link).unwrap()).unwrap().kind(), S_IFLNK);
    }

    #[test]
    fn what_the_guest_removes_stays_open_until_it_is_forgotten() {
        let base = tempfile::tempdir().unwrap();
        let (mut nodes, top) = table(base.path());
        fs::write(base.path().join("a"), "content").unwrap();
        let a = find(&mut nodes, top, "a");
        let stat = Stat::of(nodes.file(a).unwrap()).unwrap();
        assert_eq!(nodes.before_removal(0, &stat), Some(a));
        fs::remove_file(base.path().join("a")).unwrap();
        nodes.removed(a, top, b"a");
        nodes.open.clear();
        assert_eq!(Stat::of(nodes.file(a).unwrap()).unwrap().attr.nlink, 0);
        assert_eq!(nodes.lost, 1);
        nodes.forget(a, 1);
        assert_eq!((nodes.len(), nodes.lost), (1, 0));
        assert_eq!(nodes.file(a).unwrap_err(), Errno::STALE);
    }

    #[test]
    fn a_second_name_takes_the_place_of_the_removed_one() {
        let base = tempfile::tempdir().unwrap();
        let (mut nodes, top) = table(base.path());
        fs::write(base.path().join("a"), "x").unwrap();
        fs::hard_link(base.path().join("a"), base.path().join("b")).unwrap();
        let a = find(&mut nodes, top, "a");
        let stat = Stat::of(nodes.file(a).unwrap()).unwrap();
        nodes.before_removal(0, &stat);
        fs::remove_file(base.path().join("a")).unwrap();
        nodes.removed(a, top, b"a");
        assert_eq!(find(&mut nodes, top, "b"), a);
        assert_eq!(nodes.lost, 0);
        nodes.open.clear();
        assert_eq!(Stat::of(nodes.file(a).unwrap()).unwrap().attr.size, 1);
    }

    #[test]
    fn a_renamed_directory_takes_along_what_is_in_it_and_circles_end() {
        let base = tempfile::tempdir().unwrap();
        fs::create_dir_all(base.path().join("a/b")).unwrap();
        fs::create_dir(base.path().join("c")).unwrap();
        let (mut nodes, top) = table(base.path());
        let a = find(&mut nodes, top, "a");
        let b = find(&mut nodes, a, "b");
        let c = find(&mut nodes, top, "c");
        fs::rename(base.path().join("a"), base.path().join("c/x")).unwrap();
        nodes.renamed(a, (top, b"a"), (c, b"x"));
        nodes.open.clear();
        assert!(nodes.file(b).is_ok());

        // The host turns b and a around, then the guest moves a into b.
        fs::rename(base.path().join("c/x/b"), base.path().join("b")).unwrap();
        fs::rename(base.path().join("c/x"), base.path().join("b/x")).unwrap();
        nodes.renamed(a, (c, b"x"), (b, b"x"));
        nodes.open.clear();
        let _ = nodes.file(b);
        for id in [a, b, c] {
            nodes.forget(id, u64::MAX);
        }
        assert_eq!(nodes.len(), 1);
    }

    #[test]
    fn a_guest_that_forgets_nothing_comes_to_an_end() {
        let base = tempfile::tempdir().unwrap();
        let (mut nodes, top) = table(base.path());
        nodes.budget = nodes.cost + 2 * (NODE_COST + 1);
        for name in ["a", "b", "c"] {
            fs::write(base.path().join(name), "").unwrap();
        }
        find(&mut nodes, top, "a");
        find(&mut nodes, top, "b");
        let stat = Stat::of_name(root(base.path()), b"c").unwrap();
        assert_eq!(nodes.found(0, top, b"c", &stat), Err(Errno::NFILE));
    }

    proptest! {
        /// Whatever is looked up, moved and forgotten: nothing is left of it in the end.
        #[test]
        fn the_books_balance(steps in vec((0..4_u8, 0..8_u64, 0..8_u64, 0..4_u64), 0..120)) {
            let base = tempfile::tempdir().unwrap();
            let (mut nodes, top) = table(base.path());
            let stat = Stat::of(root(base.path())).unwrap();
            for (step, a, b, key) in steps {
                let (a, b) = (top + a, top + b);
                match step {
                    0 if nodes.nodes.contains_key(&a) => {
                        let key = Key { inode: key + 1000, ..stat.key };
                        nodes.found(0, a, b"n", &Stat { key, ..stat }).unwrap();
                    }
                    1 if nodes.nodes.contains_key(&b) => nodes.place(a, b, b"moved"),
                    2 => nodes.lose(a),
                    _ => nodes.forget(a, key),
                }
            }
            let ids: Vec<u64> = nodes.nodes.keys().copied().collect();
            for id in ids {
                nodes.forget(id, u64::MAX);
            }
            prop_assert_eq!((nodes.len(), nodes.cost, nodes.lost), (0, 0, 0));
            prop_assert!(nodes.by_key.is_empty());
        }
    }
}
