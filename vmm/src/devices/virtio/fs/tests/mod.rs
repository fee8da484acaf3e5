//! The server driven by a guest made of byte buffers, over layers that the layer store has unpacked.

mod device;
mod forward;
mod hostile;
mod mapping;

use std::{collections::BTreeMap, os::fd::OwnedFd, rc::Rc};

use bulkhead_rootfs::layers::{DiffId, LayerStore, Limits};
use bulkhead_vmm_api::ShareKind;
use rustix::io::Errno;
use tempfile::TempDir;

use super::{
    backend::{S_IFDIR, S_IFLNK, S_IFMT},
    dispatch::{self, MAX_BODY, Reply, Request, Sink},
    server::Server,
    shares::ShareError,
    state,
    wire::{self, Wire, encode, opcode},
};

/// A layer with every kind of file.
fn layer_archive() -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    let mut add = |kind: tar::EntryType, name: &str, link: &str, data: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(if kind.is_dir() { 0o755 } else { 0o640 });
        header.set_uid(1000);
        header.set_gid(50);
        header.set_mtime(1_700_000_000);
        header.set_size(data.len() as u64);
        header.set_device_major(1).unwrap();
        header.set_device_minor(3).unwrap();
        if link.is_empty() {
            archive.append_data(&mut header, name, data).unwrap();
        } else {
            archive.append_link(&mut header, name, link).unwrap();
        }
    };
    use tar::EntryType;
    add(EntryType::Directory, "dir", "", b"");
    add(EntryType::Regular, "dir/file", "", b"0123456789");
    add(EntryType::Link, "dir/hard", "dir/file", b"");
    add(EntryType::Symlink, "link", "/etc/../anywhere", b"");
    add(EntryType::Char, "null", "", b"");
    add(EntryType::Fifo, "fifo", "", b"");
    add(EntryType::Regular, ".wh.gone", "", b"");
    add(EntryType::Regular, "opaque/.wh..wh..opq", "", b"");
    add(EntryType::Regular, "large", "", &(0..200_000_u32).flat_map(u32::to_le_bytes).collect::<Vec<_>>());
    for number in 0..300 {
        add(EntryType::Regular, &format!("many/a-file-with-a-rather-long-name-{number}"), "", b"x");
    }
    let mut archive = archive.into_inner().unwrap();
    // The tar crate's builder writes no extended attributes: a PAX record and its file by hand.
    let end = archive.len() - 1024;
    archive.truncate(end);
    let mut records = tar::Builder::new(archive);
    let pax = b"37 SCHILY.xattr.user.colour=deep-red\n35 SCHILY.xattr.user.empty=removed\n".as_slice();
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(EntryType::XHeader);
    header.set_size(pax.len() as u64);
    records.append_data(&mut header, "pax", pax).unwrap();
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o6755);
    header.set_size(0);
    records.append_data(&mut header, "attrs", &b""[..]).unwrap();
    records.into_inner().unwrap()
}

/// A store with the layer above.
struct Layers {
    store: LayerStore,
    id: DiffId,
    _dir: TempDir,
}

impl Layers {
    fn new() -> Self {
        let dir = temp_dir();
        let store = LayerStore::open(dir.path()).unwrap();
        let id = store.import(&layer_archive()[..], &Limits::default()).unwrap().diff_id;
        Self { store, id, _dir: dir }
    }

    fn root(&self) -> OwnedFd {
        self.store.open_root(&self.id).unwrap()
    }
}

fn temp_dir() -> TempDir {
    let below_target = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../target");
    for parent in [std::env::temp_dir(), below_target] {
        let Ok(dir) = tempfile::tempdir_in(parent) else { continue };
        if rustix::fs::setxattr(dir.path(), "user.x", b"x", rustix::fs::XattrFlags::empty()).is_ok() {
            return dir;
        }
    }
    panic!("neither the temporary directory nor target/ has user extended attributes");
}

/// Room for a reply's data.
struct Room {
    size: usize,
    filled: Vec<u8>,
}

