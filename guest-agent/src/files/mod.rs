//! A container's files, in and out: what runs for one connection to the files port.
//!
//! ```text
//!   server ── FilesOpen ──▶ fork ──▶ child: enter the container's view ──▶ serve ──▶ _exit
//!                                     │ running: its mount namespace
//!                                     │ created or ended: a namespace of the child's own, its shares bound
//! ```
//! A transfer takes as long as its peer likes, so each has a process of its own, which may wait and which the
//! agent can kill. It is outside of the container's cgroup: a paused container's files can be copied. It works on
//! the container's tree by descriptors; what it opens is what it has looked at, whatever is renamed, replaced by a
//! link or grows meanwhile.

mod changes;
mod chunks;
mod layer;
mod pack;
mod root;
#[cfg(test)]
mod tests;
mod unpack;
mod xattrs;

use std::{
    fs,
    io::{self, BufReader, Write},
    os::fd::OwnedFd,
};

use bulkhead_agent_api::{
    AgentError, ErrorKind,
    files::{FilesDone, FilesOpen, FilesReady, FilesRequest, MAX_FILES_PATH, PathStat},
    frame,
};
use rustix::process::{Resource, Rlimit};

use self::{
    chunks::{ChunkReader, ChunkWriter},
    root::{Place, Root},
};
use crate::{
    error::{Result, errno_text, internal, invalid},
    rootfs::Mounted,
    spec::Checked,
    sys,
};

/// Descriptors that a walk may hold: one for each level of a tree, and PATH_MAX bounds the levels.
const DESCRIPTORS: u64 = 8192;

/// A transfer, ready to be served by a child of the agent's.
pub struct Transfer<'a> {
    /// What the daemon wants.
    pub request: &'a FilesRequest,
    /// The container.
    pub container: &'a Checked,
    /// Its root file system.
    pub mounted: &'a Mounted,
    /// Its first process, if that runs: whose view of the files is the container's.
    pub init: Option<&'a OwnedFd>,
    /// The connection.
    pub connection: &'a OwnedFd,
}

/// Checks what can be checked before the fork.
///
/// # Errors
/// Of kind `Invalid`.
pub fn validate(open: &FilesOpen) -> Result<()> {
    let path = match &open.request {
        FilesRequest::Stat { path } | FilesRequest::Get { path } | FilesRequest::Put { path, .. } => path,
        FilesRequest::Export | FilesRequest::Changes | FilesRequest::Diff => return Ok(()),
    };
    let dotted = path.split('/').any(|part| part == "..");
    if !path.starts_with('/') || dotted || path.contains('\0') || path.len() > MAX_FILES_PATH {
        return Err(invalid(format!("{path:?} is not an absolute path without dots")));
    }
    Ok(())
}

/// What is done in the child; its exit code.
pub fn run(transfer: &Transfer<'_>) -> i32 {
    let keep: Vec<&OwnedFd> = [Some(transfer.connection), transfer.init].into_iter().flatten().collect();
    let prepared = sys::close_all_but(&keep).and_then(|()| {
        rustix::io::ioctl_fionbio(transfer.connection, false)?;
        Ok(())
    });
    if prepared.is_err() {
        return 1;
    }
    // What it takes too much of is to be missed by nobody else.
    let _ = fs::write("/proc/self/oom_score_adj", "1000");
    let limit = Rlimit { current: Some(DESCRIPTORS), maximum: Some(DESCRIPTORS) };
    let _ = rustix::process::setrlimit(Resource::Nofile, limit);
    rustix::process::umask(rustix::fs::Mode::empty());
    match serve(transfer) {
        Ok(()) => 0,
        // The daemon has hung up, and so there is nobody to be told.
        Err(_) => 1,
    }
}

/// Serves; an error is the connection's.
fn serve(transfer: &Transfer<'_>) -> io::Result<()> {
    let connection = Connection(transfer.connection);
    let place = match (transfer.request, transfer.init) {
        (FilesRequest::Export | FilesRequest::Changes | FilesRequest::Diff, _) => Place::Agent,
        (_, Some(init)) => Place::Running(init),
        (_, None) => Place::Resting,
    };
    let root = match Root::enter(place, transfer.container, transfer.mounted) {
        Ok(root) => root,
        Err(error) => return connection.refuse(error),
    };
    match transfer.request {
        FilesRequest::Stat { path } => match root.look(path) {
            Ok((_, stat)) => connection.ready(Some(stat)),
            Err(error) => connection.refuse(error),
        },
        FilesRequest::Get { path } => match root.look(path) {
            Ok((file, stat)) => {
                let name = stat.name.clone();
                connection.ready(Some(stat))?;
                connection.send(|out| pack::pack(&root, &file, &name, pack::Mounts::Ordinary, out))
            }
            Err(error) => connection.refuse(error),
        },
        FilesRequest::Export => match transfer.mounted.bare_root() {
            Ok(tree) => {
                connection.ready(None)?;
                connection.send(|out| pack::pack(&root, &tree, "/", pack::Mounts::None, out))
            }
            Err(error) => connection.refuse(error),
        },
        FilesRequest::Changes => match changes::Trees::open(transfer.mounted, transfer.container) {
            Ok(trees) => {
                connection.ready(None)?;
                connection.send(|out| trees.list(out))
            }
            Err(error) => connection.refuse(error),
        },
        FilesRequest::Diff => match changes::Trees::open(transfer.mounted, transfer.container) {
            Ok(trees) => {
                connection.ready(None)?;
                connection.send(|out| layer::layer(&root, &trees, out))
            }
            Err(error) => connection.refuse(error),
        },
        FilesRequest::Put { path, keep_kinds, owner } => {
            let options = unpack::Options { keep_kinds: *keep_kinds, owner: owner.as_deref() };
            let read_only =
                transfer.container.spec.root().as_ref().and_then(oci_spec::runtime::Root::readonly);
            let target = unpack::Target::open(&root, path, options, read_only == Some(true));
            match target {
                Ok(target) => {
                    connection.ready(None)?;
                    connection.receive(|archive| target.unpack(archive))
                }
                Err(error) => connection.refuse(error),
            }
        }
    }
}

