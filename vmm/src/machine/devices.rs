//! The virtio devices of a machine: each with its window, its interrupt line, an ioeventfd for every queue,
//! and its worker.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bulkhead_vmm_api::{ExitReason, ShareKind};
use kvm_ioctls::{IoEventAddress, VmFd};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{KvmError, end::End};
use crate::{
    arch::x86_64::layout,
    bus::{Bus, BusDevice, RangeError},
    config::Devices,
    devices::virtio::{
        block::Block,
        device::{DeviceError, GuestMemory, Interrupt, VirtioDevice},
        fs::Fs,
        mmio::{self, MmioTransport, SavedTransport, register},
        net::{Net, NetIdentity},
        rng::Rng,
        vsock::Vsock,
        worker::{FailureHandler, Port, Worker},
    },
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

/// All virtio devices of a machine. Their workers end when it is dropped.
pub struct DeviceSet {
    block: Named<Block>,
    fs: Named<Fs>,
    net: Named<Net>,
    /// In bus order.
    transports: Vec<Arc<Mutex<MmioTransport>>>,
    _workers: Vec<Worker>,
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
        bus: &mut Bus,
        end: &Arc<End>,
    ) -> Result<Self, DeviceSetError> {
        let mut assembly = Assembly { vm, memory, bus, end, transports: Vec::new(), workers: Vec::new() };
        let (mut block, mut fs, mut net) = (Named::new(), Named::new(), Named::new());
        for (index, slot) in config.block.into_iter().enumerate() {
            let name = format!("block{index}");
            let device = Block::new(&slot.id).map_err(DeviceSetError::device(&name))?;
            block.insert(slot.id, assembly.add(&name, device)?);
        }
        for (index, slot) in config.fs.into_iter().enumerate() {
            let name = format!("fs{index}");
            let device = Fs::new(&slot.tag).map_err(DeviceSetError::device(&name))?;
            fs.insert(slot.tag, assembly.add(&name, device)?);
        }
        if let Some((cid, listener)) = config.vsock {
            let name = "vsock";
            let device = Vsock::new(cid, listener).map_err(DeviceSetError::device(name))?;
            assembly.add(name, device)?;
        }
        for (index, slot) in config.net.into_iter().enumerate() {
            let name = format!("net{index}");
            let device = Net::new().map_err(DeviceSetError::device(&name))?;
            net.insert(slot.id, assembly.add(&name, device)?);
        }
        if config.rng {
            let name = "rng";
            let device = Rng::new().map_err(DeviceSetError::device(name))?;
            assembly.add(name, device)?;
        }
        Ok(Self { block, fs, net, transports: assembly.transports, _workers: assembly.workers })
    }

    /// What tells the guest's kernel of the devices: ` virtio_mmio.device=<size>@<address>:<irq>` each.
    #[must_use]
    pub fn kernel_parameters(&self) -> String {
        (0..self.transports.len() as u32)
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

    /// The state of every device. The vCPUs are paused.
    pub(super) fn save(&self) -> Result<Vec<(String, SavedTransport)>, DeviceError> {
        let save = |transport: &Arc<Mutex<MmioTransport>>| {
            let transport = transport.lock().unwrap_or_else(PoisonError::into_inner);
            Ok((transport.port().name().to_owned(), transport.save()?))
        };
        self.transports.iter().map(save).collect()
    }
}

fn find<'a, D>(
    kind: &'static str,
    devices: &'a Named<D>,
    name: &str,
) -> Result<MutexGuard<'a, D>, AttachError> {
    let slot = devices.get(name).ok_or_else(|| AttachError::Unknown { kind, name: name.to_owned() })?;
    Ok(slot.port.before_the_worker(&slot.device))
}

/// Devices on their way to the bus.
struct Assembly<'a> {
    vm: &'a VmFd,
    memory: &'a GuestMemory,
    bus: &'a mut Bus,
    end: &'a Arc<End>,
    transports: Vec<Arc<Mutex<MmioTransport>>>,
    workers: Vec<Worker>,
}

impl Assembly<'_> {
    /// Puts a device into the next window.
    fn add<D: VirtioDevice + 'static>(&mut self, name: &str, device: D) -> Result<Slot<D>, DeviceSetError> {
        let index = self.transports.len();
        let irq = layout::VIRTIO_IRQS.clone().nth(index).ok_or(DeviceSetError::TooMany)?;
        let window = layout::virtio_window(index as u32);
        let device = Arc::new(Mutex::new(device));
        let port = self.port(name, Arc::<Mutex<D>>::clone(&device)).map_err(DeviceSetError::device(name))?;
        self.connect(&port, window, irq)
            .map_err(|source| DeviceSetError::Kvm { device: name.to_owned(), source })?;
        let transport = Arc::new(Mutex::new(MmioTransport::new(Arc::clone(&port), self.memory.clone())));
        self.bus
            .insert(window, mmio::WINDOW, Arc::<Mutex<MmioTransport>>::clone(&transport))
            .map_err(|source| DeviceSetError::Window { device: name.to_owned(), source })?;
        self.transports.push(transport);
        self.workers.push(Worker::start(Arc::clone(&port)).map_err(DeviceSetError::device(name))?);
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