impl Sink for Room {
    fn room(&self) -> usize {
        self.size
    }

    fn fill(&mut self, file: &OwnedFd, offset: u64, length: usize) -> Result<usize, Errno> {
        self.filled.resize(length, 0);
        let count = rustix::io::pread(file, &mut self.filled[..], offset)?;
        self.filled.truncate(count);
        Ok(count)
    }
}

/// A guest: node ids in, bytes out.
struct Guest {
    server: Server,
    layers: Rc<Layers>,
}

impl Guest {
    /// With one share, `layer`, and the connection made.
    fn new() -> Self {
        Self::over(Rc::new(Layers::new()))
    }

    fn over(layers: Rc<Layers>) -> Self {
        let mut server = Server::new();
        server.attach("layer", layers.root(), ShareKind::Layer).unwrap();
        let mut guest = Self { server, layers };
        guest.call(opcode::INIT, 0, &init(u32::MAX)).unwrap();
        guest
    }

    fn reply(&mut self, opcode: u32, nodeid: u64, body: &[u8], size: usize) -> (Reply, Vec<u8>) {
        let header = wire::InHeader { opcode, nodeid, ..Default::default() };
        let mut room = Room { size, filled: Vec::new() };
        let reply = dispatch::serve(&mut self.server, Request { header, body }, &mut room);
        (reply, room.filled)
    }

