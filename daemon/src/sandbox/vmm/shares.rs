//! Starts a share server: the process that serves a sandbox's volumes and bind mounts to its VMM.
//!
//! ```text
//!   daemon ── roots, channel, memory ──▶ share server
//!     └────── channel's other end, memory ──▶ VMM (AttachServer)
//! ```
//!
//! The daemon keeps neither: the server ends with its VMM, and a daemon that is restarted need not know of it. It is
//! in the VMM's control group, under its user id, and in namespaces of its own.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::{Path, PathBuf},
};

use bulkhead_vmm_api::{
    Jail,
    share::{AREA_SIZE, Caching, Share, ShareConfig, VERSION},
};
use rustix::{
    fs::{MemfdFlags, Mode, OFlags, ResolveFlags, SealFlags},
    net::{AddressFamily, SocketFlags, SocketType, socketpair},
};

use super::{
    child::{self, Program, Rights},
    jail::{Cell, detached_share},
    process::Process,
    spawn::{memory_file, number},
};
use crate::sandbox::dir::{SHARES_LOG, SandboxDir};

/// What a guest gets to see of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShareSpec {
    /// Its name in the guest's view.
    pub name: String,
    /// A directory or file of the host; its links are followed.
    pub path: PathBuf,
    /// A file below it that is meant: no link on the way to it leads out.
    pub beneath: Option<PathBuf>,
    /// Whether nothing in it may be changed.
    pub read_only: bool,
    /// Whether with what is mounted below it.
    pub recursive: bool,
    /// Whether the guest may keep what it has read for a second.
    pub cached: bool,
}

impl ShareSpec {
    /// What is served, by one path. For people, and for a look whether it is there: it may lead out of a share.
    #[must_use]
    pub fn whole_path(&self) -> PathBuf {
        self.beneath.as_ref().map_or_else(|| self.path.clone(), |beneath| self.path.join(beneath))
    }
}

/// Why a share cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum SharesError {
    /// A file cannot be had.
    #[error("{}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The server cannot be started.
    #[error("cannot start the share server: {0}")]
    Start(#[from] io::Error),
}

/// What the VMM is to be given.
#[derive(Debug)]
pub(crate) struct Attachment {
    pub(crate) channel: OwnedFd,
    pub(crate) area: OwnedFd,
}

/// Starts a server of these shares.
pub(crate) fn spawn(
    dir: &SandboxDir,
    program: &Path,
    cell: &Cell,
    memory_mib: u32,
    shares: &[ShareSpec],
) -> Result<(Process, Attachment), SharesError> {
    let roots = shares.iter().map(|share| open(share, cell.uid.is_some())).collect::<Result<Vec<_>, _>>()?;
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
        .map_err(io::Error::from)?;
    let area = area()?;
    let config = ShareConfig {
        version: VERSION,
        jail: if cell.uid.is_some() { Jail::Full } else { Jail::Process },
        channel: theirs.as_raw_fd(),
        area: area.as_raw_fd(),
        memory_mib,
        shares: shares
            .iter()
            .zip(&roots)
            .map(|(share, root)| Share {
                name: share.name.clone(),
                root: root.as_raw_fd(),
                read_only: share.read_only,
                caching: if share.cached { Caching::Cached } else { Caching::Consistent },
            })
            .collect(),
    };
    let config = memory_file(&serde_json::to_vec(&config).map_err(io::Error::from)?)?;
    let null = File::options().read(true).write(true).open("/dev/null")?;
    let log = dir.new_file(SHARES_LOG)?;
    let mut inherited = vec![config.as_raw_fd(), theirs.as_raw_fd(), area.as_raw_fd()];
    inherited.extend(roots.iter().map(AsRawFd::as_raw_fd));
    let program = Program {
        path: program,
        arguments: vec![c"bulkhead-vmm".into(), c"--share-config-fd".into(), number(config.as_raw_fd())],
        streams: [null.as_fd(), null.as_fd(), log.as_fd()],
        inherited,
        uid: cell.uid,
        rights: Rights::Files,
        cgroup: cell.cgroup.as_ref().map(AsFd::as_fd),
    };
    let (pid, pidfd) = child::start(&program, |_| Ok(()))?;
    Ok((Process::of_child(pid, pidfd)?, Attachment { channel: ours, area }))
}

/// A share's root, as a mount that has no parent where its server is jailed.
fn open(share: &ShareSpec, jailed: bool) -> Result<OwnedFd, SharesError> {
    let path = share.whole_path();
    let failed = |source: io::Error| SharesError::File { path: path.clone(), source };
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let file = rustix::fs::open(&share.path, flags, Mode::empty()).map_err(|error| failed(error.into()))?;
    let file = match &share.beneath {
        None => file,
        Some(beneath) => rustix::fs::openat2(&file, beneath, flags, Mode::empty(), ResolveFlags::BENEATH)
            .map_err(|error| failed(error.into()))?,
    };
    if !jailed {
        return Ok(file);
    }
    detached_share(file, share.read_only, share.recursive).map_err(failed)
}

/// The memory that server and VMM share. It can neither grow nor shrink.
fn area() -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = rustix::fs::memfd_create("bulkhead-shares", flags)?;
    rustix::fs::ftruncate(&file, AREA_SIZE as u64)?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW)?;
    Ok(file)
}
