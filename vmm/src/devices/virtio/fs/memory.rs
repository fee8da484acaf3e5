//! A request in guest memory: its header and body copied out once, its reply written in place.
//!
//! ```text
//!  readable: InHeader · body          writable: OutHeader · data
//!            └ copied before anything of it is looked at     └ READ: preadv(2) goes straight here
//! ```
//!
//! The guest may change its memory at any moment: nothing is read twice, and nothing that was written is
//! read back.

use std::os::fd::{AsRawFd, OwnedFd};

use rustix::io::Errno;
use vm_memory::{Bytes, GuestAddress, GuestMemory as _, Permissions, VolatileSlice};

use super::{
    super::{device::GuestMemory, queue::Buffers},
    backend::Result,
    dispatch::{self, MAX_BODY, Reply, Request, Sink},
    server::Server,
    wire::{InHeader, OutHeader, Wire, encode},
};

/// Serves the request in a chain's buffers. The number of bytes written: 0 when it is no request, or one
/// that has no reply.
pub(super) fn serve(server: &mut Server, memory: &GuestMemory, buffers: &Buffers) -> u32 {
    let Some(bytes) = copy_out(memory, &buffers.readable) else { return 0 };
    let mut body = &bytes[..];
    let Some(header) = InHeader::take(&mut body) else { return 0 };
    let Some(mut sink) = GuestSink::new(memory, &buffers.writable) else { return 0 };
    // The length that the request itself names must be there, up to what is copied of any.
    let named = (header.len as usize).checked_sub(InHeader::SIZE);
    let whole = buffers.readable_bytes() >= u64::from(header.len);
    let reply = match named.and_then(|named| body.get(..named.min(MAX_BODY))) {
        Some(body) if whole => dispatch::serve(server, Request { header, body }, &mut sink),
        _ => Reply::Error(Errno::INVAL),
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
    let head = encode(&OutHeader { len, error, unique: header.unique });
    if sink.write(0, &head) && sink.write(OutHeader::SIZE, &payload) { len } else { 0 }
}

/// The header and body of a request: at most as much as any has.
fn copy_out(memory: &GuestMemory, readable: &[(GuestAddress, u32)]) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    for &(address, length) in readable {
        let start = bytes.len();
        let wanted = (length as usize).min(InHeader::SIZE + MAX_BODY - start);
        bytes.resize(start + wanted, 0);
        memory.read_slice(bytes.get_mut(start..)?, address).ok()?;
    }
    Some(bytes)
}

/// A chain's writable buffers as host memory.
struct GuestSink<'m> {
    slices: Vec<VolatileSlice<'m>>,
    total: usize,
}

impl<'m> GuestSink<'m> {
    fn new(memory: &'m GuestMemory, writable: &[(GuestAddress, u32)]) -> Option<Self> {
        let mut slices = Vec::with_capacity(writable.len());
        for &(address, length) in writable {
            for slice in memory.get_slices(address, length as usize, Permissions::Write).ok()? {
                slices.push(slice.ok()?);
            }
        }
        let total = slices.iter().try_fold(0_usize, |sum, slice| sum.checked_add(slice.len()))?;
        Some(Self { slices, total })
    }

    /// The slices of `length` bytes from `offset` on.
    fn part(&self, offset: usize, length: usize) -> Vec<VolatileSlice<'m>> {
        let (mut skip, mut left) = (offset, length);
        let mut part = Vec::with_capacity(self.slices.len());
        for slice in &self.slices {
            let from = skip.min(slice.len());
            let take = (slice.len() - from).min(left);
            skip -= from;
            left -= take;
            if take > 0
                && let Ok(slice) = slice.subslice(from, take)
            {
                part.push(slice);
            }
        }
        part
    }

    /// Writes bytes at an offset; false when they have no room.
    fn write(&mut self, offset: usize, mut bytes: &[u8]) -> bool {
        if offset.checked_add(bytes.len()).is_none_or(|end| end > self.total) {
            return false;
        }
        for slice in self.part(offset, bytes.len()) {
            let (head, tail) = bytes.split_at(slice.len());
            slice.copy_from(head);
            bytes = tail;
        }
        true
    }
}

impl Sink for GuestSink<'_> {
    fn room(&self) -> usize {
        self.total.saturating_sub(OutHeader::SIZE)
    }

    fn fill(&mut self, file: &OwnedFd, offset: u64, length: usize) -> Result<usize> {
        let mut done = 0;
        while done < length.min(self.room()) {
            let part = self.part(OutHeader::SIZE + done, length.min(self.room()) - done);
            let at = offset.checked_add(done as u64).ok_or(Errno::INVAL)?;
            match read_into(file, &part, at) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(Errno::INTR) => {}
                Err(_) if done > 0 => break,
                Err(errno) => return Err(errno),
            }
        }
        Ok(done)
    }
}

/// Reads a file into guest memory with one system call, which may read less than there is room for.
fn read_into(file: &OwnedFd, slices: &[VolatileSlice<'_>], offset: u64) -> Result<usize> {
    // The most that preadv takes (IOV_MAX).
    let slices = &slices[..slices.len().min(1024)];
    let guards: Vec<_> = slices.iter().map(VolatileSlice::ptr_guard_mut).collect();
    let buffers: Vec<_> = guards
        .iter()
        .map(|guard| libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() })
        .collect();
    let count = libc::c_int::try_from(buffers.len()).map_err(|_| Errno::INVAL)?;
    let offset = libc::off_t::try_from(offset).map_err(|_| Errno::INVAL)?;
    // SAFETY: each buffer is a slice of guest memory that `guards` keep mapped and writable during the call;
    // no Rust reference to that memory exists, so the kernel and the guest may write it at will.
    let read = unsafe { libc::preadv(file.as_raw_fd(), buffers.as_ptr(), count, offset) };
    if read < 0 {
        let errno = std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
        return Err(Errno::from_raw_os_error(errno));
    }
    usize::try_from(read).map_err(|_| Errno::IO)
}
