//! Chunks: an archive's bytes on a connection, with an end that is said.

use std::io::{self, Read, Write};

use bulkhead_agent_api::files::MAX_CHUNK;

/// Bytes of a chunk's length.
const HEAD: usize = 4;

/// Writes chunks; only [`ChunkWriter::finish`] ends them.
pub(super) struct ChunkWriter<W> {
    out: W,
    /// Room for the length, then the chunk's bytes.
    chunk: Vec<u8>,
}

impl<W: Write> ChunkWriter<W> {
    pub(super) fn new(out: W) -> Self {
        let mut chunk = Vec::with_capacity(HEAD + MAX_CHUNK);
        chunk.extend([0; HEAD]);
        Self { out, chunk }
    }

    /// Sends what is left, and the end.
    pub(super) fn finish(mut self) -> io::Result<()> {
        self.send()?;
        self.out.write_all(&[0; HEAD])
    }

    fn send(&mut self) -> io::Result<()> {
        let length = self.chunk.len() - HEAD;
        if length > 0 {
            self.chunk[..HEAD].copy_from_slice(&(length as u32).to_le_bytes());
            self.out.write_all(&self.chunk)?;
            self.chunk.truncate(HEAD);
        }
        Ok(())
    }
}

impl<W: Write> Write for ChunkWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(HEAD + MAX_CHUNK - self.chunk.len());
        self.chunk.extend_from_slice(&bytes[..count]);
        if self.chunk.len() == HEAD + MAX_CHUNK {
            self.send()?;
        }
        Ok(count)
    }

    /// Nothing: an archive's end is [`ChunkWriter::finish`].
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads chunks; a connection that ends before they do is an error.
pub(super) struct ChunkReader<R> {
    source: R,
    left: usize,
    ended: bool,
}

impl<R: Read> ChunkReader<R> {
    pub(super) fn new(source: R) -> Self {
        Self { source, left: 0, ended: false }
    }
}

impl<R: Read> Read for ChunkReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.ended || buffer.is_empty() {
            return Ok(0);
        }
        if self.left == 0 {
            let mut head = [0; HEAD];
            self.source.read_exact(&mut head)?;
            self.left = u32::from_le_bytes(head) as usize;
            if self.left > MAX_CHUNK {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "a chunk is too long"));
            }
            if self.left == 0 {
                self.ended = true;
                return Ok(0);
            }
        }
        let wanted = self.left.min(buffer.len());
        let count = self.source.read(&mut buffer[..wanted])?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left -= count;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read_and_half_of_it_is_an_error() {
        let bytes: Vec<u8> = (0..3 * MAX_CHUNK + 17).map(|at| at as u8).collect();
        let mut sent = Vec::new();
        let mut writer = ChunkWriter::new(&mut sent);
        for part in bytes.chunks(1000) {
            writer.write_all(part).unwrap();
        }
        writer.finish().unwrap();
        let mut read = Vec::new();
        ChunkReader::new(&sent[..]).read_to_end(&mut read).unwrap();
        assert!(read == bytes);
        for cut in [0, 3, 100, sent.len() - 4, sent.len() - 1] {
            assert!(ChunkReader::new(&sent[..cut]).read_to_end(&mut Vec::new()).is_err(), "{cut}");
        }
        let long = [(MAX_CHUNK as u32 + 1).to_le_bytes().as_slice(), &[0; 100]].concat();
        assert!(ChunkReader::new(&long[..]).read_to_end(&mut Vec::new()).is_err());
    }
}
