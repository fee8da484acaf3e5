//! What the host gives a VMM to be confined by: a user id, a control group, namespaces, mounts.
//!
//! ```text
//!   sandbox directory ─▶ plan written to it ─▶ control group made ─▶ VMM cloned into it
//!                          (names uid and group, so that whoever ends the sandbox can give them back)
//! ```
//!
//! The VMM does the rest itself, see `vmm/src/jail`.

use std::{
    fs,
    io::{self, ErrorKind},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Once,
};

use rustix::{
    mount::OpenTreeFlags,
    process::{WaitId, WaitIdOptions},
};
use serde::{Deserialize, Serialize};

use super::{
    cgroup::{self, Cgroup, CgroupError, HostLimits},
    child::{self, Program, Rights},
    uids::{self, Uids},
};
use crate::sandbox::dir::{JAIL, SandboxDir};

/// How VMMs are confined on this host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Confinement {
    /// The user ids they run under, each in namespaces of its own. None: they run as the daemon's user in its
    /// namespaces, since somebody said so; what a process can do to itself is done even then.
    pub uids: Option<Uids>,
    /// The control group below which each gets its own. None: none does.
    pub cgroups: Option<PathBuf>,
}

/// What was given to one VMM, as its sandbox's directory says it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Given {
    /// The file that stands for its user id.
    uid: Option<(u32, PathBuf)>,
    /// Its control group.
    cgroup: Option<PathBuf>,
}

/// What a VMM is started into.
#[derive(Debug, Default)]
pub(crate) struct Cell {
    /// Its user and group id; None: the daemon's.
    pub(crate) uid: Option<u32>,
    /// Its control group; None: the daemon's.
    pub(crate) cgroup: Option<Cgroup>,
}

/// Why there is no cell.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// No user id.
    #[error("no user id for the VMM: {0}")]
    Uid(#[source] io::Error),
    /// The plan cannot be written.
    #[error("cannot write down how the VMM is confined: {0}")]
    Record(#[source] io::Error),
    /// No control group, or not with these limits.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
}

impl Cell {
    /// Makes one for the sandbox `name` in `dir`. What was made is given back by [`release`], on failure too.
    ///
    /// On a host without control groups limits of its CPUs are refused, since nothing else holds it to them. The
    /// bounds of memory and processes are the second fence around what the machine itself has; without them it
    /// is made, and the log says so once.
    pub(crate) fn make(
        confinement: &Confinement,
        dir: &SandboxDir,
        name: &str,
        limits: &HostLimits,
    ) -> Result<Self, JailError> {
        let cgroup = confinement.cgroups.as_ref().map(|parent| parent.join(name));
        let uid =
            confinement.uids.as_ref().map(|uids| uids.take(name)).transpose().map_err(JailError::Uid)?;
        let taken = confinement.uids.as_ref().zip(uid);
        let given = Given { uid: taken.map(|(uids, uid)| (uid, uids.directory.clone())), cgroup };
        let text = serde_json::to_vec(&given).map_err(io::Error::from);
        text.and_then(|text| fs::write(dir.path().join(JAIL), text)).map_err(|error| {
            if let Some((uids, uid)) = taken {
                let _ = uids.give_back(uid);
            }
            JailError::Record(error)
        })?;
        let cgroup = match &confinement.cgroups {
            None => None,
            Some(parent) => match Cgroup::create(parent, name, limits) {
                Ok(cgroup) => Some(cgroup),
                Err(error @ CgroupError::Unavailable { .. }) if !limits.has_cpu_limits() => {
                    static WARNED: Once = Once::new();
                    WARNED.call_once(|| tracing::warn!(%error, "VMMs run without control groups"));
                    None
                }
                Err(error) => return Err(error.into()),
            },
        };
        Ok(Self { uid, cgroup })
    }
}

/// The control group of the VMM whose sandbox directory this is.
pub(crate) fn adopt_cgroup(dir: &Path) -> Option<Cgroup> {
    Cgroup::open(given(dir)?.cgroup?).ok()
}

impl Cell {
    /// The one that was made for the VMM whose sandbox directory this is.
    pub(crate) fn adopt(dir: &Path) -> Self {
        let given = given(dir).unwrap_or_default();
        let cgroup = given.cgroup.and_then(|path| Cgroup::open(path).ok());
        Self { uid: given.uid.map(|(uid, _)| uid), cgroup }
    }
}

/// Gives back what was given to a VMM that has ended.
///
/// # Errors
/// Something of it is left.
pub(crate) fn release(dir: &Path) -> io::Result<()> {
    let Some(given) = given(dir) else { return Ok(()) };
    if let Some(path) = given.cgroup {
        remove_group(&path)?;
    }
    if let Some((uid, directory)) = given.uid {
        Uids { range: uid..uid, directory }.give_back(uid)?;
    }
    Ok(())
}

/// A process that was just killed takes a moment to end, the more so the more memory it has.
fn remove_group(path: &Path) -> io::Result<()> {
    for _ in 0..2000 {
        match cgroup::remove(path) {
            Err(error) if error.kind() == ErrorKind::ResourceBusy => {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            // There are no groups on this host, or the path leads nowhere.
            Err(error) if error.kind() == ErrorKind::NotADirectory => return Ok(()),
            other => return other,
        }
    }
    cgroup::remove(path)
}

fn given(dir: &Path) -> Option<Given> {
    serde_json::from_slice(&fs::read(dir.join(JAIL)).ok()?).ok()
}

/// Gives back user ids that a daemon which died had taken and not yet written down.
pub(crate) fn sweep(confinement: &Confinement, sandboxes: &Path) -> io::Result<()> {
    confinement.uids.as_ref().map_or(Ok(()), |uids| uids::sweep(&uids.directory, sandboxes))
}

/// A directory as a mount of its own that is in no namespace: read-only whatever the file system is, without
/// devices, programs or links, and without a parent, so that `..` leads nowhere. It goes with the last
/// descriptor.
///
/// # Errors
/// The directory is not there, or the daemon may not mount.
pub(crate) fn detached(directory: &Path) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let flags = flags | OpenTreeFlags::AT_SYMLINK_NOFOLLOW;
    let mount = rustix::mount::open_tree(rustix::fs::CWD, directory, flags)?;
    restrict_mount(&mount, true, false)?;
    Ok(mount)
}

/// What an `O_PATH` descriptor shows as a mount of its own that is in no namespace, likewise, but for what may be
/// written; `recursive` with all that is mounted below. What is mounted there later is not seen.
///
/// # Errors
/// The daemon may not mount.
pub(crate) fn detached_share(file: impl AsFd, read_only: bool, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    flags.set(OpenTreeFlags::AT_RECURSIVE, recursive);
    let mount = rustix::mount::open_tree(file, c"", flags)?;
    restrict_mount(&mount, read_only, recursive)?;
    Ok(mount)
}

fn restrict_mount(mount: &OwnedFd, read_only: bool, recursive: bool) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: if read_only { libc::MOUNT_ATTR_RDONLY } else { 0 }
            | libc::MOUNT_ATTR_NOSUID
            | libc::MOUNT_ATTR_NODEV
            | libc::MOUNT_ATTR_NOEXEC
            | libc::MOUNT_ATTR_NOSYMFOLLOW,
        attr_clr: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: 0,
    };
    // SAFETY: the path is an empty C string, and the structure is as long as said; the kernel copies it.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 },
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Starts this very program as a VMM is started, to say its version to nobody.
///
/// # Errors
/// What this host does not permit.
pub(crate) fn probe(uids: &Uids) -> io::Result<()> {
    let null = fs::File::options().read(true).write(true).open("/dev/null")?;
    let program = Program {
        path: &std::env::current_exe()?,
        arguments: vec![c"bulkheadd".into(), c"--version".into()],
        streams: [null.as_fd(); 3],
        inherited: Vec::new(),
        uid: Some(uids.range.start),
        rights: Rights::Own,
        cgroup: None,
    };
    let (_, pidfd) = child::start(&program, |_| Ok(()))?;
    let status = rustix::process::waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED)?;
    match status.and_then(|status| status.exit_status()) {
        Some(0) => Ok(()),
        _ => Err(io::Error::other("the program does not run there")),
    }
}

