use std::{io::Write, os::unix::fs::FileExt};

use proptest::{collection::vec, prelude::*};

use super::{
    super::{
        hostile,
        testing::{Bench, Desc},
    },
    *,
};

const SECTORS: u64 = 2048;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

/// Where a request's parts lie.
const HEADER: u64 = 0x10_0000;
const DATA: u64 = 0x11_0000;
const STATUS: u64 = 0x10_1000;

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|index| (index / 512 * 7 + index) as u8).collect()
}

fn medium() -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&pattern((SECTORS * SECTOR) as usize)).unwrap();
    file
}

fn active_with(features: u64) -> Bench<Block> {
    let mut bench = Bench::new(Block::new("disk0").unwrap());
    bench.device.attach(medium(), false).unwrap();
    bench.activate(features);
    bench
}

fn active() -> Bench<Block> {
    active_with(FEATURES)
}

fn header(bench: &Bench<Block>, kind: u32, sector: u64) -> Desc {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    bench.write(HEADER, &bytes);
    bench.write(STATUS, &[0xff]);
    Desc::readable(HEADER, 16)
}

fn run(bench: &mut Bench<Block>, table: &[Desc]) -> (u8, u32) {
    bench.queue(0).table(0, table);
    bench.queue(0).offer(0);
    bench.kick(0).unwrap();
    let used = bench.queue(0).used();
    assert_eq!(used.len(), 1);
    (bench.read(STATUS, 1)[0], used[0].1)
}

fn read(bench: &mut Bench<Block>, sector: u64, length: u32) -> (u8, u32) {
    let header = header(bench, 0, sector).next(1);
    run(bench, &[header, Desc::writable(DATA, length).next(2), Desc::writable(STATUS, 1)])
}

fn write(bench: &mut Bench<Block>, sector: u64, length: u32) -> (u8, u32) {
    let header = header(bench, 1, sector).next(1);
    run(bench, &[header, Desc::readable(DATA, length).next(2), Desc::writable(STATUS, 1)])
}

fn bare(bench: &mut Bench<Block>, kind: u32) -> (u8, u32) {
    let header = header(bench, kind, 0).next(1);
    run(bench, &[header, Desc::writable(STATUS, 1)])
}

