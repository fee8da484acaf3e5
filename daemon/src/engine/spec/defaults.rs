//! What `create` makes of a request before it is stored: the image's config merged in, defaults filled in,
//! and everything refused that cannot be honoured.

use std::{collections::BTreeMap, net::IpAddr};

use super::{files, mounts, parse_security};
use crate::{
    api::types::container::{Config, CreateRequest, Healthcheck, HostConfig},
    config::Config as DaemonConfig,
    engine::{
        Error, Result,
        container::{health, signal},
        logs,
    },
};

/// Fills what the user left open from the image's config, by Docker's rules.
pub fn merge_image(config: &mut Config, image: &Config) {
    if config.user.is_empty() {
        config.user.clone_from(&image.user);
    }
    merge_maps(&mut config.exposed_ports, image.exposed_ports.as_ref());
    merge_maps(&mut config.volumes, image.volumes.as_ref());
    let mut labels = image.labels.clone().unwrap_or_default();
    labels.extend(config.labels.take().unwrap_or_default());
    config.labels = Some(labels);

    let env = config.env.get_or_insert_default();
    for variable in image.env.iter().flatten() {
        let name = variable.split('=').next();
        if !env.iter().any(|have| have.split('=').next() == name) {
            env.push(variable.clone());
        }
    }
    // A new entry point drops the image's command; an empty one drops both.
    if config.entrypoint.as_ref().is_none_or(Vec::is_empty) {
        if config.cmd.as_ref().is_none_or(Vec::is_empty) {
            config.cmd.clone_from(&image.cmd);
        }
        if config.entrypoint.is_none() {
            config.entrypoint.clone_from(&image.entrypoint);
        }
    } else if config
        .entrypoint
        .as_deref()
        .is_some_and(|entrypoint| matches!(entrypoint, [only] if only.is_empty()))
    {
        config.entrypoint = None;
    }
    match (&mut config.healthcheck, &image.healthcheck) {
        (own @ None, theirs) => own.clone_from(theirs),
        (Some(own), Some(theirs)) => {
            if own.test.as_ref().is_none_or(Vec::is_empty) {
                own.test.clone_from(&theirs.test);
            }
            for (own, theirs) in [
                (&mut own.interval, theirs.interval),
                (&mut own.timeout, theirs.timeout),
                (&mut own.start_period, theirs.start_period),
                (&mut own.start_interval, theirs.start_interval),
                (&mut own.retries, theirs.retries),
            ] {
                if *own == 0 {
                    *own = theirs;
                }
            }
        }
        (Some(_), None) => {}
    }
    if config.working_dir.is_empty() {
        config.working_dir.clone_from(&image.working_dir);
    }
    if config.stop_signal.is_empty() {
        config.stop_signal.clone_from(&image.stop_signal);
    }
    if config.shell.as_ref().is_none_or(Vec::is_empty) {
        config.shell.clone_from(&image.shell);
    }
}

fn merge_maps<V: Clone>(own: &mut Option<BTreeMap<String, V>>, image: Option<&BTreeMap<String, V>>) {
    if let Some(image) = image.filter(|image| !image.is_empty()) {
        let own = own.get_or_insert_default();
        for (name, value) in image {
            own.entry(name.clone()).or_insert_with(|| value.clone());
        }
    }
}

/// The path and the arguments of a container's process.
///
/// # Errors
/// Invalid: there is nothing to run.
pub fn command(config: &Config) -> Result<(String, Vec<String>)> {
    let mut words = config.entrypoint.iter().flatten().chain(config.cmd.iter().flatten()).cloned();
    match words.next() {
        Some(path) if !path.is_empty() => Ok((path, words.collect())),
        _ => Err(Error::invalid("no command specified")),
    }
}

