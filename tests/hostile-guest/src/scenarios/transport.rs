//! The MMIO transport: registers in every width, order and state.

use super::{request_queue, scratch, use_it};
use crate::{
    cpu, memory, smp,
    virtio::{Desc, Device, INDIRECT_DESC, Kind, Machine, Random, VERSION_1, buffer, register, status},
};

const WIDTHS: [u64; 5] = [1, 2, 4, 8, 16];
/// Registers, and the configuration space of any device here.
const REGISTERS: u64 = 0x180;

/// Reads and writes of every width at every offset, aligned or not, beyond the registers and across the window's end.
pub(super) fn registers(machine: &Machine, _: u64) {
    for device in machine.devices() {
        let last = (0xff0..0x1000).chain([0x200, 0x7ff, 0x801]);
        for offset in (0..REGISTERS).chain(last) {
            for width in WIDTHS {
                let _ = cpu::load(device.base + offset, width);
            }
        }
        for value in [0, 1, u64::MAX] {
            for offset in (0..REGISTERS).step_by(if value == 1 { 1 } else { 4 }).chain(0xff8..0x1000) {
                for width in WIDTHS {
                    cpu::store(device.base + offset, width, value);
                }
            }
        }
        device.reset();
    }
    machine.devices().for_each(use_it);
}

/// The status register, with every value in no order, queues and features being written in between.
pub(super) fn status_orders(machine: &Machine, seed: u64) {
    let mut random = Random(seed + 1);
    for device in machine.devices() {
        for bits in 0..256u32 {
            device.write(register::STATUS, bits);
            device.write(register::STATUS, !bits & 0xff & !status::DRIVER_OK);
            device.reset();
        }
        for _ in 0..800 {
            match random.below(6) {
                0 => device.reset(),
                1 => {
                    device.write(register::DRIVER_FEATURES_SEL, random.below(3) as u32);
                    device.write(register::DRIVER_FEATURES, random.any() as u32);
                }
                2 => device.write(register::QUEUE_READY, random.below(3) as u32),
                // Not DRIVER_OK: a queue that was never set up would rightly be the end.
                _ => device.write(register::STATUS, random.any() as u32 & !status::DRIVER_OK),
            }
            let _ = device.read(register::STATUS);
        }
        device.reset();
        use_it(device);
    }
}

/// Features that were never offered, and the one that must be taken.
pub(super) fn features(machine: &Machine, _: u64) {
    for device in machine.devices() {
        let offered = device.offered();
        for bit in (0..64).filter(|bit| offered & (1 << bit) == 0) {
            assert!(!device.negotiate(VERSION_1 | (1 << bit)), "{:?} took feature {bit}", device.kind);
        }
        assert!(!device.negotiate(offered & !VERSION_1), "{:?} is content without version 1", device.kind);
        // What is changed after FEATURES_OK is not changed.
        assert!(device.negotiate(VERSION_1));
        device.write(register::DRIVER_FEATURES_SEL, 0);
        device.write(register::DRIVER_FEATURES, u32::MAX);
        for selector in [2, 3, 0x8000_0000, u32::MAX] {
            device.write(register::DEVICE_FEATURES_SEL, selector);
            assert!(device.read(register::DEVICE_FEATURES) == 0);
            device.write(register::DRIVER_FEATURES_SEL, selector);
            device.write(register::DRIVER_FEATURES, u32::MAX);
        }
        use_it(device);
    }
}

/// Configuration space written everywhere, in every state.
pub(super) fn config_writes(machine: &Machine, _: u64) {
    for device in machine.devices() {
        for state in 0..3 {
            device.reset();
            if state > 0 {
                device.write(register::STATUS, status::ACKNOWLEDGE | status::DRIVER);
            }
            if state > 1 {
                drop(device.up());
            }
            for offset in register::CONFIG..register::CONFIG + 0x48 {
                for (width, value) in WIDTHS.iter().zip([0xff, 0, u64::MAX, 0x8000_0000_0000_0001, 7]) {
                    cpu::store(device.base + offset, *width, value);
                    let _ = cpu::load(device.base + offset, *width);
                }
                let _ = device.read(register::CONFIG_GENERATION);
            }
        }
        use_it(device);
    }
}

/// Queues that do not exist.
pub(super) fn queue_selector(machine: &Machine, _: u64) {
    for device in machine.devices() {
        assert!(device.negotiate(VERSION_1));
        for queue in [device.queues() as u32, 4, 0xff, 0x100, 0xffff, 0x8000_0000, u32::MAX] {
            device.write(register::QUEUE_SEL, queue);
            assert!(device.read(register::QUEUE_SIZE_MAX) == 0 && device.read(register::QUEUE_READY) == 0);
            device.set_queue(queue, 16, scratch(), scratch(), scratch());
            assert!(device.read(register::QUEUE_READY) == 0);
            device.kick(queue);
        }
        use_it(device);
    }
}