/// Why an archive was not made, or not taken: the peer has gone, or something to be told.
#[derive(Debug)]
enum Failure {
    /// The connection's.
    Peer(io::Error),
    /// To be told.
    Told(AgentError),
}

impl From<AgentError> for Failure {
    fn from(error: AgentError) -> Self {
        Self::Told(error)
    }
}

/// Adds what was being done to whose file.
trait About<T> {
    /// `what path: no such file or directory`.
    fn about(self, what: &str, path: &[u8]) -> Result<T>;
}

impl<T, E: Into<io::Error>> About<T> for std::result::Result<T, E> {
    fn about(self, what: &str, path: &[u8]) -> Result<T> {
        self.map_err(|error| failed(what, path, &error.into()))
    }
}

/// An error about one file, its name cut to a length for people.
fn failed(what: &str, path: &[u8], error: &io::Error) -> AgentError {
    let message = format!("{what} {}: {}", bulkhead_tar::shown(path), errno_text(error));
    let kind = match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => ErrorKind::NotFound,
        _ => ErrorKind::Internal,
    };
    AgentError { kind, message }
}

/// The daemon's side.
struct Connection<'a>(&'a OwnedFd);

impl Connection<'_> {
    fn ready(&self, stat: Option<PathStat>) -> io::Result<()> {
        self.frame(&FilesReady { error: None, stat })
    }

    fn refuse(&self, error: AgentError) -> io::Result<()> {
        self.frame(&FilesReady { error: Some(error), stat: None })
    }

    /// Sends what `make` writes, and how it ended.
    fn send(
        &self,
        make: impl FnOnce(&mut ChunkWriter<Socket<'_>>) -> std::result::Result<(), Failure>,
    ) -> io::Result<()> {
        let mut out = ChunkWriter::new(Socket(self.0));
        let error = match make(&mut out) {
            Ok(()) => None,
            Err(Failure::Peer(error)) => return Err(error),
            Err(Failure::Told(error)) => Some(error),
        };
        out.finish()?;
        self.frame(&FilesDone { error })
    }

    /// Gives `take` what comes, and says how it ended. The rest of what comes is read and forgotten: a connection
    /// that is closed with bytes unread may lose the answer.
    fn receive(
        &self,
        take: impl FnOnce(&mut BufReader<ChunkReader<Socket<'_>>>) -> std::result::Result<(), Failure>,
    ) -> io::Result<()> {
        let mut archive = BufReader::with_capacity(64 << 10, ChunkReader::new(Socket(self.0)));
        let error = match take(&mut archive) {
            Ok(()) => None,
            Err(Failure::Peer(error)) => return Err(error),
            Err(Failure::Told(error)) => Some(error),
        };
        let whole = error.is_none();
        if whole {
            io::copy(&mut archive, &mut io::sink())?;
        }
        self.frame(&FilesDone { error })?;
        if !whole {
            io::copy(&mut Socket(self.0), &mut io::sink())?;
        }
        Ok(())
    }

    fn frame(&self, message: &impl serde::Serialize) -> io::Result<()> {
        let frame = frame::encode(message).map_err(io::Error::other)?;
        Socket(self.0).write_all(&frame)
    }
}

/// A connected socket; writing to one that is closed is an error and no signal.
struct Socket<'a>(&'a OwnedFd);

impl io::Read for Socket<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::read(self.0, buffer)?)
    }
}

impl Write for Socket<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(rustix::net::send(self.0, bytes, rustix::net::SendFlags::NOSIGNAL)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Where an archive cannot be read on.
fn bad_archive(error: bulkhead_tar::Error) -> Failure {
    match error {
        bulkhead_tar::Error::Source(error) => Failure::Peer(error),
        error => Failure::Told(invalid(error.to_string())),
    }
}

/// More names would have to be remembered than there is room for.
fn too_many(what: &str) -> AgentError {
    internal(format!("there are too many {what} to be copied at once"))
}
