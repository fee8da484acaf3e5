//! A connection as a process's stdio, after `attach` and `exec start`.

pub mod detach;
pub mod hijack;
pub mod stdcopy;
mod websocket;

pub use hijack::Hijack;

use super::version::ApiVersion;

/// One stream, as it comes.
pub const RAW: &str = "application/vnd.docker.raw-stream";

/// Streams multiplexed by [`stdcopy`].
pub const MULTIPLEXED: &str = "application/vnd.docker.multiplexed-stream";

/// The media type of a process's output. Before API 1.42 every stream was said to be raw.
pub fn media_type(terminal: bool, version: ApiVersion) -> &'static str {
    if !terminal && version >= ApiVersion::new(1, 42) { MULTIPLEXED } else { RAW }
}