/// A DISCARD (11) or WRITE_ZEROES (13) of (sector, sectors, flags).
fn ranges(bench: &mut Bench<Block>, kind: u32, segments: &[(u64, u32, u32)]) -> (u8, u32) {
    let bytes: Vec<u8> = segments
        .iter()
        .flat_map(|(sector, sectors, flags)| {
            [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
        })
        .collect();
    bench.write(DATA, &bytes);
    let header = header(bench, kind, 0).next(1);
    run(bench, &[header, Desc::readable(DATA, bytes.len() as u32).next(2), Desc::writable(STATUS, 1)])
}

fn content(bench: &Bench<Block>) -> Vec<u8> {
    let mut bytes = vec![0; (SECTORS * SECTOR) as usize];
    bench.device.medium.as_ref().unwrap().file().read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn works(bench: &mut Bench<Block>) {
    assert_eq!(read(bench, 3, 1024), (0, 1025));
    assert_eq!(bench.read(DATA, 1024), pattern(0x1000)[3 * 512..5 * 512]);
}

fn capacity(bench: &Bench<Block>) -> u64 {
    let mut bytes = [0; 8];
    bench.device.read_config(0, &mut bytes);
    u64::from_le_bytes(bytes)
}

#[test]
fn reads_and_writes() {
    let mut bench = active();
    works(&mut bench);
    assert!(bench.interrupted());
    bench.write(DATA, &[0x5a; 1536]);
    assert_eq!(write(&mut bench, SECTORS - 3, 1536), (0, 1));
    let mut expected = pattern((SECTORS * SECTOR) as usize);
    expected[(SECTORS as usize - 3) * 512..].fill(0x5a);
    assert!(content(&bench) == expected);
    assert_eq!(bare(&mut bench, 4), (0, 1));
}

#[test]
fn how_a_request_is_cut_into_buffers_does_not_matter() {
    let mut bench = active();
    header(&bench, 0, 9);
    let parts: Vec<Desc> = (0..16).map(|byte| Desc::readable(HEADER + byte, 1)).collect();
    let mut table: Vec<Desc> = parts;
    // 511 bytes, none, then one together with the status.
    table.push(Desc::writable(DATA, 511));
    table.push(Desc::writable(DATA, 0));
    table.push(Desc::writable(DATA + 511, 2));
    let length = table.len();
    let table: Vec<Desc> = table
        .into_iter()
        .zip(1u16..)
        .map(|(desc, next)| if usize::from(next) < length { desc.next(next) } else { desc })
        .collect();
    bench.write(STATUS, &[0xff]);
    bench.queue(0).write_table(0x2_0000, &table);
    bench.queue(0).table(0, &[Desc::indirect(0x2_0000, 16 * length as u32)]);
    bench.queue(0).offer(0);
    bench.kick(0).unwrap();
    assert_eq!(bench.queue(0).used(), [(0, 513)]);
    assert_eq!(bench.read(DATA, 512), pattern(0x2000)[9 * 512..10 * 512]);
    assert_eq!(bench.read(DATA + 512, 1), [0]);
}

#[test]
fn what_leaves_the_medium_is_an_error() {
    let mut bench = active();
    for (sector, length) in [
        (SECTORS, 512),
        (SECTORS - 1, 1024),
        (u64::MAX, 512),
        (u64::MAX / 512, 512),
        (u64::MAX - 1, 1024),
        (0, 513),
        (0, 1),
    ] {
        assert_eq!(read(&mut bench, sector, length), (IOERR, 0), "read {sector} {length}");
        assert_eq!(write(&mut bench, sector, length), (IOERR, 1), "write {sector} {length}");
    }
    assert!(content(&bench) == pattern((SECTORS * SECTOR) as usize));
    assert_eq!(bench.device.medium.as_ref().unwrap().file().metadata().unwrap().len(), SECTORS * SECTOR);
}

#[test]
fn a_request_beyond_the_limits_is_refused() {
    let mut bench = Bench::new(Block::new("disk0").unwrap());
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 30).unwrap();
    bench.device.attach(file, false).unwrap();
    bench.activate(FEATURES);
    // The same 2 MiB again and again: there are that many bytes on the disk, and more than fit memory.
    let mut parts = vec![header(&bench, 0, 0)];
    parts.extend([Desc::writable(0x10_2000, 0x1f_0000); 40]);
    parts.push(Desc::writable(STATUS, 1));
    let length = parts.len();
    let chain = |parts: &[Desc]| -> Vec<Desc> {
        let last = parts.len() - 1;
        parts
            .iter()
            .enumerate()
            .map(|(at, desc)| if at < last { desc.next(at as u16 + 1) } else { *desc })
            .collect()
    };
    assert_eq!(run(&mut bench, &chain(&parts)), (IOERR, 0));
    parts.drain(length - 11..length - 1);
    assert_eq!(run(&mut bench, &chain(&parts)), (0, 30 * 0x1f_0000 + 1));
}

#[test]
fn a_file_that_shrinks_is_an_error_and_one_that_grows_is_not_seen() {
    let mut bench = active();
    let file = bench.device.medium.as_ref().unwrap().file().try_clone().unwrap();
    file.set_len(SECTORS * SECTOR * 2).unwrap();
    assert_eq!(read(&mut bench, SECTORS, 512), (IOERR, 0));
    file.set_len(512).unwrap();
    assert_eq!(read(&mut bench, 0, 512), (0, 513));
    assert_eq!(read(&mut bench, 1, 512), (IOERR, 0));
}

#[test]
fn requests_without_header_or_status_are_survived() {
    let mut bench = active();
    assert_eq!(run(&mut bench, &[Desc::readable(HEADER, 15).next(1), Desc::writable(STATUS, 1)]), (IOERR, 1));
    let table = [header(&bench, 4, 0)];
    assert_eq!(run(&mut bench, &table), (0xff, 0));
    assert_eq!(run(&mut bench, &[Desc::writable(STATUS, 1)]), (IOERR, 1));
    assert_eq!(bare(&mut bench, 0), (0, 1), "nothing to read is read");
    for unknown in [2, 3, 5, 7, 9, 10, 12, 14, 0x100, u32::MAX] {
        assert_eq!(bare(&mut bench, unknown), (UNSUPP, 1), "type {unknown}");
    }
    works(&mut bench);
}

#[test]
fn the_wrong_direction_is_an_error() {
    let mut bench = active();
    // A read into what the device may only read, and a write from what it may only write.
    let table = [header(&bench, 0, 0).next(1), Desc::readable(DATA, 512).next(2), Desc::writable(STATUS, 1)];
    bench.write(DATA, &[9; 512]);
    run(&mut bench, &table);
    assert_eq!(bench.read(DATA, 512), [9; 512]);
    let table = [header(&bench, 1, 0).next(1), Desc::writable(DATA, 512).next(2), Desc::writable(STATUS, 1)];
    run(&mut bench, &table);
    assert!(content(&bench) == pattern((SECTORS * SECTOR) as usize));
}

#[test]
fn the_id_is_told() {
    let mut bench = active();
    bench.write(DATA, &[9; 24]);
    let table = [header(&bench, 8, 0).next(1), Desc::writable(DATA, 20).next(2), Desc::writable(STATUS, 1)];
    assert_eq!(run(&mut bench, &table), (0, 21));
    assert_eq!(bench.read(DATA, 24), b"disk0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x09\x09\x09\x09");
    let table = [header(&bench, 8, 0).next(1), Desc::writable(DATA, 3).next(2), Desc::writable(STATUS, 1)];
    assert_eq!(run(&mut bench, &table), (0, 4));
    assert!(Block::new("this id is longer than it may be").is_err());
}

#[test]
fn discard_gives_space_back() {
    let mut bench = active();
    let blocks = |bench: &Bench<Block>| {
        use std::os::unix::fs::MetadataExt;
        bench.device.medium.as_ref().unwrap().file().metadata().unwrap().blocks()
    };
    let before = blocks(&bench);
    assert_eq!(ranges(&mut bench, 11, &[(0, 1024, 0), (1536, 512, 0)]), (0, 1));
    assert!(blocks(&bench) < before);
    let mut expected = pattern((SECTORS * SECTOR) as usize);
    expected[..1024 * 512].fill(0);
    expected[1536 * 512..].fill(0);
    assert!(content(&bench) == expected);
}

#[test]
fn zeroes_are_written() {
    for unmap in [0, 1] {
        let mut bench = active();
        assert_eq!(ranges(&mut bench, 13, &[(5, 100, unmap)]), (0, 1));
        let mut expected = pattern((SECTORS * SECTOR) as usize);
        expected[5 * 512..105 * 512].fill(0);
        assert!(content(&bench) == expected);
    }
}

#[test]
fn bad_segments_change_nothing() {
    let mut bench = active();
    let good = (0, 8, 0);
    assert_eq!(ranges(&mut bench, 11, &[good, (SECTORS, 1, 0)]).0, IOERR);
    assert_eq!(ranges(&mut bench, 11, &[good, (u64::MAX, 1, 0)]).0, IOERR);
    assert_eq!(ranges(&mut bench, 11, &[good, (0, u32::MAX, 0)]).0, IOERR);
    assert_eq!(ranges(&mut bench, 11, &[good, (8, 8, 1)]).0, UNSUPP);
    assert_eq!(ranges(&mut bench, 11, &[good, (8, 8, 2)]).0, UNSUPP);
    assert_eq!(ranges(&mut bench, 13, &[(8, 8, 4)]).0, UNSUPP);
    assert_eq!(ranges(&mut bench, 13, &[(0, request::MAX_ZEROES_SECTORS + 1, 0)]).0, IOERR);
    assert_eq!(ranges(&mut bench, 13, &[good, good]).0, IOERR, "more segments than told");
    assert_eq!(ranges(&mut bench, 11, &[]).0, IOERR);
    assert_eq!(ranges(&mut bench, 11, &[good; 33]).0, IOERR);
    let table = [header(&bench, 11, 0).next(1), Desc::readable(DATA, 17).next(2), Desc::writable(STATUS, 1)];
    assert_eq!(run(&mut bench, &table).0, IOERR);
    assert!(content(&bench) == pattern((SECTORS * SECTOR) as usize));
}

#[test]
fn what_was_not_negotiated_is_unsupported() {
    let mut bench = active_with(VIRTIO_F_VERSION_1);
    assert_eq!(ranges(&mut bench, 11, &[(0, 8, 0)]), (UNSUPP, 1));
    assert_eq!(ranges(&mut bench, 13, &[(0, 8, 0)]), (UNSUPP, 1));
    works(&mut bench);
    // Written through.
    assert_eq!(write(&mut bench, 0, 512), (0, 1));
}

#[test]
fn an_empty_slot_has_no_capacity_and_fails_requests() {
    let mut bench = Bench::new(Block::new("disk0").unwrap());
    bench.activate(FEATURES);
    assert_eq!(capacity(&bench), 0);
    assert_eq!(read(&mut bench, 0, 512), (IOERR, 0));
    assert_eq!(bare(&mut bench, 4), (IOERR, 1));
    assert!(bench.interrupted());

    bench.device.attach(medium(), false).unwrap();
    assert_eq!(bench.interrupt.status(), 2, "the driver learns of it");
    assert!(bench.interrupted());
    assert_eq!(capacity(&bench), SECTORS);
    works(&mut bench);
    assert!(matches!(bench.device.attach(medium(), false), Err(AttachError::Occupied)));

    bench.interrupted();
    assert!(bench.device.detach().is_some());
    assert_eq!(bench.interrupt.status(), 2);
    assert_eq!(capacity(&bench), 0);
    assert_eq!(read(&mut bench, 0, 512), (IOERR, 0));
    assert!(bench.device.detach().is_none());
}

fn late() -> Block {
    Block::new("disk0").unwrap().late(true)
}

#[test]
fn a_late_slot_is_a_device_from_its_medium_until_its_driver_has_let_go() {
    let mut bench = Bench::new(late());
    assert!(!bench.device.present());
    assert!(bench.device.detach().is_none());
    bench.device.attach(medium(), false).unwrap();
    assert!(bench.device.present());
    // Nobody has looked meanwhile.
    assert!(bench.device.detach().is_some());
    assert!(!bench.device.present());

    bench.device.attach(medium(), false).unwrap();
    bench.activate(FEATURES);
    works(&mut bench);
    bench.interrupted();
    assert!(bench.device.detach().is_some());
    assert!(bench.device.present(), "its driver is there");
    assert_eq!((capacity(&bench), bench.interrupt.status()), (0, 2));
    assert_eq!(read(&mut bench, 0, 512), (IOERR, 0));

    bench.interrupted();
    bench.device.attach(medium(), false).unwrap();
    assert_eq!((capacity(&bench), bench.interrupt.status()), (SECTORS, 2));
    works(&mut bench);
    bench.device.reset();
    assert!(bench.device.present(), "it has a medium");
    assert!(bench.device.detach().is_some());
    assert!(!bench.device.present());
    bench.device.reset();
    bench.device.attach(medium(), false).unwrap();
    bench.start_again(FEATURES);
    works(&mut bench);
    bench.device.detach();
    bench.device.reset();
    assert!(!bench.device.present());
}

#[test]
fn a_driver_cannot_activate_what_is_not_there() {
    let mut bench = active();
    let state = bench.device.save().unwrap();
    let resources = bench.resources();
    let (activation, ()) = common::restore(&bench.device, STATE_VERSION, &state, resources).unwrap();
    bench.device = late();
    assert!(matches!(bench.device.activate(activation.unwrap()), Err(DeviceError::Invalid(_))));
    assert!(!bench.device.present());
}

#[test]
fn a_late_slot_comes_back_absent_or_with_its_driver() {
    let mut bench = Bench::new(late());
    let state = bench.device.save().unwrap();
    bench.device = late();
    bench.device.restore(&state, bench.resources()).unwrap();
    assert!(!bench.device.present());
    bench.device.attach(medium(), false).unwrap();
    bench.activate(FEATURES);
    works(&mut bench);

    bench.device.detach();
    let state = bench.device.save().unwrap();
    bench.device = late();
    bench.device.restore(&state, bench.resources()).unwrap();
    assert!(bench.device.present(), "its driver is there");
    assert_eq!(capacity(&bench), 0);
    bench.device.attach(medium(), false).unwrap();
    works(&mut bench);
}

#[test]
fn a_read_only_medium_cannot_be_written() {
    let mut bench = Bench::new(Block::new("disk0").unwrap());
    bench.device.attach(medium(), true).unwrap();
    bench.activate(FEATURES);
    works(&mut bench);
    assert_eq!(write(&mut bench, 0, 512), (IOERR, 1));
    assert_eq!(ranges(&mut bench, 11, &[(0, 8, 0)]), (IOERR, 1));
    assert_eq!(ranges(&mut bench, 13, &[(0, 8, 0)]), (IOERR, 1));
    assert!(content(&bench) == pattern((SECTORS * SECTOR) as usize));
}

#[test]
fn only_fitting_files_become_media() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    std::fs::write(&path, [0; 4096]).unwrap();
    let mut block = Block::new("").unwrap();
    assert!(matches!(
        block.attach(File::open(directory.path()).unwrap(), true),
        Err(AttachError::NotRegular)
    ));
    assert!(matches!(block.attach(File::open("/dev/null").unwrap(), true), Err(AttachError::NotRegular)));
    assert!(matches!(block.attach(File::open(&path).unwrap(), false), Err(AttachError::Access("writing"))));
    let write_only = File::options().write(true).open(&path).unwrap();
    assert!(matches!(block.attach(write_only, true), Err(AttachError::Access("reading"))));
    block.attach(File::open(&path).unwrap(), true).unwrap();
}

