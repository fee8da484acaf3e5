//! Unix sockets of the host in a container: a process beside the agent that listens at their paths and hands each
//! connection on over vsock.
//!
//! ```text
//!   client in the container ──▶ socket file, bound over the path ──▶ this process ──▶ host port ──▶ daemon
//! ```
//!
//! A process of its own, since connections are to be served while the agent does something else, and since the
//! agent has but one thread. It has what it listens to and nothing else of the agent's, and ends with the container.

use std::{
    io::{self, Read, Write},
    net::Shutdown,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use rustix::event::{PollFd, PollFlags, poll};

use crate::{
    error::{Context, Result},
    sys::{self, Child},
};

/// Connections at a time, of all sockets; whoever comes then waits in the backlog.
const MOST: usize = 256;

/// How long a connection may take to be accepted by the host.
const PATIENCE: Duration = Duration::from_secs(60);

/// How much is moved at a time, in bytes.
const CHUNK: usize = 64 << 10;

/// Stack of a thread that moves bytes, in bytes.
const STACK: usize = 192 << 10;

/// The process; it is killed when this is dropped.
#[derive(Debug)]
pub struct Forwarder(Child);

impl Drop for Forwarder {
    fn drop(&mut self) {
        // It may have ended; the agent reaps it.
        let _ = sys::pidfd_send_signal(&self.0.pidfd, libc::SIGKILL);
    }
}

/// Forwards connections to these listeners to the host ports beside them.
///
/// # Errors
/// Of `clone3`.
pub fn start(listeners: Vec<(OwnedFd, u32)>) -> Result<Forwarder> {
    sys::fork_into(0, None, || run(listeners)).context("fork to forward sockets").map(Forwarder)
}

fn run(listeners: Vec<(OwnedFd, u32)>) -> i32 {
    let kept: Vec<&OwnedFd> = listeners.iter().map(|(listener, _)| listener).collect();
    if sys::close_all_but(&kept).is_err() {
        return 125;
    }
    let open = Arc::new(AtomicUsize::new(0));
    let threads: Vec<_> = listeners
        .into_iter()
        .filter_map(|(listener, port)| {
            let open = Arc::clone(&open);
            let accept = move || accept(&UnixListener::from(listener), port, &open);
            thread::Builder::new().stack_size(STACK).spawn(accept).ok()
        })
        .collect();
    for thread in threads {
        let _ = thread.join();
    }
    0
}

fn accept(listener: &UnixListener, port: u32, open: &Arc<AtomicUsize>) {
    loop {
        if open.load(Ordering::SeqCst) >= MOST {
            thread::sleep(Duration::from_millis(20));
            continue;
        }
        let Ok((client, _)) = listener.accept() else {
            thread::sleep(Duration::from_millis(20));
            continue;
        };
        open.fetch_add(1, Ordering::SeqCst);
        let counted = Counted(Arc::clone(open));
        let served = thread::Builder::new().stack_size(STACK).spawn(move || {
            let _counted = counted;
            if let Ok(host) = connect(port) {
                join(client, host);
            }
        });
        // Dropped with its connection, where there is no thread left for it.
        drop(served);
    }
}

struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A connection to a port of the host, which blocks.
fn connect(port: u32) -> io::Result<UnixStream> {
    let socket = sys::vsock_socket()?;
    sys::vsock_connect(&socket, libc::VMADDR_CID_HOST, port, PATIENCE)?;
    poll(&mut [PollFd::new(&socket.as_fd(), PollFlags::OUT)], None)?;
    rustix::net::sockopt::socket_error(&socket)??;
    rustix::io::ioctl_fionbio(&socket, false)?;
    // For reading, writing and shutting down, the family is of no concern.
    Ok(UnixStream::from(socket))
}

/// Moves bytes both ways until both have ended.
fn join(client: UnixStream, host: UnixStream) {
    let (Ok(from_client), Ok(to_host)) = (client.try_clone(), host.try_clone()) else { return };
    let forth = thread::Builder::new().stack_size(STACK).spawn(move || pump(from_client, to_host));
    if let Ok(forth) = forth {
        pump(host, client);
        let _ = forth.join();
    }
}

/// Moves bytes until the source ends, and then says so.
fn pump(mut from: UnixStream, mut to: UnixStream) {
    let mut buffer = vec![0; CHUNK];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => break,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
            Ok(count) => {
                if to.write_all(buffer.get(..count).unwrap_or_default()).is_err() {
                    let _ = from.shutdown(Shutdown::Read);
                    break;
                }
            }
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_go_both_ways_and_ends_are_passed_on() {
        let (mut client, theirs) = UnixStream::pair().unwrap();
        let (mut host, ours) = UnixStream::pair().unwrap();
        let joined = thread::spawn(move || join(theirs, ours));
        client.write_all(b"question").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut text = String::new();
        host.read_to_string(&mut text).unwrap();
        assert_eq!(text, "question");
        host.write_all(b"answer").unwrap();
        drop(host);
        text.clear();
        client.read_to_string(&mut text).unwrap();
        assert_eq!(text, "answer");
        joined.join().unwrap();
    }
}
