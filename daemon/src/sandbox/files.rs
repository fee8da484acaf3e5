//! A transfer of a container's files: one vsock connection, chunks with an end that is said
//! ([`bulkhead_agent_api::files`]).
//!
//! What comes is the guest's: frames and chunks are capped, and an archive passes through as bytes.

use std::{io, pin::Pin};

use bulkhead_agent_api::{
    AgentError, MAX_FRAME,
    files::{FILES_PORT, FilesDone, FilesOpen, FilesReady, MAX_CHUNK, PathStat},
    frame,
};
use bytes::{Buf, Bytes, BytesMut};
use serde::de::DeserializeOwned;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
};

use super::{dir::SandboxDir, vsock};

/// The longest answer that is not a chunk.
const MAX_ANSWER: usize = 64 << 10;
const _: () = assert!(MAX_ANSWER <= MAX_FRAME);

/// Why a transfer failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TransferError {
    /// The agent says so.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// The agent takes no transfers: it was started by a daemon that knew none.
    #[error("the container's guest agent is of an older version: restart the container")]
    Old,
    /// The connection broke off.
    #[error("the guest's connection: {0}")]
    Io(#[from] io::Error),
}

/// A transfer that the agent has agreed to.
#[derive(Debug)]
pub(crate) struct Transfer {
    stat: Option<PathStat>,
    reader: OwnedReadHalf,
    writer: OwnedWriteHalf,
}

impl Transfer {
    /// Asks for one.
    pub(super) async fn open(dir: &SandboxDir, open: &FilesOpen) -> Result<Self, TransferError> {
        let stream = vsock::connect(dir, FILES_PORT).await.map_err(|error| match error.kind() {
            io::ErrorKind::ConnectionRefused => TransferError::Old,
            _ => TransferError::Io(error),
        })?;
        Self::over(stream, open).await
    }

    async fn over(stream: UnixStream, open: &FilesOpen) -> Result<Self, TransferError> {
        let (mut reader, mut writer) = stream.into_split();
        writer.write_all(&frame::encode(open).map_err(io::Error::other)?).await?;
        let ready: FilesReady = answer(&mut reader).await?;
        match ready.error {
            Some(error) => Err(error.into()),
            None => Ok(Self { stat: ready.stat, reader, writer }),
        }
    }

    /// What was found at the path that was asked for.
    pub(crate) fn stat(&self) -> Option<&PathStat> {
        self.stat.as_ref()
    }

    /// What is sent, piece by piece.
    pub(crate) fn incoming(self) -> Incoming {
        Incoming { reader: self.reader, _writer: self.writer, left: 0, buffer: BytesMut::new() }
    }

    /// What is to be sent.
    pub(crate) fn outgoing(self) -> Outgoing {
        let mut reader = self.reader;
        Outgoing { writer: self.writer, verdict: Box::pin(async move { verdict(&mut reader).await }) }
    }
}

/// What the agent takes. Dropped before [`Outgoing::finish`] it is no whole archive to the agent.
pub(crate) struct Outgoing {
    writer: OwnedWriteHalf,
    /// The agent's word, which may come at any time.
    verdict: Pin<Box<dyn Future<Output = Result<(), TransferError>> + Send>>,
}

impl Outgoing {
    /// Sends a piece; waits while the agent does not take it.
    ///
    /// # Errors
    /// The agent wants no more, and says why; or the connection's.
    pub(crate) async fn send(&mut self, mut piece: Bytes) -> Result<(), TransferError> {
        let Self { writer, verdict } = self;
        let sent = async {
            while !piece.is_empty() {
                let chunk = piece.split_to(piece.len().min(MAX_CHUNK));
                let head = (chunk.len() as u32).to_le_bytes();
                writer.write_all_buf(&mut Buf::chain(&head[..], chunk)).await?;
            }
            Ok::<(), TransferError>(())
        };
        tokio::select! {
            biased;
            verdict = verdict => {
                verdict?;
                Err(invalid("the guest agent was done before the archive was").into())
            }
            sent = sent => sent,
        }
    }

    /// Sends the end, and waits until all was taken.
    ///
    /// # Errors
    /// The agent's, or the connection's.
    pub(crate) async fn finish(mut self) -> Result<(), TransferError> {
        self.writer.write_all(&0_u32.to_le_bytes()).await?;
        self.verdict.await
    }
}

async fn verdict(reader: &mut OwnedReadHalf) -> Result<(), TransferError> {
    let done: FilesDone = answer(reader).await?;
    done.error.map_or(Ok(()), |error| Err(error.into()))
}

/// What the agent sends.
#[derive(Debug)]
pub(crate) struct Incoming {
    reader: OwnedReadHalf,
    /// Kept: half a connection would be no connection to the agent.
    _writer: OwnedWriteHalf,
    /// Bytes of the present chunk that have not come.
    left: usize,
    buffer: BytesMut,
}

