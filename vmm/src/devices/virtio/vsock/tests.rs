use std::{
    collections::VecDeque,
    io::{ErrorKind, Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
};

use proptest::{collection::vec, prelude::*};
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

#[test]
fn a_client_connects_to_the_guest() {
    let mut guest = Guest::new();
    let (mut client, ports) = guest.connected();
    assert!(ports.0 >= FIRST_HOST_PORT);
    client.write_all(b"hello").unwrap();
    let (header, payload) = guest.next().unwrap();
    assert_eq!((header.op, header.src_port, header.dst_port), (Some(Op::Data), ports.0, 1025));
    assert_eq!(payload, b"hello");
    guest.send(ports, Op::Data, 0, b"welcome");
    assert_eq!(drain(&mut client), (b"welcome".to_vec(), false));
    assert!(guest.bench.interrupted());
    guest.expect_nothing();
}

#[test]
fn the_guest_connects_to_a_listening_client() {
    let mut guest = Guest::new();
    let mut client = guest.client("LISTEN 1024\n");
    guest.run();
    assert_eq!(guest.counts(), [1, 0, 1, 0]);
    guest.send((1024, 5000), Op::Request, 0, &[]);
    let response = guest.expect(Op::Response);
    assert_eq!((response.src_port, response.dst_port, response.buf_alloc), (1024, 5000, WINDOW));
    assert_eq!(line(&mut client), "OK 5000\n");
    guest.send((1024, 5000), Op::Data, 0, b"ready");
    assert_eq!(drain(&mut client), (b"ready".to_vec(), false));
    client.write_all(b"go").unwrap();
    assert_eq!(guest.next().unwrap().1, b"go");
}

#[test]
fn clients_may_listen_before_the_guest_is_up() {
    let mut guest = Guest::booting();
    let mut listening = guest.client("LISTEN 1024\n");
    let mut connecting = guest.client("CONNECT 1025\n");
    guest.run();
    assert!(is_closed(&mut connecting), "nobody is there to connect to");
    guest.bench.activate(FEATURES);
    guest.provide(0, 16);
    guest.send((1024, 1), Op::Request, 0, &[]);
    guest.expect(Op::Response);
    assert_eq!(line(&mut listening), "OK 1\n");
}

#[test]
fn a_guest_waits_for_a_client_and_proves_that_it_still_does() {
    let mut guest = Guest::new();
    guest.send_with((1024, 7), Op::Request, 0, &[], (100, 0));
    guest.expect_nothing();
    assert_eq!(guest.counts(), [0, 0, 0, 1]);
    let mut client = guest.client("LISTEN 1024\n");
    guest.expect(Op::Response);
    guest.expect(Op::CreditRequest);
    assert_eq!(drain(&mut client), (vec![], false));
    guest.send_with((1024, 7), Op::CreditUpdate, 0, &[], (100, 0));
    assert_eq!(line(&mut client), "OK 7\n");
    client.write_all(b"x").unwrap();
    assert_eq!(guest.next().unwrap().1, b"x");
}

#[test]
fn an_abandoned_request_does_not_use_up_a_client() {
    let mut guest = Guest::new();
    guest.send((1024, 7), Op::Request, 0, &[]);
    guest.send((1024, 8), Op::Request, 0, &[]);
    let mut client = guest.client("LISTEN 1024\n");
    assert_eq!(guest.expect(Op::Response).dst_port, 7);
    guest.expect(Op::CreditRequest);
    // Port 7 has given up long ago.
    guest.send((1024, 7), Op::Reset, 0, &[]);
    assert_eq!(guest.expect(Op::Response).dst_port, 8);
    guest.expect(Op::CreditRequest);
    guest.send((1024, 8), Op::Reset, 0, &[]);
    guest.expect_nothing();
    assert_eq!(guest.counts(), [1, 0, 1, 0]);
    guest.send((1024, 9), Op::Request, 0, &[]);
    guest.expect(Op::Response);
    assert_eq!(line(&mut client), "OK 9\n");
}

#[test]
fn data_counts_as_a_sign_of_life() {
    let mut guest = Guest::new();
    guest.send((1024, 7), Op::Request, 0, &[]);
    let mut client = guest.client("LISTEN 1024\n");
    guest.expect(Op::Response);
    guest.send((1024, 7), Op::Data, 0, b"first words");
    assert_eq!(line(&mut client), "OK 7\n");
    assert_eq!(drain(&mut client).0, b"first words");
}

#[test]
fn a_refused_connection_closes_the_stream() {
    let mut guest = Guest::new();
    let mut client = guest.client("CONNECT 1\n");
    let request = guest.expect(Op::Request);
    guest.send((request.src_port, 1), Op::Reset, 0, &[]);
    assert!(is_closed(&mut client));
    guest.expect_nothing();
    assert_eq!(guest.counts(), [0; 4]);
}

#[test]
fn bad_first_lines_close_the_stream() {
    let mut guest = Guest::new();
    for bad in ["HELLO\n", "CONNECT x\n", "\n", "CONNECT 1025 please let me in, it is cold\n"] {
        let mut client = guest.client(bad);
        guest.run();
        assert!(is_closed(&mut client), "{bad:?}");
    }
    // One that ends before its newline, and one that ends at once.
    let client = guest.client("CONNECT 1");
    guest.run();
    assert_eq!(guest.counts()[0], 1);
    client.shutdown(Shutdown::Write).unwrap();
    drop(guest.client(""));
    guest.run();
    assert_eq!(guest.counts(), [0; 4]);
    guest.expect_nothing();
}

#[test]
fn a_line_may_come_in_pieces() {
    let mut guest = Guest::new();
    let mut client = guest.client("CONN");
    guest.run();
    client.write_all(b"ECT 9\nearly data").unwrap();
    let request = guest.expect(Op::Request);
    guest.send((request.src_port, 9), Op::Response, 0, &[]);
    assert_eq!(guest.next().unwrap().1, b"early data");
}

#[test]
fn a_client_ends_its_half() {
    let mut guest = Guest::new();
    let (mut client, ports) = guest.connected();
    client.write_all(b"last words").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.next().unwrap().1, b"last words");
    assert_eq!(guest.expect(Op::Shutdown).flags, SHUTDOWN_SEND);
    guest.expect_nothing();
    // The other half goes on.
    guest.send(ports, Op::Data, 0, b"answer");
    assert_eq!(drain(&mut client), (b"answer".to_vec(), false));
    guest.send(ports, Op::Data, 0, b"more");
    guest.send(ports, Op::Shutdown, SHUTDOWN_SEND, &[]);
    assert_eq!(drain(&mut client), (b"more".to_vec(), true));
    guest.expect(Op::Reset);
    assert_eq!(guest.counts(), [0; 4]);
}

