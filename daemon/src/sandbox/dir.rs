//! A sandbox's directory below the daemon's exec root: what a restarted daemon needs to find it again.
//!
//! | name | what |
//! |---|---|
//! | `control.sock` | the VMM's control socket, listening |
//! | `vsock.sock` | the VMM's vsock socket, listening |
//! | `jail.json` | what the host gave the VMM to be confined by, see [`super::vmm::jail`] |
//! | `identity` | which process the VMM is, see [`super::vmm::process::Identity`] |
//! | `report.json` | the VMM's last words |
//! | `vmm.log` | the VMM's standard error |
//! | `shares.log` | its share server's standard error, where it has one; `shares0.log` and so on those of containers that joined |
//! | `saving` | there while the machine is being saved, and so may stand still |

use std::{
    fs::{DirBuilder, File, OpenOptions},
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{DirBuilderExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{Mode, OFlags},
    net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType},
};

pub(super) const CONTROL: &str = "control.sock";
pub(super) const VSOCK: &str = "vsock.sock";
pub(super) const JAIL: &str = "jail.json";
pub(super) const IDENTITY: &str = "identity";
pub(super) const REPORT: &str = "report.json";
pub(super) const LOG: &str = "vmm.log";
pub(super) const SHARES_LOG: &str = "shares.log";
const SAVING: &str = "saving";

/// How many connections may wait for a VMM that has not come round to accept them.
const BACKLOG: i32 = 64;

/// An open sandbox directory.
#[derive(Debug)]
pub(crate) struct SandboxDir {
    path: PathBuf,
    /// Sockets are addressed relative to this, since a `sun_path` holds but 108 bytes.
    handle: OwnedFd,
}

impl SandboxDir {
    /// Makes a new, private directory.
    pub(super) fn create(path: PathBuf) -> io::Result<Self> {
        DirBuilder::new().mode(0o700).create(&path)?;
        Self::open(path)
    }

    /// Opens one that exists.
    pub(super) fn open(path: PathBuf) -> io::Result<Self> {
        let handle =
            rustix::fs::open(&path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Self { path, handle })
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// A new file in it, for reading and writing; nobody else's.
    pub(super) fn new_file(&self, name: &str) -> io::Result<File> {
        OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(self.path.join(name))
    }

    /// A file in it for standard error, in the place of an earlier one.
    pub(super) fn log_file(&self, name: &str) -> io::Result<File> {
        match std::fs::remove_file(self.path.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        self.new_file(name)
    }

    /// A listening socket in it.
    pub(super) fn listen(&self, name: &str, kind: SocketType) -> io::Result<OwnedFd> {
        let socket = net::socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
        net::bind(&socket, &self.address(name)?)?;
        net::listen(&socket, BACKLOG)?;
        Ok(socket)
    }

    /// A non-blocking connection to a socket in it. Connecting to a Unix socket is immediate unless its
    /// backlog is full, which is an error here.
    pub(super) fn connect(&self, name: &str, kind: SocketType) -> io::Result<OwnedFd> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = net::socket_with(AddressFamily::UNIX, kind, flags, None)?;
        net::connect(&socket, &self.address(name)?)?;
        Ok(socket)
    }

    /// Notes that the machine may stand still from now on, for a daemon that comes after this one.
    pub(super) fn mark_saving(&self) -> io::Result<()> {
        File::create(self.path.join(SAVING)).map(drop)
    }

    /// Whether that was noted.
    pub(super) fn is_saving(&self) -> bool {
        self.path.join(SAVING).exists()
    }

    /// The machine runs.
    pub(super) fn unmark_saving(&self) -> io::Result<()> {
        std::fs::remove_file(self.path.join(SAVING))
    }

    /// Removes it, what is in it, and what was given to its VMM, which has ended; that it is gone already is no
    /// error.
    pub(super) fn remove(&self) -> io::Result<()> {
        remove(&self.path)
    }

    fn address(&self, name: &str) -> io::Result<SocketAddrUnix> {
        Ok(SocketAddrUnix::new(format!("/proc/self/fd/{}/{name}", self.handle.as_raw_fd()))?)
    }
}

/// Removes a sandbox directory and gives back what it says was given to its VMM; that it is gone already is no
/// error.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    super::vmm::jail::release(path)?;
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_work_below_a_path_longer_than_an_address() {
        let base = tempfile::tempdir().unwrap();
        let deep = base.path().join("d".repeat(120));
        let dir = SandboxDir::create(deep).unwrap();
        let _listener = dir.listen(CONTROL, SocketType::SEQPACKET).unwrap();
        dir.connect(CONTROL, SocketType::SEQPACKET).unwrap();
        dir.remove().unwrap();
        assert!(!dir.path().exists());
        dir.remove().unwrap();
    }
}
