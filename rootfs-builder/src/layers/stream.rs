//! The uncompressed stream: hashed, counted, capped, and written down for when it is wanted again.

use std::{
    io::{self, Read},
    path::PathBuf,
};

use sha2::{Digest, Sha256};

use super::{DiffId, LayerError, split::SplitWriter};

/// Reads a layer's stream and knows what it has read.
pub(super) struct Stream<R> {
    source: R,
    hash: Sha256,
    read: u64,
    limit: u64,
    split: SplitWriter,
}

impl<R: Read> Stream<R> {
    pub(super) fn new(source: R, limit: u64, split: SplitWriter) -> Self {
        Self { source, hash: Sha256::new(), read: 0, limit, split }
    }

    /// What is written down of it.
    pub(super) fn split(&mut self) -> &mut SplitWriter {
        &mut self.split
    }

    /// Reads what is left, and names the stream: its digest and its length.
    pub(super) fn finish(mut self) -> Result<(DiffId, u64), LayerError> {
        io::copy(&mut self, &mut io::sink()).map_err(bulkhead_tar::Error::from)?;
        self.split.finish().map_err(not_written)?;
        Ok((DiffId::from_bytes(self.hash.finalize().into()), self.read))
    }
}

/// The store's failure; which store it is, the store knows.
fn not_written(source: io::Error) -> LayerError {
    LayerError::Store { path: PathBuf::new(), action: "writing the archive down".into(), source }
}

impl<R: Read> Read for Stream<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.source.read(buffer)?;
        self.hash.update(&buffer[..count]);
        self.read += count as u64;
        if self.read > self.limit {
            return Err(io::Error::other(LayerError::Limit { what: "bytes", limit: self.limit }));
        }
        self.split.bytes(&buffer[..count]).map_err(|error| io::Error::other(not_written(error)))?;
        Ok(count)
    }
}
