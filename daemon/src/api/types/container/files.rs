//! A container's files as Docker tells of them.

use jiff::Timestamp;
use serde::Serialize;

/// The header `X-Docker-Container-Path-Stat`, in JSON and Base64.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PathStat {
    /// The path's last part.
    pub name: String,
    /// Bytes.
    pub size: i64,
    /// Go's `os.FileMode`.
    pub mode: u32,
    /// Modification.
    pub mtime: Timestamp,
    /// Where a symbolic link leads in the end; else empty.
    pub link_target: String,
}

/// An item of `GET /containers/{name}/changes`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct FileChange {
    /// Absolute.
    pub path: String,
    /// 0: modified, 1: added, 2: deleted.
    pub kind: u8,
}