#[test]
fn configuration_space_is_laid_out_as_the_standard_says() {
    let bench = active();
    let mut config = [0xee; 64];
    bench.device.read_config(0, &mut config);
    assert_eq!(config[..8], SECTORS.to_le_bytes());
    assert_eq!(config[8..12], 0x4_0000u32.to_le_bytes());
    assert_eq!(config[12..16], 254u32.to_le_bytes());
    assert_eq!(config[20..24], 512u32.to_le_bytes());
    assert_eq!(config[36..40], request::MAX_DISCARD_SECTORS.to_le_bytes());
    assert_eq!(config[56], 1);
    assert_eq!(config[60..], [0xee; 4]);
    let mut byte = [0xee];
    bench.device.read_config(u64::MAX, &mut byte);
    assert_eq!(byte, [0xee]);
}

#[test]
fn hostile_drivers_are_survived() {
    // A chain without a sound status byte is not answered at all.
    hostile::survives_malformed(&mut active(), 0, works);
    hostile::notices_corrupt_rings(0, active);
    hostile::survives_anything(active);
}

#[test]
fn saved_and_restored_in_both_states() {
    let mut bench = Bench::new(Block::new("disk0").unwrap());
    let state = bench.device.save().unwrap();
    bench.device.restore(&state, bench.resources()).unwrap();
    assert!(bench.device.active.is_none());

    let mut bench = active();
    works(&mut bench);
    let table = [header(&bench, 0, 3).next(1), Desc::writable(DATA, 512).next(2), Desc::writable(STATUS, 1)];
    bench.queue(0).table(0, &table);
    bench.queue(0).offer(0);
    let state = bench.device.save().unwrap();
    let resources = bench.resources();
    bench.interrupted();
    bench.device = Block::new("disk0").unwrap();
    bench.device.attach(medium(), false).unwrap();
    bench.device.restore(&state, resources).unwrap();
    assert_eq!(bench.interrupt.status() & 2, 2, "the medium may be another");
    // What was offered before is served without a kick.
    bench.device.source_event(0).unwrap();
    assert_eq!(bench.queue(0).used(), [(0, 513)]);
    works(&mut bench);

    let invalid = Block::new("disk0").unwrap().restore(&state[..state.len() - 1], bench.resources());
    assert!(matches!(invalid, Err(DeviceError::Invalid(_))));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever is written and discarded, the disk holds what a plain array would.
    #[test]
    fn the_disk_is_an_array(steps in vec((0..4u8, 0..SECTORS - 64, 1..64u32, any::<u8>()), 1..30)) {
        let mut bench = active();
        let mut model = pattern((SECTORS * SECTOR) as usize);
        for (operation, sector, sectors, fill) in steps {
            let bytes = (sector * 512) as usize..((sector + u64::from(sectors)) * 512) as usize;
            match operation {
                0 => {
                    bench.write(DATA, &vec![fill; bytes.len()]);
                    prop_assert_eq!(write(&mut bench, sector, sectors * 512).0, 0);
                    model[bytes].fill(fill);
                }
                1 => {
                    prop_assert_eq!(read(&mut bench, sector, sectors * 512).0, 0);
                    prop_assert!(bench.read(DATA, bytes.len()) == model[bytes]);
                }
                2 => {
                    prop_assert_eq!(ranges(&mut bench, 11, &[(sector, sectors, 0)]).0, 0);
                    model[bytes].fill(0);
                }
                _ => {
                    prop_assert_eq!(ranges(&mut bench, 13, &[(sector, sectors, u32::from(fill & 1))]).0, 0);
                    model[bytes].fill(0);
                }
            }
        }
        prop_assert!(content(&bench) == model);
    }
}

