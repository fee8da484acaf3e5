//! What is mounted in a container besides its root.

use std::collections::BTreeMap;

use bulkhead_agent_api::SHARED_MEMORY;
use oci_spec::runtime::Mount;
use serde_json::json;

use crate::{
    api::types::container::HostConfig,
    engine::{Error, Result},
};

/// The mounts, in the order in which they are made: the kernel's filesystems, then tmpfs and what is mounted of the
/// host (destination, source below the shares, whether read-only), by depth. `/dev/shm` is the memory that the
/// container of id `shared_memory` has together with others, where there is one.
///
/// # Errors
/// Invalid: a tmpfs with options that it does not have or a path that is not absolute.
pub(super) fn mounts(
    host: &HostConfig,
    binds: &[(String, String, bool)],
    shared_memory: Option<&str>,
) -> Result<Vec<Mount>> {
    let tmpfs = tmpfs(host)?;
    let own = |path: &str| {
        tmpfs.iter().any(|(target, _)| target == path) || binds.iter().any(|(target, ..)| target == path)
    };
    let read_only = host.readonly_rootfs;
    let mut mounts = Vec::new();
    for (path, kind, source, options) in [
        ("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"][..]),
        ("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        (
            "/dev/pts",
            "devpts",
            "devpts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        ("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
        ("/sys/fs/cgroup", "cgroup", "cgroup", &["ro", "nosuid", "noexec", "nodev"]),
        ("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        ("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777"]),
    ] {
        // What the user mounts takes the place of the default, and `/dev` of all below it.
        if own(path) || (own("/dev") && path.starts_with("/dev/")) {
            continue;
        }
        if path == "/dev/shm" && host.ipc_mode == "none" {
            continue;
        }
        if path == "/dev/shm"
            && let Some(id) = shared_memory
        {
            let options = ["bind", "rprivate"].map(str::to_owned);
            mounts.push(mount(path, "bind", &format!("{SHARED_MEMORY}/{id}"), &options)?);
            continue;
        }
        let writable = host.privileged && path.starts_with("/sys");
        let mut options: Vec<String> =
            options.iter().filter(|option| !(writable && **option == "ro")).map(|&o| o.to_owned()).collect();
        if path == "/dev/shm" {
            options.push(format!("size={}", shm_size(host)));
        }
        if read_only
            && !path.starts_with("/dev")
            && path != "/proc"
            && !writable
            && !options.contains(&"ro".into())
        {
            options.push("ro".to_owned());
        }
        mounts.push(mount(path, kind, source, &options)?);
    }
    let mut own = Vec::new();
    for (target, options) in &tmpfs {
        own.push((target, mount(target, "tmpfs", "tmpfs", options)?));
    }
    for (target, share, read_only) in binds {
        let source = format!("{SHARES}/{share}");
        let mut options = vec!["bind".to_owned(), "rprivate".to_owned()];
        if *read_only {
            options.push("ro".to_owned());
        }
        own.push((target, mount(target, "bind", &source, &options)?));
    }
    own.sort_by_key(|(target, _)| target.matches('/').count());
    mounts.extend(own.into_iter().map(|(_, mount)| mount));
    Ok(mounts)
}

/// How many bytes `/dev/shm` holds.
pub(super) fn shm_size(host: &HostConfig) -> u64 {
    u64::try_from(host.shm_size).ok().filter(|size| *size > 0).unwrap_or(64 << 20)
}

/// Where the agent mounts the host's shares.
const SHARES: &str = "/run/bulkhead/fs";

fn mount(path: &str, kind: &str, source: &str, options: &[String]) -> Result<Mount> {
    serde_json::from_value(json!({"destination": path, "type": kind, "source": source, "options": options}))
        .map_err(|error| Error::internal(format!("mount {path}: {error}")))
}

/// `--tmpfs` and `--mount type=tmpfs`: targets, shallow ones first, and their options.
fn tmpfs(host: &HostConfig) -> Result<Vec<(String, Vec<String>)>> {
    let mut wanted: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (target, options) in host.tmpfs.iter().flatten() {
        let options = options.split(',').filter(|option| !option.is_empty()).map(str::to_owned).collect();
        wanted.insert(target.clone(), options);
    }
    for mount in host.mounts.iter().flatten().filter(|mount| mount.kind == "tmpfs") {
        let mut options = Vec::new();
        if mount.read_only {
            options.push("ro".to_owned());
        }
        if let Some(tmpfs) = &mount.tmpfs_options {
            if tmpfs.size_bytes != 0 {
                options.push(format!("size={}", tmpfs.size_bytes));
            }
            if tmpfs.mode != 0 {
                options.push(format!("mode={:o}", tmpfs.mode));
            }
            options.extend(tmpfs.options.iter().flatten().map(|option| option.join("=")));
        }
        if wanted.insert(mount.target.clone(), options).is_some() {
            return Err(Error::invalid(format!("Duplicate mount point: {}", mount.target)));
        }
    }
    let mut tmpfs = Vec::new();
    for (target, options) in wanted {
        let clean = clean_target(&target)?;
        tmpfs.push((clean, merge_options(&options)?));
    }
    Ok(tmpfs)
}

/// A mount's target without `.`, `..` and doubled slashes.
pub(crate) fn clean_target(target: &str) -> Result<String> {
    if !target.starts_with('/') {
        return Err(Error::invalid(format!("invalid mount path: '{target}' mount path must be absolute")));
    }
    let mut parts: Vec<&str> = Vec::new();
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    if parts.is_empty() {
        return Err(Error::invalid("invalid specification: destination can't be '/'"));
    }
    Ok(format!("/{}", parts.join("/")))
}

/// A flag, what it excludes, and whether it is the kernel's default.
const FLAGS: [[&str; 2]; 9] = [
    ["ro", "rw"],
    ["nosuid", "suid"],
    ["nodev", "dev"],
    ["noexec", "exec"],
    ["sync", "async"],
    ["dirsync", "nodirsync"],
    ["noatime", "atime"],
    ["nodiratime", "diratime"],
    ["relatime", "norelatime"],
];

/// The user's options over Docker's `noexec,nosuid,nodev`: the last word on each subject counts.
fn merge_options(user: &[String]) -> Result<Vec<String>> {
    let mut merged: Vec<String> = Vec::new();
    let mut seen: Vec<String> = Vec::new();
    let defaults = ["noexec", "nosuid", "nodev"].map(str::to_owned);
    for option in defaults.iter().chain(user).rev() {
        let subject = match FLAGS.iter().find(|pair| pair.contains(&option.as_str())) {
            Some([flag, _]) => (*flag).to_owned(),
            None if matches!(option.as_str(), "strictatime" | "nostrictatime") => "relatime".to_owned(),
            None => {
                let (name, value) = option.split_once('=').unwrap_or((option, ""));
                let valid = match name {
                    "size" | "nr_blocks" | "nr_inodes" => is_size(value),
                    "mode" => {
                        !value.is_empty() && u32::from_str_radix(value, 8).is_ok_and(|mode| mode <= 0o7777)
                    }
                    "uid" | "gid" => value.parse::<u32>().is_ok(),
                    "mpol" => !value.is_empty(),
                    _ => false,
                };
                if !valid {
                    return Err(Error::invalid(format!("Invalid tmpfs option {option:?}")));
                }
                name.to_owned()
            }
        };
        if !seen.contains(&subject) {
            seen.push(subject);
            merged.push(option.clone());
        }
    }
    merged.reverse();
    Ok(merged)
}

fn is_size(value: &str) -> bool {
    let number = value.strip_suffix(['k', 'K', 'm', 'M', 'g', 'G', '%']).unwrap_or(value);
    !number.is_empty() && number.parse::<u64>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::types::container::{Mount as MountRequest, TmpfsOptions};

    fn destinations(mounts: &[Mount]) -> Vec<String> {
        mounts.iter().map(|mount| mount.destination().display().to_string()).collect()
    }

    fn options<'a>(mounts: &'a [Mount], path: &str) -> &'a [String] {
        let mount = mounts.iter().find(|mount| mount.destination().to_str() == Some(path)).unwrap();
        mount.options().as_deref().unwrap()
    }

    fn with_tmpfs(pairs: &[(&str, &str)]) -> HostConfig {
        let tmpfs = pairs.iter().map(|(path, options)| ((*path).to_owned(), (*options).to_owned())).collect();
        HostConfig { tmpfs: Some(tmpfs), ..HostConfig::default() }
    }

    #[test]
    fn a_tmpfs_takes_the_place_of_a_default_and_the_shallow_come_first() {
        let mounts =
            mounts(&with_tmpfs(&[("/a/b/c", ""), ("/run/", "size=64m,exec"), ("/dev", "")]), &[], None)
                .unwrap();
        let tail = &destinations(&mounts)[2..];
        assert_eq!(tail, ["/sys/fs/cgroup", "/dev", "/run", "/a/b/c"]);
        assert_eq!(options(&mounts, "/run"), ["nosuid", "nodev", "size=64m", "exec"]);
    }

    #[test]
    fn a_mount_request_is_a_tmpfs_too() {
        let request = MountRequest {
            kind: "tmpfs".into(),
            target: "/t".into(),
            read_only: true,
            tmpfs_options: Some(TmpfsOptions {
                size_bytes: 4096,
                mode: 0o700,
                options: Some(vec![vec!["exec".into()]]),
            }),
            ..MountRequest::default()
        };
        let host = HostConfig { mounts: Some(vec![request]), ..HostConfig::default() };
        let expected = ["nosuid", "nodev", "ro", "size=4096", "mode=700", "exec"];
        assert_eq!(options(&mounts(&host, &[], None).unwrap(), "/t"), expected);
    }

    #[test]
    fn what_a_tmpfs_cannot_be_is_refused() {
        for (path, options, message) in [
            ("relative", "", "invalid mount path: 'relative' mount path must be absolute"),
            ("/a/..", "", "invalid specification: destination can't be '/'"),
            ("/a", "size=", "Invalid tmpfs option \"size=\""),
            ("/a", "bind", "Invalid tmpfs option \"bind\""),
            ("/a", "mode=999", "Invalid tmpfs option \"mode=999\""),
        ] {
            assert_eq!(mounts(&with_tmpfs(&[(path, options)]), &[], None).unwrap_err().message, message);
        }
    }

    #[test]
    fn modes_of_the_defaults() {
        let host = HostConfig { shm_size: 4096, readonly_rootfs: true, ..HostConfig::default() };
        let read_only = mounts(&host, &[], None).unwrap();
        assert!(options(&read_only, "/dev/shm").contains(&"size=4096".to_owned()));
        assert!(!options(&read_only, "/dev").contains(&"ro".to_owned()));
        let privileged =
            mounts(&HostConfig { privileged: true, ..HostConfig::default() }, &[], None).unwrap();
        assert!(!options(&privileged, "/sys/fs/cgroup").contains(&"ro".to_owned()));
        let no_ipc =
            mounts(&HostConfig { ipc_mode: "none".into(), ..HostConfig::default() }, &[], None).unwrap();
        assert!(!destinations(&no_ipc).contains(&"/dev/shm".to_owned()));
    }
}
