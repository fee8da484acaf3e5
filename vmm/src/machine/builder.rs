//! From a configuration to a machine that waits for [`Machine::resume`].

use std::{io, sync::Arc, time::Instant};

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
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
    vcpu::{Shared, Vcpus},
};
use crate::{
    arch::x86_64::{
        boot::{self, BootError},
        cpuid, layout, mptable, registers,
    },
    bus::{Bus, RangeError},
    config::{Config, StartFiles},
    console::Console,
    devices::{
        i8042::{self, I8042},
        serial::{self, SerialPort},
    },
    recorder::Recorder,
};

/// KVM_CAP_TSC_DEADLINE_TIMER, which kvm-ioctls does not name.
const CAP_TSC_DEADLINE: std::ffi::c_ulong = 72;

/// Why a machine cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// /dev/kvm cannot be opened or has another API version.
    #[error("/dev/kvm: {0}")]
    Open(String),
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
    /// The process has no descriptor or thread left.
    #[error("{0}")]
    Resources(#[from] io::Error),
}

/// Builds a machine; `started` is when the process began, for its counters.
///
/// # Errors
/// The first step that fails.
pub fn build(config: Config, started: Instant) -> Result<Machine, BuildError> {
    let console = Arc::new(Console::new(config.console));
    let end = Arc::new(End::new(Arc::clone(&console), Recorder::new(started))?);

    let kvm = open_kvm()?;
    let vm = kvm.create_vm().map_err(KvmError::of("KVM_CREATE_VM"))?;
    let memory = memory::map(&layout::memory_ranges(config.memory))?;
    memory::register(&vm, &memory)?;
    let region = config.devices.region.clone();
    let (all, hotplug) = match region {
        Some(region) => {
            let all = memory::with_region(&memory, &region)?;
            let hotplug = Hotplug::new(&all, region)?;
            (all, Some(hotplug))
        }
        None => (memory.clone(), None),
    };
    create_interrupt_controllers(&vm)?;

    let ports = legacy_devices(&vm, &console, &end)?;
    let mut mmio = Bus::default();
    let devices = DeviceSet::build(config.devices, &vm, &all, &mut mmio, &end)?;

    let StartFiles::Boot { mut kernel, mut initramfs, cmdline } = config.start else {
        return Err(io::Error::from(io::ErrorKind::Unsupported).into());
    };
    let cmdline = format!("{cmdline}{}", devices.kernel_parameters());
    let entry = boot::load(&memory, &mut kernel, initramfs.as_mut(), cmdline.trim())?;
    mptable::write(&memory, config.vcpus)?;
    registers::write_tables(&memory)?;

    let vcpus = create_vcpus(&kvm, &vm, config.vcpus, entry)?;
    let shared = Arc::new(Shared::new(ports, mmio, Arc::clone(&end), started));
    let vcpus = Vcpus::start(shared, vcpus)?;
    Ok(Machine {
        name: config.name,
        console,
        end,
        vcpus,
        devices,
        elastic: Elastic::new(config.memory, hotplug),
        vm,
    })
}

fn open_kvm() -> Result<Kvm, BuildError> {
    let kvm = Kvm::new().map_err(|error| BuildError::Open(error.to_string()))?;
    let version = kvm.get_api_version();
    if version != i32::try_from(kvm_bindings::KVM_API_VERSION).unwrap_or(-1) {
        return Err(BuildError::Open(format!("API version {version}")));
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

fn legacy_devices(vm: &VmFd, console: &Arc<Console>, end: &Arc<End>) -> Result<Bus, BuildError> {
    let mut ports = Bus::default();
    let irqfd = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
    vm.register_irqfd(&irqfd, serial::IRQ).map_err(KvmError::of("KVM_IRQFD"))?;
    let serial = SerialPort::new(irqfd, Arc::clone(console));
    ports.insert(serial::PORT, serial::PORTS, Arc::new(serial))?;
    let end = Arc::clone(end);
    ports.insert(i8042::PORT, i8042::PORTS, Arc::new(I8042::new(move || end.guest_reset())))?;
    Ok(ports)
}

fn create_vcpus(kvm: &Kvm, vm: &VmFd, count: u8, entry: GuestAddress) -> Result<Vec<VcpuFd>, KvmError> {
    let supported =
        kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(KvmError::of("KVM_GET_SUPPORTED_CPUID"))?;
    let tsc_deadline = kvm.check_extension_raw(CAP_TSC_DEADLINE) > 0;
    let create = |index: u8| {
        let vcpu = vm.create_vcpu(u64::from(index)).map_err(KvmError::of("KVM_CREATE_VCPU"))?;
        let cpuid = cpuid::for_vcpu(&supported, index, count, tsc_deadline);
        vcpu.set_cpuid2(&cpuid).map_err(KvmError::of("KVM_SET_CPUID2"))?;
        set_msrs(&vcpu)?;
        vcpu.set_fpu(&registers::fpu()).map_err(KvmError::of("KVM_SET_FPU"))?;
        let mut lapic = vcpu.get_lapic().map_err(KvmError::of("KVM_GET_LAPIC"))?;
        registers::wire_lapic(&mut lapic);
        vcpu.set_lapic(&lapic).map_err(KvmError::of("KVM_SET_LAPIC"))?;
        if index == 0 {
            let sregs = vcpu.get_sregs().map_err(KvmError::of("KVM_GET_SREGS"))?;
            vcpu.set_sregs(&registers::special(sregs)).map_err(KvmError::of("KVM_SET_SREGS"))?;
            vcpu.set_regs(&registers::general(entry)).map_err(KvmError::of("KVM_SET_REGS"))?;
        }
        Ok(vcpu)
    };
    (0..count).map(create).collect()
}

fn set_msrs(vcpu: &VcpuFd) -> Result<(), KvmError> {
    let Some(msrs) = registers::msr_list() else { return Ok(()) };
    let set = vcpu.set_msrs(&msrs).map_err(KvmError::of("KVM_SET_MSRS"))?;
    if set < msrs.as_slice().len() {
        return Err(KvmError { operation: "KVM_SET_MSRS", source: kvm_ioctls::Error::new(libc::EINVAL) });
    }
    Ok(())
}
