//! Which capabilities a container has.

use crate::engine::{Error, Result};

/// Every capability, by its number.
pub(super) const ALL: [&str; 41] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

/// What a container has when nothing is said.
const DEFAULT: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

/// `--cap-add`, `--cap-drop` and `--privileged` applied to the default, by Docker's rules: with `ALL` added,
/// everything but what is dropped; with `ALL` dropped, only what is added.
///
/// # Errors
/// Invalid: a name that is no capability.
pub(super) fn resolve(add: &[String], drop: &[String], privileged: bool) -> Result<Vec<&'static str>> {
    let (add, all_added) = names(add, "CapAdd")?;
    let (drop, all_dropped) = names(drop, "CapDrop")?;
    let keeps =
        |set: &[&'static str]| set.iter().copied().filter(|name| !drop.contains(name)).collect::<Vec<_>>();
    Ok(if privileged {
        ALL.to_vec()
    } else if all_added {
        keeps(&ALL)
    } else if all_dropped {
        add
    } else {
        let mut kept = keeps(&DEFAULT);
        let more: Vec<_> = add.into_iter().filter(|name| !kept.contains(name)).collect();
        kept.extend(more);
        kept
    })
}

/// Names in their full form, and whether `ALL` was among them.
fn names(texts: &[String], option: &str) -> Result<(Vec<&'static str>, bool)> {
    let mut names = Vec::new();
    let mut all = false;
    for text in texts {
        let upper = text.trim().to_ascii_uppercase();
        if upper == "ALL" || upper == "CAP_ALL" {
            all = true;
            continue;
        }
        let full = if upper.starts_with("CAP_") { upper } else { format!("CAP_{upper}") };
        match ALL.iter().find(|known| **known == full) {
            Some(known) if !names.contains(known) => names.push(*known),
            Some(_) => {}
            None => return Err(Error::invalid(format!("invalid {option}: unknown capability: \"{full}\""))),
        }
    }
    Ok((names, all))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    fn resolved(add: &[&str], drop: &[&str]) -> Vec<&'static str> {
        resolve(&strings(add), &strings(drop), false).unwrap()
    }

    #[test]
    fn sets() {
        assert_eq!(resolved(&[], &[]), DEFAULT);
        assert_eq!(resolved(&["net_admin"], &["ALL"]), ["CAP_NET_ADMIN"]);
        assert_eq!(resolved(&["Cap_Chown", "SYS_TIME", "sys_time"], &[]).len(), DEFAULT.len() + 1);
        assert_eq!(resolved(&["ALL"], &["SYS_ADMIN"]).len(), ALL.len() - 1);
        assert!(resolved(&[], &["all"]).is_empty());
        assert!(!resolved(&[], &["KILL"]).contains(&"CAP_KILL"));
        assert_eq!(resolve(&[], &strings(&["ALL"]), true).unwrap(), ALL);
    }

    #[test]
    fn what_is_no_capability_is_refused() {
        let error = resolve(&strings(&["flying"]), &[], false).unwrap_err();
        assert_eq!(error.message, "invalid CapAdd: unknown capability: \"CAP_FLYING\"");
    }
}
