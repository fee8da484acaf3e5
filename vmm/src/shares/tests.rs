//! The server through its channel, as a guest with code of its own drives it: over a directory of this machine,
//! with nothing of KVM.

use std::{
    fs,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{MetadataExt, PermissionsExt, symlink},
    },
    path::Path,
};

use bulkhead_vmm_api::share::{AREA_SIZE, Caching, Call, Return, SLOT_SIZE};
use proptest::{collection::vec, prelude::*, test_runner::TestRunner};
use rustix::{
    fs::{CWD, Mode, OFlags},
    io::Errno,
    net::{AddressFamily, RecvFlags, SocketFlags, SocketType, socketpair},
};

use super::{
    area::{Area, tests::memory_file},
    server::{Server, Share},
    service::Service,
};
use crate::devices::virtio::fs::wire::{
    self, AttrOut, CreateIn, EntryOut, FileLock, InHeader, LkIn, OpenOut, OutHeader, ROOT_ID, ReadIn,
    Rename2In, SetattrIn, Wire, WriteIn, encode, fattr, opcode,
};

const SLOT: u32 = 3;

/// A server of one share, and the end of its channel that the VMM would have.
struct Guest {
    service: Service,
    channel: OwnedFd,
    unique: u64,
    root: u64,
}

fn path(path: &Path, flags: OFlags) -> OwnedFd {
    rustix::fs::openat(CWD, path, flags | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

impl Guest {
    fn new(directory: &Path, read_only: bool) -> Self {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        let own_files = path(Path::new("/proc/self/fd"), OFlags::PATH | OFlags::DIRECTORY);
        let share = Share { name: "0".into(), read_only, caching: Caching::Consistent };
        let shares = vec![(share, path(directory, OFlags::PATH))];
        let server = Server::new(shares, own_files, 64 << 20, 8);
        let area = Area::map(memory_file(AREA_SIZE)).unwrap();
        let mut guest =
            Self { service: Service::new(server, area, theirs), channel: ours, unique: 0, root: 0 };
        guest.root = guest.look_up(ROOT_ID, "0").unwrap().nodeid;
        guest
    }

    fn exchange(&mut self, request: &[u8], room: u32) -> Option<(OutHeader, Vec<u8>)> {
        let slot = self.service.area.slot(SLOT).unwrap();
        assert!(slot.write(0, request));
        let request = u32::try_from(request.len()).unwrap();
        self.service.serve(Call { slot: SLOT, request, room, ticket: 0 });
        let mut datagram = [0; 16];
        let (length, _) = rustix::net::recv(&self.channel, &mut datagram[..], RecvFlags::DONTWAIT).unwrap();
        let length = match Return::decode(&datagram[..length]).unwrap() {
            Return::Done { slot: SLOT, reply } => reply,
            back => panic!("{back:?}"),
        };
        if length == 0 {
            return None;
        }
        assert!(length <= room.max(16), "{length} bytes for {room}");
        let mut reply = vec![0; length as usize];
        assert!(self.service.area.slot(SLOT).unwrap().read(0, &mut reply));
        let mut rest = reply.as_slice();
        let header = OutHeader::take(&mut rest).unwrap();
        assert_eq!(header.len, length);
        Some((header, rest.to_vec()))
    }

    fn ask(&mut self, opcode: u32, nodeid: u64, body: &[u8]) -> Result<Vec<u8>, Errno> {
        self.ask_as(
            opcode,
            nodeid,
            (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw()),
            body,
        )
    }

    fn ask_as(
        &mut self,
        opcode: u32,
        nodeid: u64,
        (uid, gid): (u32, u32),
        body: &[u8],
    ) -> Result<Vec<u8>, Errno> {
        self.unique += 1;
        let len = u32::try_from(InHeader::SIZE + body.len()).unwrap();
        let header = InHeader { len, opcode, unique: self.unique, nodeid, uid, gid, ..InHeader::default() };
        let request = [encode(&header), body.to_vec()].concat();
        let (header, reply) = self.exchange(&request, u32::try_from(SLOT_SIZE).unwrap()).unwrap();
        assert_eq!(header.unique, self.unique);
        match header.error {
            0 => Ok(reply),
            error => Err(Errno::from_raw_os_error(-error)),
        }
    }

    fn look_up(&mut self, parent: u64, name: &str) -> Result<EntryOut, Errno> {
        self.ask(opcode::LOOKUP, parent, &named(&[name])).map(|reply| decode(&reply))
    }

    fn open(&mut self, node: u64, flags: i32) -> Result<u64, Errno> {
        let body = encode(&wire::OpenIn { flags: flags.cast_unsigned(), open_flags: 0 });
        self.ask(opcode::OPEN, node, &body).map(|reply| decode::<OpenOut>(&reply).fh)
    }

    fn create(&mut self, parent: u64, name: &str, flags: i32, mode: u32) -> Result<(u64, u64), Errno> {
        let asked = CreateIn { flags: flags.cast_unsigned(), mode, ..CreateIn::default() };
        let reply = self.ask(opcode::CREATE, parent, &[encode(&asked), named(&[name])].concat())?;
        Ok((decode::<EntryOut>(&reply).nodeid, decode::<OpenOut>(&reply[EntryOut::SIZE..]).fh))
    }

    fn read(&mut self, node: u64, fh: u64, offset: u64, size: u32) -> Result<Vec<u8>, Errno> {
        self.ask(opcode::READ, node, &encode(&ReadIn { fh, offset, size, ..ReadIn::default() }))
    }

    fn write(&mut self, node: u64, fh: u64, offset: u64, flags: i32, data: &[u8]) -> Result<u32, Errno> {
        let size = u32::try_from(data.len()).unwrap();
        let asked = WriteIn { fh, offset, size, flags: flags.cast_unsigned(), ..WriteIn::default() };
        let reply = self.ask(opcode::WRITE, node, &[&encode(&asked), data].concat())?;
        Ok(decode::<wire::WriteOut>(&reply).size)
    }

    /// By a handle, for an owner.
    fn lock(
        &mut self,
        opcode: u32,
        node: u64,
        (fh, owner): (u64, u64),
        kind: i32,
        flock: bool,
    ) -> Result<Vec<u8>, Errno> {
        let kind = kind.cast_unsigned();
        let lock = FileLock { start: 0, end: i64::MAX as u64, kind, pid: 0 };
        let asked = LkIn { fh, owner, lock, lk_flags: u32::from(flock), padding: 0 };
        self.ask(opcode, node, &encode(&asked))
    }
}

fn decode<T: Wire>(mut bytes: &[u8]) -> T {
    T::take(&mut bytes).unwrap()
}

fn named(names: &[&str]) -> Vec<u8> {
    names.iter().flat_map(|name| [name.as_bytes(), &[0]].concat()).collect()
}

fn rename(to: u64, flags: u32, names: &[&str]) -> Vec<u8> {
    [encode(&Rename2In { newdir: to, flags, padding: 0 }), named(names)].concat()
}

#[test]
fn files_are_made_written_read_renamed_and_removed() {
    let base = tempfile::tempdir().unwrap();
    let mut guest = Guest::new(base.path(), false);
    let (node, fh) = guest.create(guest.root, "a", libc::O_RDWR | libc::O_EXCL, 0o4751).unwrap();
    assert_eq!(guest.write(node, fh, 2, 0, b"hello").unwrap(), 5);
    assert_eq!(guest.write(node, fh, 0, libc::O_APPEND, b" world").unwrap(), 6);
    assert_eq!(guest.read(node, fh, 0, 100).unwrap(), b"\0\0hello world");
    let meta = fs::metadata(base.path().join("a")).unwrap();
    assert_eq!((meta.len(), meta.mode() & 0o7777), (13, 0o4751));
    assert_eq!(guest.create(guest.root, "a", libc::O_RDWR | libc::O_EXCL, 0).unwrap_err(), Errno::EXIST);

    guest
        .ask(
            opcode::MKDIR,
            guest.root,
            &[encode(&wire::MkdirIn { mode: 0o1755, umask: 0 }), named(&["d"])].concat(),
        )
        .unwrap();
    let directory = guest.look_up(guest.root, "d").unwrap().nodeid;
    guest.ask(opcode::RENAME2, guest.root, &rename(directory, 0, &["a", "b"])).unwrap();
    assert_eq!(guest.look_up(directory, "b").unwrap().nodeid, node);
    guest.ask(opcode::SYMLINK, guest.root, &named(&["l", "/etc/passwd"])).unwrap();
    let link = guest.look_up(guest.root, "l").unwrap().nodeid;
    assert_eq!(guest.ask(opcode::READLINK, link, &[]).unwrap(), b"/etc/passwd");
    guest
        .ask(
            opcode::LINK,
            guest.root,
            &[encode(&wire::LinkIn { oldnodeid: node }), named(&["hard"])].concat(),
        )
        .unwrap();
    let hard = guest.look_up(guest.root, "hard").unwrap();
    assert_eq!((hard.nodeid, hard.attr.nlink), (node, 2));

    // What is removed while it is open is still there for who has it open.
    guest.ask(opcode::UNLINK, guest.root, &named(&["hard"])).unwrap();
    guest.ask(opcode::UNLINK, directory, &named(&["b"])).unwrap();
    assert_eq!(guest.look_up(directory, "b").unwrap_err(), Errno::NOENT);
    assert_eq!(guest.read(node, fh, 2, 5).unwrap(), b"hello");
    let attr: AttrOut =
        decode(&guest.ask(opcode::GETATTR, node, &encode(&wire::GetattrIn::default())).unwrap());
    assert_eq!(attr.attr.nlink, 0);
    assert_eq!(guest.ask(opcode::RMDIR, guest.root, &named(&["l"])).unwrap_err(), Errno::NOTDIR);
    guest.ask(opcode::RMDIR, guest.root, &named(&["d"])).unwrap();
    guest.ask(opcode::UNLINK, guest.root, &named(&["l"])).unwrap();
    assert_eq!(fs::read_dir(base.path()).unwrap().count(), 0);
}

#[test]
fn attributes_are_set_one_by_one() {
    let base = tempfile::tempdir().unwrap();
    fs::write(base.path().join("a"), "0123456789").unwrap();
    symlink("nowhere", base.path().join("l")).unwrap();
    let mut guest = Guest::new(base.path(), false);
    let node = guest.look_up(guest.root, "a").unwrap().nodeid;
    let valid = fattr::MODE | fattr::SIZE | fattr::MTIME;
    let set =
        SetattrIn { valid, mode: 0o100_640, size: 4, mtime: 1000, mtimensec: 7, ..SetattrIn::default() };
    let attr: AttrOut = decode(&guest.ask(opcode::SETATTR, node, &encode(&set)).unwrap());
    assert_eq!((attr.attr.size, attr.attr.mtime, attr.attr.mtimensec), (4, 1000, 7));
    assert_eq!(fs::metadata(base.path().join("a")).unwrap().mode(), 0o100_640);
    let link = guest.look_up(guest.root, "l").unwrap().nodeid;
    let times = SetattrIn { valid: fattr::MTIME | fattr::ATIME_NOW, mtime: 5, ..SetattrIn::default() };
    guest.ask(opcode::SETATTR, link, &encode(&times)).unwrap();
    assert_eq!(fs::symlink_metadata(base.path().join("l")).unwrap().mtime(), 5);
    let chmod = SetattrIn { valid: fattr::MODE, mode: 0, ..SetattrIn::default() };
    assert_eq!(guest.ask(opcode::SETATTR, link, &encode(&chmod)).unwrap_err(), Errno::OPNOTSUPP);

    let value = |name: &str, value: &[u8]| {
        let size = u32::try_from(value.len()).unwrap();
        [encode(&wire::SetxattrIn { size, flags: 0 }), named(&[name]), value.to_vec()].concat()
    };
    guest.ask(opcode::SETXATTR, node, &value("user.x", b"\0\xff")).unwrap();
    let get = [encode(&wire::GetxattrIn { size: 10, padding: 0 }), named(&["user.x"])].concat();
    assert_eq!(guest.ask(opcode::GETXATTR, node, &get).unwrap(), b"\0\xff");
    let list = encode(&wire::GetxattrIn { size: 100, padding: 0 });
    assert!(guest.ask(opcode::LISTXATTR, node, &list).unwrap().windows(7).any(|name| name == b"user.x\0"));
    guest.ask(opcode::REMOVEXATTR, node, &named(&["user.x"])).unwrap();
    assert_eq!(guest.ask(opcode::GETXATTR, node, &get).unwrap_err(), Errno::NODATA);
    assert_eq!(guest.ask(opcode::GETXATTR, link, &get).unwrap_err(), Errno::NODATA);
}

#[test]
fn directories_are_listed_in_pieces_with_their_entries() {
    let base = tempfile::tempdir().unwrap();
    for number in 0..40 {
        fs::write(base.path().join(format!("file-{number}")), "").unwrap();
    }
    let mut guest = Guest::new(base.path(), false);
    for (opcode, fixed) in [(opcode::READDIR, 0), (opcode::READDIRPLUS, EntryOut::SIZE)] {
        let open: OpenOut =
            decode(&guest.ask(opcode::OPENDIR, guest.root, &encode(&wire::OpenIn::default())).unwrap());
        let (mut names, mut offset) = (Vec::new(), 0);
        loop {
            let asked = ReadIn { fh: open.fh, offset, size: 1000, ..ReadIn::default() };
            let reply = guest.ask(opcode, guest.root, &encode(&asked)).unwrap();
            let mut rest = reply.as_slice();
            if rest.is_empty() {
                break;
            }
            while !rest.is_empty() {
                rest = &rest[fixed..];
                let entry = wire::Dirent::take(&mut rest).unwrap();
                names.push(String::from_utf8(rest[..entry.namelen as usize].to_vec()).unwrap());
                rest = &rest[(entry.namelen as usize).next_multiple_of(8)..];
                offset = entry.off;
            }
        }
        names.sort();
        names.dedup();
        assert_eq!(names.len(), 42, "{names:?}");
    }
    assert_eq!(guest.service.server.known(), 41);
}

#[test]
fn a_read_only_share_changes_for_nobody() {
    let base = tempfile::tempdir().unwrap();
    fs::write(base.path().join("a"), "x").unwrap();
    fs::create_dir(base.path().join("d")).unwrap();
    let mut guest = Guest::new(base.path(), true);
    let (root, node) = (guest.root, guest.look_up(guest.root, "a").unwrap().nodeid);
    for flags in [libc::O_WRONLY, libc::O_RDWR, libc::O_RDONLY | libc::O_TRUNC] {
        assert_eq!(guest.open(node, flags).unwrap_err(), Errno::ROFS);
    }
    let fh = guest.open(node, libc::O_RDONLY).unwrap();
    assert!(guest.write(node, fh, 0, 0, b"y").is_err());
    let create = [encode(&CreateIn { flags: 2, ..CreateIn::default() }), named(&["n"])].concat();
    let mknod = [encode(&wire::MknodIn { mode: 0o100_644, ..Default::default() }), named(&["n"])].concat();
    let setattr = encode(&SetattrIn { valid: fattr::MODE, ..SetattrIn::default() });
    let xattr = [encode(&wire::SetxattrIn::default()), named(&["user.x"])].concat();
    let link = [encode(&wire::LinkIn { oldnodeid: node }), named(&["n"])].concat();
    for (opcode, node, body) in [
        (opcode::CREATE, root, create.clone()),
        (opcode::TMPFILE, root, create),
        (opcode::MKNOD, root, mknod),
        (opcode::MKDIR, root, [encode(&wire::MkdirIn::default()), named(&["n"])].concat()),
        (opcode::SYMLINK, root, named(&["n", "t"])),
        (opcode::LINK, root, link),
        (opcode::UNLINK, root, named(&["a"])),
        (opcode::RMDIR, root, named(&["d"])),
        (opcode::RENAME2, root, rename(root, 0, &["a", "b"])),
        (opcode::SETATTR, node, setattr),
        (opcode::SETXATTR, node, xattr),
        (opcode::REMOVEXATTR, node, named(&["user.x"])),
    ] {
        assert_eq!(guest.ask(opcode, node, &body).unwrap_err(), Errno::ROFS, "operation {opcode}");
    }
    assert_eq!(fs::read_to_string(base.path().join("a")).unwrap(), "x");
}

#[test]
fn names_and_links_do_not_lead_out() {
    let base = tempfile::tempdir().unwrap();
    let (share, outside) = (base.path().join("share"), base.path().join("outside"));
    fs::create_dir(&share).unwrap();
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("secret"), "secret").unwrap();
    symlink(&outside, share.join("absolute")).unwrap();
    symlink("../outside", share.join("up")).unwrap();
    symlink("/proc/self/root", share.join("magic")).unwrap();
    let mut guest = Guest::new(&share, false);
    let root = guest.root;
    for name in ["..", ".", "", "a/b", "/", "../outside/secret", &"n".repeat(256)] {
        assert!(guest.look_up(root, name).is_err(), "{name:?}");
        for (opcode, fixed) in [
            (opcode::UNLINK, vec![]),
            (opcode::MKDIR, encode(&wire::MkdirIn { mode: 0o755, umask: 0 })),
            (opcode::CREATE, encode(&CreateIn { flags: 2, mode: 0o644, ..CreateIn::default() })),
        ] {
            assert!(guest.ask(opcode, root, &[fixed, named(&[name])].concat()).is_err(), "{opcode} {name:?}");
        }
        assert!(guest.ask(opcode::RENAME2, root, &rename(root, 0, &["absolute", name])).is_err());
    }
    for link in ["absolute", "up", "magic"] {
        let node = guest.look_up(root, link).unwrap().nodeid;
        assert_eq!(guest.look_up(node, "secret").unwrap_err(), Errno::NOTDIR);
        assert!(guest.open(node, libc::O_RDWR).is_err());
        assert!(guest.ask(opcode::OPENDIR, node, &encode(&wire::OpenIn::default())).is_err());
        assert!(guest.create(root, link, libc::O_RDWR, 0o644).is_err(), "a link is not written through");
        let size = SetattrIn { valid: fattr::SIZE, ..SetattrIn::default() };
        assert!(guest.ask(opcode::SETATTR, node, &encode(&size)).is_err());
    }
    // A directory that the guest knows is swapped for a link by a process of the host.
    fs::create_dir(share.join("d")).unwrap();
    let directory = guest.look_up(root, "d").unwrap().nodeid;
    fs::remove_dir(share.join("d")).unwrap();
    symlink(&outside, share.join("d")).unwrap();
    assert!(guest.look_up(directory, "secret").is_err());
    assert!(guest.create(directory, "new", libc::O_RDWR, 0o644).is_err());
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
    assert_eq!(fs::read_to_string(outside.join("secret")).unwrap(), "secret");
    // Devices are none of a share's.
    let device = wire::MknodIn { mode: 0o020_666, rdev: 0x103, ..Default::default() };
    let node = [encode(&device), named(&["null"])].concat();
    assert_eq!(guest.ask(opcode::MKNOD, root, &node).unwrap_err(), Errno::PERM);
}

#[test]
fn node_ids_and_handles_are_nobody_elses() {
    let base = tempfile::tempdir().unwrap();
    fs::write(base.path().join("a"), "a").unwrap();
    fs::write(base.path().join("b"), "b").unwrap();
    let mut guest = Guest::new(base.path(), false);
    let (a, b) =
        (guest.look_up(guest.root, "a").unwrap().nodeid, guest.look_up(guest.root, "b").unwrap().nodeid);
    let fh = guest.open(a, libc::O_RDWR).unwrap();
    assert_eq!(guest.read(b, fh, 0, 1).unwrap_err(), Errno::BADF);
    assert_eq!(guest.read(a, fh + 1, 0, 1).unwrap_err(), Errno::BADF);
    for node in [0, ROOT_ID, b + 1, u64::MAX] {
        assert!(guest.open(node, libc::O_RDWR).is_err(), "{node}");
        assert!(guest.look_up(node, "a").is_err());
        assert!(guest.ask(opcode::UNLINK, node, &named(&["0"])).is_err());
    }
    assert!(guest.read(a, fh, u64::MAX, 10).is_err());
    assert_eq!(guest.write(a, fh, u64::MAX - 1, 0, b"xx").unwrap_err(), Errno::INVAL);
    // A length that is more than there is.
    let asked = WriteIn { fh, size: 4096, ..WriteIn::default() };
    assert_eq!(guest.ask(opcode::WRITE, a, &encode(&asked)).unwrap_err(), Errno::INVAL);
    let len = u32::MAX;
    let header = InHeader { len, opcode: opcode::WRITE, unique: 1, nodeid: a, ..InHeader::default() };
    let forged = [encode(&header), encode(&WriteIn { fh, size: u32::MAX, ..WriteIn::default() })].concat();
    let (answer, _) = guest.exchange(&forged, 4096).unwrap();
    assert_eq!(answer.error, -Errno::INVAL.raw_os_error());
    // Slots that are none, requests that are none.
    guest.service.serve(Call { slot: u32::MAX, request: 100, room: 100, ticket: 0 });
    assert!(guest.exchange(&[0; 39], 100).is_none());
    assert_eq!(fs::read_to_string(base.path().join("a")).unwrap(), "a");
}

#[test]
fn locks_exclude_the_host_and_end_with_their_owner() {
    let base = tempfile::tempdir().unwrap();
    let file = base.path().join("a");
    fs::write(&file, "").unwrap();
    let mut guest = Guest::new(base.path(), false);
    let node = guest.look_up(guest.root, "a").unwrap().nodeid;
    let (fh, other) = (guest.open(node, libc::O_RDWR).unwrap(), guest.open(node, libc::O_RDWR).unwrap());
    let host = fs::File::options().read(true).write(true).open(&file).unwrap();
    let flock = |operation| {
        // SAFETY: takes numbers.
        unsafe { libc::flock(host.as_raw_fd(), operation | libc::LOCK_NB) == 0 }
    };
    guest.lock(opcode::SETLK, node, (fh, 1), libc::F_WRLCK, true).unwrap();
    assert!(!flock(libc::LOCK_SH));
    assert_eq!(guest.lock(opcode::SETLK, node, (other, 1), libc::F_RDLCK, true).unwrap_err(), Errno::AGAIN);
    guest.ask(opcode::RELEASE, node, &encode(&wire::ReleaseIn { fh, ..Default::default() })).unwrap();
    assert!(flock(libc::LOCK_EX));
    assert_eq!(guest.lock(opcode::SETLK, node, (other, 1), libc::F_RDLCK, true).unwrap_err(), Errno::AGAIN);
    assert!(flock(libc::LOCK_UN));

    guest.lock(opcode::SETLK, node, (other, 7), libc::F_WRLCK, false).unwrap();
    let reply = guest.lock(opcode::GETLK, node, (other, 8), libc::F_RDLCK, false).unwrap();
    assert_eq!(decode::<FileLock>(&reply).kind, libc::F_WRLCK as u32);
    assert_eq!(guest.lock(opcode::SETLK, node, (other, 8), libc::F_WRLCK, false).unwrap_err(), Errno::AGAIN);
    guest
        .ask(opcode::FLUSH, node, &encode(&wire::FlushIn { fh: other, lock_owner: 7, ..Default::default() }))
        .unwrap();
    guest.lock(opcode::SETLK, node, (other, 8), libc::F_WRLCK, false).unwrap();
}

#[test]
fn who_waits_for_a_lock_gets_it_when_it_is_free() {
    let base = tempfile::tempdir().unwrap();
    let file = base.path().join("a");
    fs::write(&file, "").unwrap();
    let mut guest = Guest::new(base.path(), false);
    let node = guest.look_up(guest.root, "a").unwrap().nodeid;
    let fh = guest.open(node, libc::O_RDWR).unwrap();
    let host = fs::File::options().read(true).write(true).open(&file).unwrap();
    // SAFETY: takes numbers.
    assert_eq!(unsafe { libc::flock(host.as_raw_fd(), libc::LOCK_EX) }, 0);
    let lock = FileLock { start: 0, end: u64::MAX, kind: libc::F_WRLCK as u32, pid: 0 };
    let body = encode(&LkIn { fh, owner: 1, lock, lk_flags: 1, padding: 0 });
    let len = u32::try_from(InHeader::SIZE + body.len()).unwrap();
    let header = InHeader { len, opcode: opcode::SETLKW, unique: 99, nodeid: node, ..InHeader::default() };
    assert!(guest.service.area.slot(5).unwrap().write(0, &[encode(&header), body].concat()));
    let Guest { service, channel, .. } = &guest;
    std::thread::scope(|scope| {
        scope.spawn(|| service.wait_for_locks());
        service.serve(Call { slot: 5, request: len, room: 4096, ticket: 77 });
        let mut datagram = [0; 16];
        let (length, _) = rustix::net::recv(channel, &mut datagram[..], RecvFlags::DONTWAIT).unwrap();
        assert_eq!(Return::decode(&datagram[..length]), Some(Return::PutOff { slot: 5 }));
        assert_eq!(
            rustix::net::recv(channel, &mut datagram[..], RecvFlags::DONTWAIT).unwrap_err(),
            Errno::AGAIN
        );
        drop(host);
        let (length, _) = rustix::net::recv(channel, &mut datagram[..], RecvFlags::empty()).unwrap();
        assert_eq!(Return::decode(&datagram[..length]), Some(Return::Settled { ticket: 77, error: 0 }));
        service.stop();
    });
}

#[test]
fn what_the_host_changes_is_seen_and_what_it_replaces_is_stale() {
    let base = tempfile::tempdir().unwrap();
    fs::write(base.path().join("a"), "old").unwrap();
    let mut guest = Guest::new(base.path(), false);
    let node = guest.look_up(guest.root, "a").unwrap().nodeid;
    let fh = guest.open(node, libc::O_RDONLY).unwrap();
    fs::write(base.path().join("a"), "newer").unwrap();
    assert_eq!(guest.read(node, fh, 0, 10).unwrap(), b"newer");
    fs::write(base.path().join("b"), "other").unwrap();
    fs::rename(base.path().join("b"), base.path().join("a")).unwrap();
    assert_ne!(guest.look_up(guest.root, "a").unwrap().nodeid, node);
    fs::set_permissions(base.path().join("a"), fs::Permissions::from_mode(0o600)).unwrap();
    assert_eq!(guest.look_up(guest.root, "a").unwrap().attr.mode, 0o100_600);
}

#[test]
fn a_name_that_is_out_of_date_is_looked_up_again() {
    let base = tempfile::tempdir().unwrap();
    fs::write(base.path().join("journal"), "old").unwrap();
    fs::create_dir(base.path().join("d")).unwrap();
    let mut guest = Guest::new(base.path(), false);
    let journal = guest.look_up(guest.root, "journal").unwrap().nodeid;
    let directory = guest.look_up(guest.root, "d").unwrap().nodeid;
    let attributes = encode(&wire::GetattrIn::default());
    fs::remove_file(base.path().join("journal")).unwrap();
    assert_eq!(guest.open(journal, libc::O_RDONLY).unwrap_err(), Errno::STALE);
    assert_eq!(guest.ask(opcode::GETATTR, journal, &attributes).unwrap_err(), Errno::STALE);
    fs::remove_dir(base.path().join("d")).unwrap();
    fs::create_dir(base.path().join("d")).unwrap();
    fs::write(base.path().join("d/x"), "new").unwrap();
    assert_eq!(guest.look_up(directory, "x").unwrap_err(), Errno::STALE);
    let directory = guest.look_up(guest.root, "d").unwrap().nodeid;
    assert_eq!(guest.look_up(directory, "y").unwrap_err(), Errno::NOENT);
    // What is open, or was removed by the guest itself, goes on without a name.
    let open = guest.look_up(directory, "x").unwrap().nodeid;
    let fh = guest.open(open, libc::O_RDWR).unwrap();
    fs::remove_file(base.path().join("d/x")).unwrap();
    assert_eq!(decode::<AttrOut>(&guest.ask(opcode::GETATTR, open, &attributes).unwrap()).attr.nlink, 0);
    assert_eq!(guest.read(open, fh, 0, 10).unwrap(), b"new");
    fs::write(base.path().join("own"), "own").unwrap();
    let own = guest.look_up(guest.root, "own").unwrap().nodeid;
    guest.ask(opcode::UNLINK, guest.root, &named(&["own"])).unwrap();
    guest.open(own, libc::O_RDONLY).unwrap();
}

#[test]
fn a_nameless_file_gets_a_name_by_a_link() {
    let base = tempfile::tempdir().unwrap();
    let mut guest = Guest::new(base.path(), false);
    let asked = CreateIn { flags: libc::O_RDWR as u32, mode: 0o600, ..CreateIn::default() };
    let reply = guest.ask(opcode::TMPFILE, guest.root, &[encode(&asked), named(&["#1"])].concat()).unwrap();
    let (node, fh) = (decode::<EntryOut>(&reply).nodeid, decode::<OpenOut>(&reply[EntryOut::SIZE..]).fh);
    guest.write(node, fh, 0, 0, b"content").unwrap();
    assert_eq!(fs::read_dir(base.path()).unwrap().count(), 0);
    guest
        .ask(opcode::LINK, guest.root, &[encode(&wire::LinkIn { oldnodeid: node }), named(&["n"])].concat())
        .unwrap();
    assert_eq!(fs::read_to_string(base.path().join("n")).unwrap(), "content");
}

#[test]
fn what_is_made_belongs_to_who_made_it() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let base = tempfile::tempdir().unwrap();
    let mut guest = Guest::new(base.path(), false);
    let by = (1234, 70_000);
    let body = [encode(&wire::MkdirIn { mode: 0o755, umask: 0 }), named(&["d"])].concat();
    guest.ask_as(opcode::MKDIR, guest.root, by, &body).unwrap();
    fs::set_permissions(base.path().join("d"), fs::Permissions::from_mode(0o2775)).unwrap();
    let directory = guest.look_up(guest.root, "d").unwrap().nodeid;
    guest.ask_as(opcode::SYMLINK, directory, (5, 6), &named(&["l", "t"])).unwrap();
    let owner = |name: &str| {
        let meta = fs::symlink_metadata(base.path().join(name)).unwrap();
        (meta.uid(), meta.gid())
    };
    assert_eq!((owner("d"), owner("d/l")), (by, (5, 70_000)));
    let set = SetattrIn { valid: fattr::UID | fattr::GID, uid: 8, gid: 100_000, ..SetattrIn::default() };
    guest.ask(opcode::SETATTR, directory, &encode(&set)).unwrap();
    assert_eq!(owner("d"), (8, 100_000));
}

