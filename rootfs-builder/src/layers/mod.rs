//! The layer store: image layers, unpacked once, in the form that the VMM's file server shares with guests
//! (crate `bulkhead-layer-format`).
//!
//! ```text
//!  <dir>/
//!    <64 hex digits>/        one layer, named by its diff id (sha256 of the uncompressed tar)
//!      info.json             [`LayerInfo`]
//!      root/                 the tree: regular files and directories only
//!      archive.split         what else its archive held, see [`LayerArchive`]
//!      kept/                 files that later entries of the archive replaced; mostly absent
//!    tmp/                    what is being unpacked or removed; emptied when the store is opened
//! ```
//!
//! A layer appears by one `rename(2)`, when it is whole, its digest is right and its bytes are on disk; it
//! never changes afterwards. So whatever stands under a diff id can be used at once, and a crash leaves
//! nothing but garbage in `tmp`.
//!
//! ```text
//!  reader ─▶ Stream (sha256, byte cap, split) ─▶ bulkhead_tar::Reader (headers, PAX, GNU) ─▶ Unpacker ─▶ Tree (openat2) ─▶ disk
//! ```
//!
//! Layers are hostile. No path of a layer is ever given to the kernel whole without
//! `RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS`, nothing but files and directories is ever made, nothing of a
//! layer decides a host file's owner or mode, and every length is capped before memory is taken for it.

mod compress;
mod error;
mod id;
mod name;
mod split;
mod store;
mod stream;
mod tree;
mod unpack;

pub use compress::decompress;
pub use error::{LayerError, LayerErrorKind};
pub use id::{DiffId, DiffIdError};
pub use split::LayerArchive;
pub use store::{LayerInfo, LayerStore};

/// Caps on one layer, against archives that are made to exhaust the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of the uncompressed stream, trailing bytes included.
    pub stream_bytes: u64,
    /// Entries of the archive; directories that are missing in it count too.
    pub entries: u64,
}

impl Default for Limits {
    /// 64 GiB and four million entries: above any honest layer, below a disk's inodes.
    fn default() -> Self {
        Self { stream_bytes: 64 << 30, entries: 4_000_000 }
    }
}

#[cfg(test)]
mod tests;
