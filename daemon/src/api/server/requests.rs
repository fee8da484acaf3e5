//! Requests as a whole: their ids, by which what is logged of one is found, and how many there were.

use std::sync::atomic::{AtomicU64, Ordering};

use http::StatusCode;

use crate::metrics::Text;

static NEXT: AtomicU64 = AtomicU64::new(1);
static SERVED: [AtomicU64; 5] = [const { AtomicU64::new(0) }; 5];
static CONNECTIONS: AtomicU64 = AtomicU64::new(0);

/// The next request's number, unique while the daemon runs.
pub(super) fn next_id() -> u64 {
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Counts an answer.
pub(super) fn served(status: StatusCode) {
    if let Some(count) = SERVED.get(usize::from(status.as_u16() / 100).saturating_sub(1)) {
        count.fetch_add(1, Ordering::Relaxed);
    }
}

/// Counts as long as it lives.
pub(super) struct Connection(());

impl Connection {
    /// One more.
    pub(super) fn new() -> Self {
        CONNECTIONS.fetch_add(1, Ordering::Relaxed);
        Self(())
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        CONNECTIONS.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Adds the server's metrics.
pub fn metrics(text: &mut Text) {
    let labels = ["1xx", "2xx", "3xx", "4xx", "5xx"].map(|class| [("status", class)]);
    let counts = SERVED.iter().map(|count| count.load(Ordering::Relaxed) as f64);
    let samples: Vec<(&[(&str, &str)], f64)> = labels.iter().map(|label| &label[..]).zip(counts).collect();
    text.counter("bulkhead_api_requests_total", "Requests that were answered, by class of status.", &samples);
    let open = CONNECTIONS.load(Ordering::Relaxed) as f64;
    text.gauge("bulkhead_api_connections", "Open connections, attached ones included.", &[(&[], open)]);
}
