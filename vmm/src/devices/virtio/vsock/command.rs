//! The first line of a client; see [`bulkhead_vmm_api::vsock`].

use std::os::unix::net::UnixStream;

use bulkhead_vmm_api::vsock::MAX_COMMAND;
use rustix::net::{RecvFlags, recv};

/// What a client wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Command {
    /// A connection to that port of the guest.
    Connect(u32),
    /// The next connection that the guest makes to that port of the host.
    Listen(u32),
}

/// What has come of reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Line {
    /// All of it.
    Command(Command),
    /// Not all yet.
    Partial,
    /// Something else, or the client is gone.
    Bad,
}

/// Reads a client's first line, and not a byte beyond it: what follows belongs to the connection.
pub(super) fn read(stream: &UnixStream) -> Line {
    let mut bytes = [0; MAX_COMMAND];
    let peeked = match receive(stream, &mut bytes, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
        Ok(0) => return Line::Bad,
        Ok(count) => count,
        Err(rustix::io::Errno::AGAIN) => return Line::Partial,
        Err(_) => return Line::Bad,
    };
    let seen = bytes.get(..peeked).unwrap_or(&bytes);
    let Some(end) = seen.iter().position(|byte| *byte == b'\n') else {
        return if peeked < MAX_COMMAND { Line::Partial } else { Line::Bad };
    };
    let Some(command) = parse(&seen[..end]) else { return Line::Bad };
    let mut line = [0; MAX_COMMAND];
    match receive(stream, &mut line[..=end], RecvFlags::DONTWAIT) {
        Ok(count) if count == end + 1 => Line::Command(command),
        _ => Line::Bad,
    }
}

fn receive(stream: &UnixStream, bytes: &mut [u8], flags: RecvFlags) -> rustix::io::Result<usize> {
    loop {
        match recv(stream, &mut *bytes, flags) {
            Err(rustix::io::Errno::INTR) => {}
            other => return other.map(|(count, _)| count),
        }
    }
}

fn parse(line: &[u8]) -> Option<Command> {
    let (word, port) = std::str::from_utf8(line).ok()?.split_once(' ')?;
    if port.is_empty() || !port.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let port = port.parse().ok()?;
    match word {
        "CONNECT" => Some(Command::Connect(port)),
        "LISTEN" => Some(Command::Listen(port)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn lines_are_parsed_strictly() {
        assert_eq!(parse(b"CONNECT 1025"), Some(Command::Connect(1025)));
        assert_eq!(parse(b"LISTEN 4294967295"), Some(Command::Listen(u32::MAX)));
        for bad in
            ["CONNECT", "CONNECT ", "CONNECT +1", "CONNECT 4294967296", "connect 1", "LISTEN  1", "", "\u{0}"]
        {
            assert_eq!(parse(bad.as_bytes()), None, "{bad:?}");
        }
        assert_eq!(parse(b"LISTEN \xff"), None);
    }

    #[test]
    fn nothing_behind_the_line_is_taken() {
        let (mut client, server) = UnixStream::pair().unwrap();
        assert_eq!(read(&server), Line::Partial);
        client.write_all(b"CONN").unwrap();
        assert_eq!(read(&server), Line::Partial);
        client.write_all(b"ECT 7\nbody\n").unwrap();
        assert_eq!(read(&server), Line::Command(Command::Connect(7)));
        let mut rest = [0; 5];
        (&server).read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"body\n");
    }

    #[test]
    fn long_lines_and_ends_are_bad() {
        let (mut client, server) = UnixStream::pair().unwrap();
        client.write_all(&[b'L'; MAX_COMMAND]).unwrap();
        assert_eq!(read(&server), Line::Bad);
        let (client, server) = UnixStream::pair().unwrap();
        drop(client);
        assert_eq!(read(&server), Line::Bad);
    }
}
