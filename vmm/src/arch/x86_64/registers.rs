//! The state in which the boot processor enters the kernel: long mode, paging with the first GiB mapped to
//! itself, flat segments, interrupts off (boot.rst, "64-bit boot protocol"). The other processors wait for
//! the kernel to start them, as after power-on.

use kvm_bindings::{Msrs, kvm_fpu, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout;
use crate::devices::virtio::device::GuestMemory;

/// Selectors as the boot protocol names them: `__BOOT_CS`, `__BOOT_DS`; and a task segment.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

const CR0_PE: u64 = 1;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_RESERVED: u64 = 1 << 1;

const PAGE_PRESENT_WRITABLE: u64 = 3;
const PAGE_LARGE: u64 = 1 << 7;
const LARGE_PAGE_SIZE: u64 = 2 << 20;

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEFAULT_TYPE: u32 = 0x2ff;
const MTRR_ENABLE_WRITE_BACK: u64 = (1 << 11) | 6;

const APIC_LVT0: usize = 0x350;
const APIC_LVT1: usize = 0x360;
const DELIVERY_MODE: u32 = 7 << 8;
const DELIVERY_NMI: u32 = 4 << 8;
const DELIVERY_EXTINT: u32 = 7 << 8;

/// Writes the GDT and the page tables that [`special`] names.
///
/// # Errors
/// Guest memory is smaller than 1 MiB.
pub fn write_tables(memory: &GuestMemory) -> Result<(), GuestMemoryError> {
    let gdt = [0, 0, descriptor(&code()), descriptor(&data()), descriptor(&task()), 0];
    for (address, entry) in (layout::GDT..).step_by(8).zip(gdt) {
        memory.write_obj(entry, GuestAddress(address))?;
    }
    let [pml4, pdpt, pd] = [0, 0x1000, 0x2000].map(|offset| layout::PAGE_TABLES + offset);
    memory.write_obj(pdpt | PAGE_PRESENT_WRITABLE, GuestAddress(pml4))?;
    memory.write_obj(pd | PAGE_PRESENT_WRITABLE, GuestAddress(pdpt))?;
    let mut directory = [0u8; 0x1000];
    for (entry, index) in directory.chunks_exact_mut(8).zip(0u64..) {
        entry
            .copy_from_slice(&((index * LARGE_PAGE_SIZE) | PAGE_PRESENT_WRITABLE | PAGE_LARGE).to_le_bytes());
    }
    memory.write_slice(&directory, GuestAddress(pd))
}

/// General registers for an entry at `entry`.
#[must_use]
pub fn general(entry: GuestAddress) -> kvm_regs {
    kvm_regs { rflags: RFLAGS_RESERVED, rip: entry.0, rsi: layout::ZERO_PAGE, ..Default::default() }
}

/// Special registers, from those the vCPU was created with.
#[must_use]
pub fn special(mut sregs: kvm_sregs) -> kvm_sregs {
    sregs.cs = code();
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data(), data(), data(), data(), data());
    sregs.tr = task();
    (sregs.gdt.base, sregs.gdt.limit) = (layout::GDT, 6 * 8 - 1);
    (sregs.idt.base, sregs.idt.limit) = (0, 0);
    sregs.cr3 = layout::PAGE_TABLES;
    sregs.cr4 |= CR4_PAE;
    sregs.cr0 |= CR0_PE | CR0_PG;
    sregs.efer |= EFER_LME | EFER_LMA;
    sregs
}

/// The FPU as after FNINIT, with the default MXCSR.
#[must_use]
pub fn fpu() -> kvm_fpu {
    kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() }
}

/// Model-specific registers that firmware would have set: memory is write-back by default.
#[must_use]
pub fn msrs() -> Vec<kvm_msr_entry> {
    [(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING), (MSR_MTRR_DEFAULT_TYPE, MTRR_ENABLE_WRITE_BACK)]
        .map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() })
        .to_vec()
}

/// [`msrs`] in KVM's form. None if KVM's list type cannot hold them, which their number excludes.
#[must_use]
pub fn msr_list() -> Option<Msrs> {
    Msrs::from_entries(&msrs()).ok()
}

/// Sets a local APIC's pins as the MP table says: external interrupts at LINT0, NMI at LINT1.
pub fn wire_lapic(lapic: &mut kvm_lapic_state) {
    for (register, mode) in [(APIC_LVT0, DELIVERY_EXTINT), (APIC_LVT1, DELIVERY_NMI)] {
        if let Some(bytes) = lapic.regs.get_mut(register..register + 4) {
            let mut value = [0; 4];
            for (to, from) in value.iter_mut().zip(&*bytes) {
                *to = *from as u8;
            }
            let value = (u32::from_le_bytes(value) & !DELIVERY_MODE) | mode;
            for (to, from) in bytes.iter_mut().zip(value.to_le_bytes()) {
                *to = from as std::ffi::c_char;
            }
        }
    }
}

fn segment(selector: u16, kind: u8, system: bool, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: u8::from(!system && !long),
        s: u8::from(!system),
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

fn code() -> kvm_segment {
    segment(CODE, 0xb, false, true)
}

fn data() -> kvm_segment {
    segment(DATA, 0x3, false, false)
}

fn task() -> kvm_segment {
    kvm_segment { limit: 0xfffff, ..segment(TASK, 0xb, true, false) }
}

/// A segment as an entry of a GDT (Intel SDM volume 3, 3.4.5).
fn descriptor(segment: &kvm_segment) -> u64 {
    let flags = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7
        | u64::from(segment.l) << 13
        | u64::from(segment.db) << 14
        | u64::from(segment.g) << 15;
    let limit = u64::from(if segment.g == 1 { segment.limit >> 12 } else { segment.limit });
    (limit & 0xffff)
        | (segment.base & 0xff_ffff) << 16
        | flags << 40
        | (limit & 0xf_0000) << 32
        | (segment.base >> 24 & 0xff) << 56
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_the_usual_ones() {
        assert_eq!(descriptor(&code()), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&data()), 0x00cf_9300_0000_ffff);
    }

    #[test]
    fn the_first_gib_is_mapped_to_itself() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        write_tables(&memory).unwrap();
        let load = |address| memory.read_obj::<u64>(GuestAddress(address)).unwrap();
        let sregs = special(kvm_sregs::default());
        for address in [0u64, 0x100_0000, (1 << 30) - LARGE_PAGE_SIZE] {
            let pdpt = load(sregs.cr3 + (address >> 39) * 8) & !0xfff;
            let pd = load(pdpt + ((address >> 30) & 511) * 8) & !0xfff;
            let page = load(pd + ((address >> 21) & 511) * 8);
            assert_eq!((page & !0xfff, page & 0x83), (address, 0x83));
        }
    }

    #[test]
    fn lapic_pins_are_wired() {
        let mut lapic = kvm_lapic_state::default();
        lapic.regs[APIC_LVT1 + 2] = 1;
        wire_lapic(&mut lapic);
        assert_eq!(lapic.regs[APIC_LVT0..APIC_LVT0 + 4], [0, 7, 0, 0]);
        assert_eq!(lapic.regs[APIC_LVT1..APIC_LVT1 + 4], [0, 4, 1, 0]);
    }
}