    fn call(&mut self, opcode: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, Errno> {
        match self.reply(opcode, node, body, 1 << 20) {
            (Reply::Bytes(bytes), _) => Ok(bytes),
            (Reply::Filled(length), filled) => {
                assert_eq!(length, filled.len());
                Ok(filled)
            }
            (Reply::Error(errno), _) => Err(errno),
            (Reply::None, _) => panic!("no reply"),
        }
    }

    fn look_up(&mut self, parent: u64, name: &str) -> Result<wire::EntryOut, Errno> {
        let bytes = self.call(opcode::LOOKUP, parent, &[name.as_bytes(), &[0]].concat())?;
        Ok(decode(&bytes))
    }

    /// Looks up a path from the device's root.
    fn walk(&mut self, path: &str) -> wire::EntryOut {
        let mut entry = wire::EntryOut { nodeid: wire::ROOT_ID, ..Default::default() };
        for name in path.split('/') {
            entry = self.look_up(entry.nodeid, name).unwrap();
            assert_ne!(entry.nodeid, 0, "{path}");
        }
        entry
    }

    fn read(&mut self, node: u64, offset: u64, size: u32) -> Result<Vec<u8>, Errno> {
        self.call(opcode::READ, node, &read_in(offset, size))
    }

    /// All of a directory by one kind of listing, in requests of `size` bytes.
    fn list(&mut self, node: u64, plus: bool, size: u32) -> Vec<Listed> {
        let opcode = if plus { opcode::READDIRPLUS } else { opcode::READDIR };
        let mut all = Vec::new();
        loop {
            let cookie = all.last().map_or(0, |last: &Listed| last.dirent.off);
            let bytes = self.call(opcode, node, &read_in(cookie, size)).unwrap();
            assert!(bytes.len() <= size as usize);
            if bytes.is_empty() {
                return all;
            }
            all.extend(parse_listing(&bytes, plus));
        }
    }

    fn forget(&mut self, node: u64, count: u64) {
        let (reply, _) = self.reply(opcode::FORGET, node, &encode(&wire::ForgetIn { nlookup: count }), 0);
        assert_eq!(reply, Reply::None);
    }
}

/// An entry of a listing.
#[derive(Debug)]
struct Listed {
    entry: wire::EntryOut,
    dirent: wire::Dirent,
    name: String,
}

fn parse_listing(mut bytes: &[u8], plus: bool) -> Vec<Listed> {
    let mut all = Vec::new();
    while !bytes.is_empty() {
        assert_eq!(bytes.len() % 8, 0);
        let entry = if plus { wire::EntryOut::take(&mut bytes).unwrap() } else { Default::default() };
        let dirent = wire::Dirent::take(&mut bytes).unwrap();
        let length = dirent.namelen as usize;
        let name = String::from_utf8(bytes[..length].to_vec()).unwrap();
        let record = if plus { wire::EntryOut::SIZE } else { 0 } + wire::Dirent::SIZE + length;
        bytes = &bytes[length + record.next_multiple_of(8) - record..];
        all.push(Listed { entry, dirent, name });
    }
    all
}

fn decode<T: Wire>(mut bytes: &[u8]) -> T {
    assert_eq!(bytes.len(), T::SIZE);
    T::take(&mut bytes).unwrap()
}

fn init(flags: u32) -> Vec<u8> {
    encode(&wire::InitIn { major: 7, minor: 41, max_readahead: 1 << 17, flags })
}

fn read_in(offset: u64, size: u32) -> Vec<u8> {
    encode(&wire::ReadIn { offset, size, ..Default::default() })
}

fn getxattr(size: u32, name: &str) -> Vec<u8> {
    [encode(&wire::GetxattrIn { size, padding: 0 }), name.into(), vec![0]].concat()
}

#[test]
fn versions_and_flags_are_negotiated() {
    let mut guest = Guest::new();
    let out: wire::InitOut = decode(&guest.call(opcode::INIT, 0, &init(u32::MAX)).unwrap());
    assert_eq!((out.major, out.minor, out.max_readahead, out.max_pages), (7, 41, 1 << 17, 256));
    let upper = u32::try_from(wire::init::NO_EXPORT_SUPPORT >> 32).unwrap();
    assert_eq!(out.flags2, upper);
    let wanted = wire::init::NO_OPEN_SUPPORT | wire::init::DO_READDIRPLUS | wire::init::CACHE_SYMLINKS;
    assert_eq!(u64::from(out.flags) & wanted, wanted);
    assert_eq!(u64::from(out.flags) & wire::init::READDIRPLUS_AUTO, 0, "files are asked for one by one");

    // Nothing that was not offered is answered.
    let offered = u32::try_from(wire::init::ASYNC_READ).unwrap();
    let out: wire::InitOut = decode(&guest.call(opcode::INIT, 0, &init(offered)).unwrap());
    assert_eq!((out.flags, out.flags2), (offered, 0));

    let version = |major, minor| encode(&wire::InitIn { major, minor, ..Default::default() });
    let out: wire::InitOut = decode(&guest.call(opcode::INIT, 0, &version(8, 0)).unwrap());
    assert_eq!((out.major, out.flags), (7, 0));
    assert_eq!(guest.call(opcode::INIT, 0, &version(7, 30)), Err(Errno::PROTO));
    assert_eq!(guest.call(opcode::INIT, 0, &version(6, 99)), Err(Errno::PROTO));
}

#[test]
fn every_kind_of_file_is_what_the_layer_says() {
    let mut guest = Guest::new();
    let file = guest.walk("layer/dir/file").attr;
    assert_eq!((file.mode, file.uid, file.gid), (0o100_640, 1000, 50));
    assert_eq!((file.size, file.nlink, file.mtime), (10, 2, 1_700_000_000));
    assert!(file.blocks > 0);
    let link = guest.walk("layer/link");
    assert_eq!((link.attr.mode & S_IFMT, link.attr.size), (S_IFLNK, 16));
    assert_eq!(guest.call(opcode::READLINK, link.nodeid, &[]).unwrap(), b"/etc/../anywhere");
    let null = guest.walk("layer/null").attr;
    assert_eq!((null.mode, null.rdev, null.size), (0o020_640, 0x103, 0));
    assert_eq!(guest.walk("layer/fifo").attr.mode, 0o010_640);
    assert_eq!(guest.walk("layer/attrs").attr.mode, 0o106_755);
    let dir = guest.walk("layer/dir").attr;
    assert_eq!((dir.mode, dir.mtime), (0o040_755, 1_700_000_000));
    let gone = guest.walk("layer/gone").attr;
    assert_eq!((gone.mode, gone.rdev), (0o020_000, 0));
    let root = guest.walk("layer").attr;
    assert_eq!((root.mode, root.uid), (0o040_755, 0));
}

#[test]
fn attributes_come_by_getattr_as_they_came_by_name() {
    let mut guest = Guest::new();
    let entry = guest.walk("layer/null");
    let body = encode(&wire::GetattrIn::default());
    let got: wire::AttrOut = decode(&guest.call(opcode::GETATTR, entry.nodeid, &body).unwrap());
    assert_eq!(got.attr, entry.attr);
    assert!(got.attr_valid > 86_400);
    // It would tell nothing more than these, and be asked again and again.
    let statx = encode(&wire::StatxIn::default());
    assert_eq!(guest.call(opcode::STATX, entry.nodeid, &statx), Err(Errno::NOSYS));
    let root: wire::AttrOut = decode(&guest.call(opcode::GETATTR, wire::ROOT_ID, &body).unwrap());
    assert_eq!((root.attr.mode, root.attr.nlink, root.attr_valid), (S_IFDIR | 0o555, 3, 0));
}

#[test]
fn hard_links_are_one_node() {
    let mut guest = Guest::new();
    let (file, hard) = (guest.walk("layer/dir/file"), guest.walk("layer/dir/hard"));
    assert_eq!(file, hard);
}

#[test]
fn absent_names_are_cached_in_shares_and_not_in_the_root() {
    let mut guest = Guest::new();
    let dir = guest.walk("layer/dir").nodeid;
    let absent = guest.look_up(dir, "absent").unwrap();
    assert_eq!(absent.nodeid, 0);
    assert!(absent.entry_valid > 86_400);
    assert_eq!(guest.look_up(wire::ROOT_ID, "absent"), Err(Errno::NOENT));
    assert_eq!(guest.walk("layer").entry_valid, 0);
    let file = guest.walk("layer/dir/file").nodeid;
    assert_eq!(guest.look_up(file, "x"), Err(Errno::NOTDIR));
}

#[test]
fn contents_are_read_at_any_offset() {
    let mut guest = Guest::new();
    let file = guest.walk("layer/dir/file").nodeid;
    assert_eq!(guest.read(file, 0, 4096).unwrap(), b"0123456789");
    assert_eq!(guest.read(file, 3, 4).unwrap(), b"3456");
    assert_eq!(guest.read(file, 10, 4096).unwrap(), b"");
    assert_eq!(guest.read(file, 1 << 40, 4096).unwrap(), b"");
    assert_eq!(guest.read(file, 0, 0).unwrap(), b"");
    assert_eq!(guest.read(file, u64::MAX, 1), Err(Errno::INVAL));
    let dir = guest.walk("layer/dir").nodeid;
    assert_eq!(guest.read(dir, 0, 1), Err(Errno::ISDIR));
    for name in ["layer/link", "layer/null", "layer/fifo"] {
        let node = guest.walk(name).nodeid;
        assert_eq!(guest.read(node, 0, 1), Err(Errno::INVAL), "{name}");
    }
}

#[test]
fn listings_are_whole_whatever_the_size_of_the_buffer() {
    let mut guest = Guest::new();
    let many = guest.walk("layer/many").nodeid;
    for (plus, size) in [(false, 4096), (true, 4096), (false, 100), (true, 300), (false, 1 << 20)] {
        let all = guest.list(many, plus, size);
        let mut names: Vec<_> = all.iter().map(|listed| &listed.name[..]).collect();
        assert_eq!(names.len(), 302);
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), 302);
        for listed in all.iter().filter(|listed| plus && !listed.name.starts_with('.')) {
            assert_eq!((listed.entry.attr.ino, listed.entry.attr.size), (listed.dirent.ino, 1));
        }
    }
    assert_eq!(guest.call(opcode::READDIR, many, &read_in(0, 16)), Err(Errno::INVAL));
}