/// So little that the second request waits for as long as any test runs.
fn one_write() -> RateLimits {
    let bytes = Some(bulkhead_vmm_api::Bucket { per_second: 1, burst: 512 });
    RateLimits { write: bulkhead_vmm_api::RateLimit { bytes, operations: None }, ..RateLimits::default() }
}

/// Two writes of 1 MiB, one of which waits, and a read behind them; heads 0, 3 and 6.
fn held_back() -> Bench<Block> {
    let mut bench = active();
    bench.device.limit(one_write());
    header(&bench, 1, 0);
    bench.write(HEADER + 16, &[0; 16]);
    for first in [0, 3] {
        let table = [
            Desc::readable(HEADER, 16).next(first + 1),
            Desc::readable(DATA, 1 << 20).next(first + 2),
            Desc::writable(STATUS, 1),
        ];
        bench.queue(0).table(first, &table);
        bench.queue(0).offer(first);
    }
    let read = [Desc::readable(HEADER + 16, 16).next(7), Desc::writable(DATA, 513)];
    bench.queue(0).table(6, &read);
    bench.queue(0).offer(6);
    bench.kick(0).unwrap();
    bench
}

#[test]
fn a_request_over_its_limit_stays_in_the_queue() {
    let mut bench = held_back();
    assert_eq!(bench.queue(0).used(), [(0, 1)]);
    // Neither kicks nor a timer that goes off early change that.
    bench.kick(0).unwrap();
    bench.device.source_event(SOURCE_LIMITER).unwrap();
    assert_eq!(bench.queue(0).used(), []);
    let [read, write] = bench.device.traffic().unwrap();
    assert_eq!((write.operations, write.bytes, write.throttled), (1, 1 << 20, 1));
    assert_eq!(read.operations, 0);

    bench.device.limit(RateLimits::default());
    bench.device.source_event(0).unwrap();
    assert_eq!(bench.queue(0).used(), [(3, 1), (6, 513)]);
    let [read, write] = bench.device.traffic().unwrap();
    assert_eq!((read.bytes, write.bytes, write.throttled), (512, 2 << 20, 1));
}

