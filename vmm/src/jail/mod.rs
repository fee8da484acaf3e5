//! The jail: what a VMM can do at most, whoever owns it.
//!
//! ```text
//!  daemon     clone3: user, pid, mount, net, ipc, uts namespaces, cgroup   ┐ [`Jail::Full`] alone; see the
//!             own uid and gid, capabilities only over these namespaces     ┘ daemon's `sandbox::vmm::jail`
//!  VMM        reads its configuration, then [`enter`]:
//!               every descriptor that it does not name is closed
//!               resource limits
//!               root: an empty directory that cannot be written  (Full)
//!               capabilities: none, in no set, for ever           (Full)
//!               no new privileges, not dumpable, no code made at run time
//!               Landlock: no file but below given directories, and only to read; no TCP; no signal or
//!               abstract socket across its border
//!             builds the machine
//!  threads    each: Landlock again, without the reading for those that open no files
//!             each: the system calls of its kind ([`crate::seccomp`])
//!  VMM        waits until all have ([`gate::Gate::wait`]), allows no further thread ([`close`]), itself
//!             goes under its filter, and only then lets the guest run
//! ```
//!
//! Nothing here follows a path: the root is made by mounts that are descriptors.

mod descriptors;
pub mod gate;
mod landlock;
mod limits;
mod privileges;
mod root;

use std::{collections::BTreeSet, io};

use bulkhead_vmm_api::{FdNumber, Jail};
use rustix::{fs::Mode, thread::CapabilitySet};

pub use landlock::Files;

/// The step that failed, and why.
#[derive(Debug, thiserror::Error)]
#[error("the jail: {step}: {source}")]
pub struct JailError {
    step: &'static str,
    source: io::Error,
}

impl JailError {
    /// For `map_err`: names the step.
    fn at<E: Into<io::Error>>(step: &'static str) -> impl Fn(E) -> Self {
        move |source| Self { step, source: source.into() }
    }
}

/// Confines the process, which has one thread and keeps these descriptors besides the standard streams.
///
/// # Errors
/// A step fails: then the machine is not to be built.
pub fn enter(jail: Jail, keep: &BTreeSet<FdNumber>) -> Result<(), JailError> {
    descriptors::close_others(keep).map_err(JailError::at("close_range"))?;
    limits::set(limits::FILES)?;
    if jail == Jail::Full {
        root::make_empty()?;
        privileges::drop_all_but(CapabilitySet::empty())?;
    }
    privileges::keep_from_gaining()?;
    landlock::restrict(Files::ReadBeneath)
}

/// Confines a share server, which keeps these rights over files. No Landlock: it knows no way to move a file from
/// one directory to another that it does not forbid; what there is to open lies in mounts without a parent.
///
/// # Errors
/// A step fails: then nothing is to be served.
pub fn enter_shares(jail: Jail, keep: &BTreeSet<FdNumber>, rights: CapabilitySet) -> Result<(), JailError> {
    descriptors::close_others(keep).map_err(JailError::at("close_range"))?;
    limits::set(limits::SHARED_FILES)?;
    if jail == Jail::Full {
        root::make_empty()?;
        privileges::drop_all_but(rights)?;
    }
    privileges::keep_from_gaining()?;
    // What it makes has the rights that the guest names.
    rustix::process::umask(Mode::empty());
    Ok(())
}

/// Lets no thread or process be made from now on, filter or not, besides the `threads` that are there. Under a
/// user id that others run under too only the filters can do that.
///
/// # Errors
/// The kernel refuses the limit.
pub fn close(jail: Jail, threads: usize) -> Result<(), JailError> {
    match jail {
        Jail::Full => limits::no_more_threads(threads),
        Jail::Process => Ok(()),
    }
}
