//! From a configuration to a machine that waits for [`Machine::resume`].
//!
//! ```text
//!  kvm ─▶ memory: new, or the snapshot's ─▶ chips, devices ─▶ vCPUs ─┬▶ kernel loaded, vCPU 0 at its entry ─┬▶ workers,
//!                                                                   └▶ saved state: vCPUs, chips, devices ─┘  threads
//! ```

use std::{
    fs::File,
    io,
    ops::Range,
    os::fd::{FromRawFd, IntoRawFd, OwnedFd},
    sync::Arc,
    time::Instant,
};

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{
    KvmError, Machine,
    devices::{DeviceSet, DeviceSetError},
    elastic::Elastic,
    end::End,
    hotplug::Hotplug,
    memory::{self, MemoryError},
    phases::Phases,
    snapshot::{
        SavedMachine, SavedState,
        format::FormatError,
        image::{Image, ImageError, SavedRegion},
    },
    vcpu::{Shared, Vcpus},
    window,
};
use crate::{
    arch::x86_64::{
        boot::{self, BootError},
        cpuid, layout, mptable, registers,
        state::{Abilities, StateError, restore_tscs},
    },
    bus::{Bus, RangeError},
    config::{Config, StartFiles},
    console::Console,
    devices::{
        i8042::{self, I8042},
        serial::{self, SavedSerial, SerialPort},
    },
    jail::JailError,
    recorder::Recorder,
};

/// KVM_CAP_TSC_DEADLINE_TIMER, which kvm-ioctls does not name.
const CAP_TSC_DEADLINE: std::ffi::c_ulong = 72;

