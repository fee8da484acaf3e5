//! The resolver at 127.0.0.11: it takes questions and hands them to the daemon, which knows the answers.
//!
//! ```text
//!   program ─▶ 127.0.0.11:53 ─(cgroup program)─▶ :PORT, UDP and TCP ─▶ tag ─▶ daemon
//!           ◀────────────── :53 again ◀──────────────────────────────◀ tag ◀──┘
//! ```
//!
//! Port 53 itself stays free, so that a name server can be run in a container: programs of the root cgroup lead
//! those who ask 127.0.0.11 to another port, and say 53 where the answer's origin is asked for.
//!
//! Nothing of it is there before the daemon has connected for the first time. Questions of a time without a
//! daemon are lost, as any datagram may be; their askers ask again.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4},
    os::fd::{AsFd, OwnedFd},
    rc::Rc,
};

use bulkhead_agent_api::names::{HEADER, Header, Transport};
use rustix::{
    io::Errno,
    net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, sockopt},
};

use crate::{
    log,
    poll::{Poller, Watched},
    server::Key,
    stdio::hang_up,
    sys::{self, BpfInstruction, CgroupHook},
    transport,
};

const ADDRESS: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 11);
const PORT: u16 = 53;

/// Above the ports that the kernel gives away.
const OWN_PORT: u16 = 61_053;

/// The longest question that is taken.
const LONGEST: usize = 4096;

/// Questions that wait for their answer; the oldest is forgotten for one more.
const MAX_PENDING: usize = 1024;

/// Connections at a time; the oldest is ended for one more.
const MAX_CLIENTS: usize = 64;

/// Bytes on their way to the daemon, or to a client; a question or client beyond is dropped.
const MAX_QUEUED: usize = 512 << 10;

/// Datagrams that are taken in one turn.
const TURN: usize = 64;

/// Who waits for an answer.
#[derive(Debug, Clone, Copy)]
enum Asker {
    Udp(SocketAddrV4),
    Tcp(u64),
}

/// The resolver.
pub struct Names {
    poller: Rc<Poller<Key>>,
    listener: Watched<Key>,
    sockets: Option<Sockets>,
    link: Option<Stream>,
    pending: BTreeMap<u32, Asker>,
    next_tag: u32,
    clients: BTreeMap<u64, Stream>,
    next_client: u64,
}

struct Sockets {
    udp: Watched<Key>,
    tcp: Watched<Key>,
}

/// A connection with what came and what is to go.
struct Stream {
    fd: Watched<Key>,
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
}

impl Names {
    /// Waits for the daemon on the listening socket.
    ///
    /// # Errors
    /// Of epoll.
    pub fn new(poller: Rc<Poller<Key>>, listener: OwnedFd) -> io::Result<Self> {
        let listener = poller.watch(listener, Key::NamesListener);
        listener.want(true, false)?;
        Ok(Self {
            poller,
            listener,
            sockets: None,
            link: None,
            pending: BTreeMap::new(),
            next_tag: 0,
            clients: BTreeMap::new(),
            next_client: 0,
        })
    }

