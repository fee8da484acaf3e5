//! Limits: cgroup, rlimits, devices.

use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxResources, PosixRlimit};
use serde_json::{Value, json};

use crate::{
    api::types::container::{HostConfig, Ulimit},
    engine::{Error, Result},
};

fn typed<T: serde::de::DeserializeOwned>(what: &str, value: Value) -> Result<T> {
    serde_json::from_value(value).map_err(|error| Error::internal(format!("{what}: {error}")))
}

/// `linux.resources`: the limits of the container's cgroup in the guest. (No CPU sets: they name the host's
/// CPUs, and are the VMM's. No shares: nobody else is in the guest.)
pub(super) fn resources(host: &HostConfig, devices: &[LinuxDeviceCgroup]) -> Result<LinuxResources> {
    let set = |value: i64| (value != 0).then_some(value);
    // CPUs in thousand-millionths are a quota of the usual period.
    let (period, quota) = if host.nano_cpus > 0 {
        (Some(100_000), Some(host.nano_cpus / 10_000))
    } else {
        (set(host.cpu_period), set(host.cpu_quota))
    };
    let mut resources = json!({
        "devices": devices,
        "memory": {
            "limit": set(host.memory),
            "reservation": set(host.memory_reservation),
            "swap": set(host.memory_swap),
        },
        "cpu": {
            "period": period,
            "quota": quota,
        },
    });
    if let Some(limit) = host.pids_limit.filter(|limit| *limit > 0) {
        resources["pids"] = json!({ "limit": limit });
    }
    typed("resources", resources)
}

/// The limits of a container that exists, after an update: of processes, no limit is said too.
///
/// # Errors
/// Those of [`resources`].
pub(crate) fn updated(host: &HostConfig) -> Result<LinuxResources> {
    let mut resources = resources(host, &[])?;
    if let Some(limit) = host.pids_limit.filter(|limit| *limit <= 0) {
        resources.set_pids(Some(typed("pids", json!({ "limit": limit.min(-1) }))?));
    }
    Ok(resources)
}

/// Names of `setrlimit`'s limits, as Docker takes them.
const LIMITS: [&str; 15] = [
    "core",
    "cpu",
    "data",
    "fsize",
    "locks",
    "memlock",
    "msgqueue",
    "nice",
    "nofile",
    "nproc",
    "rss",
    "rtprio",
    "rttime",
    "sigpending",
    "stack",
];

/// What a container has when nothing is said: as many files as systemd gives a service, no limit on
/// processes and core files. (The guest kernel's own defaults depend on the machine's memory.)
const DEFAULTS: [(&str, i64, i64); 3] = [("nofile", 1024, 524_288), ("nproc", -1, -1), ("core", -1, -1)];

/// `process.rlimits`: the container's, else the daemon's, else [`DEFAULTS`].
///
/// # Errors
/// Invalid: no such limit, or a soft limit over the hard one.
pub(super) fn rlimits<'a>(
    host: &'a HostConfig,
    daemon: impl Iterator<Item = &'a Ulimit>,
) -> Result<Vec<PosixRlimit>> {
    let mut limits: Vec<Ulimit> = host.ulimits.iter().flatten().cloned().collect();
    let defaults = DEFAULTS.map(|(name, soft, hard)| Ulimit { name: name.to_owned(), hard, soft });
    for ulimit in daemon.cloned().chain(defaults) {
        if !limits.iter().any(|have| have.name == ulimit.name) {
            limits.push(ulimit);
        }
    }
    limits.iter().map(rlimit).collect()
}

fn rlimit(ulimit: &Ulimit) -> Result<PosixRlimit> {
    if !LIMITS.contains(&ulimit.name.as_str()) {
        return Err(Error::invalid(format!("invalid ulimit type: {}", ulimit.name)));
    }
    // -1 is "unlimited", which the kernel knows as the greatest number.
    let number = |value: i64| if value == -1 { Some(u64::MAX) } else { u64::try_from(value).ok() };
    let (Some(soft), Some(hard)) = (number(ulimit.soft), number(ulimit.hard)) else {
        return Err(Error::invalid(format!(
            "invalid ulimit {}: {}:{}",
            ulimit.name, ulimit.soft, ulimit.hard
        )));
    };
    if soft > hard {
        return Err(Error::invalid(format!(
            "ulimit soft limit must be less than or equal to hard limit: {} > {}",
            ulimit.soft, ulimit.hard
        )));
    }
    let name = format!("RLIMIT_{}", ulimit.name.to_ascii_uppercase());
    typed("ulimit", json!({ "type": name, "hard": hard, "soft": soft }))
}

