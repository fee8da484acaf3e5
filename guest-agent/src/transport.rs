//! Where the agent's connections come from: vsock, between guest and host.

use std::{
    io,
    os::fd::{BorrowedFd, OwnedFd},
    time::Duration,
};

use bulkhead_agent_api::{CONTROL_PORT, NAMES_PORT, STREAM_PORT, files::FILES_PORT};

use crate::sys;

/// How the agent reaches the daemon and is reached.
pub trait Transport {
    /// Begins to connect to the daemon that has booted the machine, without blocking.
    ///
    /// # Errors
    /// When that failed at once.
    fn dial(&self) -> io::Result<OwnedFd>;

    /// A listening socket for streams, which does not block.
    ///
    /// # Errors
    /// Of the system calls.
    fn listen(&self) -> io::Result<OwnedFd>;

    /// A listening socket for transfers of files, which does not block.
    ///
    /// # Errors
    /// Of the system calls.
    fn listen_for_files(&self) -> io::Result<OwnedFd>;

    /// A listening socket for later daemons, which does not block.
    ///
    /// # Errors
    /// Of the system calls.
    fn listen_for_control(&self) -> io::Result<OwnedFd>;

    /// A listening socket for the daemon's name queries, which does not block.
    ///
    /// # Errors
    /// Of the system calls.
    fn listen_for_names(&self) -> io::Result<OwnedFd>;

    /// Whether the peer of an accepted connection may open streams and control.
    fn is_daemon(&self, connection: BorrowedFd<'_>) -> bool;
}

/// vsock.
#[derive(Debug, Clone, Copy)]
pub struct Vsock;

/// The connection waits in the VMM until the daemon listens, so this is the longest time without a daemon
/// before the agent asks anew.
const PATIENCE: Duration = Duration::from_secs(24 * 3600);

impl Transport for Vsock {
    fn dial(&self) -> io::Result<OwnedFd> {
        let socket = sys::vsock_socket()?;
        sys::vsock_connect(&socket, libc::VMADDR_CID_HOST, CONTROL_PORT, PATIENCE)?;
        Ok(socket)
    }

    fn listen(&self) -> io::Result<OwnedFd> {
        let socket = sys::vsock_socket()?;
        sys::vsock_listen(&socket, STREAM_PORT)?;
        Ok(socket)
    }

    fn listen_for_files(&self) -> io::Result<OwnedFd> {
        let socket = sys::vsock_socket()?;
        sys::vsock_listen(&socket, FILES_PORT)?;
        Ok(socket)
    }

    fn listen_for_control(&self) -> io::Result<OwnedFd> {
        let socket = sys::vsock_socket()?;
        sys::vsock_listen(&socket, CONTROL_PORT)?;
        Ok(socket)
    }

    fn listen_for_names(&self) -> io::Result<OwnedFd> {
        let socket = sys::vsock_socket()?;
        sys::vsock_listen(&socket, NAMES_PORT)?;
        Ok(socket)
    }

    /// Processes in the guest are not the daemon.
    fn is_daemon(&self, connection: BorrowedFd<'_>) -> bool {
        sys::vsock_peer_cid(connection).is_ok_and(|cid| cid == libc::VMADDR_CID_HOST)
    }
}
