//! From a request in a slot to an operation, and from its result to a reply in the same slot.
//!
//! | operation | answer |
//! |---|---|
//! | FORGET, BATCH_FORGET, INTERRUPT | no reply |
//! | READ, WRITE | data goes between file and slot with no copy here |
//! | SETLKW where another holds the lock | later, see [`super::locks`] |
//! | SETUPMAPPING, REMOVEMAPPING, IOCTL, POLL, … | ENOSYS: Linux does not ask again |
//! | everything else | at once |

use std::os::fd::AsFd;

use rustix::{
    fs::{FallocateFlags, SeekFrom},
    io::Errno,
};

use super::{
    Result,
    area::Slot,
    handles::Open,
    index, locks,
    server::{MAX_XATTR, Server},
};
use crate::devices::virtio::fs::wire::{self, InHeader, MAX_NAME, OutHeader, ROOT_ID, Wire, init, opcode};

/// The longest fixed part, names and values of a request; of WRITE's data nothing is copied.
pub(super) const MAX_BODY: usize = MAX_XATTR + 4096;

/// Pages in one READ or WRITE: 1 MiB.
const MAX_PAGES: u16 = 256;
const MAX_DATA: usize = MAX_PAGES as usize * 4096;

/// Where data begins in a slot: READ's, and WRITE's.
const READ_DATA: usize = OutHeader::SIZE;
const WRITE_DATA: usize = InHeader::SIZE + wire::WriteIn::SIZE;

/// What the server is willing to do, as flags of INIT. Not among them:
/// * WRITEBACK_CACHE: sizes and times would be the guest's, whatever the host writes;
/// * HANDLE_KILLPRIV and its like: the guest's kernel takes set-user-id bits away itself, by SETATTR;
/// * POSIX_ACL: ACLs are shown as attributes, and enforced by their group bits alone;
/// * DONT_MASK: the guest's kernel applies the umask.
const WANTED: u64 = init::ASYNC_READ
    | init::POSIX_LOCKS
    | init::ATOMIC_O_TRUNC
    | init::BIG_WRITES
    | init::FLOCK_LOCKS
    | init::AUTO_INVAL_DATA
    | init::DO_READDIRPLUS
    | init::READDIRPLUS_AUTO
    | init::ASYNC_DIO
    | init::PARALLEL_DIROPS
    | init::MAX_PAGES
    | init::INIT_EXT
    | init::DIRECT_IO_ALLOW_MMAP
    | init::NO_EXPORT_SUPPORT;

/// What is to be answered.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Reply {
    /// Nothing at all.
    None,
    /// An error.
    Error(Errno),
    /// Success and these bytes.
    Bytes(Vec<u8>),
    /// Success; that many bytes are in the slot.
    Filled(usize),
    /// Nothing yet: the lock is another's.
    Waits,
}

/// A request whose header and body were copied out of its slot.
#[derive(Debug, Clone)]
pub(super) struct Request {
    pub(super) header: InHeader,
    pub(super) body: Vec<u8>,
    /// Bytes that the guest takes besides the reply's header.
    pub(super) room: usize,
}

/// Serves one request.
pub(super) fn serve(server: &Server, request: &Request, slot: Slot<'_>) -> Reply {
    let Request { header, body, room } = request;
    match header.opcode {
        opcode::FORGET | opcode::BATCH_FORGET => {
            forget(server, header, body);
            Reply::None
        }
        opcode::INTERRUPT => Reply::None,
        opcode::READ => read(server, request, slot).map_or_else(Reply::Error, Reply::Filled),
        opcode::SETLK | opcode::SETLKW => match set_lock(server, request) {
            Ok(()) => Reply::Bytes(Vec::new()),
            Err(Errno::AGAIN) if header.opcode == opcode::SETLKW => Reply::Waits,
            Err(errno) => Reply::Error(errno),
        },
        _ => match answer(server, request, slot) {
            // The guest offers room for whatever it asks for.
            Ok(bytes) if bytes.len() > *room => Reply::Error(Errno::INVAL),
            Ok(bytes) => Reply::Bytes(bytes),
            Err(errno) => Reply::Error(errno),
        },
    }
}

