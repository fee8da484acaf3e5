//! Rings of impossible sizes, in impossible places, on top of each other, and changing all the time.

use super::{block, request_queue, scratch, use_it};
use crate::{
    memory::{self, WINDOWS},
    smp,
    virtio::{Desc, Device, Kind, Machine, Ring, VERSION_1, buffer},
};

/// Every queue sound but one, which is set up by `bad`.
fn with_one_bad(device: Device, number: u32, bad: impl Fn(&Device, Ring)) {
    assert!(device.negotiate(VERSION_1));
    for queue in 0..device.queues() as u32 {
        let mut ring = Ring::new(device.ring_base(queue), device.queue_max(queue));
        ring.clear();
        if queue == number {
            bad(&device, ring);
        } else {
            device.set_queue(queue, u32::from(ring.size), ring.desc, ring.avail, ring.used);
        }
    }
    device.go();
    device.kick(number);
    // The device's failure ends the machine; an honest answer to the next register would be a mistake.
    loop {
        let _ = device.read(crate::virtio::register::STATUS);
    }
}

fn device_of(machine: &Machine, number: u64) -> Device {
    let count = machine.devices().count() as u64;
    match machine.devices().nth((number % count) as usize) {
        Some(device) => device,
        None => panic!("no device"),
    }
}

/// Sizes that no queue can have. The number is the size's, the devices take turns.
pub(super) fn queue_size(machine: &Machine, number: u64) {
    let device = device_of(machine, number);
    let max = u32::from(device.queue_max(0));
    let sizes = [0, 3, max * 2, max + 1, 0xffff, 0x1_0000, 0x1_0001, u32::MAX];
    let size = sizes[number as usize % sizes.len()];
    with_one_bad(device, 0, |device, ring| device.set_queue(0, size, ring.desc, ring.avail, ring.used));
}

/// Places where no ring can be.
pub(super) fn ring_address(machine: &Machine, number: u64) {
    let device = device_of(machine, number);
    let end = machine.memory_end;
    let places = [end, end - 16, WINDOWS, WINDOWS - 16, 1 << 39, u64::MAX - 15, !0xfff, 1 << 63, 1];
    let place = places[number as usize % places.len()];
    let last = device.queues() as u32 - 1;
    with_one_bad(device, last, |device, ring| {
        let size = u32::from(ring.size);
        match number / places.len() as u64 % 3 {
            0 => device.set_queue(last, size, place, ring.avail, ring.used),
            1 => device.set_queue(last, size, ring.desc, place, ring.used),
            _ => device.set_queue(last, size, ring.desc, ring.avail, place),
        }
    });
}

/// Rings that end with memory's last byte are as good as any.
pub(super) fn rings_at_the_end(machine: &Machine, _: u64) {
    let device = machine.find(Kind::Block);
    assert!(device.negotiate(VERSION_1));
    let size = device.queue_max(0);
    let probe = Ring::new(0, size);
    // The used ring's event index is its last field.
    let base = (machine.memory_end - probe.end()) & !15;
    let mut ring = Ring::new(base, size);
    ring.used = (machine.memory_end - 6 - 8 * u64::from(size)) & !3;
    ring.clear();
    device.set_queue(0, u32::from(size), ring.desc, ring.avail, ring.used);
    device.go();
    let mut rings = [Ring::default(); crate::virtio::MOST_QUEUES];
    rings[0] = ring;
    let mut driver = crate::virtio::Driver { device, rings };
    block::works(&mut driver);
}

/// The available index runs ahead of what the queue can hold.
pub(super) fn index_runs(machine: &Machine, number: u64) {
    let device = device_of(machine, number);
    let mut driver = device.up();
    let queue = request_queue(device.kind);
    let ring = *driver.ring(queue);
    ring.set_avail(match number / 5 {
        0 => ring.size + 1,
        1 => 0x8000,
        _ => 0xffff,
    });
    // A device may look at a queue only when there is something to do with it.
    loop {
        device.kick(queue);
    }
}

