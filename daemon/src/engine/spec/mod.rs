//! Config + HostConfig + facts → the OCI runtime spec that the guest agent applies. Pure.
//!
//! ```text
//!  create:  request ─merge_image─▶ ─fill─▶ ─validate─▶ stored record (and warnings)
//!  start:   record + Facts ─container─▶ Spec + files
//!  exec:    the container's Spec + exec request ─exec─▶ Process
//! ```
//!
//! Paths, namespaces and limits are the guest's. There is no network namespace: the microVM's network *is*
//! the container's.

mod capabilities;
mod defaults;
mod environment;
mod files;
mod mounts;
mod resources;
mod seccomp;

use std::{
    collections::{BTreeMap, HashSet},
    net::IpAddr,
};

use bulkhead_agent_api::{GROUP_ADD_ANNOTATION, INIT_ANNOTATION, InjectedFile, SharedMemory};
pub(crate) use defaults::check_restart;
pub use defaults::{command, fill, merge_image, validate, validate_daemon};
pub(crate) use mounts::clean_target;
use oci_spec::runtime::{Capability, LinuxCapabilities, Process, Spec};
pub(crate) use resources::updated as updated_resources;
use serde_json::json;

use super::{Error, Result};
use crate::{
    api::types::{
        container::{Config, HostConfig},
        exec,
    },
    config::Config as DaemonConfig,
};

/// The name of the only runtime, in HostConfig and info.
pub const RUNTIME: &str = "bulkhead";

/// Paths that read as empty in a container, unless it says otherwise.
pub const MASKED_PATHS: [&str; 12] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
];

/// Paths that cannot be written in a container, unless it says otherwise.
pub const READONLY_PATHS: [&str; 5] =
    ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Everything that a spec is made of.
#[derive(Debug, Clone, Copy)]
pub struct Facts<'a> {
    /// The container's id, 64 digits.
    pub id: &'a str,
    /// Its config, the image's merged in.
    pub config: &'a Config,
    /// Its host config, filled in.
    pub host: &'a HostConfig,
    /// The host config that says whom it asks for names: its own, or that of the container whose network it has.
    pub names: &'a HostConfig,
    /// The process whose pid namespace it is to have; None: one of its own.
    pub pid_of: Option<i32>,
    /// Whose IPC namespace and shared memory it is to have; None: its own.
    pub ipc_of: Option<&'a IpcDonor>,
    /// The daemon's settings.
    pub daemon: &'a DaemonConfig,
    /// What its networks put into its files.
    pub network: &'a NetworkFacts,
    /// The text of the host's `/etc/resolv.conf`.
    pub resolv_conf: &'a str,
    /// What is mounted of the host: destination, the name of the share, whether read-only.
    pub binds: &'a [(String, String, bool)],
}

/// A container of the same machine, whose IPC others join.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IpcDonor {
    /// Its first process, as the guest numbers it.
    pub process: i32,
    /// What the agent calls it.
    pub guest: String,
}

/// What a container's files say of its networks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NetworkFacts {
    /// Its own addresses.
    pub addresses: Vec<IpAddr>,
    /// Whether names are asked of the agent's resolver: they are the neighbours' too.
    pub resolver: bool,
    /// Whether it has a network at all.
    pub connected: bool,
    /// What `host-gateway` means.
    pub host_gateway: Vec<IpAddr>,
    /// Linked containers' addresses and names.
    pub linked: Vec<(IpAddr, String)>,
    /// Variables that tell of linked containers.
    pub environment: Vec<String>,
}

/// What the agent needs to create a container, besides its root.
#[derive(Debug, Clone, PartialEq)]
pub struct ContainerSpec {
    /// What to apply.
    pub spec: Spec,
    /// What to put over the root.
    pub files: Vec<InjectedFile>,
    /// What it has as `/dev/shm` together with others; None: a tmpfs of the spec's, or none.
    pub shared_memory: Option<SharedMemory>,
}

