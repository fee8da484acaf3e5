//! The virtio devices of a machine: each with its window, its interrupt line, an ioeventfd for every queue,
//! and its worker.
//!
//! ```text
//!  build ─▶ (restore) ─▶ start: the workers run ─▶ freeze … save … ─▶ they run on
//! ```
//!
//! A restored device must not see a client or a frame before it is what it was, so workers start last.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bulkhead_vmm_api::{DeviceFigures, ExitReason, FsServer, LimitedDevice, RateLimits, ShareKind};
use kvm_ioctls::{IoEventAddress, VmFd};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{
    KvmError,
    end::End,
    snapshot::{SavedDevice, SnapshotError},
};
use crate::{
    arch::x86_64::layout,
    bus::{Bus, BusDevice, RangeError},
    config::Devices,
    devices::virtio::{
        balloon::Balloon,
        block::Block,
        device::{GuestMemory, Interrupt, VirtioDevice},
        fs::{Forward, Fs},
        mem::Mem,
        mmio::{self, MmioTransport, register},
        net::{Net, NetIdentity},
        rng::Rng,
        vsock::Vsock,
        worker::{FailureHandler, Port, Worker},
    },
    jail::gate::Gate,
    seccomp::Kind,
    window::Window,
};

/// Why the devices cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum DeviceSetError {
    /// There are more than interrupt lines.
    #[error("more than {} virtio devices", layout::VIRTIO_IRQS.len())]
    TooMany,
    /// KVM refused an interrupt line or an ioeventfd.
    #[error("{device}: {source}")]
    Kvm {
        /// The device's name.
        device: String,
        /// The cause.
        source: KvmError,
    },
    /// The window is taken.
    #[error("{device}: {source}")]
    Window {
        /// The device's name.
        device: String,
        /// The cause.
        source: RangeError,
    },
    /// The saved machine had other devices.
    #[error("the machine had the devices {saved}, and is to have {configured}")]
    Other {
        /// Names and labels, as saved.
        saved: String,
        /// Names and labels, as configured.
        configured: String,
    },
    /// The device itself, its worker or its descriptors.
    #[error("{device}: {message}")]
    Device {
        /// The device's name.
        device: String,
        /// What happened.
        message: String,
    },
}

impl DeviceSetError {
    fn device<E: std::fmt::Display>(device: &str) -> impl Fn(E) -> Self {
        move |error| Self::Device { device: device.to_owned(), message: error.to_string() }
    }
}

/// Why something cannot be attached or detached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// No device of that kind has that name.
    #[error("no {kind} device {name:?}")]
    Unknown {
        /// `block`, `fs` or `net`.
        kind: &'static str,
        /// The name in the request.
        name: String,
    },
    /// The slot is empty.
    #[error("block device {0:?} has no medium")]
    Empty(String),
    /// The device refuses it.
    #[error("{0}")]
    Refused(String),
}

impl AttachError {
    fn refused(error: impl std::fmt::Display) -> Self {
        Self::Refused(error.to_string())
    }
}

/// The devices of one kind by the name that requests use.
type Named<D> = BTreeMap<String, Slot<D>>;

/// A device, and the port through which others use it.
struct Slot<D> {
    device: Arc<Mutex<D>>,
    port: Arc<Port>,
}

impl<D> Slot<D> {
    /// The device; its worker lets it go first.
    fn lock(&self) -> MutexGuard<'_, D> {
        self.port.before_the_worker(&self.device)
    }
}

/// All virtio devices of a machine. Their workers end when it is dropped.
pub struct DeviceSet {
    block: Named<Block>,
    fs: Named<Fs>,
    forward: Named<Forward>,
    net: Named<Net>,
    balloon: Option<Slot<Balloon>>,
    mem: Option<Slot<Mem>>,
    /// In bus order.
    members: Vec<Member>,
    workers: Vec<Worker>,
}

/// A device on the bus.
struct Member {
    /// What requests and the guest know it by; empty where its name says it all.
    label: String,
    port: Arc<Port>,
    transport: Arc<Mutex<MmioTransport>>,
}

/// Devices whose workers and transports wait until this is dropped.
pub(super) struct Frozen<'a> {
    members: Vec<(&'a Member, MutexGuard<'a, MmioTransport>, MutexGuard<'a, dyn VirtioDevice + 'static>)>,
}

