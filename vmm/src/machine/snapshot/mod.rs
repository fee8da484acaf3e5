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
    entropy,
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
    Entropy(#[source] std::io::Error),
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
        Self::decode(&format::read(file)?)
    }

    /// Decodes a state file's bytes.
    ///
    /// # Errors
    /// They are refused.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut sections = Decoder::new(bytes)?;
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
    entropy::fill(&mut id).map_err(SnapshotError::Entropy)?;

    // Before the devices stop: what is plugged from here on is empty, for the guest stands still.
    let extents = machine.elastic.extents(&machine.devices);
    let devices = machine.devices.freeze();
    let vcpus = machine.vcpus.save()?;
    let saved = SavedState {
        machine: SavedMachine {
            vmm: SavedMachine::VMM.to_owned(),
            id,
            vcpus: u8::try_from(vcpus.len()).unwrap_or(u8::MAX),
            processor: machine.processor,
            memory: image::write(&machine.memory, &extents, id, memory)?,
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

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::{format::tests::framed, *};

    fn machine() -> Vec<u8> {
        let machine = SavedMachine {
            vmm: SavedMachine::VMM.to_owned(),
            id: [1; 16],
            vcpus: 1,
            processor: [2; 32],
            memory: vec![SavedRegion { addresses: 0..4096, runs: Vec::new() }],
        };
        postcard::to_stdvec(&machine).unwrap()
    }

    /// A vCPU, chips and a serial port that are all zero: what KVM's structures lack is filled up with zeroes.
    fn sections() -> Vec<(Section, Vec<u8>)> {
        vec![
            (Section::Machine, machine()),
            (Section::Vcpu, vec![0; 10]),
            (Section::Chips, vec![0; 5]),
            (Section::Serial, vec![0; 9]),
        ]
    }

    #[test]
    fn a_state_is_decoded_and_encoded_again() {
        let bytes = framed(&sections());
        let state = SavedState::decode(&bytes).unwrap();
        assert_eq!((state.vcpus.len(), state.devices.len(), state.machine.vcpus), (1, 0, 1));
        let again = SavedState::decode(&state.encode().unwrap()).unwrap();
        assert_eq!((again.machine.id, again.machine.memory), (state.machine.id, state.machine.memory));
    }

    #[test]
    fn a_state_without_one_of_its_parts_is_refused() {
        for missing in [0, 2, 3] {
            let mut sections = sections();
            sections.remove(missing);
            assert!(SavedState::decode(&framed(&sections)).is_err(), "section {missing}");
        }
        let mut doubled = sections();
        doubled.push((Section::Serial, vec![0; 9]));
        assert!(SavedState::decode(&framed(&doubled)).is_err());
    }

    #[test]
    fn only_an_empty_writable_file_is_written() {
        let mut file = tempfile::tempfile().unwrap();
        assert!(writable_and_empty(&file));
        file.write_all(b"x").unwrap();
        assert!(!writable_and_empty(&file));
        assert!(!writable_and_empty(&File::open("/proc/self/exe").unwrap()));
        assert!(!writable_and_empty(&File::open("/dev/null").unwrap()));
    }

    proptest! {
        #[test]
        fn any_content_under_a_right_checksum_is_decoded_or_refused(
            which in 0..5usize,
            content in vec(any::<u8>(), 0..400),
        ) {
            let mut sections = sections();
            sections.push((Section::Device, Vec::new()));
            if let Some((_, bytes)) = sections.get_mut(which) {
                *bytes = content;
            }
            let _ = SavedState::decode(&framed(&sections));
        }
    }
}
