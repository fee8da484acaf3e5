//! Anything in any order.

use proptest::{collection::vec, prelude::*};

use super::*;

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
