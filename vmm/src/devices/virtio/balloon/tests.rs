use super::{
    super::{
        hostile,
        testing::{Bench, Desc, MEMORY_SIZE},
    },
    *,
};

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATS: usize = 2;
const REPORTING: usize = 3;

fn active() -> Bench<Balloon> {
    let mut bench = Bench::new(Balloon::new().unwrap());
    let features = bench.offered();
    bench.activate(features);
    bench
}

/// Puts page numbers into the inflate queue.
fn inflate_pages(bench: &mut Bench<Balloon>, pages: &[u32]) {
    let bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
    bench.write(0x10_0000, &bytes);
    bench.queue(INFLATE).table(0, &[Desc::readable(0x10_0000, bytes.len() as u32)]);
    bench.queue(INFLATE).offer(0);
    bench.kick(INFLATE).unwrap();
    assert_eq!(bench.queue(INFLATE).used(), [(0, 0)]);
}

#[test]
fn pages_in_the_balloon_are_given_back() {
    let mut bench = active();
    bench.write(0x20_0000, &[7; 0x4000]);
    inflate_pages(&mut bench, &[0x202, 0x200, 0x202, MEMORY_SIZE as u32 / 4096, u32::MAX]);
    assert_eq!(bench.device.returned(), 0x2000);
    let content = bench.read(0x20_0000, 0x4000);
    assert!(content[..0x1000].iter().all(|byte| *byte == 0) && content[0x2000..0x3000] == [0; 0x1000]);
    assert!(content[0x1000..0x2000] == [7; 0x1000] && content[0x3000..] == [7; 0x1000]);

    bench.queue(DEFLATE).table(0, &[Desc::readable(0x10_0000, 8)]);
    bench.queue(DEFLATE).offer(0);
    bench.kick(DEFLATE).unwrap();
    assert_eq!(bench.queue(DEFLATE).used(), [(0, 0)]);
}

#[test]
fn the_target_is_told_and_the_driver_s_count_is_taken() {
    let mut bench = active();
    bench.device.set_target(512);
    assert!(bench.interrupted());
    bench.device.set_target(512);
    assert!(!bench.interrupted());
    bench.device.write_config(4, &7u32.to_le_bytes());
    let mut space = [0xff; 10];
    bench.device.read_config(0, &mut space);
    assert_eq!(space[..8], [0, 2, 0, 0, 7, 0, 0, 0]);
    // Anything but the field itself is ignored.
    for (offset, data) in [(0, &[9u8; 4][..]), (4, &[9; 2]), (4, &[9; 8]), (6, &[9; 4]), (u64::MAX, &[9; 4])]
    {
        bench.device.write_config(offset, data);
    }
    assert_eq!((bench.device.target(), bench.device.actual()), (512, 7));
    bench.device.reset();
    assert_eq!((bench.device.target(), bench.device.actual()), (512, 0));
}

#[test]
fn reported_ranges_are_given_back_and_returned() {
    let mut bench = active();
    bench.write(0x10_0000, &[7; 0x8000]);
    bench.queue(REPORTING).table(
        0,
        &[
            Desc::writable(0x10_0000, 0x2000).next(1),
            // Not whole pages: only those within.
            Desc::writable(0x10_4800, 0x2000),
        ],
    );
    bench.queue(REPORTING).offer(0);
    bench.kick(REPORTING).unwrap();
    assert_eq!(bench.queue(REPORTING).used(), [(0, 0)]);
    assert!(bench.interrupted());
    assert_eq!(bench.device.returned(), 0x3000);
    let nonzero: Vec<u64> =
        (0..8).filter(|page| bench.read(0x10_0000 + page * 0x1000, 0x1000) != [0; 0x1000]).collect();
    assert_eq!(nonzero, [2, 3, 4, 6, 7]);
}

fn offer_figures(bench: &mut Bench<Balloon>, head: u16, total: u64) {
    let address = 0x10_0000 + u64::from(head) * 64;
    bench.write(address, &[&5u16.to_le_bytes()[..], &total.to_le_bytes()].concat());
    bench.queue(STATS).table(head, &[Desc::readable(address, 10)]);
    bench.queue(STATS).offer(head);
    bench.kick(STATS).unwrap();
}

#[test]
fn figures_are_asked_for_by_returning_their_buffer() {
    let mut bench = active();
    assert_eq!(bench.device.figures().unwrap(), None);
    offer_figures(&mut bench, 3, 100);
    assert_eq!(bench.queue(STATS).used(), []);
    assert_eq!(bench.device.figures().unwrap().unwrap().total, 100);
    assert_eq!(bench.queue(STATS).used(), [(3, 0)]);
    assert_eq!(bench.device.figures().unwrap().unwrap().total, 100);
    assert_eq!(bench.queue(STATS).used(), []);
    // A driver that gives two gets the first back, one that gives nothing useful gets it back at once.
    offer_figures(&mut bench, 1, 200);
    offer_figures(&mut bench, 2, 300);
    assert_eq!(bench.queue(STATS).used(), [(1, 0)]);
    bench.queue(STATS).table(5, &[Desc::writable(0x10_0000, 10)]);
    bench.queue(STATS).offer(5);
    bench.kick(STATS).unwrap();
    assert_eq!(bench.queue(STATS).used(), [(5, 0)]);
    assert_eq!(bench.device.figures().unwrap().unwrap().total, 300);
}

#[test]
fn queues_of_features_that_were_not_accepted_have_no_number() {
    let mut bench = Bench::new(Balloon::new().unwrap());
    bench.activate(VIRTIO_F_VERSION_1 | F_REPORTING);
    bench.write(0x10_0000, &[7; 0x1000]);
    bench.queue(2).table(0, &[Desc::writable(0x10_0000, 0x1000)]);
    bench.queue(2).offer(0);
    bench.kick(2).unwrap();
    assert_eq!(bench.queue(2).used(), [(0, 0)]);
    assert_eq!(bench.device.returned(), 0x1000);
    bench.kick(3).unwrap();
    bench.kick(4).unwrap();
    assert_eq!(roles(VIRTIO_F_VERSION_1).count(), 2);
}

#[test]
fn hostile_drivers_are_survived() {
    for queue in [INFLATE, DEFLATE, REPORTING] {
        hostile::survives_malformed(&mut active(), queue, |bench| {
            let before = bench.device.returned();
            inflate_pages(bench, &[0x280]);
            assert_eq!(bench.device.returned(), before + 0x1000);
        });
    }
    for queue in [INFLATE, DEFLATE, STATS, REPORTING] {
        hostile::notices_corrupt_rings(queue, active);
    }
    // Page numbers in a request may name any page.
    hostile::survives_anything_and_may_clear(active);
}

#[test]
fn saved_and_restored_with_the_figures_buffer() {
    let mut bench = active();
    bench.device.set_target(9);
    bench.device.write_config(4, &5u32.to_le_bytes());
    offer_figures(&mut bench, 3, 100);
    let (state, resources) = (bench.device.save().unwrap(), bench.resources());
    bench.device = Balloon::new().unwrap();
    bench.device.restore(&state, resources).unwrap();
    assert_eq!((bench.device.target(), bench.device.actual()), (9, 5));
    bench.device.source_event(0).unwrap();
    assert_eq!(bench.device.figures().unwrap().unwrap().total, 100);
    assert_eq!(bench.queue(STATS).used(), [(3, 0)]);
    inflate_pages(&mut bench, &[0x280]);

    for end in 0..state.len() {
        assert!(Balloon::new().unwrap().restore(&state[..end], bench.resources()).is_err(), "cut at {end}");
    }
}