/// CVE-2026-5747: the rings' registers are written while the device runs. Nothing may come of it.
pub(super) fn moved_rings(machine: &Machine, _: u64) {
    const CANARY: u8 = 0x5a;
    // Apart from what an honest driver here uses.
    let untouched = buffer(64)..buffer(72);
    for device in machine.devices() {
        let mut driver = device.up();
        memory::fill(untouched.start, untouched.end - untouched.start, CANARY);
        for queue in 0..device.queues() as u32 {
            for (size, place) in
                [(0, 0), (0xffff, u64::MAX), (1, untouched.start), (256, machine.memory_end - 16)]
            {
                device.write(register::QUEUE_SEL, queue);
                device.write(register::QUEUE_READY, 0);
                device.set_queue(queue, size, place, place, place);
                device.write(register::DRIVER_FEATURES_SEL, 0);
                device.write(register::DRIVER_FEATURES, 0);
                let running = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
                device.write(register::STATUS, running);
                device.go();
            }
            device.kick(queue);
        }
        match device.kind {
            Kind::Block => super::block::works(&mut driver),
            Kind::Fs => super::fs::works(&mut driver),
            Kind::Vsock => super::vsock::works(&mut driver),
            Kind::Net => super::net::works(&mut driver),
            Kind::Rng => super::rng::works(&mut driver),
            _ => {}
        }
        for address in untouched.clone() {
            assert!(memory::read::<u8>(address) == CANARY, "{:?} wrote to a ring it never had", device.kind);
        }
    }
}

/// Doorbells by the thousand, on queues that exist and on such that do not, of devices that run and that do not.
pub(super) fn doorbells(machine: &Machine, rounds: u64) {
    for _ in 0..rounds.max(1) {
        for device in machine.devices() {
            for up in [false, true] {
                if up {
                    drop(device.up());
                } else {
                    device.reset();
                }
                for number in 0..1500u32 {
                    device.kick(number % 4);
                }
                for number in 0..200u32 {
                    device.kick(number.wrapping_mul(0x9e37_79b9));
                    cpu::store(device.base + register::QUEUE_NOTIFY, 2, u64::from(number & 1));
                    cpu::store(device.base + register::QUEUE_NOTIFY, 8, u64::from(number & 1));
                    device.write(register::INTERRUPT_ACK, number);
                }
            }
        }
    }
    machine.devices().for_each(use_it);
}

/// Resets while requests are under way.
pub(super) fn resets(machine: &Machine, _: u64) {
    for device in machine.devices() {
        let queue = request_queue(device.kind);
        for round in 0..60u64 {
            let mut driver = device.up();
            for number in 0..32u64 {
                let ring = driver.ring(queue);
                // Header-like bytes, then room: something between a request and nonsense for every device.
                memory::write(scratch() + number * 64, number);
                Desc::readable(scratch() + number * 64, 44)
                    .then(number as u16 * 2 + 1)
                    .put(ring.desc, number * 2);
                Desc::writable(scratch() + 0x1_0000, 0x4000).put(ring.desc, number * 2 + 1);
                ring.offer(number as u16 * 2);
                if number == round % 32 {
                    device.kick(queue);
                }
            }
            for _ in 0..round * 20 {
                cpu::relax();
            }
            device.reset();
            assert!(device.read(register::STATUS) == 0);
        }
        use_it(device);
    }
}

/// Random accesses to everything, with rings that are now and then sound.
pub(super) fn anything(machine: &Machine, seed: u64) {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    for device in machine.devices() {
        for _ in 0..1200 {
            random_step(device, &mut random, true);
        }
        device.reset();
        use_it(device);
    }
}

/// One random thing. A `gentle` one leaves alone what rightly ends the machine: bad rings at DRIVER_OK.
fn random_step(device: Device, random: &mut Random, gentle: bool) {
    const OFFSETS: [u64; 12] =
        [0x14, 0x20, 0x24, 0x30, 0x38, 0x44, 0x50, 0x64, 0x80, 0x90, 0xac, register::CONFIG];
    match random.below(12) {
        0 => drop(device.try_up(device.offered())),
        1 => device.reset(),
        2 | 3 => device.kick(random.below(4) as u32),
        4 => drop(device.try_up((device.offered() & random.any()) | VERSION_1)),
        5 if !gentle => device.go(),
        6 => {
            let width = 1 << random.below(4);
            let _ = cpu::load(device.base + random.below(0x1000), width);
        }
        _ => {
            let offset = OFFSETS[random.below(OFFSETS.len() as u64) as usize] + random.below(2) * 4;
            cpu::store(device.base + offset, 1 << random.below(4), random.any() >> random.below(64));
            if gentle && device.read(register::STATUS) & status::DRIVER_OK == 0 {
                device.reset();
            }
        }
    }
}

/// Several processors at once: one kicks and scribbles into the rings, the others reset and set up again. Bad rings
/// may end the machine; nothing else may.
pub(super) fn race(machine: &Machine, seed: u64) {
    let Some(device) = machine.devices().nth(seed as usize % machine.devices().count()) else { return };
    memory::write(scratch(), device.base);
    memory::write(scratch() + 8, device.index);
    smp::start(
        |processor| {
            let device = Device {
                base: memory::read(scratch()),
                index: memory::read(scratch() + 8),
                kind: Kind::Other,
            };
            let mut random = Random(u64::from(processor) + 7);
            for _ in 0..20 {
                random_step(device, &mut random, true);
            }
        },
        1,
    );
    let mut random = Random(seed + 3);
    let queue = request_queue(device.kind);
    let ring = crate::virtio::Ring::new(device.ring_base(queue), 256);
    for _ in 0..1500 {
        match random.below(8) {
            0 => device.reset(),
            1 => {
                let at = ring.desc + random.below(16) * 16;
                memory::write(at, random.any() & 0x1ff_ffff);
                memory::write(at + 8, random.any() as u32);
                memory::write(at + 12, random.any() as u16 & 7);
            }
            2 => ring.offer(random.below(16) as u16),
            3 => drop(device.try_up(VERSION_1 | (device.offered() & INDIRECT_DESC))),
            _ => device.kick(queue),
        }
    }
    smp::stop();
    use_it(device);
}
