//! From a request's bytes to an operation, and from its result to a reply's bytes.
//!
//! | operation | answer |
//! |---|---|
//! | INIT, LOOKUP, GETATTR, READLINK, READ, READDIR, READDIRPLUS, STATFS, GETXATTR, LISTXATTR, ACCESS, LSEEK | what is asked for |
//! | FORGET, BATCH_FORGET, INTERRUPT | no reply |
//! | DESTROY | everything is forgotten |
//! | OPEN, OPENDIR | ENOSYS: Linux then opens with no request at all, and keeps what it has cached |
//! | SETUPMAPPING, REMOVEMAPPING | a file comes into the window, and goes |
//! | STATX | ENOSYS: a layer knows of no birth, and Linux would ask for it with each file that `statx` is used on |
//! | RELEASE, RELEASEDIR | nothing was opened; success |
//! | FLUSH, FSYNC, FSYNCDIR | ENOSYS: Linux does not ask again |
//! | whatever changes a file | EROFS |
//! | anything else | ENOSYS |
//!
//! ENOSYS to OPEN holds for the whole connection. So a share whose files must really be opened (a writable
//! volume) cannot live on one device with layers; it gets a device whose server opens.

use std::os::fd::OwnedFd;

use rustix::io::Errno;

use super::{
    backend::Result,
    mapping::ALIGNMENT,
    server::Server,
    wire::{self, MAX_NAME, Wire, init, opcode},
};

/// The longest fixed part, names and values that an operation served here may carry; of WRITE's data nothing
/// is read.
pub(super) const MAX_BODY: usize = 64 << 10;

/// The largest reply to anything but READ: what a listing may fill.
const MAX_REPLY: usize = 1 << 20;

/// The most pages one READ may ask for: 1 MiB.
const MAX_PAGES: u16 = 256;

/// The most bytes that one READ gets, whatever it asks for and has room for: buffers may name the same
/// memory many times over, and a file may be as large as a layer.
const MAX_READ: usize = MAX_PAGES as usize * 4096;

/// What the server is willing to do, as flags of INIT. Not among them:
/// * EXPORT_SUPPORT: node ids do not outlive the mount, and NO_EXPORT_SUPPORT says so, lest overlayfs trust
///   a file handle in an upper layer that was written over another machine's node ids;
/// * POSIX_ACL: it costs a request for each file whose group has rights. An image's ACLs are shown as
///   attributes and not enforced;
/// * READDIRPLUS_AUTO: Linux would take attributes with the first page of a directory alone, and then ask for
///   those of each file by itself. What lists a directory mostly asks for them, and a layer's never change.
const WANTED: u64 = init::ASYNC_READ
    | init::AUTO_INVAL_DATA
    | init::DO_READDIRPLUS
    | init::ASYNC_DIO
    | init::NO_OPEN_SUPPORT
    | init::PARALLEL_DIROPS
    | init::MAX_PAGES
    | init::CACHE_SYMLINKS
    | init::NO_OPENDIR_SUPPORT
    | init::INIT_EXT
    | init::NO_EXPORT_SUPPORT;

/// What it is willing to do besides where the device has a window.
const WITH_WINDOW: u64 = init::MAP_ALIGNMENT | init::HAS_INODE_DAX;

/// A request in host memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Request<'a> {
    pub(super) header: wire::InHeader,
    /// What follows the header, at most [`MAX_BODY`] of it.
    pub(super) body: &'a [u8],
}

/// Where a reply's data go, after its header.
pub(super) trait Sink {
    /// How many bytes it takes.
    fn room(&self) -> usize;

    /// Reads up to `length` bytes of a file straight into it.
    fn fill(&mut self, file: &OwnedFd, offset: u64, length: usize) -> Result<usize>;
}

/// What is to be answered.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Reply {
    /// Nothing at all.
    None,
    /// An error.
    Error(Errno),
    /// Success and these bytes.
    Bytes(Vec<u8>),
    /// Success; that many bytes are in the sink.
    Filled(usize),
}

/// Serves one request.
pub(super) fn serve(server: &mut Server, request: Request<'_>, sink: &mut impl Sink) -> Reply {
    match request.header.opcode {
        opcode::FORGET | opcode::BATCH_FORGET => {
            forget(server, request);
            Reply::None
        }
        opcode::INTERRUPT => Reply::None,
        opcode::READ => read(server, request, sink).map_or_else(Reply::Error, Reply::Filled),
        _ => match answer(server, request, sink.room()) {
            // The guest offers room for whatever it asks for.
            Ok(bytes) if bytes.len() > sink.room() => Reply::Error(Errno::INVAL),
            Ok(bytes) => Reply::Bytes(bytes),
            Err(errno) => Reply::Error(errno),
        },
    }
}

