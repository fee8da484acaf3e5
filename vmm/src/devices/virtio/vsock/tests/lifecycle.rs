//! How connections begin and end.

use super::*;

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
    guest.expect(Op::Request);
    guest.expect(Op::Reset);
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
