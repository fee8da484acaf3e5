//! Docker's framing of several streams on one connection.
//!
//! ```text
//!  0        1 2 3     4..8                8..
//!  stream   0 0 0     length, big-endian  that many bytes
//!  0 stdin, 1 stdout, 2 stderr, 3 an error of the daemon's
//! ```

use crate::engine::logs::Stream;

/// A frame's header.
pub const HEADER: usize = 8;

/// The header of a frame of `length` bytes.
pub fn header(stream: Stream, length: usize) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[0] = stream as u8;
    // Frames are at most 32 KiB: the engine says so.
    header[4..].copy_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes());
    header
}

/// Appends a frame.
pub fn frame(out: &mut Vec<u8>, stream: Stream, bytes: &[u8]) {
    out.extend_from_slice(&header(stream, bytes.len()));
    out.extend_from_slice(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames() {
        let mut out = Vec::new();
        frame(&mut out, Stream::Stderr, b"no");
        frame(&mut out, Stream::Stdout, &[7; 258]);
        assert_eq!(&out[..10], &[2, 0, 0, 0, 0, 0, 0, 2, b'n', b'o']);
        assert_eq!(&out[10..18], &[1, 0, 0, 0, 0, 0, 1, 2]);
        assert_eq!(out.len(), 18 + 258);
    }
}
