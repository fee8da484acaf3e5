//! What lies in a block slot: a raw file. Its format is never looked at.

use std::{fs::File, io, os::fd::AsFd};

use rustix::fs::{FallocateFlags, OFlags, fallocate, fcntl_getfl};

use crate::devices::virtio::iovec::IoVec;

/// The unit of every address and size on the wire, in bytes (virtio 1.3, 5.2.4).
pub(super) const SECTOR: u64 = 512;

/// Zeroes for files whose file system cannot make them.
static ZEROES: [u8; 64 * 1024] = [0; 64 * 1024];

/// Why a file cannot be a medium. The slot is as it was.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The slot has a medium.
    #[error("the slot has a medium already")]
    Occupied,
    /// A directory, device, socket, or the like.
    #[error("the medium is not a regular file")]
    NotRegular,
    /// The file is open for reading only, or for writing only.
    #[error("the file is not open for {0}")]
    Access(&'static str),
    /// It could not be looked at.
    #[error("the medium cannot be examined")]
    Examine(#[source] io::Error),
}

/// An attached file. Its size is taken once: what the file grows or shrinks by later is not seen, and
/// reading past a shrunk file's end is an I/O error.
#[derive(Debug)]
pub(super) struct Medium {
    file: File,
    sectors: u64,
    read_only: bool,
}

/// A range of a medium that is known to lie inside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Range {
    offset: u64,
    length: u64,
}

impl Range {
    /// In bytes.
    pub(super) fn length(self) -> u64 {
        self.length
    }
}

impl Medium {
    pub(super) fn new(file: File, read_only: bool) -> Result<Self, AttachError> {
        let metadata = file.metadata().map_err(AttachError::Examine)?;
        if !metadata.is_file() {
            return Err(AttachError::NotRegular);
        }
        let flags = fcntl_getfl(&file).map_err(|error| AttachError::Examine(error.into()))?;
        let mode = flags & OFlags::ACCMODE;
        if flags.contains(OFlags::PATH) || mode == OFlags::WRONLY {
            return Err(AttachError::Access("reading"));
        }
        if !read_only && mode != OFlags::RDWR {
            return Err(AttachError::Access("writing"));
        }
        Ok(Self { file, sectors: metadata.len() / SECTOR, read_only })
    }

    pub(super) fn into_file(self) -> File {
        self.file
    }

    #[cfg(test)]
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Its size in sectors; what is left of a last, partial one cannot be reached.
    pub(super) fn sectors(&self) -> u64 {
        self.sectors
    }

    pub(super) fn read_only(&self) -> bool {
        self.read_only
    }

    /// The range of `length` bytes from `sector` on. None where it is not whole sectors, or leaves the medium.
    pub(super) fn range(&self, sector: u64, length: u64) -> Option<Range> {
        let end = sector.checked_add(length / SECTOR)?;
        if !length.is_multiple_of(SECTOR) || end > self.sectors {
            return None;
        }
        // `end` sectors lie in a file, whose size in bytes fits.
        Some(Range { offset: sector * SECTOR, length })
    }

    /// Reads into guest memory, which has the range's length.
    pub(super) fn read(&self, range: Range, data: IoVec<'_>) -> io::Result<()> {
        data.read_exact_at(self.file.as_fd(), range.offset)
    }

    /// Writes from guest memory, which has the range's length.
    pub(super) fn write(&self, range: Range, data: IoVec<'_>) -> io::Result<()> {
        data.write_all_at(self.file.as_fd(), range.offset)
    }

    /// Brings everything that was written to stable storage.
    pub(super) fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Gives the range's space back to the host; it reads as zeroes afterwards.
    pub(super) fn discard(&self, range: Range) -> io::Result<()> {
        self.fallocate(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, range)
    }

    /// Makes the range read as zeroes; with `unmap` its space may go back to the host.
    pub(super) fn write_zeroes(&self, range: Range, unmap: bool) -> io::Result<()> {
        let done = if unmap {
            self.discard(range)
        } else {
            self.fallocate(FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE, range)
        };
        match done {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => self.write_out_zeroes(range),
            done => done,
        }
    }

    fn fallocate(&self, flags: FallocateFlags, range: Range) -> io::Result<()> {
        if range.length == 0 {
            return Ok(());
        }
        loop {
            match fallocate(&self.file, flags, range.offset, range.length) {
                Err(rustix::io::Errno::INTR) => {}
                done => return Ok(done?),
            }
        }
    }

    fn write_out_zeroes(&self, range: Range) -> io::Result<()> {
        use std::os::unix::fs::FileExt;
        let end = range.offset + range.length;
        let mut offset = range.offset;
        while offset < end {
            let step = (end - offset).min(ZEROES.len() as u64);
            let zeroes = &ZEROES[..usize::try_from(step).unwrap_or(ZEROES.len())];
            self.file.write_all_at(zeroes, offset)?;
            offset += step;
        }
        Ok(())
    }
}
