//! The daemon as a whole: version, info, disk usage.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{container, image, is_default};

/// The answer to `GET /version`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Version {
    /// Who makes it.
    pub platform: Platform,
    /// What it is made of; the first is `Engine`.
    pub components: Vec<Component>,
    /// The daemon's version.
    pub version: String,
    /// The highest API version.
    pub api_version: String,
    /// The lowest API version.
    #[serde(rename = "MinAPIVersion")]
    pub min_api_version: String,
    /// The commit it was built from.
    pub git_commit: String,
    /// What clients expect here; empty, since there is no Go.
    pub go_version: String,
    /// `linux`.
    pub os: String,
    /// `amd64`.
    pub arch: String,
    /// The host's.
    #[serde(skip_serializing_if = "String::is_empty", default)]
    pub kernel_version: String,
    /// Whether experimental features are on.
    #[serde(skip_serializing_if = "is_default", default)]
    pub experimental: bool,
    /// When it was built.
    #[serde(skip_serializing_if = "String::is_empty", default)]
    pub build_time: String,
}

/// Who makes it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Platform {
    /// A name.
    pub name: String,
}

/// A part of the daemon in [`Version`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Component {
    /// A name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// Whatever is worth telling.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", default)]
    pub details: BTreeMap<String, String>,
}

/// The answer to `GET /info`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
#[allow(missing_docs, reason = "one for each field of Docker's reference, where they are described")]
pub struct Info {
    #[serde(rename = "ID")]
    pub id: String,
    pub containers: i64,
    pub containers_running: i64,
    pub containers_paused: i64,
    pub containers_stopped: i64,
    pub images: i64,
    pub driver: String,
    pub driver_status: Vec<[String; 2]>,
    pub plugins: Plugins,
    pub memory_limit: bool,
    pub swap_limit: bool,
    pub cpu_cfs_period: bool,
    pub cpu_cfs_quota: bool,
    #[serde(rename = "CPUShares")]
    pub cpu_shares: bool,
    #[serde(rename = "CPUSet")]
    pub cpu_set: bool,
    pub pids_limit: bool,
    #[serde(rename = "IPv4Forwarding")]
    pub ipv4_forwarding: bool,
    pub debug: bool,
    #[serde(rename = "NFd")]
    pub open_files: i64,
    pub oom_kill_disable: bool,
    #[serde(rename = "NGoroutines")]
    pub goroutines: i64,
    pub system_time: String,
    pub logging_driver: String,
    pub cgroup_driver: String,
    #[serde(skip_serializing_if = "String::is_empty", default)]
    pub cgroup_version: String,
    #[serde(rename = "NEventsListener")]
    pub event_listeners: i64,
    pub kernel_version: String,
    pub operating_system: String,
    #[serde(rename = "OSVersion")]
    pub os_version: String,
    #[serde(rename = "OSType")]
    pub os_type: String,
    pub architecture: String,
    pub index_server_address: String,
    pub registry_config: RegistryConfig,
    #[serde(rename = "NCPU")]
    pub cpus: i64,
    pub mem_total: i64,
    pub generic_resources: Option<Vec<super::Empty>>,
    pub docker_root_dir: String,
    pub http_proxy: String,
    pub https_proxy: String,
    pub no_proxy: String,
    pub name: String,
    pub labels: Vec<String>,
    pub experimental_build: bool,
    pub server_version: String,
    pub runtimes: BTreeMap<String, Runtime>,
    pub default_runtime: String,
    pub swarm: Swarm,
    pub live_restore_enabled: bool,
    pub isolation: String,
    pub init_binary: String,
    pub containerd_commit: Commit,
    pub runc_commit: Commit,
    pub init_commit: Commit,
    pub security_options: Vec<String>,
    #[serde(rename = "CDISpecDirs")]
    pub cdi_spec_dirs: Vec<String>,
    pub warnings: Vec<String>,
}

/// The kinds of plugins, by name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Plugins {
    /// Volume drivers.
    pub volume: Vec<String>,
    /// Network drivers.
    pub network: Vec<String>,
    /// Null: there are none.
    pub authorization: Option<Vec<String>>,
    /// Log drivers.
    pub log: Vec<String>,
}

/// Registries, in [`Info`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct RegistryConfig {
    /// Networks whose registries may be reached without TLS.
    #[serde(rename = "InsecureRegistryCIDRs")]
    pub insecure_registry_cidrs: Vec<String>,
    /// By host.
    pub index_configs: BTreeMap<String, IndexInfo>,
    /// Mirrors of Docker Hub.
    pub mirrors: Vec<String>,
}

/// A registry, in [`RegistryConfig`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct IndexInfo {
    /// Its host.
    pub name: String,
    /// Its mirrors.
    pub mirrors: Vec<String>,
    /// With TLS that is verified.
    pub secure: bool,
    /// Docker Hub.
    pub official: bool,
}

/// A runtime, in [`Info`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Runtime {
    /// The executable.
    #[serde(skip_serializing_if = "String::is_empty", default)]
    pub path: String,
}

/// A component's commit, in [`Info`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Commit {
    /// `N/A` for what there is not.
    #[serde(rename = "ID")]
    pub id: String,
    /// What clients before API 1.49 compare with.
    #[serde(rename = "Expected", skip_serializing_if = "String::is_empty", default)]
    pub expected: String,
}

/// Swarm, in [`Info`]: always inactive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
#[allow(missing_docs, reason = "one for each field of Docker's reference, where they are described")]
pub struct Swarm {
    #[serde(rename = "NodeID")]
    pub node_id: String,
    pub node_addr: String,
    pub local_node_state: String,
    pub control_available: bool,
    pub error: String,
    pub remote_managers: Option<Vec<super::Empty>>,
}

impl Default for Swarm {
    fn default() -> Self {
        Self {
            node_id: String::new(),
            node_addr: String::new(),
            local_node_state: "inactive".into(),
            control_available: false,
            error: String::new(),
            remote_managers: None,
        }
    }
}

/// What `GET /system/df` is to count (its repeated parameter `type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the parameter's values")]
pub struct DiskUsageKinds {
    pub containers: bool,
    pub images: bool,
    pub volumes: bool,
    pub build_cache: bool,
}

impl DiskUsageKinds {
    /// Everything: no `type` was given.
    pub const ALL: Self = Self { containers: true, images: true, volumes: true, build_cache: true };
    /// Nothing.
    pub const NONE: Self = Self { containers: false, images: false, volumes: false, build_cache: false };
}

/// The answer to `GET /system/df`. What was not asked for is null.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct DiskUsage {
    /// Bytes of all layers, each counted once.
    pub layers_size: i64,
    /// Images with `SharedSize` and `Containers`.
    pub images: Option<Vec<image::Summary>>,
    /// Containers with `SizeRw` and `SizeRootFs`.
    pub containers: Option<Vec<container::Summary>>,
    /// Volumes with their `UsageData`.
    pub volumes: Option<Vec<super::volume::Volume>>,
    /// There is none yet.
    pub build_cache: Option<Vec<super::Empty>>,
}

/// The body of `POST /auth`; the same as in `X-Registry-Auth`.
#[derive(Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "lowercase")]
pub struct AuthRequest {
    /// The account.
    pub username: String,
    /// Its password.
    pub password: String,
    /// Of no use since long.
    pub email: String,
    /// The registry, empty: Docker Hub.
    #[serde(rename = "serveraddress")]
    pub server_address: String,
    /// A refresh token instead of the password.
    #[serde(rename = "identitytoken")]
    pub identity_token: String,
    /// A bearer token to be used as it is.
    #[serde(rename = "registrytoken")]
    pub registry_token: String,
}