/// Fills in what inspect is to show, from the daemon's settings. `id` is the container's.
pub fn fill(request: &mut CreateRequest, id: &str, daemon: &DaemonConfig) {
    let (config, host) = (&mut request.config, &mut request.host_config);
    if config.hostname.is_empty() {
        config.hostname = id.get(..12).unwrap_or(id).to_owned();
    }
    let or = |field: &mut String, default: &str| {
        if field.is_empty() {
            default.clone_into(field);
        }
    };
    if matches!(host.network_mode.as_str(), "" | "default") {
        host.network_mode = if daemon.bridge { "bridge".into() } else { "none".into() };
    }
    or(&mut host.log_config.kind, &daemon.log_driver);
    let log_opts = host.log_config.config.get_or_insert_default();
    if host.log_config.kind == daemon.log_driver {
        for (name, value) in &daemon.log_opts {
            log_opts.entry(name.clone()).or_insert_with(|| value.clone());
        }
    }
    or(&mut host.restart_policy.name, "no");
    or(&mut host.runtime, super::RUNTIME);
    or(&mut host.ipc_mode, "private");
    or(&mut host.cgroupns_mode, "private");
    if host.shm_size == 0 {
        host.shm_size = i64::try_from(daemon.shm_size).unwrap_or(i64::MAX);
    }
    if host.memory > 0 && host.memory_swap == 0 {
        host.memory_swap = host.memory.saturating_mul(2);
    }
    host.port_bindings.get_or_insert_default();
    let strings = |paths: &[&str]| paths.iter().map(|path| (*path).to_owned()).collect::<Vec<_>>();
    let unmasked = host.privileged;
    host.masked_paths
        .get_or_insert_with(|| if unmasked { Vec::new() } else { strings(&super::MASKED_PATHS) });
    host.readonly_paths
        .get_or_insert_with(|| if unmasked { Vec::new() } else { strings(&super::READONLY_PATHS) });
}

/// Checks a request that was merged and filled in. Answers create's warnings.
///
/// # Errors
/// Invalid: not valid, or cannot be honoured in a microVM. NotImplemented: not there yet.
pub fn validate(config: &Config, host: &HostConfig) -> Result<Vec<String>> {
    command(config)?;
    check_config(config)?;
    check_modes(host)?;
    check_unsupported(host)?;
    logs::validate(&host.log_config.kind, host.log_config.config.as_ref().unwrap_or(&BTreeMap::new()))?;
    check_restart(host)?;
    check_resources(host)?;
    mounts::mounts(host, &[], None)?;
    crate::engine::mounts::check(config, host)?;
    parse_security(host)?;
    super::resources::devices(host)?;
    super::resources::rlimits(host, std::iter::empty())?;
    super::capabilities::resolve(
        host.cap_add.as_deref().unwrap_or_default(),
        host.cap_drop.as_deref().unwrap_or_default(),
        host.privileged,
    )?;
    for extra in host.extra_hosts.iter().flatten() {
        files::extra_host(extra)?;
    }
    check_names(host)?;
    Ok(warnings(host))
}

/// Checks the daemon's own settings of containers, which would otherwise fail every one of them.
///
/// # Errors
/// Invalid.
pub fn validate_daemon(daemon: &DaemonConfig) -> Result<()> {
    super::resources::rlimits(&HostConfig::default(), daemon.ulimits.values()).map(drop)
}

/// Texts that end up in files and lists in the container: each must stay the one entry that it is.
fn check_names(host: &HostConfig) -> Result<()> {
    if let Some(wrong) = host.dns.iter().flatten().find(|server| server.parse::<IpAddr>().is_err()) {
        return Err(Error::invalid(format!("invalid DNS server address: {wrong:?}")));
    }
    let word = |text: &String| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic());
    if let Some(wrong) = host.dns_search.iter().chain(&host.dns_options).flatten().find(|text| !word(text)) {
        return Err(Error::invalid(format!("invalid DNS search domain or option: {wrong:?}")));
    }
    let group = |text: &String| !text.is_empty() && !text.contains([',', '\0', '\n']);
    match host.group_add.iter().flatten().find(|text| !group(text)) {
        Some(wrong) => Err(Error::invalid(format!("invalid group: {wrong:?}"))),
        None => Ok(()),
    }
}

