//! What the outer machine and the test host say to each other.
//!
//! One TCP connection (QEMU's user network, bound to loopback outside) carries one request:
//!
//! ```text
//!   client                                   server (in the test host)
//!   u32 length, JSON Hello   ───────────▶
//!                            ◀───────────    Accepted | Failed(text)
//!   Exec:     Stdin… StdinEof, Resize  ──▶
//!                            ◀───────────    Stdout…, Stderr…, Exited(JSON)
//!   Connect:  raw bytes, each way, half-close passes
//! ```
//!
//! A frame is one byte of tag, four of big-endian length, and the payload.

use std::ffi::OsString;
use std::fmt;
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

/// Raised when the wire changes: a test host started by another version is then started anew.
pub(crate) const VERSION: u32 = 1;
/// The port the server listens on inside.
pub(crate) const PORT: u16 = 7000;
/// No payload is longer.
const MAX_PAYLOAD: usize = 4 << 20;

/// The first message of a connection.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Hello {
    pub(crate) version: u32,
    /// Proves that the client can read the test host's state directory.
    pub(crate) token: String,
    pub(crate) request: Request,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Request {
    /// Is anyone there?
    Ping,
    /// Run a program.
    Exec(Exec),
    /// Connect this connection to a socket inside.
    Connect(Address),
    /// Stop the test host.
    PowerOff,
}

/// A program to run in the test host.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Exec {
    pub(crate) argv: Vec<OsString>,
    /// The whole environment.
    pub(crate) env: Vec<(OsString, OsString)>,
    pub(crate) cwd: PathBuf,
    /// With a terminal of this size, instead of three pipes.
    pub(crate) tty: Option<WindowSize>,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct WindowSize {
    pub(crate) rows: u16,
    pub(crate) columns: u16,
}

/// How a program ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Ending {
    Code(i32),
    Signal(i32),
}

impl Ending {
    /// As a shell reports it.
    pub(crate) fn exit_code(self) -> u8 {
        match self {
            Ending::Code(code) => u8::try_from(code & 0xff).unwrap_or(u8::MAX),
            Ending::Signal(signal) => u8::try_from(128 + (signal & 0x7f)).unwrap_or(u8::MAX),
        }
    }
}

/// A socket on either side: a path, or `ADDRESS:PORT`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Address {
    Unix(PathBuf),
    Tcp(String),
}

impl FromStr for Address {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Address> {
        if text.contains('/') {
            Ok(Address::Unix(PathBuf::from(text)))
        } else if text.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok()) {
            Ok(Address::Tcp(text.to_owned()))
        } else {
            bail!("{text:?} is neither a path with a slash nor ADDRESS:PORT")
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(path) => write!(f, "{}", path.display()),
            Address::Tcp(address) => f.write_str(address),
        }
    }
}

/// What a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Tag {
    Accepted = 0,
    /// UTF-8 text: why the request was refused.
    Failed = 1,
    Stdin = 2,
    StdinEof = 3,
    /// JSON [`WindowSize`].
    Resize = 4,
    Stdout = 5,
    Stderr = 6,
    /// JSON [`Ending`]; the last frame.
    Exited = 7,
}

impl Tag {
    fn from_byte(byte: u8) -> io::Result<Tag> {
        use Tag::{Accepted, Exited, Failed, Resize, Stderr, Stdin, StdinEof, Stdout};
        [Accepted, Failed, Stdin, StdinEof, Resize, Stdout, Stderr, Exited]
            .into_iter()
            .find(|tag| *tag as u8 == byte)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("unknown frame tag {byte}")))
    }
}

/// Sends one frame in one write, so that frames of several threads behind a lock stay whole.
pub(crate) fn write_frame(out: &mut impl Write, tag: Tag, payload: &[u8]) -> io::Result<()> {
    let length = length_of(payload)?;
    let mut frame = Vec::with_capacity(5 + payload.len());
    frame.push(tag as u8);
    frame.extend_from_slice(&length.to_be_bytes());
    frame.extend_from_slice(payload);
    out.write_all(&frame)
}

/// The next frame, or `None` where the other side has closed between two frames.
pub(crate) fn read_frame(from: &mut impl Read) -> io::Result<Option<(Tag, Vec<u8>)>> {
    let mut tag = [0];
    loop {
        match from.read(&mut tag) {
            Ok(0) => return Ok(None),
            Ok(_) => break,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(Some((Tag::from_byte(tag[0])?, read_block(from)?)))
}

pub(crate) fn write_hello(out: &mut impl Write, hello: &Hello) -> Result<()> {
    let payload = serde_json::to_vec(hello)?;
    let mut block = length_of(&payload)?.to_be_bytes().to_vec();
    block.extend_from_slice(&payload);
    out.write_all(&block).context("send the request")
}

pub(crate) fn read_hello(from: &mut impl Read) -> Result<Hello> {
    serde_json::from_slice(&read_block(from)?).context("malformed request")
}

fn length_of(payload: &[u8]) -> io::Result<u32> {
    let too_long = || io::Error::new(io::ErrorKind::InvalidInput, "payload too long for a frame");
    if payload.len() > MAX_PAYLOAD {
        return Err(too_long());
    }
    u32::try_from(payload.len()).map_err(|_| too_long())
}

fn read_block(from: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut length = [0; 4];
    from.read_exact(&mut length)?;
    let length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
    if length > MAX_PAYLOAD {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a frame of {length} bytes")));
    }
    let mut payload = vec![0; length];
    from.read_exact(&mut payload)?;
    Ok(payload)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_back_as_sent_and_end_cleanly() {
        let mut wire = Vec::new();
        write_frame(&mut wire, Tag::Stdout, b"hello").unwrap();
        write_frame(&mut wire, Tag::StdinEof, b"").unwrap();
        let mut from = wire.as_slice();
        assert_eq!(read_frame(&mut from).unwrap(), Some((Tag::Stdout, b"hello".to_vec())));
        assert_eq!(read_frame(&mut from).unwrap(), Some((Tag::StdinEof, Vec::new())));
        assert_eq!(read_frame(&mut from).unwrap(), None);
    }

    #[test]
    fn a_torn_unknown_or_oversized_frame_is_an_error() {
        for bytes in [&[5, 0, 0, 0, 9, 1][..], &[200, 0, 0, 0, 0], &[5, 0xff, 0xff, 0xff, 0xff]] {
            assert!(read_frame(&mut &bytes[..]).is_err(), "{bytes:?}");
        }
        assert!(write_frame(&mut Vec::new(), Tag::Stdin, &vec![0; MAX_PAYLOAD + 1]).is_err());
    }

    #[test]
    fn addresses_are_paths_or_ports() {
        assert_eq!("/run/d.sock".parse::<Address>().unwrap(), Address::Unix("/run/d.sock".into()));
        assert_eq!("127.0.0.1:80".parse::<Address>().unwrap(), Address::Tcp("127.0.0.1:80".into()));
        assert!("d.sock".parse::<Address>().is_err());
        assert!("host:99999".parse::<Address>().is_err());
    }

    #[test]
    fn endings_are_codes_as_shells_give_them() {
        assert_eq!(Ending::Code(7).exit_code(), 7);
        assert_eq!(Ending::Signal(9).exit_code(), 137);
    }
}
