//! Where memory is plugged: a range of guest addresses above all others, mapped in this process from the
//! beginning, and given to KVM part by part as more of it becomes usable.
//!
//! ```text
//!   RAM │ devices │ RAM above 4 GiB │ region of virtio-mem ……………………………… │ shared windows
//!                                   │ slot 16 │ slot 17   │ not in KVM yet │
//! ```
//!
//! A mapping costs address space alone. A memory slot costs KVM some bytes for each page of it, so slots
//! follow what is asked for. They are never taken away: that would stop every vCPU, and what a guest may reach
//! in vain is bounded by what it was once allowed to have.
//!
//! Devices can reach all of the region, so that a queue or buffer in memory plugged later needs no word to
//! them. One that a guest lets work on memory which it has not plugged finds memory there.

use std::ops::Range;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::{KvmError, memory::MemoryError};
use crate::devices::virtio::device::GuestMemory;

/// The first slot of the region; those of RAM are below.
const FIRST_SLOT: u32 = 16;
/// What becomes usable becomes so in pieces of this size: Linux on x86-64 adds memory in whole blocks of 128
/// MiB, although it plugs parts of them.
const GRANULE: u64 = 128 << 20;

/// The region as KVM has it.
#[derive(Debug)]
pub struct Hotplug {
    region: Range<u64>,
    /// Where the region begins in this process.
    host: u64,
    /// Bytes from its beginning that are in slots.
    covered: u64,
    next_slot: u32,
}

impl Hotplug {
    /// The region at `region`, which is one of `memory`'s.
    ///
    /// # Errors
    /// It is not.
    pub fn new(memory: &GuestMemory, region: Range<u64>) -> Result<Self, MemoryError> {
        let mapped = memory
            .find_region(GuestAddress(region.start))
            .filter(|mapped| {
                mapped.start_addr().0 == region.start && mapped.len() == region.end - region.start
            })
            .ok_or_else(|| MemoryError::Layout("the region of plugged memory is not mapped".to_owned()))?;
        Ok(Self { host: mapped.as_ptr() as u64, region, covered: 0, next_slot: FIRST_SLOT })
    }

    /// Its first guest address.
    #[must_use]
    pub fn start(&self) -> u64 {
        self.region.start
    }

    /// Its size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.region.end - self.region.start
    }

    /// How much must be usable for `bytes` to be plugged: whole pieces, as far as the region goes.
    #[must_use]
    pub fn usable_for(&self, bytes: u64) -> u64 {
        bytes.div_ceil(GRANULE).saturating_mul(GRANULE).min(self.size())
    }

    /// Lets the guest reach the first `usable` bytes of the region; what it could reach before stays.
    ///
    /// # Errors
    /// KVM refuses a slot; nothing is changed.
    pub fn cover(&mut self, vm: &VmFd, usable: u64) -> Result<(), KvmError> {
        let usable = usable.min(self.size());
        if usable <= self.covered {
            return Ok(());
        }
        let slot = kvm_userspace_memory_region {
            slot: self.next_slot,
            flags: 0,
            guest_phys_addr: self.region.start + self.covered,
            memory_size: usable - self.covered,
            userspace_addr: self.host + self.covered,
        };
        // SAFETY: the range lies in the region, which is mapped for as long as the process lives, and in no
        // other slot.
        unsafe { vm.set_user_memory_region(slot) }.map_err(KvmError::of("KVM_SET_USER_MEMORY_REGION"))?;
        self.covered = usable;
        self.next_slot += 1;
        Ok(())
    }
}
