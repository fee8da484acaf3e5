//! Nonsense, floods and malformed buffers.

use super::*;

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
