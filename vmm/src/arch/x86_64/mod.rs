//! x86-64.
//!
//! ```text
//!         0  real-mode area: GDT, zero page, page tables
//!    9fc00   MP table (the kernel looks in the last KiB below 640 KiB)
//!   100000   kernel at the addresses its ELF names, initramfs at the top of low memory
//! d0000000   one 4 KiB window for each virtio-mmio device; no memory up to 4 GiB
//! fec00000   I/O APIC, fee00000 local APICs: in KVM
//! 1 00000000 the rest of memory
//!     …      a gap, then windows of shared memory (DAX), each aligned to 1 GiB
//! ```

pub mod boot;
pub mod cpuid;
pub mod ioctls;
pub mod layout;
pub mod mptable;
pub mod registers;
pub mod state;
