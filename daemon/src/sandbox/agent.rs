//! The guest agent's client: calls with numbers out, answers and events in, over one control connection.
//!
//! ```text
//!   call() ──▶ queue ──▶ writer task ──▶ agent
//!     ▲                                   │
//!     └── oneshot by id ◀── reader task ◀─┤
//!   events channel      ◀─────────────────┘
//! ```
//! The connection's end fails every call that waits and ends the events. A guest may send whatever it
//! likes: frames are capped, answers to unknown numbers are ignored, and events wait in a bounded channel,
//! which holds the guest back and nobody else.

use std::{
    collections::HashMap,
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bulkhead_agent_api::{
    AgentError, Answer, CONTROL_PORT, Call, Event, FromAgent, Hello, ProcessId, ToAgent, VERSION,
    frame::{self, FrameError},
};
use bytes::{Buf, BytesMut};
use serde::de::DeserializeOwned;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{mpsc, oneshot},
    task::JoinHandle,
};

use super::{dir::SandboxDir, vsock};

/// How many events may wait.
const EVENTS: usize = 64;

/// How many calls may wait to be written.
const CALLS: usize = 16;

/// How long after a refusal a running agent is asked again.
const RETRY: Duration = Duration::from_millis(200);

/// Why a call has no successful answer.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The agent says no.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// The connection has ended.
    #[error("the guest agent is gone")]
    Gone,
    /// The call cannot be sent.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The agent answered another question.
    #[error("the guest agent's answer does not fit the call")]
    Unexpected,
}

