//! `HostConfig`: what a container gets from its host.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::config::is_empty_map;
use crate::api::types::{is_default, is_empty_list, json::string_or_list, network::PortMap};

/// A container's host config, its resources included. `Option` where Docker tells null from empty.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
#[allow(missing_docs, reason = "one for each field of Docker's reference, where they are described")]
pub struct HostConfig {
    pub binds: Option<Vec<String>>,
    #[serde(rename = "ContainerIDFile")]
    pub container_id_file: String,
    pub log_config: LogConfig,
    pub network_mode: String,
    pub port_bindings: Option<PortMap>,
    pub restart_policy: RestartPolicy,
    pub auto_remove: bool,
    pub volume_driver: String,
    pub volumes_from: Option<Vec<String>>,
    /// Rows, columns.
    pub console_size: [u32; 2],
    #[serde(skip_serializing_if = "is_empty_map")]
    pub annotations: Option<BTreeMap<String, String>>,
    #[serde(deserialize_with = "string_or_list")]
    pub cap_add: Option<Vec<String>>,
    #[serde(deserialize_with = "string_or_list")]
    pub cap_drop: Option<Vec<String>>,
    pub cgroupns_mode: String,
    pub dns: Option<Vec<String>>,
    pub dns_options: Option<Vec<String>>,
    pub dns_search: Option<Vec<String>>,
    pub extra_hosts: Option<Vec<String>>,
    pub group_add: Option<Vec<String>>,
    pub ipc_mode: String,
    pub cgroup: String,
    pub links: Option<Vec<String>>,
    pub oom_score_adj: i64,
    pub pid_mode: String,
    pub privileged: bool,
    pub publish_all_ports: bool,
    pub readonly_rootfs: bool,
    pub security_opt: Option<Vec<String>>,
    #[serde(skip_serializing_if = "is_empty_map")]
    pub storage_opt: Option<BTreeMap<String, String>>,
    #[serde(skip_serializing_if = "is_empty_map")]
    pub tmpfs: Option<BTreeMap<String, String>>,
    #[serde(rename = "UTSMode")]
    pub uts_mode: String,
    pub userns_mode: String,
    /// Bytes, 0: the default of 64 MiB.
    pub shm_size: i64,
    #[serde(skip_serializing_if = "is_empty_map")]
    pub sysctls: Option<BTreeMap<String, String>>,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub runtime: String,
    pub isolation: String,

    // Resources.
    pub cpu_shares: i64,
    /// Bytes.
    pub memory: i64,
    /// Thousand-millionths of a CPU.
    pub nano_cpus: i64,
    pub cgroup_parent: String,
    pub blkio_weight: u16,
    pub blkio_weight_device: Option<Vec<WeightDevice>>,
    pub blkio_device_read_bps: Option<Vec<ThrottleDevice>>,
    pub blkio_device_write_bps: Option<Vec<ThrottleDevice>>,
    #[serde(rename = "BlkioDeviceReadIOps")]
    pub blkio_device_read_iops: Option<Vec<ThrottleDevice>>,
    #[serde(rename = "BlkioDeviceWriteIOps")]
    pub blkio_device_write_iops: Option<Vec<ThrottleDevice>>,
    /// Microseconds.
    pub cpu_period: i64,
    /// Microseconds.
    pub cpu_quota: i64,
    pub cpu_realtime_period: i64,
    pub cpu_realtime_runtime: i64,
    pub cpuset_cpus: String,
    pub cpuset_mems: String,
    pub devices: Option<Vec<DeviceMapping>>,
    pub device_cgroup_rules: Option<Vec<String>>,
    pub device_requests: Option<Vec<DeviceRequest>>,
    #[serde(skip_serializing_if = "is_default")]
    pub kernel_memory: i64,
    #[serde(rename = "KernelMemoryTCP", skip_serializing_if = "is_default")]
    pub kernel_memory_tcp: i64,
    /// Bytes.
    pub memory_reservation: i64,
    /// Bytes of memory and swap, -1: unlimited.
    pub memory_swap: i64,
    pub memory_swappiness: Option<i64>,
    pub oom_kill_disable: Option<bool>,
    /// 0, -1 and null: unlimited.
    pub pids_limit: Option<i64>,
    pub ulimits: Option<Vec<Ulimit>>,
    pub cpu_count: i64,
    pub cpu_percent: i64,
    #[serde(rename = "IOMaximumIOps")]
    pub io_maximum_iops: u64,
    #[serde(rename = "IOMaximumBandwidth")]
    pub io_maximum_bandwidth: u64,