#[test]
fn the_guest_ends_its_half() {
    let mut guest = Guest::new();
    let (mut client, ports) = guest.connected();
    guest.send(ports, Op::Data, 0, b"that is all");
    guest.send(ports, Op::Shutdown, SHUTDOWN_SEND, &[]);
    assert_eq!(drain(&mut client), (b"that is all".to_vec(), true));
    client.write_all(b"I see").unwrap();
    assert_eq!(guest.next().unwrap().1, b"I see");
    guest.expect_nothing();
    client.shutdown(Shutdown::Write).unwrap();
    guest.expect(Op::Reset);
    assert_eq!(guest.counts(), [0; 4]);
}

#[test]
fn data_behind_the_guests_end_is_an_offence() {
    let mut guest = Guest::new();
    let (mut client, ports) = guest.connected();
    guest.send(ports, Op::Shutdown, SHUTDOWN_SEND, &[]);
    guest.send(ports, Op::Data, 0, b"one more thing");
    guest.expect(Op::Reset);
    assert_eq!(drain(&mut client), (vec![], true));
}

#[test]
fn a_guest_that_reads_no_more_stops_the_client() {
    let mut guest = Guest::new();
    let (mut client, ports) = guest.connected();
    guest.send(ports, Op::Shutdown, SHUTDOWN_RECEIVE, &[]);
    guest.run();
    assert_eq!(client.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    guest.send(ports, Op::Data, 0, b"still here");
    assert_eq!(drain(&mut client), (b"still here".to_vec(), false));
}

#[test]
fn a_guest_that_closes_loses_nothing() {
    let mut guest = Guest::new();
    let (mut client, ports) = guest.connected();
    let bytes = noise(WINDOW as usize, 3);
    // More than the client's socket takes, so that some is buffered when the guest closes.
    for chunk in bytes.chunks(64 * 1024) {
        guest.send(ports, Op::Data, 0, chunk);
    }
    guest.send(ports, Op::Shutdown, BOTH, &[]);
    let reset = loop {
        let (header, _) = guest.next().unwrap();
        if header.op != Some(Op::CreditUpdate) {
            break header;
        }
    };
    assert_eq!(reset.op, Some(Op::Reset));
    assert_eq!(guest.counts(), [1, 0, 0, 0], "what is buffered is kept");
    // The key is free at once, and late packets of the old connection are answered as such.
    guest.send(ports, Op::CreditUpdate, 0, &[]);
    guest.expect(Op::Reset);
    let mut got = Vec::new();
    loop {
        let (some, end) = drain(&mut client);
        got.extend(some);
        if end {
            break;
        }
        guest.run();
    }
    assert!(got == bytes);
    assert_eq!(guest.counts(), [0; 4]);
}

#[test]
fn a_reset_of_the_guests_loses_nothing_either() {
    let mut guest = Guest::new();
    let (mut client, ports) = guest.connected();
    guest.send(ports, Op::Data, 0, b"before");
    guest.send(ports, Op::Reset, 0, &[]);
    assert_eq!(drain(&mut client), (b"before".to_vec(), true));
    guest.expect_nothing();
    assert_eq!(guest.counts(), [0; 4]);
}

#[test]
fn a_client_that_closes_loses_nothing() {
    let mut guest = Guest::new();
    let (mut client, ports) = guest.connected_with((6, 0));
    client.write_all(b"0123456789").unwrap();
    drop(client);
    // As much as the guest has room for; the rest when it has more.
    let mut got = Vec::new();
    let mut ops = Vec::new();
    while let Some((header, payload)) = guest.next() {
        got.extend(payload);
        ops.push(header.op.unwrap());
    }
    assert_eq!(got, b"012345");
    assert!(ops.contains(&Op::Shutdown), "the guest learns that nobody reads: {ops:?}");
    guest.send_with(ports, Op::CreditUpdate, 0, &[], (6, 6));
    assert_eq!(guest.next().unwrap().1, b"6789");
    guest.expect(Op::Reset);
    guest.expect_nothing();
    assert_eq!(guest.counts(), [0; 4]);
}

#[test]
fn a_client_that_closes_without_reading_resets_the_connection() {
    let mut guest = Guest::new();
    let (client, ports) = guest.connected();
    guest.send(ports, Op::Data, 0, b"unread");
    drop(client);
    let mut last = None;
    while let Some((header, _)) = guest.next() {
        last = header.op;
    }
    assert_eq!(last, Some(Op::Reset));
    assert_eq!(guest.counts(), [0; 4]);
}

#[test]
fn a_client_may_vanish_at_any_time() {
    let mut guest = Guest::new();
    // Before it was accepted, while it listens, while the guest is asked.
    drop(guest.client("CONNECT 5\n"));
    guest.expect_nothing();
    let listening = guest.client("LISTEN 6\n");
    guest.run();
    drop(listening);
    guest.run();
    assert_eq!(guest.counts(), [0; 4]);
    guest.send((6, 1), Op::Request, 0, &[]);
    guest.expect_nothing();

    let asking = guest.client("CONNECT 5\n");
    let request = guest.expect(Op::Request);
    drop(asking);
    guest.expect(Op::Reset);
    // The guest's answer comes late.
    guest.send((request.src_port, 5), Op::Response, 0, &[]);
    guest.expect(Op::Reset);
    assert_eq!(guest.counts(), [0, 0, 0, 1]);
}

#[test]
fn listening_clients_that_are_gone_are_passed_over() {
    let mut guest = Guest::new();
    let gone = guest.client("LISTEN 6\n");
    let mut there = guest.client("LISTEN 6\n");
    guest.run();
    drop(gone);
    // Its end has not been noticed when the guest connects.
    guest.send((6, 1), Op::Request, 0, &[]);
    guest.expect(Op::Response);
    assert_eq!(line(&mut there), "OK 1\n");
}

#[test]
fn the_guest_is_never_sent_more_than_it_has_room_for() {
    let mut guest = Guest::new();
    let (mut client, ports) = guest.connected_with((10_000, 0));
    client.write_all(&[7; 20_000]).unwrap();
    let mut received = 0;
    let mut asked = 0;
    while let Some((header, payload)) = guest.next() {
        received += payload.len();
        asked += usize::from(header.op == Some(Op::CreditRequest));
    }
    assert_eq!((received, asked), (10_000, 1));
    // An answer without room is no reason to send or to ask again.
    guest.send_with(ports, Op::CreditUpdate, 0, &[], (10_000, 0));
    guest.expect_nothing();
    // Nonsense is no room either.
    guest.send_with(ports, Op::CreditUpdate, 0, &[], (10_000, u32::MAX));
    guest.expect_nothing();
    guest.send_with(ports, Op::CreditUpdate, 0, &[], (10_000, 4_000));
    assert_eq!(guest.next().unwrap().1.len(), 4_000);
    // Room that shrinks below what is under way.
    guest.send_with(ports, Op::CreditUpdate, 0, &[], (0, 4_000));
    guest.run();
    guest.inbox.retain(|(header, _)| header.op == Some(Op::Data));
    guest.expect_nothing();
}

#[test]
fn a_guest_that_exceeds_its_credit_is_reset() {
    let mut guest = Guest::new();
    let (client, ports) = guest.connected();
    let chunk = vec![1; 64 * 1024];
    let mut sent = 0;
    // The client reads nothing: what its socket takes and one window is all there is room for.
    let reset = loop {
        guest.send(ports, Op::Data, 0, &chunk);
        sent += chunk.len();
        guest.run();
        if guest.inbox.iter().any(|(header, _)| header.op == Some(Op::Reset)) {
            break true;
        }
        if sent > 16 << 20 {
            break false;
        }
    };
    assert!(reset);
    assert_eq!(guest.counts(), [0; 4]);
    drop(client);
}

#[test]
fn credit_returns_as_the_client_reads() {
    let mut guest = Guest::new();
    let (mut client, ports) = guest.connected();
    // Fill the socket and the window, as credit allows.
    let (mut sent, mut forwarded) = (0u32, 0u32);
    let fill = |guest: &mut Guest, sent: &mut u32, forwarded: &mut u32| {
        loop {
            guest.run();
            for (header, _) in std::mem::take(&mut guest.inbox) {
                assert_eq!(header.op, Some(Op::CreditUpdate));
                *forwarded = header.fwd_cnt;
            }
            if WINDOW - (*sent - *forwarded) < 16 * 1024 {
                break;
            }
            guest.send(ports, Op::Data, 0, &[5; 16 * 1024]);
            *sent += 16 * 1024;
        }
    };
    fill(&mut guest, &mut sent, &mut forwarded);
    let stuck = sent;
    let (read, _) = drain(&mut client);
    assert!(!read.is_empty());
    fill(&mut guest, &mut sent, &mut forwarded);
    assert!(sent > stuck, "reading made room");
    // Asked for, credit is told at once.
    guest.send(ports, Op::CreditRequest, 0, &[]);
    assert!(guest.expect(Op::CreditUpdate).fwd_cnt >= forwarded);
}

#[test]
fn many_megabytes_arrive_intact_both_ways() {
    const TOTAL: usize = 8 << 20;
    let mut guest = Guest::new();
    let (mut client, ports) = guest.connected();
    let (up, down) = (noise(TOTAL, 11), noise(TOTAL, 12));
    let mut sizes = noise(4096, 13).into_iter().cycle();
    let (mut written, mut read) = (0, Vec::new());
    let (mut sent, mut acknowledged) = (0usize, 0u32);
    let mut received = Vec::new();
    let mut told = 0usize;
    let mut rounds = 0;
    while read.len() < TOTAL || received.len() < TOTAL {
        rounds += 1;
        assert!(rounds < 1_000_000, "no progress: {} {}", read.len(), received.len());
        // The client writes and reads pieces of any size.
        let size = usize::from(sizes.next().unwrap()) * 701 + 1;
        match client.write(&up[written..(written + size).min(TOTAL)]) {
            Ok(count) => written += count,
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
        let mut piece = vec![0; usize::from(sizes.next().unwrap()) * 997 + 1];
        match client.read(&mut piece) {
            Ok(count) => read.extend_from_slice(&piece[..count]),
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
        // The guest sends within its credit, and gives credit as it reads.
        let credit = WINDOW as usize - (sent as u32).wrapping_sub(acknowledged) as usize;
        let size = (usize::from(sizes.next().unwrap()) * 263).min(credit).min(TOTAL - sent);
        let payload = &down[sent..sent + size];
        let count = received.len() as u32;
        if size > 0 {
            guest.send_with(ports, Op::Data, 0, payload, (WINDOW, count));
            sent += size;
            told = received.len();
        } else if received.len() - told > 64 * 1024 {
            guest.send_with(ports, Op::CreditUpdate, 0, &[], (WINDOW, count));
            told = received.len();
        }
        guest.run();
        for (header, payload) in std::mem::take(&mut guest.inbox) {
            acknowledged = header.fwd_cnt;
            received.extend(payload);
            if header.op == Some(Op::CreditRequest) {
                guest.send_with(ports, Op::CreditUpdate, 0, &[], (WINDOW, received.len() as u32));
                told = received.len();
            }
        }
    }
    assert!(read == down);
    assert!(received == up);
}

#[test]
fn the_guests_counter_wraps() {
    let mut guest = Guest::new();
    // As if 50 bytes were under way: the difference counts, whatever the numbers.
    let (mut client, ports) = guest.connected_with((100, u32::MAX - 49));
    client.write_all(&[1; 200]).unwrap();
    assert_eq!(guest.next().unwrap().1.len(), 50);
    guest.send_with(ports, Op::CreditUpdate, 0, &[], (100, 0));
    guest.run();
    let more: usize = guest.inbox.iter().map(|(_, payload)| payload.len()).sum();
    assert_eq!(more, 50);
}

#[test]
fn connections_take_turns() {
    let mut guest = Guest::with_buffers(4);
    let mut clients: Vec<_> = (0..3).map(|_| guest.connected()).collect();
    for (client, _) in &mut clients {
        client.write_all(&[9; 40_000]).unwrap();
    }
    let mut order = Vec::new();
    while order.len() < 24 {
        let (header, _) = guest.next().unwrap();
        order.push(header.src_port);
    }
    for turn in order.chunks(3) {
        let mut turn = turn.to_vec();
        turn.sort_unstable();
        turn.dedup();
        assert_eq!(turn.len(), 3, "{order:?}");
    }
}

#[test]
fn a_guest_without_buffers_gets_its_packets_later() {
    let mut guest = Guest::with_buffers(1);
    let mut clients: Vec<_> = (0..5).map(|_| guest.connected().0).collect();
    guest.bench.device.reset();
    assert!(clients.iter_mut().all(is_closed));

    // Nothing offered: everything waits.
    let mut guest = Guest::with_buffers(0);
    let _client = guest.client("CONNECT 1025\n");
    guest.expect_nothing();
    guest.provide(0, 1);
    guest.expect(Op::Request);
}

#[test]
fn nonsense_is_answered_with_a_reset_or_not_at_all() {
    let mut guest = Guest::new();
    let stranger = (1024, 99);
    for op in [Op::Response, Op::Shutdown, Op::Data, Op::CreditUpdate, Op::CreditRequest] {
        guest.send(stranger, op, 0, &[]);
        let reset = guest.expect(Op::Reset);
        assert_eq!((reset.src_port, reset.dst_port), (1024, 99), "{op:?}");
    }
    guest.send(stranger, Op::Reset, 0, &[]);
    guest.expect_nothing();

    let sound = Header {
        src_cid: CID,
        dst_cid: HOST_CID,
        src_port: 99,
        dst_port: 1024,
        len: 0,
        kind: STREAM,
        op: Some(Op::Request),
        flags: 0,
        buf_alloc: 0,
        fwd_cnt: 0,
    };
    // Not a byte stream; no operation.
    guest.raw(&Header { kind: 2, ..sound }, &[]);
    guest.expect(Op::Reset);
    guest.raw(&Header { op: None, ..sound }, &[]);
    guest.expect(Op::Reset);
    // Not from this guest, or not to the host.
    guest.raw(&Header { src_cid: 3, ..sound }, &[]);
    guest.raw(&Header { src_cid: CID | 1 << 32, ..sound }, &[]);
    guest.raw(&Header { dst_cid: CID, ..sound }, &[]);
    guest.expect_nothing();
    assert_eq!(guest.counts(), [0; 4]);

    // What an open connection does not expect ends it.
    for op in [Op::Request, Op::Response] {
        let (mut client, ports) = guest.connected();
        guest.send(ports, op, 0, &[]);
        guest.expect(Op::Reset);
        assert!(is_closed(&mut client), "{op:?}");
    }
    // More payload promised than there is.
    let (mut client, (host, port)) = guest.connected();
    guest.raw(&Header { src_port: port, dst_port: host, len: 5000, op: Some(Op::Data), ..sound }, &[1; 100]);
    guest.expect(Op::Reset);
    assert!(is_closed(&mut client));
    // An answer to nobody's question before the guest was asked.
    let mut client = guest.client("CONNECT 1025\n");
    let request = guest.expect(Op::Request);
    guest.send((request.src_port, 1025), Op::Data, 0, b"too early");
    guest.expect(Op::Reset);
    assert!(is_closed(&mut client));
}

#[test]
fn a_guest_that_floods_is_held_up_and_bounded() {
    let mut guest = Guest::with_buffers(0);
    // Requests that nobody listens for: the oldest give way.
    for port in 0..5000u32 {
        let header = Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: port,
            dst_port: 1024,
            len: 0,
            kind: STREAM,
            op: Some(Op::Request),
            flags: 0,
            buf_alloc: 1,
            fwd_cnt: 0,
        };
        guest.bench.write(TX_BUFFER, &header.bytes());
        guest.bench.queue(TX).table(0, &[Desc::readable(TX_BUFFER, HEADER as u32)]);
        if guest.bench.device.stalled {
            break;
        }
        guest.bench.queue(TX).offer(0);
        guest.bench.kick(TX).unwrap();
    }
    assert!(guest.bench.device.stalled, "its packets wait until it takes its RSTs");
    assert_eq!(guest.counts(), [0, 0, 0, MAX_WAITING]);
    let taken = guest.bench.queue(TX).used().len();
    guest.bench.queue(TX).offer(0);
    guest.bench.kick(TX).unwrap();
    assert_eq!(guest.bench.queue(TX).used(), []);
    // It does, and goes on.
    guest.provide(0, 64);
    guest.run();
    assert!(guest.inbox.len() >= taken - MAX_WAITING);
    assert!(guest.inbox.iter().all(|(header, _)| header.op == Some(Op::Reset)));
    assert!(!guest.bench.device.stalled);
    assert_eq!(guest.bench.queue(TX).used().len(), 1);
}

#[test]
fn clients_are_bounded() {
    let mut guest = Guest::new();
    let mut listening: Vec<_> = (0..MAX_LISTENING + 1)
        .map(|_| {
            let client = guest.client("LISTEN 1024\n");
            guest.run();
            client
        })
        .collect();
    assert_eq!(guest.counts(), [MAX_LISTENING, 0, MAX_LISTENING, 0]);
    assert!(is_closed(listening.last_mut().unwrap()));
    let mut silent: Vec<_> = (0..MAX_CLIENTS - MAX_LISTENING + 1)
        .map(|_| {
            let client = guest.client("");
            guest.bench.device.source_event(0).unwrap();
            client
        })
        .collect();
    assert_eq!(guest.counts()[0], MAX_CLIENTS);
    assert!(is_closed(silent.last_mut().unwrap()));
    silent.truncate(10);
    listening.clear();
    for _ in 0..40 {
        guest.run();
    }
    assert_eq!(guest.counts()[0], 10);
    guest.connected();
}

#[test]
fn host_ports_are_not_given_twice() {
    let mut guest = Guest::new();
    guest.bench.device.muxer.set_next_port(u32::MAX - 1);
    let (_first, (port, _)) = guest.connected();
    assert_eq!(port, u32::MAX - 1);
    let (_second, (port, _)) = guest.connected();
    assert_eq!(port, FIRST_HOST_PORT);
    guest.bench.device.muxer.set_next_port(u32::MAX - 1);
    let (_third, (port, _)) = guest.connected();
    assert_eq!(port, FIRST_HOST_PORT + 1);
}

fn active() -> Bench<Vsock> {
    Guest::new().bench
}

#[test]
fn hostile_drivers_are_survived() {
    let mut guest = Guest::new();
    let (mut client, ports) = guest.connected();
    let Guest { bench, .. } = &mut guest;
    let header = Header {
        src_cid: CID,
        dst_cid: HOST_CID,
        src_port: ports.1,
        dst_port: ports.0,
        len: 2,
        kind: STREAM,
        op: Some(Op::Data),
        flags: 0,
        buf_alloc: WINDOW,
        fwd_cnt: 0,
    };
    hostile::survives_malformed(bench, TX, |bench| {
        // Header and payload cut anyhow.
        bench.write(TX_BUFFER, &[&header.bytes()[..], b"ok"].concat());
        let parts = [(0, 3), (3, 41), (44, 1), (45, 1)];
        let table: Vec<Desc> = parts
            .iter()
            .zip(1..)
            .map(|((offset, length), next)| (Desc::readable(TX_BUFFER + offset, *length), next))
            .map(|(desc, next)| if next < 4 { desc.next(next) } else { desc })
            .collect();
        bench.queue(TX).table(0, &table);
        bench.queue(TX).offer(0);
        bench.kick(TX).unwrap();
        assert_eq!(bench.queue(TX).used(), [(0, 0)]);
        assert_eq!(drain(&mut client), (b"ok".to_vec(), false));
    });
    hostile::notices_corrupt_rings(TX, active);
    hostile::survives_anything(|| {
        let mut guest = Guest::with_buffers(8);
        // Connections whose ports the small numbers of a random header may hit.
        let _client = guest.connected();
        guest.bench
    });
}

#[test]
fn useless_receive_buffers_come_back_empty() {
    let mut guest = Guest::with_buffers(0);
    let _client = guest.client("CONNECT 1025\n");
    guest.run();
    let mut tables = hostile::malformed();
    tables.push(("no room for a header", vec![Desc::writable(RX_BUFFERS, 43)], vec![]));
    tables.push(("no room for a payload", vec![Desc::writable(RX_BUFFERS, 44)], vec![]));
    tables.push(("nothing to write to", vec![Desc::readable(RX_BUFFERS, 4096)], vec![]));
    for (name, table, indirect) in tables {
        let queue = guest.bench.queue(RX);
        queue.write_table(0x2_0000, &indirect);
        queue.table(0, &table);
        queue.offer(0);
        guest.bench.kick(RX).unwrap();
        assert_eq!(guest.bench.queue(RX).used(), [(0, 0)], "{name}");
    }
    guest.provide(0, 1);
    guest.expect(Op::Request);
}

#[test]
fn restored_guests_are_told_that_their_connections_are_gone() {
    let mut guest = Guest::new();
    let (mut client, ports) = guest.connected();
    let mut listening = guest.client("LISTEN 1024\n");
    guest.run();
    guest.bench.queue(EVENTS).table(0, &[Desc::writable(0x9000, 2), Desc::writable(0x9000, 4)]);
    // The first is too short for an event.
    guest.bench.queue(EVENTS).offer(0);
    guest.bench.queue(EVENTS).offer(1);
    guest.bench.write(0x9000, &[9; 4]);
    guest.bench.kick(EVENTS).unwrap();
    assert_eq!(guest.bench.queue(EVENTS).used(), [], "there is nothing to tell yet");
    let state = guest.bench.device.save().unwrap();

    let mut fresh = Guest::booting();
    let resources = guest.bench.resources();
    std::mem::swap(&mut guest.bench.device, &mut fresh.bench.device);
    guest.bench.interrupted();
    guest.bench.device.restore(&state, resources).unwrap();
    guest.bench.device.source_event(0).unwrap();
    assert_eq!(guest.bench.queue(EVENTS).used(), [(0, 0), (1, 4)]);
    assert_eq!(guest.bench.read(0x9000, 4), [0; 4]);
    assert!(guest.bench.interrupted());
    // Told once; and what the guest still sends on old connections is refused.
    guest.bench.queue(EVENTS).offer(1);
    guest.bench.kick(EVENTS).unwrap();
    assert_eq!(guest.bench.queue(EVENTS).used(), []);
    guest.send(ports, Op::Data, 0, b"hello?");
    guest.expect(Op::Reset);
    // Ports go on where they were.
    guest.directory = fresh.directory;
    let (_client, (port, _)) = guest.connected();
    assert_eq!(port, ports.0 + 1);

    // The saved device goes on with its own.
    assert_eq!(drain(&mut client), (vec![], false));
    assert_eq!(drain(&mut listening), (vec![], false));
}

#[test]
fn an_event_waits_for_its_buffer_and_an_inactive_state_has_none() {
    let mut guest = Guest::new();
    let state = guest.bench.device.save().unwrap();
    let resources = guest.bench.resources();
    guest.bench.device.restore(&state, resources).unwrap();
    guest.bench.device.source_event(0).unwrap();
    guest.bench.queue(EVENTS).table(0, &[Desc::writable(0x9000, 4)]);
    guest.bench.queue(EVENTS).offer(0);
    guest.bench.kick(EVENTS).unwrap();
    assert_eq!(guest.bench.queue(EVENTS).used(), [(0, 4)]);

    let state = Guest::booting().bench.device.save().unwrap();
    let mut booting = Guest::booting();
    let resources = booting.bench.resources();
    booting.bench.device.restore(&state, resources).unwrap();
    assert!(!booting.bench.device.reset_due);
    assert!(booting.bench.device.active.is_none());
}

#[test]
fn a_reset_keeps_those_who_listen() {
    let mut guest = Guest::new();
    let (mut client, _) = guest.connected();
    let mut listening = guest.client("LISTEN 1024\n");
    let mut offered = guest.client("LISTEN 1025\n");
    guest.run();
    guest.send((1026, 3), Op::Request, 0, &[]);
    guest.send((1025, 4), Op::Request, 0, &[]);
    guest.run();
    assert_eq!(line(&mut offered), "OK 4\n");
    guest.bench.device.reset();
    assert!(is_closed(&mut client));
    assert!(is_closed(&mut offered));
    assert_eq!(drain(&mut listening), (vec![], false));
    assert_eq!(guest.counts(), [1, 0, 1, 0]);
}

#[test]
fn the_context_id_is_told_and_checked() {
    let guest = Guest::new();
    let mut id = [0; 8];
    guest.bench.device.read_config(0, &mut id);
    assert_eq!(u64::from_le_bytes(id), CID);
    let directory = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(directory.path().join("vsock")).unwrap();
    assert!(Vsock::new(2, listener).is_err());
}

/// One thing that a guest or a client does.
#[derive(Debug, Clone)]
enum Act {
    Connect,
    Listen(u32),
    Write(usize, usize),
    Read(usize),
    ShutDown(usize, bool),
    Close(usize),
    /// The guest sends this to one of the ports it has heard of, or to another.
    Packet {
        to: usize,
        op: u16,
        flags: u32,
        payload: usize,
        lie: bool,
        credit: (u32, u32),
    },
    Run,
    Reset,
}

fn act() -> impl Strategy<Value = Act> {
    let index = 0..8usize;
    prop_oneof![
        3 => Just(Act::Connect),
        2 => (1..3u32).prop_map(Act::Listen),
        4 => (index.clone(), 1..9000usize).prop_map(|(client, length)| Act::Write(client, length)),
        3 => index.clone().prop_map(Act::Read),
        2 => (index.clone(), any::<bool>()).prop_map(|(client, read)| Act::ShutDown(client, read)),
        2 => index.clone().prop_map(Act::Close),
        12 => (
            index,
            0..9u16,
            0..5u32,
            prop_oneof![Just(0), 1..50usize, Just(20_000)],
            prop::bool::weighted(0.05),
            (prop_oneof![0..20_000u32, Just(WINDOW), any::<u32>()], prop_oneof![4 => Just(0), 1 => any::<u32>()]),
        )
            .prop_map(|(to, op, flags, payload, lie, credit)| Act::Packet { to, op, flags, payload, lie, credit }),
        6 => Just(Act::Run),
        1 => Just(Act::Reset),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever guest and clients do, in whatever order: nothing panics, nothing leaks, and a connection that
    /// is made afterwards works.
    #[test]
    fn no_order_of_events_breaks_the_table(acts in vec(act(), 1..120)) {
        let mut guest = Guest::new();
        let mut clients = Vec::new();
        let mut ports: Vec<(u32, u32)> = vec![(1, 70), (1, 71), (2, 70), (9, 9)];
        for act in acts {
            match act {
                Act::Connect => clients.push(guest.client("CONNECT 1025\n")),
                Act::Listen(port) => clients.push(guest.client(&format!("LISTEN {port}\n"))),
                Act::Write(client, length) => {
                    if let Some(client) = clients.get_mut(client) {
                        let _ = client.write(&vec![3; length]);
                    }
                }
                Act::Read(client) => {
                    if let Some(client) = clients.get_mut(client) {
                        let _ = client.read(&mut [0; 4096]);
                    }
                }
                Act::ShutDown(client, read) => {
                    if let Some(client) = clients.get(client) {
                        let _ = client.shutdown(if read { Shutdown::Read } else { Shutdown::Write });
                    }
                }
                Act::Close(client) => {
                    if client < clients.len() {
                        drop(clients.swap_remove(client));
                    }
                }
                Act::Packet { to, op, flags, payload, lie, credit } => {
                    let (host_port, guest_port) = ports[ports.len().saturating_sub(1 + to)];
                    let mut bytes = [0; HEADER];
                    bytes[30..32].copy_from_slice(&op.to_le_bytes());
                    let header = Header {
                        src_cid: CID,
                        dst_cid: HOST_CID,
                        src_port: guest_port,
                        dst_port: host_port,
                        len: payload as u32 + u32::from(lie),
                        kind: STREAM,
                        op: Header::parse(&bytes).op,
                        flags,
                        buf_alloc: credit.0,
                        fwd_cnt: credit.1,
                    };
                    guest.raw(&header, &vec![8; payload]);
                }
                Act::Run => guest.run(),
                Act::Reset => {
                    guest.bench.device.reset();
                    guest.bench = restarted(guest.bench);
                    guest.provide(0, 128);
                }
            }
            for (header, _) in std::mem::take(&mut guest.inbox) {
                if header.op == Some(Op::Request) {
                    ports.push((header.src_port, header.dst_port));
                }
            }
            let [all, connections, listening, waiting] = guest.counts();
            prop_assert!(connections + listening <= all && all <= clients.len() + 1 + 120);
            prop_assert!(waiting <= MAX_WAITING);
        }
        // When everybody has left, nothing is left.
        clients.clear();
        guest.run();
        for (host_port, guest_port) in ports {
            guest.send((host_port, guest_port), Op::Reset, 0, &[]);
        }
        guest.run();
        prop_assert_eq!(guest.counts(), [0; 4]);
        guest.inbox.clear();
        let (mut client, ports) = guest.connected();
        client.write_all(b"well").unwrap();
        prop_assert_eq!(guest.next().unwrap().1, b"well".to_vec());
        guest.send(ports, Op::Data, 0, b"and good");
        prop_assert_eq!(drain(&mut client).0, b"and good".to_vec());
    }
}

/// The same device with its driver come up anew.
fn restarted(bench: Bench<Vsock>) -> Bench<Vsock> {
    let mut bench = Bench::new(bench.device);
    bench.activate(FEATURES & !VIRTIO_RING_F_EVENT_IDX);
    bench
}
