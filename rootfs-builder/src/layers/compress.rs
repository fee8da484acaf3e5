//! Undoing a layer's compression, whatever its media type claims: as Docker does, by the first bytes.

use std::io::{self, BufReader, Read};

const GZIP: [u8; 3] = [0x1f, 0x8b, 0x08];
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
const ZSTD_SKIPPABLE: [u8; 3] = [0x2a, 0x4d, 0x18];
const BZIP2: [u8; 3] = *b"BZh";
const XZ: [u8; 6] = [0xfd, b'7', b'z', b'X', b'Z', 0];

/// The largest zstd window accepted, as a power of two: 128 MiB, zstd's own default for decoders.
const ZSTD_WINDOW_LOG: u32 = 27;

/// The uncompressed bytes of `reader`: gzip (of one or more members), zstd, or not compressed at all.
///
/// # Errors
/// Reading the first bytes failed; or the compression is bzip2 or xz, which the OCI image specification does
/// not know (kind [`io::ErrorKind::Unsupported`]). Damage further on is an error of the returned reader.
pub fn decompress<'a>(reader: impl Read + Send + 'a) -> io::Result<Box<dyn Read + Send + 'a>> {
    let mut reader = reader;
    let mut magic = Vec::with_capacity(6);
    reader.by_ref().take(6).read_to_end(&mut magic)?;
    let skippable =
        magic.get(1..4) == Some(&ZSTD_SKIPPABLE) && magic.first().is_some_and(|first| first & 0xf0 == 0x50);
    let whole = BufReader::with_capacity(64 << 10, io::Cursor::new(magic.clone()).chain(reader));
    if magic.starts_with(&GZIP) {
        Ok(Box::new(flate2::bufread::MultiGzDecoder::new(whole)))
    } else if magic.starts_with(&ZSTD) || skippable {
        let mut decoder = zstd::stream::read::Decoder::with_buffer(whole)?;
        decoder.window_log_max(ZSTD_WINDOW_LOG)?;
        Ok(Box::new(decoder))
    } else if magic.starts_with(&BZIP2) || magic.starts_with(&XZ) {
        let name = if magic.starts_with(&XZ) { "xz" } else { "bzip2" };
        let message = format!("{name} compression is not supported: gzip, zstd or none is");
        Err(io::Error::new(io::ErrorKind::Unsupported, message))
    } else {
        Ok(Box::new(whole))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn gzip(data: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    fn read(data: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        decompress(data)?.read_to_end(&mut out)?;
        Ok(out)
    }

    #[test]
    fn each_form_gives_the_same_bytes() {
        let data = b"layer".repeat(10_000);
        assert_eq!(read(&data).unwrap(), data);
        assert_eq!(read(&gzip(&data)).unwrap(), data);
        assert_eq!(read(&zstd::encode_all(&data[..], 1).unwrap()).unwrap(), data);
    }

    #[test]
    fn every_gzip_member_is_read() {
        assert_eq!(read(&[gzip(b"one "), gzip(b"two")].concat()).unwrap(), b"one two");
    }

    #[test]
    fn short_streams_are_passed_on() {
        for length in 0..6 {
            assert_eq!(read(&b"BZ\0\0\0\0"[..length]).unwrap().len(), length);
        }
    }

    #[test]
    fn a_cut_stream_is_an_error() {
        let data = b"layer".repeat(10_000);
        for packed in [gzip(&data), zstd::encode_all(&data[..], 1).unwrap()] {
            assert!(read(&packed[..packed.len() - 1]).is_err());
        }
    }

    #[test]
    fn other_compressions_are_named() {
        assert!(read(b"\xfd7zXZ\0rest").unwrap_err().to_string().contains("xz"));
        assert!(read(b"BZh91AY").unwrap_err().to_string().contains("bzip2"));
    }
}
