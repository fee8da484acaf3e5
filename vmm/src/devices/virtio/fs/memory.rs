//! A request in guest memory: its header and body copied out once, its reply written in place.
//!
//! ```text
//!  readable: InHeader · body          writable: OutHeader · data
//!            └ copied before anything of it is looked at     └ READ: preadv(2) goes straight here
//! ```
//!
//! The guest may change its memory at any moment: nothing is read twice, and nothing that was written is
//! read back.

use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;

use super::{
    super::{
        device::GuestMemory,
        iovec::{IoVec, copy_in, copy_out},
        queue::Buffers,
    },
    backend::Result,
    dispatch::{self, MAX_BODY, Reply, Request, Sink},
    server::Server,
    wire::{InHeader, OutHeader, Wire, encode},
};

/// Where a reply's data begin.
const DATA: u64 = OutHeader::SIZE as u64;

/// Serves the request in a chain's buffers. The number of bytes written: 0 when it is no request, has no
/// room for a reply, or is one that gets none.
pub(super) fn serve(server: &mut Server, memory: &GuestMemory, buffers: &Buffers) -> u32 {
    let readable = buffers.readable_bytes();
    let mut bytes = vec![0; (InHeader::SIZE + MAX_BODY).min(usize::try_from(readable).unwrap_or(usize::MAX))];
    if !copy_out(memory, &buffers.readable, 0, &mut bytes) {
        return 0;
    }
    let mut body = &bytes[..];
    let Some(header) = InHeader::take(&mut body) else { return 0 };
    // The length that the request itself names must be there, up to what is copied of any.
    let named = (header.len as usize).checked_sub(InHeader::SIZE);
    let body = named.and_then(|named| body.get(..named.min(MAX_BODY)));
    let mut sink = GuestSink { memory, buffers };
    let reply = match body.filter(|_| u64::from(header.len) <= readable) {
        Some(body) => dispatch::serve(server, Request { header, body }, &mut sink),
        None => Reply::Error(Errno::INVAL),
    };
    let (error, payload, length) = match reply {
        Reply::None => return 0,
        Reply::Error(errno) => (-errno.raw_os_error(), Vec::new(), 0),
        Reply::Bytes(bytes) => {
            let length = bytes.len();
            (0, bytes, length)
        }
        Reply::Filled(length) => (0, Vec::new(), length),
    };
    let Ok(len) = u32::try_from(OutHeader::SIZE + length) else { return 0 };
    if buffers.writable_bytes() < u64::from(len) {
        return 0;
    }
    let head = encode(&OutHeader { len, error, unique: header.unique });
    let written =
        copy_in(memory, &buffers.writable, 0, &head) && copy_in(memory, &buffers.writable, DATA, &payload);
    if written { len } else { 0 }
}

/// A chain's writable buffers, after the reply's header.
struct GuestSink<'m> {
    memory: &'m GuestMemory,
    buffers: &'m Buffers,
}

impl Sink for GuestSink<'_> {
    fn room(&self) -> usize {
        usize::try_from(self.buffers.writable_bytes().saturating_sub(DATA)).unwrap_or(usize::MAX)
    }

    fn fill(&mut self, file: &OwnedFd, offset: u64, length: usize) -> Result<usize> {
        let data = IoVec::new(self.memory, &self.buffers.writable, DATA, length as u64);
        let read = data.map_err(|_| Errno::FAULT)?.read_at(file.as_fd(), offset);
        read.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
    }
}
