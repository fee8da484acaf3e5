//! The entropy device.

use super::scratch;
use crate::{
    memory,
    virtio::{Desc, Driver, Kind, Machine},
};

/// Fetches sixteen bytes.
pub(super) fn works(driver: &mut Driver) {
    memory::fill(scratch(), 16, 0);
    let written = driver.request(0, &[Desc::writable(scratch(), 16)]);
    assert!(written == 16, "{written} random bytes of 16");
    let (low, high): (u64, u64) = (memory::read(scratch()), memory::read(scratch() + 8));
    assert!(low != 0 || high != 0, "the random bytes are zeroes");
}

/// As much entropy as memory can name, all at once.
pub(super) fn greed(machine: &Machine, _: u64) {
    let device = machine.find(Kind::Rng);
    let mut driver = device.up();
    let size = u64::from(driver.ring(0).size);
    for _ in 0..6 {
        let ring = *driver.ring(0);
        for index in 0..size {
            Desc::writable(scratch(), 0x80_0000).put(ring.desc, index);
            ring.offer(index as u16);
        }
        device.kick(0);
        for _ in 0..size {
            let (_, written) = driver.ring(0).wait();
            assert!(written <= 0x80_0000);
        }
        // The same memory, many times over.
        for index in 0..size - 1 {
            Desc::writable(scratch(), 0x10_0000).then(index as u16 + 1).put(ring.desc, index);
        }
        Desc::writable(scratch(), 1).put(ring.desc, size - 1);
        ring.offer(0);
        device.kick(0);
        let _ = driver.ring(0).wait();
    }
    works(&mut driver);
}
