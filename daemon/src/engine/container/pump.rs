//! Moves stdio: a process's output to its log and its clients, clients' input to the process.

use std::{io, sync::Arc, time::Duration};

use jiff::Timestamp;
use tokio::sync::mpsc;

use super::hub::{Audience, Hub, Input};
use crate::{
    engine::logs::{Log, Stream},
    sandbox::{InputStream, OutputStream},
};

/// How often, and how long in between, a log that cannot be written is tried before its bytes are given up.
/// In the meantime the process's output is held back.
const ATTEMPTS: u32 = 10;
const RETRY: Duration = Duration::from_secs(1);

/// Takes one output stream to its end. What is in the log is acknowledged to the agent, and then handed to
/// the clients; without a log, what was handed on is.
pub(crate) async fn output(mut output: OutputStream, stream: Stream, log: Option<Arc<Log>>, hub: Arc<Hub>) {
    loop {
        let next = tokio::select! {
            biased;
            next = output.next() => next,
            // A guest that says its process has ended and then neither sends nor ends the stream.
            () = hub.lingered() => break,
        };
        let bytes = match next {
            Ok(Some(bytes)) => bytes,
            Ok(None) => break,
            Err(error) => {
                // The sandbox died; its end is told elsewhere, with its reason.
                tracing::debug!(%error, ?stream, "an output stream was cut");
                break;
            }
        };
        let (safe, audience) = match &log {
            Some(log) => append(log, stream, &bytes, &hub).await,
            None => hub.record(stream, || Some(output.taken())),
        };
        hub.deliver_to(audience, stream, &bytes).await;
        if let Some(safe) = safe
            && output.acknowledge(safe).await.is_err()
        {
            // The reading side says why.
            tracing::debug!(?stream, "an acknowledgement was not taken");
        }
    }
    if let Some(log) = &log
        && let Err(error) = log.end(stream, Timestamp::now())
    {
        tracing::error!(%error, ?stream, "the end of a log could not be written");
    }
}

async fn append(log: &Log, stream: Stream, bytes: &[u8], hub: &Hub) -> (Option<u64>, Audience) {
    let mut attempt = 1;
    loop {
        match hub.record(stream, || log.append(stream, bytes, Timestamp::now())) {
            (Ok(safe), audience) => return (Some(safe), audience),
            (Err(error), _) if attempt < ATTEMPTS => {
                tracing::warn!(%error, attempt, "a log cannot be written; the process's output waits");
                tokio::time::sleep(RETRY).await;
                attempt += 1;
            }
            (Err(error), audience) => {
                tracing::error!(%error, lost = bytes.len(), "output is missing in a log");
                return (None, audience);
            }
        }
    }
}

