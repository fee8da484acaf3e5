//! The machine: KVM's VM with its vCPUs, memory and devices. Nothing outside of this module uses KVM.
//!
//! ```text
//!  Config ──builder::build──▶ Machine ──resume──▶ runs ──▶ End (first reason wins) ──▶ control::serve returns
//!                                        ▲    │ pause, attach, status …                      │
//!                                        └────┘ requests of the daemon                       ▼
//!                                                               Machine::stop: vCPUs, then workers drained
//! ```

use std::{fs::File, os::fd::OwnedFd, sync::Arc};

use bulkhead_vmm_api::{ShareKind, Status};
use kvm_ioctls::VmFd;

pub mod builder;
pub mod control;
pub mod devices;
pub mod end;
pub mod memory;
pub mod signals;
pub mod vcpu;

use devices::{AttachError, DeviceSet};
use end::End;
use vcpu::Vcpus;

use crate::{
    console::Console,
    devices::virtio::{device::DeviceError, mmio::SavedTransport, net::NetIdentity},
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
    /// Keeps memory slots, interrupt lines and ioeventfds; dropped last.
    _vm: VmFd,
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
            exits: shared.exits.by_frequency(),
        }
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

    /// The state of every virtio device by name, in bus order. The vCPUs are paused for it if they are not,
    /// and stay so.
    ///
    /// # Errors
    /// A device is in a state that cannot be saved.
    pub fn save_devices(&self) -> Result<Vec<(String, SavedTransport)>, DeviceError> {
        self.pause();
        self.devices.save()
    }

    /// Ends the machine: the vCPUs first, then the devices, which handle what was kicked before. So nothing
    /// is lost that a guest sent just before it powered off.
    pub fn stop(self) {
        let Self { vcpus, devices, .. } = self;
        drop(vcpus);
        drop(devices);
    }
}
