//! Forking into a container's pid namespace and cgroup.

use std::{
    cell::OnceCell,
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use nix::sched::CloneFlags;
use rustix::{
    fs::{MemfdFlags, Mode, OFlags, SealFlags},
    io::Errno,
};

use crate::{
    cgroup::{self, Cgroup},
    error::{Context, Result, conflict, internal},
    log,
    sys::{self, Child},
};

/// Forks. The child is in `cgroup`, and in `pid_namespace` if one is given.
///
/// `beside` is a process of the container: when the container has divided its cgroup, which it may, the
/// kernel takes no process at the top, and the child goes where that one is.
pub fn spawn(
    flags: u64,
    cgroup: &Cgroup,
    pid_namespace: Option<BorrowedFd<'_>>,
    beside: Option<i32>,
    body: impl Fn() -> i32,
) -> Result<Child> {
    let _entered = pid_namespace.map(Entered::pid).transpose()?;
    match sys::fork_into(flags, Some(cgroup.directory()), &body) {
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            let Some(beside) = beside else { return Err(error).context("clone3") };
            let own = cgroup_of(beside).context("find the container's cgroup")?;
            sys::fork_into(flags, Some(&own), &body).context("clone3")
        }
        forked => forked.context("clone3"),
    }
}

fn cgroup_of(pid: i32) -> io::Result<OwnedFd> {
    let list = std::fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let path = list.lines().find_map(|line| line.strip_prefix("0::/")).ok_or(io::ErrorKind::NotFound)?;
    let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(Path::new(cgroup::MOUNT).join(path), flags, Mode::empty())?)
}

/// While it lives, the agent is in another's namespace: of pids, where children then begin (a process's own
/// never changes), or of host names.
struct Entered {
    own: File,
    kind: CloneFlags,
}

impl Entered {
    fn pid(namespace: BorrowedFd<'_>) -> Result<Self> {
        Self::enter(namespace, CloneFlags::CLONE_NEWPID, "pid")
    }

    fn enter(namespace: BorrowedFd<'_>, kind: CloneFlags, name: &str) -> Result<Self> {
        let own = File::open(format!("/proc/self/ns/{name}"))
            .context(format_args!("open the own {name} namespace"))?;
        nix::sched::setns(namespace, kind).map_err(|error| match error {
            nix::errno::Errno::ESRCH => conflict("the container has ended"),
            error => internal(format!("enter the container's {name} namespace: {error}")),
        })?;
        Ok(Self { own, kind })
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        if let Err(error) = nix::sched::setns(self.own.as_fd(), self.kind) {
            // It worked a moment ago the other way. Going on would put one container's processes into
            // another's namespace.
            log::warn(format_args!("cannot return to the own namespace: {error}"));
            std::process::abort();
        }
    }
}

/// Sets the host name in the UTS namespace of a running process.
pub fn set_hostname_of(process: &OwnedFd, hostname: &str) -> Result<()> {
    let _entered = Entered::enter(process.as_fd(), CloneFlags::CLONE_NEWUTS, "uts")?;
    rustix::system::sethostname(hostname.as_bytes()).context("set the host name")
}

thread_local! {
    static EXECUTABLE: OnceCell<OwnedFd> = const { OnceCell::new() };
}

/// The agent's executable for [`crate::tiny_init`]: a sealed copy in memory, so that a container which
/// opens `/proc/1/exe` holds nothing that anyone else will run (CVE-2019-5736). Made once, when first
/// needed.
pub fn own_executable() -> Result<OwnedFd> {
    EXECUTABLE.with(|cell| {
        if cell.get().is_none() {
            let copy = copy_executable().context("copy the init")?;
            let _ = cell.set(copy);
        }
        let copy = cell.get().ok_or_else(|| internal("no init"))?;
        copy.try_clone().context("dup")
    })
}

fn copy_executable() -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::EXEC;
    let copy = match rustix::fs::memfd_create("docker-init", flags) {
        // Kernels before 6.3 do not know the flag and need none.
        Err(Errno::INVAL) => rustix::fs::memfd_create("docker-init", flags - MemfdFlags::EXEC)?,
        made => made?,
    };
    let mut copy = File::from(copy);
    io::copy(&mut File::open("/proc/self/exe")?, &mut copy)?;
    let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&copy, seals)?;
    Ok(copy.into())
}
