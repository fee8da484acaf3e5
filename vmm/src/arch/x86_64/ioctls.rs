//! The numbers of KVM's requests (`linux/kvm.h`) that are made while a guest runs: system call filters name
//! them, as kvm-ioctls keeps its own to itself.

use kvm_bindings::{
    kvm_clock_data, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msrs, kvm_pit_state2,
    kvm_regs, kvm_sregs, kvm_userspace_memory_region, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};

/// Guest code.
pub const KVM_RUN: u32 = none(0x80);
/// Tells a guest's watchdog that its vCPU was paused.
pub const KVM_KVMCLOCK_CTRL: u32 = none(0xad);

/// General registers.
pub const KVM_GET_REGS: u32 = read::<kvm_regs>(0x81);
/// Segments, control registers.
pub const KVM_GET_SREGS: u32 = read::<kvm_sregs>(0x83);
/// Model-specific registers.
pub const KVM_GET_MSRS: u32 = both::<kvm_msrs>(0x88);
/// The local APIC.
pub const KVM_GET_LAPIC: u32 = read::<kvm_lapic_state>(0x8e);
/// Whether it runs, halts, or waits to be started.
pub const KVM_GET_MP_STATE: u32 = read::<kvm_mp_state>(0x98);
/// Pending exceptions and interrupts.
pub const KVM_GET_VCPU_EVENTS: u32 = read::<kvm_vcpu_events>(0x9f);
/// Debug registers.
pub const KVM_GET_DEBUGREGS: u32 = read::<kvm_debugregs>(0xa1);
/// The time stamp counter's rate.
pub const KVM_GET_TSC_KHZ: u32 = none(0xa3);
/// Floating point and vectors.
pub const KVM_GET_XSAVE: u32 = read::<kvm_xsave>(0xa4);
/// The same, as long as it takes.
pub const KVM_GET_XSAVE2: u32 = read::<kvm_xsave>(0xcf);
/// Extended control registers.
pub const KVM_GET_XCRS: u32 = read::<kvm_xcrs>(0xa6);

/// PICs and I/O APIC.
pub const KVM_GET_IRQCHIP: u32 = both::<kvm_irqchip>(0x62);
/// The paravirtual clock.
pub const KVM_GET_CLOCK: u32 = read::<kvm_clock_data>(0x7c);
/// The timer.
pub const KVM_GET_PIT2: u32 = read::<kvm_pit_state2>(0x9f);

/// A slot of guest memory.
pub const KVM_SET_USER_MEMORY_REGION: u32 = write::<kvm_userspace_memory_region>(0x46);

const KVMIO: u32 = 0xae;

/// `_IO`
const fn none(number: u32) -> u32 {
    KVMIO << 8 | number
}

/// `_IOW`
const fn write<T>(number: u32) -> u32 {
    1 << 30 | size::<T>() << 16 | none(number)
}

/// `_IOR`
const fn read<T>(number: u32) -> u32 {
    2 << 30 | size::<T>() << 16 | none(number)
}

/// `_IOWR`
const fn both<T>(number: u32) -> u32 {
    3 << 30 | size::<T>() << 16 | none(number)
}

/// The 14 bits of a request that tell the size of its structure.
const fn size<T>() -> u32 {
    (size_of::<T>() & 0x3fff) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_are_the_kernels() {
        assert_eq!(KVM_RUN, 0xae80);
        assert_eq!(KVM_GET_REGS, 0x8090_ae81);
        assert_eq!(KVM_GET_SREGS, 0x8138_ae83);
        assert_eq!(KVM_GET_MSRS, 0xc008_ae88);
        assert_eq!(KVM_GET_LAPIC, 0x8400_ae8e);
        assert_eq!(KVM_GET_XSAVE, 0x9000_aea4);
        assert_eq!(KVM_GET_IRQCHIP, 0xc208_ae62);
        assert_eq!(KVM_GET_CLOCK, 0x8030_ae7c);
        assert_eq!(KVM_SET_USER_MEMORY_REGION, 0x4020_ae46);
    }
}
