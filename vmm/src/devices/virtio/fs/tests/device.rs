//! The device on queues in guest memory, with honest and hostile chains.

use proptest::{collection::vec, prelude::*, test_runner::TestRunner};
use virtio_queue::QueueT;

use super::{
    super::{
        super::{
            hostile as chains,
            testing::{Bench, Desc},
        },
        Fs,
    },
    *,
};
use crate::devices::virtio::device::{DeviceType, VirtioDevice};

const IN: u64 = 0x1_0000;
const OUT: u64 = 0x2_0000;
const DATA: u64 = 0x10_0000;
const REQUESTS: usize = 1;

fn bench() -> (Bench<Fs>, Layers) {
    let layers = Layers::new();
    (bench_over(&layers), layers)
}

fn bench_over(layers: &Layers) -> Bench<Fs> {
    let mut bench = Bench::new(Fs::new("layers").unwrap());
    bench.device.attach_share("layer", layers.root(), ShareKind::Layer).unwrap();
    bench.activate(bench.offered());
    bench
}

fn request(opcode: u32, nodeid: u64, body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(wire::InHeader::SIZE + body.len()).unwrap();
    let header = wire::InHeader { len, opcode, unique: 77, nodeid, ..Default::default() };
    [encode(&header), body.to_vec()].concat()
}

/// Sends a request with 1 MiB of room for data, header and data apart, as Linux does.
fn send(bench: &mut Bench<Fs>, opcode: u32, nodeid: u64, body: &[u8]) -> Result<Vec<u8>, i32> {
    let bytes = request(opcode, nodeid, body);
    bench.write(IN, &bytes);
    let length = u32::try_from(bytes.len()).unwrap();
    // Header and body in two buffers; the data's room in three, one of them odd.
    bench.queue(REQUESTS).table(
        0,
        &[
            Desc::readable(IN, 40).next(1),
            Desc::readable(IN + 40, length - 40).next(2),
            Desc::writable(OUT, 16).next(3),
            Desc::writable(DATA, 4096).next(4),
            Desc::writable(DATA + 4096, 1001).next(5),
            Desc::writable(DATA + 4096 + 1001, (1 << 20) - 4096 - 1001),
        ],
    );
    bench.queue(REQUESTS).offer(0);
    bench.kick(REQUESTS).unwrap();
    let used = bench.queue(REQUESTS).used();
    let header: wire::OutHeader = decode(&bench.read(OUT, 16));
    assert_eq!(used, [(0, header.len)]);
    assert_eq!(header.unique, 77);
    if header.error != 0 {
        assert_eq!(header.len, 16);
        return Err(header.error);
    }
    Ok(bench.read(DATA, header.len as usize - 16))
}

fn look_up(bench: &mut Bench<Fs>, path: &str) -> u64 {
    path.split('/').fold(wire::ROOT_ID, |node, name| {
        let entry = send(bench, opcode::LOOKUP, node, &[name.as_bytes(), &[0]].concat()).unwrap();
        decode::<wire::EntryOut>(&entry).nodeid
    })
}

#[test]
fn config_space_names_the_tag() {
    let (bench, _layers) = bench();
    assert_eq!(bench.device.device_type(), DeviceType::Fs);
    let mut config = [0xff; 48];
    bench.device.read_config(0, &mut config);
    assert_eq!(&config[..7], b"layers\0");
    assert_eq!(config[36..40], [1, 0, 0, 0]);
    for offset in [36, 39, 40, u64::MAX] {
        let mut byte = [9];
        bench.device.read_config(offset, &mut byte);
        assert_eq!(
            byte[0],
            if offset == 36 {
                1
            } else if offset == 39 {
                0
            } else {
                9
            }
        );
    }
    for tag in ["", "a\0b", &"t".repeat(37)] {
        assert!(Fs::new(tag).is_err());
    }
    assert_eq!(Fs::new(&"t".repeat(36)).unwrap().tag().len(), 36);
}

#[test]
fn files_are_read_into_scattered_buffers() {
    let (mut bench, _layers) = bench();
    send(&mut bench, opcode::INIT, 0, &init(u32::MAX)).unwrap();
    let node = look_up(&mut bench, "layer/large");
    let data = send(&mut bench, opcode::READ, node, &read_in(0, 1 << 20)).unwrap();
    let expected: Vec<u8> = (0..200_000_u32).flat_map(u32::to_le_bytes).collect();
    assert!(data == expected);
    let data = send(&mut bench, opcode::READ, node, &read_in(4000, 8000)).unwrap();
    assert!(data == expected[4000..12_000]);
    assert!(bench.interrupted());
}

