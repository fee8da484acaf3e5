//! The seccomp filter of a container's processes, within the guest.
//!
//! The default lets the same calls through as Docker's default does, on x86: everything not listed fails
//! with EPERM. Some calls are let through with a capability that would allow what they do anyway.

use oci_spec::runtime::{Capability, LinuxSeccomp};
use serde_json::{Value, json};

use crate::engine::{Error, Result};

/// Calls that are always let through, separated by white space.
const ALLOWED: &str = include_str!("seccomp_allowed.txt");

/// Calls that are let through with a capability.
const WITH_CAPABILITY: [(&str, &str); 14] = [
    ("CAP_DAC_READ_SEARCH", "open_by_handle_at"),
    (
        "CAP_SYS_ADMIN",
        "bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie lsm_get_self_attr \
         lsm_list_modules lsm_set_self_attr mount mount_setattr move_mount open_tree perf_event_open quotactl \
         quotactl_fd setdomainname sethostname setns syslog umount umount2 unshare",
    ),
    ("CAP_SYS_BOOT", "reboot"),
    ("CAP_SYS_CHROOT", "chroot"),
    ("CAP_SYS_MODULE", "delete_module init_module finit_module"),
    ("CAP_SYS_PACCT", "acct"),
    ("CAP_SYS_PTRACE", "kcmp pidfd_getfd process_madvise process_vm_readv process_vm_writev ptrace"),
    ("CAP_SYS_RAWIO", "iopl ioperm"),
    ("CAP_SYS_TIME", "settimeofday stime clock_settime clock_settime64"),
    ("CAP_SYS_TTY_CONFIG", "vhangup"),
    ("CAP_SYS_NICE", "get_mempolicy mbind set_mempolicy set_mempolicy_home_node"),
    ("CAP_SYSLOG", "syslog"),
    ("CAP_BPF", "bpf"),
    ("CAP_PERFMON", "perf_event_open"),
];

/// CLONE_NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET: what clone may not ask for.
const CLONE_NAMESPACES: u64 = 0x7E02_0000;

/// AF_VSOCK: it would lead out of the namespaces, to the guest agent.
const AF_VSOCK: u64 = 40;

/// `personality` may ask for these, no others.
const PERSONALITIES: [u64; 5] = [0, 8, 0x20000, 0x20008, 0xFFFF_FFFF];

const ENOSYS: u32 = 38;

/// The filter that `--security-opt seccomp=…` asks for: `builtin` (or nothing), `unconfined`, or a profile
/// in Docker's JSON. Capabilities are the container's.
///
/// # Errors
/// Invalid: not a profile.
pub(super) fn filter(option: Option<&str>, capabilities: &[&str]) -> Result<Option<LinuxSeccomp>> {
    match option {
        Some("unconfined") => Ok(None),
        None | Some("" | "builtin" | "default") => typed(default_filter(capabilities)).map(Some),
        Some(profile) => profile_filter(profile, capabilities).map(Some),
    }
}

fn typed(value: Value) -> Result<LinuxSeccomp> {
    serde_json::from_value(value).map_err(|error| Error::invalid(format!("seccomp profile: {error}")))
}

fn default_filter(capabilities: &[&str]) -> Value {
    let has = |name: &str| capabilities.contains(&name);
    let allow = |names: Vec<&str>, arguments: Value| json!({"names": names, "action": "SCMP_ACT_ALLOW", "args": arguments});
    let argument = |operator: &str, value: u64, second: Option<u64>| json!([{ "index": 0, "value": value, "valueTwo": second, "op": operator }]);
    let mut names: Vec<&str> = ALLOWED.split_whitespace().collect();
    for (capability, more) in WITH_CAPABILITY {
        if has(capability) {
            names.extend(more.split_whitespace());
        }
    }
    names.sort_unstable();
    names.dedup();
    let mut syscalls =
        vec![allow(names, Value::Null), allow(vec!["socket"], argument("SCMP_CMP_NE", AF_VSOCK, None))];
    for personality in PERSONALITIES {
        syscalls.push(allow(vec!["personality"], argument("SCMP_CMP_EQ", personality, None)));
    }
    if !has("CAP_SYS_ADMIN") {
        syscalls.push(allow(vec!["clone"], argument("SCMP_CMP_MASKED_EQ", CLONE_NAMESPACES, Some(0))));
        // Its flags lie in memory, where a filter cannot look: libraries fall back to clone.
        syscalls.push(json!({ "names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": ENOSYS }));
    }
    json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": 1,
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": syscalls,
    })
}