impl Frozen<'_> {
    /// The state of every device.
    pub(super) fn save(&self) -> Result<Vec<SavedDevice>, SnapshotError> {
        let save = |(member, transport, device): &(&Member, MutexGuard<'_, MmioTransport>, _)| {
            let device: &MutexGuard<'_, dyn VirtioDevice> = device;
            let name = member.port.name().to_owned();
            match transport.save_locked(&**device) {
                Ok(transport) => Ok(SavedDevice { name, label: member.label.clone(), transport }),
                Err(source) => Err(SnapshotError::Device { device: name, source }),
            }
        };
        self.members.iter().map(save).collect()
    }
}

impl DeviceSet {
    /// Makes every device and puts it on the bus; the order is that of the kernel's names (vda, eth0).
    ///
    /// # Errors
    /// See [`DeviceSetError`].
    pub fn build(
        config: Devices,
        vm: &VmFd,
        memory: &GuestMemory,
        window: Option<&Arc<Window>>,
        bus: &mut Bus,
        end: &Arc<End>,
    ) -> Result<Self, DeviceSetError> {
        let mut assembly = Assembly { vm, memory, bus, end, members: Vec::new() };
        let (mut block, mut fs, mut net) = (Named::new(), Named::new(), Named::new());
        let mut forward = Named::new();
        for (index, slot) in config.block.into_iter().enumerate() {
            let name = format!("block{index}");
            let device = Block::new(&slot.id).map_err(DeviceSetError::device(&name))?;
            let added = assembly.add(&name, &slot.id, device.late(slot.late))?;
            block.insert(slot.id, added);
        }
        for (index, slot) in config.fs.into_iter().enumerate() {
            let name = format!("fs{index}");
            match slot.server {
                FsServer::Vmm => {
                    let device = Fs::new(&slot.tag).map_err(DeviceSetError::device(&name))?;
                    // The configuration has been checked: one device has one.
                    let device = device.with_window(window.filter(|_| slot.window_mib > 0).cloned());
                    let added = assembly.add(&name, &slot.tag, device)?;
                    fs.insert(slot.tag, added);
                }
                FsServer::Process => {
                    let device = Forward::new(&slot.tag).map_err(DeviceSetError::device(&name))?;
                    let added = assembly.add(&name, &slot.tag, device.late(slot.late))?;
                    forward.insert(slot.tag, added);
                }
            }
        }
        if let Some((cid, listener)) = config.vsock {
            let name = "vsock";
            let device = Vsock::new(cid, listener).map_err(DeviceSetError::device(name))?;
            assembly.add(name, "", device)?;
        }
        for (index, slot) in config.net.into_iter().enumerate() {
            let name = format!("net{index}");
            let device = Net::new().map_err(DeviceSetError::device(&name))?;
            let added = assembly.add(&name, &slot.id, device)?;
            net.insert(slot.id, added);
        }
        if config.rng {
            let name = "rng";
            let device = Rng::new().map_err(DeviceSetError::device(name))?;
            assembly.add(name, "", device)?;
        }
        let balloon = if config.balloon {
            let name = "balloon";
            let device = Balloon::new().map_err(DeviceSetError::device(name))?;
            Some(assembly.add(name, "", device)?)
        } else {
            None
        };
        let mem = if let Some(region) = config.region {
            let name = "mem";
            let device = Mem::new(region.start, region.end - region.start);
            Some(assembly.add(name, "", device.map_err(DeviceSetError::device(name))?)?)
        } else {
            None
        };
        let (members, workers) = (assembly.members, Vec::new());
        Ok(Self { block, fs, forward, net, balloon, mem, members, workers })
    }

    /// What tells the guest's kernel of the devices: ` virtio_mmio.device=<size>@<address>:<irq>` each.
    #[must_use]
    pub fn kernel_parameters(&self) -> String {
        (0..self.members.len() as u32)
            .zip(layout::VIRTIO_IRQS)
            .map(|(index, irq)| format!(" virtio_mmio.device=4K@{:#x}:{irq}", layout::virtio_window(index)))
            .collect()
    }

    /// See [`super::Machine::attach_disk`].
    pub(super) fn attach_disk(&self, id: &str, file: File, read_only: bool) -> Result<(), AttachError> {
        find("block", &self.block, id)?.attach(file, read_only).map_err(AttachError::refused)
    }

