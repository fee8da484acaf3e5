//! From the network's tasks to threads that may block: a bounded channel of chunks that is a [`Read`].
//!
//! An end is said, not inferred: a sender that is dropped before it has said so (a cut connection, a client
//! that went away) makes the reader fail, so that half a stream never passes for a whole one.

use std::{
    io::{self, Read},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use bytes::{Buf, Bytes};
use futures_util::{Stream, StreamExt};
use tokio::sync::mpsc;

/// Chunks between the two: of hyper's size, some 16 KiB each.
const CHUNKS: usize = 64;

/// The sending end. None is the stream's end.
pub(in crate::engine) type Chunks = mpsc::Sender<Option<Bytes>>;

/// The reading end.
#[derive(Debug)]
pub(in crate::engine) struct Feed {
    chunks: mpsc::Receiver<Option<Bytes>>,
    present: Bytes,
    consumed: Arc<AtomicU64>,
    ended: Arc<AtomicBool>,
}

impl Feed {
    /// Both ends.
    pub(in crate::engine) fn channel() -> (Chunks, Self) {
        let (sender, chunks) = mpsc::channel(CHUNKS);
        (sender, Self { chunks, present: Bytes::new(), consumed: Arc::default(), ended: Arc::default() })
    }

    /// The reading end of `body`, which a task of its own feeds in.
    pub(in crate::engine) fn of<E>(body: impl Stream<Item = Result<Bytes, E>> + Send + 'static) -> Self
    where
        E: Send,
    {
        let (chunks, feed) = Self::channel();
        tokio::spawn(async move {
            let mut body = std::pin::pin!(body);
            while let Some(item) = body.next().await {
                // Dropping the sender is how an error is told; so is the reader's lack of interest.
                let Ok(chunk) = item else { return };
                if chunks.send(Some(chunk)).await.is_err() {
                    return;
                }
            }
            let _ = chunks.send(None).await;
        });
        feed
    }

    /// Counts the bytes that were read.
    pub(in crate::engine) fn consumed(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.consumed)
    }

    /// Becomes true at the end.
    pub(in crate::engine) fn ended(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.ended)
    }
}

impl Read for Feed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.ended.load(Ordering::Relaxed) {
            return Ok(0);
        }
        while self.present.is_empty() {
            match self.chunks.blocking_recv() {
                Some(Some(chunk)) => self.present = chunk,
                Some(None) => {
                    self.ended.store(true, Ordering::Relaxed);
                    return Ok(0);
                }
                None => {
                    return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the transfer was cut off"));
                }
            }
        }
        let count = buffer.len().min(self.present.len());
        self.present.copy_to_slice(&mut buffer[..count]);
        self.consumed.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}

/// A decompressed stream that must not end before the compressed one has.
#[derive(Debug)]
pub(in crate::engine) struct Whole<R> {
    /// The decompressed stream.
    pub reader: R,
    /// Whether the compressed one has ended.
    pub ended: Arc<AtomicBool>,
}

impl<R: Read> Read for Whole<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.reader.read(buffer)?;
        if count == 0 && !buffer.is_empty() && !self.ended.load(Ordering::Relaxed) {
            let text = "the compressed stream has bytes after its end";
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_mark_ends_a_feed() {
        let (sender, mut feed) = Feed::channel();
        for chunk in
            [Some(Bytes::from_static(b"one ")), Some(Bytes::new()), Some(Bytes::from_static(b"two")), None]
        {
            sender.blocking_send(chunk).unwrap();
        }
        let mut text = String::new();
        feed.read_to_string(&mut text).unwrap();
        assert_eq!((text.as_str(), feed.consumed().load(Ordering::Relaxed)), ("one two", 7));
        let (sender, mut feed) = Feed::channel();
        sender.blocking_send(Some(Bytes::from_static(b"x"))).unwrap();
        drop(sender);
        assert!(feed.read_to_string(&mut text).is_err());
    }

    #[test]
    fn a_decompressed_stream_ends_with_the_compressed_one() {
        let ended = Arc::new(AtomicBool::new(false));
        let mut whole = Whole { reader: &b"x"[..], ended: Arc::clone(&ended) };
        assert!(whole.read_to_end(&mut vec![]).is_err());
        ended.store(true, Ordering::Relaxed);
        assert_eq!(whole.read_to_end(&mut vec![]).unwrap(), 0);
    }
}