    /// Takes the daemon's connection; the last one counts.
    pub fn accept_daemon(&mut self, transport: &dyn transport::Transport) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        while let Ok(fd) = rustix::net::accept_with(&self.listener, flags) {
            if !transport.is_daemon(fd.as_fd()) {
                continue;
            }
            if self.sockets.is_none() {
                match open(&self.poller) {
                    Ok(sockets) => self.sockets = Some(sockets),
                    Err(error) => log::warn(format_args!("no resolver: {error}")),
                }
            }
            self.drop_link();
            let link = Stream::new(self.poller.watch(fd, Key::NamesLink));
            if link.fd.want(true, false).is_ok() {
                self.link = Some(link);
            }
        }
    }

    fn drop_link(&mut self) {
        if let Some(link) = self.link.take() {
            hang_up(&link.fd);
        }
    }

    /// Takes datagrams.
    pub fn udp_ready(&mut self, scratch: &mut [u8]) {
        for _ in 0..TURN {
            let Some(sockets) = &self.sockets else { return };
            let received = rustix::net::recvfrom(&sockets.udp, &mut *scratch, RecvFlags::DONTWAIT);
            let Ok((_, length, Some(from))) = received else { return };
            let Ok(SocketAddr::V4(from)) = SocketAddr::try_from(from) else { continue };
            if let Some(question) = scratch.get(..length).filter(|question| question.len() <= LONGEST) {
                let question = question.to_vec();
                self.ask(&question, Asker::Udp(from));
            }
        }
    }

    /// Takes connections.
    pub fn tcp_ready(&mut self) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        while let Some(sockets) = &self.sockets
            && let Ok(fd) = rustix::net::accept_with(&sockets.tcp, flags)
        {
            if self.clients.len() >= MAX_CLIENTS {
                self.clients.pop_first();
            }
            let number = self.next_client;
            self.next_client += 1;
            let client = Stream::new(self.poller.watch(fd, Key::NamesClient(number)));
            if client.fd.want(true, false).is_ok() {
                self.clients.insert(number, client);
            }
        }
    }

    /// Serves a connection of a program's.
    pub fn client_ready(&mut self, number: u64, scratch: &mut [u8]) {
        let Some(client) = self.clients.get_mut(&number) else { return };
        let mut alive = client.flush().and_then(|()| client.receive(scratch)).is_ok();
        let mut questions = Vec::new();
        while let Some((length, rest)) = client.incoming.split_first_chunk::<2>() {
            let length = usize::from(u16::from_be_bytes(*length));
            alive &= length <= LONGEST;
            let Some(question) = rest.get(..length).filter(|_| alive) else { break };
            questions.push(question.to_vec());
            client.incoming.drain(..2 + length);
        }
        if !alive {
            self.clients.remove(&number);
            return;
        }
        for question in questions {
            self.ask(&question, Asker::Tcp(number));
        }
    }

    fn ask(&mut self, question: &[u8], asker: Asker) {
        let Some(link) = &mut self.link else { return };
        let Ok(length) = u16::try_from(question.len()) else { return };
        if link.outgoing.len() > MAX_QUEUED {
            return;
        }
        let tag = self.next_tag;
        self.next_tag = tag.wrapping_add(1);
        if self.pending.len() >= MAX_PENDING {
            self.pending.pop_first();
        }
        self.pending.insert(tag, asker);
        let transport = match asker {
            Asker::Udp(_) => Transport::Udp,
            Asker::Tcp(_) => Transport::Tcp,
        };
        link.outgoing.extend(Header { length, transport, tag }.encode());
        link.outgoing.extend(question);
        if link.flush().is_err() {
            self.drop_link();
        }
    }

    /// Serves the daemon's connection.
    pub fn link_ready(&mut self, scratch: &mut [u8]) {
        let Some(link) = &mut self.link else { return };
        let mut alive = link.flush().and_then(|()| link.receive(scratch)).is_ok();
        let mut answers = Vec::new();
        while let Some((header, rest)) = link.incoming.split_first_chunk::<HEADER>() {
            let Some(header) = Header::decode(*header) else {
                alive = false;
                break;
            };
            let Some(answer) = rest.get(..usize::from(header.length)) else { break };
            answers.push((header.tag, answer.to_vec()));
            link.incoming.drain(..HEADER + usize::from(header.length));
        }
        for (tag, answer) in answers {
            self.answer(tag, &answer);
        }
        if !alive {
            self.drop_link();
        }
    }

    fn answer(&mut self, tag: u32, answer: &[u8]) {
        match (self.pending.remove(&tag), &self.sockets) {
            (Some(Asker::Udp(to)), Some(sockets)) => {
                // One that is gone, or takes nothing, is none of ours.
                let _ = rustix::net::sendto(&sockets.udp, answer, SendFlags::DONTWAIT, &SocketAddr::V4(to));
            }
            (Some(Asker::Tcp(number)), _) => {
                let Some(client) = self.clients.get_mut(&number) else { return };
                let length = u16::try_from(answer.len()).unwrap_or(0);
                client.outgoing.extend(length.to_be_bytes());
                client.outgoing.extend(answer);
                if client.outgoing.len() > MAX_QUEUED || client.flush().is_err() {
                    self.clients.remove(&number);
                }
            }
            _ => {}
        }
    }
}

