//! The device whose server is another process; here the test is that server, honest or not.

use std::os::fd::OwnedFd;

use bulkhead_vmm_api::share::{AREA_SIZE, Call, Return, SLOTS};
use proptest::{collection::vec, prelude::*, test_runner::TestRunner};
use rustix::{
    io::Errno,
    net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, socketpair},
};

use super::{
    super::{
        super::testing::{Bench, Desc},
        Forward,
    },
    *,
};
use crate::{
    devices::virtio::device::VirtioDevice,
    shares::area::{Area, tests::memory_file},
};

const REQUESTS: usize = 1;
const ROOM: u32 = 64;

/// The server's side.
struct Peer {
    channel: OwnedFd,
    area: Area,
}

fn bench() -> (Bench<Forward>, Peer) {
    let (ours, theirs) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    let area = memory_file(AREA_SIZE);
    let peer = Peer { channel: theirs, area: Area::map(area.try_clone().unwrap()).unwrap() };
    let mut bench = Bench::new(Forward::new("shares").unwrap());
    bench.device.attach(ours, area).unwrap();
    bench.activate(bench.offered());
    (bench, peer)
}

/// Offers a request whose unique number is `100 + index`.
fn offer(bench: &mut Bench<Forward>, index: u16) {
    let (at, room) = (0x1_0000 + u64::from(index) * 64, reply_at(index));
    let header = wire::InHeader {
        len: 40,
        opcode: opcode::GETATTR,
        unique: 100 + u64::from(index),
        ..Default::default()
    };
    bench.write(at, &encode(&header));
    bench
        .queue(REQUESTS)
        .table(index * 2, &[Desc::readable(at, 40).next(index * 2 + 1), Desc::writable(room, ROOM)]);
    bench.queue(REQUESTS).offer(index * 2);
    bench.kick(REQUESTS).unwrap();
}

fn reply_at(index: u16) -> u64 {
    0x2_0000 + u64::from(index) * u64::from(ROOM)
}

/// The answer of a request: its error.
fn answer(bench: &Bench<Forward>, index: u16) -> i32 {
    let header: wire::OutHeader = decode(&bench.read(reply_at(index), 16));
    assert_eq!(header.unique, 100 + u64::from(index));
    header.error
}

impl Peer {
    fn call(&self) -> Option<Call> {
        let mut datagram = [0; 64];
        match rustix::net::recv(&self.channel, &mut datagram[..], RecvFlags::DONTWAIT) {
            Ok((length, _)) => Some(Call::decode(&datagram[..length]).unwrap()),
            Err(Errno::AGAIN) => None,
            Err(errno) => panic!("{errno}"),
        }
    }

    fn say(&self, bench: &mut Bench<Forward>, back: Return) {
        rustix::net::send(&self.channel, &back.encode(), SendFlags::empty()).unwrap();
        bench.device.source_event(0).unwrap();
    }
}

#[test]
fn a_request_goes_to_the_server_and_its_reply_to_the_guest() {
    let (mut bench, peer) = bench();
    offer(&mut bench, 0);
    let call = peer.call().unwrap();
    assert_eq!((call.request, call.room), (40, ROOM));
    let slot = peer.area.slot(call.slot).unwrap();
    let mut header = [0; 40];
    assert!(slot.read(0, &mut header));
    assert_eq!(decode::<wire::InHeader>(&header).unique, 100);
    assert!(
        slot.write(0, &[&encode(&wire::OutHeader { len: 20, error: 0, unique: 100 })[..], b"data"].concat())
    );
    peer.say(&mut bench, Return::Done { slot: call.slot, reply: 20 });
    assert_eq!(bench.queue(REQUESTS).used(), [(0, 20)]);
    assert_eq!((answer(&bench, 0), bench.read(reply_at(0) + 16, 4)), (0, b"data".to_vec()));
    assert!(bench.interrupted());
    assert!(bench.device.save().is_err(), "what the server knows of it is not saved");
}

