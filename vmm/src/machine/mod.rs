//! The machine: KVM's VM with its vCPUs, memory and devices. Nothing outside of this module uses KVM.
//!
//! ```text
//!  Config ──builder::build──▶ Machine ──resume──▶ runs ──▶ End (first reason wins) ──▶ control::serve returns
//!                                        ▲    │ pause, attach, status …                      │
//!                                        └────┘ requests of the daemon                       ▼
//!                                                               Machine::stop: vCPUs, then workers drained
//! ```

use std::{fs::File, os::fd::OwnedFd, sync::Arc};

use bulkhead_vmm_api::{LimitedDevice, RateLimits, ShareKind, Status};
use kvm_ioctls::VmFd;

pub mod builder;
pub mod control;
pub mod devices;
pub mod elastic;
pub mod end;
pub mod hotplug;
pub mod memory;
pub mod phases;
pub mod signals;
pub mod snapshot;
pub mod vcpu;
pub mod window;

use devices::{AttachError, DeviceSet};
use elastic::{Elastic, ElasticError};
use end::End;
use phases::Phases;
use snapshot::SnapshotError;
use vcpu::Vcpus;

use crate::{
    console::Console,
    devices::{
        serial::SerialPort,
        virtio::{device::GuestMemory, net::NetIdentity},
    },
};

/// A KVM operation failed.
#[derive(Debug, thiserror::Error)]
#[error("{operation}: {source}")]
pub struct KvmError {
    operation: &'static str,
    source: kvm_ioctls::Error,
}

impl KvmError {
    /// For `map_err`: names the operation.
    fn of(operation: &'static str) -> impl Fn(kvm_ioctls::Error) -> Self {
        move |source| Self { operation, source }
    }
}

/// A built machine.
pub struct Machine {
    name: String,
    console: Arc<Console>,
    end: Arc<End>,
    vcpus: Vcpus,
    devices: DeviceSet,
    elastic: Elastic,
    serial: Arc<SerialPort>,
    memory: GuestMemory,
    /// [`crate::arch::x86_64::cpuid::fingerprint`].
    processor: [u8; 32],
    phases: Phases,
    /// Keeps memory slots, interrupt lines and ioeventfds; dropped last.
    vm: VmFd,
}

impl Machine {
    /// Lets the vCPUs run.
    pub fn resume(&self) {
        self.vcpus.resume();
    }

    /// Stops the vCPUs between two instructions.
    pub fn pause(&self) {
        self.vcpus.pause();
    }

    /// Its state and counters.
    #[must_use]
    pub fn status(&self) -> Status {
        let shared = self.vcpus.shared();
        let entered = shared.entered.get().map_or(0, std::time::Duration::as_micros);
        Status {
            name: self.name.clone(),
            paused: self.vcpus.paused(),
            entered_guest_us: u64::try_from(entered).unwrap_or(u64::MAX),
            phases: self.phases.list(),
            exits: shared.exits.by_frequency(),
            devices: self.devices.figures(),
            memory: self.elastic.status(&self.devices),
        }
    }

    /// How many threads the process has: the vCPUs', the devices', and its first.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.vcpus.count() + self.devices.worker_count() + 1
    }

    /// The guest's console.
    #[must_use]
    pub fn console(&self) -> &Arc<Console> {
        &self.console
    }

    /// The machine's end.
    #[must_use]
    pub fn end(&self) -> &Arc<End> {
        &self.end
    }

    /// Gives a block slot its medium.
    ///
    /// # Errors
    /// There is no such slot, or it refuses the file.
    pub fn attach_disk(&self, id: &str, file: File, read_only: bool) -> Result<(), AttachError> {
        self.devices.attach_disk(id, file, read_only)
    }

    /// Takes a block slot's medium away.
    ///
    /// # Errors
    /// There is no such slot, or it has no medium.
    pub fn detach_disk(&self, id: &str) -> Result<(), AttachError> {
        self.devices.detach_disk(id)
    }

    /// Adds a directory to a virtio-fs device.
    ///
    /// # Errors
    /// There is no such device, or it refuses name or directory.
    pub fn attach_share(
        &self,
        tag: &str,
        name: &str,
        directory: OwnedFd,
        kind: ShareKind,
    ) -> Result<(), AttachError> {
        self.devices.attach_share(tag, name, directory, kind)
    }

    /// Removes a directory from a virtio-fs device.
    ///
    /// # Errors
    /// There is no such device or share.
    pub fn detach_share(&self, tag: &str, name: &str) -> Result<(), AttachError> {
        self.devices.detach_share(tag, name)
    }

    /// Gives a file system device its share server.
    ///
    /// # Errors
    /// There is no such device, or it has a server, or these are not its channel and memory.
    pub fn attach_server(&self, tag: &str, channel: OwnedFd, area: OwnedFd) -> Result<(), AttachError> {
        self.devices.attach_server(tag, channel, area)
    }

    /// Takes a file system device's share server away.
    ///
    /// # Errors
    /// There is no such device, or it has no server.
    pub fn detach_server(&self, tag: &str) -> Result<(), AttachError> {
        self.devices.detach_server(tag)
    }

    /// Gives a network slot its tap.
    ///
    /// # Errors
    /// There is no such slot, or it refuses the descriptor.
    pub fn attach_tap(&self, id: &str, tap: OwnedFd, identity: NetIdentity) -> Result<(), AttachError> {
        self.devices.attach_tap(id, tap, identity)
    }

    /// Takes a network slot's tap away.
    ///
    /// # Errors
    /// There is no such slot, or it has no tap.
    pub fn detach_tap(&self, id: &str) -> Result<(), AttachError> {
        self.devices.detach_tap(id)
    }

    /// Asks the guest to have this much memory, in MiB, beyond what the machine was built with.
    ///
    /// # Errors
    /// It is not possible; nothing is changed.
    pub fn set_memory(&self, plugged_mib: u32) -> Result<(), ElasticError> {
        self.elastic.set_memory(&self.vm, &self.devices, plugged_mib)
    }

    /// Asks the guest to hand this much memory over, in MiB.
    ///
    /// # Errors
    /// It is not possible; nothing is changed.
    pub fn set_balloon(&self, mib: u32) -> Result<(), ElasticError> {
        self.elastic.set_balloon(&self.devices, mib)
    }

    /// Limits what a device moves, from now on.
    ///
    /// # Errors
    /// There is no such device.
    pub fn set_rate_limit(&self, device: &LimitedDevice, limits: RateLimits) -> Result<(), AttachError> {
        self.devices.set_rate_limit(device, limits)
    }

    /// Saves the machine, which is paused and stays so.
    ///
    /// # Errors
    /// See [`SnapshotError`].
    pub fn snapshot(&self, state: File, memory: &File) -> Result<(), SnapshotError> {
        snapshot::save(self, state, memory)
    }

    /// Ends the machine: the vCPUs first, then the devices, which handle what was kicked before. So nothing
    /// is lost that a guest sent just before it powered off.
    pub fn stop(self) {
        let Self { vcpus, devices, .. } = self;
        drop(vcpus);
        drop(devices);
    }
}
