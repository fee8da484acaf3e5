//! Joins two sockets. An end of one direction closes that direction of the other socket only: hijacked
//! Docker streams end their stdin this way while output goes on.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::thread;

/// A socket with two directions that close one by one.
pub(crate) enum Duplex {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Duplex {
    fn try_clone(&self) -> io::Result<Duplex> {
        Ok(match self {
            Duplex::Tcp(socket) => Duplex::Tcp(socket.try_clone()?),
            Duplex::Unix(socket) => Duplex::Unix(socket.try_clone()?),
        })
    }

    fn shutdown(&self, how: Shutdown) {
        // Fails only where the other side has closed already.
        let _ = match self {
            Duplex::Tcp(socket) => socket.shutdown(how),
            Duplex::Unix(socket) => socket.shutdown(how),
        };
    }
}

impl Read for Duplex {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Duplex::Tcp(socket) => socket.read(buffer),
            Duplex::Unix(socket) => socket.read(buffer),
        }
    }
}

impl Write for Duplex {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match self {
            Duplex::Tcp(socket) => socket.write(buffer),
            Duplex::Unix(socket) => socket.write(buffer),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Copies until both directions have ended.
pub(crate) fn both_ways(a: Duplex, b: Duplex) {
    let (Ok(a2), Ok(b2)) = (a.try_clone(), b.try_clone()) else { return };
    let back = thread::spawn(move || one_way(b2, a2));
    one_way(a, b);
    let _ = back.join();
}

fn one_way(mut from: Duplex, mut to: Duplex) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return to.shutdown(Shutdown::Write),
            Ok(count) if to.write_all(buffer.get(..count).unwrap_or_default()).is_ok() => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // Reset, or nobody reads: both directions are worthless now.
            Ok(_) | Err(_) => {
                to.shutdown(Shutdown::Both);
                return from.shutdown(Shutdown::Both);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_close_passes_and_the_other_direction_stays_open() {
        let (mut client, left) = UnixStream::pair().unwrap();
        let (right, mut server) = UnixStream::pair().unwrap();
        let relay = thread::spawn(move || both_ways(Duplex::Unix(left), Duplex::Unix(right)));

        client.write_all(b"question").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut text = String::new();
        server.read_to_string(&mut text).unwrap();
        assert_eq!(text, "question");

        server.write_all(b"answer").unwrap();
        drop(server);
        let mut text = String::new();
        client.read_to_string(&mut text).unwrap();
        assert_eq!(text, "answer");
        relay.join().unwrap();
    }
}