fn answer(server: &Server, request: &Request, slot: Slot<'_>) -> Result<Vec<u8>> {
    let Request { header, body, room } = request;
    let (node, mut body) = (header.nodeid, body.as_slice());
    let body = &mut body;
    match header.opcode {
        opcode::INIT => initialise(server, take(body)?),
        opcode::DESTROY => {
            server.forget_all();
            Ok(Vec::new())
        }
        opcode::LOOKUP => Ok(wire::encode(&server.look_up(node, name(body)?)?)),
        opcode::GETATTR => {
            let wire::GetattrIn { getattr_flags, fh, .. } = take(body)?;
            Ok(wire::encode(&server.attributes(node, (getattr_flags & 1 != 0).then_some(fh))?.0))
        }
        opcode::STATX => {
            let wire::StatxIn { getattr_flags, fh, .. } = take(body)?;
            let (answer, born) = server.attributes(node, (getattr_flags & 1 != 0).then_some(fh))?;
            Ok(statx(&answer, born))
        }
        opcode::SETATTR => Ok(wire::encode(&server.set_attributes(node, &take(body)?)?)),
        opcode::READLINK => server.read_link(node),
        opcode::SYMLINK => {
            let (name, target) = (name(body)?, name(body)?);
            Ok(wire::encode(&server.make_link(header, name, target)?))
        }
        opcode::MKNOD => {
            let asked = take(body)?;
            Ok(wire::encode(&server.make_node(header, &asked, name(body)?)?))
        }
        opcode::MKDIR => {
            let wire::MkdirIn { mode, .. } = take(body)?;
            Ok(wire::encode(&server.make_directory(header, mode, name(body)?)?))
        }
        opcode::UNLINK | opcode::RMDIR => {
            server.remove(node, name(body)?, header.opcode == opcode::RMDIR).map(done)?
        }
        opcode::RENAME => {
            let newdir: u64 = take(body)?;
            let (from, to) = (name(body)?, name(body)?);
            server.rename((node, from), (newdir, to), 0).map(done)?
        }
        opcode::RENAME2 => {
            let wire::Rename2In { newdir, flags, .. } = take(body)?;
            let (from, to) = (name(body)?, name(body)?);
            server.rename((node, from), (newdir, to), flags).map(done)?
        }
        opcode::LINK => {
            let wire::LinkIn { oldnodeid } = take(body)?;
            Ok(wire::encode(&server.link(node, oldnodeid, name(body)?)?))
        }
        opcode::OPEN => {
            let wire::OpenIn { flags, .. } = take(body)?;
            Ok(wire::encode(&server.open(node, flags)?))
        }
        opcode::OPENDIR => Ok(wire::encode(&server.open_directory(node)?)),
        opcode::CREATE | opcode::TMPFILE => {
            let wire::CreateIn { flags, mode, .. } = take(body)?;
            let (entry, open) = match header.opcode {
                opcode::CREATE => server.create(header, flags, mode, name(body)?)?,
                _ => server.create_nameless(header, flags, mode)?,
            };
            Ok([wire::encode(&entry), wire::encode(&open)].concat())
        }
        opcode::RELEASE | opcode::RELEASEDIR => {
            let wire::ReleaseIn { fh, .. } = take(body)?;
            server.owners.released(node, fh);
            server.handles.remove(fh);
            Ok(Vec::new())
        }
        opcode::FLUSH => {
            let wire::FlushIn { lock_owner, .. } = take(body)?;
            server.owners.closed(node, lock_owner);
            Ok(Vec::new())
        }
        opcode::WRITE => write(server, request, slot),
        opcode::FSYNC | opcode::FSYNCDIR => {
            let wire::FsyncIn { fh, fsync_flags, .. } = take(body)?;
            let handle = server.handles.get(fh, node)?;
            let sync = |file: std::os::fd::BorrowedFd<'_>| match fsync_flags & 1 {
                0 => rustix::fs::fsync(file),
                _ => rustix::fs::fdatasync(file),
            };
            match &handle.open {
                Open::File(file) => sync(file.as_fd()).map(done)?,
                Open::Directory(file) => {
                    sync(file.lock().unwrap_or_else(std::sync::PoisonError::into_inner).as_fd()).map(done)?
                }
                Open::Root => Ok(Vec::new()),
            }
        }
        opcode::READDIR | opcode::READDIRPLUS => {
            let wire::ReadIn { fh, offset, size, .. } = take(body)?;
            let room = (size as usize).min(*room).min(MAX_DATA);
            server.read_directory(node, fh, offset, room, header.opcode == opcode::READDIRPLUS)
        }
        opcode::STATFS => statfs(server, node),
        opcode::SETXATTR => {
            let wire::SetxattrIn { size, flags } = take(body)?;
            let name = name(body)?;
            if body.len() != size as usize || body.len() > MAX_XATTR {
                return Err(Errno::INVAL);
            }
            server.set_xattr(node, name, Some((body, flags))).map(done)?
        }
        opcode::REMOVEXATTR => server.set_xattr(node, name(body)?, None).map(done)?,
        opcode::GETXATTR => {
            let wire::GetxattrIn { size, .. } = take(body)?;
            sized(server.xattr(node, name(body)?)?, size)
        }
        opcode::LISTXATTR => {
            let wire::GetxattrIn { size, .. } = take(body)?;
            sized(server.xattr_names(node)?, size)
        }
        opcode::ACCESS => {
            const W_OK: u32 = 2;
            let wire::AccessIn { mask, .. } = take(body)?;
            if node == ROOT_ID {
                return if mask & W_OK == 0 { Ok(Vec::new()) } else { Err(Errno::ROFS) };
            }
            let found = server.node(node)?;
            if mask & W_OK != 0 && found.share.read_only { Err(Errno::ROFS) } else { Ok(Vec::new()) }
        }
        opcode::LSEEK => {
            let wire::LseekIn { fh, offset, whence, .. } = take(body)?;
            let target = match i32::try_from(whence) {
                Ok(libc::SEEK_DATA) => SeekFrom::Data(offset),
                Ok(libc::SEEK_HOLE) => SeekFrom::Hole(offset),
                _ => return Err(Errno::INVAL),
            };
            if i64::try_from(offset).is_err() {
                return Err(Errno::INVAL);
            }
            let handle = server.handles.get(fh, node)?;
            Ok(wire::encode(&wire::LseekOut { offset: rustix::fs::seek(handle.file()?, target)? }))
        }
        opcode::FALLOCATE => {
            let wire::FallocateIn { fh, offset, length, mode, .. } = take(body)?;
            let mode = FallocateFlags::from_bits(mode).ok_or(Errno::OPNOTSUPP)?;
            let handle = server.handles.get(fh, node)?;
            rustix::fs::fallocate(handle.file()?, mode, offset, length).map(done)?
        }
        opcode::COPY_FILE_RANGE => copy_range(server, node, &take(body)?),
        opcode::SYNCFS => server.sync(node).map(done)?,
        opcode::GETLK => {
            let asked: wire::LkIn = take(body)?;
            let found = if server.is_index_lock(node, &asked.lock) {
                server.handles.get(asked.fh, node)?.file()?;
                server.owners.indexes.get(node, &asked, || server.open_for_locks(node))?
            } else {
                locks::get(&*owners_file(server, node, &asked)?, &asked.lock)?
            };
            Ok(wire::encode(&found))
        }
        _ => Err(Errno::NOSYS),
    }
}

