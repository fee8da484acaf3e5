//! What a hostile driver may do to any device, for the devices' unit tests.

use std::ops::Range;

use proptest::{collection::vec, prelude::*, test_runner::TestRunner};

use super::{
    device::{DeviceError, VirtioDevice},
    testing::{Bench, Desc, MEMORY_SIZE},
};

/// Where malformed indirect tables are written.
const INDIRECT: u64 = 0x2_0000;
/// Where a test's own buffers may lie: no malformed chain touches these.
pub(crate) const BUFFERS: Range<u64> = 0x10_0000..0x30_0000;

/// Chains that break the rules, by name; each begins at descriptor 0. The second table is written to
/// [`INDIRECT`].
pub(crate) fn malformed() -> Vec<(&'static str, Vec<Desc>, Vec<Desc>)> {
    let table = |length: u32| Desc::indirect(INDIRECT, length * 16);
    vec![
        ("a loop of one", vec![Desc::readable(0x8000, 64).next(0)], vec![]),
        (
            "a loop of two",
            vec![Desc::readable(0x8000, 64).next(1), Desc::writable(0x9000, 64).next(0)],
            vec![],
        ),
        ("a next outside the table", vec![Desc::readable(0x8000, 64).next(0xffff)], vec![]),
        (
            "a buffer outside memory",
            vec![Desc::readable(0x8000, 64).next(1), Desc::writable(MEMORY_SIZE as u64, 64)],
            vec![],
        ),
        (
            "a buffer that leaves memory",
            vec![Desc::readable(0x8000, 64).next(1), Desc::writable(MEMORY_SIZE as u64 - 8, 64)],
            vec![],
        ),
        (
            "a buffer at the end of the address space",
            vec![Desc::readable(u64::MAX - 7, 64).next(1), Desc::writable(0x9000, 64)],
            vec![],
        ),
        (
            "readable behind writable",
            vec![Desc::writable(0x9000, 64).next(1), Desc::readable(0x8000, 64)],
            vec![],
        ),
        (
            "more than 4 GiB",
            vec![
                Desc::readable(0, u32::MAX).next(1),
                Desc::readable(0, u32::MAX).next(2),
                Desc::writable(0, 1),
            ],
            vec![],
        ),
        (
            "nothing but zero lengths",
            vec![Desc::readable(0x8000, 0).next(1), Desc::writable(0x9000, 0)],
            vec![],
        ),
        ("an indirect table outside memory", vec![Desc::indirect(1 << 40, 64)], vec![]),
        ("an empty indirect table", vec![table(0)], vec![]),
        ("half a descriptor in an indirect table", vec![Desc::indirect(INDIRECT, 24)], vec![]),
        (
            "an indirect table in an indirect table",
            vec![table(2)],
            vec![Desc::readable(0x8000, 64).next(1), table(2)],
        ),
        ("a loop in an indirect table", vec![table(1)], vec![Desc::readable(0x8000, 64).next(0)]),
        (
            "an indirect table of thousands",
            vec![table(4096)],
            (0..4096).map(|index| Desc::readable(0x8000, 1).next(index + 1)).collect(),
        ),
    ]
}

/// Offers each malformed chain to queue `index` of an active device and asserts that it is completed with
/// nothing written, and that `works`, which does something sound, still passes afterwards.
pub(crate) fn survives_malformed<D: VirtioDevice>(
    bench: &mut Bench<D>,
    index: usize,
    mut works: impl FnMut(&mut Bench<D>),
) {
    for (name, table, indirect) in malformed() {
        let queue = bench.queue(index);
        queue.write_table(INDIRECT, &indirect);
        queue.table(0, &table);
        queue.offer(0);
        bench.kick(index).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(bench.queue(index).used(), [(0, 0)], "{name}");
        works(bench);
    }
}

/// Asserts that an active device calls queue `index` corrupt when the available ring is: the index runs ahead
/// after activation, or a head is none.
pub(crate) fn notices_corrupt_rings<D: VirtioDevice>(index: usize, mut make: impl FnMut() -> Bench<D>) {
    let mut bench = make();
    let ahead = 300;
    bench.queue(index).set_avail_idx(ahead);
    assert!(matches!(bench.kick(index), Err(DeviceError::Queue { queue, .. }) if queue == index));

    let mut bench = make();
    bench.queue(index).offer(0xffff);
    assert!(matches!(bench.kick(index), Err(DeviceError::Queue { queue, .. }) if queue == index));

    // What the driver does to a running queue takes effect nowhere else: after a reset all is well again.
    bench.device.reset();
    bench.queue(index).set_avail_idx(0);
    let features = bench.offered();
    bench.activate(features);
    bench.kick(index).unwrap();
}

