//! Stream connections, from `accept` to the process whose stream they become.

use std::{collections::BTreeMap, os::fd::AsFd, rc::Rc};

use bulkhead_agent_api::{
    AgentError, ErrorKind, MAX_STREAM_OPEN, StreamKind, StreamOpen, StreamReady,
    frame::{self, FrameError},
};
use rustix::{
    io::Errno,
    net::{SendFlags, SocketFlags},
};

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
    waiting: BTreeMap<u64, (Watched<Key>, Vec<u8>)>,
}

/// A connection whose first frame has come.
struct Opened {
    connection: Watched<Key>,
    open: StreamOpen,
    /// What came behind the frame.
    early: Vec<u8>,
}

impl Openings {
    pub(super) fn new(poller: Rc<Poller<Key>>) -> Self {
        Self { poller, next: 0, waiting: BTreeMap::new() }
    }

    pub(super) fn accept(&mut self, listener: &Watched<Key>, transport: &dyn Transport) {
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
            self.waiting.insert(number, (connection, Vec::new()));
            while self.waiting.len() > MAX_OPENINGS {
                self.waiting.pop_first();
            }
        }
    }

    /// Reads more of a connection's first frame; the connection is closed when that cannot be one.
    fn read(&mut self, number: u64) -> Option<Opened> {
        let (connection, mut bytes) = self.waiting.remove(&number)?;
        let mut buffer = [0; MAX_STREAM_OPEN];
        match rustix::io::read(&connection, &mut buffer) {
            Ok(0) => return None,
            Ok(count) => bytes.extend(&buffer[..count]),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => return None,
        }
        match decode(&bytes) {
            Ok(Some((open, used))) => Some(Opened { connection, open, early: bytes.split_off(used) }),
            Ok(None) => {
                self.waiting.insert(number, (connection, bytes));
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

fn decode(bytes: &[u8]) -> Result<Option<(StreamOpen, usize)>, FrameError> {
    let opened = frame::decode(bytes)?;
    if opened.is_none() && bytes.len() > MAX_STREAM_OPEN {
        return Err(FrameError::TooLong(bytes.len()));
    }
    Ok(opened)
}

impl Server {
    pub(super) fn open_stream(&mut self, number: u64) {
        let Some(Opened { connection, open, early }) = self.openings.read(number) else { return };
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