    /// See [`super::Machine::detach_disk`].
    pub(super) fn detach_disk(&self, id: &str) -> Result<(), AttachError> {
        let medium = find("block", &self.block, id)?.detach();
        medium.map(drop).ok_or_else(|| AttachError::Empty(id.to_owned()))
    }

    /// See [`super::Machine::attach_share`].
    pub(super) fn attach_share(
        &self,
        tag: &str,
        name: &str,
        directory: OwnedFd,
        kind: ShareKind,
    ) -> Result<(), AttachError> {
        find("fs", &self.fs, tag)?.attach_share(name, directory, kind).map_err(AttachError::refused)
    }

    /// See [`super::Machine::detach_share`].
    pub(super) fn detach_share(&self, tag: &str, name: &str) -> Result<(), AttachError> {
        find("fs", &self.fs, tag)?.detach_share(name).map_err(AttachError::refused)
    }

    /// See [`super::Machine::attach_server`].
    pub(super) fn attach_server(
        &self,
        tag: &str,
        channel: OwnedFd,
        area: OwnedFd,
    ) -> Result<(), AttachError> {
        find("fs", &self.forward, tag)?.attach(channel, area).map_err(AttachError::refused)
    }

    /// See [`super::Machine::detach_server`].
    pub(super) fn detach_server(&self, tag: &str) -> Result<(), AttachError> {
        if find("fs", &self.forward, tag)?.detach() {
            Ok(())
        } else {
            Err(AttachError::Refused(format!("file system device {tag:?} has no server")))
        }
    }

    /// See [`super::Machine::attach_tap`].
    pub(super) fn attach_tap(
        &self,
        id: &str,
        tap: OwnedFd,
        identity: NetIdentity,
    ) -> Result<(), AttachError> {
        find("net", &self.net, id)?.attach(tap, identity).map_err(AttachError::refused)
    }

    /// See [`super::Machine::detach_tap`].
    pub(super) fn detach_tap(&self, id: &str) -> Result<(), AttachError> {
        if find("net", &self.net, id)?.detach() {
            Ok(())
        } else {
            Err(AttachError::Refused(format!("net device {id:?} has no tap")))
        }
    }

    /// The balloon, where there is one.
    pub(super) fn balloon(&self) -> Option<MutexGuard<'_, Balloon>> {
        self.balloon.as_ref().map(Slot::lock)
    }

    /// The memory device, where there is one.
    pub(super) fn mem(&self) -> Option<MutexGuard<'_, Mem>> {
        self.mem.as_ref().map(Slot::lock)
    }

    /// See [`super::Machine::set_rate_limit`].
    pub(super) fn set_rate_limit(
        &self,
        device: &LimitedDevice,
        limits: RateLimits,
    ) -> Result<(), AttachError> {
        match device {
            LimitedDevice::Block { id } => find("block", &self.block, id)?.limit(limits),
            LimitedDevice::Net { id } => find("net", &self.net, id)?.limit(limits),
        }
        Ok(())
    }

    /// What each device has done, in bus order.
    pub(super) fn figures(&self) -> Vec<DeviceFigures> {
        self.members.iter().map(|member| member.port.figures()).collect()
    }

    /// Brings the devices, whose workers have not started, to their saved states.
    ///
    /// # Errors
    /// They are others, or one refuses its state.
    pub(super) fn restore(&self, saved: &[SavedDevice]) -> Result<(), DeviceSetError> {
        let name = |name: &str, label: &str| {
            if label.is_empty() { name.into() } else { format!("{name} ({label})") }
        };
        let configured: Vec<String> =
            self.members.iter().map(|member| name(member.port.name(), &member.label)).collect();
        let were: Vec<String> = saved.iter().map(|saved| name(&saved.name, &saved.label)).collect();
        if were != configured {
            return Err(DeviceSetError::Other { saved: were.join(", "), configured: configured.join(", ") });
        }
        for (member, saved) in self.members.iter().zip(saved) {
            let mut transport = member.transport.lock().unwrap_or_else(PoisonError::into_inner);
            transport.restore(&saved.transport).map_err(DeviceSetError::device(member.port.name()))?;
        }
        Ok(())
    }

    /// How many workers were started.
    pub(super) fn worker_count(&self) -> usize {
        self.workers.len()
    }

    /// Starts the workers, each of which has to pass the gate.
    ///
    /// # Errors
    /// There is no thread or descriptor left.
    pub(super) fn start(&mut self, gate: &Arc<Gate>) -> Result<(), DeviceSetError> {
        for member in &self.members {
            let pass = gate.pass(Kind::worker(member.port.device().device_type()));
            let worker = Worker::start(Arc::clone(&member.port), pass);
            self.workers.push(worker.map_err(DeviceSetError::device(member.port.name()))?);
        }
        Ok(())
    }

    /// Keeps the workers from working, and so guest memory and interrupt lines as they are. The vCPUs are
    /// paused.
    pub(super) fn freeze(&self) -> Frozen<'_> {
        let members = self.members.iter().map(|member| {
            // In the order of the vCPUs' accesses: the transport, then its device.
            let transport = member.transport.lock().unwrap_or_else(PoisonError::into_inner);
            (member, transport, member.port.device())
        });
        Frozen { members: members.collect() }
    }
}

