//! The socket device.

use super::scratch;
use crate::{
    console, cpu, memory,
    virtio::{Desc, Driver, Kind, Machine, Random, buffer, register},
};

const RX: u32 = 0;
const TX: u32 = 1;
const HEADER: u32 = 44;
const HOST: u64 = 2;
const STREAM: u16 = 1;

const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RESET: u16 = 3;
const DATA: u16 = 5;
const CREDIT_UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;

/// Where the test listens.
const HOST_PORT: u32 = 1024;
/// Bytes of a buffer to receive into.
const RECEIVE: u32 = 4096;

#[derive(Clone, Copy)]
struct Packet {
    src_cid: u64,
    dst_cid: u64,
    src_port: u32,
    dst_port: u32,
    len: u32,
    kind: u16,
    op: u16,
    flags: u32,
    buf_alloc: u32,
    fwd_cnt: u32,
}

impl Packet {
    /// A sound one of this guest's.
    fn new(driver: &Driver, src_port: u32, op: u16) -> Self {
        Self {
            src_cid: u64::from(driver.device.read(register::CONFIG)),
            dst_cid: HOST,
            src_port,
            dst_port: HOST_PORT,
            len: 0,
            kind: STREAM,
            op,
            flags: 0,
            buf_alloc: 0x1_0000,
            fwd_cnt: 0,
        }
    }

    fn put(&self, at: u64) {
        memory::write(at, self.src_cid);
        memory::write(at + 8, self.dst_cid);
        memory::write(at + 16, self.src_port);
        memory::write(at + 20, self.dst_port);
        memory::write(at + 24, self.len);
        memory::write(at + 28, self.kind);
        memory::write(at + 30, self.op);
        memory::write(at + 32, self.flags);
        memory::write(at + 36, self.buf_alloc);
        memory::write(at + 40, self.fwd_cnt);
    }
}

/// What came: port of this guest, operation, bytes of payload.
struct Received {
    port: u32,
    op: u16,
    len: u32,
}

/// Offers every buffer there is to receive into.
fn provide(driver: &mut Driver) {
    let ring = *driver.ring(RX);
    for index in 0..u64::from(ring.size) {
        Desc::writable(scratch() + index * u64::from(RECEIVE), RECEIVE).put(ring.desc, index);
        ring.offer(index as u16);
    }
    driver.device.kick(RX);
}

/// The next packet, if one is there; its buffer is offered again.
fn receive(driver: &mut Driver) -> Option<Received> {
    let ring = driver.ring(RX);
    if ring.used_index() == ring.seen {
        return None;
    }
    let (head, written) = ring.wait();
    let at = scratch() + u64::from(head) * u64::from(RECEIVE);
    let (port, op, len) = (memory::read(at + 20), memory::read(at + 30), memory::read(at + 24));
    assert!(written == 0 || written >= HEADER, "half a header");
    ring.offer(head as u16);
    driver.device.kick(RX);
    Some(Received { port, op, len })
}

/// Sends a packet whose payload lies behind the header; what is received meanwhile goes to `each`.
fn send(driver: &mut Driver, packet: &Packet, payload: u32, mut each: impl FnMut(Received)) {
    packet.put(buffer(0));
    driver.offer(TX, &[Desc::readable(buffer(0), HEADER + payload)]);
    loop {
        while let Some(received) = receive(driver) {
            each(received);
        }
        let ring = driver.ring(TX);
        if ring.used_index() != ring.seen {
            let _ = ring.wait();
            return;
        }
        cpu::relax();
    }
}

/// Waits for a packet with this operation to this port.
fn expect(driver: &mut Driver, port: u32, op: u16) {
    loop {
        if let Some(received) = receive(driver)
            && received.port == port
        {
            assert!(received.op == op, "operation {} instead of {op}", received.op);
            return;
        }
        cpu::relax();
    }
}

