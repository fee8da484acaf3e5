//! All clients and connections of a machine: who is who, whose turn it is, and what becomes of each.
//!
//! ```text
//!                    ┌─ CONNECT p ─────────────────────────────▶ connected (Requested)
//!  accept ─▶ command ┤                                               │
//!                    └─ LISTEN p ──▶ listening ──guest connects──▶ connected ──both halves end──▶ closed
//!                                        ▲                           │ │
//!                                        └────── the guest's ────────┘ └─ guest closes ─▶ draining ─▶ closed
//!                                              request was stale
//!
//!  guest's REQUEST for a port that nobody listens on ─▶ waiting ──LISTEN──▶ connected (Offered)
//! ```
//!
//! Everything is bounded: clients by [`MAX_CLIENTS`], listening ones by [`MAX_LISTENING`], the guest's waiting
//! requests by [`MAX_WAITING`] (the oldest gives way: it is the likeliest to have been abandoned), bytes
//! for a client by a connection's window. RSTs that a guest provokes and does not fetch hold up its own
//! packets ([`Muxer::congested`]).
//!
//! Connections take turns: each packet to the guest is followed by another connection's, if there is one.

use std::{
    collections::{HashMap, VecDeque},
    io::{self, Read},
    net::Shutdown,
    os::{
        fd::{AsRawFd, RawFd},
        unix::net::{UnixListener, UnixStream},
    },
};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::{
    connection::{Connection, Key, Outcome, Phase, greet},
    outbox::Outbox,
};

mod clients;
mod guest;

/// Streams of all kinds at a time.
pub(super) const MAX_CLIENTS: usize = 1024;
/// Clients that wait for the guest to connect.
pub(super) const MAX_LISTENING: usize = 256;
/// Requests of the guest that wait for a client to listen.
pub(super) const MAX_WAITING: usize = 64;

/// Ports that connections to the guest come from: this one and above.
pub(super) const FIRST_HOST_PORT: u32 = 1 << 30;

const TOKEN_LISTENER: u64 = 0;
/// For the owner's use.
pub(super) const TOKEN_WAKE: u64 = 1;
const FIRST_TOKEN: u64 = 2;

struct Client {
    stream: UnixStream,
    stage: Stage,
}

enum Stage {
    /// Its first line is not complete.
    Command,
    /// It waits for the guest to connect; see [`Muxer::listening`].
    Listening,
    Connected(Connection),
    /// The guest has closed; these bytes are still to be delivered.
    Draining(Outbox),
}

/// A request of the guest that nobody has listened for yet.
#[derive(Debug, Clone, Copy)]
struct Waiting {
    key: Key,
    /// buf_alloc and fwd_cnt.
    credit: (u32, u32),
}

/// The host's side of every connection.
pub(super) struct Muxer {
    guest_cid: u64,
    listener: UnixListener,
    /// A client could not be accepted for want of descriptors.
    accept_again: bool,
    epoll: Epoll,
    clients: HashMap<u64, Client>,
    next_token: u64,
    next_port: u32,
    by_key: HashMap<Key, u64>,
    /// Port and client, the longest waiting first.
    listening: VecDeque<(u32, u64)>,
    waiting: VecDeque<Waiting>,
    /// Connections with a packet for the guest, each once.
    turns: VecDeque<u64>,
    resets: VecDeque<Key>,
}