impl Stream {
    fn new(fd: Watched<Key>) -> Self {
        Self { fd, incoming: Vec::new(), outgoing: Vec::new() }
    }

    /// Sends what can be sent now, and asks to be told when there can be more.
    fn flush(&mut self) -> io::Result<()> {
        while !self.outgoing.is_empty() {
            match rustix::net::send(&self.fd, &self.outgoing, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(sent) => drop(self.outgoing.drain(..sent)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(error) => return Err(error.into()),
            }
        }
        self.fd.want(true, !self.outgoing.is_empty())
    }

    fn receive(&mut self, scratch: &mut [u8]) -> io::Result<()> {
        match rustix::io::read(&self.fd, &mut *scratch) {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                self.incoming.extend(scratch.get(..count).unwrap_or_default());
                Ok(())
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

fn open(poller: &Rc<Poller<Key>>) -> io::Result<Sockets> {
    let socket = |kind, key| -> io::Result<Watched<Key>> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let fd = rustix::net::socket_with(AddressFamily::INET, kind, flags, None)?;
        sockopt::set_socket_reuseaddr(&fd, true)?;
        rustix::net::bind(&fd, &SocketAddrV4::new(ADDRESS, OWN_PORT))?;
        if kind == SocketType::STREAM {
            rustix::net::listen(&fd, 64)?;
        }
        let watched = poller.watch(fd, key);
        watched.want(true, false)?;
        Ok(watched)
    };
    let sockets = Sockets {
        udp: socket(SocketType::DGRAM, Key::NamesUdp)?,
        tcp: socket(SocketType::STREAM, Key::NamesTcp)?,
    };
    let root = File::open("/sys/fs/cgroup")?;
    for (hook, from, to) in [
        (CgroupHook::Connect4, PORT, OWN_PORT),
        (CgroupHook::SendMessage4, PORT, OWN_PORT),
        (CgroupHook::ReceiveMessage4, OWN_PORT, PORT),
        (CgroupHook::PeerName4, OWN_PORT, PORT),
    ] {
        sys::attach_program(&root, hook, &redirect(from, to))?;
    }
    Ok(sockets)
}

/// A program that replaces a port of the resolver's address by another.
fn redirect(from: u16, to: u16) -> [BpfInstruction; 8] {
    // struct bpf_sock_addr: the address at 4, the port at 24, both as on the wire.
    const ADDRESS_AT: i16 = 4;
    const PORT_AT: i16 = 24;
    const LOAD_WORD: u8 = 0x61;
    const STORE_WORD: u8 = 0x63;
    const MOVE: u8 = 0xb7;
    const JUMP_NOT_EQUAL: u8 = 0x55;
    const EXIT: u8 = 0x95;
    let op = |code, registers, offset, immediate| BpfInstruction { code, registers, offset, immediate };
    // Register 1 is the structure; 2 is ours; 0 is the answer.
    let (load, ours) = (0x12, 2);
    let port = |port: u16| i32::from(port.to_be());
    [
        op(LOAD_WORD, load, ADDRESS_AT, 0),
        op(JUMP_NOT_EQUAL, ours, 4, i32::from_ne_bytes(ADDRESS.octets())),
        op(LOAD_WORD, load, PORT_AT, 0),
        op(JUMP_NOT_EQUAL, ours, 2, port(from)),
        op(MOVE, ours, 0, port(to)),
        op(STORE_WORD, 0x21, PORT_AT, 0),
        op(MOVE, 0, 0, 1),
        op(EXIT, 0, 0, 0),
    ]
}
