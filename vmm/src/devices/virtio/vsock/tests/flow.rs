//! Credit, order, and whole megabytes.

use super::*;

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
