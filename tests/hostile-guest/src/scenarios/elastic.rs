//! The devices by which memory comes and goes.

use super::scratch;
use crate::{
    memory,
    virtio::{Desc, Device, Driver, Kind, Machine, Random, register},
};

const INFLATE: u32 = 0;
const DEFLATE: u32 = 1;
const STATS: u32 = 2;
const REPORTING: u32 = 3;

const PAGE: u64 = 4096;

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

/// A page that holds something, far from everything of this program's.
fn victim() -> u64 {
    let page = scratch() + 0x40_0000;
    memory::fill(page, PAGE, 0x5a);
    page
}

/// Gives a page away by its number, and another as free; both come back empty.
pub(super) fn balloon_works(driver: &mut Driver) {
    let page = victim();
    memory::write(scratch(), (page / PAGE) as u32);
    let written = driver.request(INFLATE, &[Desc::readable(scratch(), 4)]);
    assert!(written == 0 && memory::read::<u64>(page) == 0, "a page in the balloon is still there");
    let page = victim();
    let written = driver.request(REPORTING, &[Desc::writable(page, PAGE as u32)]);
    assert!(written == 0 && memory::read::<u64>(page) == 0, "a reported page is still there");
}

/// Page numbers outside of memory, many of them, and the same ones over and over; ranges that are no pages.
pub(super) fn balloon_lies(machine: &Machine, seed: u64) {
    let device = machine.find(Kind::Balloon);
    let mut random = Random(seed + 37);
    let mut driver = device.up();
    let list = scratch();
    // Beyond the end of memory: to the end of 32 bits, through the device gap and the region of virtio-mem.
    let first = machine.memory_end / PAGE;
    for round in 0..40u64 {
        let count = if round % 2 == 0 { 256 } else { 0x4000 };
        for index in 0..count {
            let page = first + random.below((1 << 32) - first);
            memory::write(list + index * 4, page as u32);
        }
        let length = (count * 4 - round % 4) as u32;
        assert!(driver.request(INFLATE, &[Desc::readable(list, length)]) == 0);
        assert!(driver.request(DEFLATE, &[Desc::readable(list, length)]) == 0);
    }
    // One page, as often as a request can name it.
    let page = victim();
    for index in 0..0x10_0000 / 4 {
        memory::write(list + index * 4, (page / PAGE) as u32);
    }
    assert!(driver.request(INFLATE, &[Desc::readable(list, 0x10_0000)]) == 0);
    // Less than a page, and across a boundary: nothing whole is in it.
    let page = victim();
    for (offset, length) in [(0, 1), (1, 4095), (2048, 4095), (4095, 1), (0, 4095)] {
        let report = [Desc::writable(page + offset, length)];
        assert!(driver.request(REPORTING, &report) == 0);
        assert!(memory::read::<u8>(page) == 0x5a, "{offset} {length}");
    }
    // Statistics that are none, as many as the queue holds.
    let size = u64::from(driver.ring(STATS).size);
    for index in 0..size {
        let ring = *driver.ring(STATS);
        Desc::readable(list, (index * 7) as u32).put(ring.desc, index);
        ring.offer(index as u16);
    }
    device.kick(STATS);
    // The last buffer is kept; of the first, which is empty, and all but the last are returned.
    for _ in 0..size - 1 {
        let _ = driver.ring(STATS).wait();
    }
    for (offset, value) in [(0, u32::MAX), (4, u32::MAX), (8, 1), (12, 1)] {
        device.write(register::CONFIG + offset, value);
    }
    assert!(device.read(register::CONFIG) == 0 && device.read(register::CONFIG + 4) == u32::MAX);
    balloon_works(&mut device.up());
}

/// A field of the configuration.
fn field(device: Device, offset: u64) -> u64 {
    let half = |offset: u64| u64::from(device.read(register::CONFIG + offset));
    half(offset) | half(offset + 4) << 32
}

/// One request; the response's type.
fn ask(driver: &mut Driver, kind: u16, address: u64, blocks: u16) -> u16 {
    let (request, response) = (scratch(), scratch() + 64);
    memory::fill(request, 128, 0);
    memory::write(request, kind);
    memory::write(request + 8, address);
    memory::write(request + 16, blocks);
    memory::fill(response, 16, 0xff);
    let written = driver.request(0, &[Desc::readable(request, 24).then(1), Desc::writable(response, 10)]);
    assert!(written == 10, "{written} bytes of a response");
    memory::read(response)
}

/// The device answers, and has nothing to give.
pub(super) fn mem_works(driver: &mut Driver) {
    assert!(ask(driver, UNPLUG_ALL, 0, 0) == 0);
    let address = field(driver.device, 16);
    assert!(ask(driver, PLUG, address, 1) != 0, "memory that nobody offered was plugged");
}

/// Blocks that are nowhere, overlap the end, or were never offered; and the memory itself, which is not there.
pub(super) fn mem_lies(machine: &Machine, seed: u64) {
    let device = machine.find(Kind::Mem);
    let mut random = Random(seed + 41);
    let mut driver = device.up();
    let field = |offset: u64| field(device, offset);
    let (block, address, size) = (field(0), field(16), field(24));
    assert!(block.is_power_of_two() && address.is_multiple_of(block) && size > 0);
    for kind in [PLUG, UNPLUG, STATE, 4, u16::MAX] {
        for (address, blocks) in [
            (address, 1),
            (address, 0),
            (address, u16::MAX),
            (address + 1, 1),
            (address - block, 2),
            (address + size, 1),
            (address + size - block, 2),
            (0, 1),
            (u64::MAX, 1),
            (!(block - 1), u16::MAX),
        ] {
            assert!(ask(&mut driver, kind, address, blocks) != 0, "{kind} {address:#x} {blocks}");
        }
    }
    for _ in 0..200 {
        let (kind, blocks) = ([PLUG, UNPLUG][random.below(2) as usize], random.any() as u16);
        let address =
            if random.below(2) == 0 { random.any() } else { address + random.below(size / block) * block };
        assert!(ask(&mut driver, kind, address, blocks) != 0);
    }
    for offset in (0..56).step_by(4) {
        device.write(register::CONFIG + offset, u32::MAX);
    }
    assert!((field(0), field(16), field(24)) == (block, address, size), "the configuration was written to");
    assert!((field(32), field(40), field(48)) == (0, 0, 0), "sizes changed by themselves");
    mem_works(&mut device.up());
}
