//! What a client sees while images come in: the lines of JSON that the docker CLI draws.

use std::{
    fmt::Write as _,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use serde::Serialize;
use tokio::{sync::mpsc, time::Instant};

use crate::engine::Error;

/// Lines that may wait for a slow client; then the work waits too, for [`STALL`] at most.
const WAITING: usize = 128;
/// Between two counts of one transfer.
const INTERVAL: Duration = Duration::from_millis(100);

/// One line. Built by its constructors, so that each has the fields Docker gives it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Message {
    #[serde(skip_serializing_if = "Option::is_none")]
    stream: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<String>,
    #[serde(rename = "progressDetail", skip_serializing_if = "Option::is_none")]
    detail: Option<Detail>,
    #[serde(skip_serializing_if = "Option::is_none")]
    progress: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(rename = "errorDetail", skip_serializing_if = "Option::is_none")]
    error_detail: Option<ErrorDetail>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    aux: Option<serde_json::Value>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
struct Detail {
    #[serde(skip_serializing_if = "Option::is_none")]
    current: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    total: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct ErrorDetail {
    message: String,
}

impl Message {
    const NOTHING: Self = Self {
        stream: None,
        status: None,
        detail: None,
        progress: None,
        id: None,
        error_detail: None,
        error: None,
        aux: None,
    };

    /// A sentence: `Digest: sha256:…`.
    pub fn status(text: impl Into<String>) -> Self {
        Self { status: Some(text.into()), ..Self::NOTHING }
    }

    /// A sentence about `id`: `latest: Pulling from library/busybox`.
    pub fn status_of(id: impl Into<String>, text: impl Into<String>) -> Self {
        Self { status: Some(text.into()), id: Some(id.into()), ..Self::NOTHING }
    }

    /// A transfer's state without counts: `Pull complete`.
    pub fn step(id: impl Into<String>, action: &str) -> Self {
        let detail = Some(Detail { current: None, total: None });
        Self { detail, ..Self::status_of(id, action) }
    }

    /// A transfer's counts, in bytes; a total of 0 is not known.
    pub fn counts(id: impl Into<String>, action: &str, current: u64, total: u64) -> Self {
        let some = |number: u64| (number > 0).then_some(number);
        let detail = Some(Detail { current: some(current), total: some(total) });
        Self { detail, progress: Some(bar(current, total)), ..Self::status_of(id, action) }
    }

    /// Text of a process: `Loaded image: busybox:latest\n`.
    pub fn stream(text: impl Into<String>) -> Self {
        Self { stream: Some(text.into()), ..Self::NOTHING }
    }

    /// A result for programs.
    pub fn aux(value: serde_json::Value) -> Self {
        let detail = Some(Detail { current: None, total: None });
        Self { detail, aux: Some(value), ..Self::NOTHING }
    }

    /// The end, when the status has gone out already.
    pub fn error(error: &Error) -> Self {
        let message = error.message.clone();
        Self {
            error_detail: Some(ErrorDetail { message: message.clone() }),
            error: Some(message),
            ..Self::NOTHING
        }
    }

    /// As a line, with Docker's line end.
    pub fn line(&self) -> Vec<u8> {
        let mut line = serde_json::to_vec(self).unwrap_or_default();
        line.extend_from_slice(b"\r\n");
        line
    }
}

/// Where messages go. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Progress {
    messages: mpsc::Sender<Result<Message, Error>>,
    /// The client has stopped reading: it gets what it has room for.
    stalled: Arc<AtomicBool>,
}

/// How long a client that does not read may hold the work up, which others may be waiting for.
const STALL: Duration = Duration::from_secs(60);

/// Messages until the work is done; an error is the last. Dropping it calls the work off.
pub type Messages = mpsc::Receiver<Result<Message, Error>>;

impl Progress {
    /// A sender and its receiver.
    pub fn channel() -> (Self, Messages) {
        let (messages, receiver) = mpsc::channel(WAITING);
        (Self { messages, stalled: Arc::default() }, receiver)
    }

    /// Sends a message; to nobody if the client has gone or does not read for long.
    pub async fn send(&self, message: Message) {
        if self.stalled.load(Ordering::Relaxed) {
            let _ = self.messages.try_send(Ok(message));
        } else if tokio::time::timeout(STALL, self.messages.send(Ok(message))).await.is_err() {
            self.stalled.store(true, Ordering::Relaxed);
        }
    }