#[test]
fn those_that_wait_for_locks_keep_nobody_from_a_slot() {
    let (mut bench, peer) = bench();
    let count = u16::try_from(SLOTS).unwrap();
    let mut tickets = Vec::new();
    for index in 0..count {
        offer(&mut bench, index);
        let call = peer.call().unwrap();
        tickets.push(call.ticket);
        peer.say(&mut bench, Return::PutOff { slot: call.slot });
    }
    assert_eq!(bench.queue(REQUESTS).used(), []);
    // All slots are taken by others, and more wait in the queue.
    for index in count..2 * count + 1 {
        offer(&mut bench, index);
    }
    let calls: Vec<Call> = std::iter::from_fn(|| peer.call()).collect();
    assert_eq!(calls.len(), usize::from(count));
    assert!(calls.iter().all(|call| !tickets.contains(&call.ticket)));
    // In any order, with and without an error, and once.
    for (index, error) in [(3, 0), (0, Errno::BADF.raw_os_error().cast_unsigned()), (3, 5)] {
        peer.say(&mut bench, Return::Settled { ticket: tickets[index], error });
    }
    assert_eq!(bench.queue(REQUESTS).used(), [(6, 16), (0, 16)]);
    assert_eq!((answer(&bench, 3), answer(&bench, 0)), (0, -Errno::BADF.raw_os_error()));
    peer.say(&mut bench, Return::Done { slot: calls[0].slot, reply: 0 });
    assert!(peer.call().is_some(), "who waited in the queue has the slot");
}

#[test]
fn a_reset_forgets_and_what_comes_back_is_for_nobody() {
    let (mut bench, peer) = bench();
    offer(&mut bench, 0);
    let put_off = peer.call().unwrap();
    peer.say(&mut bench, Return::PutOff { slot: put_off.slot });
    offer(&mut bench, 1);
    let away = peer.call().unwrap();
    bench.device.reset();
    peer.say(&mut bench, Return::Settled { ticket: put_off.ticket, error: 0 });
    peer.say(&mut bench, Return::PutOff { slot: away.slot });
    let features = bench.offered();
    bench.start_again(features);
    peer.say(&mut bench, Return::Settled { ticket: away.ticket, error: 0 });
    assert_eq!(bench.queue(REQUESTS).used(), []);
    for index in 0..u16::try_from(SLOTS).unwrap() {
        offer(&mut bench, index);
        assert!(peer.call().is_some(), "no slot is lost");
    }
}

#[test]
fn without_its_server_everything_is_answered() {
    let (mut bench, peer) = bench();
    offer(&mut bench, 0);
    let call = peer.call().unwrap();
    peer.say(&mut bench, Return::PutOff { slot: call.slot });
    offer(&mut bench, 1);
    drop(peer);
    bench.device.source_event(0).unwrap();
    offer(&mut bench, 2);
    assert_eq!(bench.queue(REQUESTS).used().len(), 3);
    let gone = -Errno::NOTCONN.raw_os_error();
    assert_eq!([0, 1, 2].map(|index| answer(&bench, index)), [gone; 3]);
}

/// Whatever a server says, that its guest may own by now: nothing is written beyond a request's room.
#[test]
fn a_hostile_server_reaches_nothing_of_its_vmm() {
    let numbers = prop_oneof![0..20u32, Just(u32::MAX), any::<u32>()];
    let returns = (0..4u32, numbers.clone(), numbers)
        .prop_map(|(kind, first, second)| [kind, first, second].map(u32::to_le_bytes).concat());
    let mut runner = TestRunner::deterministic();
    runner
        .run(&vec((returns, any::<bool>()), 1..60), |said| {
            let (mut bench, peer) = bench();
            let mut offered = 0;
            for (datagram, more) in said {
                if more && offered < 60 {
                    offer(&mut bench, offered);
                    offered += 1;
                }
                rustix::net::send(&peer.channel, &datagram, SendFlags::empty()).unwrap();
                bench.device.source_event(0).unwrap();
                while peer.call().is_some() {}
            }
            for (head, written) in bench.queue(REQUESTS).used() {
                prop_assert!(written <= ROOM && head < offered * 2);
            }
            Ok(())
        })
        .unwrap();
}
