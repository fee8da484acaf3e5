//! Guest buffers as the kernel takes them: transfers between guest memory and a file, tap or socket with no
//! copy in between.

use std::{
    io,
    marker::PhantomData,
    os::fd::{AsRawFd, BorrowedFd},
};

use vm_memory::{Bytes, GuestAddress, GuestMemory as _, GuestMemoryError, Permissions};

use super::device::GuestMemory;

/// Address and length in bytes of one guest buffer.
pub type Buffer = (GuestAddress, u32);

/// The most parts that one system call takes (`IOV_MAX`).
const MAX_PARTS: usize = 1024;

/// A part of a chain, as addresses in this process.
///
/// The guest may change these bytes at any time. They are handed to the kernel alone, which copies each of
/// them once; this process never looks at them through a reference.
#[derive(Debug)]
pub struct IoVec<'m> {
    parts: Vec<libc::iovec>,
    length: usize,
    memory: PhantomData<&'m GuestMemory>,
}

impl<'m> IoVec<'m> {
    /// At most `limit` bytes of `buffers`, after the first `skip`.
    ///
    /// # Errors
    /// A buffer lies outside `memory`.
    pub fn new(
        memory: &'m GuestMemory,
        buffers: &[Buffer],
        skip: u64,
        limit: u64,
    ) -> Result<Self, GuestMemoryError> {
        let mut parts = Vec::with_capacity(buffers.len());
        let mut length = 0;
        for (address, count) in ranges(buffers, skip, limit)? {
            for slice in memory.get_slices(address, count, Permissions::ReadWrite)? {
                let slice = slice?;
                let base = slice.ptr_guard_mut().as_ptr().cast();
                parts.push(libc::iovec { iov_base: base, iov_len: slice.len() });
                length += slice.len();
            }
        }
        Ok(Self { parts, length, memory: PhantomData })
    }