/// Why there is no connection to an agent.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The stream failed.
    #[error("the guest agent's connection: {0}")]
    Io(#[from] io::Error),
    /// What came is not the protocol.
    #[error("the guest agent's greeting: {0}")]
    Frame(#[from] FrameError),
    /// The agent speaks a later version.
    #[error("the guest agent speaks version {0} of the protocol, this daemon {VERSION}")]
    Version(u32),
}

/// Who hears of which container.
#[derive(Debug, Default)]
struct Routes(Mutex<Routing>);

#[derive(Debug, Default)]
struct Routing {
    /// The connection has ended: nothing is to be heard any more.
    closed: bool,
    senders: HashMap<String, mpsc::Sender<Event>>,
}

impl Routes {
    fn with<R>(&self, f: impl FnOnce(&mut Routing) -> R) -> R {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn of(&self, event: &Event) -> Option<mpsc::Sender<Event>> {
        let (Event::Exited { process: ProcessId { container, .. }, .. } | Event::Oom { container }) = event;
        self.with(|routing| routing.senders.get(container).cloned())
    }
}

type Waiting = HashMap<u64, oneshot::Sender<Result<Answer, CallError>>>;

/// The calls that wait for their answers; None once the connection has ended.
#[derive(Debug)]
struct Pending(Mutex<Option<Waiting>>);

impl Pending {
    fn with<R>(&self, f: impl FnOnce(&mut Option<Waiting>) -> R) -> R {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A connected agent. Dropping it ends the connection, and nothing else: the agent waits for the next.
#[derive(Debug)]
pub(crate) struct Agent {
    hello: Hello,
    calls: mpsc::Sender<Vec<u8>>,
    pending: Arc<Pending>,
    routes: Arc<Routes>,
    next: AtomicU64,
    tasks: [JoinHandle<()>; 2],
}

impl Agent {
    /// Waits for the agent of a sandbox that is booting to connect and say Hello. Nothing else runs in the
    /// guest yet that could connect in its place.
    pub(super) async fn awaited(dir: &SandboxDir) -> Result<(Self, mpsc::Receiver<Event>), ConnectError> {
        Self::over(vsock::listen(dir, CONTROL_PORT).await?).await
    }

    /// Connects to the agent of a sandbox that runs: it holds the port from before any workload's start, so
    /// who answers there is the agent. A refusal says that it is not yet up, or that a workload crowds its
    /// port; the caller bounds the time.
    pub(super) async fn connect(dir: &SandboxDir) -> Result<(Self, mpsc::Receiver<Event>), ConnectError> {
        loop {
            match vsock::connect(dir, CONTROL_PORT).await {
                Ok(stream) => return Self::over(stream).await,
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    tokio::time::sleep(RETRY).await;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Takes up the protocol on a connection.
    pub(super) async fn over(stream: UnixStream) -> Result<(Self, mpsc::Receiver<Event>), ConnectError> {
        let (reader, writer) = stream.into_split();
        let mut frames = Frames { reader, buffer: BytesMut::new() };
        let hello: Hello =
            frames.next().await?.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?;
        if hello.version > VERSION {
            return Err(ConnectError::Version(hello.version));
        }
        let pending = Arc::new(Pending(Mutex::new(Some(HashMap::new()))));
        let (calls, queue) = mpsc::channel(CALLS);
        let (events, receiver) = mpsc::channel(EVENTS);
        let routes = Arc::new(Routes::default());
        let tasks = [
            tokio::spawn(write(writer, queue)),
            tokio::spawn({
                let (pending, routes) = (Arc::clone(&pending), Arc::clone(&routes));
                async move {
                    if let Err(error) = read(frames, &pending, &routes, &events).await {
                        tracing::warn!(%error, "a guest agent's connection is given up");
                    }
                    pending.with(Option::take);
                    routes.with(|routing| *routing = Routing { closed: true, ..Routing::default() });
                }
            }),
        ];
        Ok((Self { hello, calls, pending, routes, next: AtomicU64::new(1), tasks }, receiver))
    }

    /// What the agent said of itself.
    pub(crate) fn hello(&self) -> &Hello {
        &self.hello
    }

    /// The events of one container from now on, which no longer come on the common channel.
    pub(super) fn route(&self, container: &str) -> mpsc::Receiver<Event> {
        let (sender, receiver) = mpsc::channel(EVENTS);
        self.routes.with(|routing| {
            // Those whose receivers have gone are nobody's.
            routing.senders.retain(|_, sender| !sender.is_closed());
            if !routing.closed {
                routing.senders.insert(container.to_owned(), sender);
            }
        });
        receiver
    }

    /// One call and its answer.
    pub(crate) async fn call(&self, call: Call) -> Result<Answer, CallError> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let frame = frame::encode(&ToAgent { id, call })?;
        let (sender, answer) = oneshot::channel();
        let registered = self.pending.with(|waiting| match waiting {
            Some(waiting) => {
                waiting.insert(id, sender);
                true
            }
            None => false,
        });
        if !registered {
            return Err(CallError::Gone);
        }
        // Should the caller lose interest, its entry goes.
        let _forget = Forget { id, pending: &self.pending };
        self.calls.send(frame).await.map_err(|_| CallError::Gone)?;
        answer.await.map_err(|_| CallError::Gone)?
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

struct Forget<'a> {
    id: u64,
    pending: &'a Pending,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        self.pending.with(|waiting| waiting.as_mut().map(|waiting| waiting.remove(&self.id)));
    }
}

async fn write(mut writer: OwnedWriteHalf, mut queue: mpsc::Receiver<Vec<u8>>) {
    while let Some(frame) = queue.recv().await {
        if writer.write_all(&frame).await.is_err() {
            // The reader sees the same end and tells everybody.
            return;
        }
    }
}

async fn read(
    mut frames: Frames,
    pending: &Pending,
    routes: &Routes,
    events: &mpsc::Sender<Event>,
) -> Result<(), ConnectError> {
    while let Some(message) = frames.next().await? {
        match message {
            FromAgent::Answer { id, result } => {
                let caller = pending.with(|waiting| waiting.as_mut()?.remove(&id));
                if let Some(caller) = caller {
                    let _ = caller.send(result.map_err(CallError::Agent));
                }
            }
            FromAgent::Event(event) => {
                // Nobody may want it: of a container that has ended, another may still be there.
                let _ = match routes.of(&event) {
                    Some(sender) => sender.send(event).await,
                    None => events.send(event).await,
                };
            }
        }
    }
    Ok(())
}

/// Frames from a stream.
struct Frames {
    reader: OwnedReadHalf,
    buffer: BytesMut,
}

impl Frames {
    /// The next frame; None at an end between two frames.
    async fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, ConnectError> {
        loop {
            if let Some((message, used)) = frame::decode(&self.buffer)? {
                self.buffer.advance(used);
                return Ok(Some(message));
            }
            self.buffer.reserve(4096);
            if self.reader.read_buf(&mut self.buffer).await? == 0 {
                return if self.buffer.is_empty() {
                    Ok(None)
                } else {
                    Err(io::Error::from(io::ErrorKind::UnexpectedEof).into())
                };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_agent_api::{ErrorKind, Exit, MAX_FRAME, ProcessId};

    use super::*;
    use crate::sandbox::fake::{FakeAgent, hello};

    async fn pair() -> (Agent, mpsc::Receiver<Event>, FakeAgent) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut fake = FakeAgent::new(theirs);
        fake.send(&hello()).await;
        let (agent, events) = Agent::over(ours).await.unwrap();
        (agent, events, fake)
    }

    #[tokio::test]
    async fn answers_find_their_calls_in_any_order() {
        let (agent, _events, mut fake) = pair().await;
        let agent = Arc::new(agent);
        let processes = Call::Processes { container: "c".into() };
        let first = tokio::spawn({
            let (agent, call) = (Arc::clone(&agent), processes.clone());
            async move { agent.call(call).await }
        });
        let one = fake.next_call().await.unwrap();
        let second = tokio::spawn({
            let agent = Arc::clone(&agent);
            async move { agent.call(Call::State).await }
        });
        let two = fake.next_call().await.unwrap();
        assert_eq!((&one.call, &two.call), (&processes, &Call::State));
        fake.answer(999, Ok(Answer::Done)).await;
        fake.answer(two.id, Ok(Answer::State { containers: vec![] })).await;
        let error = AgentError { kind: ErrorKind::NotFound, message: "no container \"c\"".into() };
        fake.answer(one.id, Err(error.clone())).await;
        assert!(matches!(first.await.unwrap(), Err(CallError::Agent(e)) if e == error));
        assert_eq!(second.await.unwrap().unwrap(), Answer::State { containers: vec![] });
    }

    #[tokio::test]
    async fn the_end_of_the_connection_fails_calls_and_ends_events() {
        let (agent, mut events, mut fake) = pair().await;
        let exit = Exit { code: 3, oom_killed: false, unix_ns: 5 };
        let event = Event::Exited { process: ProcessId { container: "c".into(), exec: None }, exit };
        fake.send(&FromAgent::Event(event.clone())).await;
        drop(fake);
        assert!(matches!(agent.call(Call::State).await, Err(CallError::Gone)));
        assert_eq!(events.recv().await, Some(event));
        assert_eq!(events.recv().await, None);
        assert!(matches!(agent.call(Call::State).await, Err(CallError::Gone)));
    }

    #[tokio::test]
    async fn an_overlong_or_senseless_frame_ends_the_connection() {
        for garbage in [
            u32::try_from(MAX_FRAME + 1).unwrap().to_le_bytes().to_vec(),
            [2u32.to_le_bytes().as_slice(), b"[]"].concat(),
        ] {
            let (agent, mut events, mut fake) = pair().await;
            fake.send_raw(&garbage).await;
            assert_eq!(events.recv().await, None);
            assert!(matches!(agent.call(Call::State).await, Err(CallError::Gone)));
        }
    }

    #[tokio::test]
    async fn a_later_protocol_is_refused() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut fake = FakeAgent::new(theirs);
        fake.send(&Hello { version: VERSION + 1, ..hello() }).await;
        assert!(matches!(Agent::over(ours).await, Err(ConnectError::Version(v)) if v == VERSION + 1));
    }
}