/// Why a machine cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The descriptor is not KVM's, or KVM has another API version.
    #[error("/dev/kvm: API version {0}")]
    Version(i32),
    /// The host's KVM lacks something.
    #[error("KVM has no {0:?}")]
    Capability(Cap),
    /// A KVM operation failed.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// There is no guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A device cannot be made.
    #[error(transparent)]
    Devices(#[from] DeviceSetError),
    /// Two legacy devices want one port.
    #[error("I/O ports: {0}")]
    Ports(#[from] RangeError),
    /// The guest cannot be loaded.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A table could not be written to guest memory.
    #[error("guest memory: {0}")]
    Tables(#[from] vm_memory::GuestMemoryError),
    /// The state file is refused.
    #[error("the state file {0}")]
    State(#[from] FormatError),
    /// The memory file is refused.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The state is of another VMM.
    #[error("the machine was saved by version {saved} of the VMM, this is {}", SavedMachine::VMM)]
    Vmm {
        /// That VMM's version.
        saved: String,
    },
    /// The machine had another number of vCPUs.
    #[error("the machine had {saved} vCPUs, and is to have {configured}")]
    Vcpus {
        /// When it was saved.
        saved: usize,
        /// Now.
        configured: u8,
    },
    /// The machine ran on another processor, or another version of KVM.
    #[error("the machine was saved where CPUID tells guests something else")]
    Processor,
    /// KVM refuses the state of a vCPU or chip.
    #[error("the saved state: {0}")]
    Restore(#[from] StateError),
    /// A thread cannot be confined.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// The process has no descriptor or thread left.
    #[error("{0}")]
    Resources(#[from] io::Error),
}

/// Builds a machine; `started` is when the process began, for its counters. One that is restored waits for
/// what is to be attached, and so does not run before it is told to.
///
/// # Errors
/// The first step that fails.
pub fn build(config: Config, started: Instant) -> Result<Machine, BuildError> {
    let mut phases = Phases::new(started);
    phases.end("configuration");
    let start = Origin::of(config.start)?;
    let console = Arc::new(Console::new(config.console));
    let end = Arc::new(End::new(Arc::clone(&console), Recorder::new(started))?);

    let kvm = check_kvm(config.kvm)?;
    let vm = kvm.create_vm().map_err(KvmError::of("KVM_CREATE_VM"))?;
    let abilities = Abilities::of(&kvm, &vm)?;
    let cpuids = cpuids(&kvm, config.vcpus)?;
    let processor = cpuids.first().map(cpuid::fingerprint).unwrap_or_default();
    phases.end("kvm");

    let plugged = config.devices.region.clone();
    let ranges = layout::memory_ranges(config.memory);
    let memory = match &start {
        Origin::Kernel { .. } => memory::map(&[ranges, plugged.iter().cloned().collect()].concat())?,
        Origin::Saved { state, memory } => {
            check_machine(state, config.vcpus, processor)?;
            let saved = &state.machine.memory;
            let wanted = with_plugged(ranges, plugged.as_ref(), saved);
            let image = Image::new(memory, state.machine.id, saved, &wanted)?;
            memory::restore(&image, plugged.as_ref())?
        }
    };
    let base = memory::without(&memory, plugged.as_ref())?;
    memory::register(&vm, &base)?;
    let hotplug = plugged.map(|plugged| Hotplug::new(&memory, plugged)).transpose()?;
    let elastic = Elastic::new(config.memory, hotplug);
    phases.end("memory");

    create_interrupt_controllers(&vm)?;
    let (ports, serial) = legacy_devices(&vm, &console, &end, start.serial())?;
    let mut mmio = Bus::default();
    let window = config.devices.window.clone().map(|range| window::build(&vm, range)).transpose()?;
    let reachable = match &window {
        Some(window) => window::join(&memory, window)?,
        None => memory.clone(),
    };
    let mut devices = DeviceSet::build(config.devices, &vm, &reachable, window.as_ref(), &mut mmio, &end)?;
    phases.end("devices");

    let vcpus = create_vcpus(&vm, &cpuids)?;
    match start {
        Origin::Kernel { mut kernel, mut initramfs, cmdline } => {
            let cmdline = format!("{cmdline}{}", devices.kernel_parameters());
            let entry = boot::load(&base, &mut kernel, initramfs.as_mut(), cmdline.trim())?;
            mptable::write(&base, config.vcpus)?;
            registers::write_tables(&base)?;
            phases.end("kernel");
            vcpus.iter().zip(0..).try_for_each(|(vcpu, index)| power_on(vcpu, index, entry))?;
        }
        Origin::Saved { state, .. } => {
            restore_tscs(&vcpus, &state.vcpus, &abilities)?;
            for (vcpu, saved) in vcpus.iter().zip(&state.vcpus) {
                saved.restore(vcpu, &abilities)?;
            }
            state.chips.restore(&vm)?;
            phases.end("state");
            // Last, since they raise the interrupts that were pending.
            devices.restore(&state.devices)?;
            elastic.restore(&vm, &devices)?;
        }
    }
    let gate = Arc::default();
    devices.start(&gate)?;
    let shared = Arc::new(Shared::new(ports, mmio, Arc::clone(&end), started, abilities, window));
    let vcpus = Vcpus::start(shared, vcpus, &gate)?;
    gate.wait()?;
    phases.end("ready");
    Ok(Machine {
        name: config.name,
        console,
        end,
        vcpus,
        devices,
        serial,
        memory,
        elastic,
        processor,
        phases,
        vm,
    })
}

/// `ranges`, and what a saved machine has of the region in which memory is plugged: as much as was usable.
fn with_plugged(
    mut ranges: Vec<Range<u64>>,
    plugged: Option<&Range<u64>>,
    saved: &[SavedRegion],
) -> Vec<Range<u64>> {
    if let (Some(plugged), Some(last)) = (plugged, saved.get(ranges.len()))
        && last.addresses.start == plugged.start
        && last.addresses.end <= plugged.end
    {
        ranges.push(last.addresses.clone());
    }
    ranges
}

/// [`StartFiles`], with a saved state read.
enum Origin {
    Kernel { kernel: File, initramfs: Option<File>, cmdline: String },
    Saved { state: Box<SavedState>, memory: File },
}

impl Origin {
    fn of(start: StartFiles) -> Result<Self, FormatError> {
        Ok(match start {
            StartFiles::Boot { kernel, initramfs, cmdline } => Self::Kernel { kernel, initramfs, cmdline },
            StartFiles::Restore { state, memory } => {
                Self::Saved { state: Box::new(SavedState::read(&state)?), memory }
            }
        })
    }

    fn serial(&self) -> Option<&SavedSerial> {
        match self {
            Self::Kernel { .. } => None,
            Self::Saved { state, .. } => Some(&state.serial),
        }
    }
}

/// Whether a saved machine can go on here, memory and devices aside.
fn check_machine(saved: &SavedState, vcpus: u8, processor: [u8; 32]) -> Result<(), BuildError> {
    let SavedMachine { vmm, vcpus: had, processor: of, .. } = &saved.machine;
    if vmm != SavedMachine::VMM {
        return Err(BuildError::Vmm { saved: vmm.clone() });
    }
    if *had != vcpus || saved.vcpus.len() != usize::from(vcpus) {
        return Err(BuildError::Vcpus { saved: saved.vcpus.len(), configured: vcpus });
    }
    if *of != processor {
        return Err(BuildError::Processor);
    }
    Ok(())
}

/// KVM by its descriptor, after a look at what it can do.
fn check_kvm(kvm: OwnedFd) -> Result<Kvm, BuildError> {
    // SAFETY: the descriptor is open, and this is its only owner.
    let kvm = unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) };
    let version = kvm.get_api_version();
    if version != i32::try_from(kvm_bindings::KVM_API_VERSION).unwrap_or(-1) {
        return Err(BuildError::Version(version));
    }
    for capability in [
        Cap::UserMemory,
        Cap::Irqchip,
        Cap::Irqfd,
        Cap::Ioeventfd,
        Cap::Pit2,
        Cap::SetTssAddr,
        Cap::ExtCpuid,
        Cap::ImmediateExit,
    ] {
        if !kvm.check_extension(capability) {
            return Err(BuildError::Capability(capability));
        }
    }
    Ok(kvm)
}

/// PICs, I/O APIC and local APICs in KVM, and the PIT, by which a kernel without ACPI measures time early.
fn create_interrupt_controllers(vm: &VmFd) -> Result<(), KvmError> {
    vm.set_tss_address(layout::TSS).map_err(KvmError::of("KVM_SET_TSS_ADDR"))?;
    vm.create_irq_chip().map_err(KvmError::of("KVM_CREATE_IRQCHIP"))?;
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).map_err(KvmError::of("KVM_CREATE_PIT2"))
}

fn legacy_devices(
    vm: &VmFd,
    console: &Arc<Console>,
    end: &Arc<End>,
    saved: Option<&SavedSerial>,
) -> Result<(Bus, Arc<SerialPort>), BuildError> {
    let mut ports = Bus::default();
    let irqfd = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
    vm.register_irqfd(&irqfd, serial::IRQ).map_err(KvmError::of("KVM_IRQFD"))?;
    let serial = Arc::new(match saved {
        None => SerialPort::new(irqfd, Arc::clone(console)),
        Some(saved) => SerialPort::restore(saved, irqfd, Arc::clone(console))?,
    });
    ports.insert(serial::PORT, serial::PORTS, Arc::<SerialPort>::clone(&serial))?;
    let end = Arc::clone(end);
    ports.insert(i8042::PORT, i8042::PORTS, Arc::new(I8042::new(move || end.guest_reset())))?;
    Ok((ports, serial))
}

/// What CPUID tells each vCPU.
fn cpuids(kvm: &Kvm, count: u8) -> Result<Vec<CpuId>, KvmError> {
    let supported =
        kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(KvmError::of("KVM_GET_SUPPORTED_CPUID"))?;
    let tsc_deadline = kvm.check_extension_raw(CAP_TSC_DEADLINE) > 0;
    Ok((0..count).map(|index| cpuid::for_vcpu(&supported, index, count, tsc_deadline)).collect())
}

fn create_vcpus(vm: &VmFd, cpuids: &[CpuId]) -> Result<Vec<VcpuFd>, KvmError> {
    let create = |(index, cpuid): (u64, &CpuId)| {
        let vcpu = vm.create_vcpu(index).map_err(KvmError::of("KVM_CREATE_VCPU"))?;
        vcpu.set_cpuid2(cpuid).map_err(KvmError::of("KVM_SET_CPUID2"))?;
        Ok(vcpu)
    };
    (0..).zip(cpuids).map(create).collect()
}

/// Brings a vCPU to the state in which the kernel expects it.
fn power_on(vcpu: &VcpuFd, index: u8, entry: GuestAddress) -> Result<(), KvmError> {
    set_msrs(vcpu)?;
    vcpu.set_fpu(&registers::fpu()).map_err(KvmError::of("KVM_SET_FPU"))?;
    let mut lapic = vcpu.get_lapic().map_err(KvmError::of("KVM_GET_LAPIC"))?;
    registers::wire_lapic(&mut lapic);
    vcpu.set_lapic(&lapic).map_err(KvmError::of("KVM_SET_LAPIC"))?;
    if index == 0 {
        let sregs = vcpu.get_sregs().map_err(KvmError::of("KVM_GET_SREGS"))?;
        vcpu.set_sregs(&registers::special(sregs)).map_err(KvmError::of("KVM_SET_SREGS"))?;
        vcpu.set_regs(&registers::general(entry)).map_err(KvmError::of("KVM_SET_REGS"))?;
    }
    Ok(())
}

fn set_msrs(vcpu: &VcpuFd) -> Result<(), KvmError> {
    let Some(msrs) = registers::msr_list() else { return Ok(()) };
    let set = vcpu.set_msrs(&msrs).map_err(KvmError::of("KVM_SET_MSRS"))?;
    if set < msrs.as_slice().len() {
        return Err(KvmError { operation: "KVM_SET_MSRS", source: kvm_ioctls::Error::new(libc::EINVAL) });
    }
    Ok(())
}