#[test]
fn listings_tell_kinds_and_numbers_as_look_ups_do() {
    let mut guest = Guest::new();
    let root = guest.walk("layer").nodeid;
    for plus in [false, true] {
        let listed: BTreeMap<_, _> =
            guest.list(root, plus, 4096).into_iter().map(|listed| (listed.name.clone(), listed)).collect();
        let kinds =
            [("dir", 4), ("link", 10), ("null", 2), ("gone", 2), ("fifo", 1), ("attrs", 8), ("..", 4)];
        for (name, kind) in kinds {
            assert_eq!(listed[name].dirent.kind, kind, "{name}");
        }
        for name in ["dir", "link", "gone", "large"] {
            assert_eq!(listed[name].dirent.ino, guest.look_up(root, name).unwrap().attr.ino, "{name}");
        }
        // What lies above the share is the device's root, not the host's directory.
        assert_eq!(listed[".."].dirent.ino, 1);
    }
}

#[test]
fn the_root_lists_the_shares() {
    let mut guest = Guest::new();
    for name in ["b", "a"] {
        guest.server.attach(name, guest.layers.root(), ShareKind::Layer).unwrap();
    }
    for (plus, size) in [(false, 4096), (true, 4096), (false, 40), (true, 160)] {
        let names: Vec<_> =
            guest.list(wire::ROOT_ID, plus, size).into_iter().map(|listed| listed.name).collect();
        assert_eq!(names, [".", "..", "layer", "b", "a"]);
    }
    let a = guest.walk("a");
    assert_ne!(a.nodeid, guest.walk("b").nodeid);
    assert_eq!(guest.list(wire::ROOT_ID, true, 4096)[4].entry.nodeid, a.nodeid);
}