/// An answer without content.
fn done((): ()) -> Result<Vec<u8>> {
    Ok(Vec::new())
}

fn read(server: &Server, request: &Request, slot: Slot<'_>) -> Result<usize> {
    let wire::ReadIn { fh, offset, size, .. } = take(&mut request.body.as_slice())?;
    let handle = server.handles.get(fh, request.header.nodeid)?;
    let length = (size as usize).min(request.room).min(MAX_DATA);
    slot.fill(READ_DATA, length, handle.file()?.as_fd(), offset).map_err(|error| errno(&error))
}

fn write(server: &Server, request: &Request, slot: Slot<'_>) -> Result<Vec<u8>> {
    let asked: wire::WriteIn = take(&mut request.body.as_slice())?;
    let there = (request.header.len as usize).saturating_sub(WRITE_DATA);
    let length = asked.size as usize;
    if length > there || length > MAX_DATA {
        return Err(Errno::INVAL);
    }
    let handle = server.handles.get(asked.fh, request.header.nodeid)?;
    // The page cache knows where it writes; a process that appends means the end that the file has now.
    let append =
        asked.flags & libc::O_APPEND.cast_unsigned() != 0 && asked.write_flags & wire::WRITE_CACHE == 0;
    let file = handle.file()?.as_fd();
    let written =
        slot.store(WRITE_DATA, length, file, asked.offset, append).map_err(|error| errno(&error))?;
    Ok(wire::encode(&wire::WriteOut { size: u32::try_from(written).unwrap_or(0), padding: 0 }))
}

