//! Whether `/dev/kvm` is there, and whether it *runs* guests or only interprets them.
//!
//! A nested or emulated machine may have a `/dev/kvm` that opens, makes machines and does everything right,
//! a hundred times too slowly: it interprets each guest instruction. No capability tells, so a tiny guest
//! is timed: in 32-bit mode without paging it counts a register down and halts.

use std::{
    sync::mpsc,
    time::{Duration, Instant},
};

use kvm_bindings::{kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, Kvm, VcpuExit};

use super::Finding;

/// How often the guest counts: two instructions each.
const COUNT: u32 = 100_000;

/// Below this many instructions a second it is interpreted. The slowest hardware does a hundred times
/// more, and an interpreter was seen to do 1.4 million.
const SLOWEST: f64 = 20e6;

/// How often it is timed at least, since the first time is slower: the best counts.
const ROUNDS: usize = 3;

/// For how long it is tried again while it seems too slow: on a host whose CPUs are all busy every round of a
/// millisecond may be cut in two.
const TRY_FOR: Duration = Duration::from_secs(1);

/// How long all of it may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// What a machine with KVM can be.
#[derive(Debug, Clone, PartialEq)]
pub enum Probe {
    /// `/dev/kvm` does not open.
    NoDevice(std::io::ErrorKind, String),
    /// It lacks something.
    Lacking(String),
    /// Something that must work did not.
    Broken(String),
    /// It works, at so many instructions a second.
    Works(f64),
}

/// What the VMM cannot do without.
const NEEDED: [(Cap, &str); 7] = [
    (Cap::UserMemory, "USER_MEMORY"),
    (Cap::Irqchip, "IRQCHIP"),
    (Cap::Irqfd, "IRQFD"),
    (Cap::Ioeventfd, "IOEVENTFD"),
    (Cap::SetTssAddr, "SET_TSS_ADDR"),
    (Cap::ExtCpuid, "EXT_CPUID"),
    (Cap::ImmediateExit, "IMMEDIATE_EXIT"),
];

/// The only version there ever was.
const API_VERSION: i32 = 12;

/// Finds out.
pub fn probe() -> Probe {
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => {
            let error = std::io::Error::from(error);
            return Probe::NoDevice(error.kind(), error.to_string());
        }
    };
    let version = kvm.get_api_version();
    if version != API_VERSION {
        return Probe::Lacking(format!("its API version is {version}, not {API_VERSION}"));
    }
    let missing: Vec<_> = NEEDED
        .iter()
        .filter(|(capability, _)| !kvm.check_extension(*capability))
        .map(|(_, name)| *name)
        .collect();
    if !missing.is_empty() {
        return Probe::Lacking(format!("it lacks {}", missing.join(", ")));
    }
    // In a thread of its own: a guest that never comes back must not take us along.
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let _ = sender.send(best_rate(&kvm));
    });
    match receiver.recv_timeout(PATIENCE) {
        Ok(Ok(rate)) => Probe::Works(rate),
        Ok(Err(error)) => Probe::Broken(error),
        Err(_) => {
            Probe::Broken(format!("a guest of {COUNT} steps did not end within {} s", PATIENCE.as_secs()))
        }
    }
}

/// What a probe means.
pub fn finding(probe: &Probe) -> Finding {
    const NAME: &str = "kvm";
    match probe {
        Probe::NoDevice(std::io::ErrorKind::NotFound, _) => Finding::failed(
            NAME,
            "there is no /dev/kvm",
            "Enable virtualisation (VT-x or AMD-V) in the firmware and load kvm_intel or kvm_amd; in a virtual \
             machine, ask its host for nested virtualisation.",
        ),
        Probe::NoDevice(std::io::ErrorKind::PermissionDenied, error) => Finding::failed(
            NAME,
            format!("/dev/kvm cannot be opened: {error}"),
            "Run as root, or join the group that owns /dev/kvm.",
        ),
        Probe::NoDevice(_, error) => Finding::failed(
            NAME,
            format!("/dev/kvm cannot be opened: {error}"),
            "See the kernel's log for what kvm_intel or kvm_amd says.",
        ),
        Probe::Lacking(what) => Finding::failed(
            NAME,
            format!("/dev/kvm cannot be used: {what}"),
            "Use Linux 5.10 or later on x86-64.",
        ),
        Probe::Broken(what) => Finding::failed(
            NAME,
            format!("/dev/kvm does not run guests: {what}"),
            "In a virtual machine, ask its host for nested virtualisation.",
        ),
        Probe::Works(rate) if *rate < SLOWEST => Finding::failed(
            NAME,
            format!("/dev/kvm only emulates: {:.1} million guest instructions a second", rate / 1e6),
            "Use a machine with hardware virtualisation (bare metal, or nested virtualisation that is not \
             emulated). For development, `cargo xtask host` boots a test host with a true /dev/kvm.",
        ),
        Probe::Works(rate) => {
            Finding::ok(NAME, format!("{:.0} million guest instructions a second", rate / 1e6))
        }
    }
}