#[test]
fn extended_attributes_are_the_layers() {
    let mut guest = Guest::new();
    let node = guest.walk("layer/attrs").nodeid;
    assert_eq!(guest.call(opcode::GETXATTR, node, &getxattr(100, "user.colour")).unwrap(), b"deep-red");
    let length: wire::GetxattrOut =
        decode(&guest.call(opcode::GETXATTR, node, &getxattr(0, "user.colour")).unwrap());
    assert_eq!(length.size, 8);
    assert_eq!(guest.call(opcode::GETXATTR, node, &getxattr(7, "user.colour")), Err(Errno::RANGE));
    assert_eq!(guest.call(opcode::GETXATTR, node, &getxattr(7, "user.bulkhead.meta")), Err(Errno::NODATA));
    let list = encode(&wire::GetxattrIn { size: 100, padding: 0 });
    assert_eq!(guest.call(opcode::LISTXATTR, node, &list).unwrap(), b"user.colour\0user.empty\0");
    let opaque = guest.walk("layer/opaque").nodeid;
    let bare = guest.walk("layer/dir/file").nodeid;
    assert_eq!(guest.call(opcode::GETXATTR, bare, &getxattr(7, "user.colour")), Err(Errno::NODATA));
    assert_eq!(guest.call(opcode::LISTXATTR, bare, &list).unwrap(), b"");
    let value = guest.call(opcode::GETXATTR, opaque, &getxattr(10, "trusted.overlay.opaque"));
    assert_eq!(value.unwrap(), b"y");
}

