//! How much memory a sandbox gets, and where it comes from.
//!
//! ```text
//!   total = what the workload may use + what the guest's kernel and agent need
//!         = base     there from the first instruction: part of a template's shape, one of two sizes
//!         + plugged  added by virtio-mem before the workload starts, changed while it runs
//!   host  = total + what the VMM needs: the limit of its control group
//! ```
//!
//! The base is not made to measure, so that few templates serve all containers; and the usual container, which
//! has no limit, is all base: nothing is to be plugged when it starts. What of the base is not touched costs
//! the host nothing, what was touched and is free again is given back.

use bulkhead_vmm_api::MEMORY_BLOCK_MIB;

/// The base of a sandbox that needs less than the usual one. Kernel and agent take about a third of it.
const SMALL_MIB: u32 = 128;

/// The largest base: more is plugged.
const LARGE_MIB: u32 = 512;

/// What kernel and agent need in the guest, in MiB. So that a limit of 64 MiB fits the small base.
const GUEST_MIB: u64 = 60;

/// The guest's kernel keeps 64 bytes of account for each page of 4 KiB.
const ACCOUNT: u64 = 63;

/// What a VMM needs besides guest memory, in MiB: its own (3), its threads' stacks, the buffers of vsock and
/// file server at their bounds, and page cache that it causes by reading layers and writing disks, which the
/// kernel takes back when it is needed elsewhere.
const VMM_MIB: u64 = 64;

/// For each so many bytes of guest memory one more for page tables, KVM's and the process's own: 16 bytes for
/// each page of 4 KiB, rounded up.
const PAGE_TABLES: u64 = 128;

/// As much as a VMM takes.
const MAX_MIB: u32 = 512 << 10;

/// The memory of one sandbox, in MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// What it boots with.
    pub base_mib: u32,
    /// What is added.
    pub plugged_mib: u32,
}

impl Memory {
    /// For a workload that may use `limit` bytes; without a limit the guest has `usual_mib` in all. At most
    /// `region_mib` are plugged.
    #[must_use]
    pub fn of(limit: Option<u64>, usual_mib: u32, region_mib: u32) -> Self {
        let total = total_mib(limit, usual_mib);
        let large = usual_mib.clamp(SMALL_MIB, LARGE_MIB);
        Self { base_mib: if total >= large { large } else { total.min(SMALL_MIB) }, plugged_mib: 0 }
            .resized(limit, usual_mib, region_mib)
    }

    /// The same sandbox's for a workload with another limit.
    #[must_use]
    pub fn resized(self, limit: Option<u64>, usual_mib: u32, region_mib: u32) -> Self {
        self.of_total(total_mib(limit, usual_mib), region_mib)
    }

    /// The same sandbox's with so much in all.
    #[must_use]
    pub fn of_total(self, total_mib: u32, region_mib: u32) -> Self {
        let more = total_mib.saturating_sub(self.base_mib);
        let plugged = more.checked_next_multiple_of(MEMORY_BLOCK_MIB).unwrap_or(region_mib);
        Self { plugged_mib: plugged.min(region_mib), ..self }
    }

    /// All of it.
    #[must_use]
    pub fn total_mib(self) -> u32 {
        self.base_mib.saturating_add(self.plugged_mib)
    }

    /// The most that its VMM may take of the host, in bytes: reached only by a guest that uses all it has, and
    /// by one that touches what it was not given.
    #[must_use]
    pub fn host_bytes(self) -> u64 {
        let guest = u64::from(self.total_mib()) << 20;
        guest + guest / PAGE_TABLES + (VMM_MIB << 20)
    }
}

/// What a machine of its own has for a workload that may use `limit` bytes, or for one without a limit.
#[must_use]
pub fn total_mib(limit: Option<u64>, usual_mib: u32) -> u32 {
    let Some(limit) = limit else { return usual_mib };
    let limit = limit.div_ceil(1 << 20);
    let total = limit.saturating_add(limit.div_ceil(ACCOUNT)).saturating_add(GUEST_MIB);
    u32::try_from(total).unwrap_or(MAX_MIB).clamp(SMALL_MIB, MAX_MIB)
}

/// How far a guest's memory can be made to grow on this host: by as much as the host has, in whole GiB. The same
/// for every sandbox, since it is part of a template's shape.
#[must_use]
pub fn region_mib() -> u32 {
    let host = rustix::system::sysinfo();
    region_of(host.totalram.saturating_mul(u64::from(host.mem_unit)))
}

fn region_of(host_bytes: u64) -> u32 {
    let gib = host_bytes.div_ceil(1 << 30).max(1);
    u32::try_from(gib.saturating_mul(1024)).unwrap_or(MAX_MIB).min(MAX_MIB)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn the_usual_container_and_the_least_have_nothing_to_plug() {
        let region = 4096;
        assert_eq!(Memory::of(None, 512, region), Memory { base_mib: 512, plugged_mib: 0 });
        assert_eq!(Memory::of(Some(6 * MIB), 512, region), Memory { base_mib: 128, plugged_mib: 0 });
        assert_eq!(Memory::of(Some(64 * MIB), 512, region), Memory { base_mib: 128, plugged_mib: 0 });
        assert_eq!(Memory::of(None, 64, region), Memory { base_mib: 64, plugged_mib: 0 });
    }

    #[test]
    fn others_have_one_of_two_bases() {
        let region = 4096;
        assert_eq!(Memory::of(Some(256 * MIB + 1), 512, region), Memory { base_mib: 128, plugged_mib: 194 });
        assert_eq!(Memory::of(Some(2048 * MIB), 512, region), Memory { base_mib: 512, plugged_mib: 1630 });
        assert_eq!(Memory::of(None, 4096, region), Memory { base_mib: 512, plugged_mib: 3584 });
        assert_eq!(Memory::of(Some(u64::MAX), 512, region), Memory { base_mib: 512, plugged_mib: region });
    }

    #[test]
    fn a_region_is_the_host_s_memory_in_whole_gibibytes() {
        assert_eq!([0, MIB, 4096 * MIB, 4097 * MIB].map(region_of), [1024, 1024, 4096, 5120]);
        assert_eq!(region_of(u64::MAX), MAX_MIB);
        assert!(region_mib() >= 1024);
    }

    proptest! {
        #[test]
        fn what_a_workload_may_use_is_there(limit in 1..400u64 << 30, usual in 64..4096u32) {
            let memory = Memory::of(Some(limit), usual, MAX_MIB);
            let total = u64::from(memory.total_mib()) * MIB;
            prop_assert!(total >= limit + total / 64 + 48 * MIB, "{memory:?}");
            prop_assert!(memory.plugged_mib.is_multiple_of(MEMORY_BLOCK_MIB));
            prop_assert!([SMALL_MIB, usual.clamp(SMALL_MIB, LARGE_MIB)].contains(&memory.base_mib));
            prop_assert!(memory.host_bytes() > total);
            prop_assert_eq!(memory.resized(Some(limit), usual, MAX_MIB), memory);
            prop_assert_eq!(memory.resized(Some(1), usual, MAX_MIB).base_mib, memory.base_mib);
        }
    }
}
