//! The MP table (Intel MultiProcessor Specification 1.4): how a kernel without ACPI learns of its processors
//! and interrupt lines.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout;
use crate::devices::virtio::device::GuestMemory;

const APIC_VERSION: u8 = 0x14;
const IOAPIC_PINS: u8 = 24;
const BUS_ISA: u8 = 0;
const POINTER_SIZE: usize = 16;
const HEADER_SIZE: usize = 44;

const ENTRY_PROCESSOR: u8 = 0;
const ENTRY_BUS: u8 = 1;
const ENTRY_IOAPIC: u8 = 2;
const ENTRY_INTERRUPT: u8 = 3;
const ENTRY_LOCAL_INTERRUPT: u8 = 4;

const PROCESSOR_ENABLED: u8 = 1;
const PROCESSOR_BOOTSTRAP: u8 = 2;
const TYPE_INT: u8 = 0;
const TYPE_NMI: u8 = 1;
const TYPE_EXTINT: u8 = 3;
const ALL_LAPICS: u8 = 0xff;

/// Writes the tables for `vcpus` processors, whose APIC ids are their indices.
///
/// # Errors
/// Guest memory is smaller than 1 MiB.
pub fn write(memory: &GuestMemory, vcpus: u8) -> Result<(), GuestMemoryError> {
    memory.write_slice(&tables(vcpus), GuestAddress(layout::MPTABLE))
}

fn tables(vcpus: u8) -> Vec<u8> {
    let mut entries = Vec::new();
    for id in 0..vcpus {
        let bootstrap = if id == 0 { PROCESSOR_BOOTSTRAP } else { 0 };
        entries.extend([ENTRY_PROCESSOR, id, APIC_VERSION, PROCESSOR_ENABLED | bootstrap]);
        // Family 6, with an FPU and an APIC: the kernel asks CPUID for the rest.
        entries.extend(0x600u32.to_le_bytes());
        entries.extend(0x201u32.to_le_bytes());
        entries.extend([0; 8]);
    }
    entries.extend([ENTRY_BUS, BUS_ISA]);
    entries.extend(b"ISA   ");
    let ioapic_id = vcpus;
    entries.extend([ENTRY_IOAPIC, ioapic_id, APIC_VERSION, 1]);
    entries.extend(layout::IOAPIC.to_le_bytes());
    for pin in 0..IOAPIC_PINS {
        entries.extend([ENTRY_INTERRUPT, TYPE_INT, 0, 0, BUS_ISA, pin, ioapic_id, pin]);
    }
    entries.extend([ENTRY_LOCAL_INTERRUPT, TYPE_EXTINT, 0, 0, BUS_ISA, 0, ALL_LAPICS, 0]);
    entries.extend([ENTRY_LOCAL_INTERRUPT, TYPE_NMI, 0, 0, BUS_ISA, 0, ALL_LAPICS, 1]);

    let count = u16::from(vcpus) + 2 + u16::from(IOAPIC_PINS) + 2;
    let mut table = Vec::with_capacity(HEADER_SIZE + entries.len());
    table.extend(b"PCMP");
    table.extend(((HEADER_SIZE + entries.len()) as u16).to_le_bytes());
    table.extend([4, 0]);
    table.extend(b"BULKHEADMICROVM     ");
    table.extend([0; 6]);
    table.extend(count.to_le_bytes());
    table.extend(layout::LAPIC.to_le_bytes());
    table.extend([0; 4]);
    table.extend(entries);
    set_checksum(&mut table, 7);

    let mut pointer = Vec::with_capacity(POINTER_SIZE + table.len());
    pointer.extend(b"_MP_");
    pointer.extend((layout::MPTABLE as u32 + POINTER_SIZE as u32).to_le_bytes());
    pointer.extend([1, 4, 0, 0, 0, 0, 0, 0]);
    set_checksum(&mut pointer, 10);
    pointer.extend(table);
    pointer
}

/// Sets byte `at` so that all bytes sum to zero.
fn set_checksum(bytes: &mut [u8], at: usize) {
    let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    if let Some(byte) = bytes.get_mut(at) {
        *byte = byte.wrapping_sub(sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_well_formed_for_any_number_of_processors() {
        for vcpus in 1..=64 {
            let bytes = tables(vcpus);
            let (pointer, table) = bytes.split_at(POINTER_SIZE);
            for part in [pointer, table] {
                assert_eq!(part.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
            }
            assert_eq!(&table[..4], b"PCMP");
            assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
            let mut at = HEADER_SIZE;
            let mut count = 0;
            while at < table.len() {
                at += if table[at] == ENTRY_PROCESSOR { 20 } else { 8 };
                count += 1;
            }
            assert_eq!((at, count), (table.len(), u16::from_le_bytes([table[34], table[35]])));
            assert!(layout::MPTABLE + bytes.len() as u64 <= layout::HIGH_RAM);
        }
    }
}