fn errno(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::INVAL)
}

fn copy_range(server: &Server, node: u64, asked: &wire::CopyFileRangeIn) -> Result<Vec<u8>> {
    if asked.flags != 0 {
        return Err(Errno::INVAL);
    }
    let (from, to) =
        (server.handles.get(asked.fh_in, node)?, server.handles.get(asked.fh_out, asked.nodeid_out)?);
    let (mut at, mut onto) = (asked.off_in, asked.off_out);
    // A part of it is an answer too, and a worker has others waiting.
    let length = usize::try_from(asked.len).unwrap_or(usize::MAX).min(64 << 20);
    let copied =
        rustix::fs::copy_file_range(from.file()?, Some(&mut at), to.file()?, Some(&mut onto), length)?;
    Ok(wire::encode(&wire::WriteOut { size: u32::try_from(copied).unwrap_or(0), padding: 0 }))
}

/// SETLK, and a try of SETLKW: EAGAIN where somebody else's lock is in the way.
pub(super) fn set_lock(server: &Server, request: &Request) -> Result<()> {
    const FLOCK: u32 = 1;
    let header = &request.header;
    let asked: wire::LkIn = take(&mut request.body.as_slice())?;
    if asked.lk_flags & FLOCK != 0 {
        let handle = server.handles.get(asked.fh, header.nodeid)?;
        return locks::flock(handle.file()?, asked.lock.kind);
    }
    let node = header.nodeid;
    if server.is_index_lock(node, &asked.lock) {
        server.handles.get(asked.fh, node)?.file()?;
        return server.owners.indexes.set(node, &asked, || server.open_for_locks(node));
    }
    if index::is_covered(&asked.lock) {
        server.owners.indexes.closed(node, asked.owner);
    }
    locks::set(&*owners_file(server, node, &asked)?, &asked.lock)
}

fn owners_file(
    server: &Server,
    node: u64,
    asked: &wire::LkIn,
) -> Result<std::sync::Arc<std::os::fd::OwnedFd>> {
    // Whoever locks has the file open.
    server.handles.get(asked.fh, node)?.file()?;
    server.owners.file(node, asked, || server.open_for_locks(node))
}

fn statfs(server: &Server, node: u64) -> Result<Vec<u8>> {
    let namelen = u32::try_from(MAX_NAME).unwrap_or(u32::MAX);
    if node == ROOT_ID {
        return Ok(wire::encode(&wire::StatfsOut {
            bsize: 4096,
            frsize: 4096,
            namelen,
            ..Default::default()
        }));
    }
    let host = rustix::fs::fstatvfs(&*server.node(node)?.file)?;
    Ok(wire::encode(&wire::StatfsOut {
        blocks: host.f_blocks,
        bfree: host.f_bfree,
        bavail: host.f_bavail,
        files: host.f_files,
        ffree: host.f_ffree,
        bsize: u32::try_from(host.f_bsize).unwrap_or(4096),
        frsize: u32::try_from(host.f_frsize).unwrap_or(4096),
        namelen: u32::try_from(host.f_namemax).unwrap_or(namelen),
        ..Default::default()
    }))
}

fn forget(server: &Server, header: &InHeader, mut body: &[u8]) {
    if header.opcode == opcode::FORGET {
        if let Some(forget) = wire::ForgetIn::take(&mut body) {
            server.forget(header.nodeid, forget.nlookup);
        }
        return;
    }
    let Some(batch) = wire::BatchForgetIn::take(&mut body) else { return };
    for _ in 0..batch.count {
        // As many as are there, whatever the count says.
        let Some(one) = wire::ForgetOne::take(&mut body) else { return };
        server.forget(one.nodeid, one.nlookup);
    }
}

