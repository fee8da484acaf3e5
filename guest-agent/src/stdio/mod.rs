//! The stdio of a process: pipes or a pseudo-terminal on its side, one connection for each stream on the
//! daemon's. Each stream is a small machine driven by readiness; none blocks, each is bounded.

pub mod input;
pub mod output;
pub mod window;

use std::os::fd::AsFd;

use crate::poll::Watched;

/// The most that one event moves on one stream, so that a busy stream does not starve the others.
pub(crate) const TURN: usize = 256 << 10;

/// The most bytes of one read.
pub(crate) const CHUNK: usize = 64 << 10;

/// Tells the peer of a connection that nothing more comes. It must not be left to `close`: a child that is
/// being started may hold a copy of the descriptor for a moment.
pub(crate) fn hang_up<K>(connection: &Watched<K>) {
    let _ = rustix::net::shutdown(connection.as_fd(), rustix::net::Shutdown::Both);
}
