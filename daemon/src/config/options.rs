//! The options as users write them: one struct that the command line and `daemon.json` both fill.

use std::{collections::BTreeMap, path::PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{api::types::container::Ulimit, engine::network::ipam::PoolSpec};

/// Options with dockerd's names, unchecked. In the file, lists have plural names, as dockerd's have; our own
/// may stand under the key `bulkhead`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, clap::Args)]
#[serde(default, rename_all = "kebab-case")]
pub struct Options {
    /// Address to serve the API on: unix://PATH, tcp://HOST:PORT or fd:// (repeatable)
    #[arg(short = 'H', long = "host", value_name = "HOST")]
    pub hosts: Vec<String>,
    /// Directory of images and containers
    #[arg(long, value_name = "DIR")]
    pub data_root: Option<PathBuf>,
    /// Directory of sockets and other run-time state
    #[arg(long, value_name = "DIR")]
    pub exec_root: Option<PathBuf>,
    /// Mirror of Docker Hub (repeatable)
    #[arg(long = "registry-mirror", value_name = "URL")]
    pub registry_mirrors: Vec<String>,
    /// Registry (HOST[:PORT] or CIDR) that needs no TLS (repeatable)
    #[arg(long = "insecure-registry", value_name = "REGISTRY")]
    pub insecure_registries: Vec<String>,
    /// Debug mode
    #[arg(short = 'D', long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub debug: Option<bool>,
    /// Least level that is logged: debug, info, warn, error, fatal
    #[arg(short = 'l', long, value_name = "LEVEL")]
    pub log_level: Option<String>,
    /// Form of the log: text or json
    #[arg(long, value_name = "FORM")]
    pub log_format: Option<String>,
    /// Address, HOST:PORT, to serve metrics on in the clear, and nothing else
    #[arg(long, value_name = "ADDRESS")]
    pub metrics_addr: Option<String>,
    /// Plugin that is asked before every request and every answer (repeatable)
    #[arg(long = "authorization-plugin", value_name = "PLUGIN")]
    pub authorization_plugins: Vec<String>,
    /// File for the daemon's pid
    #[arg(short = 'p', long, value_name = "FILE")]
    pub pidfile: Option<PathBuf>,
    /// Group of Unix sockets
    #[arg(short = 'G', long, value_name = "GROUP")]
    pub group: Option<String>,
    /// Label of the daemon, NAME=VALUE (repeatable)
    #[arg(long = "label", value_name = "LABEL")]
    pub labels: Vec<String>,
    /// Layers fetched at once
    #[arg(long, value_name = "N")]
    pub max_concurrent_downloads: Option<i64>,
    /// Attempts for each layer
    #[arg(long, value_name = "N")]
    pub max_download_attempts: Option<i64>,
    /// Containers' default log driver: json-file, local, syslog, journald or none
    #[arg(long, value_name = "DRIVER")]
    pub log_driver: Option<String>,
    /// Containers' default log options
    #[arg(skip)]
    pub log_opts: Option<BTreeMap<String, String>>,
    /// Run an init in containers
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub init: Option<bool>,
    /// No new privileges for containers
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub no_new_privileges: Option<bool>,
    /// Size of containers' /dev/shm
    #[arg(long, value_name = "SIZE")]
    pub default_shm_size: Option<String>,
    /// Containers' default resource limits
    #[arg(skip)]
    pub default_ulimits: Option<BTreeMap<String, Ulimit>>,
    /// "none": no default bridge network
    #[arg(short = 'b', long, value_name = "BRIDGE")]
    pub bridge: Option<String>,
    /// Address of the default bridge, with its network's prefix
    #[arg(long, value_name = "CIDR")]
    pub bip: Option<String>,
    /// What containers may reach that have no label bulkhead.egress: deny, or allow:TARGET,… (docs/egress.md)
    #[arg(long, value_name = "POLICY")]
    pub egress: Option<String>,
    /// MTU of networks that do not say
    #[arg(long, value_name = "BYTES")]
    pub mtu: Option<u16>,
    /// Block that networks' subnets are cut from, base=CIDR,size=PREFIX (repeatable)
    #[arg(long = "default-address-pool", value_name = "POOL", value_parser = address_pool)]
    pub default_address_pools: Vec<PoolSpec>,
    /// Name server of containers (repeatable)
    #[arg(long, value_name = "ADDRESS")]
    pub dns: Vec<String>,
    /// Option of containers' resolv.conf (repeatable)
    #[arg(long = "dns-opt", value_name = "OPTION")]
    pub dns_opts: Vec<String>,
    /// Search domain of containers (repeatable)
    #[arg(long, value_name = "DOMAIN")]
    pub dns_search: Vec<String>,
    /// TLS on TCP addresses; =false serves them in the clear
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub tls: Option<bool>,
    /// TLS, and only clients with a certificate of the CA's
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub tlsverify: Option<bool>,
    /// Certificates of the clients' CA
    #[arg(long, value_name = "FILE")]
    pub tlscacert: Option<PathBuf>,
    /// The server's certificate
    #[arg(long, value_name = "FILE")]
    pub tlscert: Option<PathBuf>,
    /// The server's private key
    #[arg(long, value_name = "FILE")]
    pub tlskey: Option<PathBuf>,
    /// The VMM's executable
    #[arg(long, value_name = "FILE")]
    pub vmm: Option<PathBuf>,
    /// The guest kernel
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// The guest's initramfs
    #[arg(long, value_name = "FILE")]
    pub initramfs: Option<PathBuf>,
    /// Control group below which each microVM gets its own
    #[arg(long, value_name = "PATH")]
    pub cgroup_parent: Option<String>,
    /// Jail each microVM's process; =false leaves it to the daemon's user and namespaces
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub jail: Option<bool>,
    /// User and group ids for microVMs' processes, FIRST:COUNT
    #[arg(long, value_name = "RANGE")]
    pub jail_uids: Option<String>,
    /// Memory of a microVM whose container has no limit, in MiB
    #[arg(long, value_name = "MIB")]
    pub default_memory_mib: Option<u32>,
    /// vCPUs of a microVM whose container has no limit
    #[arg(long, value_name = "N")]
    pub default_vcpus: Option<u8>,
    /// Guests give up page cache when less than so many percent of the host's memory are available; 0: never
    #[arg(long, value_name = "PERCENT")]
    pub reclaim_below_percent: Option<u8>,
    /// Size of containers' writable layer, in GiB
    #[arg(long, value_name = "GIB")]
    pub default_disk_gib: Option<u32>,
    /// Guests map the large files of layers, as the host has cached them, in so many MiB of addresses; 0: they read them
    #[arg(long, value_name = "MIB")]
    pub layer_window_mib: Option<u32>,
    /// Start microVMs as clones of saved ones; =false boots each
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub templates: Option<bool>,
    /// Label of containers whose value tells tenants apart: templates are not shared between them
    #[arg(long, value_name = "KEY")]
    pub template_domain_label: Option<String>,
}

/// The options' names in the file that are ours alone.
const OURS: [&str; 12] = [
    "vmm",
    "kernel",
    "initramfs",
    "jail",
    "jail-uids",
    "default-memory-mib",
    "default-vcpus",
    "reclaim-below-percent",
    "default-disk-gib",
    "layer-window-mib",
    "templates",
    "template-domain-label",
];

/// `base=10.1.0.0/16,size=24`.
fn address_pool(text: &str) -> Result<PoolSpec, String> {
    let wrong = || format!("{text:?} is not base=CIDR,size=PREFIX");
    let (mut base, mut size) = (None, None);
    for part in text.split(',') {
        match part.split_once('=') {
            Some(("base", value)) => base = value.parse().ok(),
            Some(("size", value)) => size = value.parse().ok(),
            _ => return Err(wrong()),
        }
    }
    PoolSpec::new(base.ok_or_else(wrong)?, size.ok_or_else(wrong)?)
}

/// Flags and the file's text as one. Errors are worded as dockerd's.
pub(super) fn merge(flags: &Options, file: &[u8]) -> Result<Options, String> {
    let mut merged = file_map(file)?;
    let known = map(&Options::default());
    let unknown: Vec<_> = merged.keys().filter(|key| !known.contains_key(*key)).map(String::as_str).collect();
    if !unknown.is_empty() {
        return Err(format!(
            "the following directives don't match any configuration option: {}",
            unknown.join(", ")
        ));
    }
    let mut conflicts = Vec::new();
    for (key, value) in map(flags) {
        let set = match &value {
            Value::Null => false,
            Value::Array(items) => !items.is_empty(),
            _ => true,
        };
        if !set {
            continue;
        }
        if let Some(in_file) = merged.insert(key.clone(), value.clone()) {
            conflicts.push(format!("{key}: (from flag: {}, from file: {})", plain(&value), plain(&in_file)));
        }
    }
    if !conflicts.is_empty() {
        return Err(format!(
            "the following directives are specified both as a flag and in the configuration file: {}",
            conflicts.join(", ")
        ));
    }
    crate::api::types::json::from_value(&Value::Object(merged)).map_err(|error| error.to_string())
}

/// The file's keys, those under `bulkhead` lifted to the top.
fn file_map(text: &[u8]) -> Result<Map<String, Value>, String> {
    let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text).trim_ascii();
    if text.is_empty() {
        return Ok(Map::new());
    }
    let mut keys: Map<String, Value> = serde_json::from_slice(text).map_err(|error| error.to_string())?;
    let ours = match keys.remove("bulkhead") {
        None => return Ok(keys),
        Some(Value::Object(ours)) => ours,
        Some(_) => return Err("bulkhead: must be an object".into()),
    };
    for (key, value) in ours {
        if !OURS.contains(&key.as_str()) {
            return Err(format!(
                "the following directives don't match any configuration option: bulkhead.{key}"
            ));
        }
        if keys.insert(key.clone(), value).is_some() {
            return Err(format!("{key} and bulkhead.{key} must not both be specified in the config file"));
        }
    }
    Ok(keys)
}

fn map(options: &Options) -> Map<String, Value> {
    match serde_json::to_value(options) {
        Ok(Value::Object(map)) => map,
        _ => Map::new(),
    }
}

/// A value as Go's `%v` prints it.
fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(items) => format!("[{}]", items.iter().map(plain).collect::<Vec<_>>().join(" ")),
        other => other.to_string(),
    }
}