#[test]
fn nothing_can_be_changed() {
    let mut guest = Guest::new();
    let node = guest.walk("layer/dir/file").nodeid;
    let changing = [
        opcode::SETATTR,
        opcode::SYMLINK,
        opcode::MKNOD,
        opcode::MKDIR,
        opcode::UNLINK,
        opcode::RMDIR,
        opcode::RENAME,
        opcode::RENAME2,
        opcode::LINK,
        opcode::WRITE,
        opcode::SETXATTR,
        opcode::REMOVEXATTR,
        opcode::CREATE,
        opcode::FALLOCATE,
        opcode::COPY_FILE_RANGE,
        opcode::TMPFILE,
    ];
    for opcode in changing {
        assert_eq!(guest.call(opcode, node, &[0; 200]), Err(Errno::ROFS), "{opcode}");
    }
    let access = |mask| encode(&wire::AccessIn { mask, padding: 0 });
    assert_eq!(guest.call(opcode::ACCESS, node, &access(2)), Err(Errno::ROFS));
    assert_eq!(guest.call(opcode::ACCESS, node, &access(4)), Ok(Vec::new()));
    for opcode in [opcode::OPEN, opcode::OPENDIR, opcode::FLUSH, opcode::FSYNC, 40, 1000] {
        assert_eq!(guest.call(opcode, node, &[0; 200]), Err(Errno::NOSYS), "{opcode}");
    }
}

#[test]
fn data_and_holes_are_found() {
    let mut guest = Guest::new();
    let node = guest.walk("layer/large").nodeid;
    let seek = |offset, whence| encode(&wire::LseekIn { offset, whence, ..Default::default() });
    let found: wire::LseekOut = decode(&guest.call(opcode::LSEEK, node, &seek(5, 3)).unwrap());
    assert_eq!(found.offset, 5);
    let found: wire::LseekOut = decode(&guest.call(opcode::LSEEK, node, &seek(0, 4)).unwrap());
    assert_eq!(found.offset, 800_000);
    assert_eq!(guest.call(opcode::LSEEK, node, &seek(1 << 30, 3)), Err(Errno::NXIO));
    assert_eq!(guest.call(opcode::LSEEK, node, &seek(0, 0)), Err(Errno::INVAL));
    assert_eq!(guest.call(opcode::LSEEK, node, &seek(u64::MAX, 3)), Err(Errno::INVAL));
}

#[test]
fn forgotten_nodes_are_stale_and_the_rest_stays() {
    let mut guest = Guest::new();
    let (dir, file) = (guest.walk("layer/dir").nodeid, guest.walk("layer/dir/file").nodeid);
    guest.forget(file, 1);
    assert_eq!(guest.read(file, 0, 1), Err(Errno::STALE));
    let again = guest.look_up(dir, "file").unwrap().nodeid;
    assert!(again > file);
    let batch = [
        encode(&wire::BatchForgetIn { count: 2, dummy: 0 }),
        encode(&wire::ForgetOne { nodeid: again, nlookup: 1 }),
        encode(&wire::ForgetOne { nodeid: dir, nlookup: 9 }),
    ];
    assert_eq!(guest.reply(opcode::BATCH_FORGET, 0, &batch.concat(), 0).0, Reply::None);
    assert_eq!(guest.read(again, 0, 1), Err(Errno::STALE));
    assert_eq!(guest.look_up(dir, "file"), Err(Errno::STALE));
    guest.forget(wire::ROOT_ID, u64::MAX);
    assert_eq!(guest.walk("layer/dir").attr.mode, 0o040_755);
    guest.call(opcode::DESTROY, 0, &[]).unwrap();
    assert_eq!(guest.server.inodes.len(), 0);
}

#[test]
fn few_open_files_serve_many_nodes() {
    let mut guest = Guest::new();
    guest.server.limit_open_files(3);
    let many = guest.walk("layer/many").nodeid;
    let nodes: Vec<_> = guest.list(many, true, 4096).into_iter().map(|listed| listed.entry.nodeid).collect();
    for node in nodes.iter().filter(|node| **node != 0).chain(&nodes[5..9]) {
        assert_eq!(guest.read(*node, 0, 10).unwrap(), b"x");
    }
}

