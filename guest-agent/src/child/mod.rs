//! What a child does between `clone3` and `execve`.
//!
//! ```text
//!  a container's first process              an exec
//!    new namespaces, by clone3                enter the first process's namespaces
//!    join namespaces by path
//!    hostname, root, mounts (mounts)
//!          └────────────── terminal, working directory, identity, ──────────────┘
//!                          capabilities, seccomp, execve (process)
//! ```
//!
//! The agent has one thread, so the child of its fork may do anything a program may. It talks back over a
//! socket that closes at `execve`: see [`status`].

pub mod lookup;
mod mounts;
mod process;
pub mod status;
mod terminal;

pub(crate) use terminal::size as terminal_size;

use std::{
    fs,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use bulkhead_agent_api::{AgentError, Stdio};
use nix::sched::CloneFlags;
use oci_spec::runtime::{LinuxNamespaceType, Process};

use crate::{
    error::{Context, Result, invalid},
    spec::Checked,
    sys,
};

/// Everything that a child needs; made before the fork.
pub struct Plan<'a> {
    /// The container.
    pub container: &'a Checked,
    /// What to run.
    pub process: &'a Process,
    /// How its stdio is made.
    pub stdio: Stdio,
    /// Its stdin, stdout and stderr; unused with a terminal.
    pub pipes: Option<[OwnedFd; 3]>,
    /// Our side of [`status::channel`].
    pub status: OwnedFd,
    /// The agent's own executable, to become the container's init.
    pub init: Option<OwnedFd>,
}

/// Where the process is to live.
pub enum Place<'a> {
    /// In a container that this process begins: its root directory.
    New(&'a Path),
    /// In the namespaces of this process, a pidfd.
    Existing(&'a OwnedFd),
}

/// The child's whole life up to `execve`; returns its exit code when that was not reached.
pub fn run(plan: &Plan<'_>, place: &Place<'_>) -> i32 {
    let error = prepare(plan, place)
        .and_then(|()| process::execute(plan))
        .map_or_else(|error| error, |never| match never {});
    status::send_failure(&plan.status, &error);
    1
}

fn prepare(plan: &Plan<'_>, place: &Place<'_>) -> Result<()> {
    sys::reset_signals().context("reset signals")?;
    rustix::process::setsid().context("setsid")?;
    if let Some(score) = plan.process.oom_score_adj() {
        // While the agent's own /proc is there: the container may not have one.
        fs::write("/proc/self/oom_score_adj", score.to_string()).context("set oom_score_adj")?;
    }
    match place {
        Place::New(root) => {
            join_namespaces(plan.container)?;
            set_names(plan.container)?;
            mounts::enter(plan.container, root)?;
        }
        Place::Existing(init) => enter_namespaces(init)?,
    }
    let terminal = if plan.stdio.terminal {
        Some(terminal::open(plan).map_err(|error| AgentError {
            message: format!("open a terminal: {}", error.message),
            ..error
        })?)
    } else {
        None
    };
    if let Place::New(_) = place {
        if let Some(terminal) = &terminal {
            terminal.bind_console()?;
        }
        mounts::finish(plan.container)?;
    }
    process::take_stdio(plan, terminal.as_ref())
}

/// Makes `root` this process's root directory, with the files and directories that the spec binds into it and
/// nothing else: the view that a container has of its files when nothing of it runs. For a process that has a
/// mount namespace of its own.
///
/// # Errors
/// What cannot be mounted.
pub fn enter_at_rest(container: &Checked, root: &Path) -> Result<()> {
    mounts::enter_at_rest(container, root)
}

/// Namespaces of `clone3` for a container's first process. The cgroup namespace is not among them: its
/// root is the cgroup that its maker is in, so it is made by the child.
pub fn clone_flags(container: &Checked) -> u64 {
    let kinds = [
        (LinuxNamespaceType::Mount, libc::CLONE_NEWNS),
        (LinuxNamespaceType::Uts, libc::CLONE_NEWUTS),
        (LinuxNamespaceType::Ipc, libc::CLONE_NEWIPC),
        (LinuxNamespaceType::Pid, libc::CLONE_NEWPID),
        (LinuxNamespaceType::Network, libc::CLONE_NEWNET),
    ];
    let new = |kind| container.namespace(kind).is_some_and(|namespace| namespace.path().is_none());
    kinds.into_iter().filter(|(kind, _)| new(*kind)).fold(0, |flags, (_, flag)| flags | flag as u64)
}

/// The namespaces of an existing process that an exec enters. Its pid namespace is not among them: a
/// process cannot change its own, so the agent sets it for its children for the length of the fork.
fn enter_namespaces(init: &OwnedFd) -> Result<()> {
    let flags = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWCGROUP;
    nix::sched::setns(init, flags).context("enter the container's namespaces")
}

fn join_namespaces(container: &Checked) -> Result<()> {
    let joinable = [
        (LinuxNamespaceType::Network, CloneFlags::CLONE_NEWNET),
        (LinuxNamespaceType::Ipc, CloneFlags::CLONE_NEWIPC),
        (LinuxNamespaceType::Uts, CloneFlags::CLONE_NEWUTS),
        (LinuxNamespaceType::Cgroup, CloneFlags::CLONE_NEWCGROUP),
    ];
    for (kind, flag) in joinable {
        let Some(namespace) = container.namespace(kind) else { continue };
        match namespace.path() {
            Some(path) => {
                let file = open_namespace(path)?;
                nix::sched::setns(file.as_fd(), flag).context(format_args!("join {}", path.display()))?;
            }
            None if kind == LinuxNamespaceType::Cgroup => {
                nix::sched::unshare(flag).context("unshare the cgroup namespace")?;
            }
            None if kind == LinuxNamespaceType::Network => {
                sys::loopback_up().context("bring up the loopback interface")?;
            }
            None => {}
        }
    }
    Ok(())
}

/// Opens a namespace by path, in the agent's view.
pub fn open_namespace(path: &PathBuf) -> Result<fs::File> {
    fs::File::open(path).map_err(|error| invalid(format!("the namespace {}: {error}", path.display())))
}

fn set_names(container: &Checked) -> Result<()> {
    let own = container.namespace(LinuxNamespaceType::Uts).is_some();
    for (name, set) in [
        (container.spec.hostname(), rustix::system::sethostname as fn(&[u8]) -> rustix::io::Result<()>),
        (container.spec.domainname(), rustix::system::setdomainname),
    ] {
        let Some(name) = name.as_ref().filter(|name| !name.is_empty()) else { continue };
        if !own {
            return Err(invalid("a hostname needs a UTS namespace"));
        }
        set(name.as_bytes()).context(format_args!("set the name {name:?}"))?;
    }
    Ok(())
}
