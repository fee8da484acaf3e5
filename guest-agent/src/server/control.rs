//! The control connection.
//!
//! ```text
//!            dial                connected               end, error, bad frame
//!   Waiting ──────▶ Connecting ─────────────▶ Up ──────────────────┐
//!      ▲                 │ refused            frames both ways     │
//!      └─────────────────┴──────────── after a moment ◀────────────┘
//! ```
//!
//! Answers belong to the connection that asked. What a lost connection had not taken is not sent again:
//! a new daemon asks for the state.

use std::{
    io,
    rc::Rc,
    time::{Duration, Instant},
};

use bulkhead_agent_api::{
    AgentError, Answer, Event, FromAgent, Hello, ToAgent,
    frame::{self, FrameError},
};
use rustix::{io::Errno, net::SendFlags};
use serde::Deserialize;
use serde_json::value::RawValue;

use super::Key;
use crate::{
    error::{internal, invalid},
    log,
    poll::{Poller, Watched},
    stdio::{CHUNK, hang_up},
    transport::Transport,
};

const RETRY: Duration = Duration::from_millis(200);

/// When the daemon does not take this much, no further calls are read.
const MAX_QUEUED: usize = 8 << 20;

/// Which connection a call came on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Epoch(u64);

pub(super) struct Control {
    poller: Rc<Poller<Key>>,
    hello: Hello,
    link: Link,
    epoch: u64,
}

enum Link {
    Waiting { until: Instant },
    Connecting(Watched<Key>),
    Up(Connection),
}

struct Connection {
    fd: Watched<Key>,
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
    sent: usize,
}

impl Control {
    pub(super) fn new(poller: Rc<Poller<Key>>, hello: Hello) -> Self {
        Self { poller, hello, link: Link::Waiting { until: Instant::now() }, epoch: 0 }
    }

    /// The epoch of calls that are read now.
    pub(super) fn epoch(&self) -> Epoch {
        Epoch(self.epoch)
    }

    /// When [`Control::tick`] has something to do.
    pub(super) fn deadline(&self) -> Option<Instant> {
        if let Link::Waiting { until } = self.link { Some(until) } else { None }
    }

    /// Dials when it is time.
    pub(super) fn tick(&mut self, transport: &dyn Transport) {
        if self.deadline().is_none_or(|until| until > Instant::now()) {
            return;
        }
        let begun = transport.dial().and_then(|fd| {
            let fd = self.poller.watch(fd, Key::Control);
            fd.want(false, true)?;
            Ok(fd)
        });
        self.link = match begun {
            Ok(fd) => Link::Connecting(fd),
            Err(_) => Link::Waiting { until: Instant::now() + RETRY },
        };
    }

    /// Serves readiness and gives the calls that have come.
    pub(super) fn ready(&mut self, readable: bool, scratch: &mut [u8]) -> Vec<ToAgent> {
        let mut calls = Vec::new();
        let served = match &mut self.link {
            Link::Waiting { .. } => Ok(()),
            Link::Connecting(_) => self.connected(),
            Link::Up(connection) => connection
                .flush()
                .and_then(|()| if readable { connection.receive(scratch, &mut calls) } else { Ok(()) }),
        };
        for error in calls.iter().filter_map(|call| call.as_ref().err().cloned()).collect::<Vec<_>>() {
            self.answer(self.epoch(), error.0, Err(error.1));
        }
        if served.is_err() {
            self.drop_link();
        }
        self.update_interest();
        calls.into_iter().filter_map(Result::ok).collect()
    }

    /// Answers a call, if its connection is still there.
    pub(super) fn answer(&mut self, epoch: Epoch, id: u64, result: Result<Answer, AgentError>) {
        if epoch == self.epoch() {
            self.send(&FromAgent::Answer { id, result });
        }
    }

    /// Tells the daemon, if there is one.
    pub(super) fn event(&mut self, event: Event) {
        self.send(&FromAgent::Event(event));
    }

    fn send(&mut self, message: &FromAgent) {
        let Link::Up(connection) = &mut self.link else { return };
        let frame = match (frame::encode(message), message) {
            (Err(FrameError::TooLong(_)), FromAgent::Answer { id, .. }) => {
                frame::encode(&FromAgent::Answer { id: *id, result: Err(internal("the answer is too long")) })
            }
            (frame, _) => frame,
        };
        let flushed = frame.map_err(io::Error::other).and_then(|frame| {
            connection.outgoing.extend(frame);
            connection.flush()
        });
        if flushed.is_err() {
            self.drop_link();
        }
        self.update_interest();
    }

    fn connected(&mut self) -> io::Result<()> {
        let Link::Connecting(fd) = &self.link else { return Ok(()) };
        rustix::net::sockopt::socket_error(fd)??;
        let Link::Connecting(fd) =
            std::mem::replace(&mut self.link, Link::Waiting { until: Instant::now() + RETRY })
        else {
            return Ok(());
        };
        self.epoch += 1;
        let outgoing = frame::encode(&self.hello).map_err(io::Error::other)?;
        let mut connection = Connection { fd, incoming: Vec::new(), outgoing, sent: 0 };
        connection.flush()?;
        self.link = Link::Up(connection);
        Ok(())
    }

    fn drop_link(&mut self) {
        if let Link::Up(connection) = &self.link {
            hang_up(&connection.fd);
        }
        self.link = Link::Waiting { until: Instant::now() + RETRY };
    }

    fn update_interest(&mut self) {
        let Link::Up(connection) = &self.link else { return };
        let waiting = connection.outgoing.len() - connection.sent;
        if connection.fd.want(waiting < MAX_QUEUED, waiting > 0).is_err() {
            self.drop_link();
        }
    }
}

type Received = Result<ToAgent, (u64, AgentError)>;

impl Connection {
    fn flush(&mut self) -> io::Result<()> {
        while let Some(rest) = self.outgoing.get(self.sent..).filter(|rest| !rest.is_empty()) {
            match rustix::net::send(&self.fd, rest, SendFlags::NOSIGNAL) {
                Ok(count) => self.sent += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    self.outgoing.drain(..self.sent);
                    self.sent = 0;
                    return Ok(());
                }
                Err(error) => return Err(error.into()),
            }
        }
        self.outgoing = Vec::new();
        self.sent = 0;
        Ok(())
    }

    fn receive(&mut self, scratch: &mut [u8], calls: &mut Vec<Received>) -> io::Result<()> {
        let limit = scratch.len().min(CHUNK);
        match rustix::io::read(&self.fd, &mut scratch[..limit]) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => self.incoming.extend(&scratch[..count]),
            Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        let mut used = 0;
        let decoded = loop {
            match frame::decode::<Box<RawValue>>(&self.incoming[used..]) {
                Ok(Some((body, length))) => {
                    used += length;
                    calls.push(parse(&body));
                }
                Ok(None) => break Ok(()),
                Err(error) => {
                    log::warn(format_args!("the control connection: {error}"));
                    break Err(io::Error::other(error));
                }
            }
        };
        self.incoming.drain(..used);
        decoded
    }
}

/// A call that this agent does not know (a newer daemon's) is answered, not a reason to hang up.
fn parse(body: &RawValue) -> Received {
    #[derive(Deserialize)]
    struct Id {
        id: u64,
    }
    serde_json::from_str(body.get()).map_err(|error| {
        let id = serde_json::from_str::<Id>(body.get()).map_or(0, |call| call.id);
        (id, invalid(format!("the agent does not understand the call: {error}")))
    })
}
