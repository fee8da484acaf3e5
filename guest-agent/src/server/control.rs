//! The control connection.
//!
//! ```text
//!            dial                 connected             end, error, bad frame
//!   Waiting ──────▶ Connecting ─────────────▶ Up ────────────────────────────▶ Alone
//!      ▲                 │ refused            ▲  frames both ways               │
//!      └─ after a moment ┘                    └───── a later daemon connects ◀──┘
//! ```
//!
//! Only the first connection is the agent's own doing: the daemon that booted the machine awaits it before
//! there is any workload. Later daemons connect to the agent, lest they take a workload's connection for
//! it. One that connects replaces whatever was before.
//!
//! Answers belong to the connection that asked. What a lost connection had not taken is not sent again:
//! a new daemon asks for the state.

use std::{
    io,
    os::fd::AsFd,
    rc::Rc,
    time::{Duration, Instant},
};

use bulkhead_agent_api::{
    AgentError, Answer, Event, FromAgent, Hello, ToAgent,
    frame::{self, FrameError},
};
use rustix::{
    io::Errno,
    net::{SendFlags, SocketFlags},
};
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

/// When the daemon does not take this much, no further calls are read; when it does not take twice as much,
/// the connection is given up: a workload can cause events without end.
const MAX_QUEUED: usize = 8 << 20;

/// Which connection a call came on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Epoch(u64);

#[cfg(test)]
impl Epoch {
    pub(super) fn of(number: u64) -> Self {
        Self(number)
    }
}

pub(super) struct Control {
    poller: Rc<Poller<Key>>,
    hello: Hello,
    link: Link,
    epoch: u64,
}

enum Link {
    Waiting {
        until: Instant,
    },
    Connecting(Watched<Key>),
    Up(Connection),
    /// No daemon, until one connects.
    Alone,
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
            Link::Waiting { .. } | Link::Alone => Ok(()),
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
            connection.flush()?;
            let queued = connection.outgoing.len() - connection.sent;
            if queued > 2 * MAX_QUEUED { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
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
        self.greet(fd)
    }

    /// Takes daemons that connect; the last one counts.
    pub(super) fn accept(&mut self, listener: &Watched<Key>, transport: &dyn Transport) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        while let Ok(fd) = rustix::net::accept_with(listener, flags) {
            if !transport.is_daemon(fd.as_fd()) {
                continue;
            }
            self.drop_link();
            let fd = self.poller.watch(fd, Key::Control);
            if self.greet(fd).is_err() {
                self.drop_link();
            }
            self.update_interest();
        }
    }

    /// Begins the protocol on a new connection.
    fn greet(&mut self, fd: Watched<Key>) -> io::Result<()> {
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
        self.link = match self.epoch {
            // Nobody has ever been greeted.
            0 => Link::Waiting { until: Instant::now() + RETRY },
            _ => Link::Alone,
        };
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

#[cfg(test)]
mod tests {
    use std::{
        cell::Cell,
        io::Read,
        os::{
            fd::{BorrowedFd, OwnedFd},
            unix::net::{UnixListener, UnixStream},
        },
    };

    use super::*;

    /// Dials daemons that are there at once, and takes connections while `host` says that they are the
    /// daemon's.
    struct Local {
        dialed: Cell<Option<UnixStream>>,
        host: Cell<bool>,
    }

    impl Transport for Local {
        fn dial(&self) -> io::Result<OwnedFd> {
            let (ours, theirs) = UnixStream::pair()?;
            ours.set_nonblocking(true)?;
            self.dialed.set(Some(theirs));
            Ok(ours.into())
        }
        fn listen(&self) -> io::Result<OwnedFd> {
            Err(io::ErrorKind::Unsupported.into())
        }
        fn listen_for_files(&self) -> io::Result<OwnedFd> {
            Err(io::ErrorKind::Unsupported.into())
        }
        fn listen_for_control(&self) -> io::Result<OwnedFd> {
            Err(io::ErrorKind::Unsupported.into())
        }
        fn listen_for_names(&self) -> io::Result<OwnedFd> {
            Err(io::ErrorKind::Unsupported.into())
        }
        fn is_daemon(&self, _: BorrowedFd<'_>) -> bool {
            self.host.get()
        }
    }

    /// Whether the greeting comes on a connection.
    fn greeted(mut stream: &UnixStream) -> bool {
        let mut bytes = vec![0; 4096];
        let count = stream.read(&mut bytes).unwrap();
        let hello = frame::decode::<Hello>(&bytes[..count]).unwrap();
        hello.is_some_and(|(hello, _)| hello.kernel == "test")
    }

    #[test]
    fn the_agent_connects_once_and_then_later_daemons_do() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control");
        let poller = Poller::new().unwrap();
        let daemons = UnixListener::bind(&path).unwrap();
        daemons.set_nonblocking(true).unwrap();
        let daemons = poller.watch(daemons.into(), Key::Daemons);
        let transport = Local { dialed: Cell::new(None), host: Cell::new(true) };
        let hello = Hello { version: 1, kernel: "test".into(), started_us: 0 };
        let mut control = Control::new(Rc::clone(&poller), hello);
        let mut scratch = vec![0; 4096];

        control.tick(&transport);
        assert!(control.ready(false, &mut scratch).is_empty());
        let first = transport.dialed.take().unwrap();
        assert!(greeted(&first));

        drop(first);
        control.ready(true, &mut scratch);
        control.tick(&transport);
        assert!(control.deadline().is_none() && transport.dialed.take().is_none(), "it must not dial again");

        let second = UnixStream::connect(&path).unwrap();
        control.accept(&daemons, &transport);
        assert!(greeted(&second));
        let epoch = control.epoch();

        // One that is not the host's changes nothing.
        transport.host.set(false);
        let stranger = UnixStream::connect(&path).unwrap();
        control.accept(&daemons, &transport);
        assert_eq!((&stranger).read(&mut [0; 16]).unwrap(), 0);
        assert!(control.epoch() == epoch);

        transport.host.set(true);
        let third = UnixStream::connect(&path).unwrap();
        control.accept(&daemons, &transport);
        assert!(greeted(&third));
        assert_eq!((&second).read(&mut [0; 16]).unwrap(), 0, "the one before is hung up");
        assert!(control.epoch() != epoch);
    }

    #[test]
    fn a_daemon_that_takes_nothing_is_given_up() {
        let transport = Local { dialed: Cell::new(None), host: Cell::new(true) };
        let hello = Hello { version: 1, kernel: "test".into(), started_us: 0 };
        let mut control = Control::new(Poller::new().unwrap(), hello);
        control.tick(&transport);
        control.ready(false, &mut []);
        let _deaf = transport.dialed.take().unwrap();
        let container = "c".repeat(1 << 20);
        let given_up = (0..100).position(|_| {
            control.event(Event::Oom { container: container.clone() });
            !matches!(control.link, Link::Up(_))
        });
        assert!(given_up.is_some_and(|events| (16..20).contains(&events)), "{given_up:?}");
    }
}
