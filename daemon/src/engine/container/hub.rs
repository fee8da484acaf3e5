//! Where a process's stdio meets the clients that are attached to it. It belongs to the container or exec, not
//! to one run: a client may attach before the start.
//!
//! ```text
//!   output stream ──▶ deliver ──┬──▶ client (bounded; one that does not read holds the output back)
//!                               └──▶ client
//!   client ──▶ forwarder ──┐
//!   client ──▶ forwarder ──┴──▶ input queue ──▶ the process's stdin
//! ```
//! Everybody's connection ends with the run.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use tokio::sync::{mpsc, watch};

use crate::engine::{AttachOptions, Attachment, Output, logs::Stream};

/// How many chunks may wait for a client.
const WAITING: usize = 16;

/// Once the process has ended: how long a client may take no chunk before it is let go, and how long the
/// guest may send none before its output counts as ended.
const LINGER: Duration = Duration::from_secs(30);

/// What clients send to a process.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Input {
    /// Bytes.
    Bytes(Bytes),
    /// The end of its input.
    End,
}

/// The properties of a process's stdio.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Kind {
    /// A terminal.
    pub(crate) terminal: bool,
    /// Whether it has an input.
    pub(crate) stdin: bool,
    /// Whether its input ends with the first client's.
    pub(crate) stdin_once: bool,
}

/// The meeting point.
pub(crate) struct Hub {
    kind: Kind,
    inner: Mutex<Inner>,
    /// Whether the process has ended, and what is left is being delivered.
    ended: watch::Sender<bool>,
}

struct Inner {
    clients: Vec<Client>,
    next: u64,
    input: mpsc::Sender<Input>,
    /// Until the run's stdin takes it.
    queue: Option<mpsc::Receiver<Input>>,
}

struct Client {
    number: u64,
    stdout: bool,
    stderr: bool,
    sender: mpsc::Sender<Output>,
}

/// Those who are to get a chunk.
pub(crate) struct Audience(Vec<(u64, mpsc::Sender<Output>)>);

