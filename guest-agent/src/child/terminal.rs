//! A process's pseudo-terminal, in its container's own devpts.
//!
//! The container may have put anything at `/dev/pts/ptmx` or `/dev/console` (CVE-2025-52565), so the
//! directory must be a devpts, the master is opened in it without following links, and the slave by the
//! master and not by a name.

use std::os::fd::OwnedFd;

use rustix::{
    fs::{CWD, Mode, OFlags, ResolveFlags},
    mount::{MoveMountFlags, OpenTreeFlags},
    pty::OpenptFlags,
    termios::Winsize,
};

use super::{Plan, status};
use crate::error::{Context, Result, invalid};

/// `DEVPTS_SUPER_MAGIC`
const DEVPTS: u64 = 0x1cd1;

/// The process's side of a terminal; the other went to the agent.
pub(super) struct Terminal {
    slave: OwnedFd,
}

/// Makes a terminal, sends its master to the agent and makes it this session's controlling terminal.
pub(super) fn open(plan: &Plan<'_>) -> Result<Terminal> {
    let flags = OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC;
    let directory = rustix::fs::openat2(CWD, "/dev/pts", flags, Mode::empty(), ResolveFlags::NO_MAGICLINKS)
        .context("open /dev/pts")?;
    let magic = rustix::fs::fstatfs(&directory).context("statfs /dev/pts")?.f_type;
    if magic as u64 != DEVPTS {
        return Err(invalid("the container has no devpts on /dev/pts"));
    }
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let master =
        rustix::fs::openat(&directory, "ptmx", flags, Mode::empty()).context("open /dev/pts/ptmx")?;
    rustix::pty::unlockpt(&master).context("unlock")?;
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags).context("open the peer")?;
    if let Some((rows, columns)) = plan.stdio.size {
        rustix::termios::tcsetwinsize(&master, size(rows, columns)).context("set the size")?;
    }
    rustix::process::ioctl_tiocsctty(&slave).context("make it the controlling terminal")?;
    status::send_terminal(&plan.status, &master)?;
    Ok(Terminal { slave })
}

/// A terminal's size as the kernel takes it.
pub(crate) fn size(rows: u16, columns: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}

impl Terminal {
    pub(super) fn slave(&self) -> &OwnedFd {
        &self.slave
    }

    /// Makes it the container's `/dev/console`.
    pub(super) fn bind_console(&self) -> Result<()> {
        let flags = OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let mode = Mode::from_raw_mode(0o620);
        rustix::fs::open("/dev/console", flags | OFlags::WRONLY, mode).context("create /dev/console")?;
        let flags =
            OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
        let tree = rustix::mount::open_tree(&self.slave, c"", flags).context("open_tree of the terminal")?;
        rustix::mount::move_mount(&tree, c"", CWD, "/dev/console", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
            .context("mount /dev/console")
    }
}
