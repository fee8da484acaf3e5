//! Save, restore and reset.

use super::*;

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
fn nothing_reaches_a_guest_before_it_has_heard() {
    let mut guest = Guest::new();
    for index in 0..4 {
        guest.bench.queue(EVENTS).table(index, &[Desc::writable(0x9000 + 8 * u64::from(index), 4)]);
        guest.bench.queue(EVENTS).offer(index);
    }
    let restore = |guest: &mut Guest| {
        let state = guest.bench.device.save().unwrap();
        let resources = guest.bench.resources();
        guest.bench.device.restore(&state, resources).unwrap();
        guest.run();
    };
    // Restored, saved before it has heard of it, and restored again.
    restore(&mut guest);
    restore(&mut guest);
    assert_eq!(guest.bench.queue(EVENTS).used(), [(0, 4), (1, 4)]);
    let mut client = guest.client("CONNECT 1025\n");
    guest.expect_nothing();
    guest.bench.queue(EVENTS).offer(0);
    guest.bench.kick(EVENTS).unwrap();
    guest.expect_nothing();
    guest.bench.queue(EVENTS).offer(1);
    guest.bench.kick(EVENTS).unwrap();
    let request = guest.expect(Op::Request);
    guest.send((request.src_port, 1025), Op::Response, 0, &[]);
    assert_eq!(line(&mut client), format!("OK {}\n", request.src_port));
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
    assert!(booting.bench.device.announcement.heard());
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