fn check_config(config: &Config) -> Result<()> {
    if !config.working_dir.is_empty() && !config.working_dir.starts_with('/') {
        return Err(Error::invalid(format!(
            "the working directory '{}' is invalid, it needs to be an absolute path",
            config.working_dir
        )));
    }
    if let Some(wrong) =
        config.env.iter().flatten().find(|variable| variable.is_empty() || variable.starts_with('='))
    {
        return Err(Error::invalid(format!("invalid environment variable: {wrong}")));
    }
    let texts = config.env.iter().chain(&config.cmd).chain(&config.entrypoint).flatten();
    if texts.chain([&config.user, &config.working_dir]).any(|text| text.contains('\0')) {
        return Err(Error::invalid("a command, variable, user or directory contains a NUL byte"));
    }
    let hostname_byte = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
    if config.hostname.len() > 63 || !config.hostname.bytes().all(hostname_byte) {
        return Err(Error::invalid(format!("invalid hostname: {}", config.hostname)));
    }
    if config.domainname.len() > 63 || !config.domainname.bytes().all(hostname_byte) {
        return Err(Error::invalid(format!("invalid domainname: {}", config.domainname)));
    }
    if !config.stop_signal.is_empty() {
        signal::parse(&config.stop_signal)?;
    }
    if let Some(check) = &config.healthcheck {
        check_health(check)?;
    }
    if config.stop_timeout.is_some_and(|seconds| seconds < -1) {
        return Err(Error::invalid("stop timeout cannot be less than -1"));
    }
    Ok(())
}

fn check_health(check: &Healthcheck) -> Result<()> {
    let shortest = i64::try_from(health::SHORTEST.as_nanos()).unwrap_or(i64::MAX);
    for (name, value) in [
        ("Interval", check.interval),
        ("Timeout", check.timeout),
        ("StartPeriod", check.start_period),
        ("StartInterval", check.start_interval),
    ] {
        if value != 0 && value < shortest {
            return Err(Error::invalid(format!("{name} in Healthcheck cannot be less than 1ms")));
        }
    }
    if check.retries < 0 {
        return Err(Error::invalid("Retries in Healthcheck cannot be negative"));
    }
    Ok(())
}

fn check_modes(host: &HostConfig) -> Result<()> {
    let vm = |option: &str, why: &str| {
        Err(Error::invalid(format!(
            "--{option} cannot be honoured: every container has a kernel of its own, {why}"
        )))
    };
    // Whether there is such a network, or such a container, is others' to say.
    if host.network_mode == "host" {
        return vm("network host", "and the host's network cannot be shared across it");
    }
    for (option, mode) in [("pid", &host.pid_mode), ("ipc", &host.ipc_mode)] {
        match mode.as_str() {
            "" => {}
            "private" | "shareable" | "none" if option == "ipc" => {}
            "host" => return vm(&format!("{option} host"), "and the host's processes are not in it"),
            mode if mode.starts_with("container:") => {}
            mode => return Err(Error::invalid(format!("invalid {} mode: {mode}", option.to_uppercase()))),
        }
    }
    if !matches!(host.uts_mode.as_str(), "" | "host") {
        return Err(Error::invalid(format!("invalid UTS mode: {}", host.uts_mode)));
    }
    if !matches!(host.userns_mode.as_str(), "" | "host") {
        return Err(Error::invalid(format!("invalid user namespace mode: {}", host.userns_mode)));
    }
    if !matches!(host.cgroupns_mode.as_str(), "" | "host" | "private") {
        return Err(Error::invalid(format!("invalid cgroup namespace mode: {}", host.cgroupns_mode)));
    }
    if !matches!(host.isolation.as_str(), "" | "default") {
        return Err(Error::invalid(format!("invalid isolation (\"{}\") on linux", host.isolation)));
    }
    if !matches!(host.runtime.as_str(), "" | super::RUNTIME) {
        return Err(Error::invalid(format!("unknown or invalid runtime name: {}", host.runtime)));
    }
    Ok(())
}

/// What Docker has in some places and a microVM has not.
fn check_unsupported(host: &HostConfig) -> Result<()> {
    let some = |list: &Option<Vec<String>>| list.as_ref().is_some_and(|list| !list.is_empty());
    if !host.cgroup.is_empty() {
        return Err(Error::invalid(format!("invalid cgroup mode: {}", host.cgroup)));
    }
    if some(&host.links) && host.network_mode == "none" {
        return Err(Error::invalid("conflicting options: links need a network, and --network none is none"));
    }
    if host.storage_opt.as_ref().is_some_and(|options| options.keys().any(|name| name != "size")) {
        return Err(Error::invalid("--storage-opt is supported with size only"));
    }
    if let Some(request) = host.device_requests.iter().flatten().next() {
        let capabilities: Vec<_> =
            request.capabilities.iter().flatten().map(|all| format!("[{}]", all.join(" "))).collect();
        return Err(Error::invalid(format!(
            "could not select device driver {:?} with capabilities: [{}]",
            request.driver,
            capabilities.join(" ")
        )));
    }
    Ok(())
}

