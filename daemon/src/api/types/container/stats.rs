//! `GET /containers/{id}/stats`.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::api::types::{Empty, is_default};

/// One sample. Of a container that does not run all is zero but its names.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Stats {
    /// With its `/`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// Its id.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub id: String,
    /// When it was taken.
    pub read: String,
    /// When the sample before it was taken.
    pub preread: String,
    /// Processes.
    pub pids_stats: PidsStats,
    /// Block devices.
    pub blkio_stats: BlkioStats,
    /// Windows only.
    pub num_procs: u32,
    /// Windows only.
    pub storage_stats: Empty,
    /// Processors.
    pub cpu_stats: CpuStats,
    /// Processors, of the sample before.
    pub precpu_stats: CpuStats,
    /// Memory.
    pub memory_stats: MemoryStats,
    /// Interfaces by name; absent without any.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub networks: BTreeMap<String, NetworkStats>,
}

/// The time of a sample that was never taken.
const NEVER: &str = "0001-01-01T00:00:00Z";

impl Stats {
    /// Of a container that does not run.
    #[must_use]
    pub fn empty(id: &str, name: &str) -> Self {
        Self {
            name: format!("/{name}"),
            id: id.to_owned(),
            read: NEVER.into(),
            preread: NEVER.into(),
            pids_stats: PidsStats::default(),
            blkio_stats: BlkioStats::default(),
            num_procs: 0,
            storage_stats: Empty {},
            cpu_stats: CpuStats::default(),
            precpu_stats: CpuStats::default(),
            memory_stats: MemoryStats::default(),
            networks: BTreeMap::new(),
        }
    }

    /// This sample after another.
    #[must_use]
    pub fn after(mut self, before: &Self) -> Self {
        self.preread.clone_from(&before.read);
        self.precpu_stats = before.cpu_stats.clone();
        self
    }
}

/// Processes and threads.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct PidsStats {
    /// Now.
    #[serde(skip_serializing_if = "is_default")]
    pub current: u64,
    /// At most; the greatest number where there is no limit.
    #[serde(skip_serializing_if = "is_default")]
    pub limit: u64,
}

/// Block devices. What cgroup v2 does not tell is null, as in Docker.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[allow(missing_docs, reason = "one for each field of Docker's reference, where they are described")]
pub struct BlkioStats {
    pub io_service_bytes_recursive: Option<Vec<BlkioEntry>>,
    pub io_serviced_recursive: Option<Vec<BlkioEntry>>,
    pub io_queue_recursive: Option<Vec<BlkioEntry>>,
    pub io_service_time_recursive: Option<Vec<BlkioEntry>>,
    pub io_wait_time_recursive: Option<Vec<BlkioEntry>>,
    pub io_merged_recursive: Option<Vec<BlkioEntry>>,
    pub io_time_recursive: Option<Vec<BlkioEntry>>,
    pub sectors_recursive: Option<Vec<BlkioEntry>>,
}

/// One device and direction.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct BlkioEntry {
    /// Of the device number, in the guest.
    pub major: u64,
    /// Of the device number, in the guest.
    pub minor: u64,
    /// `read` or `write`.
    pub op: String,
    /// Bytes or requests.
    pub value: u64,
}

/// Processors. Times are nanoseconds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct CpuStats {
    /// The container's.
    pub cpu_usage: CpuUsage,
    /// All of the host's processors', idle time included.
    #[serde(skip_serializing_if = "is_default")]
    pub system_cpu_usage: u64,
    /// The host's processors.
    #[serde(skip_serializing_if = "is_default")]
    pub online_cpus: u32,
    /// How its quota held it back.
    pub throttling_data: ThrottlingData,
}

/// Processor time of a container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[allow(missing_docs, reason = "one for each field of Docker's reference, where they are described")]
pub struct CpuUsage {
    pub total_usage: u64,
    pub usage_in_kernelmode: u64,
    pub usage_in_usermode: u64,
}

/// How a quota held a container back.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[allow(missing_docs, reason = "one for each field of Docker's reference, where they are described")]
pub struct ThrottlingData {
    pub periods: u64,
    pub throttled_periods: u64,
    pub throttled_time: u64,
}

/// Memory, in bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct MemoryStats {
    /// Now, page cache included.
    #[serde(skip_serializing_if = "is_default")]
    pub usage: u64,
    /// The kernel's figures by name.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub stats: BTreeMap<String, u64>,
    /// How often the limit was hit.
    #[serde(skip_serializing_if = "is_default")]
    pub failcnt: u64,
    /// The limit, or all of the guest's memory.
    #[serde(skip_serializing_if = "is_default")]
    pub limit: u64,
}

/// One interface.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[allow(missing_docs, reason = "one for each field of Docker's reference, where they are described")]
pub struct NetworkStats {
    pub rx_bytes: u64,
    pub rx_packets: u64,
    pub rx_errors: u64,
    pub rx_dropped: u64,
    pub tx_bytes: u64,
    pub tx_packets: u64,
    pub tx_errors: u64,
    pub tx_dropped: u64,
}
