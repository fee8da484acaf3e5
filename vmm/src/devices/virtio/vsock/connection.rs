//! One connection between a client's stream and a socket in the guest.
//!
//! ```text
//!  Requested ──RESPONSE──▶ Open        a client asked; the guest answers
//!      └────────RST──────▶ closed
//!  Offered ──any packet──▶ Open        a guest asked, waited, and is asked whether it is still there
//!      └────────RST──────▶ stale       (its socket is gone; the client waits for the next)
//!  Open                                a guest asked, and a client was waiting
//! ```
//! An open connection has two halves that end apart from each other:
//! ```text
//!  client → guest: ends when the client has shut down its writing side (we send SHUTDOWN SEND behind the
//!                  last byte), or the guest has sent SHUTDOWN RECEIVE
//!  guest → client: ends when the guest has sent SHUTDOWN SEND and its last byte is delivered, or the client
//!                  takes no more (we send SHUTDOWN RECEIVE)
//! ```
//! When both have ended, or anything breaks the protocol, the guest gets RST and the connection is gone.
//!
//! Credit (virtio 1.3, 5.10.6.3): `credit = buf_alloc − (bytes sent − fwd_cnt)` is what a sender may still
//! send. Here a byte from the guest counts as forwarded when the client's socket has taken it, so that
//! what is buffered for a slow client never exceeds [`WINDOW`].

use std::{io, net::Shutdown, os::fd::AsFd, os::unix::net::UnixStream};

use super::{
    outbox::Outbox,
    packet::{HEADER, Header, Op, SHUTDOWN_RECEIVE, SHUTDOWN_SEND},
};
use crate::devices::virtio::{
    device::GuestMemory,
    iovec::{Buffer, IoVec, copy_out},
};

/// What a guest may send on one connection before the client has taken it, in bytes.
pub(super) const WINDOW: u32 = 256 * 1024;
/// How much of the window is used up before the guest hears of what is free again.
const ANNOUNCE_AFTER: u32 = WINDOW / 2;
/// The longest payload of a packet to the guest, in bytes.
const MAX_PAYLOAD: u64 = 64 * 1024;

/// Names a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) host_port: u32,
    pub(super) guest_port: u32,
}

/// How far a connection has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// The guest has been asked.
    Requested,
    /// A guest that had waited was answered, and asked for a sign of life.
    Offered,
    /// Both sides are there.
    Open,
}

/// What is to be done with a connection after a packet or an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Nothing.
    Keep,
    /// It has become open: the client is to be told.
    Opened,
    /// Both halves have ended, or the guest broke the protocol: send RST and close the stream.
    Reset,
    /// The guest has closed both halves: send RST, and deliver what is buffered.
    Closed,
    /// The guest has sent RST: deliver what is buffered.
    Gone,
    /// The guest's request was abandoned before it was answered: the client goes on waiting.
    Stale,
}

/// A packet for the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Produced {
    pub(super) op: Op,
    pub(super) flags: u32,
    pub(super) len: u32,
}

/// Packets that are due to the guest.
#[derive(Debug, Default)]
struct Due {
    request: bool,
    response: bool,
    credit_request: bool,
    credit_update: bool,
    shutdown_receive: bool,
}

/// The state of a connection; its stream is kept beside it.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) key: Key,
    pub(super) phase: Phase,
    /// It is in the line for a packet to the guest.
    pub(super) queued: bool,
    due: Due,

    /// The stream may have bytes, or its end.
    readable: bool,
    /// Bytes sent to the guest; wraps.
    sent: u32,
    peer_alloc: u32,
    peer_forwarded: u32,
    /// The guest was asked for credit and has not given any since.
    asked: bool,
    /// Client → guest has ended on the client's side, and the guest knows.
    client_done: bool,
    /// Client → guest has ended on the guest's side.
    guest_deaf: bool,

    outbox: Outbox,
    /// Bytes that the client's socket has taken; wraps.
    forwarded: u32,
    /// What the guest knows of it.
    announced: u32,
    /// Guest → client has ended on the guest's side; the outbox may still hold the last of it.
    guest_done: bool,
    /// Guest → client has ended on the client's side.
    client_deaf: bool,
}

impl Connection {
    /// A connection that a client asked for.
    pub(super) fn requested(key: Key) -> Self {
        let due = Due { request: true, ..Due::default() };
        Self::new(key, Phase::Requested, due, (0, 0))
    }

    /// A connection that the guest asked for just now; `credit` is buf_alloc and fwd_cnt of its request.
    pub(super) fn accepted(key: Key, credit: (u32, u32)) -> Self {
        let due = Due { response: true, ..Due::default() };
        Self::new(key, Phase::Open, due, credit)
    }

    /// A connection that the guest asked for some time ago.
    pub(super) fn offered(key: Key, credit: (u32, u32)) -> Self {
        let due = Due { response: true, credit_request: true, ..Due::default() };
        Self::new(key, Phase::Offered, due, credit)
    }