#[derive(Debug, Clone)]
struct Round {
    table: Vec<Desc>,
    indirect: Vec<Desc>,
    content: Vec<u8>,
    heads: Vec<u16>,
    jump: Option<u16>,
}

fn descriptor() -> impl Strategy<Value = Desc> {
    let address = prop_oneof![
        8 => 0x8000..0x9000u64,
        4 => Just(INDIRECT),
        1 => (MEMORY_SIZE as u64 - 64)..(MEMORY_SIZE as u64 + 64),
        1 => any::<u64>(),
    ];
    let length = prop_oneof![
        8 => prop_oneof![Just(0), Just(1), Just(16), Just(44), Just(512), Just(513), Just(4096)],
        4 => 0..128u32,
        1 => any::<u32>(),
    ];
    let next = prop_oneof![8 => 0..20u16, 1 => any::<u16>()];
    (address, length, 0..8u8, next).prop_map(|(address, length, flags, next)| {
        let desc = match flags & 6 {
            0 => Desc::readable(address, length),
            2 => Desc::writable(address, length),
            _ => Desc::indirect(address, length),
        };
        if flags & 1 != 0 { desc.next(next) } else { desc }
    })
}

fn round() -> impl Strategy<Value = Round> {
    (
        vec(descriptor(), 16),
        vec(descriptor(), 64),
        vec(prop_oneof![4 => 0..14u8, 1 => any::<u8>()], 4096),
        vec(prop_oneof![30 => 0..16u16, 1 => any::<u16>()], 1..20),
        prop::option::weighted(0.05, any::<u16>()),
    )
        .prop_map(|(table, indirect, content, heads, jump)| Round {
            table,
            indirect,
            content,
            heads,
            jump,
        })
}

/// Throws random chains at every queue of a device, and asserts that it neither panics nor fails otherwise
/// than by calling the queue corrupt, and never writes outside the rings and the region that descriptors point
/// to.
pub(crate) fn survives_anything<D: VirtioDevice>(make: impl FnMut() -> Bench<D>) {
    throw(make, true);
}

/// The same for a device that a driver may rightly ask to clear memory to which no descriptor points.
pub(crate) fn survives_anything_and_may_clear<D: VirtioDevice>(make: impl FnMut() -> Bench<D>) {
    throw(make, false);
}

fn throw<D: VirtioDevice>(mut make: impl FnMut() -> Bench<D>, untouched: bool) {
    // Behind the buffers that a fixture may have offered rightly before.
    const UNTOUCHED: Range<u64> = BUFFERS.start + 0x8_0000..BUFFERS.start + 0x9_0000;
    let make = std::cell::RefCell::new(&mut make);
    let mut config = ProptestConfig::with_cases(96);
    config.failure_persistence = None;
    TestRunner::new(config)
        .run(&(vec(round(), 1..4), any::<usize>()), |(rounds, seed)| {
            let mut bench = make.borrow_mut()();
            let queues = bench.device.queue_max_sizes().len();
            let canary = vec![0xa5; (UNTOUCHED.end - UNTOUCHED.start) as usize];
            bench.write(UNTOUCHED.start, &canary);
            'rounds: for (number, round) in rounds.iter().enumerate() {
                let index = seed.wrapping_add(number) % queues;
                bench.write(0x8000, &round.content);
                let queue = bench.queue(index);
                queue.write_table(INDIRECT, &round.indirect);
                queue.table(0, &round.table);
                for head in &round.heads {
                    queue.offer(*head);
                }
                if let Some(jump) = round.jump {
                    queue.set_avail_idx(jump);
                }
                for kicked in 0..queues {
                    match bench.kick(kicked) {
                        Ok(()) => {}
                        Err(DeviceError::Queue { .. }) => break 'rounds,
                        Err(error) => return Err(TestCaseError::fail(error.to_string())),
                    }
                }
                let sources = bench.device.event_sources().len();
                for source in 0..sources {
                    match bench.device.source_event(source) {
                        Ok(()) => {}
                        Err(DeviceError::Queue { .. }) => break 'rounds,
                        Err(error) => return Err(TestCaseError::fail(error.to_string())),
                    }
                }
            }
            bench.device.save().unwrap();
            if untouched && !rounds.iter().any(reaches_far) {
                prop_assert!(
                    bench.read(UNTOUCHED.start, canary.len()) == canary,
                    "written where nothing points"
                );
            }
            bench.device.reset();
            Ok(())
        })
        .unwrap();
}

/// Whether some descriptor may rightly cover the region that must stay untouched.
fn reaches_far(round: &Round) -> bool {
    round.table.iter().chain(&round.indirect).any(|desc| desc.covers(BUFFERS))
}
