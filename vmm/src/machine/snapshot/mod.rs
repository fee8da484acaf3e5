//! Saving a machine, and what a restore begins from.
//!
//! ```text
//!  paused ─▶ devices are locked ─▶ chips, vCPUs (each on its thread), serial, devices, memory ─▶ unlocked
//!             │ no worker touches guest memory or raises an interrupt from here on
//!             └ what was kicked and not handled stays in its queue: a restore kicks every queue
//! ```
//!
//! An interrupt that a worker raised a moment ago may still be on its way through the kernel when the chips
//! are read. Nothing is lost: a device's interrupt status is saved with it, and raised anew by a restore.
//!
//! * [`format`]: the state file. * [`image`]: the memory file.

use std::{fs::File, io::Write};

use rustix::fs::{OFlags, fcntl_getfl};
use serde::{Deserialize, Serialize};

pub mod format;
pub mod image;

use format::{Decoder, Encoder, FormatError, Section};
use image::{ImageError, SavedRegion, SnapshotId};

use super::{Machine, vcpu::SaveError};
use crate::{
    arch::x86_64::state::{ChipState, StateError, VcpuState},
    devices::{
        serial::SavedSerial,
        virtio::{device::DeviceError, mmio::SavedTransport},
    },
};

/// Why a machine is not saved.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// It runs.
    #[error("the machine is not paused")]
    Running,
    /// A file is not what it should be.
    #[error("the {0} file is not a writable, empty, regular file")]
    File(&'static str),
    /// A vCPU cannot be saved.
    #[error("{0}")]
    Vcpus(#[from] SaveError),
    /// The chips cannot be saved.
    #[error("{0}")]
    Chips(#[from] StateError),
    /// A device cannot be saved.
    #[error("{device}: {source}")]
    Device {
        /// Its name.
        device: String,
        /// Why not.
        source: DeviceError,
    },
    /// The state does not fit its form.
    #[error("the state: {0}")]
    Format(#[from] FormatError),
    /// Memory cannot be saved.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The state file takes no more.
    #[error("the state file: {0}")]
    Write(#[source] std::io::Error),
    /// The host has no entropy for the snapshot's name.
    #[error("the host has no entropy: {0}")]
    Entropy(#[from] getrandom::Error),
}

/// What the machine is, and where its memory lies.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SavedMachine {
    /// The VMM's version: another's devices may understand the same bytes differently.
    pub vmm: String,
    /// Shared with the memory file.
    pub id: SnapshotId,
    /// Number of vCPUs.
    pub vcpus: u8,
    /// [`crate::arch::x86_64::cpuid::fingerprint`].
    pub processor: [u8; 32],
    /// Guest memory in the memory file's order.
    pub memory: Vec<SavedRegion>,
}

impl SavedMachine {
    /// The version that is saved and taken.
    pub const VMM: &'static str = env!("CARGO_PKG_VERSION");
}

/// A virtio device.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SavedDevice {
    /// Its name in reports, `block0` for instance.
    pub name: String,
    /// What requests and the guest know it by: a slot's id, a tag; empty for the others.
    pub label: String,
    /// Registers and state.
    pub transport: SavedTransport,
}

/// Everything in a state file.
#[derive(Debug)]
pub struct SavedState {
    /// What the machine is.
    pub machine: SavedMachine,
    /// Its vCPUs.
    pub vcpus: Vec<VcpuState>,
    /// What KVM keeps for all of them.
    pub chips: ChipState,
    /// The serial port.
    pub serial: SavedSerial,
    /// The virtio devices in bus order.
    pub devices: Vec<SavedDevice>,
}

impl SavedState {
    /// Reads a state file. That its form is right says nothing about what it holds.
    ///
    /// # Errors
    /// The file is refused.
    pub fn read(file: &File) -> Result<Self, FormatError> {
        let bytes = format::read(file)?;
        let mut sections = Decoder::new(&bytes)?;
        let state = Self {
            machine: sections.take(Section::Machine)?,
            vcpus: sections.take_all(Section::Vcpu)?,
            chips: sections.take(Section::Chips)?,
            serial: sections.take(Section::Serial)?,
            devices: sections.take_all(Section::Device)?,
        };
        sections.end()?;
        Ok(state)
    }

    fn encode(&self) -> Result<Vec<u8>, FormatError> {
        let mut file = Encoder::default();
        file.add(Section::Machine, &self.machine)?;
        for vcpu in &self.vcpus {
            file.add(Section::Vcpu, vcpu)?;
        }
        file.add(Section::Chips, &self.chips)?;
        file.add(Section::Serial, &self.serial)?;
        for device in &self.devices {
            file.add(Section::Device, device)?;
        }
        file.finish()
    }
}

/// Saves a paused machine. It stays paused; the files are not synchronised to their disk.
///
/// # Errors
/// See [`SnapshotError`]; the files may then hold anything.
pub fn save(machine: &Machine, mut state: File, memory: &File) -> Result<(), SnapshotError> {
    if !machine.vcpus.paused() {
        return Err(SnapshotError::Running);
    }
    for (name, file) in [("state", &state), ("memory", memory)] {
        if !writable_and_empty(file) {
            return Err(SnapshotError::File(name));
        }
    }
    let mut id = SnapshotId::default();
    getrandom::fill(&mut id)?;

    let devices = machine.devices.freeze();
    let vcpus = machine.vcpus.save()?;
    let saved = SavedState {
        machine: SavedMachine {
            vmm: SavedMachine::VMM.to_owned(),
            id,
            vcpus: u8::try_from(vcpus.len()).unwrap_or(u8::MAX),
            processor: machine.processor,
            memory: image::write(&machine.memory, id, memory)?,
        },
        vcpus,
        chips: ChipState::save(&machine.vm)?,
        serial: machine.serial.save(),
        devices: devices.save()?,
    };
    drop(devices);
    state.write_all(&saved.encode()?).map_err(SnapshotError::Write)
}

fn writable_and_empty(file: &File) -> bool {
    let writable = fcntl_getfl(file).is_ok_and(|flags| {
        flags.intersects(OFlags::WRONLY | OFlags::RDWR) && !flags.contains(OFlags::APPEND)
    });
    writable && file.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.len() == 0)
}