#[test]
fn shares_come_and_go() {
    let mut guest = Guest::new();
    let file = guest.walk("layer/dir/file").nodeid;
    let dir = guest.walk("layer/dir").nodeid;
    let again = guest.server.attach("layer", guest.layers.root(), ShareKind::Layer);
    assert!(matches!(again, Err(ShareError::Exists(_))));
    guest.server.detach("layer").unwrap();
    assert!(matches!(guest.server.detach("layer"), Err(ShareError::NotFound(_))));
    assert_eq!(guest.look_up(wire::ROOT_ID, "layer"), Err(Errno::NOENT));
    assert_eq!(guest.look_up(dir, "file"), Err(Errno::NOENT));
    // What the guest has stays usable, also once another share has the name.
    assert_eq!(guest.read(file, 0, 4).unwrap(), b"0123");
    guest.server.attach("layer", guest.layers.root(), ShareKind::Layer).unwrap();
    assert_ne!(guest.walk("layer/dir/file").nodeid, file);
    assert_eq!(guest.read(file, 0, 4).unwrap(), b"0123");
    assert_eq!(guest.server.shares.len(), 2);
    let old: Vec<_> = guest.server.inodes.of_share(1);
    for node in old {
        guest.forget(node, u64::MAX);
    }
    assert_eq!(guest.server.shares.len(), 1);
}

#[test]
fn only_a_layer_can_be_attached_as_one() {
    let mut server = Server::new();
    let plain = temp_dir();
    let open = |path: &std::path::Path| OwnedFd::from(std::fs::File::open(path).unwrap());
    let error = server.attach("x", open(plain.path()), ShareKind::Layer).unwrap_err();
    assert!(matches!(error, ShareError::Unusable { .. }), "{error}");
    let layers = Layers::new();
    for name in ["", ".", "..", "a/b", "a\0b", &"n".repeat(256)] {
        let error = server.attach(name, layers.root(), ShareKind::Layer).unwrap_err();
        assert!(matches!(error, ShareError::Name(_)), "{name:?}: {error}");
    }
    let file = layers.store.path(&layers.id).join("dir/file");
    assert!(server.attach("x", open(&file), ShareKind::Layer).is_err());
}

#[test]
fn a_file_that_is_no_part_of_a_layer_is_an_error() {
    let mut guest = Guest::new();
    let root = guest.layers.store.path(&guest.layers.id);
    std::fs::write(root.join("intruder"), "x").unwrap();
    std::os::unix::fs::symlink("/etc/passwd", root.join("intruding-link")).unwrap();
    let node = guest.walk("layer").nodeid;
    assert_eq!(guest.look_up(node, "intruder"), Err(Errno::IO));
    assert_eq!(guest.look_up(node, "intruding-link"), Err(Errno::IO));
    let listed = guest.list(node, true, 4096);
    let intruder = listed.iter().find(|listed| listed.name == "intruder").unwrap();
    assert_eq!((intruder.entry.nodeid, intruder.dirent.kind), (0, 0));
}

#[test]
fn a_saved_server_knows_its_nodes_again() {
    let mut guest = Guest::new();
    let (file, many) = (guest.walk("layer/dir/file").nodeid, guest.walk("layer/many").nodeid);
    let absent = guest.walk("layer/link").nodeid;
    let bytes = postcard::to_stdvec(&state::save(&guest.server)).unwrap();

    // A host where the same layer was unpacked anew: other inode numbers, one file lost.
    let layers = Layers::new();
    std::fs::remove_file(layers.store.path(&layers.id).join("link")).unwrap();
    let mut server = Server::new();
    state::restore(&mut server, postcard::from_bytes(&bytes).unwrap()).unwrap();
    guest.server = server;
    assert_eq!(guest.read(file, 0, 4), Err(Errno::STALE));
    guest.server.attach("layer", layers.root(), ShareKind::Layer).unwrap();
    assert_eq!(guest.read(file, 0, 4).unwrap(), b"0123");
    assert_eq!(guest.list(many, true, 4096).len(), 302);
    assert_eq!(guest.call(opcode::READLINK, absent, &[]), Err(Errno::STALE));
    assert_eq!(guest.walk("layer/dir/file").nodeid, file);
    assert!(guest.walk("layer/opaque").nodeid > absent, "a node id came back");
}
