//! What CPUID tells a vCPU: what KVM can give, less what the guest has no use for, plus its place among the
//! other vCPUs. Nothing is insisted on: a host without XSAVE gives guests without it.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use sha2::{Digest, Sha256};

const FEATURES: u32 = 0x1;
const CACHES_INTEL: u32 = 0x4;
const POWER: u32 = 0x6;
const PERFORMANCE_MONITORING: u32 = 0xa;
const TOPOLOGY: u32 = 0xb;
const TOPOLOGY_V2: u32 = 0x1f;
const AMD_SIZES: u32 = 0x8000_0008;
const AMD_CACHES: u32 = 0x8000_001d;
const AMD_TOPOLOGY: u32 = 0x8000_001e;

const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_HYPER_THREADING: u32 = 1 << 28;
const POWER_APERF_MPERF: u32 = 1;

const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// The CPUID of vCPU `index` of `vcpus`: one socket, a core each.
#[must_use]
pub fn for_vcpu(supported: &CpuId, index: u8, vcpus: u8, tsc_deadline: bool) -> CpuId {
    let mut cpuid = supported.clone();
    let shift = u32::from(vcpus.max(1)).next_power_of_two().trailing_zeros();
    let place = Place { id: u32::from(index), count: u32::from(vcpus), shift };
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            FEATURES => features(entry, &place, tsc_deadline),
            CACHES_INTEL => caches(entry, &place, true),
            AMD_CACHES => caches(entry, &place, false),
            // No turbo, no energy counters: they would measure the host.
            POWER => {
                (entry.eax, entry.ebx) = (0, 0);
                entry.ecx &= !POWER_APERF_MPERF;
            }
            PERFORMANCE_MONITORING => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            TOPOLOGY | TOPOLOGY_V2 => topology(entry, &place),
            AMD_SIZES => entry.ecx = (shift << 12) | (place.count - 1),
            AMD_TOPOLOGY => (entry.eax, entry.ebx, entry.ecx) = (place.id, place.id, 0),
            _ => {}
        }
    }
    cpuid
}

/// A digest of everything that CPUID tells a guest: a saved machine can go on only where it is the same, since a
/// kernel and its programs asked once and rely on the answers.
#[must_use]
pub fn fingerprint(cpuid: &CpuId) -> [u8; 32] {
    let mut digest = Sha256::new();
    for entry in cpuid.as_slice() {
        for word in [entry.function, entry.index, entry.flags, entry.eax, entry.ebx, entry.ecx, entry.edx] {
            digest.update(word.to_le_bytes());
        }
    }
    digest.finalize().into()
}

/// Where a vCPU is: its APIC id, the number of vCPUs, and the bits of an APIC id that tell them apart.
struct Place {
    id: u32,
    count: u32,
    shift: u32,
}

fn features(entry: &mut kvm_cpuid_entry2, place: &Place, tsc_deadline: bool) {
    let logical = 1u32 << place.shift;
    entry.ebx = (entry.ebx & 0xffff) | (place.id << 24) | (logical.min(255) << 16);
    entry.ecx |= ECX_HYPERVISOR;
    if tsc_deadline {
        entry.ecx |= ECX_TSC_DEADLINE;
    }
    if place.count > 1 {
        entry.edx |= EDX_HYPER_THREADING;
    } else {
        entry.edx &= !EDX_HYPER_THREADING;
    }
}

/// Every core has its own first and second level; the third is shared by all.
fn caches(entry: &mut kvm_cpuid_entry2, place: &Place, intel: bool) {
    if entry.eax & 0x1f == 0 {
        return;
    }
    let level = (entry.eax >> 5) & 7;
    let all = (1u32 << place.shift) - 1;
    let sharing = if level >= 3 { all } else { 0 };
    entry.eax = (entry.eax & !(0xfff << 14)) | (sharing << 14);
    if intel {
        entry.eax = (entry.eax & !(0x3f << 26)) | (all.min(0x3f) << 26);
    }
}

fn topology(entry: &mut kvm_cpuid_entry2, place: &Place) {
    let (shift, count, kind) = match entry.index {
        0 => (0, 1, LEVEL_THREAD),
        1 => (place.shift, place.count, LEVEL_CORE),
        _ => (0, 0, 0),
    };
    entry.eax = shift;
    entry.ebx = count;
    entry.ecx = (kind << 8) | (entry.index & 0xff);
    entry.edx = place.id;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax: !0, ebx: !0, ecx: !0, edx: !0, ..Default::default() }
    }

    fn get(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid.as_slice().iter().find(|entry| entry.function == function && entry.index == index).unwrap()
    }

    #[test]
    fn every_vcpu_has_an_id_of_its_own() {
        let host = CpuId::from_entries(&[entry(1, 0), entry(0xb, 0), entry(0xb, 1), entry(0x8000_001e, 0)]);
        let host = host.unwrap();
        for index in 0..3u8 {
            let cpuid = for_vcpu(&host, index, 3, true);
            let id = u32::from(index);
            assert_eq!(get(&cpuid, 1, 0).ebx >> 16, (id << 8) | 4);
            assert_eq!((get(&cpuid, 0xb, 1).eax, get(&cpuid, 0xb, 1).ebx), (2, 3));
            assert_eq!((get(&cpuid, 0xb, 0).ecx, get(&cpuid, 0xb, 1).ecx), (0x100, 0x201));
            assert_eq!(get(&cpuid, 0xb, 0).edx, id);
            assert_eq!(get(&cpuid, 0x8000_001e, 0).eax, id);
        }
    }

    #[test]
    fn a_single_vcpu_has_no_siblings_and_no_counters() {
        let host = CpuId::from_entries(&[entry(1, 0), entry(6, 0), entry(0xa, 0), entry(4, 0)]).unwrap();
        let cpuid = for_vcpu(&host, 0, 1, false);
        assert_eq!(get(&cpuid, 1, 0).edx & EDX_HYPER_THREADING, 0);
        assert_eq!(get(&cpuid, 0xa, 0).eax, 0);
        assert_eq!(get(&cpuid, 6, 0).ecx & 1, 0);
        assert_eq!(get(&cpuid, 4, 0).eax >> 14, 0);
    }

    #[test]
    fn every_word_counts_for_the_fingerprint() {
        let host = CpuId::from_entries(&[entry(1, 0), entry(7, 0)]).unwrap();
        let mut other = host.clone();
        other.as_mut_slice()[1].ebx ^= 1;
        assert_eq!(fingerprint(&host), fingerprint(&host.clone()));
        assert_ne!(fingerprint(&host), fingerprint(&other));
    }

    #[test]
    fn nothing_is_made_up() {
        let host = CpuId::from_entries(&[entry(1, 0)]).unwrap();
        assert_eq!(for_vcpu(&host, 0, 64, true).as_slice().len(), 1);
    }
}
