//! The network device.

use super::scratch;
use crate::{
    memory,
    virtio::{Desc, Driver, Kind, Machine, Random},
};

const TX: u32 = 1;
const HEADER: u64 = 12;

/// Sends one small frame to nobody.
pub(super) fn works(driver: &mut Driver) {
    memory::fill(scratch(), 256, 0);
    memory::fill(scratch() + HEADER, 6, 0xff);
    let _ = driver.request(TX, &[Desc::readable(scratch(), HEADER as u32 + 60)]);
}

/// Headers that lie about segmentation and checksums, frames of every length.
pub(super) fn headers(machine: &Machine, seed: u64) {
    let device = machine.find(Kind::Net);
    let mut driver = device.up();
    let mut random = Random(seed + 11);
    for kind in 0..=255u8 {
        for lie in 0..4u32 {
            let at = scratch();
            memory::write(at, 1u8 | (lie as u8 & 2));
            memory::write(at + 1, kind);
            // Header length, segment size, checksum's start and offset.
            memory::write(at + 2, random.any() as u16);
            memory::write(at + 4, if lie == 0 { 0u16 } else { random.any() as u16 });
            memory::write(at + 6, [0, 0xffff, 34, random.any() as u16][lie as usize]);
            memory::write(at + 8, [0xffff, 0xffff, 6, random.any() as u16][lie as usize]);
            memory::write(at + 10, random.any() as u16);
            for offset in (12..96).step_by(8) {
                memory::write(at + offset, random.any());
            }
            memory::write(at + 12 + 12, [0x0008u16, 0xdd86, 0x0081, random.any() as u16][lie as usize]);
            let length = [12, 13, 26, 72, 1526, 65_536][random.below(6) as usize];
            let _ = driver.request(TX, &[Desc::readable(at, length)]);
        }
    }
    for length in [0, 1, 11, 12, 65_565, 65_566, 65_567, 0x10_0000, 0x60_0000] {
        let _ = driver.request(TX, &[Desc::readable(scratch(), length)]);
    }
    // A frame in as many pieces as there are descriptors.
    let ring = *driver.ring(TX);
    for index in 0..u64::from(ring.size) {
        let last = index + 1 == u64::from(ring.size);
        let piece = Desc::readable(scratch() + index, 1);
        if last { piece } else { piece.then(index as u16 + 1) }.put(ring.desc, index);
    }
    ring.offer(0);
    device.kick(TX);
    let _ = driver.ring(TX).wait();
    // Buffers to receive into that are of no use.
    for length in [1, 11, 12, 13] {
        driver.offer(0, &[Desc::writable(scratch(), length)]);
        driver.offer(0, &[Desc::readable(scratch(), length)]);
    }
    device.reset();
    super::use_it(device);
}
