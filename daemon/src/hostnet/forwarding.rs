//! Whether the host forwards packets. Containers need it; a host that did not before must not become a router
//! for others by it, so what was changed is remembered until the next boot.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

const IPV4: &str = "/proc/sys/net/ipv4/ip_forward";
const IPV6: &str = "/proc/sys/net/ipv6/conf/all/forwarding";

/// Where it is remembered that this daemon switched it on.
#[derive(Debug)]
pub(super) struct Forwarding {
    mark: PathBuf,
}

impl Forwarding {
    /// With its mark below the exec root, which is gone after a boot, as the switch is.
    pub(super) fn new(exec_root: &Path) -> Self {
        Self { mark: exec_root.join("forwarding") }
    }

    /// Whether this daemon switched it on.
    pub(super) fn is_ours(&self) -> bool {
        self.mark.exists()
    }

    /// Switches it on for a family, if it is off.
    pub(super) fn enable(&self, ipv6: bool) -> io::Result<()> {
        let switch = if ipv6 { IPV6 } else { IPV4 };
        if fs::read_to_string(switch)?.trim() != "0" {
            return Ok(());
        }
        // The mark first: a daemon that dies in between must not leave an unguarded router.
        fs::write(&self.mark, "")?;
        if ipv6 {
            keep_router_advertisements()?;
        }
        fs::write(switch, "1")
    }
}

/// A host that forwards does not take router advertisements any more, unless told so: what it had by them it
/// would lose.
fn keep_router_advertisements() -> io::Result<()> {
    for interface in fs::read_dir("/proc/sys/net/ipv6/conf")? {
        let path = interface?.path().join("accept_ra");
        if fs::read_to_string(&path).is_ok_and(|value| value.trim() == "1") {
            fs::write(path, "2")?;
        }
    }
    Ok(())
}
