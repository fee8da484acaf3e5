//! Files of a container, in and out: one vsock connection a transfer, of a created container, running or not.
//!
//! ```text
//!  daemon ─connect guest port FILES_PORT──▶ agent
//!        frame FilesOpen ──▶                               what is wanted
//!                        ◀── frame FilesReady              an error, or what was found
//!   Stat:                                                  nothing more
//!   Get, Export, Diff, Changes:   ◀── chunks, end          then ◀── frame FilesDone
//!   Put:                 chunks, end ──▶                   then ◀── frame FilesDone, perhaps before the end
//! ```
//!
//! A chunk is a little-endian `u32` length, 1 to [`MAX_CHUNK`], and as many bytes; a length of 0 is the end. So an
//! archive that broke off never passes for a whole one, in neither direction. There is no other window than the
//! connection's own: who does not read holds the sender back.
//!
//! Every path is the container's: its own root, its own mounts, and no symbolic link leads out of it.

use serde::{Deserialize, Serialize};

use crate::AgentError;

/// The guest port on which the agent takes transfers.
pub const FILES_PORT: u32 = 1027;

/// The longest chunk, in bytes.
pub const MAX_CHUNK: usize = 64 << 10;

/// The longest path of a [`FilesRequest`], in bytes.
pub const MAX_FILES_PATH: usize = 4095;

/// The longest [`FilesOpen`] frame.
pub const MAX_FILES_OPEN: usize = 32 << 10;

/// The longest line of [`FilesRequest::Changes`], its newline included: a path of PATH_MAX, every byte escaped.
pub const MAX_CHANGE_LINE: usize = 32 << 10;

/// The daemon's first frame on a connection to [`FILES_PORT`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilesOpen {
    /// The container's id.
    pub container: String,
    /// What is wanted.
    pub request: FilesRequest,
}

/// What is wanted of a container's files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "want")]
pub enum FilesRequest {
    /// What a path is. The last symbolic link is not followed, unless a slash or `/.` stands behind it.
    Stat {
        /// Absolute, without `..`.
        path: String,
    },
    /// A tar archive of what is at a path, links as in `Stat`. A directory's entries begin with its own name.
    Get {
        /// Absolute, without `..`.
        path: String,
    },
    /// Unpacks a tar archive in a directory.
    Put {
        /// The directory; symbolic links are followed.
        path: String,
        /// Whether it is an error to replace a directory with something else, or the other way round.
        keep_kinds: bool,
        /// Docker's `user[:group]`, looked up in the container, who is to own what is unpacked; None: as the
        /// archive says.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        owner: Option<String>,
    },
    /// A tar archive of the root file system, without anything that is mounted in it.
    Export,
    /// What differs between the writable layer and the image, a [`Change`] a line of JSON.
    Changes,
    /// The writable layer as a tar archive, removals in the form of the OCI image specification.
    Diff,
}

/// The agent's answer to [`FilesOpen`]; after an error it closes the connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilesReady {
    /// Why not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<AgentError>,
    /// To [`FilesRequest::Stat`] and [`FilesRequest::Get`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stat: Option<PathStat>,
}

/// How a transfer ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilesDone {
    /// None: all of it was done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<AgentError>,
}

/// A file as Docker tells of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathStat {
    /// The last part of the path that was asked for; `/` of the root.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// `st_mode`, type and permissions.
    pub mode: u32,
    /// Modification: seconds since the Unix epoch.
    pub mtime: i64,
    /// And nanoseconds.
    pub mtime_nsec: u32,
    /// Of a symbolic link: where it leads in the end, absolute, whether there is something or not.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub link_target: String,
}

/// A difference between a container's root file system and its image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// Absolute.
    pub path: String,
    /// What happened to it.
    pub kind: ChangeKind,
}

/// What happened to a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ChangeKind {
    /// It is there and is another, or something below it is.
    Modified,
    /// It was not there.
    Added,
    /// It is gone, with all below it.
    Deleted,
}
