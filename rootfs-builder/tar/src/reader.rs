//! Reads an archive entry by entry, as Go's `archive/tar` reads it (which is what Docker reads layers with).

use std::io::{self, Read};

use super::{
    Entry, Error,
    header::{BLOCK, Header, Kind},
    pax::Pax,
};

/// The longest meta record (a long name, a set of PAX records): 1 MiB, as Go has it.
const MAX_META: u64 = 1 << 20;

/// Reads an archive entry by entry.
pub struct Reader<R> {
    source: R,
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
    /// At an archive's beginning.
    pub fn new(source: R) -> Self {
        Self { source, data: 0, padding: 0 }
    }

    /// The next entry, or None at the archive's end. Data of the one before that was not read is skipped.
    ///
    /// # Errors
    /// [`Error`].
    #[expect(
        clippy::should_implement_trait,
        reason = "an iterator's items could not borrow the reader's data"
    )]
    pub fn next(&mut self) -> Result<Option<Entry>, Error> {
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

    /// Bytes of the current entry's data that have not been read.
    #[must_use]
    pub fn left(&self) -> u64 {
        self.data
    }

    /// Reads data of the current entry; 0 at its end.
    ///
    /// # Errors
    /// The archive ends early, or the source fails.
    pub fn read_data(&mut self, buffer: &mut [u8]) -> Result<usize, Error> {
        let wanted = usize::try_from(self.data).map_or(buffer.len(), |data| data.min(buffer.len()));
        if wanted == 0 {
            return Ok(0);
        }
        let count = read_some(&mut self.source, &mut buffer[..wanted])?;
        if count == 0 {
            return Err(Error::Archive("it ends in the middle of a file".into()));
        }
        self.data -= count as u64;
        Ok(count)
    }

    /// What is read from.
    pub fn source_mut(&mut self) -> &mut R {
        &mut self.source
    }

    /// The source, whose rest may still be read.
    pub fn into_source(self) -> R {
        self.source
    }

    fn entry(&mut self, header: &Header, overrides: Overrides) -> Result<Entry, Error> {
        let Overrides { long_name, long_link, pax } = overrides;
        let name = pax.path.clone().or(long_name).unwrap_or_else(|| header.name());
        let in_entry = |problem: String| Error::of_entry(&name, problem);
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
    fn header(&mut self) -> Result<Option<Header>, Error> {
        let Some(block) = self.block()? else { return Ok(None) };
        if block == [0; BLOCK] {
            return match self.block()? {
                None => Ok(None),
                Some(block) if block == [0; BLOCK] => Ok(None),
                Some(_) => Err(Error::Archive("a lone zero block stands between entries".into())),
            };
        }
        Header::read(block).map(Some).map_err(Error::Archive)
    }

    fn block(&mut self) -> Result<Option<[u8; BLOCK]>, Error> {
        let mut block = [0; BLOCK];
        match read_full(&mut self.source, &mut block)? {
            0 => Ok(None),
            BLOCK => Ok(Some(block)),
            _ => Err(Error::Archive("it ends in the middle of a header".into())),
        }
    }

    /// The content of a meta record, whole.
    fn meta(&mut self, header: &Header) -> Result<Vec<u8>, Error> {
        let size = header.size().map_err(Error::Archive)?;
        if size > MAX_META {
            return Err(Error::Archive(format!(
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

    fn skip_data(&mut self) -> Result<(), Error> {
        let mut chunk = vec![0; if self.data > 0 { 64 << 10 } else { 0 }];
        while self.read_data(&mut chunk)? > 0 {}
        let mut padding = [0; BLOCK];
        let wanted = usize::try_from(self.padding).unwrap_or(0).min(BLOCK);
        // Padding that is cut off at the very end is forgiven, as Go forgives it.
        read_full(&mut self.source, &mut padding[..wanted])?;
        self.padding = 0;
        Ok(())
    }
}

/// Reads up to `buffer.len()` bytes; 0 at the source's end alone.
fn read_some(source: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match source.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

/// Fills `buffer` as far as the source goes.
fn read_full(source: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match read_some(source, &mut buffer[filled..])? {
            0 => break,
            count => filled += count,
        }
    }
    Ok(filled)
}

/// A size and the padding after it.
fn padded(size: u64) -> (u64, u64) {
    let block = BLOCK as u64;
    (size, (block - size % block) % block)
}

/// What stands before the first NUL.
pub(super) fn c_string(mut bytes: Vec<u8>) -> Vec<u8> {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    bytes.truncate(end);
    bytes
}
