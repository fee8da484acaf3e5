//! The uncompressed stream: hashed, counted, capped.

use std::io::{self, Read};

use sha2::{Digest, Sha256};

use super::{DiffId, LayerError};

/// Reads a layer's stream and knows what it has read.
pub(super) struct Stream<R> {
    source: R,
    hash: Sha256,
    read: u64,
    limit: u64,
}

impl<R: Read> Stream<R> {
    pub(super) fn new(source: R, limit: u64) -> Self {
        Self { source, hash: Sha256::new(), read: 0, limit }
    }

    /// Reads up to `buffer.len()` bytes; 0 at the stream's end alone.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> Result<usize, LayerError> {
        let count = loop {
            match self.source.read(buffer) {
                Ok(count) => break count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(LayerError::Source(error)),
            }
        };
        self.hash.update(&buffer[..count]);
        self.read += count as u64;
        if self.read > self.limit {
            return Err(LayerError::Limit { what: "bytes", limit: self.limit });
        }
        Ok(count)
    }

    /// Fills `buffer` as far as the stream goes.
    pub(super) fn read_full(&mut self, buffer: &mut [u8]) -> Result<usize, LayerError> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.read(&mut buffer[filled..])? {
                0 => break,
                count => filled += count,
            }
        }
        Ok(filled)
    }

    /// Reads what is left, and names the stream: its digest and its length.
    pub(super) fn finish(mut self) -> Result<(DiffId, u64), LayerError> {
        let mut buffer = vec![0; 64 << 10];
        while self.read(&mut buffer)? > 0 {}
        Ok((DiffId::from_bytes(self.hash.finalize().into()), self.read))
    }
}