/// A profile in Docker's form: the runtime spec's, and rules that hold only on some machines or with some
/// capabilities.
fn profile_filter(profile: &str, capabilities: &[&str]) -> Result<LinuxSeccomp> {
    let mut profile: Value = serde_json::from_str(profile)
        .map_err(|error| Error::invalid(format!("Decoding seccomp profile failed: {error}")))?;
    let Some(fields) = profile.as_object_mut() else {
        return Err(Error::invalid("Decoding seccomp profile failed: not an object"));
    };
    if let Some(map) = fields.remove("archMap") {
        if fields.contains_key("architectures") {
            return Err(Error::invalid(
                "both 'architectures' and 'archMap' are specified in the seccomp profile, use either 'architectures' or 'archMap'",
            ));
        }
        let of_this =
            map.as_array().into_iter().flatten().find(|entry| entry["architecture"] == "SCMP_ARCH_X86_64");
        let mut architectures = vec![json!("SCMP_ARCH_X86_64")];
        architectures.extend(
            of_this.and_then(|entry| entry["subArchitectures"].as_array()).into_iter().flatten().cloned(),
        );
        fields.insert("architectures".into(), architectures.into());
    }
    let rules = fields.remove("syscalls").unwrap_or_default();
    let mut kept = Vec::new();
    for rule in rules.as_array().into_iter().flatten() {
        if !rule_applies(rule, capabilities) {
            continue;
        }
        let mut rule = rule.clone();
        if let Some(rule) = rule.as_object_mut() {
            for name in ["comment", "includes", "excludes"] {
                rule.remove(name);
            }
            if let Some(name) = rule.remove("name") {
                rule.insert("names".into(), json!([name]));
            }
        }
        kept.push(rule);
    }
    fields.insert("syscalls".into(), kept.into());
    typed(profile)
}

fn rule_applies(rule: &Value, capabilities: &[&str]) -> bool {
    let texts = |of: &Value, field: &str| -> Vec<String> {
        of[field].as_array().into_iter().flatten().filter_map(|v| v.as_str().map(str::to_owned)).collect()
    };
    let has = |capability: &String| capabilities.contains(&capability.as_str());
    let here = |architecture: &String| matches!(architecture.as_str(), "amd64" | "x86" | "x32");
    let (includes, excludes) = (&rule["includes"], &rule["excludes"]);
    let (on, with) = (texts(includes, "arches"), texts(includes, "caps"));
    // minKernel always holds: the guest's kernel is our own and new.
    (on.is_empty() || on.iter().any(here))
        && with.iter().all(has)
        && !texts(excludes, "arches").iter().any(here)
        && !texts(excludes, "caps").iter().any(has)
}

/// A capability by its name, as the runtime spec types it.
pub(super) fn capability(name: &str) -> Result<Capability> {
    serde_json::from_value(json!(name)).map_err(|error| Error::internal(format!("{name}: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(filter: &LinuxSeccomp) -> Vec<&str> {
        filter
            .syscalls()
            .iter()
            .flatten()
            .flat_map(oci_spec::runtime::LinuxSyscall::names)
            .map(String::as_str)
            .collect()
    }

    #[test]
    fn capabilities_let_more_through() {
        let plain = filter(None, &["CAP_SYS_CHROOT"]).unwrap().unwrap();
        let admin = filter(Some("builtin"), &["CAP_SYS_ADMIN"]).unwrap().unwrap();
        for (name, in_plain, in_admin) in
            [("read", true, true), ("chroot", true, false), ("mount", false, true), ("keyctl", false, false)]
        {
            assert_eq!(
                (names(&plain).contains(&name), names(&admin).contains(&name)),
                (in_plain, in_admin),
                "{name}"
            );
        }
        let clone3 = plain.syscalls().as_ref().unwrap().last().unwrap();
        assert_eq!(
            (clone3.names().as_slice(), clone3.errno_ret()),
            (&["clone3".to_owned()][..], Some(ENOSYS))
        );
        assert_eq!(filter(Some("unconfined"), &[]).unwrap(), None);
    }

    #[test]
    fn a_profile_of_the_users_is_reduced_to_this_machine() {
        let profile = r#"{"defaultAction":"SCMP_ACT_ALLOW","archMap":[{"architecture":"SCMP_ARCH_X86_64",
            "subArchitectures":["SCMP_ARCH_X86"]}],"syscalls":[
            {"names":["a"],"action":"SCMP_ACT_ERRNO","comment":"x","includes":{"arches":["s390x"]}},
            {"names":["b"],"action":"SCMP_ACT_ERRNO","includes":{"caps":["CAP_BPF"]},"excludes":{}},
            {"names":["c"],"action":"SCMP_ACT_ERRNO","excludes":{"caps":["CAP_KILL"]}},
            {"name":"d","action":"SCMP_ACT_KILL_PROCESS","args":[]}]}"#;
        let reduced = filter(Some(profile), &["CAP_KILL"]).unwrap().unwrap();
        assert_eq!(names(&reduced), ["d"]);
        assert_eq!(reduced.architectures().as_ref().unwrap().len(), 2);
        for wrong in ["nosuch", "[]", "{}", r#"{"defaultAction":"MAYBE"}"#] {
            assert!(filter(Some(wrong), &[]).is_err(), "{wrong}");
        }
    }
}
