//! For a fuzzer: a guest that speaks to the server without a FUSE driver of Linux's.
//!
//! ```text
//!   bytes ──▶ request, request, … ──▶ server of  base/share/  ──▶ afterwards base/ is as it was, but for share/
//! ```
//! Each request has an operation, a node, a header that may lie, words that are mostly small (handles, node ids and
//! flags are), names of which some are there and some lead out, and any bytes.

use std::{
    fs,
    os::{
        fd::OwnedFd,
        unix::fs::{PermissionsExt, symlink},
    },
    path::{Path, PathBuf},
};

use bulkhead_vmm_api::share::{AREA_SIZE, Caching, Call};
use rustix::{
    fs::{CWD, MemfdFlags, Mode, OFlags, SealFlags},
    net::{AddressFamily, RecvFlags, SocketFlags, SocketType, socketpair},
};

use super::{
    area::Area,
    server::{Server, Share},
    service::Service,
};
use crate::{
    devices::virtio::fs::wire::{InHeader, Wire, encode, opcode},
    fuzzing::input::Input,
};

const NAMES: [&str; 14] = [
    "file",
    "directory",
    "link",
    "new",
    "..",
    ".",
    "",
    "../beside",
    "directory/inner",
    "0",
    "user.x",
    "system.posix_acl_access",
    "absolute",
    "inner",
];

/// A guest's requests to a server of two shares, the second read-only.
pub(crate) fn shares(bytes: &[u8]) {
    let base = Base::new();
    let (channel, theirs) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .expect("a channel");
    let own_files = open(Path::new("/proc/self/fd"));
    let share = |name: &str, read_only| {
        let share = Share { name: name.into(), read_only, caching: Caching::Consistent };
        (share, open(&base.0.path().join("share")))
    };
    let server = Server::new(vec![share("0", false), share("1", true)], own_files, 16 << 20, 8);
    let area = Area::map(memory_file()).expect("the area");
    let service = Service::new(server, area, theirs);
    let mut input = Input::new(bytes);
    for number in 0..200u32 {
        let Some((request, room)) = request(&mut input) else { break };
        let slot = number % 4;
        let Some(memory) = service.area.slot(slot) else { unreachable!("there are more slots") };
        assert!(memory.write(0, &request));
        let call = Call { slot, request: u32::try_from(request.len()).unwrap_or(0), room, ticket: number };
        service.serve(call);
        let mut datagram = [0; 16];
        // Nothing comes where a lock is waited for.
        let _ = rustix::net::recv(&channel, &mut datagram[..], RecvFlags::DONTWAIT);
    }
    drop(service);
    base.check();
}

/// The next request, and how much the guest has room for.
fn request(input: &mut Input<'_>) -> Option<(Vec<u8>, u32)> {
    let operation = u32::from(input.next()? % 64);
    let nodeid = match input.byte() {
        small @ 0..200 => u64::from(small % 10),
        _ => input.u64(),
    };
    let shape = input.byte();
    let mut body = Vec::new();
    for _ in 0..shape & 15 {
        body.extend(word(input).to_le_bytes());
    }
    // What takes real memory or time is bounded here; that the numbers are checked shows with any.
    let bounded = match operation {
        opcode::FALLOCATE => Some(8..24),
        opcode::COPY_FILE_RANGE => Some(40..48),
        opcode::SYNCFS => return Some((Vec::new(), 0)),
        _ => None,
    };
    for word in bounded.and_then(|range| body.get_mut(range)).into_iter().flat_map(|part| part.chunks_mut(8))
    {
        word.iter_mut().skip(2).for_each(|byte| *byte &= 0x80);
    }
    for _ in 0..(shape >> 4) & 3 {
        let name = match input.byte() {
            255 => "n".repeat(256),
            index => {
                NAMES.get(usize::from(index) % NAMES.len()).map(|&name| name.to_owned()).unwrap_or_default()
            }
        };
        body.extend(name.as_bytes());
        body.push(0);
    }
    if shape & 64 != 0 {
        let count = usize::from(input.byte());
        body.extend(input.bytes(count));
    }
    let mut len = u32::try_from(InHeader::SIZE + body.len()).unwrap_or(0);
    if shape & 128 != 0 {
        len = input.u32();
    }
    let header = InHeader { len, opcode: operation, unique: 1, nodeid, ..InHeader::default() };
    Some(([encode(&header), body].concat(), u32::from(input.byte()) * 64))
}

/// Mostly a small number, or two halves that are; else any.
fn word(input: &mut Input<'_>) -> u64 {
    match input.byte() {
        small @ 0..128 => u64::from(small),
        halves @ 128..240 => u64::from(halves & 7) | u64::from((halves >> 3) & 15) << 32,
        _ => input.u64(),
    }
}

/// What is shared, and what lies beside it.
struct Base(tempfile::TempDir);

impl Base {
    fn new() -> Self {
        // In memory where that can be: a file system on a disk waits for it.
        let parent = [PathBuf::from("/dev/shm"), std::env::temp_dir()].into_iter().find(|path| path.is_dir());
        let base = tempfile::tempdir_in(parent.unwrap_or_default()).expect("a directory");
        let share = base.path().join("share");
        fs::create_dir(&share).expect("a directory");
        fs::create_dir(share.join("directory")).expect("a directory");
        fs::write(base.path().join("beside"), "untouched").expect("a file");
        fs::write(share.join("file"), "content").expect("a file");
        fs::write(share.join("directory/inner"), "inner").expect("a file");
        symlink("../beside", share.join("link")).expect("a link");
        symlink(base.path().join("beside"), share.join("absolute")).expect("a link");
        Self(base)
    }

    /// Nothing but the share has changed.
    fn check(&self) {
        let beside = self.0.path().join("beside");
        assert_eq!(fs::read_to_string(&beside).expect("it is still there"), "untouched");
        assert_eq!(fs::metadata(&beside).expect("it is still there").permissions().mode() & 0o111, 0);
        assert_eq!(fs::read_dir(self.0.path()).expect("a directory").count(), 2);
    }
}

fn open(path: &Path) -> OwnedFd {
    rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).expect("a directory")
}

fn memory_file() -> OwnedFd {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = rustix::fs::memfd_create("bulkhead-fuzz", flags).expect("a memory file");
    rustix::fs::ftruncate(&file, AREA_SIZE as u64).expect("its length");
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).expect("seals");
    file
}
