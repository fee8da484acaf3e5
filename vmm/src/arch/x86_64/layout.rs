//! The guest's physical address space.

use std::ops::Range;

/// The temporary GDT that the kernel is entered with.
pub const GDT: u64 = 0x500;
/// `boot_params`.
pub const ZERO_PAGE: u64 = 0x7000;
/// The initial page tables: one page each for PML4, PDPT and PD.
pub const PAGE_TABLES: u64 = 0x9000;
/// The kernel's command line.
pub const CMDLINE: u64 = 0x2_0000;
/// Longest command line with its terminating zero (x86's COMMAND_LINE_SIZE).
pub const CMDLINE_SIZE: usize = 2048;
/// The MP floating pointer and table; also where usable low memory ends.
pub const MPTABLE: u64 = 0x9_fc00;
/// Where memory goes on after the ROMs that a PC has.
pub const HIGH_RAM: u64 = 0x10_0000;
/// Where memory is interrupted for devices.
pub const MMIO_GAP: Range<u64> = 0xd000_0000..0x1_0000_0000;
/// The I/O APIC.
pub const IOAPIC: u32 = 0xfec0_0000;
/// The local APICs.
pub const LAPIC: u32 = 0xfee0_0000;
/// Three pages that KVM needs on Intel processors without unrestricted guests.
pub const TSS: usize = 0xfffb_d000;

/// Interrupt lines of virtio devices: pins of the I/O APIC that no other device has.
pub const VIRTIO_IRQS: Range<u32> = 5..24;

/// What regions above memory begin at multiples of: far more than the largest block in which Linux adds memory
/// to a machine of this size.
const REGION_ALIGNMENT: u64 = 1 << 30;

/// Address of the window of virtio device `index`.
#[must_use]
pub fn virtio_window(index: u32) -> u64 {
    MMIO_GAP.start + u64::from(index) * crate::devices::virtio::mmio::WINDOW
}

/// Guest memory of `size` bytes as address ranges: below the gap, and above it what does not fit below.
#[must_use]
pub fn memory_ranges(size: u64) -> Vec<Range<u64>> {
    let low = size.min(MMIO_GAP.start);
    let high = (size > low).then(|| MMIO_GAP.end..MMIO_GAP.end + (size - low));
    std::iter::once(0..low).chain(high).collect()
}

/// Where `region` bytes of memory can be plugged, for a guest of `size` bytes of memory: above all of it.
#[must_use]
pub fn hotplug_range(size: u64, region: u64) -> Range<u64> {
    let start = above_memory(size);
    start..start + region
}

/// Where windows of shared memory (DAX) begin, for a guest of `size` bytes of memory and `region` that can be
/// plugged: above everything else, so that they can be added without moving anything.
#[must_use]
pub fn dax_base(size: u64, region: u64) -> u64 {
    hotplug_range(size, region).end.next_multiple_of(REGION_ALIGNMENT)
}

fn above_memory(size: u64) -> u64 {
    let top = memory_ranges(size).last().map_or(0, |range| range.end);
    top.max(MMIO_GAP.end).next_multiple_of(REGION_ALIGNMENT)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn memory_adds_up_and_stays_out_of_the_gap(mib in 32u64..(1 << 20), more in 0u64..(1 << 20)) {
            let (size, region) = (mib << 20, more << 20);
            let ranges = memory_ranges(size);
            prop_assert_eq!(ranges.iter().map(|range| range.end - range.start).sum::<u64>(), size);
            for range in &ranges {
                prop_assert!(range.end <= MMIO_GAP.start || range.start >= MMIO_GAP.end);
                prop_assert!(range.end <= hotplug_range(size, region).start);
            }
            prop_assert!(hotplug_range(size, region).end <= dax_base(size, region));
        }
    }

    #[test]
    fn every_device_has_a_window_below_the_interrupt_controllers() {
        let last = virtio_window(VIRTIO_IRQS.len() as u32);
        assert!(last < u64::from(IOAPIC));
    }
}
