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
//! file exactly once, whenever the daemon dies. A last line that was torn by a crash is cut off. Bytes of an
//! unfinished line stay unacknowledged until the line ends, is 16 KiB long, or the stream ends.

mod format;
mod reader;
mod writer;

use std::collections::BTreeMap;

use bytes::Bytes;
use jiff::Timestamp;
pub use reader::Source;
pub use writer::{Durable, Log};

use super::{Error, Result};

/// The log drivers there are.
pub const DRIVERS: [&str; 2] = ["json-file", "none"];

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

/// Whether a driver takes these options (`--log-opt`).
///
/// # Errors
/// Invalid: no such driver, an option that it does not have, or one that Docker has and Bulkhead does not.
pub fn validate(driver: &str, options: &BTreeMap<String, String>) -> Result<()> {
    if !DRIVERS.contains(&driver) {
        return Err(Error::invalid(format!("logger: no log driver named '{driver}' is registered")));
    }
    match (driver, options.iter().find(|(name, value)| !is_default(name, value))) {
        (_, None) => Ok(()),
        ("json-file", Some((name, value))) => match name.as_str() {
            "max-size" | "max-file" | "compress" | "labels" | "labels-regex" | "env" | "env-regex"
            | "tag" => Err(Error::invalid(format!(
                "log option {name}={value} is not supported yet by the json-file driver here"
            ))),
            _ => Err(Error::invalid(format!("unknown log opt '{name}' for json-file log driver"))),
        },
        (_, Some((name, _))) => {
            Err(Error::invalid(format!("unknown log opt '{name}' for {driver} log driver")))
        }
    }
}

/// Options that ask for what is done anyway.
fn is_default(name: &str, value: &str) -> bool {
    matches!((name, value), ("mode", "blocking" | "") | ("max-size", "-1") | ("max-file", "1"))
}

#[cfg(test)]
mod tests;
