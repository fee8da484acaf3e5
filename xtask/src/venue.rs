//! Where daemons run for demo, tests and benchmark: straight on this machine where its KVM is usable, else in a test
//! host.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use bulkhead_tests::Host;

use crate::bundle::Bundle;
use crate::host::{self, Equipment};
use crate::kernel;
use crate::tree::Tree;

/// Overrides the choice: `direct` or `testhost`.
const VARIABLE: &str = "BULKHEAD_VENUE";

/// One of the two places.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Venue {
    Direct,
    TestHost,
}

/// A host that is there for one chore; a test host is stopped when this is dropped.
pub(crate) struct Place {
    pub(crate) host: Host,
    started: Option<host::Running>,
}

/// Asks the daemon, which knows what it needs: it times a small guest, so that a KVM which only interprets is told
/// from a real one.
pub(crate) fn choose(bundle: &Bundle) -> Result<Venue> {
    match std::env::var(VARIABLE).as_deref() {
        Ok("direct") => return Ok(Venue::Direct),
        Ok("testhost") => return Ok(Venue::TestHost),
        Ok(other) => bail!("${VARIABLE} is {other:?}, neither \"direct\" nor \"testhost\""),
        Err(_) => {}
    }
    let mut check = Command::new(bundle.daemon());
    let status = check
        .args(["check", "--kvm"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    let usable = status.context("run bulkheadd check")?.success();
    Ok(if usable && rustix::process::geteuid().is_root() { Venue::Direct } else { Venue::TestHost })
}

impl Venue {
    pub(crate) fn describe(self) -> &'static str {
        match self {
            Venue::Direct => "this machine: its KVM is usable",
            Venue::TestHost => "a test host: this machine's KVM is not usable, so one is emulated",
        }
    }

    /// A place for daemons; in a test host of this name with this much memory, where data lie too.
    pub(crate) fn open(self, tree: &Tree, name: &str, memory_mib: u32) -> Result<Place> {
        self.open_with(tree, name, Equipment { memory_mib, disk_gib: 0 })
    }

    /// A place for daemons; in a test host of this name and equipment.
    pub(crate) fn open_with(self, tree: &Tree, name: &str, equipment: Equipment) -> Result<Place> {
        if self == Venue::Direct {
            return Ok(Place { host: Host::Direct, started: None });
        }
        kernel::ensure(tree, kernel::Set::Testhost)?;
        let started = host::start(tree, name, equipment)?;
        let host = Host::TestHost {
            xtask: std::env::current_exe()?,
            tree: tree.root().to_owned(),
            name: name.to_owned(),
        };
        Ok(Place { host, started: Some(started) })
    }
}

impl Place {
    /// The test host's console so far, if it is one.
    pub(crate) fn console(&self) -> Option<String> {
        self.started.as_ref().map(host::Running::console)
    }
}