/// The spec of a container.
///
/// # Errors
/// Those of [`validate`], for a record that was not validated.
pub fn container(facts: &Facts<'_>) -> Result<ContainerSpec> {
    let Facts { id, config, host, names, pid_of, ipc_of, daemon, network, resolv_conf, binds } = *facts;
    let (path, arguments) = command(config)?;
    let args = [vec![path], arguments].concat();
    let capabilities = capabilities::resolve(
        host.cap_add.as_deref().unwrap_or_default(),
        host.cap_drop.as_deref().unwrap_or_default(),
        host.privileged,
    )?;
    let security = parse_security(host)?;
    let hostname = if config.hostname.is_empty() { id.get(..12).unwrap_or(id) } else { &config.hostname };
    let (devices, rules) = resources::devices(host)?;
    let seccomp = if host.privileged { None } else { seccomp::filter(security.seccomp, &capabilities)? };
    let [rows, columns] = host.console_size;
    let namespace = |kind: &str, of: Option<i32>| match of {
        None => json!({ "type": kind }),
        Some(process) => json!({ "type": kind, "path": format!("/proc/{process}/ns/{kind}") }),
    };
    let (pid, ipc) = (namespace("pid", pid_of), namespace("ipc", ipc_of.map(|donor| donor.process)));
    let shared_memory = match ipc_of {
        Some(donor) => Some(SharedMemory::Of(donor.guest.clone())),
        None if host.ipc_mode == "shareable" => Some(SharedMemory::Own(mounts::shm_size(host))),
        None => None,
    };
    let mut spec: Spec = typed(json!({
        "ociVersion": "1.2.0",
        "hostname": hostname,
        "root": { "path": "rootfs", "readonly": host.readonly_rootfs },
        "process": {
            "terminal": config.tty,
            "consoleSize": (config.tty && rows > 0 && columns > 0).then(|| json!({ "height": rows, "width": columns })),
            "user": { "uid": 0, "gid": 0, "username": user(&config.user) },
            "args": args,
            "env": environment::of_container(hostname, config.tty, &network.environment, config.env.as_deref().unwrap_or_default()),
            "cwd": if config.working_dir.is_empty() { "/" } else { &config.working_dir },
            "rlimits": resources::rlimits(host, daemon.ulimits.values())?,
            "noNewPrivileges": security.no_new_privileges.unwrap_or(daemon.no_new_privileges),
            "oomScoreAdj": host.oom_score_adj,
        },
        "mounts": mounts::mounts(host, binds, shared_memory.as_ref().map(|_| id))?,
        "annotations": annotations(host, daemon),
        "linux": {
            "namespaces": [
                { "type": "mount" }, { "type": "uts" }, pid, ipc, { "type": "cgroup" },
            ],
            "cgroupsPath": format!("/{id}"),
            "devices": devices,
            "resources": resources::resources(host, &rules)?,
            "sysctl": sysctls(host),
            "maskedPaths": paths(host.masked_paths.as_ref(), &MASKED_PATHS, host.privileged),
            "readonlyPaths": paths(host.readonly_paths.as_ref(), &READONLY_PATHS, host.privileged),
            "seccomp": seccomp,
        },
    }))?;
    if !config.domainname.is_empty() {
        spec.set_domainname(Some(config.domainname.clone()));
    }
    if let Some(process) = spec.process_mut() {
        process.set_capabilities(Some(capability_sets(&capabilities)?));
    }
    let mut files = files::files(hostname, &config.domainname, names, daemon, network, resolv_conf)?;
    files.push(self::files::machine_id(id));
    Ok(ContainerSpec { spec, files, shared_memory })
}

/// An additional process in the container of `spec`.
///
/// # Errors
/// Invalid: nothing to run, or a directory that is not absolute.
pub fn exec(spec: &Spec, request: &exec::CreateRequest) -> Result<Process> {
    let Some(args) = request.cmd.clone().filter(|args| args.first().is_some_and(|path| !path.is_empty()))
    else {
        return Err(Error::invalid("no exec command specified"));
    };
    if !request.working_dir.is_empty() && !request.working_dir.starts_with('/') {
        return Err(Error::invalid(format!("Cwd must be an absolute path: {}", request.working_dir)));
    }
    let mut process = spec.process().clone().unwrap_or_default();
    let mut env = process.env().clone().unwrap_or_default();
    env.retain(|variable| !variable.starts_with("TERM="));
    if request.tty {
        env.push("TERM=xterm".to_owned());
    }
    let env = environment::merge(env, request.env.iter().flatten());
    if env.iter().chain(&args).any(|text| text.contains('\0')) {
        return Err(Error::invalid("a command or variable contains a NUL byte"));
    }
    process.set_env(Some(env)).set_args(Some(args)).set_terminal(Some(request.tty));
    if !request.working_dir.is_empty() {
        process.set_cwd(request.working_dir.clone().into());
    }
    if !request.user.is_empty() {
        process.user_mut().set_username(Some(request.user.clone()));
    }
    if request.privileged {
        process.set_capabilities(Some(capability_sets(&capabilities::ALL)?));
    }
    let size = request.console_size.filter(|[rows, columns]| request.tty && *rows > 0 && *columns > 0);
    let size = size.map(|[rows, columns]| typed(json!({ "height": rows, "width": columns }))).transpose()?;
    process.set_console_size(size);
    Ok(process)
}

