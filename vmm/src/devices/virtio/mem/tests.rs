use proptest::prelude::*;

use super::{
    super::{
        hostile,
        testing::{Bench, Desc, MEMORY_SIZE},
    },
    *,
};

/// The region begins where the bench's own memory lies, so that what is unplugged can be seen to go.
const ADDRESS: u64 = 0;
const REGION: u64 = 64 * BLOCK;

fn device() -> Mem {
    Mem::new(ADDRESS, REGION).unwrap()
}

fn active() -> Bench<Mem> {
    let mut bench = Bench::new(device());
    let features = bench.offered();
    bench.activate(features);
    bench
}

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

/// Sends a request; the response's type and state.
fn request(bench: &mut Bench<Mem>, kind: u16, address: u64, blocks: u16) -> (u16, u16) {
    let mut bytes = [0; REQUEST];
    bytes[..2].copy_from_slice(&kind.to_le_bytes());
    bytes[8..16].copy_from_slice(&address.to_le_bytes());
    bytes[16..18].copy_from_slice(&blocks.to_le_bytes());
    let (out, back) = (0x28_0000, 0x28_0100);
    bench.write(out, &bytes);
    bench.write(back, &[0xff; RESPONSE]);
    bench.queue(0).table(0, &[Desc::readable(out, REQUEST as u32).next(1), Desc::writable(back, 64)]);
    bench.queue(0).offer(0);
    bench.kick(0).unwrap();
    assert_eq!(bench.queue(0).used(), [(0, RESPONSE as u32)]);
    let response = bench.read(back, RESPONSE);
    assert_eq!(response[2..8], [0; 6]);
    (u16::from_le_bytes([response[0], response[1]]), u16::from_le_bytes([response[8], response[9]]))
}

const ACK: (u16, u16) = (0, 0);
const NACK: (u16, u16) = (1, 0);
const ERROR: (u16, u16) = (3, 0);

fn config(bench: &Bench<Mem>) -> Vec<u64> {
    let mut space = [0; 56];
    bench.device.read_config(0, &mut space);
    space.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word)).collect()
}

#[test]
fn blocks_are_plugged_up_to_what_is_requested() {
    let mut bench = active();
    assert_eq!(config(&bench), [BLOCK, 0, ADDRESS, REGION, 0, 0, 0]);
    assert_eq!(request(&mut bench, PLUG, ADDRESS, 1), ERROR, "nothing is usable");
    bench.device.set_requested(3 * BLOCK, 8 * BLOCK);
    assert!(bench.interrupted());
    assert_eq!(config(&bench), [BLOCK, 0, ADDRESS, REGION, 8 * BLOCK, 0, 3 * BLOCK]);
    assert_eq!(request(&mut bench, PLUG, ADDRESS + 4 * BLOCK, 2), ACK);
    assert_eq!(request(&mut bench, PLUG, ADDRESS, 2), NACK, "more than requested");
    assert_eq!(request(&mut bench, PLUG, ADDRESS, 1), ACK);
    assert_eq!(config(&bench)[5], 3 * BLOCK);
    assert_eq!(
        bench.device.plugged_ranges().collect::<Vec<_>>(),
        [ADDRESS..ADDRESS + BLOCK, ADDRESS + 4 * BLOCK..ADDRESS + 6 * BLOCK]
    );
    // Plugged, unplugged, mixed.
    assert_eq!(request(&mut bench, STATE, ADDRESS + 4 * BLOCK, 2), (0, 0));
    assert_eq!(request(&mut bench, STATE, ADDRESS + BLOCK, 3), (0, 1));
    assert_eq!(request(&mut bench, STATE, ADDRESS, 2), (0, 2));
    for kind in [PLUG, UNPLUG] {
        assert_eq!(request(&mut bench, kind, ADDRESS, 2), ERROR, "neither all plugged nor all unplugged");
    }
    assert_eq!(request(&mut bench, UNPLUG, ADDRESS + 4 * BLOCK, 2), ACK);
    assert_eq!(request(&mut bench, UNPLUG_ALL, 77, 9), ACK);
    assert_eq!((bench.device.plugged(), bench.device.usable()), (0, 8 * BLOCK));
}

#[test]
fn what_is_not_made_of_usable_blocks_is_an_error() {
    let mut bench = active();
    bench.device.set_requested(REGION, 8 * BLOCK);
    assert_eq!(bench.device.requested(), 8 * BLOCK);
    for (address, blocks) in [
        (ADDRESS, 0),
        (ADDRESS + 1, 1),
        (ADDRESS + BLOCK / 2, 1),
        (ADDRESS + 8 * BLOCK, 1),
        (ADDRESS + 7 * BLOCK, 2),
        (ADDRESS, u16::MAX),
        (u64::MAX, 1),
        (!(BLOCK - 1), u16::MAX),
        (u64::from(u32::MAX) * BLOCK, u16::MAX),
    ] {
        for kind in [PLUG, UNPLUG, STATE] {
            assert_eq!(request(&mut bench, kind, address, blocks), ERROR, "{kind} {address:#x} {blocks}");
        }
    }
    assert_eq!(request(&mut bench, 4, ADDRESS, 1), ERROR);
    assert_eq!(request(&mut bench, u16::MAX, ADDRESS, 1), ERROR);
    assert_eq!(bench.device.plugged(), 0);
}

