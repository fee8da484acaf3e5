//! A guest agent for tests: the far end of a control connection and of streams, driven by hand.

use bulkhead_agent_api::{AgentError, Answer, FromAgent, Hello, ToAgent, VERSION, frame};
use bytes::{Buf, BytesMut};
use serde::Serialize;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

/// A good greeting.
pub(crate) fn hello() -> Hello {
    Hello { version: VERSION, kernel: "6.12.0-test".into(), started_us: 1 }
}

/// The far end of a control connection.
pub(crate) struct FakeAgent {
    stream: UnixStream,
    buffer: BytesMut,
}

impl FakeAgent {
    pub(crate) fn new(stream: UnixStream) -> Self {
        Self { stream, buffer: BytesMut::new() }
    }

    pub(crate) async fn send<T: Serialize>(&mut self, message: &T) {
        self.send_raw(&frame::encode(message).unwrap()).await;
    }

    pub(crate) async fn send_raw(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    pub(crate) async fn answer(&mut self, id: u64, result: Result<Answer, AgentError>) {
        self.send(&FromAgent::Answer { id, result }).await;
    }

    /// The next call; None when the daemon has hung up. May be given up and tried again.
    pub(crate) async fn next_call(&mut self) -> Option<ToAgent> {
        loop {
            if let Some((message, used)) = frame::decode(&self.buffer).unwrap() {
                self.buffer.advance(used);
                return Some(message);
            }
            if self.stream.read_buf(&mut self.buffer).await.ok()? == 0 {
                return None;
            }
        }
    }
}
