//! The rest of the machine: ports, holes, processors, the console, and the ends it can come to.

use super::{scratch, use_it};
use crate::{
    console, cpu, memory, smp,
    virtio::{Machine, Random},
};

/// Every port but the reset line's, in every width, strings included.
pub(super) fn ports(machine: &Machine, _: u64) {
    for port in (0..0x500u16).chain((0x500..0xfff0).step_by(61)).chain(0xfff0..=0xffff) {
        let _ = (cpu::in8(port), cpu::in16(port), cpu::in32(port));
        // Writes to the reset port could only end the scenario, those to the serial port garble its words, and those
        // to the timer and interrupt controllers are KVM's to bear.
        if !(0x60..=0x64).contains(&port) && !(0x3f5..0x400).contains(&port) {
            cpu::out8(port, 0xff);
            cpu::out16(port, 0xfefe);
            cpu::out32(port, 0xfefe_fefe);
        }
    }
    for port in [0x60, 0x61, 0x62, 0x3f8, 0x3f9, 0x3fd, 0x1234] {
        cpu::in_string32(port, scratch(), 300);
        cpu::out_string(if port == 0x3f8 { 0x80 } else { port }, &[0x5a; 300]);
    }
    // Every register of the serial port, in every mode of it.
    for line_control in [0x00, 0x80, 0xff, 0x03] {
        cpu::out8(console::PORT + 3, line_control);
        for register in [1, 2, 4, 5, 6, 7] {
            for value in [0x00, 0xff, 0x10] {
                cpu::out8(console::PORT + register, value);
                let _ = (cpu::in8(console::PORT + register), cpu::in32(console::PORT + register));
            }
        }
    }
    for register in [1, 3, 4] {
        cpu::out8(console::PORT + register, 0);
    }
    machine.devices().for_each(use_it);
}

/// Addresses that nothing answers at, and the interrupt controllers.
pub(super) fn holes(machine: &Machine, _: u64) {
    let mut random = Random(5);
    let last = machine.devices().last().map_or(0, |device| device.base);
    let places = [
        machine.memory_end,
        machine.memory_end + 0x1000,
        last + 0x1000,
        0xdfff_fff8,
        0xfffb_d000,
        0xffff_fff8,
    ];
    for place in places.into_iter().chain([0x1_0000_0000, 0x1_ffff_ff00]) {
        for offset in 0..12 {
            for width in [1, 2, 4, 8, 16] {
                let _ = cpu::load(place + offset, width);
                cpu::store(place + offset, width, random.any());
            }
        }
    }
    for _ in 0..2000 {
        let place = [smp::IOAPIC, machine.memory_end + random.below(1 << 28)][random.below(2) as usize];
        cpu::store(place + random.below(0x40), 1 << random.below(4), random.any());
        let _ = cpu::load(place + random.below(0x40), 4);
    }
    machine.devices().for_each(use_it);
}

/// More of anything on the console than anybody keeps in memory.
pub(super) fn console_flood(_: &Machine, _: u64) {
    for byte in 0..0x4000u64 {
        memory::write(scratch() + byte, (byte % 251) as u8);
    }
    // SAFETY: the buffer was just filled, and nothing else writes to it.
    let text = unsafe { core::slice::from_raw_parts(scratch() as *const u8, 0x4000) };
    for _ in 0..8 {
        cpu::out_string(console::PORT, text);
    }
    cpu::out8(console::PORT, b'\n');
}

/// A panic that no kernel has had, with control characters and no end, and then the reset line.
pub(super) fn false_panic(_: &Machine, _: u64) {
    cpu::out_string(console::PORT, b"\nKernel panic - \x1b[31m\x07");
    for _ in 0..0x200 {
        cpu::out_string(console::PORT, b"\xff\"\\\x00x");
    }
    cpu::power_off();
}