#[test]
fn forgets_on_the_priority_queue_are_completed_with_nothing() {
    let (mut bench, _layers) = bench();
    let node = look_up(&mut bench, "layer/large");
    let bytes = request(opcode::FORGET, node, &encode(&wire::ForgetIn { nlookup: 1 }));
    bench.write(IN, &bytes);
    bench.queue(0).table(0, &[Desc::readable(IN, 48)]);
    bench.queue(0).offer(0);
    bench.kick(0).unwrap();
    assert_eq!(bench.queue(0).used(), [(0, 0)]);
    assert_eq!(send(&mut bench, opcode::READ, node, &read_in(0, 1)), Err(-Errno::STALE.raw_os_error()));
}

#[test]
fn malformed_chains_are_dropped_and_the_queue_goes_on() {
    let (mut bench, _layers) = bench();
    let bytes = request(opcode::LOOKUP, wire::ROOT_ID, b"layer\0");
    let chains: [&[Desc]; 9] = [
        // No request at all, too short a one, one that is all writable.
        &[Desc::readable(IN, 0)],
        &[Desc::readable(IN, 39).next(1), Desc::writable(OUT, 200)],
        &[Desc::writable(OUT, 200)],
        // No room for the reply's header.
        &[Desc::readable(IN, 46).next(1), Desc::writable(OUT, 15)],
        &[Desc::readable(IN, 46)],
        // Outside memory, endless, upside down.
        &[Desc::readable(1 << 40, 46).next(1), Desc::writable(OUT, 200)],
        &[Desc::readable(IN, 46).next(1), Desc::writable(u64::MAX - 10, 200)],
        &[Desc::readable(IN, 46).next(0)],
        &[Desc::writable(OUT, 200).next(1), Desc::readable(IN, 46)],
    ];
    for chain in chains {
        bench.write(IN, &bytes);
        bench.write(OUT, &[0xee; 32]);
        bench.queue(REQUESTS).table(0, chain);
        bench.queue(REQUESTS).offer(0);
        bench.kick(REQUESTS).unwrap();
        assert_eq!(bench.queue(REQUESTS).used(), [(0, 0)], "{chain:?}");
        assert_eq!(bench.read(OUT, 32), [0xee; 32]);
    }
    look_up(&mut bench, "layer/dir/file");
}

#[test]
fn lengths_that_lie_are_refused() {
    let (mut bench, _layers) = bench();
    for len in [0, 39, 47, u32::MAX] {
        let mut bytes = request(opcode::LOOKUP, wire::ROOT_ID, b"layer\0");
        bytes[..4].copy_from_slice(&u32::to_le_bytes(len));
        bench.write(IN, &bytes);
        bench.queue(REQUESTS).table(0, &[Desc::readable(IN, 46).next(1), Desc::writable(OUT, 200)]);
        bench.queue(REQUESTS).offer(0);
        bench.kick(REQUESTS).unwrap();
        assert_eq!(bench.queue(REQUESTS).used(), [(0, 16)]);
        let header: wire::OutHeader = decode(&bench.read(OUT, 16));
        assert_eq!(header.error, -Errno::INVAL.raw_os_error());
    }
}

#[test]
fn what_breaks_any_queue_is_survived() {
    for queue in [0, REQUESTS] {
        let (mut bench, _layers) = bench();
        chains::survives_malformed(&mut bench, queue, |bench| {
            look_up(bench, "layer/dir/file");
        });
    }
    let layers = std::cell::RefCell::new(Vec::new());
    chains::notices_corrupt_rings(0, || {
        let (bench, layer) = self::bench();
        layers.borrow_mut().push(layer);
        bench
    });
}

#[test]
fn an_impossible_available_index_breaks_the_queue() {
    let (mut bench, _layers) = bench();
    bench.queue(REQUESTS).set_avail_idx(5000);
    assert!(bench.kick(REQUESTS).is_err());
}

#[test]
fn queues_that_are_not_set_up_are_left_alone() {
    let (mut bench, _layers) = bench();
    bench.kick(7).unwrap();
    bench.device.reset();
    bench.queue(REQUESTS).offer(0);
    bench.kick(REQUESTS).unwrap();
    assert_eq!(bench.queue(REQUESTS).used(), []);
}

