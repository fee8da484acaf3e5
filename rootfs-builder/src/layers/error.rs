//! Why a layer could not be unpacked or used.

use std::{io, path::PathBuf};

use super::DiffId;

/// Where callers branch on a [`LayerError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerErrorKind {
    /// The layer itself is at fault: damaged, hostile, or it asks for what cannot be done.
    Invalid,
    /// The bytes could not be fetched or decompressed.
    Source,
    /// The store's filesystem is full (space, inodes or quota).
    NoSpace,
    /// The layer is not in the store.
    NotFound,
    /// The store's filesystem failed.
    Store,
}

/// Why a layer could not be unpacked or used.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// The stream is not a tar archive, or ends too early.
    #[error("the layer is not a valid tar archive: {0}")]
    Archive(String),
    /// One entry cannot be unpacked.
    #[error("layer entry {name:?}: {problem}")]
    Entry {
        /// The entry's name as the archive has it, at most 200 characters of it.
        name: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The layer is over one of its [`super::Limits`].
    #[error("the layer has more than {limit} {what}")]
    Limit {
        /// `bytes` or `entries`.
        what: &'static str,
        /// The limit.
        limit: u64,
    },
    /// The stream is not the layer that was asked for.
    #[error("the layer's content has the digest {actual}, but {expected} was expected")]
    WrongDigest {
        /// The diff id that was asked for.
        expected: DiffId,
        /// What the stream has.
        actual: DiffId,
    },
    /// Reading the stream failed.
    #[error("the layer could not be read: {0}")]
    Source(#[source] io::Error),
    /// The store's filesystem is full.
    #[error("no space left for layers in {}", .path.display())]
    NoSpace {
        /// The store's directory.
        path: PathBuf,
        /// ENOSPC or EDQUOT.
        source: io::Error,
    },
    /// The layer is not in the store.
    #[error("layer {0} is not in the store")]
    NotFound(DiffId),
    /// The layer was unpacked when archives were not written down.
    #[error(
        "layer {0} was unpacked by an older version, which did not keep its archive: remove its images and pull them again"
    )]
    NoArchive(DiffId),
    /// The store's filesystem failed.
    #[error("layer store {}: {action}: {source}", .path.display())]
    Store {
        /// The store's directory.
        path: PathBuf,
        /// What was being done.
        action: String,
        /// The cause.
        source: io::Error,
    },
}

impl From<bulkhead_tar::Error> for LayerError {
    fn from(error: bulkhead_tar::Error) -> Self {
        match error {
            bulkhead_tar::Error::Archive(problem) => Self::Archive(problem),
            bulkhead_tar::Error::Entry { name, problem } => Self::Entry { name, problem },
            // A stream tells of its own limit in the form in which streams tell of errors.
            bulkhead_tar::Error::Source(error) => match error.downcast::<Self>() {
                Ok(own) => own,
                Err(error) => Self::Source(error),
            },
        }
    }
}

impl LayerError {
    /// Where callers branch.
    #[must_use]
    pub fn kind(&self) -> LayerErrorKind {
        match self {
            Self::Archive(_) | Self::Entry { .. } | Self::Limit { .. } | Self::WrongDigest { .. } => {
                LayerErrorKind::Invalid
            }
            Self::Source(_) => LayerErrorKind::Source,
            Self::NoSpace { .. } => LayerErrorKind::NoSpace,
            Self::NotFound(_) | Self::NoArchive(_) => LayerErrorKind::NotFound,
            Self::Store { .. } => LayerErrorKind::Store,
        }
    }
}