fn answer(server: &mut Server, request: Request<'_>, room: usize) -> Result<Vec<u8>> {
    let (node, mut body) = (request.header.nodeid, request.body);
    match request.header.opcode {
        opcode::INIT => initialise(server, take(&mut body)?),
        opcode::DESTROY => {
            server.forget_all();
            Ok(Vec::new())
        }
        opcode::LOOKUP => Ok(wire::encode(&server.look_up(node, name(body)?)?)),
        opcode::GETATTR => {
            let wire::GetattrIn { .. } = take(&mut body)?;
            Ok(wire::encode(&server.attributes(node)?))
        }
        opcode::READLINK => server.read_link(node),
        opcode::READDIR | opcode::READDIRPLUS => {
            let wire::ReadIn { offset, size, .. } = take(&mut body)?;
            let room = (size as usize).min(room).min(MAX_REPLY);
            server.read_directory(node, offset, room, request.header.opcode == opcode::READDIRPLUS)
        }
        opcode::STATFS => {
            server.check_known(node)?;
            // Read-only and of no size, like squashfs or a CD: the upper layer's figures are what counts.
            let namelen = u32::try_from(MAX_NAME).unwrap_or(u32::MAX);
            Ok(wire::encode(&wire::StatfsOut { bsize: 4096, frsize: 4096, namelen, ..Default::default() }))
        }
        opcode::GETXATTR => {
            let wire::GetxattrIn { size, .. } = take(&mut body)?;
            sized(server.xattr(node, name(body)?)?, size)
        }
        opcode::LISTXATTR => {
            let wire::GetxattrIn { size, .. } = take(&mut body)?;
            sized(server.xattr_names(node)?, size)
        }
        opcode::ACCESS => {
            const W_OK: u32 = 2;
            let wire::AccessIn { mask, .. } = take(&mut body)?;
            server.check_known(node)?;
            if mask & W_OK == 0 { Ok(Vec::new()) } else { Err(Errno::ROFS) }
        }
        opcode::LSEEK => {
            let wire::LseekIn { offset, whence, .. } = take(&mut body)?;
            Ok(wire::encode(&wire::LseekOut { offset: server.seek(node, offset, whence)? }))
        }
        opcode::SETUPMAPPING | opcode::REMOVEMAPPING if server.mappings.window().is_none() => {
            Err(Errno::NOSYS)
        }
        opcode::SETUPMAPPING => server.map(node, &take(&mut body)?).map(|()| Vec::new()),
        opcode::REMOVEMAPPING => {
            let wire::RemovemappingIn { count } = take(&mut body)?;
            // As many as are there, whatever the count says.
            (0..count).map_while(|_| Wire::take(&mut body)).try_for_each(|one| server.unmap(&one))?;
            Ok(Vec::new())
        }
        opcode::RELEASE | opcode::RELEASEDIR => Ok(Vec::new()),
        opcode::SETATTR
        | opcode::SYMLINK
        | opcode::MKNOD
        | opcode::MKDIR
        | opcode::UNLINK
        | opcode::RMDIR
        | opcode::RENAME
        | opcode::RENAME2
        | opcode::LINK
        | opcode::WRITE
        | opcode::SETXATTR
        | opcode::REMOVEXATTR
        | opcode::CREATE
        | opcode::FALLOCATE
        | opcode::COPY_FILE_RANGE
        | opcode::TMPFILE => Err(Errno::ROFS),
        // OPEN, OPENDIR, STATX, FLUSH, FSYNC and FSYNCDIR among them, see above.
        _ => Err(Errno::NOSYS),
    }
}

fn read(server: &mut Server, request: Request<'_>, sink: &mut impl Sink) -> Result<usize> {
    let wire::ReadIn { offset, size, .. } = take(&mut &*request.body)?;
    let length = (size as usize).min(sink.room()).min(MAX_READ);
    if i64::try_from(offset).is_err() {
        return Err(Errno::INVAL);
    }
    let file = server.regular_file(request.header.nodeid)?;
    if length == 0 { Ok(0) } else { sink.fill(&file, offset, length) }
}

fn forget(server: &mut Server, request: Request<'_>) {
    let mut body = request.body;
    if request.header.opcode == opcode::FORGET {
        if let Some(forget) = wire::ForgetIn::take(&mut body) {
            server.forget(request.header.nodeid, forget.nlookup);
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

fn initialise(server: &mut Server, offered: wire::InitIn) -> Result<Vec<u8>> {
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
    let has_window = server.mappings.window().is_some();
    let wanted = if has_window { WANTED | WITH_WINDOW } else { WANTED };
    let flags = wanted & (flags | upper);
    Ok(wire::encode(&wire::InitOut {
        major: wire::MAJOR,
        minor: wire::MINOR,
        max_readahead: offered.max_readahead,
        flags: lower(flags),
        flags2: lower(flags >> 32),
        max_background: 64,
        congestion_threshold: 48,
        max_write: 4096,
        time_gran: 1,
        max_pages: MAX_PAGES,
        map_alignment: if has_window { ALIGNMENT } else { 0 },
        ..Default::default()
    }))
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

/// A name that ends the request, with the NUL that ends the name.
fn name(body: &[u8]) -> Result<&[u8]> {
    let name = body.strip_suffix(&[0]).ok_or(Errno::INVAL)?;
    if name.contains(&0) { Err(Errno::INVAL) } else { Ok(name) }
}

/// The lower half of a set of flags.
fn lower(flags: u64) -> u32 {
    u32::try_from(flags & u64::from(u32::MAX)).unwrap_or(0)
}
