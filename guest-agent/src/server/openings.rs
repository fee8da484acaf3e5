//! Connections that have not yet said what they are for: streams, from `accept` to the process whose stream they
//! become, and transfers of files, up to their first frame.

use std::{collections::BTreeMap, os::fd::AsFd, rc::Rc};

use bulkhead_agent_api::{
    AgentError, ErrorKind, MAX_STREAM_OPEN, StreamKind, StreamOpen, StreamReady,
    files::{FilesOpen, MAX_FILES_OPEN},
    frame::{self, FrameError},
};
use rustix::{
    io::Errno,
    net::{SendFlags, SocketFlags},
};
use serde::de::DeserializeOwned;

use super::{Key, Server};
use crate::{
    error::{conflict, not_found},
    log,
    poll::{Poller, Watched},
    stdio::hang_up,
    transport::Transport,
};

/// Connections that have not yet said what they are for. More are not needed, so the oldest goes.
const MAX_OPENINGS: usize = 64;

pub(super) struct Openings {
    poller: Rc<Poller<Key>>,
    next: u64,
    waiting: BTreeMap<u64, Waiting>,
}

/// On which port a connection came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Port {
    Streams,
    Files,
}

struct Waiting {
    connection: Watched<Key>,
    port: Port,
    bytes: Vec<u8>,
}

/// A stream's connection whose first frame has come.
struct Opened {
    connection: Watched<Key>,
    open: StreamOpen,
    /// What came behind the frame.
    early: Vec<u8>,
}

/// What a first frame says.
enum First {
    Stream(Opened),
    Files(Watched<Key>, FilesOpen),
}

impl Openings {
    pub(super) fn new(poller: Rc<Poller<Key>>) -> Self {
        Self { poller, next: 0, waiting: BTreeMap::new() }
    }

    pub(super) fn accept(&mut self, listener: &Watched<Key>, port: Port, transport: &dyn Transport) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        while let Ok(connection) = rustix::net::accept_with(listener, flags) {
            if !transport.is_daemon(connection.as_fd()) {
                continue;
            }
            let number = self.next;
            self.next += 1;
            let connection = self.poller.watch(connection, Key::Opening(number));
            if let Err(error) = connection.want(true, false) {
                log::warn(format_args!("a stream connection: {error}"));
                continue;
            }
            self.waiting.insert(number, Waiting { connection, port, bytes: Vec::new() });
            while self.waiting.len() > MAX_OPENINGS {
                self.waiting.pop_first();
            }
        }
    }

    /// Reads more of a connection's first frame; the connection is closed when that cannot be one.
    fn read(&mut self, number: u64) -> Option<First> {
        let Waiting { connection, port, mut bytes } = self.waiting.remove(&number)?;
        let mut buffer = [0; MAX_STREAM_OPEN];
        match rustix::io::read(&connection, &mut buffer) {
            Ok(0) => return None,
            Ok(count) => bytes.extend(&buffer[..count]),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => return None,
        }
        let first = match port {
            Port::Streams => decode(&bytes, MAX_STREAM_OPEN).map(|first| first.map(Said::Stream)),
            Port::Files => decode(&bytes, MAX_FILES_OPEN).map(|first| first.map(Said::Files)),
        };
        match first {
            Ok(Some(Said::Stream((open, used)))) => {
                Some(First::Stream(Opened { connection, open, early: bytes.split_off(used) }))
            }
            // Nothing more comes before the answer.
            Ok(Some(Said::Files((open, used)))) if used == bytes.len() => {
                Some(First::Files(connection, open))
            }
            Ok(Some(Said::Files(_))) => None,
            Ok(None) => {
                self.waiting.insert(number, Waiting { connection, port, bytes });
                None
            }
            Err(error) => {
                log::warn(format_args!("a stream connection: {error}"));
                hang_up(&connection);
                None
            }
        }
    }
}

/// A first frame, and how many bytes it took.
enum Said {
    Stream((StreamOpen, usize)),
    Files((FilesOpen, usize)),
}

fn decode<T: DeserializeOwned>(bytes: &[u8], max: usize) -> Result<Option<(T, usize)>, FrameError> {
    let opened = frame::decode(bytes)?;
    if opened.is_none() && bytes.len() > max {
        return Err(FrameError::TooLong(bytes.len()));
    }
    Ok(opened)
}

impl Server {
    /// Takes more of what a new connection says, and serves it when that is enough.
    pub(super) fn opening_ready(&mut self, number: u64) {
        match self.openings.read(number) {
            Some(First::Stream(opened)) => self.open_stream(opened),
            Some(First::Files(connection, open)) => self.open_files(&connection, &open),
            None => {}
        }
    }

    fn open_stream(&mut self, opened: Opened) {
        let Opened { connection, open, early } = opened;
        let checked = self.check(&open);
        let (from, error) = match checked {
            Ok(from) => (from, None),
            Err(error) => (0, Some(error)),
        };
        let failed = error.is_some();
        let sent = frame::encode(&StreamReady { error, from }).is_ok_and(|frame| {
            // The first bytes on a fresh connection: they fit, or the peer is not to be reached.
            rustix::net::send(&connection, &frame, SendFlags::NOSIGNAL) == Ok(frame.len())
        });
        if failed || !sent {
            hang_up(&connection);
            return;
        }
        if let Err(error) = self.attach(&connection, &open, from, &early) {
            log::warn(format_args!("a stream connection: {error}"));
            hang_up(&connection);
        }
    }

    /// Answers where an output goes on.
    fn check(&mut self, open: &StreamOpen) -> Result<u64, AgentError> {
        let process = self.find(&open.process).ok_or_else(|| not_found("there is no such process"))?;
        let none =
            || AgentError { kind: ErrorKind::Conflict, message: "the process has no such stream".into() };
        match open.stream {
            StreamKind::Stdin => process.input.as_ref().map(|_| 0).ok_or_else(none),
            kind => {
                let output = process.kept_output(kind).ok_or_else(none)?;
                output.connect(open.from).map_err(|error| conflict(error.to_string()))
            }
        }
    }

    fn attach(
        &mut self,
        connection: &Watched<Key>,
        open: &StreamOpen,
        from: u64,
        early: &[u8],
    ) -> std::io::Result<()> {
        let fd = connection.as_fd().try_clone_to_owned()?;
        let key = Key::Stream(Rc::new(open.process.clone()), open.stream);
        let connection = self.poller.watch(fd, key);
        if let Some(process) = self.find(&open.process) {
            match open.stream {
                StreamKind::Stdin => process.input.as_mut().map(|input| input.attach(connection, early)),
                kind => process.kept_output(kind).map(|output| output.attach(from, connection, early)),
            };
        }
        Ok(())
    }
}