/// Model-specific registers and hypercalls with any value.
pub(super) fn model_specific(machine: &Machine, _: u64) {
    let mut random = Random(9);
    // KVM's own, x2APIC's, machine checks, the hypervisor's of another kind.
    let ranges = [0x4b56_4d00..0x4b56_4d10, 0x11..0x13, 0x800..0x840, 0x400..0x420, 0x4000_0000..0x4000_0010];
    for msr in ranges.into_iter().flatten().chain([0x10, 0x3b, 0xce, 0x17a, 0x1d9, 0x6e0, 0xc001_0015]) {
        let _ = cpu::read_msr(msr);
        for value in [0, 1, random.any(), u64::MAX, machine.memory_end | 1, 0xd000_0001] {
            // Not into this program's own memory: pages that KVM would write to.
            if !(0x4b56_4d00..0x4b56_4d10).contains(&msr) || value >= machine.memory_end {
                let _ = cpu::write_msr(msr, value);
            }
        }
    }
    for msr in (0x4b56_4d00..0x4b56_4d10).chain(0x11..0x13) {
        let _ = cpu::write_msr(msr, 0);
    }
    for number in 0..32 {
        let _ = cpu::hypercall(number, random.any());
    }
    machine.devices().for_each(use_it);
}

/// Every page that there is.
pub(super) fn all_memory(machine: &Machine, _: u64) {
    for page in ((25 << 20)..machine.memory_end).step_by(4096) {
        memory::write(page, page);
    }
    machine.devices().for_each(use_it);
}

/// A fault that nothing handles.
pub(super) fn triple_fault(_: &Machine, _: u64) {
    cpu::triple_fault()
}

/// Instructions fetched from a device.
pub(super) fn run_into_a_device(machine: &Machine, _: u64) {
    cpu::jump(machine.devices().next().map_or(0, |device| device.base))
}

/// Instructions fetched from where nothing is.
pub(super) fn run_into_a_hole(machine: &Machine, _: u64) {
    cpu::jump(machine.memory_end + 0x10_0000)
}

/// Nothing, for ever.
pub(super) fn halt(_: &Machine, _: u64) {
    console::line(format_args!("ready"));
    cpu::halt()
}

/// A processor that is never idle and never leaves the guest.
pub(super) fn spin(_: &Machine, _: u64) {
    console::line(format_args!("ready"));
    loop {
        cpu::relax();
    }
}

/// Interrupts to oneself and to nobody, resets of processors, and lines that are never acknowledged.
pub(super) fn interrupt_storm(machine: &Machine, _: u64) {
    let mut random = Random(13);
    // On, so that what is sent is taken; with interrupts disabled nothing is delivered but what cannot be masked.
    cpu::store(smp::LAPIC + 0xf0, 4, 0x1ff);
    for _ in 0..4000 {
        // Fixed or lowest priority, to self or to all or to one that is not there.
        let command = (random.any() & 0xff) | ((random.any() & 1) << 8) | ((random.any() & 3) << 18);
        cpu::store(smp::LAPIC + 0x310, 4, random.any() & 0xff00_0000);
        cpu::store(smp::LAPIC + 0x300, 4, command | 0x4000);
    }
    for register in (0..0x400).step_by(16).filter(|register| ![0x300, 0x310, 0xf0].contains(register)) {
        let _ = cpu::load(smp::LAPIC + register, 4);
        cpu::store(smp::LAPIC + register, 4, random.any() & 0xffff_00ff);
    }
    // The I/O APIC's redirections, to any vector and mode but INIT and NMI.
    for entry in 0..24u64 {
        for half in 0..2 {
            cpu::store(smp::IOAPIC, 4, 0x10 + entry * 2 + half);
            cpu::store(smp::IOAPIC + 0x10, 4, random.any() & 0xff01_f8ff);
        }
    }
    machine.devices().for_each(use_it);
}

/// A line now and then, for ever: the sign of a machine that goes on.
pub(super) fn beat(machine: &Machine, _: u64) {
    console::line(format_args!("ready"));
    loop {
        for _ in 0..200_000 {
            cpu::relax();
        }
        machine.devices().for_each(use_it);
        console::line(format_args!("beat"));
    }
}