impl Hub {
    pub(crate) fn new(kind: Kind) -> Self {
        let (input, queue) = mpsc::channel(WAITING);
        let inner = Inner { clients: Vec::new(), next: 0, input, queue: Some(queue) };
        Self { kind, inner: Mutex::new(inner), ended: watch::Sender::new(false) }
    }

    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    fn with<R>(&self, f: impl FnOnce(&mut Inner) -> R) -> R {
        f(&mut self.inner.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Adds a client. From here on it misses nothing.
    pub(crate) fn attach(&self, options: AttachOptions) -> Attachment {
        self.attach_at(options, || ()).0
    }

    /// Adds a client at the moment of `at`: what was recorded before is not delivered to it, what is recorded
    /// after is.
    pub(crate) fn attach_at<R>(&self, options: AttachOptions, at: impl FnOnce() -> R) -> (Attachment, R) {
        let (sender, output) = mpsc::channel(WAITING);
        let (input, result) = self.with(|inner| {
            let result = at();
            inner.next += 1;
            let client =
                Client { number: inner.next, stdout: options.stdout, stderr: options.stderr, sender };
            // Those who left are otherwise noticed when there is output, of which there may be none.
            inner.clients.retain(|client| !client.sender.is_closed());
            inner.clients.push(client);
            (inner.input.clone(), result)
        });
        let stdin = (options.stdin && self.kind.stdin).then(|| self.forward(input));
        (Attachment { terminal: self.kind.terminal, stdin, output }, result)
    }

    /// Does `record` and answers in the same moment who is to get what it recorded.
    pub(crate) fn record<R>(&self, stream: Stream, record: impl FnOnce() -> R) -> (R, Audience) {
        let wants = |client: &&Client| match stream {
            Stream::Stdout => client.stdout,
            Stream::Stderr => client.stderr,
            Stream::Stdin => false,
        };
        self.with(|inner| {
            let recorded = record();
            let clients = inner.clients.iter().filter(wants);
            (recorded, Audience(clients.map(|c| (c.number, c.sender.clone())).collect()))
        })
    }

    /// Passes one client's input on; its end is the process's by Docker's rule.
    fn forward(&self, input: mpsc::Sender<Input>) -> mpsc::Sender<Bytes> {
        let (sender, mut receiver) = mpsc::channel(WAITING);
        let ends = self.kind.stdin_once && !self.kind.terminal;
        tokio::spawn(async move {
            while let Some(bytes) = receiver.recv().await {
                if input.send(Input::Bytes(bytes)).await.is_err() {
                    return;
                }
            }
            if ends {
                let _ = input.send(Input::End).await;
            }
        });
        sender
    }

    /// Hands a chunk to every client that wants the stream and waits until each has taken it or is gone.
    #[cfg(test)]
    pub(crate) async fn deliver(&self, stream: Stream, bytes: &Bytes) {
        let ((), audience) = self.record(stream, || ());
        self.deliver_to(audience, stream, bytes).await;
    }

    /// Hands a chunk to each of them and waits until each has taken it or is gone.
    pub(crate) async fn deliver_to(&self, audience: Audience, stream: Stream, bytes: &Bytes) {
        for (number, sender) in audience.0 {
            let output = Output { stream, bytes: bytes.clone() };
            let sent = tokio::select! {
                biased;
                sent = sender.send(output) => sent.is_ok(),
                () = self.lingered() => false,
            };
            if !sent {
                self.with(|inner| inner.clients.retain(|client| client.number != number));
            }
        }
    }

    /// Resolves when the process has ended and [`LINGER`] has passed since this was called.
    pub(crate) async fn lingered(&self) {
        let mut ended = self.ended.subscribe();
        if ended.wait_for(|ended| *ended).await.is_err() {
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(LINGER).await;
    }

    /// What clients send, for the run that begins. None when a run has it already.
    pub(crate) fn take_input(&self) -> Option<mpsc::Receiver<Input>> {
        self.with(|inner| inner.queue.take())
    }

    /// The process has ended: clients that do not read are not waited for any longer.
    pub(crate) fn process_ended(&self) {
        self.ended.send_replace(true);
    }

    /// The run is over and its output delivered: every client's connection ends, and the next run begins anew.
    pub(crate) fn end_run(&self) {
        let (input, queue) = mpsc::channel(WAITING);
        self.with(|inner| {
            inner.clients.clear();
            inner.input = input;
            inner.queue = Some(queue);
        });
        self.ended.send_replace(false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOTH: AttachOptions =
        AttachOptions { logs: false, stream: true, stdin: true, stdout: true, stderr: true };

    fn kind(terminal: bool, stdin: bool, stdin_once: bool) -> Kind {
        Kind { terminal, stdin, stdin_once }
    }

    #[tokio::test]
    async fn a_client_from_before_the_start_gets_its_streams_until_the_end() {
        let hub = Hub::new(kind(false, false, false));
        let mut both = hub.attach(BOTH);
        let mut out = hub.attach(AttachOptions { stderr: false, ..BOTH });
        assert!(both.stdin.is_none(), "there is no input to attach to");
        hub.deliver(Stream::Stdout, &Bytes::from_static(b"1")).await;
        hub.deliver(Stream::Stderr, &Bytes::from_static(b"2")).await;
        hub.end_run();
        let mut seen = vec![];
        while let Some(output) = both.output.recv().await {
            seen.push(output.bytes);
        }
        assert_eq!(seen, ["1", "2"]);
        assert_eq!(out.output.recv().await.unwrap().bytes, "1");
        assert!(out.output.recv().await.is_none());
    }

    #[tokio::test]
    async fn a_client_that_does_not_read_holds_back_and_one_that_left_does_not() {
        let hub = Hub::new(kind(false, false, false));
        let mut slow = hub.attach(BOTH);
        drop(hub.attach(BOTH));
        let chunk = Bytes::from_static(b"x");
        for _ in 0..WAITING {
            hub.deliver(Stream::Stdout, &chunk).await;
        }
        let mut blocked = Box::pin(hub.deliver(Stream::Stdout, &chunk));
        assert!(futures_util::poll!(&mut blocked).is_pending());
        slow.output.recv().await.unwrap();
        blocked.await;
    }

    #[tokio::test]
    async fn clients_that_left_do_not_heap_up() {
        let hub = Hub::new(kind(false, false, false));
        for _ in 0..100 {
            drop(hub.attach(BOTH));
        }
        assert_eq!(hub.with(|inner| inner.clients.len()), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn after_the_end_a_client_that_does_not_read_is_let_go() {
        let hub = Hub::new(kind(false, false, false));
        let _slow = hub.attach(BOTH);
        let chunk = Bytes::from_static(b"x");
        for _ in 0..WAITING {
            hub.deliver(Stream::Stdout, &chunk).await;
        }
        hub.process_ended();
        hub.deliver(Stream::Stdout, &chunk).await;
    }

    #[tokio::test]
    async fn input_ends_with_the_first_client_only_when_once_and_no_terminal() {
        for (terminal, once, ends) in
            [(false, true, true), (false, false, false), (true, true, false), (true, false, false)]
        {
            let hub = Hub::new(kind(terminal, true, once));
            let mut queue = hub.take_input().unwrap();
            assert!(hub.take_input().is_none());
            let stdin = hub.attach(BOTH).stdin.unwrap();
            stdin.send(Bytes::from_static(b"in")).await.unwrap();
            drop(stdin);
            assert_eq!(queue.recv().await, Some(Input::Bytes(Bytes::from_static(b"in"))));
            let second = hub.attach(BOTH).stdin.unwrap();
            if ends {
                assert_eq!(queue.recv().await, Some(Input::End));
            }
            second.send(Bytes::from_static(b"more")).await.unwrap();
            assert_eq!(queue.recv().await, Some(Input::Bytes(Bytes::from_static(b"more"))));
        }
    }
}
