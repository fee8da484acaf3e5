//! A container's files, in and out: `cp`, `diff`, `export`, `commit`. All of it is done in the guest, of a running container
//! in its own, else in one that is started without the workload ([`super::container::access`]); what passes here is
//! bytes, a piece at a time, and whoever reads slowly holds the guest back.

mod commit;
mod path;

use bulkhead_agent_api::{
    AgentError, ErrorKind as AgentErrorKind,
    files::{self as wire, FilesOpen, FilesRequest, MAX_CHANGE_LINE},
};
use bulkhead_rootfs::layers::decompress;
use bytes::{Bytes, BytesMut};
use futures_util::{Stream, stream};
use tokio::sync::mpsc;

use super::{
    Engine, Error, ErrorKind, Name, Result,
    container::{Command, Container, access::Lease},
    image::feed::{Feed, Whole},
};
use crate::{
    api::types::container::{FileChange, PathStat},
    sandbox::files::{Incoming, Transfer, TransferError},
};

/// How much of an archive that comes in is handed on at a time.
const PIECE: usize = 64 << 10;

/// Pieces that wait for the guest.
const PIECES: usize = 4;

/// How an archive is unpacked into a container.
#[derive(Debug, Clone, Copy, Default)]
pub struct ExtractOptions {
    /// An existing directory must not be replaced by something else, nor the other way round.
    pub keep_kinds: bool,
    /// Everything is to be owned by the container's user.
    pub as_container_user: bool,
}

/// An archive that comes out of a container.
pub struct Pieces {
    lease: Lease,
    incoming: Incoming,
    /// What it is of, for errors.
    what: String,
}

impl Pieces {
    /// The next piece; None at the end of the whole.
    ///
    /// # Errors
    /// The guest's; what came before is not whole.
    pub async fn next(&mut self) -> Result<Option<Bytes>> {
        let Self { lease, incoming, what } = self;
        lease.step(async { incoming.next().await.map_err(|error| failed(&error, what)) }).await
    }

    /// As a stream, which ends with the first error.
    pub fn into_stream(self) -> impl Stream<Item = Result<Bytes>> + Send + 'static {
        stream::unfold(Some(self), |pieces| async {
            let mut pieces = pieces?;
            match pieces.next().await {
                Ok(Some(piece)) => Some((Ok(piece), Some(pieces))),
                Ok(None) => None,
                Err(error) => Some((Err(error), None)),
            }
        })
    }
}

impl Engine {
    /// What is at a path in a container: `HEAD /containers/{name}/archive`.
    ///
    /// # Errors
    /// No such container or file.
    pub async fn container_path_stat(&self, name: Name<'_>, path: &str) -> Result<PathStat> {
        let container = self.shared.registry.find(name)?;
        let request = FilesRequest::Stat { path: path::absolute(path)? };
        let (_lease, transfer) = open(&container, request, &not_there(path, name)).await?;
        stat(&transfer)
    }

    /// What is at a path in a container, as an archive.
    ///
    /// # Errors
    /// No such container or file.
    pub async fn container_archive(&self, name: Name<'_>, path: &str) -> Result<(PathStat, Pieces)> {
        let container = self.shared.registry.find(name)?;
        let request = FilesRequest::Get { path: path::absolute(path)? };
        let (lease, transfer) = open(&container, request, &not_there(path, name)).await?;
        let found = stat(&transfer)?;
        self.shared.publish(&container.view().record, "archive-path", []);
        let what = format!("copying {path} from container {name}");
        Ok((found, Pieces { lease, incoming: transfer.incoming(), what }))
    }

    /// Unpacks an archive, compressed or not, in a directory of a container.
    ///
    /// # Errors
    /// No such container or directory; it is read-only; a bad archive; the guest's disk is full.
    pub async fn container_extract<E: Send>(
        &self,
        name: Name<'_>,
        path: &str,
        options: ExtractOptions,
        body: impl Stream<Item = std::result::Result<Bytes, E>> + Send + 'static,
    ) -> Result<()> {
        let container = self.shared.registry.find(name)?;
        let record = container.view().record;
        let user = record.config.user.clone();
        let owner = (options.as_container_user && !user.is_empty()).then_some(user);
        let request =
            FilesRequest::Put { path: path::absolute(path)?, keep_kinds: options.keep_kinds, owner };
        let (lease, transfer) = open(&container, request, &not_there(path, name)).await?;
        let mut archive = uncompressed(body);
        let what = format!("copying to {path} in container {name}");
        let mut outgoing = transfer.outgoing();
        while let Some(piece) = archive.recv().await.unwrap_or_else(|| Err(cut_off()))? {
            lease.step(async { outgoing.send(piece).await.map_err(|error| failed(&error, &what)) }).await?;
        }
        lease.step(async { outgoing.finish().await.map_err(|error| failed(&error, &what)) }).await?;
        self.shared.publish(&record, "extract-to-dir", []);
        Ok(())
    }

    /// A container's root file system as an archive.
    ///
    /// # Errors
    /// No such container; it cannot be looked into.
    pub async fn container_export(&self, name: Name<'_>) -> Result<Pieces> {
        let container = self.shared.registry.find(name)?;
        let pieces = pieces(&container, FilesRequest::Export, format!("exporting container {name}")).await?;
        self.shared.publish(&container.view().record, "export", []);
        Ok(pieces)
    }