impl Incoming {
    /// The next piece; None when all of it was sent.
    ///
    /// # Errors
    /// The agent's, or the connection's: what came before is not whole.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, TransferError> {
        if self.left == 0 {
            self.left = self.reader.read_u32_le().await? as usize;
            if self.left > MAX_CHUNK {
                return Err(invalid("the guest's chunk is too long").into());
            }
            if self.left == 0 {
                return verdict(&mut self.reader).await.map(|()| None);
            }
        }
        self.buffer.reserve(self.left);
        let count = (&mut self.reader).take(self.left as u64).read_buf(&mut self.buffer).await?;
        if count == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        self.left -= count;
        Ok(Some(self.buffer.split().freeze()))
    }
}

/// One frame, and no byte beyond it.
async fn answer<T: DeserializeOwned>(reader: &mut (impl AsyncRead + Unpin)) -> io::Result<T> {
    let length = reader.read_u32_le().await? as usize;
    if length > MAX_ANSWER {
        return Err(invalid("the guest's answer is too long"));
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).await?;
    Ok(serde_json::from_slice(&body)?)
}

fn invalid(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

#[cfg(test)]
mod tests {
    use bulkhead_agent_api::{ErrorKind, files::FilesRequest};

    use super::*;

    fn open() -> FilesOpen {
        FilesOpen { container: "c".into(), request: FilesRequest::Export }
    }

    async fn opened(ready: &[u8]) -> (Result<Transfer, TransferError>, UnixStream) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(ready).await.unwrap();
        let transfer = Transfer::over(ours, &open()).await;
        let asked: FilesOpen = answer(&mut theirs).await.unwrap();
        assert_eq!(asked, open());
        (transfer, theirs)
    }

    fn ready() -> Vec<u8> {
        frame::encode(&FilesReady { error: None, stat: None }).unwrap()
    }

    fn done(error: Option<AgentError>) -> Vec<u8> {
        frame::encode(&FilesDone { error }).unwrap()
    }

    fn refusal() -> AgentError {
        AgentError { kind: ErrorKind::Internal, message: "no".into() }
    }

    async fn all(mut incoming: Incoming) -> Result<Vec<u8>, TransferError> {
        let mut all = Vec::new();
        while let Some(bytes) = incoming.next().await? {
            all.extend(bytes);
        }
        Ok(all)
    }

    #[tokio::test]
    async fn an_archive_is_whole_or_an_error() {
        let whole = [b"\x03\0\0\0abc\x02\0\0\0de\0\0\0\0".as_slice(), &done(None)].concat();
        let (transfer, mut theirs) = opened(&[ready(), whole].concat()).await;
        theirs.shutdown().await.unwrap();
        assert_eq!(all(transfer.unwrap().incoming()).await.unwrap(), b"abcde");

        for broken in [
            b"".to_vec(),
            b"\x03\0\0\0ab".to_vec(),
            b"\x03\0\0\0abc".to_vec(),
            b"\0\0\0\0".to_vec(),
            b"\xff\xff\xff\xff".to_vec(),
            [b"\0\0\0\0".as_slice(), &done(Some(refusal()))].concat(),
            [b"\0\0\0\0".as_slice(), b"\xff\xff\0\0"].concat(),
        ] {
            let (transfer, theirs) = opened(&[ready(), broken.clone()].concat()).await;
            drop(theirs);
            assert!(all(transfer.unwrap().incoming()).await.is_err(), "{broken:?}");
        }
    }

    #[tokio::test]
    async fn a_refusal_is_the_agents() {
        let refused = frame::encode(&FilesReady { error: Some(refusal()), stat: None }).unwrap();
        let (transfer, _theirs) = opened(&refused).await;
        assert!(matches!(transfer, Err(TransferError::Agent(error)) if error == refusal()));
    }

    #[tokio::test]
    async fn what_is_sent_may_be_refused_in_the_middle() {
        let (transfer, mut theirs) = opened(&ready()).await;
        theirs.write_all(&done(Some(refusal()))).await.unwrap();
        let result = transfer.unwrap().outgoing().send(Bytes::from_static(&[0; 1000])).await;
        assert!(matches!(result, Err(TransferError::Agent(error)) if error == refusal()));

        let (transfer, mut theirs) = opened(&ready()).await;
        let agent = tokio::spawn(async move {
            let mut got = Vec::new();
            loop {
                let length = theirs.read_u32_le().await.unwrap() as usize;
                assert!(length <= MAX_CHUNK);
                if length == 0 {
                    break;
                }
                let at = got.len();
                got.resize(at + length, 0);
                theirs.read_exact(&mut got[at..]).await.unwrap();
            }
            theirs.write_all(&done(None)).await.unwrap();
            got
        });
        let mut outgoing = transfer.unwrap().outgoing();
        outgoing.send(Bytes::new()).await.unwrap();
        outgoing.send(Bytes::from(vec![7; MAX_CHUNK + 5])).await.unwrap();
        outgoing.finish().await.unwrap();
        assert_eq!(agent.await.unwrap(), vec![7; MAX_CHUNK + 5]);
    }
}