/// Speaks of a connection that is not there, and is told so.
pub(super) fn works(driver: &mut Driver) {
    driver.offer(RX, &[Desc::writable(buffer(5), RECEIVE)]);
    let packet = Packet { dst_port: 4242, ..Packet::new(driver, 77_777, CREDIT_REQUEST) };
    packet.put(buffer(0));
    let _ = driver.request(TX, &[Desc::readable(buffer(0), HEADER)]);
    let (_, written) = driver.ring(RX).wait();
    let (port, op): (u32, u16) = (memory::read(buffer(5) + 20), memory::read(buffer(5) + 30));
    assert!((written, port, op) == (HEADER, 77_777, RESET), "{written} bytes, port {port}, operation {op}");
}

/// Packets of which some field, or every one, is nonsense.
pub(super) fn nonsense(machine: &Machine, seed: u64) {
    let mut driver = machine.find(Kind::Vsock).up();
    provide(&mut driver);
    let mut random = Random(seed + 29);
    let mut heard = 0u32;
    for _ in 0..2500 {
        let sound = Packet::new(&driver, 2000 + random.below(4) as u32, 1 + random.below(7) as u16);
        let any = random.any();
        let packet = match random.below(12) {
            0 => Packet { src_cid: [0, 1, HOST, u64::MAX, any][random.below(5) as usize], ..sound },
            1 => Packet { dst_cid: [0, 1, sound.src_cid, u64::MAX, any][random.below(5) as usize], ..sound },
            2 => Packet { kind: any as u16, ..sound },
            3 => Packet { op: any as u16, ..sound },
            4 => Packet { len: any as u32, ..sound },
            5 => Packet { len: u32::MAX, op: DATA, ..sound },
            6 => Packet { flags: any as u32, ..sound },
            7 => Packet { buf_alloc: any as u32, fwd_cnt: (any >> 32) as u32, ..sound },
            8 => Packet { src_port: any as u32, dst_port: (any >> 32) as u32, ..sound },
            9 => Packet { dst_port: u32::MAX, src_port: u32::MAX, ..sound },
            _ => sound,
        };
        let payload = [0, 0, 1, 100, 60_000, packet.len.min(0x10_0000)][random.below(6) as usize];
        send(&mut driver, &packet, payload, |received| heard += u32::from(received.op > 0));
    }
    assert!(heard > 0, "nothing was answered");
    driver.device.reset();
    works(&mut driver.device.up());
}

/// Connections by the thousand, to where nobody listens; answers that are never fetched.
pub(super) fn floods(machine: &Machine, _: u64) {
    let device = machine.find(Kind::Vsock);
    for round in 0..12u32 {
        let mut driver = device.up();
        let ring = *driver.ring(TX);
        for index in 0..u32::from(ring.size) {
            let at = buffer(0) + u64::from(index) * 64;
            let packet =
                Packet::new(&driver, round * 1000 + index, if index % 3 == 2 { DATA } else { REQUEST });
            Packet { dst_port: 9000 + index % 7, ..packet }.put(at);
            Desc::readable(at, HEADER).put(ring.desc, u64::from(index));
            ring.offer(index as u16);
        }
        driver.device.kick(TX);
        // It stops taking them once too many answers wait; so much at least it takes.
        while driver.ring(TX).used_index() < 8 {
            cpu::relax();
        }
    }
    let mut driver = device.up();
    provide(&mut driver);
    for port in 0..1500 {
        let packet = Packet { dst_port: 9000, ..Packet::new(&driver, port, REQUEST) };
        send(&mut driver, &packet, 0, |_| {});
    }
    driver.device.reset();
    works(&mut device.up());
}

