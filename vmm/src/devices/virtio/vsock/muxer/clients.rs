//! The clients' side: accepting them, their first lines, and what happens at their streams.

use std::{
    io,
    os::{fd::AsRawFd, unix::net::UnixStream},
};

use vmm_sys_util::epoll::{ControlOperation, EpollEvent, EventSet};

use super::{
    super::{
        command::{self, Command, Line},
        connection::{Connection, Key, Outcome},
    },
    Client, MAX_CLIENTS, MAX_LISTENING, Muxer, Stage, TOKEN_LISTENER, TOKEN_WAKE,
};

/// Events handled in one turn.
const EVENTS: usize = 64;

impl Muxer {
    /// Handles what has happened at the descriptors; says whether the owner's is readable. `online`: there is
    /// a driver in the guest.
    ///
    /// # Errors
    /// epoll failed.
    pub(in super::super) fn poll(&mut self, online: bool) -> io::Result<bool> {
        let mut events = [EpollEvent::default(); EVENTS];
        let count = match self.epoll.wait(0, &mut events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            other => other?,
        };
        let mut wake = false;
        let mut accept = std::mem::take(&mut self.accept_again);
        for event in events.iter().take(count) {
            match event.data() {
                TOKEN_WAKE => wake = true,
                TOKEN_LISTENER => accept = true,
                token => self.client_event(token, event.event_set(), online),
            }
        }
        if accept {
            self.accept(online);
        }
        Ok(wake)
    }

    fn accept(&mut self, online: bool) {
        loop {
            match self.listener.accept() {
                Ok((stream, _)) => self.add_client(stream, online),
                Err(error) => match error.kind() {
                    io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => {}
                    io::ErrorKind::WouldBlock => return,
                    _ => {
                        self.accept_again = true;
                        return;
                    }
                },
            }
        }
    }

    /// Takes a client in; above the limit, or where it cannot be watched, its stream is closed.
    fn add_client(&mut self, stream: UnixStream, online: bool) {
        if self.clients.len() >= MAX_CLIENTS || stream.set_nonblocking(true).is_err() {
            return;
        }
        let token = self.next_token;
        let events = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        let event = EpollEvent::new(events, token);
        if self.epoll.ctl(ControlOperation::Add, stream.as_raw_fd(), event).is_ok() {
            self.next_token += 1;
            self.clients.insert(token, Client { stream, stage: Stage::Command });
            // Most have written their line by now.
            self.client_event(token, EventSet::IN, online);
        }
    }

    fn client_event(&mut self, token: u64, events: EventSet, online: bool) {
        let gone = events.intersects(EventSet::HANG_UP | EventSet::ERROR);
        let ended = gone || events.contains(EventSet::READ_HANG_UP);
        let Some(Client { stream, stage }) = self.clients.get_mut(&token) else { return };
        match stage {
            Stage::Command => match command::read(stream) {
                Line::Command(command) if !gone => self.command(token, command, online),
                Line::Partial if !ended => {}
                _ => self.close(token),
            },
            Stage::Listening if gone => self.close(token),
            Stage::Listening => {}
            Stage::Connected(connection) => {
                if ended || events.contains(EventSet::IN) {
                    connection.client_readable();
                }
                let mut outcome = Outcome::Keep;
                if events.contains(EventSet::OUT) {
                    outcome = connection.client_writable(stream);
                }
                if gone && outcome == Outcome::Keep {
                    outcome = connection.client_gone();
                }
                self.settle(token, outcome);
            }
            Stage::Draining(outbox) => {
                if gone || outbox.flush(stream).is_err() || outbox.is_empty() {
                    self.close(token);
                }
            }
        }
    }

    fn command(&mut self, token: u64, command: Command, online: bool) {
        match command {
            Command::Connect(_) if !online => self.close(token),
            Command::Connect(guest_port) => {
                let key = Key { host_port: self.free_port(guest_port), guest_port };
                self.connect(token, Connection::requested(key));
            }
            Command::Listen(_) if self.listening.len() >= MAX_LISTENING => self.close(token),
            Command::Listen(port) => {
                if let Some(client) = self.clients.get_mut(&token) {
                    client.stage = Stage::Listening;
                    self.listening.push_back((port, token));
                    self.offer(port);
                }
            }
        }
    }
}