    fn new(key: Key, phase: Phase, due: Due, (peer_alloc, peer_forwarded): (u32, u32)) -> Self {
        Self {
            key,
            phase,
            queued: false,
            due,
            // The client may have written, or ended, before it was watched as a connection.
            readable: true,
            sent: 0,
            peer_alloc,
            peer_forwarded,
            asked: false,
            client_done: false,
            guest_deaf: false,
            outbox: Outbox::default(),
            forwarded: 0,
            announced: 0,
            guest_done: false,
            client_deaf: false,
        }
    }

    /// Whether the guest has been told of this connection, so that it must be told of its end.
    pub(super) fn known_to_guest(&self) -> bool {
        !self.due.request
    }

    /// Bytes that may be sent to the guest now.
    fn credit(&self) -> u32 {
        self.peer_alloc.saturating_sub(self.sent.wrapping_sub(self.peer_forwarded))
    }

    fn can_read(&self) -> bool {
        self.phase == Phase::Open
            && self.readable
            && !self.client_done
            && !self.guest_deaf
            && self.credit() > 0
    }

    /// Whether there is a packet for the guest.
    pub(super) fn wants_turn(&self) -> bool {
        let Due { request, response, credit_request, credit_update, shutdown_receive } = self.due;
        request || response || credit_request || credit_update || shutdown_receive || self.can_read()
    }

    /// Both halves have ended.
    fn ended(&self) -> bool {
        let to_guest = self.client_done || self.guest_deaf;
        let to_client = self.client_deaf || (self.guest_done && self.outbox.is_empty());
        to_guest && to_client
    }

    fn outcome(&self) -> Outcome {
        if self.ended() { Outcome::Reset } else { Outcome::Keep }
    }

    /// The outbox, when the connection is over but for it.
    pub(super) fn into_outbox(self) -> Outbox {
        self.outbox
    }

    // ---- from the guest

    /// A packet from the guest; `buffers` hold its header and its payload.
    pub(super) fn receive(
        &mut self,
        header: &Header,
        stream: &UnixStream,
        memory: &GuestMemory,
        buffers: &[Buffer],
    ) -> Outcome {
        let Some(op) = header.op else { return Outcome::Reset };
        if op == Op::Reset {
            return if self.phase == Phase::Offered { Outcome::Stale } else { Outcome::Gone };
        }
        self.peer_alloc = header.buf_alloc;
        self.peer_forwarded = header.fwd_cnt;
        self.asked &= self.credit() == 0;
        match (self.phase, op) {
            (Phase::Requested, Op::Response) => {
                self.phase = Phase::Open;
                return Outcome::Opened;
            }
            // The guest's connect was begun anew while the answer to the first one was on its way.
            (Phase::Offered, Op::Request) => return Outcome::Keep,
            (Phase::Requested, _) | (_, Op::Request | Op::Response) => return Outcome::Reset,
            _ => {}
        }
        let opened = std::mem::replace(&mut self.phase, Phase::Open) == Phase::Offered;
        if opened && !greet(stream, self.key.guest_port) {
            self.client_takes_no_more();
        }
        match op {
            Op::Data => self.take_data(header.len, stream, memory, buffers),
            Op::Shutdown => self.guest_shutdown(header.flags, stream),
            Op::CreditRequest => {
                self.due.credit_update = true;
                Outcome::Keep
            }
            _ => self.outcome(),
        }
    }

    fn guest_shutdown(&mut self, flags: u32, stream: &UnixStream) -> Outcome {
        self.guest_done |= flags & SHUTDOWN_SEND != 0;
        if flags & SHUTDOWN_RECEIVE != 0 && !self.guest_deaf {
            self.guest_deaf = true;
            // The client's next write fails. An error says that it is gone, and an event says so too.
            let _ = stream.shutdown(Shutdown::Read);
        }
        if self.guest_done && self.guest_deaf {
            return Outcome::Closed;
        }
        self.end_writing(stream);
        self.outcome()
    }

    /// Gives the client its end of file when the last byte is delivered.
    fn end_writing(&self, stream: &UnixStream) {
        if self.guest_done && self.outbox.is_empty() {
            let _ = stream.shutdown(Shutdown::Write);
        }
    }

    fn take_data(
        &mut self,
        len: u32,
        stream: &UnixStream,
        memory: &GuestMemory,
        buffers: &[Buffer],
    ) -> Outcome {
        let room = (WINDOW as usize).saturating_sub(self.outbox.len());
        let Ok(len) = usize::try_from(len) else { return Outcome::Reset };
        if self.guest_done || len > room {
            return Outcome::Reset;
        }
        if self.client_deaf {
            self.forward(len);
            return Outcome::Keep;
        }
        let mut sent = 0;
        if self.outbox.is_empty() {
            let Ok(mut payload) = IoVec::new(memory, buffers, HEADER as u64, len as u64) else {
                return Outcome::Reset;
            };
            if payload.len() < len {
                return Outcome::Reset;
            }
            while !payload.is_empty() {
                match payload.send(stream.as_fd()) {
                    Ok(count) => sent += count,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(_) => {
                        self.client_takes_no_more();
                        sent = len;
                        break;
                    }
                }
            }
            self.forward(sent);
        }
        if sent < len {
            let mut rest = vec![0; len - sent];
            if !copy_out(memory, buffers, (HEADER + sent) as u64, &mut rest) {
                return Outcome::Reset;
            }
            self.outbox.push(&rest);
        }
        self.outcome()
    }