/// Connections whose credit is a lie, both ways. The test listens at [`HOST_PORT`]; its clients write a lot and read
/// nothing.
pub(super) fn credit(machine: &Machine, _: u64) {
    let mut driver = machine.find(Kind::Vsock).up();
    provide(&mut driver);
    for (number, (buf_alloc, fwd_cnt)) in
        (0..).zip([(0x1_0000, 0), (u32::MAX, 0), (0, u32::MAX), (1, 0x8000_0000), (u32::MAX, 12_345), (0, 0)])
    {
        let port = 3000 + number;
        let hello = Packet { buf_alloc, fwd_cnt, ..Packet::new(&driver, port, REQUEST) };
        let mut open = false;
        send(&mut driver, &hello, 0, |received| open |= received.port == port && received.op == RESPONSE);
        if !open {
            expect(&mut driver, port, RESPONSE);
        }
        // More than anybody allowed: 4 MiB into a connection that nobody reads from.
        let mut ended = false;
        for _ in 0..64 {
            let data = Packet { op: DATA, len: 0x1_0000, ..hello };
            send(&mut driver, &data, 0x1_0000, |received| {
                ended |= received.port == port && received.op == RESET;
            });
            if ended {
                break;
            }
            let update = Packet { op: CREDIT_UPDATE, fwd_cnt: fwd_cnt.wrapping_mul(3), ..hello };
            send(&mut driver, &update, 0, |received| ended |= received.port == port && received.op == RESET);
        }
        assert!(ended, "a connection took all it was sent");
    }
    driver.device.reset();
    works(&mut driver.device.up());
}

/// An agent that is none: connects to where the daemon waits for it and says what no agent says.
pub(super) fn agent(machine: &Machine, number: u64) {
    const HELLO: &[u8] = br#"{"version":1,"kernel":"6.12","started_us":1}"#;
    let mut driver = machine.find(Kind::Vsock).up();
    provide(&mut driver);
    let port = 5000;
    let hello = Packet::new(&driver, port, REQUEST);
    let mut open = false;
    send(&mut driver, &hello, 0, |received| open |= received.op == RESPONSE);
    if !open {
        expect(&mut driver, port, RESPONSE);
    }
    console::line(format_args!("connected"));
    let mut random = Random(number + 31);
    let say = |driver: &mut Driver, text: &[u8], length: u32| {
        let at = buffer(0) + u64::from(HEADER);
        memory::write(at, length);
        memory::put(at + 4, text);
        let len = text.len() as u32 + 4;
        send(driver, &Packet { op: DATA, len, ..hello }, len, |_| {});
    };
    let frame = |driver: &mut Driver, text: &[u8]| say(driver, text, text.len() as u32);
    match number {
        0 => say(&mut driver, &[0x5a; 4096], u32::MAX),
        1 => frame(&mut driver, &[b'['; 4096]),
        2 => frame(&mut driver, b"{\"version\":4000000000,\"kernel\":7,\"started_us\":-1}"),
        3 => {
            frame(&mut driver, HELLO);
            frame(&mut driver, &[0xff; 100]);
        }
        4 => {
            // Events and answers that nobody asked for, as fast as they are taken.
            frame(&mut driver, HELLO);
            for _ in 0..200_000 {
                frame(&mut driver, br#"{"event":{"event":"oom","container":"0123456789abcdef"}}"#);
                frame(
                    &mut driver,
                    br#"{"answer":{"id":18446744073709551615,"result":{"Ok":{"answer":"done"}}}}"#,
                );
            }
        }
        // A good beginning, and then silence.
        5 => frame(&mut driver, HELLO),
        _ => {
            for _ in 0..1000 {
                let at = buffer(0) + u64::from(HEADER);
                for word in (0..4096).step_by(8) {
                    memory::write(at + word, random.any());
                }
                send(&mut driver, &Packet { op: DATA, len: 4096, ..hello }, 4096, |_| {});
            }
        }
    }
    console::line(format_args!("silent"));
    loop {
        while let Some(received) = receive(&mut driver) {
            let fwd_cnt = received.len;
            send(&mut driver, &Packet { op: CREDIT_UPDATE, fwd_cnt, ..hello }, 0, |_| {});
        }
        cpu::relax();
    }
}