/// The available ring names a descriptor outside of the table.
pub(super) fn head_outside(machine: &Machine, number: u64) {
    let device = device_of(machine, number);
    let mut driver = device.up();
    let queue = request_queue(device.kind);
    let ring = *driver.ring(queue);
    ring.offer(if number < 5 { ring.size } else { 0xffff });
    loop {
        device.kick(queue);
    }
}

/// Used on top of available, on top of descriptors, all on top of each other.
pub(super) fn rings_overlap(machine: &Machine, number: u64) {
    for device in machine.devices() {
        assert!(device.negotiate(VERSION_1));
        for queue in 0..device.queues() as u32 {
            let size = device.queue_max(queue);
            let mut ring = Ring::new(device.ring_base(queue), size);
            ring.clear();
            match number {
                0 => ring.used = (ring.avail + 3) & !3,
                1 => ring.used = ring.desc,
                2 => ring.avail = ring.desc,
                _ => (ring.avail, ring.used) = (ring.desc, ring.desc),
            }
            device.set_queue(queue, u32::from(size), ring.desc, ring.avail, ring.used);
        }
        device.go();
        let queue = request_queue(device.kind);
        let mut ring = Ring::new(device.ring_base(queue), device.queue_max(queue));
        if number == 2 {
            ring.avail = ring.desc;
        }
        for round in 0..200u64 {
            Desc::readable(buffer(round % 16), 64).then(1).put(ring.desc, 0);
            Desc::writable(buffer(3), 4096).put(ring.desc, 1);
            ring.offer(0);
            device.kick(queue);
        }
        device.reset();
        use_it(device);
    }
}

/// The device is told to write what it reads into its own rings.
pub(super) fn rings_as_buffers(machine: &Machine, number: u64) {
    let kinds = [Kind::Block, Kind::Rng, Kind::Fs];
    let device = machine.find(kinds[number as usize % kinds.len()]);
    let queue = request_queue(device.kind);
    for round in 0..40u64 {
        let mut driver = device.up();
        let ring = *driver.ring(queue);
        let length = (ring.end() - ring.desc) as u32 & !511;
        memory::fill(buffer(0), 64, 0);
        let target = [ring.desc, ring.avail & !511, ring.used & !511][round as usize % 3];
        let table = match device.kind {
            Kind::Rng => [Desc::writable(target, length.min(4096)), Desc::default(), Desc::default()],
            _ => [
                Desc::readable(buffer(0), 64).then(1),
                Desc::writable(target, 512 * (1 + round as u32 % 8)).then(2),
                Desc::writable(buffer(1), 1),
            ],
        };
        driver.offer(queue, &table);
        for _ in 0..50 {
            device.kick(queue);
        }
        device.reset();
    }
    use_it(device);
}

/// Another processor writes over the rings while the device works on them. Bad rings may end the machine.
pub(super) fn rings_change(machine: &Machine, number: u64) {
    let device = device_of(machine, number);
    let queue = request_queue(device.kind);
    let mut driver = device.up();
    let ring = *driver.ring(queue);
    memory::write(scratch(), ring.desc);
    memory::write(scratch() + 8, ring.avail);
    smp::start(
        |_| {
            let (desc, avail) = (memory::read::<u64>(scratch()), memory::read::<u64>(scratch() + 8));
            for turn in 0..2000u64 {
                // Lengths, addresses and flags flip between sound and not.
                memory::write(desc + 8, if turn & 1 == 0 { 64u32 } else { u32::MAX });
                memory::write(desc + 16, if turn & 2 == 0 { buffer(2) } else { u64::MAX - 7 });
                memory::write(desc + 16 + 12, (turn & 7) as u16);
                memory::write(desc + 14, (turn & 3) as u16);
                let index = memory::volatile16(avail + 2);
                memory::write(avail + 4 + 2 * u64::from(index & 7), (turn & 15) as u16);
            }
        },
        1,
    );
    for _ in 0..2000 {
        Desc::readable(buffer(1), 64).then(1).put(ring.desc, 0);
        Desc::writable(buffer(2), 4096).put(ring.desc, 1);
        ring.offer(0);
        device.kick(queue);
        while memory::volatile16(ring.avail + 2).wrapping_sub(ring.used_index()) > 8 {
            crate::cpu::relax();
        }
    }
    smp::stop();
    use_it(device);
}
