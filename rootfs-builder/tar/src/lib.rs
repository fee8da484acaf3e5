//! tar archives from strangers and for them: ustar, GNU and PAX, in one pass, with every length capped before
//! memory is taken for it.
//!
//! ```text
//!  archive := { [meta records: L K x g] header [data, padded to 512] } two zero blocks, anything
//! ```
//!
//! Used on both sides of a guest's border: layers are unpacked with it on the host, and the agent packs and
//! unpacks a container's files with it. The general tar crates read long names and PAX records whole at whatever
//! length the archive names, so they are not used here.

mod header;
mod path;
mod pax;
mod reader;
mod writer;

use std::io;

pub use header::{Device, Kind};
pub use path::{EntryPath, MAX_DEPTH, MAX_NAME, MAX_PATH};
pub use reader::Reader;
pub use writer::Writer;

/// One file of an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The name, as the archive has it.
    pub name: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Permissions, set-id and sticky bits; no file type.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds and nanoseconds since the Unix epoch.
    pub mtime: (i64, u32),
    /// From `SCHILY.xattr.*` records, in the archive's order.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Why an archive could not be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The stream is not a tar archive, or ends too early.
    #[error("not a valid tar archive: {0}")]
    Archive(String),
    /// One entry cannot be taken.
    #[error("archive entry {name:?}: {problem}")]
    Entry {
        /// The entry's name as the archive has it, at most 200 characters of it.
        name: String,
        /// What is wrong with it.
        problem: String,
    },
    /// Reading the stream failed.
    #[error(transparent)]
    Source(#[from] io::Error),
}

impl Error {
    /// An error of one entry, its name cut to a length for people.
    pub fn of_entry(name: &[u8], problem: impl Into<String>) -> Self {
        Self::Entry { name: shown(name), problem: problem.into() }
    }
}

/// A name for people: at most 200 characters of it.
#[must_use]
pub fn shown(name: &[u8]) -> String {
    String::from_utf8_lossy(name).chars().take(200).collect()
}