    /// Bytes left to transfer.
    #[must_use]
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether nothing is left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Fills all of it from `file`, beginning at `offset`.
    ///
    /// # Errors
    /// The read failed, or the file ends before (`UnexpectedEof`); some bytes may have been transferred.
    pub fn read_exact_at(self, file: BorrowedFd<'_>, offset: u64) -> io::Result<()> {
        let wanted = self.len();
        if self.read_at(file, offset)? == wanted { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    /// Fills it from `file`, beginning at `offset`, up to the file's end. How many bytes that is.
    ///
    /// # Errors
    /// The read failed; some bytes may have been transferred.
    pub fn read_at(mut self, file: BorrowedFd<'_>, offset: u64) -> io::Result<usize> {
        let wanted = self.len();
        while !self.is_empty() {
            let position = offset.saturating_add((wanted - self.len()) as u64);
            let done = self.transfer(|parts, count| {
                let position = i64::try_from(position).unwrap_or(i64::MAX);
                // SAFETY: `parts` are `count` ranges that stay mapped for 'm, since `new` took them from the
                // guest memory that 'm borrows; only the kernel writes to them.
                unsafe { libc::preadv(file.as_raw_fd(), parts, count, position) }
            })?;
            if done == 0 {
                break;
            }
        }
        Ok(wanted - self.len())
    }

    /// Writes all of it to `file`, beginning at `offset`.
    ///
    /// # Errors
    /// The write failed; some bytes may have been transferred.
    pub fn write_all_at(mut self, file: BorrowedFd<'_>, offset: u64) -> io::Result<()> {
        let mut position = offset;
        while !self.is_empty() {
            let done = self.transfer(|parts, count| {
                let position = i64::try_from(position).unwrap_or(i64::MAX);
                // SAFETY: as in `read_exact_at`; the kernel only reads.
                unsafe { libc::pwritev(file.as_raw_fd(), parts, count, position) }
            })?;
            if done == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            position = position.saturating_add(done as u64);
        }
        Ok(())
    }

    /// One `readv`: what a stream has now, or one datagram cut to this size. 0 is the end of a stream.
    ///
    /// # Errors
    /// `WouldBlock` where nothing is there, or the read failed; then nothing was transferred.
    pub fn read(&mut self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        // SAFETY: as in `read_exact_at`.
        self.transfer(|parts, count| unsafe { libc::readv(fd.as_raw_fd(), parts, count) })
    }

    /// One `writev`, for datagrams: as much as the descriptor takes now.
    ///
    /// # Errors
    /// `WouldBlock` where it takes nothing now, or the write failed; then nothing was transferred.
    pub fn write(&mut self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        // SAFETY: as in `write_all_at`.
        self.transfer(|parts, count| unsafe { libc::writev(fd.as_raw_fd(), parts, count) })
    }

    /// One `sendmsg` that neither blocks nor raises SIGPIPE: as much as the socket takes now.
    ///
    /// # Errors
    /// `WouldBlock` where it takes nothing now, or the write failed; then nothing was transferred.
    pub fn send(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        self.transfer(|parts, count| {
            // SAFETY: zero is a valid msghdr: no address, no control data, no parts.
            let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
            message.msg_iov = parts.cast_mut();
            message.msg_iovlen = usize::try_from(count).unwrap_or(0);
            // SAFETY: as in `write_all_at`; `message` lives through the call.
            unsafe { libc::sendmsg(socket.as_raw_fd(), &message, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) }
        })
    }

    /// Runs one system call on the parts, again when it is interrupted, and drops what it has transferred.
    fn transfer<F>(&mut self, call: F) -> io::Result<usize>
    where
        F: Fn(*const libc::iovec, i32) -> isize,
    {
        let count = i32::try_from(self.parts.len().min(MAX_PARTS)).unwrap_or(0);
        loop {
            if let Ok(done) = usize::try_from(call(self.parts.as_ptr(), count)) {
                self.advance(done);
                return Ok(done);
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }

    fn advance(&mut self, done: usize) {
        self.length = self.length.saturating_sub(done);
        let mut rest = done;
        let whole = self
            .parts
            .iter()
            .take_while(|part| {
                let fits = part.iov_len <= rest;
                if fits {
                    rest -= part.iov_len;
                }
                fits
            })
            .count();
        self.parts.drain(..whole);
        if let Some(first) = self.parts.first_mut() {
            first.iov_base = first.iov_base.wrapping_byte_add(rest);
            first.iov_len -= rest;
        }
    }

    /// Whether it takes more than one system call, which would tear a datagram apart.
    #[must_use]
    pub fn exceeds_one_call(&self) -> bool {
        self.parts.len() > MAX_PARTS
    }
}

/// Copies `bytes.len()` bytes out of `buffers`, after the first `skip`. False, and nothing of use in `bytes`,
/// where there are fewer or they lie outside memory.
pub fn copy_out(memory: &GuestMemory, buffers: &[Buffer], skip: u64, bytes: &mut [u8]) -> bool {
    let Ok(ranges) = ranges(buffers, skip, bytes.len() as u64) else { return false };
    let mut rest = bytes;
    for (address, count) in ranges {
        let (head, tail) = rest.split_at_mut(count.min(rest.len()));
        if memory.read_slice(head, address).is_err() {
            return false;
        }
        rest = tail;
    }
    rest.is_empty()
}

/// Copies all of `bytes` into `buffers`, after the first `skip`. False where they do not fit or lie outside
/// memory; some may have been written.
pub fn copy_in(memory: &GuestMemory, buffers: &[Buffer], skip: u64, bytes: &[u8]) -> bool {
    let Ok(ranges) = ranges(buffers, skip, bytes.len() as u64) else { return false };
    let mut rest = bytes;
    for (address, count) in ranges {
        let (head, tail) = rest.split_at(count.min(rest.len()));
        if memory.write_slice(head, address).is_err() {
            return false;
        }
        rest = tail;
    }
    rest.is_empty()
}

/// The address ranges of at most `limit` bytes of `buffers`, after the first `skip`.
fn ranges(buffers: &[Buffer], skip: u64, limit: u64) -> Result<Vec<(GuestAddress, usize)>, GuestMemoryError> {
    let (mut skip, mut left) = (skip, limit);
    let mut found = Vec::with_capacity(buffers.len());
    for (address, length) in buffers {
        let length = u64::from(*length);
        if skip >= length {
            skip -= length;
            continue;
        }
        let take = (length - skip).min(left);
        if take == 0 {
            break;
        }
        let start = address.0.checked_add(skip).map(GuestAddress);
        let start = start.ok_or(GuestMemoryError::InvalidGuestAddress(*address))?;
        found.push((start, usize::try_from(take).unwrap_or(usize::MAX)));
        left -= take;
        skip = 0;
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        os::{fd::AsFd, unix::net::UnixStream},
    };

    use proptest::{collection::vec, prelude::*};
    use vm_memory::GuestMemoryBackend as _;

    use super::{
        super::testing::{MEMORY_SIZE, memory},
        *,
    };

    const BUFFERS: [Buffer; 3] =
        [(GuestAddress(0x1000), 3), (GuestAddress(0x5000), 0x2000), (GuestAddress(0x2000), 5)];

    #[test]
    fn a_window_of_the_buffers_is_copied() {
        let memory = memory();
        assert!(copy_in(&memory, &BUFFERS, 1, b"abcdef"));
        let mut bytes = [0; 4];
        memory.read_slice(&mut bytes, GuestAddress(0x1000)).unwrap();
        assert_eq!(&bytes, b"\0ab\0");
        let mut bytes = [0; 5];
        assert!(copy_out(&memory, &BUFFERS, 2, &mut bytes));
        assert_eq!(&bytes, b"bcdef");

        let total = 3 + 0x2000 + 5;
        assert!(copy_in(&memory, &BUFFERS, total - 2, b"xy"));
        assert!(!copy_in(&memory, &BUFFERS, total - 1, b"xy"));
        assert!(!copy_out(&memory, &BUFFERS, u64::MAX, &mut [0]));
        assert!(!copy_out(&memory, &[(GuestAddress(u64::MAX), 8)], 4, &mut [0; 4]));
    }

    #[test]
    fn files_are_read_and_written_in_place() {
        let memory = memory();
        let mut file = tempfile::tempfile().unwrap();
        let content: Vec<u8> = (0..0x3000u32).map(|byte| byte.to_le_bytes()[0] ^ 0x5a).collect();
        file.write_all(&content).unwrap();
        let vec = IoVec::new(&memory, &BUFFERS, 2, 0x2004).unwrap();
        assert_eq!(vec.len(), 0x2004);
        vec.read_exact_at(file.as_fd(), 7).unwrap();
        let mut bytes = vec![0; 0x2004];
        assert!(copy_out(&memory, &BUFFERS, 2, &mut bytes));
        assert_eq!(bytes, content[7..7 + 0x2004]);

        IoVec::new(&memory, &BUFFERS, 2, 0x2004).unwrap().write_all_at(file.as_fd(), 0x4000).unwrap();
        let mut again = vec![0; 0x2004];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut again, 0x4000).unwrap();
        assert_eq!(again, bytes);

        let vec = IoVec::new(&memory, &BUFFERS, 0, u64::MAX).unwrap();
        let error = vec.read_exact_at(file.as_fd(), 0x6000).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        let length = file.metadata().unwrap().len();
        let vec = IoVec::new(&memory, &BUFFERS, 0, 100).unwrap();
        assert_eq!(vec.read_at(file.as_fd(), length - 10).unwrap(), 10);
        assert!(IoVec::new(&memory, &[(GuestAddress(1 << 40), 8)], 0, 8).is_err());
    }

    #[test]
    fn thousands_of_parts_are_transferred() {
        let memory = memory();
        let file = tempfile::tempfile().unwrap();
        let buffers: Vec<Buffer> = (0..3000).map(|part| (GuestAddress(0x1000 + part * 8), 1)).collect();
        let content: Vec<u8> = (0..3000u32).map(|byte| byte.to_le_bytes()[0]).collect();
        assert!(copy_in(&memory, &buffers, 0, &content));
        let vec = IoVec::new(&memory, &buffers, 0, u64::MAX).unwrap();
        assert!(vec.exceeds_one_call());
        vec.write_all_at(file.as_fd(), 0).unwrap();
        let mut again = vec![0; 3000];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut again, 0).unwrap();
        assert_eq!(again, content);
    }

    #[test]
    fn a_closed_socket_is_an_error_and_no_signal() {
        let memory = memory();
        let (here, mut there) = UnixStream::pair().unwrap();
        here.set_nonblocking(true).unwrap();
        assert!(copy_in(&memory, &BUFFERS, 0, b"hello"));
        let mut vec = IoVec::new(&memory, &BUFFERS, 0, 5).unwrap();
        assert_eq!(vec.send(here.as_fd()).unwrap(), 5);
        assert!(vec.is_empty());
        let mut bytes = [0; 5];
        there.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"hello");
        let mut vec = IoVec::new(&memory, &BUFFERS, 0, 5).unwrap();
        assert_eq!(vec.read(here.as_fd()).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(there);
        assert_eq!(vec.read(here.as_fd()).unwrap(), 0);
        assert_eq!(vec.send(here.as_fd()).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    /// Buffers in memory, across its end and behind it, of any length.
    fn buffers() -> impl Strategy<Value = Vec<Buffer>> {
        let end = MEMORY_SIZE as u64;
        let address = prop_oneof![8 => 0..end, 2 => end - 64..end + 64, 1 => any::<u64>()];
        let length = prop_oneof![8 => 0..5000u32, 1 => any::<u32>()];
        vec((address.prop_map(GuestAddress), length), 0..12)
    }

    /// Every byte that the buffers name, as a model: its address.
    fn bytes(buffers: &[Buffer], skip: u64, limit: u64) -> Vec<u64> {
        let all =
            buffers.iter().flat_map(|(address, length)| (0..u64::from(*length)).map(|at| address.0 + at));
        all.skip(usize::try_from(skip).unwrap()).take(usize::try_from(limit).unwrap()).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(64) })]

        /// A window of any buffers is exactly the bytes that it should be, in their order, or is refused because
        /// one of them lies outside memory. Whatever a system call does with it, the rest is the rest.
        #[test]
        fn a_window_is_its_bytes_or_nothing(
            buffers in buffers(),
            skip in 0..20_000u64,
            limit in 0..20_000u64,
            steps in vec(0..3000usize, 0..8),
        ) {
            let memory = memory();
            let base = memory.get_slice(GuestAddress(0), 1).unwrap().ptr_guard().as_ptr() as u64;
            let inside = |buffer: &Buffer| {
                buffer.0.0.checked_add(u64::from(buffer.1)).is_some_and(|end| end <= MEMORY_SIZE as u64)
            };
            prop_assume!(buffers.iter().all(|buffer| inside(buffer) || buffer.1 < 5000));
            match IoVec::new(&memory, &buffers, skip, limit) {
                Ok(mut vec) => {
                    let mut model = bytes(&buffers, skip, limit);
                    for step in steps {
                        let named: Vec<u64> = vec.parts.iter()
                            .flat_map(|part| (0..part.iov_len as u64).map(|at| part.iov_base as u64 - base + at))
                            .collect();
                        prop_assert_eq!(&named, &model);
                        prop_assert_eq!((vec.len(), vec.is_empty()), (model.len(), model.is_empty()));
                        let done = vec.transfer(|_, _| step.min(model.len()).cast_signed()).unwrap();
                        model.drain(..done);
                    }
                }
                Err(_) => prop_assert!(!buffers.iter().all(inside)),
            }
        }

        /// What is copied into buffers comes out of them, and nothing else was written.
        #[test]
        fn copies_come_back_and_touch_nothing_else(
            buffers in vec((0..0x8000u64, 0..600u32), 1..8),
            skip in 0..800u64,
            content in vec(1..=255u8, 0..1500),
        ) {
            // Apart from each other, so that the last write wins nowhere.
            let buffers: Vec<Buffer> = (0u64..).zip(&buffers)
                .map(|(index, (address, length))| (GuestAddress(index * 0x1_0000 + address), *length))
                .collect();
            let memory = memory();
            let model = bytes(&buffers, skip, content.len() as u64);
            let fits = copy_in(&memory, &buffers, skip, &content);
            prop_assert_eq!(fits, model.len() == content.len());
            let mut all = vec![0; 0x8_8000];
            memory.read_slice(&mut all, GuestAddress(0)).unwrap();
            prop_assert_eq!(all.iter().filter(|byte| **byte != 0).count(), model.len());
            for (address, byte) in model.iter().zip(&content) {
                prop_assert_eq!(all[usize::try_from(*address).unwrap()], *byte);
            }
            let mut back = vec![0; content.len()];
            prop_assert_eq!(copy_out(&memory, &buffers, skip, &mut back), fits);
            if fits {
                prop_assert_eq!(back, content);
            }
        }
    }
}
