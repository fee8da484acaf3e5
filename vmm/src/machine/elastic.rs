//! What the daemon asks of a machine's memory while it runs: more, less, and how much there is.

use std::sync::{Mutex, PoisonError};

use bulkhead_vmm_api::{MEMORY_BLOCK_MIB, MemoryStatus};
use kvm_ioctls::VmFd;

use super::{KvmError, devices::DeviceSet, hotplug::Hotplug, snapshot::image::Extent};
use crate::arch::x86_64::layout;

const MIB: u64 = 1 << 20;
const PAGES_PER_MIB: u32 = 256;

/// Why a request for memory is refused.
#[derive(Debug, thiserror::Error)]
pub enum ElasticError {
    /// The machine was built without the device.
    #[error("the machine has no {0} device")]
    NoDevice(&'static str),
    /// It is no number of blocks.
    #[error("{0} MiB is no multiple of {MEMORY_BLOCK_MIB}")]
    Blocks(u32),
    /// It is more than there can be.
    #[error("{wanted} MiB are more than {most}")]
    TooMuch {
        /// What was asked for.
        wanted: u32,
        /// The most.
        most: u32,
    },
    /// KVM refused a memory slot.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

/// A machine's memory: what it was built with, and where more can be plugged.
#[derive(Debug)]
pub struct Elastic {
    base: u64,
    hotplug: Option<Mutex<Hotplug>>,
}

impl Elastic {
    /// For a machine of `base` bytes of memory.
    #[must_use]
    pub fn new(base: u64, hotplug: Option<Hotplug>) -> Self {
        Self { base, hotplug: hotplug.map(Mutex::new) }
    }

    /// Lets the guest reach again what a saved machine's could.
    ///
    /// # Errors
    /// KVM refuses a slot.
    pub fn restore(&self, vm: &VmFd, devices: &DeviceSet) -> Result<(), KvmError> {
        match (&self.hotplug, devices.mem()) {
            (Some(hotplug), Some(mem)) => lock(hotplug).cover(vm, mem.usable()),
            _ => Ok(()),
        }
    }

    /// What of the guest's memory is to be saved: what it booted with, and what is plugged.
    #[must_use]
    pub fn extents(&self, devices: &DeviceSet) -> Vec<Extent> {
        let mut extents: Vec<_> = layout::memory_ranges(self.base).into_iter().map(Extent::whole).collect();
        if let (Some(hotplug), Some(mem)) = (&self.hotplug, devices.mem())
            && mem.usable() > 0
        {
            let start = lock(hotplug).start();
            let content = mem.plugged_ranges().collect();
            extents.push(Extent { addresses: start..start + mem.usable(), content });
        }
        extents
    }

    /// Asks the guest to have this much plugged in all.
    ///
    /// # Errors
    /// See [`ElasticError`]; nothing is changed.
    pub fn set_memory(&self, vm: &VmFd, devices: &DeviceSet, mib: u32) -> Result<(), ElasticError> {
        let hotplug = self.hotplug.as_ref().ok_or(ElasticError::NoDevice("memory"))?;
        if !mib.is_multiple_of(MEMORY_BLOCK_MIB) {
            return Err(ElasticError::Blocks(mib));
        }
        let mut hotplug = lock(hotplug);
        let (bytes, most) = (u64::from(mib) * MIB, hotplug.size());
        if bytes > most {
            return Err(ElasticError::TooMuch { wanted: mib, most: mebibytes(most) });
        }
        let usable = hotplug.usable_for(bytes);
        // Before the guest hears of it.
        hotplug.cover(vm, usable)?;
        drop(hotplug);
        let mut mem = devices.mem().ok_or(ElasticError::NoDevice("memory"))?;
        mem.set_requested(bytes, usable);
        Ok(())
    }

    /// Asks the guest to put this much into the balloon.
    ///
    /// # Errors
    /// See [`ElasticError`]; nothing is changed.
    pub fn set_balloon(&self, devices: &DeviceSet, mib: u32) -> Result<(), ElasticError> {
        let most = mebibytes(self.base.saturating_add(devices.mem().map_or(0, |mem| mem.requested())));
        if mib > most {
            return Err(ElasticError::TooMuch { wanted: mib, most });
        }
        let mut balloon = devices.balloon().ok_or(ElasticError::NoDevice("balloon"))?;
        balloon.set_target(mib.saturating_mul(PAGES_PER_MIB));
        Ok(())
    }

    /// How much memory there is, and who has it.
    #[must_use]
    pub fn status(&self, devices: &DeviceSet) -> MemoryStatus {
        let mut status = MemoryStatus { base_mib: mebibytes(self.base), ..MemoryStatus::default() };
        if let Some(mem) = devices.mem() {
            status.requested_mib = mebibytes(mem.requested());
            status.plugged_mib = mebibytes(mem.plugged());
            status.returned_bytes += mem.returned();
        }
        if let Some(mut balloon) = devices.balloon() {
            status.balloon_target_mib = balloon.target() / PAGES_PER_MIB;
            status.balloon_mib = balloon.actual() / PAGES_PER_MIB;
            status.returned_bytes += balloon.returned();
            // A corrupt queue is the worker's to find and report.
            status.guest = balloon.figures().ok().flatten();
        }
        status
    }
}

fn mebibytes(bytes: u64) -> u32 {
    u32::try_from(bytes / MIB).unwrap_or(u32::MAX)
}

fn lock(hotplug: &Mutex<Hotplug>) -> std::sync::MutexGuard<'_, Hotplug> {
    hotplug.lock().unwrap_or_else(PoisonError::into_inner)
}
