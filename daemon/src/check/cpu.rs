//! The processor as guests see it, as one name: two hosts of the same name can go on with each other's
//! machines as far as the processor is concerned.

use std::io;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;
use sha2::{Digest, Sha256};

/// Vendor, family, model and features, by what KVM offers to guests. Free of microcode and of the number of
/// the processor that happened to be asked.
///
/// # Errors
/// There is no KVM.
pub fn guest_cpu() -> io::Result<String> {
    let cpuid = Kvm::new()?.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    Ok(name(cpuid.as_slice()))
}

fn name(entries: &[kvm_cpuid_entry2]) -> String {
    let mut entries: Vec<_> = entries.iter().copied().map(impersonal).collect();
    entries.sort_by_key(|entry| (entry.function, entry.index));
    let mut digest = Sha256::new();
    for entry in entries {
        for word in [entry.function, entry.index, entry.flags, entry.eax, entry.ebx, entry.ecx, entry.edx] {
            digest.update(word.to_le_bytes());
        }
    }
    hex::encode(digest.finalize())
}

/// An entry without what tells one processor of a host from another.
fn impersonal(mut entry: kvm_cpuid_entry2) -> kvm_cpuid_entry2 {
    match entry.function {
        // The initial APIC id.
        1 => entry.ebx &= 0x00ff_ffff,
        // The x2APIC id.
        0xb | 0x1f => entry.edx = 0,
        // The size of what is enabled just now.
        0xd if entry.index <= 1 => entry.ebx = 0,
        // The extended APIC id, the core's, the node's.
        0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (0, 0, 0),
        _ => {}
    }
    entry
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, ebx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, ebx, edx: ebx, ..Default::default() }
    }

    #[test]
    fn processors_of_one_host_have_one_name_and_others_another() {
        let host = [entry(1, 0x0102_0304), entry(7, 5)];
        let sibling = [entry(7, 5), entry(1, 0x0902_0304)];
        // The APIC id is in EBX alone; EDX of leaf 1 are features.
        let sibling = sibling.map(|entry| kvm_cpuid_entry2 {
            edx: if entry.function == 1 { 0x0102_0304 } else { entry.edx },
            ..entry
        });
        assert_eq!(name(&host), name(&sibling));
        assert_ne!(name(&host), name(&[entry(1, 0x0102_0304), entry(7, 4)]));
    }
}