    /// Sends a message from a thread that may block.
    pub fn send_blocking(&self, message: Message) {
        let _ = self.messages.blocking_send(Ok(message));
    }

    /// Sends the error that ends the work.
    pub async fn fail(&self, error: Error) {
        let _ = self.messages.send(Err(error)).await;
    }

    /// Waits until the client has gone.
    pub async fn closed(&self) {
        self.messages.closed().await;
    }
}

/// Lets counts through ten times a second, the first at once.
#[derive(Debug, Default)]
pub struct Throttle(Option<Instant>);

impl Throttle {
    /// Whether it is time again.
    pub fn ready(&mut self) -> bool {
        let now = Instant::now();
        let ready = self.0.is_none_or(|last| now.duration_since(last) >= INTERVAL);
        if ready {
            self.0 = Some(now);
        }
        ready
    }
}

/// The bar that clients print which do not draw their own.
fn bar(current: u64, total: u64) -> String {
    if total == 0 {
        return if current == 0 { String::new() } else { format!("{:>8}", human(current)) };
    }
    let filled = usize::try_from((u128::from(current) * 100 / u128::from(total) / 2).min(50)).unwrap_or(50);
    let mut text = format!("[{}>{}] ", "=".repeat(filled), " ".repeat(50 - filled));
    let _ = write!(text, "{:>8}", human(current));
    if current <= total {
        let _ = write!(text, "/{}", human(total));
    }
    text
}

/// Decimal units with four significant digits: `1.234MB`.
fn human(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "kB", "MB", "GB", "TB", "PB", "EB"];
    let mut scale = 0;
    #[expect(clippy::cast_precision_loss, reason = "four digits are shown")]
    let mut value = bytes as f64;
    while value >= 1000.0 && scale + 1 < UNITS.len() {
        value /= 1000.0;
        scale += 1;
    }
    let decimals = if value >= 1000.0 {
        0
    } else if value >= 100.0 {
        1
    } else if value >= 10.0 {
        2
    } else {
        3
    };
    let text = format!("{value:.decimals$}");
    let text = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    format!("{text}{}", UNITS[scale])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json(message: &Message) -> String {
        let line = message.line();
        assert!(line.ends_with(b"\r\n"));
        String::from_utf8(line).unwrap().trim_end().to_owned()
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_stopped_reading_does_not_stop_the_work() {
        let (progress, mut messages) = Progress::channel();
        for number in 0..WAITING + 10 {
            progress.send(Message::status(number.to_string())).await;
        }
        // The error that ends the work is not left out.
        let failing = tokio::spawn(async move { progress.fail(Error::internal("full")).await });
        let mut last = None;
        while let Some(message) = messages.recv().await {
            last = Some(message);
        }
        failing.await.unwrap();
        assert_eq!(last.unwrap().unwrap_err().message, "full");
    }

    #[test]
    fn lines_are_dockers() {
        for (message, expected) in [
            (
                Message::status_of("latest", "Pulling from library/busybox"),
                r#"{"status":"Pulling from library/busybox","id":"latest"}"#,
            ),
            (
                Message::step("abc", "Pull complete"),
                r#"{"status":"Pull complete","progressDetail":{},"id":"abc"}"#,
            ),
            (
                Message::counts("abc", "Downloading", 500_000, 1_000_000),
                r#"{"status":"Downloading","progressDetail":{"current":500000,"total":1000000},"progress":"[=========================>                         ]    500kB/1MB","id":"abc"}"#,
            ),
            (Message::status("Digest: x"), r#"{"status":"Digest: x"}"#),
            (Message::stream("Loaded\n"), r#"{"stream":"Loaded\n"}"#),
            (Message::error(&Error::internal("no")), r#"{"errorDetail":{"message":"no"},"error":"no"}"#),
        ] {
            assert_eq!(json(&message), expected);
        }
    }

    #[test]
    fn sizes_have_four_digits() {
        for (bytes, text) in [
            (0, "0B"),
            (999, "999B"),
            (1000, "1kB"),
            (2_123_456, "2.123MB"),
            (12_345_678, "12.35MB"),
            (123_456_789, "123.5MB"),
            (1_500_000_000, "1.5GB"),
        ] {
            assert_eq!(human(bytes), text);
        }
        assert_eq!(bar(7, 0), "      7B");
        assert!(bar(20, 10).ends_with("     20B"));
        assert_eq!(bar(u64::MAX, u64::MAX).matches('=').count(), 50);
    }
}
