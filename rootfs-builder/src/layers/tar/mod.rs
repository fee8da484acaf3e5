//! A tar reader for hostile archives: ustar, GNU and PAX, as Go's `archive/tar` reads them (which is what
//! Docker reads layers with), one pass, no seeking, every length capped before memory is taken for it.
//!
//! ```text
//!  archive := { [meta records: L K x g] header [data, padded to 512] } two zero blocks, anything
//! ```
//!
//! The general tar crates read long names and PAX records whole at whatever length the archive names, so
//! they are not used here.

mod header;
mod pax;

use std::io::Read;

pub(super) use header::Kind;
use header::{BLOCK, Header};
use pax::Pax;

use super::{LayerError, stream::Stream};

/// The longest meta record (a long name, a set of PAX records): 1 MiB, as Go has it.
const MAX_META: u64 = 1 << 20;

/// One file of an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    /// The name, as the archive has it.
    pub(super) name: Vec<u8>,
    /// What it is.
    pub(super) kind: Kind,
    /// Permissions, set-id and sticky bits; no file type.
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Seconds and nanoseconds since the Unix epoch.
    pub(super) mtime: (i64, u32),
    /// From `SCHILY.xattr.*` records, in the archive's order.
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Reads an archive entry by entry.
pub(super) struct Reader<R> {
    stream: Stream<R>,
    /// Bytes of the current entry's data that have not been read.
    data: u64,
    /// Bytes of padding after them.
    padding: u64,
}

/// What the meta records before a header say about it.
#[derive(Default)]
struct Overrides {
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
    pax: Pax,
}

impl<R: Read> Reader<R> {
    pub(super) fn new(stream: Stream<R>) -> Self {
        Self { stream, data: 0, padding: 0 }
    }

    /// The next entry, or None at the archive's end. Data of the one before that was not read is skipped.
    pub(super) fn next(&mut self) -> Result<Option<Entry>, LayerError> {
        let mut overrides = Overrides::default();
        loop {
            self.skip_data()?;
            let Some(header) = self.header()? else { return Ok(None) };
            match header.type_flag() {
                b'L' => overrides.long_name = Some(c_string(self.meta(&header)?)),
                b'K' => overrides.long_link = Some(c_string(self.meta(&header)?)),
                b'x' | b'X' => overrides.pax.extend(&self.meta(&header)?)?,
                // Docker ignores global records, and so does every image's author.
                b'g' => drop(self.meta(&header)?),
                _ => return self.entry(&header, overrides).map(Some),
            }
        }
    }

    /// Reads data of the current entry; 0 at its end.
    pub(super) fn read_data(&mut self, buffer: &mut [u8]) -> Result<usize, LayerError> {
        let wanted = usize::try_from(self.data).map_or(buffer.len(), |data| data.min(buffer.len()));
        if wanted == 0 {
            return Ok(0);
        }
        let count = self.stream.read(&mut buffer[..wanted])?;
        if count == 0 {
            return Err(LayerError::Archive("it ends in the middle of a file".into()));
        }
        self.data -= count as u64;
        Ok(count)
    }

    /// The stream, whose rest may still be read.
    pub(super) fn into_stream(self) -> Stream<R> {
        self.stream
    }

    fn entry(&mut self, header: &Header, overrides: Overrides) -> Result<Entry, LayerError> {
        let Overrides { long_name, long_link, pax } = overrides;
        let name = pax.path.clone().or(long_name).unwrap_or_else(|| header.name());
        let in_entry = |problem: String| entry_error(&name, problem);
        if pax.sparse {
            return Err(in_entry("it is a sparse file in PAX form, which is not supported".into()));
        }
        let link = pax.link_path.or(long_link).unwrap_or_else(|| header.link_name());
        let kind = header.kind(&name, link).map_err(in_entry)?;
        let (size, padding) = match (&kind, pax.size) {
            (Kind::File, Some(size)) => padded(size),
            (Kind::File, None) => padded(header.size().map_err(in_entry)?),
            // As Go: only files have data, whatever the header says.
            _ => (0, 0),
        };
        let owner = |pax: Option<u64>, header: Result<u64, String>, what| {
            let id = pax.map_or(header, Ok)?;
            u32::try_from(id).map_err(|_| format!("its {what} {id} is over 32 bits"))
        };
        let entry = Entry {
            kind,
            mode: header.mode().map_err(in_entry)?,
            uid: owner(pax.uid, header.uid(), "owner").map_err(in_entry)?,
            gid: owner(pax.gid, header.gid(), "group").map_err(in_entry)?,
            mtime: pax.mtime.map_or_else(|| header.mtime(), Ok).map_err(in_entry)?,
            xattrs: pax.xattrs,
            name: name.clone(),
        };
        (self.data, self.padding) = (size, padding);
        Ok(entry)
    }

    /// The next header block; None at the archive's end: two zero blocks, or no block at all.
    fn header(&mut self) -> Result<Option<Header>, LayerError> {
        let Some(block) = self.block()? else { return Ok(None) };
        if block == [0; BLOCK] {
            return match self.block()? {
                None => Ok(None),
                Some(block) if block == [0; BLOCK] => Ok(None),
                Some(_) => Err(LayerError::Archive("a lone zero block stands between entries".into())),
            };
        }
        Header::read(block).map(Some).map_err(LayerError::Archive)
    }

    fn block(&mut self) -> Result<Option<[u8; BLOCK]>, LayerError> {
        let mut block = [0; BLOCK];
        match self.stream.read_full(&mut block)? {
            0 => Ok(None),
            BLOCK => Ok(Some(block)),
            _ => Err(LayerError::Archive("it ends in the middle of a header".into())),
        }
    }

    /// The content of a meta record, whole.
    fn meta(&mut self, header: &Header) -> Result<Vec<u8>, LayerError> {
        let size = header.size().map_err(LayerError::Archive)?;
        if size > MAX_META {
            return Err(LayerError::Archive(format!(
                "a long name or PAX record has {size} bytes, over the limit of {MAX_META}"
            )));
        }
        (self.data, self.padding) = padded(size);
        let mut content = Vec::new();
        let mut chunk = [0; 4096];
        loop {
            match self.read_data(&mut chunk)? {
                0 => return Ok(content),
                count => content.extend(&chunk[..count]),
            }
        }
    }

    fn skip_data(&mut self) -> Result<(), LayerError> {
        let mut chunk = vec![0; if self.data > 0 { 64 << 10 } else { 0 }];
        while self.read_data(&mut chunk)? > 0 {}
        let mut padding = [0; BLOCK];
        let wanted = usize::try_from(self.padding).unwrap_or(0).min(BLOCK);
        // Padding that is cut off at the very end is forgiven, as Go forgives it.
        self.stream.read_full(&mut padding[..wanted])?;
        self.padding = 0;
        Ok(())
    }
}

/// An error of one entry, its name cut to a length for people.
pub(super) fn entry_error(name: &[u8], problem: impl Into<String>) -> LayerError {
    let name = String::from_utf8_lossy(name).chars().take(200).collect();
    LayerError::Entry { name, problem: problem.into() }
}

/// A size and the padding after it.
fn padded(size: u64) -> (u64, u64) {
    let block = BLOCK as u64;
    (size, (block - size % block) % block)
}

/// What stands before the first NUL.
fn c_string(mut bytes: Vec<u8>) -> Vec<u8> {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    bytes.truncate(end);
    bytes
}