/// A device node that the guest kernel has: path, major, minor, mode.
const GUEST_DEVICES: [(&str, i64, i64, u32); 9] = [
    ("/dev/null", 1, 3, 0o666),
    ("/dev/zero", 1, 5, 0o666),
    ("/dev/full", 1, 7, 0o666),
    ("/dev/random", 1, 8, 0o666),
    ("/dev/urandom", 1, 9, 0o666),
    ("/dev/tty", 5, 0, 0o666),
    ("/dev/fuse", 10, 229, 0o666),
    ("/dev/net/tun", 10, 200, 0o666),
    ("/dev/kmsg", 1, 11, 0o644),
];

/// The nodes to make, and the rules of who may use what. Devices are the *guest's*: nothing of the host
/// can be given.
///
/// # Errors
/// Invalid: a device that the guest does not have, or a rule that is none. In Docker's words.
pub(super) fn devices(host: &HostConfig) -> Result<(Vec<LinuxDevice>, Vec<LinuxDeviceCgroup>)> {
    let mut nodes = Vec::new();
    let mut rules = Vec::new();
    if host.privileged {
        rules.push(json!({ "allow": true, "access": "rwm" }));
        for (path, major, minor, mode) in GUEST_DEVICES {
            nodes.push(node(path, major, minor, mode)?);
        }
    } else {
        rules.push(json!({ "allow": false, "access": "rwm" }));
        // null, zero, full, random, urandom, tty, console, ptmx and the terminals; mknod of anything.
        rules.push(json!({ "allow": true, "type": "c", "access": "m" }));
        rules.push(json!({ "allow": true, "type": "b", "access": "m" }));
        for (major, minor) in [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2)] {
            rules
                .push(json!({ "allow": true, "type": "c", "major": major, "minor": minor, "access": "rwm" }));
        }
        rules.push(json!({ "allow": true, "type": "c", "major": 136, "access": "rwm" }));
    }
    for device in host.devices.iter().flatten() {
        let access = if device.cgroup_permissions.is_empty() { "rwm" } else { &device.cgroup_permissions };
        if !access.chars().all(|c| matches!(c, 'r' | 'w' | 'm')) {
            return Err(Error::invalid(format!("invalid device permissions: {access}")));
        }
        let Some((path, major, minor, mode)) =
            GUEST_DEVICES.iter().copied().find(|(path, ..)| *path == device.path_on_host)
        else {
            return Err(Error::invalid(format!(
                "error gathering device information while adding custom device \"{}\": no such file or directory",
                device.path_on_host
            )));
        };
        let inside = if device.path_in_container.is_empty() { path } else { &device.path_in_container };
        nodes.retain(|node: &LinuxDevice| node.path().to_str() != Some(inside));
        nodes.push(node(inside, major, minor, mode)?);
        rules.push(json!({ "allow": true, "type": "c", "major": major, "minor": minor, "access": access }));
    }
    for rule in host.device_cgroup_rules.iter().flatten() {
        rules.push(
            cgroup_rule(rule)
                .ok_or_else(|| Error::invalid(format!("invalid device cgroup rule format: '{rule}'")))?,
        );
    }
    Ok((nodes, rules.into_iter().map(|rule| typed("device rule", rule)).collect::<Result<_>>()?))
}

fn node(path: &str, major: i64, minor: i64, mode: u32) -> Result<LinuxDevice> {
    typed(
        "device",
        json!({ "path": path, "type": "c", "major": major, "minor": minor, "fileMode": mode, "uid": 0, "gid": 0 }),
    )
}