    /// `count` bytes from the guest need no more room here.
    fn forward(&mut self, count: usize) {
        // Never more than the window.
        self.forwarded = self.forwarded.wrapping_add(u32::try_from(count).unwrap_or(WINDOW));
        if self.forwarded.wrapping_sub(self.announced) >= ANNOUNCE_AFTER && !self.guest_done {
            self.due.credit_update = true;
        }
    }

    fn client_takes_no_more(&mut self) {
        if !self.client_deaf {
            self.client_deaf = true;
            self.due.shutdown_receive = !self.guest_done;
        }
        let dropped = self.outbox.clear();
        self.forward(dropped);
    }

    // ---- from the client

    /// The stream may have bytes.
    pub(super) fn client_readable(&mut self) {
        self.readable = true;
    }

    /// The stream takes bytes again.
    pub(super) fn client_writable(&mut self, stream: &UnixStream) -> Outcome {
        if self.outbox.is_empty() {
            return Outcome::Keep;
        }
        match self.outbox.flush(stream) {
            Ok(count) => {
                self.forward(count);
                self.end_writing(stream);
            }
            Err(_) => self.client_takes_no_more(),
        }
        self.outcome()
    }

    /// The client has closed its stream; what it wrote before can still be read.
    pub(super) fn client_gone(&mut self) -> Outcome {
        if self.phase != Phase::Open {
            return Outcome::Reset;
        }
        self.readable = true;
        self.client_takes_no_more();
        self.outcome()
    }

    // ---- to the guest

    /// The next packet for the guest, its payload read straight into `buffers` behind where the header will
    /// be. None if there is none now. A RST ends the connection.
    pub(super) fn produce(
        &mut self,
        stream: &UnixStream,
        memory: &GuestMemory,
        buffers: &[Buffer],
    ) -> Option<Produced> {
        let packet = |op| Some(Produced { op, flags: 0, len: 0 });
        if std::mem::take(&mut self.due.request) {
            return packet(Op::Request);
        }
        if std::mem::take(&mut self.due.response) {
            return packet(Op::Response);
        }
        if std::mem::take(&mut self.due.credit_request) {
            return packet(Op::CreditRequest);
        }
        if std::mem::take(&mut self.due.shutdown_receive) {
            return Some(Produced { op: Op::Shutdown, flags: SHUTDOWN_RECEIVE, len: 0 });
        }
        if self.can_read()
            && let Some(produced) = self.read(stream, memory, buffers)
        {
            return Some(produced);
        }
        if std::mem::take(&mut self.due.credit_update) {
            return packet(Op::CreditUpdate);
        }
        None
    }

    fn read(&mut self, stream: &UnixStream, memory: &GuestMemory, buffers: &[Buffer]) -> Option<Produced> {
        let limit = u64::from(self.credit()).min(MAX_PAYLOAD);
        let mut room =
            IoVec::new(memory, buffers, HEADER as u64, limit).ok().filter(|room| !room.is_empty())?;
        match room.read(stream.as_fd()) {
            Ok(0) => {
                self.client_done = true;
                if self.ended() {
                    return Some(Produced { op: Op::Reset, flags: 0, len: 0 });
                }
                Some(Produced { op: Op::Shutdown, flags: SHUTDOWN_SEND, len: 0 })
            }
            Ok(count) => {
                let len = u32::try_from(count).unwrap_or(0);
                self.sent = self.sent.wrapping_add(len);
                if self.credit() == 0 && !self.asked {
                    self.asked = true;
                    self.due.credit_request = true;
                }
                Some(Produced { op: Op::Data, flags: 0, len })
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                None
            }
            // The client has closed without reading everything.
            Err(_) => Some(Produced { op: Op::Reset, flags: 0, len: 0 }),
        }
    }

    /// What every packet tells the guest of our buffer: buf_alloc and fwd_cnt.
    pub(super) fn announce(&mut self) -> (u32, u32) {
        self.announced = self.forwarded;
        self.due.credit_update = false;
        (WINDOW, self.forwarded)
    }
}

/// Tells a client that it is connected, and to which port. False if it is gone.
pub(super) fn greet(stream: &UnixStream, port: u32) -> bool {
    use rustix::net::{SendFlags, send};
    let line = format!("OK {port}\n");
    // A socket that nothing has been written to takes these few bytes.
    send(stream, line.as_bytes(), SendFlags::NOSIGNAL | SendFlags::DONTWAIT) == Ok(line.len())
}