/// The kernel's version of Landlock; None where it has none.
pub(crate) fn landlock_version() -> Option<i64> {
    const CREATE_RULESET_VERSION: u32 = 1;
    let (none, size) = (std::ptr::null::<u8>(), 0usize);
    // SAFETY: with this flag nothing is read.
    let version =
        unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, none, size, CREATE_RULESET_VERSION) };
    (version > 0).then_some(version)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cell_without_anything_is_given_back_without_a_trace() {
        let base = tempfile::tempdir().unwrap();
        let dir = SandboxDir::create(base.path().join("s")).unwrap();
        let cell = Cell::make(&Confinement::default(), &dir, "s", &HostLimits::default()).unwrap();
        assert!(cell.uid.is_none() && cell.cgroup.is_none());
        release(dir.path()).unwrap();
        release(&base.path().join("nosuch")).unwrap();
    }

    #[test]
    fn a_user_id_is_written_down_and_given_back() {
        let base = tempfile::tempdir().unwrap();
        let dir = SandboxDir::create(base.path().join("s")).unwrap();
        let uids = Uids { range: 70..71, directory: base.path().join("u") };
        let confinement = Confinement { uids: Some(uids.clone()), cgroups: None };
        let cell = Cell::make(&confinement, &dir, "s", &HostLimits::default()).unwrap();
        assert_eq!(cell.uid, Some(70));
        let error = Cell::make(&confinement, &dir, "s", &HostLimits::default()).unwrap_err();
        assert!(matches!(error, JailError::Uid(_)), "{error}");
        release(dir.path()).unwrap();
        assert_eq!(uids.take("t").unwrap(), 70);
    }

    #[test]
    fn limits_of_cpus_are_refused_where_there_are_no_control_groups() {
        let base = tempfile::tempdir().unwrap();
        let dir = SandboxDir::create(base.path().join("s")).unwrap();
        let confinement = Confinement { uids: None, cgroups: Some(base.path().join("nogroups/p")) };
        let limits = HostLimits { cpu_weight: Some(1), ..HostLimits::default() };
        assert!(matches!(Cell::make(&confinement, &dir, "s", &limits), Err(JailError::Cgroup(_))));
        let bounds = HostLimits { memory_bytes: Some(1 << 30), ..HostLimits::default() };
        let cell = Cell::make(&confinement, &dir, "s", &bounds).unwrap();
        assert!(cell.cgroup.is_none());
        release(dir.path()).unwrap();
    }
}
