//! PID 1 of the test host.
//!
//! The kernel starts it on the outer machine's `/`, read-only over 9p. It lays a writable overlay over that,
//! mounts what a Linux needs, starts the command server as a child and from then on only reaps: every orphan
//! comes to it, and none of the server's own children does, so neither can take the other's exit code.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use clap::Args;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::process::{WaitOptions, wait};

use super::network;

#[derive(Args)]
pub(crate) struct InitArgs {
    /// The work tree's target directory: the one place where writes reach the outer machine.
    #[arg(long)]
    target: PathBuf,
    /// The state directory below it, with the token.
    #[arg(long)]
    state: PathBuf,
}

/// Where data roots lie.
const DATA_ROOTS: &str = "/var/lib/bulkhead";

/// A disk for them, which a test host may have.
const DISK: &str = "/dev/vda";

/// Sets the machine up, serves, and powers off. Returns only when it is not PID 1.
pub(crate) fn run(args: &InitArgs) -> Result<ExitCode> {
    if std::process::id() != 1 {
        bail!("host-init is the test host's PID 1 and nothing else");
    }
    if let Err(error) = set_up(args).and_then(|()| serve(args)) {
        eprintln!("host-init: {error:#}");
    }
    power_off()
}

fn set_up(args: &InitArgs) -> Result<()> {
    overlay_root()?;
    mount_kernel_filesystems()?;
    let tmpfs =
        |at: &str, mode: &str, data: &str| mount_at("tmpfs", at, "tmpfs", &format!("mode={mode}{data}"));
    tmpfs("/run", "0755", "")?;
    tmpfs("/dev/shm", "1777", "")?;
    // Data roots: neither 9p nor an overlay holds the xattrs and the overlays of a container engine.
    if Path::new(DISK).exists() {
        mount_at(DISK, DATA_ROOTS, "ext4", "")?;
        fs::set_permissions(DATA_ROOTS, fs::Permissions::from_mode(0o711))?;
    } else {
        tmpfs(DATA_ROOTS, "0711", ",size=75%")?;
    }
    // Only metadata goes uncached, so what a build replaces is seen at the next open.
    mount_at(
        "target",
        path(&args.target)?,
        "9p",
        "trans=virtio,version=9p2000.L,msize=524288,cache=readahead",
    )?;

    enable_controllers();
    rustix::system::sethostname(b"testhost").context("set the host name")?;
    network::bring_up().context("bring up the network")?;
    Ok(())
}

/// Puts a tmpfs-backed overlay over the read-only root and makes it the root.
fn overlay_root() -> Result<()> {
    // /run exists on every Linux, and what it holds outside means nothing in here.
    mount_at("tmpfs", "/run", "tmpfs", "mode=0755,size=75%")?;
    for dir in ["upper", "work", "root"] {
        fs::create_dir(Path::new("/run").join(dir))?;
    }
    mount_at("overlay", "/run/root", "overlay", "lowerdir=/,upperdir=/run/upper,workdir=/run/work,xino=off")?;
    std::env::set_current_dir("/run/root")?;
    rustix::process::pivot_root(".", ".").context("pivot_root")?;
    unmount(".", UnmountFlags::DETACH).context("leave the old root")?;
    std::env::set_current_dir("/")?;
    Ok(())
}

fn mount_kernel_filesystems() -> Result<()> {
    mount_at("proc", "/proc", "proc", "")?;
    mount_at("sysfs", "/sys", "sysfs", "")?;
    mount_at("cgroup2", "/sys/fs/cgroup", "cgroup2", "")?;
    mount_at("devtmpfs", "/dev", "devtmpfs", "mode=0755")?;
    mount_at("devpts", "/dev/pts", "devpts", "mode=0620,gid=5,ptmxmode=0666")?;
    mount_at("mqueue", "/dev/mqueue", "mqueue", "")?;
    for (link, to) in [("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")] {
        ignore_existing(std::os::unix::fs::symlink(to, Path::new("/dev").join(link)))?;
    }
    // Comfort for people who debug here; a kernel without them serves as well.
    let _ = mount_at("debugfs", "/sys/kernel/debug", "debugfs", "");
    let _ = mount_at("tracefs", "/sys/kernel/tracing", "tracefs", "");
    Ok(())
}

/// Makes every controller usable below the root cgroup, as systemd would.
fn enable_controllers() {
    let controllers = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default();
    for controller in controllers.split_whitespace() {
        let _ = fs::write("/sys/fs/cgroup/cgroup.subtree_control", format!("+{controller}"));
    }
}

fn serve(args: &InitArgs) -> Result<()> {
    let server = Command::new("/proc/self/exe")
        .arg("host-serve")
        .arg("--state")
        .arg(&args.state)
        .spawn()
        .context("start the command server")?;
    let server = i32::try_from(server.id())?;
    loop {
        match wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) if pid.as_raw_nonzero().get() == server => {
                if status.exit_status() != Some(0) {
                    bail!("the command server ended: {status:?}");
                }
                return Ok(());
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => bail!("wait: {error}"),
        }
    }
}

/// QEMU runs with `-no-reboot`: a reboot ends it, without needing ACPI.
fn power_off() -> ! {
    rustix::fs::sync();
    let _ = rustix::system::reboot(rustix::system::RebootCommand::Restart);
    // PID 1 must not return: the kernel would panic. It does so only if the reboot was refused.
    std::process::exit(1)
}

fn mount_at(source: &str, at: &str, kind: &str, data: &str) -> Result<()> {
    ignore_existing(fs::create_dir_all(at)).with_context(|| format!("create {at}"))?;
    let data = std::ffi::CString::new(data)?;
    mount(source, at, kind, MountFlags::empty(), data.as_c_str())
        .with_context(|| format!("mount {kind} at {at}"))?;
    if at == "/dev/shm" {
        fs::set_permissions(at, fs::Permissions::from_mode(0o1777))?;
    }
    Ok(())
}

fn ignore_existing(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

fn path(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))
}
