//! What PID 1 does before anything else: from the initramfs to a root that can be left.
//!
//! ```text
//!   initramfs (rootfs)            tmpfs, moved over it
//!   /init /dev/console    ──▶     /proc /sys /sys/fs/cgroup /dev /dev/pts /run
//! ```
//!
//! The move matters: nobody can `pivot_root` away from the initramfs itself, and every container does.

use std::{fs, path::Path};

use rustix::{
    mount::MountFlags,
    process::{Resource, Rlimit},
};

use crate::{
    cgroup,
    error::{Context, Result},
    sys,
};

/// Open files that a process may have unless its spec says otherwise; what Docker's daemon hands down.
const OPEN_FILES: u64 = 1 << 20;

/// Mounts, limits, loopback.
pub fn boot() -> Result<()> {
    change_root()?;
    cgroup::prepare()?;
    sys::loopback_up().context("bring up the loopback interface")?;
    let files = Rlimit { current: Some(OPEN_FILES), maximum: Some(OPEN_FILES) };
    rustix::process::setrlimit(Resource::Nofile, files).context("set RLIMIT_NOFILE")?;
    // By default the kernel derives it from the base memory, which grows later.
    let unlimited = Rlimit { current: None, maximum: None };
    rustix::process::setrlimit(Resource::Nproc, unlimited).context("set RLIMIT_NPROC")
}

fn change_root() -> Result<()> {
    const NEW: &str = "/root";
    let safe = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount(NEW, "tmpfs", safe, "mode=0755")?;
    for (name, kind, flags, data) in [
        ("proc", "proc", safe, ""),
        ("sys", "sysfs", safe, ""),
        ("sys/fs/cgroup", "cgroup2", safe, ""),
        ("dev", "devtmpfs", MountFlags::NOSUID | MountFlags::NOEXEC, "mode=0755"),
        ("dev/pts", "devpts", MountFlags::NOSUID | MountFlags::NOEXEC, "mode=0620,gid=5,ptmxmode=0666"),
        ("run", "tmpfs", safe, "mode=0755"),
    ] {
        let target = Path::new(NEW).join(name);
        fs::create_dir_all(&target).context(format_args!("mkdir {}", target.display()))?;
        mount(&target, kind, flags, data)?;
    }
    // Runs on from memory that is its own; nothing of it is left to be found.
    fs::remove_file("/init").context("remove /init")?;
    rustix::process::chdir(NEW).context("chdir")?;
    rustix::mount::mount_move(".", "/").context("move the root")?;
    rustix::process::chroot(".").context("chroot")?;
    rustix::process::chdir("/").context("chdir")
}

fn mount(target: impl AsRef<Path>, kind: &str, flags: MountFlags, data: &str) -> Result<()> {
    let target = target.as_ref();
    let data = std::ffi::CString::new(data).unwrap_or_default();
    rustix::mount::mount(kind, target, kind, flags, data.as_c_str())
        .context(format_args!("mount {kind} on {}", target.display()))
}