#[test]
fn a_reset_forgets_nodes_and_keeps_shares() {
    let (mut bench, layers) = bench();
    let node = look_up(&mut bench, "layer/large");
    bench.device.reset();
    let mut bench = Bench::new(bench.device);
    bench.activate(bench.offered());
    assert_eq!(send(&mut bench, opcode::READ, node, &read_in(0, 1)), Err(-Errno::STALE.raw_os_error()));
    look_up(&mut bench, "layer/large");
    drop(layers);
}

#[test]
fn a_saved_device_goes_on_where_it_was() {
    let (mut bench, layers) = bench();
    let node = look_up(&mut bench, "layer/dir/file");
    let saved = bench.device.save().unwrap();
    // The same guest memory, a new device; its share comes after the restore.
    let mut device = Fs::new("layers").unwrap();
    device.restore(&saved, bench.resources()).unwrap();
    device.attach_share("layer", layers.root(), ShareKind::Layer).unwrap();
    bench.device = device;
    assert_eq!(send(&mut bench, opcode::READ, node, &read_in(2, 3)).unwrap(), b"234");
    // And with the share attached before.
    let mut device = Fs::new("layers").unwrap();
    device.attach_share("layer", layers.root(), ShareKind::Layer).unwrap();
    device.restore(&bench.device.save().unwrap(), bench.resources()).unwrap();
    bench.device = device;
    assert_eq!(send(&mut bench, opcode::READ, node, &read_in(2, 3)).unwrap(), b"234");

    let mut inactive = Fs::new("layers").unwrap();
    inactive.restore(&Fs::new("layers").unwrap().save().unwrap(), bench.resources()).unwrap();
    inactive.queue_event(REQUESTS).unwrap();
    assert!(inactive.restore(&saved[..saved.len() - 1], bench.resources()).is_err());
}

#[test]
fn the_request_queue_holds_the_largest_read() {
    let (bench, _layers) = bench();
    let sizes = bench.device.queue_max_sizes();
    assert!(sizes.iter().all(|size| size.is_power_of_two()));
    // 256 pages, two headers, the request's body and one more.
    assert!(sizes[REQUESTS] >= 256 + 4);
    assert!(bench.drivers_are_ready());
}

/// Random bytes as requests in random chains: the queue survives.
#[test]
fn random_chains_are_survived() {
    let layers = Layers::new();
    let parts = vec((any::<bool>(), 0..4_u64, 0..9000_u32), 1..6);
    let run = |(mut bytes, opcode, parts): (Vec<u8>, u8, Vec<(bool, u64, u32)>)| {
        let mut bench = bench_over(&layers);
        look_up(&mut bench, "layer/dir/file");
        if bytes.len() > 24 {
            bytes[4..8].copy_from_slice(&[opcode, 0, 0, 0]);
            let len = u32::try_from(bytes.len()).unwrap();
            bytes[..4].copy_from_slice(&len.to_le_bytes());
            let node = u64::from(bytes[16] % 6);
            bytes[16..24].copy_from_slice(&node.to_le_bytes());
        }
        bench.write(IN, &bytes);
        let length = u32::try_from(bytes.len()).unwrap();
        let mut table = vec![Desc::readable(IN, length).next(1)];
        for (index, (writable, place, size)) in (1_u16..).zip(&parts) {
            let address = IN + place * 0x8000;
            let desc =
                if *writable { Desc::writable(address, *size) } else { Desc::readable(address, *size) };
            table.push(if usize::from(index) < parts.len() { desc.next(index + 1) } else { desc });
        }
        bench.queue(REQUESTS).table(0, &table);
        bench.queue(REQUESTS).offer(0);
        bench.kick(REQUESTS).unwrap();
        prop_assert_eq!(bench.queue(REQUESTS).used().len(), 1);
        look_up(&mut bench, "layer/dir/file");
        Ok(())
    };
    TestRunner::default().run(&(vec(any::<u8>(), 0..300), 0..60_u8, parts), run).unwrap();
}

impl Bench<Fs> {
    fn drivers_are_ready(&self) -> bool {
        self.device.active.as_ref().is_some_and(|active| active.queues.iter().all(QueueT::ready))
    }
}