fn initialise(server: &Server, offered: wire::InitIn) -> Result<Vec<u8>> {
    if offered.major < wire::MAJOR || (offered.major == wire::MAJOR && offered.minor < wire::OLDEST_MINOR) {
        return Err(Errno::PROTO);
    }
    if offered.major > wire::MAJOR {
        // The guest asks again with a version that both know.
        let versions = wire::InitOut { major: wire::MAJOR, minor: wire::MINOR, ..Default::default() };
        return Ok(wire::encode(&versions));
    }
    server.forget_all();
    // The upper half came with 7.36; a kernel without it offers none of its flags and reads none.
    let flags = u64::from(offered.flags);
    let upper = if flags & init::INIT_EXT == 0 { 0 } else { u64::from(u32::MAX) << 32 };
    let flags = WANTED & (flags | upper);
    Ok(wire::encode(&wire::InitOut {
        major: wire::MAJOR,
        minor: wire::MINOR,
        max_readahead: offered.max_readahead,
        flags: lower(flags),
        flags2: lower(flags >> 32),
        max_background: 12,
        congestion_threshold: 9,
        max_write: u32::try_from(MAX_DATA).unwrap_or(u32::MAX),
        time_gran: 1,
        max_pages: MAX_PAGES,
        ..Default::default()
    }))
}

fn statx(answer: &wire::AttrOut, born: Option<(i64, u32)>) -> Vec<u8> {
    const STATX_BTIME: u32 = 0x800;
    let attr = &answer.attr;
    let time = |seconds: u64, tv_nsec| wire::SxTime { tv_sec: seconds.cast_signed(), tv_nsec, reserved: 0 };
    let mut bytes = wire::encode(&wire::StatxOut {
        attr_valid: answer.attr_valid,
        attr_valid_nsec: answer.attr_valid_nsec,
        mask: wire::STATX_BASIC_STATS | if born.is_some() { STATX_BTIME } else { 0 },
        blksize: attr.blksize,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        mode: u16::try_from(attr.mode & 0xffff).unwrap_or(0),
        ino: attr.ino,
        size: attr.size,
        blocks: attr.blocks,
        atime: time(attr.atime, attr.atimensec),
        btime: born
            .map(|(tv_sec, tv_nsec)| wire::SxTime { tv_sec, tv_nsec, reserved: 0 })
            .unwrap_or_default(),
        ctime: time(attr.ctime, attr.ctimensec),
        mtime: time(attr.mtime, attr.mtimensec),
        rdev_major: (attr.rdev & 0xf_ff00) >> 8,
        rdev_minor: (attr.rdev & 0xff) | ((attr.rdev >> 12) & 0xf_ff00),
        ..Default::default()
    });
    bytes.resize(wire::STATX_OUT_SIZE, 0);
    bytes
}

/// An extended attribute's value, or its length when that was asked for with a size of 0.
fn sized(value: Vec<u8>, size: u32) -> Result<Vec<u8>> {
    let length = u32::try_from(value.len()).map_err(|_| Errno::TOOBIG)?;
    if size == 0 {
        return Ok(wire::encode(&wire::GetxattrOut { size: length, padding: 0 }));
    }
    if length > size { Err(Errno::RANGE) } else { Ok(value) }
}

/// An operation's fixed part.
fn take<T: Wire>(body: &mut &[u8]) -> Result<T> {
    T::take(body).ok_or(Errno::INVAL)
}

/// The next name, without the NUL that ends it.
fn name<'a>(body: &mut &'a [u8]) -> Result<&'a [u8]> {
    let end = body.iter().position(|&byte| byte == 0).ok_or(Errno::INVAL)?;
    let (name, rest) = body.split_at_checked(end).ok_or(Errno::INVAL)?;
    *body = rest.get(1..).unwrap_or_default();
    Ok(name)
}

/// The lower half of a set of flags.
fn lower(flags: u64) -> u32 {
    u32::try_from(flags & u64::from(u32::MAX)).unwrap_or(0)
}