    #[serde(skip_serializing_if = "is_empty_list")]
    pub mounts: Option<Vec<Mount>>,
    /// Null: the default paths; empty: none.
    pub masked_paths: Option<Vec<String>>,
    /// Null: the default paths; empty: none.
    pub readonly_paths: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init: Option<bool>,
}

/// Where a container's output is logged.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct LogConfig {
    /// The driver, empty: the daemon's default.
    #[serde(rename = "Type")]
    pub kind: String,
    /// The driver's options.
    pub config: Option<BTreeMap<String, String>>,
}

/// When an ended container is started again.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct RestartPolicy {
    /// Empty, `no`, `always`, `unless-stopped` or `on-failure`.
    pub name: String,
    /// With `on-failure`; 0: without end.
    pub maximum_retry_count: i64,
}

/// A resource limit of `setrlimit`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct Ulimit {
    /// `nofile` for instance.
    pub name: String,
    /// -1: unlimited.
    pub hard: i64,
    /// -1: unlimited.
    pub soft: i64,
}

/// A block device's weight.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct WeightDevice {
    /// Of the device.
    pub path: String,
    /// 10 to 1000.
    pub weight: u16,
}

/// A block device's rate limit.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct ThrottleDevice {
    /// Of the device.
    pub path: String,
    /// Bytes or operations a second.
    pub rate: u64,
}

/// `--device`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct DeviceMapping {
    /// The node outside.
    pub path_on_host: String,
    /// The node inside.
    pub path_in_container: String,
    /// Of `r`, `w`, `m`.
    pub cgroup_permissions: String,
}

/// `--gpus` and the like.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct DeviceRequest {
    /// Empty: by capability.
    pub driver: String,
    /// -1: all.
    pub count: i64,
    /// By id.
    #[serde(rename = "DeviceIDs")]
    pub device_ids: Option<Vec<String>>,
    /// An OR list of AND lists.
    pub capabilities: Option<Vec<Vec<String>>>,
    /// The driver's options.
    pub options: Option<BTreeMap<String, String>>,
}

/// `--mount`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct Mount {
    /// `bind`, `volume`, `tmpfs`, `image`, `npipe` or `cluster`.
    #[serde(rename = "Type", skip_serializing_if = "String::is_empty")]
    pub kind: String,
    /// A path, a volume's name or an image.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub source: String,
    /// In the container.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub target: String,
    /// Not to be written.
    #[serde(skip_serializing_if = "is_default")]
    pub read_only: bool,
    /// Ignored on Linux.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub consistency: String,
    /// Of a `bind`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bind_options: Option<BindOptions>,
    /// Of a `volume`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub volume_options: Option<VolumeOptions>,
    /// Of an `image`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_options: Option<ImageOptions>,
    /// Of a `tmpfs`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tmpfs_options: Option<TmpfsOptions>,
}

/// Of a `bind` mount.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
#[allow(missing_docs, reason = "one for each field of Docker's reference, where they are described")]
pub struct BindOptions {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub propagation: String,
    #[serde(skip_serializing_if = "is_default")]
    pub non_recursive: bool,
    #[serde(skip_serializing_if = "is_default")]
    pub create_mountpoint: bool,
    #[serde(skip_serializing_if = "is_default")]
    pub read_only_non_recursive: bool,
    #[serde(skip_serializing_if = "is_default")]
    pub read_only_force_recursive: bool,
}

/// Of a `volume` mount.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct VolumeOptions {
    /// Not to copy what the image has there.
    #[serde(skip_serializing_if = "is_default")]
    pub no_copy: bool,
    /// Of a volume made for this mount.
    #[serde(skip_serializing_if = "is_empty_map")]
    pub labels: Option<BTreeMap<String, String>>,
    /// Below the volume's root.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub subpath: String,
    /// Of a volume made for this mount.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub driver_config: Option<DriverConfig>,
}

/// A volume driver with its options.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct DriverConfig {
    /// The driver.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// Its options.
    #[serde(skip_serializing_if = "is_empty_map")]
    pub options: Option<BTreeMap<String, String>>,
}

/// Of an `image` mount.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct ImageOptions {
    /// Below the image's root.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub subpath: String,
}

/// Of a `tmpfs` mount.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct TmpfsOptions {
    /// 0: no limit but the memory's.
    #[serde(skip_serializing_if = "is_default")]
    pub size_bytes: i64,
    /// Permission bits, 0: 01777.
    #[serde(skip_serializing_if = "is_default")]
    pub mode: u32,
    /// `[flag]` or `[name, value]`.
    #[serde(skip_serializing_if = "is_empty_list")]
    pub options: Option<Vec<Vec<String>>>,
}
