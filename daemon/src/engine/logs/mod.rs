//! Containers' logs: what the processes wrote, line by line, with the time.
//!
//! ```text
//!  agent ─stdout,stderr─▶ Log::append ─▶ lines ─▶ ID-json.log (Docker's json-file format, byte for byte)
//!                             │                        │
//!         durable bytes of the stream              read(): tail, since, until, follow
//!         (acknowledged to the agent)
//! ```
//!
//! The file is the only record of what is safe: how many bytes of each stream it holds is counted again
//! from it when a daemon adopts a running container ([`Log::resume`]), so an acknowledged byte is in the
//! file exactly once, whenever the daemon dies (what is in files that are full is remembered: [`files`]). A last line that was torn by a crash is cut off. Bytes of an
//! unfinished line stay unacknowledged until the line ends, is 16 KiB long, or the stream ends.

mod files;
mod format;
mod forward;
mod reader;
mod settings;
mod writer;

use std::collections::BTreeMap;

use bytes::Bytes;
use jiff::Timestamp;
pub use reader::Source;
pub use settings::{DRIVERS, Settings, Subject, validate};
pub use writer::{Durable, Log};

/// A stdio stream; the number is stdcopy's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stream {
    /// To the process. Never in a log.
    Stdin = 0,
    /// From the process; with a terminal, all of its output.
    Stdout = 1,
    /// From the process.
    Stderr = 2,
}

/// A line of a log, or a part of a line that was longer than 16 KiB.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Where it came from.
    pub stream: Stream,
    /// When the line was complete; of a long line, when its first part was.
    pub time: Timestamp,
    /// The text with its newline, if it has one. What was not UTF-8 has become U+FFFD, as in Docker's log.
    pub bytes: Bytes,
    /// What the driver's options (`labels`, `env`, `tag`) say of the container, for `logs --details`.
    pub attributes: BTreeMap<String, String>,
}

/// What to read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ReadOptions {
    /// Records of stdout.
    pub stdout: bool,
    /// Records of stderr.
    pub stderr: bool,
    /// Not before this time.
    pub since: Option<Timestamp>,
    /// Not after this time.
    pub until: Option<Timestamp>,
    /// Only the last so many lines of the log, whichever stream they are of.
    pub tail: Option<usize>,
    /// Go on with what comes until the container stops.
    pub follow: bool,
}

#[cfg(test)]
mod tests;