    /// What a container has changed of its image.
    ///
    /// # Errors
    /// No such container; it cannot be looked into. An error may also come later, as an item.
    pub async fn container_changes(
        &self,
        name: Name<'_>,
    ) -> Result<impl Stream<Item = Result<FileChange>> + Send + 'static> {
        let container = self.shared.registry.find(name)?;
        let pieces = pieces(&container, FilesRequest::Changes, format!("comparing container {name}")).await?;
        Ok(stream::unfold(Some(Lines { pieces, buffer: BytesMut::new() }), |lines| async {
            let mut lines = lines?;
            match lines.next().await {
                Ok(Some(change)) => Some((Ok(change), Some(lines))),
                Ok(None) => None,
                Err(error) => Some((Err(error), None)),
            }
        }))
    }
}

/// Opens a transfer that sends something.
pub(super) async fn pieces(container: &Container, request: FilesRequest, what: String) -> Result<Pieces> {
    let nothing = Error::internal(format!("{what}: it is not there"));
    let (lease, transfer) = open(container, request, &nothing).await?;
    Ok(Pieces { lease, incoming: transfer.incoming(), what })
}

async fn open(container: &Container, request: FilesRequest, not_there: &Error) -> Result<(Lease, Transfer)> {
    let lease = container.ask(Command::Files).await??;
    let open = FilesOpen { container: lease.guest.clone(), request };
    let transfer = lease
        .step(async { lease.sandbox.files(&open).await.map_err(Refused::Transfer) })
        .await
        .map_err(|refused| match refused {
            Refused::Engine(error) => error,
            Refused::Transfer(TransferError::Agent(AgentError {
                kind: AgentErrorKind::NotFound, ..
            })) => not_there.clone(),
            Refused::Transfer(error) => failed(&error, "its files"),
        })?;
    Ok((lease, transfer))
}

/// Why a transfer did not begin.
enum Refused {
    Engine(Error),
    Transfer(TransferError),
}

impl From<Error> for Refused {
    fn from(error: Error) -> Self {
        Self::Engine(error)
    }
}

fn cut_off() -> Error {
    Error::internal("reading the archive ended early")
}

/// Docker's words.
fn not_there(path: &str, container: &str) -> Error {
    Error::not_found(format!("Could not find the file {path} in container {container}"))
}

/// The agent's word where there is one, since it is about the user's own files.
fn failed(error: &TransferError, what: &str) -> Error {
    match error {
        TransferError::Agent(error) => {
            let kind = match error.kind {
                AgentErrorKind::Invalid => ErrorKind::Invalid,
                AgentErrorKind::Conflict => ErrorKind::Conflict,
                _ => ErrorKind::Internal,
            };
            let end = error.message.floor_char_boundary(4096);
            Error { kind, message: error.message[..end].to_owned() }
        }
        TransferError::Old => Error::conflict(error.to_string()),
        TransferError::Io(error) => Error::internal(format!("{what}: {error}")),
    }
}

/// What the agent says of a path, as Docker has it.
fn stat(transfer: &Transfer) -> Result<PathStat> {
    let found =
        transfer.stat().ok_or_else(|| Error::internal("the guest agent does not say what it found"))?;
    let cut = |text: &str| text[..text.floor_char_boundary(4096)].to_owned();
    let wire::PathStat { name, size, mode, mtime, mtime_nsec, link_target } = found;
    let nanoseconds = i32::try_from(*mtime_nsec).unwrap_or(0);
    Ok(PathStat {
        name: cut(name),
        size: i64::try_from(*size).unwrap_or(i64::MAX),
        mode: path::go_mode(*mode),
        mtime: jiff::Timestamp::new(*mtime, nanoseconds).unwrap_or(jiff::Timestamp::UNIX_EPOCH),
        link_target: cut(link_target),
    })
}

/// The archive in a body, piece by piece; None is its end. What ends early is an error.
fn uncompressed<E: Send>(
    body: impl Stream<Item = std::result::Result<Bytes, E>> + Send + 'static,
) -> mpsc::Receiver<Result<Option<Bytes>>> {
    let (sender, receiver) = mpsc::channel(PIECES);
    let feed = Feed::of(body);
    tokio::task::spawn_blocking(move || {
        let ended = feed.ended();
        let copied = decompress(feed).and_then(|reader| {
            let mut reader = Whole { reader, ended };
            loop {
                let mut piece = vec![0; PIECE];
                let count = std::io::Read::read(&mut reader, &mut piece)?;
                piece.truncate(count);
                let end = count == 0;
                if sender.blocking_send(Ok((!end).then(|| piece.into()))).is_err() || end {
                    return Ok(());
                }
            }
        });
        if let Err(error) = copied {
            let _ = sender.blocking_send(Err(Error::invalid(format!("the archive cannot be read: {error}"))));
        }
    });
    receiver
}

/// The agent's lines.
struct Lines {
    pieces: Pieces,
    buffer: BytesMut,
}

impl Lines {
    async fn next(&mut self) -> Result<Option<FileChange>> {
        let bad = |problem: &str| Error::internal(format!("the guest agent's list of changes: {problem}"));
        loop {
            if let Some(end) = self.buffer.iter().position(|&byte| byte == b'\n') {
                let line = self.buffer.split_to(end + 1);
                let change: wire::Change =
                    serde_json::from_slice(&line).map_err(|error| bad(&error.to_string()))?;
                let kind = match change.kind {
                    wire::ChangeKind::Modified => 0,
                    wire::ChangeKind::Added => 1,
                    wire::ChangeKind::Deleted => 2,
                };
                return Ok(Some(FileChange { path: change.path, kind }));
            }
            if self.buffer.len() > MAX_CHANGE_LINE {
                return Err(bad("a line is too long"));
            }
            match self.pieces.next().await? {
                Some(piece) => self.buffer.extend_from_slice(&piece),
                None if self.buffer.is_empty() => return Ok(None),
                None => return Err(bad("it ends in the middle of a line")),
            }
        }
    }
}
