//! What Bulkhead tells of a container's microVM, beyond Docker's API.

use serde::{Deserialize, Serialize};

/// The figures of a container's microVM, `GET /bulkhead/containers/{id}/vmm`. Counters begin with the microVM.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct Machine {
    /// The container's id.
    #[serde(rename = "ID")]
    pub id: String,
    /// The VMM's pid on the host, 0 when none runs.
    pub pid: i32,
    /// Why the last one ended, where it did not in order; empty while one runs.
    pub ended: String,
    /// Whether its vCPUs stand still.
    pub paused: bool,
    /// Microseconds from the VMM's start to its first entry into the guest.
    pub entered_guest_us: u64,
    /// Exits of the guest to the VMM by reason, most frequent first.
    pub exits: Vec<Exits>,
    /// Its virtio devices.
    pub devices: Vec<Device>,
    /// What happened last, oldest first.
    pub recent: Vec<Recorded>,
}

/// Exits for one reason.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct Exits {
    /// The reason.
    pub reason: String,
    /// How many.
    pub count: u64,
}

/// What a device has done.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct Device {
    /// `block0` for instance.
    pub name: String,
    /// Whether its driver uses it.
    pub active: bool,
    /// Queue kicks taken.
    pub kicks: u64,
    /// Interrupts raised.
    pub interrupts: u64,
    /// Resets by the driver.
    pub resets: u64,
    /// Into the guest.
    pub read: Traffic,
    /// Out of the guest.
    pub write: Traffic,
}

/// What has passed in one direction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct Traffic {
    /// Bytes of data.
    pub bytes: u64,
    /// Requests or frames.
    pub operations: u64,
    /// How often something waited for its rate limit.
    pub throttled: u64,
    /// How long in total, in microseconds.
    pub throttled_us: u64,
}

/// An event of the flight recorder.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct Recorded {
    /// Microseconds from the VMM's start.
    pub at_us: u64,
    /// What happened.
    pub text: String,
}
