//! A microVM for tests: a process that sleeps in the VMM's place, its sockets and its agent driven by hand.

use std::{
    io::IoSliceMut,
    mem::MaybeUninit,
    os::fd::OwnedFd,
    path::Path,
    process::{Child, Command},
};

use bulkhead_agent_api::{
    AgentError, Answer, Event, FromAgent, Hello, StreamOpen, StreamReady, ToAgent, VERSION, frame,
};
use bulkhead_vmm_api::{MAX_MESSAGE, Request, Response};
use bytes::{Buf, BytesMut};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, SocketType};
use serde::Serialize;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
    sync::mpsc,
};

use super::{
    Sandbox,
    dir::{CONTROL, IDENTITY, SandboxDir, VSOCK},
    vmm::process::boot_id,
};

/// A sandbox's directory, with sockets and a process of its identity.
pub(crate) struct FakeMachine {
    vsock: UnixListener,
    control: OwnedFd,
    pub(crate) process: Child,
}

impl FakeMachine {
    pub(crate) fn start(parent: &Path, id: &str) -> Self {
        let dir = SandboxDir::create(parent.join(id)).unwrap();
        let vsock = dir.listen(VSOCK, SocketType::STREAM).unwrap();
        let control = dir.listen(CONTROL, SocketType::SEQPACKET).unwrap();
        let process = Command::new("sleep").arg("1000").spawn().unwrap();
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.id())).unwrap();
        std::fs::write(dir.path().join(IDENTITY), format!("{}\n{stat}", boot_id().unwrap())).unwrap();
        let vsock = std::os::unix::net::UnixListener::from(vsock);
        vsock.set_nonblocking(true).unwrap();
        Self { vsock: UnixListener::from_std(vsock).unwrap(), control, process }
    }

    /// Answers one request after the other; gives what was asked. `with` sees each request's descriptors.
    pub(crate) fn control(
        &self,
        answers: Vec<Response>,
        with: impl Fn(&Request, Vec<OwnedFd>) + Send + 'static,
    ) -> std::thread::JoinHandle<Vec<Request>> {
        let listener = self.control.try_clone().unwrap();
        std::thread::spawn(move || {
            let connection = rustix::net::accept(&listener).unwrap();
            let mut asked = Vec::new();
            for answer in answers {
                let mut message = vec![0; MAX_MESSAGE];
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
                let mut control = RecvAncillaryBuffer::new(&mut space);
                let mut buffers = [IoSliceMut::new(&mut message)];
                let flags = RecvFlags::empty();
                let received = rustix::net::recvmsg(&connection, &mut buffers, &mut control, flags).unwrap();
                let given = control.drain().flat_map(|message| match message {
                    RecvAncillaryMessage::ScmRights(fds) => fds.collect(),
                    _ => Vec::new(),
                });
                let given = given.collect();
                let request: Request = serde_json::from_slice(&message[..received.bytes]).unwrap();
                with(&request, given);
                asked.push(request);
                let answer = serde_json::to_vec(&answer).unwrap();
                rustix::net::send(&connection, &answer, SendFlags::empty()).unwrap();
            }
            asked
        })
    }

    /// Takes the next connection to the vsock socket and answers its first line.
    async fn accept(&self) -> (String, UnixStream) {
        let (mut stream, _) = self.vsock.accept().await.unwrap();
        let mut line = String::new();
        BufReader::with_capacity(1, &mut stream).read_line(&mut line).await.unwrap();
        stream.write_all(b"OK 1024\n").await.unwrap();
        (line, stream)
    }

    /// Lets a daemon adopt it.
    pub(crate) async fn adopted(
        &self,
        parent: &Path,
        id: &str,
    ) -> (Sandbox, mpsc::Receiver<Event>, FakeAgent) {
        let (adopted, agent) = tokio::join!(Sandbox::adopt(parent, id), self.agent());
        let (sandbox, events) = adopted.unwrap();
        (sandbox, events, agent)
    }

    /// Lets the agent answer a daemon that connects to it.
    pub(crate) async fn agent(&self) -> FakeAgent {
        let (line, stream) = self.accept().await;
        // Never LISTEN: what connects by then may be anybody.
        assert_eq!(line, "CONNECT 1024\n");
        let mut agent = FakeAgent::new(stream);
        agent.send(&hello()).await;
        agent
    }

    /// Takes the next stream that the daemon opens; an output begins where it is wanted from.
    pub(crate) async fn stream(&self) -> (StreamOpen, UnixStream) {
        let (line, mut stream) = self.accept().await;
        assert_eq!(line, "CONNECT 1025\n");
        let length = stream.read_u32_le().await.unwrap();
        let mut body = vec![0; length as usize];
        stream.read_exact(&mut body).await.unwrap();
        let open: StreamOpen = serde_json::from_slice(&body).unwrap();
        let ready = StreamReady { error: None, from: open.from.unwrap_or(0) };
        stream.write_all(&frame::encode(&ready).unwrap()).await.unwrap();
        (open, stream)
    }
}

impl Drop for FakeMachine {
    fn drop(&mut self) {
        // It may have been killed and reaped by the test.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

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