/// Checks a restart policy.
///
/// # Errors
/// Invalid, in dockerd's words.
pub(crate) fn check_restart(host: &HostConfig) -> Result<()> {
    let policy = &host.restart_policy;
    let wrong = |text: &str| Err(Error::invalid(format!("invalid restart policy: {text}")));
    match policy.name.as_str() {
        "" => {}
        "no" | "always" | "unless-stopped" if policy.maximum_retry_count != 0 => {
            return wrong("maximum retry count can only be used with 'on-failure'");
        }
        "no" | "always" | "unless-stopped" => {}
        "on-failure" if policy.maximum_retry_count < 0 => {
            return wrong("maximum retry count cannot be negative");
        }
        "on-failure" => {}
        name => {
            return wrong(&format!(
                "unknown policy '{name}'; use one of 'no', 'always', 'on-failure', or 'unless-stopped'"
            ));
        }
    }
    if host.auto_remove && !matches!(policy.name.as_str(), "" | "no") {
        return Err(Error::invalid("can't create 'AutoRemove' container with restart policy"));
    }
    Ok(())
}

/// What is limited of the container itself. (CPUs, memory and rates are `engine::limits`.)
fn check_resources(host: &HostConfig) -> Result<()> {
    let refuse = |text: &str| Err(Error::invalid(text));
    if host.shm_size < 0 {
        return refuse("SHM size can not be less than 0");
    }
    if !(-1000..=1000).contains(&host.oom_score_adj) {
        return refuse("Invalid value, range for oom score adj is [-1000, 1000]");
    }
    if let Some(name) = host.sysctls.iter().flatten().map(|(name, _)| name).find(|name| !is_namespaced(name))
    {
        return Err(Error::invalid(format!("sysctl \"{name}\" is not in a separate kernel namespace")));
    }
    Ok(())
}

/// Whether runc would set it: what belongs to the container's own namespaces.
fn is_namespaced(sysctl: &str) -> bool {
    const IPC: [&str; 7] = [
        "kernel.msgmax",
        "kernel.msgmnb",
        "kernel.msgmni",
        "kernel.sem",
        "kernel.shmall",
        "kernel.shmmax",
        "kernel.shmmni",
    ];
    IPC.contains(&sysctl)
        || matches!(sysctl, "kernel.shm_rmid_forced" | "kernel.domainname")
        || sysctl.starts_with("fs.mqueue.")
        || (sysctl.starts_with("net.") && sysctl.bytes().all(|byte| byte.is_ascii_graphic()))
}

fn warnings(host: &HostConfig) -> Vec<String> {
    let mut warnings = Vec::new();
    let mut warn = |holds: bool, text: &str| {
        if holds {
            warnings.push(text.to_owned());
        }
    };
    warn(host.uts_mode == "host", "--uts host means the guest's own UTS namespace.");
    warn(host.cgroupns_mode == "host", "--cgroupns host means the guest's own cgroup namespace.");
    warn(!host.cgroup_parent.is_empty(), "--cgroup-parent is ignored: containers' cgroups are the guest's.");
    warn(
        host.oom_kill_disable == Some(true),
        "Your kernel does not support OomKillDisable. OomKillDisable discarded.",
    );
    warn(
        host.memory_swappiness.is_some_and(|value| value != -1),
        "Your kernel does not support memory swappiness capabilities or the cgroup is not mounted. Memory swappiness discarded.",
    );
    warn(
        host.kernel_memory != 0 || host.kernel_memory_tcp != 0,
        "Kernel memory limits are deprecated and discarded.",
    );
    warn(
        host.memory > 0 && ![0, host.memory, host.memory.saturating_mul(2)].contains(&host.memory_swap),
        "Guests have no swap: memory is limited without swap.",
    );
    warnings
}