/// Feeds a process's stdin from its clients; `close` tells the agent of the end. Goes on taking what clients
/// send when the process does not want it any more, so that they do not hang.
pub(crate) async fn input<F: Future<Output = ()>>(
    mut stream: InputStream,
    mut queue: mpsc::Receiver<Input>,
    close: impl FnOnce() -> F,
) {
    let fed: io::Result<()> = async {
        while let Some(input) = queue.recv().await {
            match input {
                Input::Bytes(bytes) => stream.write(&bytes).await?,
                Input::End => {
                    stream.finish().await?;
                    close().await;
                    break;
                }
            }
        }
        Ok(())
    }
    .await;
    if let Err(error) = fed {
        tracing::debug!(%error, "a process takes no more input");
    }
    while queue.recv().await.is_some() {}
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::UnixStream,
    };

    use super::*;
    use crate::engine::{AttachOptions, container::hub::Kind, logs::ReadOptions};

    const KIND: Kind = Kind { terminal: false, stdin: true, stdin_once: true };
    const BOTH: AttachOptions =
        AttachOptions { logs: false, stream: true, stdin: true, stdout: true, stderr: true };

    #[tokio::test]
    async fn output_reaches_log_and_client_whole_and_is_acknowledged() {
        let base = tempfile::tempdir().unwrap();
        let (log, _) =
            Log::begin(&crate::engine::logs::Settings::plain("json-file"), &base.path().join("log")).unwrap();
        let log = Arc::new(log);
        let hub = Arc::new(Hub::new(KIND));
        let mut client = hub.attach(BOTH);
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (mut acknowledgements, mut guest) = theirs.into_split();
        let pump = tokio::spawn(output(
            OutputStream::new(ours, 0),
            Stream::Stdout,
            Some(Arc::clone(&log)),
            Arc::clone(&hub),
        ));
        let line = [b"x".repeat(999), b"\n".to_vec()].concat();
        let text = [line.repeat(400), b"last words".to_vec()].concat();
        let writer = tokio::spawn({
            let text = text.clone();
            async move { guest.write_all(&text).await.unwrap() }
        });
        let collector = tokio::spawn(async move {
            let mut all = vec![];
            while let Some(output) = client.output.recv().await {
                all.extend_from_slice(&output.bytes);
            }
            all
        });
        writer.await.unwrap();
        pump.await.unwrap();
        hub.end_run();
        assert_eq!(collector.await.unwrap(), text);
        assert!(acknowledgements.read_u64_le().await.unwrap() >= 128 * 1024);
        log.finish(Timestamp::now()).unwrap();
        let options = ReadOptions { stdout: true, stderr: true, ..ReadOptions::default() };
        let mut records = log.source().read(options).unwrap();
        let mut logged = vec![];
        while let Some(record) = records.recv().await {
            logged.extend_from_slice(&record.bytes);
        }
        assert_eq!(logged, text);
    }

    #[tokio::test]
    async fn who_attaches_with_the_log_gets_everything_once() {
        let base = tempfile::tempdir().unwrap();
        let (log, _) =
            Log::begin(&crate::engine::logs::Settings::plain("json-file"), &base.path().join("log")).unwrap();
        let hub = Hub::new(KIND);
        // Appended, not yet delivered when the client comes.
        let chunk = |text: &'static str| Bytes::from_static(text.as_bytes());
        let write = |bytes: &Bytes| {
            hub.record(Stream::Stdout, || log.append(Stream::Stdout, bytes, Timestamp::now()))
        };
        let (first, second) = (chunk("one\ntw"), chunk("o\nthree\n"));
        let (_, before) = write(&first);
        let (mut live, (lines, unfinished)) = hub.attach_at(BOTH, || log.snapshot(Timestamp::now()));
        let (_, after) = write(&second);
        hub.deliver_to(before, Stream::Stdout, &first).await;
        hub.deliver_to(after, Stream::Stdout, &second).await;
        hub.end_run();
        let options = ReadOptions { stdout: true, stderr: true, ..ReadOptions::default() };
        let mut records = lines.read(options).unwrap();
        let mut all = vec![];
        while let Some(record) = records.recv().await {
            all.extend_from_slice(&record.bytes);
        }
        unfinished.iter().for_each(|record| all.extend_from_slice(&record.bytes));
        while let Some(output) = live.output.recv().await {
            all.extend_from_slice(&output.bytes);
        }
        assert_eq!(String::from_utf8(all).unwrap(), "one\ntwo\nthree\n");
    }

    #[tokio::test]
    async fn input_arrives_before_its_end_is_told() {
        let hub = Hub::new(KIND);
        let queue = hub.take_input().unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let (closed, told) = tokio::sync::oneshot::channel();
        let feed = tokio::spawn(input(InputStream::new(ours), queue, || async {
            closed.send(()).unwrap();
        }));
        let stdin = hub.attach(BOTH).stdin.unwrap();
        stdin.send("some input".into()).await.unwrap();
        drop(stdin);
        told.await.unwrap();
        let mut text = String::new();
        theirs.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "some input");
        hub.end_run();
        feed.await.unwrap();
    }

    #[tokio::test]
    async fn a_client_is_not_held_by_a_process_that_reads_no_more() {
        let hub = Hub::new(KIND);
        let queue = hub.take_input().unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        tokio::spawn(input(InputStream::new(ours), queue, || async {}));
        let stdin = hub.attach(BOTH).stdin.unwrap();
        for _ in 0..100 {
            stdin.send("some input".into()).await.unwrap();
        }
    }
}
