//! A layer's archive, split: what lies in the tree anyway, and all the rest.
//!
//! ```text
//!   archive:  header ─ content of a ─ padding, header ─ content of b ─ padding, end
//!                          │                                │
//!   split:    literal ─ content(a) ─────── literal ─── content(b) ─ literal          (zstd)
//!   tree:                root/a                          root/b
//! ```
//! So the archive that a layer came as, byte for byte, costs its headers and no second copy of its files, and
//! `docker save` and `push` give what was pulled, under the same digest.
//!
//! A file that a later entry of the same archive replaces is no longer in the tree; it is kept beside it, by the
//! inode number that it had when it was written. That number is but a name: a copied store works.
//!
//! | record | then |
//! |---|---|
//! | 1, a literal | `u32` length, bytes |
//! | 2, a file's content | `u64` name, `u16` length, path in the tree |

use std::{
    fs::{self, File},
    io::{self, BufReader, BufWriter, Read, Write},
    os::{fd::OwnedFd, unix::fs::MetadataExt},
    path::Path,
};

use bulkhead_tar::MAX_PATH;
use rustix::fs::{Mode, OFlags, ResolveFlags};
use sha2::{Digest, Sha256};

use super::DiffId;

const LITERAL: u8 = 1;
const CONTENT: u8 = 2;

/// The longest literal of one record.
const MAX_LITERAL: usize = 64 << 10;

const ZSTD_LEVEL: i32 = 3;

/// Writes a split while the archive is read.
pub(super) struct SplitWriter {
    out: zstd::stream::write::Encoder<'static, BufWriter<File>>,
    literal: Vec<u8>,
    in_content: bool,
}

impl SplitWriter {
    pub(super) fn create(path: &Path) -> io::Result<Self> {
        let file = BufWriter::new(File::options().write(true).create_new(true).open(path)?);
        let out = zstd::stream::write::Encoder::new(file, ZSTD_LEVEL)?;
        Ok(Self { out, literal: Vec::with_capacity(MAX_LITERAL), in_content: false })
    }

    /// The archive has these bytes.
    pub(super) fn bytes(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        if self.in_content {
            return Ok(());
        }
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(MAX_LITERAL - self.literal.len()));
            self.literal.extend_from_slice(now);
            bytes = later;
            if self.literal.len() == MAX_LITERAL {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// From here on come the bytes of this new file in the tree.
    pub(super) fn begin_content(&mut self, path: &[u8], file: &File) -> io::Result<()> {
        self.flush()?;
        let length = u16::try_from(path.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        self.out.write_all(&[CONTENT])?;
        self.out.write_all(&file.metadata()?.ino().to_le_bytes())?;
        self.out.write_all(&length.to_le_bytes())?;
        self.out.write_all(path)?;
        self.in_content = true;
        Ok(())
    }

    pub(super) fn end_content(&mut self) {
        self.in_content = false;
    }

    pub(super) fn finish(mut self) -> io::Result<()> {
        self.flush()?;
        self.out.finish()?.flush()
    }

    fn flush(&mut self) -> io::Result<()> {
        if !self.literal.is_empty() {
            self.out.write_all(&[LITERAL])?;
            self.out.write_all(&(self.literal.len() as u32).to_le_bytes())?;
            self.out.write_all(&self.literal)?;
            self.literal.clear();
        }
        Ok(())
    }
}

/// Moves every file with content out of the trash, below its inode number's name; the rest goes.
pub(super) fn keep_replaced(trash: &Path, kept: &Path) -> io::Result<()> {
    let mut todo = vec![trash.to_owned()];
    let mut made = false;
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let found = entry.metadata()?;
            if found.is_dir() {
                todo.push(entry.path());
            } else if found.len() > 0 {
                if !made {
                    fs::create_dir(kept)?;
                    made = true;
                }
                fs::rename(entry.path(), kept.join(found.ino().to_string()))?;
            }
        }
    }
    fs::remove_dir_all(trash)
}

/// A layer's archive as it came. Its end is an error unless all of it had the layer's digest.
pub struct LayerArchive {
    records: zstd::stream::read::Decoder<'static, BufReader<File>>,
    root: OwnedFd,
    /// None: nothing was replaced.
    kept: Option<OwnedFd>,
    present: Present,
    hash: Option<Sha256>,
    diff_id: DiffId,
}

enum Present {
    Nothing,
    Literal(u32),
    Content(File),
}

impl LayerArchive {
    pub(super) fn open(split: File, root: OwnedFd, kept: &Path, diff_id: DiffId) -> io::Result<Self> {
        let kept = match File::open(kept) {
            Ok(kept) => Some(OwnedFd::from(kept)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        let records = zstd::stream::read::Decoder::new(split)?;
        Ok(Self { records, root, kept, present: Present::Nothing, hash: Some(Sha256::new()), diff_id })
    }

    /// The next record; false at the end.
    fn advance(&mut self) -> io::Result<bool> {
        let mut kind = [0];
        if self.records.read(&mut kind)? == 0 {
            return Ok(false);
        }
        self.present = match kind[0] {
            LITERAL => Present::Literal(u32::from_le_bytes(self.take()?)),
            CONTENT => {
                let name = u64::from_le_bytes(self.take()?).to_string();
                let mut path = vec![0; usize::from(u16::from_le_bytes(self.take()?))];
                self.records.read_exact(&mut path)?;
                if path.len() > MAX_PATH {
                    return Err(damaged());
                }
                let kept = match &self.kept {
                    Some(kept) => open_below(kept, name.as_bytes())?,
                    None => None,
                };
                let found = match kept {
                    Some(kept) => Some(kept),
                    None => open_below(&self.root, &path)?,
                };
                Present::Content(found.ok_or_else(damaged)?)
            }
            _ => return Err(damaged()),
        };
        Ok(true)
    }

    fn take<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.records.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn finish(&mut self) -> io::Result<()> {
        let Some(hash) = self.hash.take() else { return Ok(()) };
        if DiffId::from_bytes(hash.finalize().into()) == self.diff_id { Ok(()) } else { Err(damaged()) }
    }
}

impl Read for LayerArchive {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            let count = match &mut self.present {
                Present::Nothing => 0,
                Present::Literal(left) => {
                    let wanted = buffer.len().min(*left as usize);
                    let count = self.records.read(&mut buffer[..wanted])?;
                    if count == 0 && wanted > 0 {
                        return Err(damaged());
                    }
                    *left -= count as u32;
                    count
                }
                Present::Content(file) => file.read(buffer)?,
            };
            if count > 0 {
                if let Some(hash) = &mut self.hash {
                    hash.update(&buffer[..count]);
                }
                return Ok(count);
            }
            self.present = Present::Nothing;
            if !self.advance()? {
                return self.finish().map(|()| 0);
            }
        }
    }
}

fn open_below(dir: &OwnedFd, path: &[u8]) -> io::Result<Option<File>> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    match rustix::fs::openat2(dir, path, flags, Mode::empty(), resolve) {
        Ok(file) => Ok(Some(file.into())),
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn damaged() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the layer's stored archive is damaged")
}