impl Muxer {
    pub(super) fn new(guest_cid: u64, listener: UnixListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let epoll = Epoll::new()?;
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, TOKEN_LISTENER);
        epoll.ctl(ControlOperation::Add, listener.as_raw_fd(), event)?;
        Ok(Self {
            guest_cid,
            listener,
            accept_again: false,
            epoll,
            clients: HashMap::new(),
            next_token: FIRST_TOKEN,
            next_port: FIRST_HOST_PORT,
            by_key: HashMap::new(),
            listening: VecDeque::new(),
            waiting: VecDeque::new(),
            turns: VecDeque::new(),
            resets: VecDeque::new(),
        })
    }

    /// Watches a descriptor of the owner's, level-triggered, as [`TOKEN_WAKE`].
    pub(super) fn watch(&self, fd: RawFd) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, TOKEN_WAKE))
    }

    pub(super) fn epoll_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// The port that the next connection to the guest comes from.
    pub(super) fn next_port(&self) -> u32 {
        self.next_port
    }

    pub(super) fn set_next_port(&mut self, port: u32) {
        self.next_port = port.max(FIRST_HOST_PORT);
    }

    /// A host port that, with `guest_port`, names no connection.
    fn free_port(&mut self, guest_port: u32) -> u32 {
        // Ends: there are more ports than connections.
        loop {
            let host_port = self.next_port;
            self.next_port = host_port.checked_add(1).unwrap_or(FIRST_HOST_PORT);
            if host_port != u32::MAX && !self.by_key.contains_key(&Key { host_port, guest_port }) {
                return host_port;
            }
        }
    }

    /// Makes a client's stream the connection.
    fn connect(&mut self, token: u64, connection: Connection) {
        if let Some(client) = self.clients.get_mut(&token) {
            self.by_key.insert(connection.key, token);
            client.stage = Stage::Connected(connection);
            self.line_up(token);
        }
    }

    /// Brings the longest waiting request for a port to the client that has listened longest.
    fn offer(&mut self, port: u32) {
        let request = self.waiting.iter().position(|waiting| waiting.key.host_port == port);
        let listener = self.listening.iter().position(|(listening, _)| *listening == port);
        if let (Some(request), Some(listener)) = (request, listener)
            && let Some(Waiting { key, credit }) = self.waiting.remove(request)
            && let Some((_, token)) = self.listening.remove(listener)
        {
            self.connect(token, Connection::offered(key, credit));
        }
    }

    /// Puts a connection at the end of the line, if it has a packet and is not there yet.
    fn line_up(&mut self, token: u64) {
        if let Some(connection) = self.connection(token)
            && connection.wants_turn()
            && !std::mem::replace(&mut connection.queued, true)
        {
            self.turns.push_back(token);
        }
    }

    fn connection(&mut self, token: u64) -> Option<&mut Connection> {
        match self.clients.get_mut(&token) {
            Some(Client { stage: Stage::Connected(connection), .. }) => Some(connection),
            _ => None,
        }
    }

    /// Does what a connection's packet or event has come to.
    fn settle(&mut self, token: u64, outcome: Outcome) {
        let Some(connection) = self.connection(token) else { return };
        let (key, known) = (connection.key, connection.known_to_guest());
        match outcome {
            Outcome::Keep => self.line_up(token),
            Outcome::Opened => {
                let opened =
                    self.clients.get(&token).is_some_and(|client| greet(&client.stream, key.host_port));
                let connection = if opened { None } else { self.connection(token) };
                match connection.map(Connection::client_gone) {
                    Some(outcome) if outcome != Outcome::Opened => self.settle(token, outcome),
                    _ => self.line_up(token),
                }
            }
            Outcome::Reset => {
                if known {
                    self.resets.push_back(key);
                }
                self.close(token);
            }
            Outcome::Closed => {
                self.resets.push_back(key);
                self.drain(token);
            }
            Outcome::Gone => self.drain(token),
            Outcome::Stale => {
                self.forget_connection(token);
                if let Some(client) = self.clients.get_mut(&token) {
                    client.stage = Stage::Listening;
                    self.listening.push_front((key.host_port, token));
                    self.offer(key.host_port);
                }
            }
        }
    }

    /// The connection is over but for what its client has not taken yet.
    fn drain(&mut self, token: u64) {
        self.forget_connection(token);
        let Some(client) = self.clients.get_mut(&token) else { return };
        if let Stage::Connected(connection) = std::mem::replace(&mut client.stage, Stage::Command) {
            let outbox = connection.into_outbox();
            if outbox.is_empty() {
                self.close(token);
            } else {
                // The client's next write fails; what it still reads is ours to deliver.
                let _ = client.stream.shutdown(Shutdown::Read);
                client.stage = Stage::Draining(outbox);
            }
        }
    }

    /// Takes a connection out of every index.
    fn forget_connection(&mut self, token: u64) {
        if let Some(connection) = self.connection(token) {
            let (key, queued) = (connection.key, std::mem::take(&mut connection.queued));
            self.by_key.remove(&key);
            if queued {
                self.turns.retain(|other| *other != token);
            }
        }
    }

    /// Closes a client's stream in whatever stage it is.
    fn close(&mut self, token: u64) {
        self.forget_connection(token);
        let Some(Client { stream, stage }) = self.clients.remove(&token) else { return };
        if matches!(stage, Stage::Listening) {
            self.listening.retain(|(_, other)| *other != token);
        }
        let _ = self.epoll.ctl(ControlOperation::Delete, stream.as_raw_fd(), EpollEvent::default());
        end_stream(&stream);
    }

    /// The guest's sockets are gone, by a reset or a restore: every connection ends. Clients that listen go
    /// on listening.
    pub(super) fn disconnect_all(&mut self) {
        self.waiting.clear();
        self.turns.clear();
        for token in self.by_key.values().copied().collect::<Vec<_>>() {
            // A client that has not heard of its connection listens still.
            let offered = self.connection(token).is_some_and(|connection| connection.phase == Phase::Offered);
            self.settle(token, if offered { Outcome::Stale } else { Outcome::Gone });
        }
        self.resets.clear();
    }

    #[cfg(test)]
    pub(super) fn counts(&self) -> [usize; 4] {
        [self.clients.len(), self.by_key.len(), self.listening.len(), self.waiting.len()]
    }
}

/// Closes a stream so that its client reads an end of file, and not a reset because of bytes that nobody
/// wants any more.
fn end_stream(mut stream: &UnixStream) {
    let _ = stream.shutdown(Shutdown::Both);
    // What the client has written lies in a socket buffer of limited size, and it can write no more.
    let mut discarded = [0; 16 * 1024];
    for _ in 0..256 {
        match stream.read(&mut discarded) {
            Ok(1..) => {}
            _ => break,
        }
    }
}
