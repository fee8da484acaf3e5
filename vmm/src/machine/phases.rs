//! When each step of building the machine was done.

use std::time::Instant;

/// The phases so far, each with microseconds from the start of the process to its end.
#[derive(Debug, Clone)]
pub struct Phases {
    started: Instant,
    done: Vec<(&'static str, u64)>,
}

impl Phases {
    /// No phase yet; the process started at `started`.
    #[must_use]
    pub fn new(started: Instant) -> Self {
        Self { started, done: Vec::new() }
    }

    /// The phase of that name has just ended.
    pub fn end(&mut self, name: &'static str) {
        let elapsed = u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.done.push((name, elapsed));
    }

    /// When the process started.
    #[must_use]
    pub fn started(&self) -> Instant {
        self.started
    }

    /// Names and times, in order.
    #[must_use]
    pub fn list(&self) -> Vec<(String, u64)> {
        self.done.iter().map(|(name, time)| ((*name).to_owned(), *time)).collect()
    }
}
