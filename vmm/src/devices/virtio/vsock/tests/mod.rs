//! A guest that the test plays, with clients on real sockets.

use std::{
    collections::VecDeque,
    io::{ErrorKind, Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
};

use tempfile::TempDir;

use super::{
    super::{
        hostile,
        testing::{Bench, Desc},
    },
    connection::WINDOW,
    muxer::{FIRST_HOST_PORT, MAX_CLIENTS, MAX_LISTENING, MAX_WAITING},
    packet::{HOST_CID, Op, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, STREAM},
    *,
};

mod flow;
mod hostile_guest;
mod lifecycle;
mod random;
mod saved;

const CID: u64 = 42;
const RX_BUFFERS: u64 = 0x10_0000;
/// As Linux has them, more or less.
const RX_BUFFER: u32 = 4096;
const TX_BUFFER: u64 = 0x20_0000;
const BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// A device with a guest that the test plays, and a socket for its clients.
struct Guest {
    bench: Bench<Vsock>,
    directory: TempDir,
    inbox: VecDeque<(Header, Vec<u8>)>,
}

impl Guest {
    /// A device whose driver has not come up.
    fn booting() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("vsock")).unwrap();
        let bench = Bench::new(Vsock::new(CID, listener).unwrap());
        Self { bench, directory, inbox: VecDeque::new() }
    }

    /// A running guest with `buffers` receive buffers.
    fn with_buffers(buffers: u16) -> Self {
        let mut guest = Self::booting();
        guest.bench.activate(FEATURES & !VIRTIO_RING_F_EVENT_IDX);
        guest.provide(0, buffers);
        guest
    }

    fn new() -> Self {
        Self::with_buffers(128)
    }

    fn provide(&mut self, first: u16, count: u16) {
        for index in first..first + count {
            let at = RX_BUFFERS + u64::from(index) * u64::from(RX_BUFFER);
            self.bench.queue(RX).table(index, &[Desc::writable(at, RX_BUFFER)]);
            self.bench.queue(RX).offer(index);
        }
        self.bench.kick(RX).unwrap();
    }

    fn client(&self, command: &str) -> UnixStream {
        let mut client = UnixStream::connect(self.directory.path().join("vsock")).unwrap();
        client.write_all(command.as_bytes()).unwrap();
        client.set_nonblocking(true).unwrap();
        client
    }

    /// Lets the device work until nothing is left to do, and collects what it has for the guest.
    fn run(&mut self) {
        for _ in 0..4 {
            self.bench.device.source_event(0).unwrap();
            loop {
                let used = self.bench.queue(RX).used();
                if used.is_empty() {
                    break;
                }
                for (head, length) in used {
                    let at = RX_BUFFERS + u64::from(head) * u64::from(RX_BUFFER);
                    let mut bytes = self.bench.read(at, length as usize);
                    let payload = bytes.split_off(HEADER);
                    let header = Header::parse(&bytes.try_into().unwrap());
                    assert_eq!((header.src_cid, header.dst_cid, header.kind), (HOST_CID, CID, STREAM));
                    assert_eq!(header.len as usize, payload.len());
                    self.inbox.push_back((header, payload));
                    self.bench.queue(RX).offer(head);
                }
                self.bench.kick(RX).unwrap();
            }
        }
    }

    /// The next packet for the guest.
    fn next(&mut self) -> Option<(Header, Vec<u8>)> {
        if self.inbox.is_empty() {
            self.run();
        }
        self.inbox.pop_front()
    }

    fn expect(&mut self, op: Op) -> Header {
        let (header, _) = self.next().unwrap_or_else(|| panic!("no packet, {op:?} expected"));
        assert_eq!(header.op, Some(op), "{header:?}");
        header
    }

    fn expect_nothing(&mut self) {
        assert_eq!(self.next(), None);
    }

    fn raw(&mut self, header: &Header, payload: &[u8]) {
        self.bench.write(TX_BUFFER, &header.bytes());
        self.bench.write(TX_BUFFER + 0x100, payload);
        let head = Desc::readable(TX_BUFFER, HEADER as u32);
        if payload.is_empty() {
            self.bench.queue(TX).table(0, &[head]);
        } else {
            let payload = Desc::readable(TX_BUFFER + 0x100, payload.len() as u32);
            self.bench.queue(TX).table(0, &[head.next(1), payload]);
        }
        self.bench.queue(TX).offer(0);
        self.bench.kick(TX).unwrap();
        assert_eq!(self.bench.queue(TX).used(), [(0, 0)]);
    }

    fn send(&mut self, (host_port, guest_port): (u32, u32), op: Op, flags: u32, payload: &[u8]) {
        self.send_with((host_port, guest_port), op, flags, payload, (WINDOW, 0));
    }

    fn send_with(
        &mut self,
        (host_port, guest_port): (u32, u32),
        op: Op,
        flags: u32,
        payload: &[u8],
        (buf_alloc, fwd_cnt): (u32, u32),
    ) {
        let header = Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: guest_port,
            dst_port: host_port,
            len: payload.len() as u32,
            kind: STREAM,
            op: Some(op),
            flags,
            buf_alloc,
            fwd_cnt,
        };
        self.raw(&header, payload);
    }

    /// An open connection that a client asked for: its stream and its ports.
    fn connected(&mut self) -> (UnixStream, (u32, u32)) {
        self.connected_with((WINDOW, 0))
    }

    fn connected_with(&mut self, credit: (u32, u32)) -> (UnixStream, (u32, u32)) {
        let mut client = self.client("CONNECT 1025\n");
        let request = self.expect(Op::Request);
        assert_eq!(request.dst_port, 1025);
        assert_eq!((request.buf_alloc, request.fwd_cnt), (WINDOW, 0));
        let ports = (request.src_port, 1025);
        self.send_with(ports, Op::Response, 0, &[], credit);
        assert_eq!(line(&mut client), format!("OK {}\n", ports.0));
        (client, ports)
    }

    /// [clients, connections, listening, waiting]
    fn counts(&self) -> [usize; 4] {
        self.bench.device.muxer.counts()
    }
}

/// Reads what is there, to the end of a line.
fn line(client: &mut UnixStream) -> String {
    let mut text = String::new();
    let mut byte = [0];
    while !text.ends_with('\n') {
        client.read_exact(&mut byte).unwrap();
        text.push(byte[0].into());
    }
    text
}

/// What a client can read: all that is there, and whether the end was reached.
fn drain(client: &mut UnixStream) -> (Vec<u8>, bool) {
    let mut bytes = Vec::new();
    match client.read_to_end(&mut bytes) {
        Ok(_) => (bytes, true),
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::WouldBlock);
            (bytes, false)
        }
    }
}

fn is_closed(client: &mut UnixStream) -> bool {
    drain(client) == (Vec::new(), true)
}

/// Bytes that repeat nowhere nearby.
fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .collect()
}
