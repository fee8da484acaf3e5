//! A process's stdio: one vsock connection a stream, raw bytes after one frame each way.

use std::io;

use bulkhead_agent_api::{MAX_FRAME, OUTPUT_WINDOW, STREAM_PORT, StreamOpen, StreamReady, frame};
use bytes::{Bytes, BytesMut};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
};

use super::{dir::SandboxDir, vsock};

/// The largest chunk of output that is handed on.
const CHUNK: usize = 32 * 1024;

/// So many bytes may be safe before the agent is told. Less often than each chunk, since every
/// acknowledgement costs the guest an interrupt; well below the window, so that it never stops for it.
const ACKNOWLEDGE_EVERY: u64 = OUTPUT_WINDOW as u64 / 8;

/// Opens one stream of a process. Answers the offset at which an output begins too.
pub(super) async fn open(dir: &SandboxDir, open: &StreamOpen) -> io::Result<(UnixStream, u64)> {
    let mut stream = vsock::connect(dir, STREAM_PORT).await?;
    let from = greet(&mut stream, open).await?;
    Ok((stream, from))
}

async fn greet(stream: &mut UnixStream, open: &StreamOpen) -> io::Result<u64> {
    let frame = frame::encode(open).map_err(io::Error::other)?;
    stream.write_all(&frame).await?;
    // No byte beyond the frame may be taken: the process's output follows it.
    let length = stream.read_u32_le().await? as usize;
    if length > MAX_FRAME {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the agent's answer to a stream is too long"));
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await?;
    let ready: StreamReady = serde_json::from_slice(&body)?;
    match ready.error {
        None => Ok(ready.from),
        Some(error) => Err(io::Error::other(format!("the agent refuses a stream: {error}"))),
    }
}

/// A process's stdout or stderr.
#[derive(Debug)]
pub(crate) struct OutputStream {
    reader: OwnedReadHalf,
    writer: OwnedWriteHalf,
    buffer: BytesMut,
    taken: u64,
    acknowledged: u64,
}

impl OutputStream {
    /// Takes an opened stream that begins at byte `from` of the process's output.
    pub(crate) fn new(stream: UnixStream, from: u64) -> Self {
        let (reader, writer) = stream.into_split();
        Self { reader, writer, buffer: BytesMut::new(), taken: from, acknowledged: from }
    }

    /// The next chunk; None when the process's output has ended.
    pub(crate) async fn next(&mut self) -> io::Result<Option<Bytes>> {
        self.buffer.reserve(CHUNK);
        let read = (&mut self.reader).take(CHUNK as u64).read_buf(&mut self.buffer).await?;
        // Where it begins is the guest's word.
        self.taken = self.taken.saturating_add(read as u64);
        Ok((read > 0).then(|| self.buffer.split().freeze()))
    }

    /// How many bytes of the process's output were taken, those before this connection included.
    pub(crate) fn taken(&self) -> u64 {
        self.taken
    }

    /// Tells the agent that the first `safe` bytes need not be held any longer, when enough are new.
    pub(crate) async fn acknowledge(&mut self, safe: u64) -> io::Result<()> {
        if safe.saturating_sub(self.acknowledged) >= ACKNOWLEDGE_EVERY {
            self.writer.write_all(&safe.to_le_bytes()).await?;
            self.acknowledged = safe;
        }
        Ok(())
    }
}

/// A process's stdin. Its drop does not end the process's input; see [`InputStream::finish`].
#[derive(Debug)]
pub(crate) struct InputStream {
    /// Kept, so that the connection is not half closed by a drop.
    _reader: OwnedReadHalf,
    writer: OwnedWriteHalf,
}

impl InputStream {
    /// Takes an opened stream.
    pub(crate) fn new(stream: UnixStream) -> Self {
        let (reader, writer) = stream.into_split();
        Self { _reader: reader, writer }
    }

    /// Writes input; waits while the process does not read.
    pub(crate) async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.writer.write_all(bytes).await
    }

    /// Marks the last byte. The agent is to be told by `CloseStdin` as well.
    pub(crate) async fn finish(&mut self) -> io::Result<()> {
        self.writer.shutdown().await
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_agent_api::{AgentError, ErrorKind, ProcessId, StreamKind};

    use super::*;

    fn request() -> StreamOpen {
        let process = ProcessId { container: "c".into(), exec: None };
        StreamOpen { process, stream: StreamKind::Stdout, from: Some(10) }
    }

    async fn read_open(theirs: &mut UnixStream) -> StreamOpen {
        let length = theirs.read_u32_le().await.unwrap() as usize;
        let mut body = vec![0; length];
        theirs.read_exact(&mut body).await.unwrap();
        serde_json::from_slice(&body).unwrap()
    }

    #[tokio::test]
    async fn output_that_comes_with_the_greeting_is_not_lost_and_is_acknowledged_in_steps() {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        let mut early = frame::encode(&StreamReady { error: None, from: 10 }).unwrap();
        early.extend(b"hello");
        theirs.write_all(&early).await.unwrap();
        assert_eq!(greet(&mut ours, &request()).await.unwrap(), 10);
        assert_eq!(read_open(&mut theirs).await, request());
        let mut output = OutputStream::new(ours, 10);
        assert_eq!(output.next().await.unwrap().unwrap(), "hello");
        output.acknowledge(15).await.unwrap();
        output.acknowledge(10 + ACKNOWLEDGE_EVERY).await.unwrap();
        assert_eq!(theirs.read_u64_le().await.unwrap(), 10 + ACKNOWLEDGE_EVERY);
        theirs.shutdown().await.unwrap();
        assert!(output.next().await.unwrap().is_none());
    }

    #[tokio::test]
    async fn a_senseless_beginning_does_no_harm() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(b"hello").await.unwrap();
        let mut output = OutputStream::new(ours, u64::MAX - 1);
        assert_eq!(output.next().await.unwrap().unwrap(), "hello");
        assert_eq!(output.taken(), u64::MAX);
    }

    #[tokio::test]
    async fn a_refused_stream_is_an_error_with_the_agents_words() {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        let error = AgentError { kind: ErrorKind::NotFound, message: "no process".into() };
        theirs
            .write_all(&frame::encode(&StreamReady { error: Some(error), from: 0 }).unwrap())
            .await
            .unwrap();
        let error = greet(&mut ours, &request()).await.unwrap_err();
        assert_eq!(error.to_string(), "the agent refuses a stream: no process");
    }
}