/// The guest: `mov ecx, COUNT`, `dec ecx`, `jnz` back to it, `hlt`.
fn program() -> Vec<u8> {
    let mut code = vec![0xB9];
    code.extend(COUNT.to_le_bytes());
    code.extend([0x49, 0x75, 0xFD, 0xF4]);
    code
}

/// A page that a guest may use as its memory.
#[repr(align(4096))]
struct Page([u8; 4096]);

/// Where the guest's page lies.
const ADDRESS: u64 = 0x1000;

/// The first of three pages that old Intel processors want for guests without paging: far from the guest's.
const TSS: usize = 0xFFFB_D000;

fn best_rate(kvm: &Kvm) -> Result<f64, String> {
    let told = |what: &'static str| move |error: kvm_ioctls::Error| format!("{what}: {error}");
    let mut page = Box::new(Page([0; 4096]));
    let code = program();
    page.0[..code.len()].copy_from_slice(&code);
    let vm = kvm.create_vm().map_err(told("KVM_CREATE_VM"))?;
    vm.set_tss_address(TSS).map_err(told("KVM_SET_TSS_ADDR"))?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: ADDRESS,
        memory_size: 4096,
        userspace_addr: std::ptr::from_mut(page.as_mut()) as u64,
    };
    // SAFETY: the region is exactly `page`: a live, page-aligned allocation of 4096 bytes that nothing else
    // uses while the VM is there. `page` is declared before `vm` and the vCPU, so it is dropped after both.
    unsafe { vm.set_user_memory_region(region) }.map_err(told("KVM_SET_USER_MEMORY_REGION"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(told("KVM_CREATE_VCPU"))?;
    let mut sregs = vcpu.get_sregs().map_err(told("KVM_GET_SREGS"))?;
    let flat = |type_: u8, selector: u16| kvm_segment {
        base: 0,
        limit: 0xFFFF_FFFF,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: 1,
        s: 1,
        l: 0,
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    };
    const CODE: u8 = 0xB;
    const DATA: u8 = 0x3;
    const PROTECTED: u64 = 1;
    sregs.cs = flat(CODE, 8);
    for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
        *segment = flat(DATA, 16);
    }
    sregs.cr0 |= PROTECTED;
    vcpu.set_sregs(&sregs).map_err(told("KVM_SET_SREGS"))?;

    let (mut best, begin) = (0_f64, Instant::now());
    for round in 0.. {
        if round >= ROUNDS && (best >= SLOWEST || begin.elapsed() >= TRY_FOR) {
            break;
        }
        let mut registers = vcpu.get_regs().map_err(told("KVM_GET_REGS"))?;
        (registers.rip, registers.rflags) = (ADDRESS, 2);
        vcpu.set_regs(&registers).map_err(told("KVM_SET_REGS"))?;
        let began = Instant::now();
        loop {
            match vcpu.run() {
                Ok(VcpuExit::Hlt) => break,
                Ok(other) => return Err(format!("the guest ended with {other:?}")),
                // A signal: go on.
                Err(error) if error.errno() == libc::EINTR => {}
                Err(error) => return Err(format!("KVM_RUN: {error}")),
            }
        }
        best = best.max(2.0 * f64::from(COUNT) / began.elapsed().as_secs_f64());
        let counter = vcpu.get_regs().map_err(told("KVM_GET_REGS"))?.rcx;
        if counter != 0 {
            return Err(format!("the guest counted down to {counter}, not to 0"));
        }
    }
    Ok(best)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Status;

    #[test]
    fn what_a_probe_means() {
        let io = std::io::ErrorKind::NotFound;
        for (probe, status, words) in [
            (Probe::NoDevice(io, "x".into()), Status::Failed, "there is no /dev/kvm"),
            (Probe::Lacking("it lacks IRQFD".into()), Status::Failed, "it lacks IRQFD"),
            (Probe::Broken("why".into()), Status::Failed, "does not run guests: why"),
            (Probe::Works(1.4e6), Status::Failed, "only emulates: 1.4 million"),
            (Probe::Works(3e9), Status::Ok, "3000 million"),
        ] {
            let finding = finding(&probe);
            assert_eq!((finding.status, finding.remedy.is_some()), (status, status == Status::Failed));
            assert!(finding.detail.contains(words), "{}", finding.detail);
        }
    }
}