#[test]
fn reads_are_not_held_back_by_a_limit_of_writes() {
    let mut bench = active();
    bench.device.limit(one_write());
    for _ in 0..100 {
        works(&mut bench);
    }
    assert_eq!(bench.device.traffic().unwrap()[0].bytes, 100 * 1024);
}

#[test]
fn what_waits_is_saved_and_restored_in_the_queue() {
    let mut bench = held_back();
    bench.queue(0).used();
    let state = bench.device.save().unwrap();
    let mut restored = Block::new("disk0").unwrap();
    restored.attach(medium(), false).unwrap();
    restored.restore(&state, bench.resources()).unwrap();
    bench.device = restored;
    bench.device.source_event(0).unwrap();
    assert_eq!(bench.queue(0).used(), [(3, 1), (6, 513)]);
}

#[test]
fn a_reset_forgets_what_waits() {
    let mut bench = held_back();
    bench.queue(0).used();
    bench.device.reset();
    bench.device.limit(RateLimits::default());
    bench.device.source_event(0).unwrap();
    bench.device.source_event(SOURCE_LIMITER).unwrap();
    assert_eq!(bench.queue(0).used(), []);
    assert!(bench.device.traffic().unwrap()[1].throttled_us < u64::MAX);
}

#[test]
fn what_cannot_be_done_costs_an_operation_and_no_bytes() {
    let mut bench = active();
    let operations = Some(bulkhead_vmm_api::Bucket { per_second: 1, burst: 1 });
    let read = bulkhead_vmm_api::RateLimit { bytes: None, operations };
    bench.device.limit(RateLimits { read, ..RateLimits::default() });
    assert_eq!(super::tests::read(&mut bench, SECTORS, 512).0, IOERR);
    assert_eq!(bench.device.traffic().unwrap()[0].bytes, 0);
    bench.queue(0).offer(0);
    bench.kick(0).unwrap();
    assert_eq!(bench.queue(0).used(), []);
}

#[test]
fn what_is_no_request_needs_no_tokens() {
    let mut bench = active();
    for _ in 0..3 {
        assert_eq!(bare(&mut bench, 77).0, UNSUPP);
    }
    let [read, write] = bench.device.traffic().unwrap();
    assert_eq!((read.operations, write.operations), (0, 0));
}
