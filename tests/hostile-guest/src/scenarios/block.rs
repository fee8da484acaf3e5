//! The block device.

use super::scratch;
use crate::{
    memory,
    virtio::{Desc, Driver, Kind, Machine, buffer, register},
};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

fn header(kind: u32, sector: u64) -> u64 {
    let at = buffer(0);
    memory::write(at, kind);
    memory::write(at + 4, 0u32);
    memory::write(at + 8, sector);
    memory::write(buffer(1), 0xffu8);
    at
}

fn status() -> u8 {
    memory::read(buffer(1))
}

/// Reads the first sector, which the test has filled with its number plus one.
pub(super) fn works(driver: &mut Driver) {
    let head = header(IN, 0);
    memory::fill(buffer(2), 512, 0);
    let table = [
        Desc::readable(head, 16).then(1),
        Desc::writable(buffer(2), 512).then(2),
        Desc::writable(buffer(1), 1),
    ];
    let written = driver.request(0, &table);
    assert!((written, status()) == (513, 0), "the block device wrote {written}, status {}", status());
    for offset in 0..512 {
        assert!(memory::read::<u8>(buffer(2) + offset) == 1, "the first sector is not what it was");
    }
}

/// One request whose data are `data`; whether the device calls it done.
fn done(driver: &mut Driver, kind: u32, sector: u64, data: Desc) -> bool {
    let head = header(kind, sector);
    let table = [Desc::readable(head, 16).then(1), data.then(2), Desc::writable(buffer(1), 1)];
    let _ = driver.request(0, &table);
    status() == 0
}

/// Requests out of range, too large, of the wrong direction, without header or status, of no kind.
pub(super) fn requests(machine: &Machine, _: u64) {
    let device = machine.find(Kind::Block);
    let mut driver = device.up();
    let low = u64::from(device.read(register::CONFIG));
    let capacity = low | u64::from(device.read(register::CONFIG + 4)) << 32;
    let sector = Desc::writable(scratch(), 512);
    let out = Desc::readable(scratch(), 512);
    assert!(done(&mut driver, IN, capacity - 1, sector), "the last sector cannot be read");
    for start in [capacity, capacity + 1, 1 << 32, 1 << 54, 1 << 55, 1 << 63, u64::MAX, u64::MAX - 1] {
        for kind in [IN, OUT, DISCARD, WRITE_ZEROES] {
            let data = if kind == IN { sector } else { out };
            memory::write(scratch(), start);
            memory::write(scratch() + 8, 1u64);
            assert!(!done(&mut driver, kind, start, data), "sector {start:#x} by request {kind}");
        }
    }
    assert!(!done(&mut driver, IN, capacity - 1, Desc::writable(scratch(), 1024)));
    for length in [1, 511, 513, 4097] {
        assert!(!done(&mut driver, IN, 0, Desc::writable(scratch(), length)));
        assert!(!done(&mut driver, OUT, 1, Desc::readable(scratch(), length)));
    }
    // More than the disk holds, more than memory holds twice over.
    let _ = done(&mut driver, IN, 0, Desc::writable(0x100_0000, 0xf0_0000));
    let _ = done(&mut driver, OUT, 0, Desc::readable(0x100_0000, 0xf0_0000));
    // The wrong direction.
    let _ = done(&mut driver, OUT, 0, sector);
    let head = header(IN, 0);
    let written =
        driver.request(0, &[Desc::readable(head, 16).then(1), out.then(2), Desc::writable(buffer(1), 1)]);
    assert!(written <= 1);
    // No status, no header, half a header, nothing but a status.
    assert!(driver.request(0, &[Desc::readable(header(IN, 0), 16)]) == 0);
    assert!(driver.request(0, &[Desc::writable(scratch(), 512)]) <= 512);
    assert!(driver.request(0, &[Desc::readable(head, 15).then(1), Desc::writable(buffer(1), 1)]) <= 1);
    for kind in 0..64u32 {
        if ![IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES].contains(&kind) {
            assert!(!done(&mut driver, kind, 0, sector), "request {kind} does not exist");
        }
        let _ = done(&mut driver, kind | 0x8000_0000, 0, sector);
    }
    // Serial numbers for little room and much.
    for length in [0, 1, 19, 20, 21, 4096] {
        let _ = done(&mut driver, GET_ID, u64::MAX, Desc::writable(scratch(), length));
    }
    segments(&mut driver, capacity);
    works(&mut driver);
}

/// DISCARD and WRITE_ZEROES whose segments lie.
fn segments(driver: &mut Driver, capacity: u64) {
    for kind in [DISCARD, WRITE_ZEROES] {
        for (start, count, flags) in [
            (capacity, 1, 0),
            (capacity - 1, 2, 0),
            (u64::MAX, 1, 0),
            (1, u32::MAX, 0),
            (u64::MAX - 7, 16, 0),
            (1, 1, 2),
            (1, 1, u32::MAX),
        ] {
            memory::write(scratch(), start);
            memory::write(scratch() + 8, count);
            memory::write(scratch() + 12, flags);
            for length in [16, 15, 17, 32, 0, 16 * 33, 16 * 4096] {
                let data = Desc::readable(scratch(), length);
                let what = (kind, start, count, flags, length);
                assert!(!done(driver, kind, 0, data), "done: {what:?}");
            }
        }
    }
}

/// The whole queue full of the most expensive requests, again and again.
pub(super) fn floods(machine: &Machine, _: u64) {
    let device = machine.find(Kind::Block);
    let mut driver = device.up();
    for round in 0..12u32 {
        let kind = [IN, FLUSH, WRITE_ZEROES][round as usize % 3];
        let head = header(kind, 8);
        memory::write(scratch(), 8u64);
        memory::write(scratch() + 8, 8u64);
        let data = match kind {
            IN => Desc::writable(scratch(), 0x4_0000),
            _ => Desc::readable(scratch(), 16),
        };
        let chain = [Desc::readable(head, 16).then(1), data.then(2), Desc::writable(buffer(1), 1)];
        super::offer_many(&mut driver, 0, 3, &[chain; 85]);
        for _ in 0..85 {
            let _ = driver.ring(0).wait();
        }
    }
    works(&mut driver);
}