#[test]
fn what_is_usable_never_shrinks_and_a_smaller_request_takes_nothing_by_force() {
    let mut bench = active();
    // Not where the bench's rings are, which an unplug would clear.
    let from = ADDRESS + 4 * BLOCK;
    bench.device.set_requested(4 * BLOCK, 8 * BLOCK);
    assert_eq!(request(&mut bench, PLUG, from, 4), ACK);
    bench.device.set_requested(BLOCK, BLOCK);
    assert_eq!(config(&bench)[4..], [8 * BLOCK, 4 * BLOCK, BLOCK]);
    assert_eq!(request(&mut bench, UNPLUG, from + BLOCK, 3), ACK);
    assert_eq!(request(&mut bench, PLUG, from + BLOCK, 1), NACK);
}

#[test]
fn what_is_unplugged_is_given_back() {
    let mut bench = active();
    bench.device.set_requested(BLOCK, 2 * BLOCK);
    assert_eq!(request(&mut bench, PLUG, ADDRESS, 1), ACK);
    bench.write(ADDRESS + 0x1000, &[9; 4096]);
    assert_eq!(request(&mut bench, UNPLUG, ADDRESS, 1), ACK);
    assert_eq!(bench.read(ADDRESS + 0x1000, 4096), [0; 4096]);
    assert_eq!(bench.device.returned(), BLOCK);
}

#[test]
fn a_request_without_room_for_its_answer_does_nothing() {
    let mut bench = active();
    bench.device.set_requested(BLOCK, BLOCK);
    bench.write(0x28_0000, &[0; REQUEST]);
    for table in [
        vec![Desc::readable(0x28_0000, REQUEST as u32).next(1), Desc::writable(0x28_0100, 9)],
        vec![Desc::readable(0x28_0000, REQUEST as u32 - 1).next(1), Desc::writable(0x28_0100, 64)],
    ] {
        bench.queue(0).table(0, &table);
        bench.queue(0).offer(0);
        bench.kick(0).unwrap();
        assert_eq!(bench.queue(0).used(), [(0, 0)]);
    }
    assert_eq!(bench.device.plugged(), 0);
}

#[test]
fn regions_are_made_of_blocks() {
    for (address, size) in [(0, 0), (1, BLOCK), (0, BLOCK + 1), (!(BLOCK - 1), BLOCK), (0, !(BLOCK - 1))] {
        assert!(Mem::new(address, size).is_err(), "{address:#x} {size:#x}");
    }
}

#[test]
fn hostile_drivers_are_survived() {
    let usable = || {
        let mut bench = active();
        bench.device.set_requested(REGION, REGION);
        bench
    };
    // Away from what the fixture itself uses.
    let far = ADDRESS + 8 * BLOCK;
    hostile::survives_malformed(&mut usable(), 0, |bench| {
        assert_eq!(request(bench, PLUG, far, 1), ACK);
        assert_eq!(request(bench, UNPLUG, far, 1), ACK);
    });
    hostile::notices_corrupt_rings(0, usable);
    hostile::survives_anything(|| {
        // Its own memory is none of the region's, or an unplug would rightly clear what must stay.
        let mut bench = Bench::new(Mem::new(MEMORY_SIZE as u64, REGION).unwrap());
        let features = bench.offered();
        bench.activate(features);
        bench.device.set_requested(REGION, REGION);
        bench
    });
}

#[test]
fn saved_and_restored_with_its_blocks() {
    let mut bench = active();
    bench.device.set_requested(6 * BLOCK, 10 * BLOCK);
    assert_eq!(request(&mut bench, PLUG, ADDRESS + 4 * BLOCK, 2), ACK);
    let (config_before, state) = (config(&bench), bench.device.save().unwrap());
    let resources = bench.resources();
    bench.device = device();
    bench.device.restore(&state, resources).unwrap();
    bench.device.source_event(0).unwrap();
    assert_eq!(config(&bench), config_before);
    assert_eq!(request(&mut bench, STATE, ADDRESS + 4 * BLOCK, 2), (0, 0));
    assert_eq!(request(&mut bench, PLUG, ADDRESS + 6 * BLOCK, 4), ACK);

    let mut other = Mem::new(ADDRESS + BLOCK, REGION).unwrap();
    assert!(other.restore(&state, bench.resources()).is_err());
    let mut other = Mem::new(ADDRESS, REGION + BLOCK).unwrap();
    assert!(other.restore(&state, bench.resources()).is_err());
    for end in 0..state.len() {
        assert!(device().restore(&state[..end], bench.resources()).is_err(), "cut at {end}");
    }
}

proptest! {
    #[test]
    fn no_sequence_of_requests_plugs_more_than_requested_or_outside_the_usable_part(
        steps in proptest::collection::vec((0..5u16, 0..70u64, 0..70u16, prop::option::weighted(0.3, 0..70u64)), 1..40),
    ) {
        let mut bench = Bench::new(Mem::new(MEMORY_SIZE as u64, REGION).unwrap());
        let features = bench.offered();
        bench.activate(features);
        for (kind, block, blocks, resize) in steps {
            let before = bench.device.plugged();
            if let Some(resize) = resize {
                bench.device.set_requested(resize * BLOCK, resize * BLOCK);
            }
            request(&mut bench, kind, MEMORY_SIZE as u64 + block * BLOCK, blocks);
            let device = &bench.device;
            prop_assert!(device.plugged() <= device.requested().max(before));
            let usable = MEMORY_SIZE as u64 + device.usable();
            prop_assert!(device.plugged_ranges().all(|range| range.end <= usable));
            let sum: u64 = device.plugged_ranges().map(|range| range.end - range.start).sum();
            prop_assert_eq!(sum, device.plugged());
            let state = device.save().unwrap();
            let mut again = Mem::new(MEMORY_SIZE as u64, REGION).unwrap();
            again.restore(&state, bench.resources()).unwrap();
            prop_assert_eq!(again.save().unwrap(), state);
        }
    }
}
