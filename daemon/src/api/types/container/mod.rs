//! Containers: what `create` takes, and what `inspect`, `list` and the rest answer.

mod checkpoint;
mod config;
mod files;
mod host_config;
pub mod stats;

use std::collections::BTreeMap;

pub use checkpoint::{CheckpointRequest, CheckpointSummary, ForkRequest, ForkedContainer};
pub use config::{Config, Healthcheck};
pub use files::{FileChange, PathStat};
pub use host_config::{
    BindOptions, DeviceMapping, DeviceRequest, DriverConfig, HostConfig, ImageOptions, LogConfig, Mount,
    RestartPolicy, ThrottleDevice, TmpfsOptions, Ulimit, VolumeOptions, WeightDevice,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    Empty, is_default, json,
    network::{EndpointSettings, NetworkSettings, NetworkingConfig, PortSummary},
};

/// The body of `POST /containers/create`: a [`Config`] with two more fields.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CreateRequest {
    /// What to run.
    pub config: Config,
    /// What the host gives.
    pub host_config: HostConfig,
    /// Endpoints in networks.
    pub networking_config: NetworkingConfig,
}

impl CreateRequest {
    /// From the request's body, by Go's rules. (No `serde(flatten)`: it would hide the names of the fields
    /// from [`json`].)
    ///
    /// # Errors
    /// It is not JSON, or not of this form; the message names the field.
    pub fn from_slice(body: &[u8]) -> Result<Self, serde_json::Error> {
        #[derive(Default, Deserialize)]
        #[serde(default, rename_all = "PascalCase")]
        struct Rest {
            host_config: HostConfig,
            networking_config: NetworkingConfig,
        }
        let value: Value = serde_json::from_slice(body)?;
        let Rest { host_config, networking_config } = json::from_value(&value)?;
        Ok(Self { config: json::from_value(&value)?, host_config, networking_config })
    }
}

/// The answer to [`CreateRequest`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct CreateResponse {
    /// The container's full id.
    pub id: String,
    /// What will not be quite as asked for; `[]`, never null.
    pub warnings: Vec<String>,
}

/// The answer to `GET /containers/{id}/json`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
#[allow(missing_docs, reason = "one for each field of Docker's reference, where they are described")]
pub struct Inspect {
    pub id: String,
    /// RFC 3339 with nanoseconds.
    pub created: String,
    pub path: String,
    pub args: Vec<String>,
    pub state: State,
    /// The image's id, `sha256:…`.
    pub image: String,
    pub resolv_conf_path: String,
    pub hostname_path: String,
    pub hosts_path: String,
    pub log_path: String,
    /// With a leading `/`.
    pub name: String,
    pub restart_count: i64,
    pub driver: String,
    pub platform: String,
    pub mount_label: String,
    pub process_label: String,
    pub app_armor_profile: String,
    /// Null when there are none.
    #[serde(rename = "ExecIDs")]
    pub exec_ids: Option<Vec<String>>,
    pub host_config: HostConfig,
    pub graph_driver: DriverData,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub size_rw: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub size_root_fs: Option<i64>,
    pub mounts: Vec<MountPoint>,
    pub config: Config,
    pub network_settings: NetworkSettings,
}

/// A container's state. Docker's booleans are derived from one real state when it is rendered.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct State {
    /// `created`, `running`, `paused`, `restarting`, `removing`, `exited` or `dead`.
    pub status: String,
    /// Also true while paused or restarting.
    pub running: bool,
    /// Frozen.
    pub paused: bool,
    /// Waiting to be started again.
    pub restarting: bool,
    /// Whether the OOM killer struck.
    #[serde(rename = "OOMKilled")]
    pub oom_killed: bool,
    /// Could not be removed.
    pub dead: bool,
    /// The process on the host that stands for it, 0 when it does not run.
    pub pid: i64,
    /// Of the last run.
    pub exit_code: i64,
    /// Why the last start failed.
    pub error: String,
    /// RFC 3339 with nanoseconds; `0001-01-01T00:00:00Z`: never.
    pub started_at: String,
    /// Likewise.
    pub finished_at: String,
    /// Only with a health check.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub health: Option<Health>,
}

