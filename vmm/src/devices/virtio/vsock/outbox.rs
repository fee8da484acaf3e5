//! Bytes from the guest that their client has not taken yet.

use std::{collections::VecDeque, io, os::unix::net::UnixStream};

use rustix::net::{SendFlags, send};

/// A queue of bytes. What bounds it is the credit that a connection gives its guest.
#[derive(Debug, Default)]
pub(super) struct Outbox(VecDeque<u8>);

impl Outbox {
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.0.extend(bytes);
    }

    /// Throws everything away; gives how much that was.
    pub(super) fn clear(&mut self) -> usize {
        std::mem::take(&mut self.0).len()
    }

    /// Sends what `stream` takes now; gives how much that was.
    ///
    /// # Errors
    /// The client takes no more, for good.
    pub(super) fn flush(&mut self, stream: &UnixStream) -> io::Result<usize> {
        let mut flushed = 0;
        loop {
            let (front, _) = self.0.as_slices();
            if front.is_empty() {
                // Gives the memory back: an idle connection holds none.
                self.0 = VecDeque::new();
                return Ok(flushed);
            }
            match send(stream, front, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(sent) => {
                    self.0.drain(..sent);
                    flushed += sent;
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return Ok(flushed),
                Err(error) => return Err(error.into()),
            }
        }
    }
}