fn typed<T: serde::de::DeserializeOwned>(value: serde_json::Value) -> Result<T> {
    serde_json::from_value(value).map_err(|error| Error::internal(format!("runtime spec: {error}")))
}

/// What the agent resolves in the container's passwd; without a word it is root.
fn user(user: &str) -> &str {
    if user.is_empty() { "0" } else { user }
}

/// As Docker sets them: nothing is inheritable or ambient.
fn capability_sets(names: &[&str]) -> Result<LinuxCapabilities> {
    let set: HashSet<Capability> =
        names.iter().map(|name| seccomp::capability(name)).collect::<Result<_>>()?;
    let mut sets = LinuxCapabilities::default();
    sets.set_bounding(Some(set.clone()))
        .set_permitted(Some(set.clone()))
        .set_effective(Some(set))
        .set_inheritable(None)
        .set_ambient(None);
    Ok(sets)
}

fn paths(own: Option<&Vec<String>>, default: &[&str], privileged: bool) -> Vec<String> {
    match own {
        _ if privileged => Vec::new(),
        Some(own) => own.clone(),
        None => default.iter().map(|path| (*path).to_owned()).collect(),
    }
}

fn sysctls(host: &HostConfig) -> BTreeMap<&str, &str> {
    let mut sysctls = BTreeMap::from([
        ("net.ipv4.ip_unprivileged_port_start", "0"),
        ("net.ipv4.ping_group_range", "0 2147483647"),
    ]);
    sysctls.extend(host.sysctls.iter().flatten().map(|(name, value)| (name.as_str(), value.as_str())));
    sysctls
}

fn annotations(host: &HostConfig, daemon: &DaemonConfig) -> BTreeMap<String, String> {
    // The user's own come first: they cannot replace ours.
    let mut annotations = host.annotations.clone().unwrap_or_default();
    annotations.retain(|name, _| !name.starts_with("org.bulkhead."));
    if host.init.unwrap_or(daemon.init) {
        annotations.insert(INIT_ANNOTATION.to_owned(), "true".to_owned());
    }
    if let Some(groups) = host.group_add.as_ref().filter(|groups| !groups.is_empty()) {
        annotations.insert(GROUP_ADD_ANNOTATION.to_owned(), groups.join(","));
    }
    annotations
}

/// `--security-opt`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Security<'a> {
    no_new_privileges: Option<bool>,
    seccomp: Option<&'a str>,
}

fn parse_security(host: &HostConfig) -> Result<Security<'_>> {
    let mut security = Security::default();
    for option in host.security_opt.iter().flatten() {
        if option == "no-new-privileges" {
            security.no_new_privileges = Some(true);
            continue;
        }
        let wrong = || Error::invalid(format!("invalid --security-opt 1: \"{option}\""));
        let (name, value) = option.split_once('=').or_else(|| option.split_once(':')).ok_or_else(wrong)?;
        match (name, value) {
            ("no-new-privileges", "true" | "false") => security.no_new_privileges = Some(value == "true"),
            ("seccomp", profile) => {
                seccomp::filter(Some(profile), &[])?;
                security.seccomp = Some(profile);
            }
            // (systempaths=unconfined is the client's: it sends empty lists of paths instead.)
            ("apparmor", "" | "unconfined") | ("label", "disable") => {}
            ("writable-cgroups", "false") => {}
            ("apparmor" | "label", value) => {
                return Err(Error::invalid(format!(
                    "--security-opt {name}={value} cannot be honoured: the guest kernel has no such security module"
                )));
            }
            _ => return Err(wrong()),
        }
    }
    Ok(security)
}

#[cfg(test)]
mod tests;