fn find<'a, D>(
    kind: &'static str,
    devices: &'a Named<D>,
    name: &str,
) -> Result<MutexGuard<'a, D>, AttachError> {
    let slot = devices.get(name).ok_or_else(|| AttachError::Unknown { kind, name: name.to_owned() })?;
    Ok(slot.lock())
}

/// Devices on their way to the bus.
struct Assembly<'a> {
    vm: &'a VmFd,
    memory: &'a GuestMemory,
    bus: &'a mut Bus,
    end: &'a Arc<End>,
    members: Vec<Member>,
}

impl Assembly<'_> {
    /// Puts a device into the next window.
    fn add<D: VirtioDevice + 'static>(
        &mut self,
        name: &str,
        label: &str,
        device: D,
    ) -> Result<Slot<D>, DeviceSetError> {
        let index = self.members.len();
        let irq = layout::VIRTIO_IRQS.clone().nth(index).ok_or(DeviceSetError::TooMany)?;
        let window = layout::virtio_window(index as u32);
        let device = Arc::new(Mutex::new(device));
        let port = self.port(name, Arc::<Mutex<D>>::clone(&device)).map_err(DeviceSetError::device(name))?;
        port.place().join(self.end.recorder(), name);
        self.connect(&port, window, irq)
            .map_err(|source| DeviceSetError::Kvm { device: name.to_owned(), source })?;
        let transport = Arc::new(Mutex::new(MmioTransport::new(Arc::clone(&port), self.memory.clone())));
        self.bus
            .insert(window, mmio::WINDOW, Arc::<Mutex<MmioTransport>>::clone(&transport))
            .map_err(|source| DeviceSetError::Window { device: name.to_owned(), source })?;
        self.members.push(Member { label: label.to_owned(), port: Arc::clone(&port), transport });
        Ok(Slot { device, port })
    }

    fn port(&self, name: &str, device: Arc<Mutex<dyn VirtioDevice>>) -> io::Result<Arc<Port>> {
        let interrupt = Arc::new(Interrupt::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?));
        let end = Arc::clone(self.end);
        let on_failure: FailureHandler = Arc::new(move |device, error| {
            end.report(ExitReason::Device { device: device.to_owned(), message: error.to_string() });
        });
        Port::new(name.to_owned(), device, interrupt, on_failure).map(Arc::new)
    }

    /// Lets KVM kick the worker and interrupt the guest without a word to the VMM.
    fn connect(&self, port: &Port, window: u64, irq: u32) -> Result<(), KvmError> {
        self.vm.register_irqfd(port.interrupt().irqfd(), irq).map_err(KvmError::of("KVM_IRQFD"))?;
        let notify = IoEventAddress::Mmio(window + register::QUEUE_NOTIFY);
        for (queue, kick) in (0u32..).zip(port.kicks()) {
            self.vm.register_ioevent(kick, &notify, queue).map_err(KvmError::of("KVM_IOEVENTFD"))?;
        }
        // Nobody reads it, and KVM keeps it: this way a write that says nothing new ends in the kernel.
        let nobody = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
            .map_err(|error| KvmError { operation: "eventfd", source: error.into() })?;
        let acknowledge = IoEventAddress::Mmio(window + register::INTERRUPT_ACK);
        self.vm
            .register_ioevent(&nobody, &acknowledge, Interrupt::SILENT)
            .map_err(KvmError::of("KVM_IOEVENTFD"))?;
        Ok(())
    }
}

impl BusDevice for Mutex<MmioTransport> {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
    }
}