/// A container's health.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Health {
    /// `starting`, `healthy` or `unhealthy`.
    pub status: String,
    /// Failures in a row.
    pub failing_streak: i64,
    /// The last few checks, oldest first.
    pub log: Vec<HealthcheckResult>,
}

/// One health check.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct HealthcheckResult {
    /// RFC 3339.
    pub start: String,
    /// RFC 3339.
    pub end: String,
    /// 0: healthy.
    pub exit_code: i64,
    /// What it printed, cut.
    pub output: String,
}

/// What a storage driver tells.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct DriverData {
    /// By the driver's own names.
    pub data: Option<BTreeMap<String, String>>,
    /// The driver.
    pub name: String,
}

/// A mount in a container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
#[allow(missing_docs, reason = "one for each field of Docker's reference, where they are described")]
pub struct MountPoint {
    #[serde(rename = "Type", skip_serializing_if = "String::is_empty", default)]
    pub kind: String,
    #[serde(skip_serializing_if = "String::is_empty", default)]
    pub name: String,
    pub source: String,
    pub destination: String,
    #[serde(skip_serializing_if = "String::is_empty", default)]
    pub driver: String,
    pub mode: String,
    #[serde(rename = "RW")]
    pub rw: bool,
    pub propagation: String,
}

/// A container in `GET /containers/json`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Summary {
    /// Full.
    pub id: String,
    /// Each with a leading `/`.
    pub names: Vec<String>,
    /// As the user named it, or its id when that name has gone to another image.
    pub image: String,
    /// `sha256:…`.
    #[serde(rename = "ImageID")]
    pub image_id: String,
    /// Path and arguments in one line.
    pub command: String,
    /// Seconds since the Unix epoch.
    pub created: i64,
    /// Published and exposed ports.
    pub ports: Vec<PortSummary>,
    /// Bytes written, when asked for.
    #[serde(skip_serializing_if = "is_default", default)]
    pub size_rw: i64,
    /// Bytes in all, when asked for.
    #[serde(skip_serializing_if = "is_default", default)]
    pub size_root_fs: i64,
    /// The user's metadata.
    pub labels: BTreeMap<String, String>,
    /// As [`State::status`].
    pub state: String,
    /// For people: `Up 2 minutes`, `Exited (0) 3 hours ago`.
    pub status: String,
    /// A part of it.
    pub host_config: SummaryHostConfig,
    /// A part of them.
    pub network_settings: SummaryNetworkSettings,
    /// Mounts.
    pub mounts: Vec<MountPoint>,
}

/// `HostConfig` in [`Summary`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct SummaryHostConfig {
    /// As in inspect.
    #[serde(skip_serializing_if = "String::is_empty", default)]
    pub network_mode: String,
    /// As in inspect.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", default)]
    pub annotations: BTreeMap<String, String>,
}

/// `NetworkSettings` in [`Summary`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct SummaryNetworkSettings {
    /// By the network's name.
    pub networks: BTreeMap<String, EndpointSettings>,
}

/// The answer to `GET /containers/{id}/top`: rows of strings under titles.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Top {
    /// One row a process.
    pub processes: Vec<Vec<String>>,
    /// One a column.
    pub titles: Vec<String>,
}

/// The answer to `POST /containers/{id}/wait`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct WaitResponse {
    /// Why waiting failed.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub error: Option<WaitError>,
    /// The exit code.
    pub status_code: i64,
}

/// Why waiting failed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct WaitError {
    /// For people.
    pub message: String,
}

/// The answer to `POST /containers/prune`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct PruneResponse {
    /// Full ids; null when there are none.
    pub containers_deleted: Option<Vec<String>>,
    /// Bytes.
    pub space_reclaimed: u64,
}

/// The answer to `POST /containers/{id}/update`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct UpdateResponse {
    /// `[]` or null.
    pub warnings: Option<Vec<String>>,
}

/// A set of strings as Docker writes it.
pub type Set = BTreeMap<String, Empty>;

#[cfg(test)]
mod tests;