/// Whatever bytes come: nothing panics, nothing beside the share changes, and the server goes on.
#[test]
fn requests_of_any_content_are_survived() {
    let base = tempfile::tempdir().unwrap();
    let share = base.path().join("share");
    fs::create_dir(&share).unwrap();
    fs::write(base.path().join("beside"), "untouched").unwrap();
    symlink("../beside", share.join("link")).unwrap();
    fs::write(share.join("file"), "content").unwrap();
    let mut guest = Guest::new(&share, false);
    let node = guest.look_up(guest.root, "file").unwrap().nodeid;
    let _ = guest.open(node, libc::O_RDWR).unwrap();
    let names = prop_oneof![
        Just("file".to_owned()),
        Just("..".to_owned()),
        Just("link".to_owned()),
        Just("d".to_owned()),
        Just("../beside".to_owned()),
        "[a-c]{1,3}"
    ];
    let body = (vec(any::<u8>(), 0..64), names.clone(), names).prop_map(|(mut fixed, first, second)| {
        fixed.truncate(fixed.len() & !7);
        // Small numbers name what is there.
        for number in fixed.iter_mut().skip(1) {
            *number &= if *number & 1 == 0 { 0 } else { 7 };
        }
        [fixed, named(&[&first, &second])].concat()
    });
    let guest = std::cell::RefCell::new(guest);
    let request = (0..60u32, 0..6u64, body, 0..5000u32);
    let mut runner = TestRunner::deterministic();
    runner
        .run(&vec(request, 1..20), |requests| {
            for (opcode, nodeid, body, room) in requests {
                if matches!(opcode, opcode::SETLKW | opcode::SYNCFS) {
                    continue;
                }
                let len = u32::try_from(InHeader::SIZE + body.len()).unwrap();
                let header = InHeader { len, opcode, nodeid, ..InHeader::default() };
                guest.borrow_mut().exchange(&[encode(&header), body].concat(), room);
            }
            Ok(())
        })
        .unwrap();
    assert_eq!(fs::read_to_string(base.path().join("beside")).unwrap(), "untouched");
    assert_eq!(fs::read_dir(base.path()).unwrap().count(), 2);
    let mut guest = guest.into_inner();
    guest.ask(opcode::INIT, 0, &encode(&wire::InitIn { major: 7, minor: 41, ..Default::default() })).unwrap();
    assert!(guest.look_up(ROOT_ID, "0").is_ok());
}