/// `c 1:3 rwm`, where numbers may be `*`.
fn cgroup_rule(text: &str) -> Option<Value> {
    let mut words = text.split(' ');
    let (kind, numbers, access) = (words.next()?, words.next()?, words.next()?);
    let number = |text: &str| match text {
        "*" => Some(None),
        text => text.parse::<u32>().ok().map(Some),
    };
    let (major, minor) = numbers.split_once(':')?;
    let (major, minor) = (number(major)?, number(minor)?);
    let valid = matches!(kind, "a" | "b" | "c")
        && (1..=3).contains(&access.len())
        && access.chars().all(|c| matches!(c, 'r' | 'w' | 'm'))
        && words.next().is_none();
    valid.then(|| json!({ "allow": true, "type": kind, "major": major, "minor": minor, "access": access }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::types::container::DeviceMapping;

    #[test]
    fn cpus_are_a_quota() {
        let host = HostConfig { nano_cpus: 1_500_000_000, ..HostConfig::default() };
        let cpu = resources(&host, &[]).unwrap().cpu().clone().unwrap();
        assert_eq!((cpu.period(), cpu.quota()), (Some(100_000), Some(150_000)));
    }

    #[test]
    fn no_limit_on_processes_is_no_limit() {
        for (limit, expected) in [(None, false), (Some(0), false), (Some(-1), false), (Some(5), true)] {
            let host = HostConfig { pids_limit: limit, ..HostConfig::default() };
            assert_eq!(resources(&host, &[]).unwrap().pids().is_some(), expected, "{limit:?}");
        }
    }

    #[test]
    fn the_containers_limits_come_before_the_daemons_and_those_before_the_defaults() {
        let ulimit = |name: &str, soft, hard| Ulimit { name: name.into(), soft, hard };
        let host = HostConfig { ulimits: Some(vec![ulimit("nofile", 5, 6)]), ..HostConfig::default() };
        let daemon = [ulimit("nofile", 7, 7), ulimit("core", 0, 0)];
        let limits: Vec<_> = rlimits(&host, daemon.iter())
            .unwrap()
            .iter()
            .map(|limit| (limit.typ().to_string(), limit.soft(), limit.hard()))
            .collect();
        let unlimited = u64::MAX;
        assert_eq!(
            limits,
            [
                ("RLIMIT_NOFILE".to_owned(), 5, 6),
                ("RLIMIT_CORE".to_owned(), 0, 0),
                ("RLIMIT_NPROC".to_owned(), unlimited, unlimited),
            ]
        );
        for wrong in [ulimit("as", 1, 1), ulimit("cpu", 2, 1), ulimit("cpu", -2, 1)] {
            let host = HostConfig { ulimits: Some(vec![wrong]), ..HostConfig::default() };
            assert!(rlimits(&host, [].iter()).is_err());
        }
    }

    #[test]
    fn devices_are_the_guests() {
        let with = |path: &str, permissions: &str| HostConfig {
            devices: Some(vec![DeviceMapping {
                path_on_host: path.into(),
                path_in_container: "/dev/inside".into(),
                cgroup_permissions: permissions.into(),
            }]),
            ..HostConfig::default()
        };
        let (nodes, rules) = devices(&with("/dev/fuse", "r")).unwrap();
        assert_eq!((nodes[0].path().to_str(), nodes[0].minor()), (Some("/dev/inside"), 229));
        assert_eq!(rules.last().unwrap().access().as_deref(), Some("r"));
        let error = devices(&with("/dev/sda", "rwm")).unwrap_err().message;
        assert!(error.ends_with("custom device \"/dev/sda\": no such file or directory"), "{error}");
        assert!(devices(&with("/dev/fuse", "x")).is_err());
    }

    #[test]
    fn device_rules() {
        for (rule, valid) in [
            ("c 1:3 rwm", true),
            ("a *:* m", true),
            ("b 8:* r", true),
            ("d 1:3 r", false),
            ("c 1 r", false),
            ("c 1:3 x", false),
            ("c 1:3 r more", false),
            ("", false),
        ] {
            let host = HostConfig { device_cgroup_rules: Some(vec![rule.into()]), ..HostConfig::default() };
            assert_eq!(devices(&host).is_ok(), valid, "{rule}");
        }
    }
}
