//! What a process has written and the daemon has not yet acknowledged: a window over the output stream.
//!
//! ```text
//!   0 ........ base ............. sent ............ end
//!     acknowledged | unacknowledged, held here       |  room
//!                  |◀──────── at most OUTPUT_WINDOW ─────────▶|
//! ```
//!
//! Offsets count the stream's bytes from its start. `sent` belongs to a connection, not to the window: a
//! connection of a restarted daemon begins anew where that daemon has its last safe byte.

use std::collections::VecDeque;

use bulkhead_agent_api::OUTPUT_WINDOW;

/// Storage above this is given back when the window runs empty.
const KEEP: usize = 64 << 10;

/// An offset that a peer named lies outside of what is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("offset {offset} is outside of the bytes held, {base} to {end}")]
pub struct OutOfWindow {
    /// What was asked for.
    pub offset: u64,
    /// The first byte held.
    pub base: u64,
    /// The end of the bytes held.
    pub end: u64,
}

/// The unacknowledged bytes of one output stream.
#[derive(Debug, Default)]
pub struct Window {
    base: u64,
    bytes: VecDeque<u8>,
}

impl Window {
    /// Forgets the first `count` bytes of the stream, as far as they were seen, and counts from 0 after them.
    /// Answers how many of them are still to come.
    pub fn renumber(&mut self, count: u64) -> u64 {
        let drop = count.saturating_sub(self.base).min(self.bytes.len() as u64);
        self.bytes.drain(..usize::try_from(drop).unwrap_or(usize::MAX).min(self.bytes.len()));
        let missing = count.saturating_sub(self.base.saturating_add(drop));
        self.base = 0;
        missing
    }

    /// How many more bytes fit.
    pub fn room(&self) -> usize {
        OUTPUT_WINDOW.saturating_sub(self.bytes.len())
    }

    /// The offset behind the last byte.
    pub fn end(&self) -> u64 {
        self.base + self.bytes.len() as u64
    }

    /// Appends output; the caller has asked [`Window::room`] before.
    pub fn push(&mut self, bytes: &[u8]) {
        debug_assert!(bytes.len() <= self.room());
        self.bytes.extend(bytes);
    }

    /// Lets go of everything before `offset`. An acknowledgement that says less than an earlier one says
    /// nothing new.
    ///
    /// # Errors
    /// [`OutOfWindow`] when `offset` is beyond the end: nobody can have what was not written.
    pub fn acknowledge(&mut self, offset: u64) -> Result<(), OutOfWindow> {
        if offset > self.end() {
            return Err(self.outside(offset));
        }
        let count = offset.saturating_sub(self.base);
        self.bytes.drain(..usize::try_from(count).unwrap_or(usize::MAX).min(self.bytes.len()));
        self.base += count;
        if self.bytes.is_empty() && self.bytes.capacity() > KEEP {
            self.bytes = VecDeque::new();
        }
        Ok(())
    }

    /// The offset of the oldest byte that is held.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Begins a connection at `offset`, which acknowledges everything before it.
    ///
    /// # Errors
    /// [`OutOfWindow`] when the bytes from there are gone or not yet written.
    pub fn resume(&mut self, offset: u64) -> Result<(), OutOfWindow> {
        if offset < self.base { Err(self.outside(offset)) } else { self.acknowledge(offset) }
    }

    /// The longest contiguous run of held bytes from `sent` on; empty when all is sent.
    pub fn pending(&self, sent: u64) -> &[u8] {
        let skip = usize::try_from(sent.saturating_sub(self.base)).unwrap_or(usize::MAX);
        let (front, back) = self.bytes.as_slices();
        match front.get(skip..) {
            Some(rest) if !rest.is_empty() => rest,
            _ => back.get(skip.saturating_sub(front.len())..).unwrap_or_default(),
        }
    }

    fn outside(&self, offset: u64) -> OutOfWindow {
        OutOfWindow { offset, base: self.base, end: self.end() }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone)]
    enum Step {
        Write(usize),
        Send(usize),
        Acknowledge(usize),
        Reconnect(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0..40_000usize).prop_map(Step::Write),
            (0..60_000usize).prop_map(Step::Send),
            (0..60_000usize).prop_map(Step::Acknowledge),
            (0..60_000usize).prop_map(Step::Reconnect),
        ]
    }

    proptest! {
        #[test]
        fn every_byte_arrives_once_in_order_whatever_the_daemon_does(steps in prop::collection::vec(step(), 0..80)) {
            let byte = |offset: u64| (offset % 251) as u8;
            let mut window = Window::default();
            // What the daemon has safely, what its connection has delivered, what it has acknowledged.
            let (mut sent, mut acknowledged) = (0u64, 0u64);
            for step in steps {
                match step {
                    Step::Write(count) => {
                        let end = window.end();
                        let count = count.min(window.room()) as u64;
                        window.push(&(end..end + count).map(byte).collect::<Vec<_>>());
                    }
                    Step::Send(count) => {
                        let pending = window.pending(sent);
                        let run = &pending[..count.min(pending.len())];
                        for (index, value) in run.iter().enumerate() {
                            prop_assert_eq!(*value, byte(sent + index as u64));
                        }
                        sent += run.len() as u64;
                    }
                    Step::Acknowledge(count) => {
                        acknowledged = sent.min(acknowledged + count as u64);
                        window.acknowledge(acknowledged).unwrap();
                    }
                    Step::Reconnect(back) => {
                        let from = sent.saturating_sub(back as u64).max(acknowledged);
                        window.resume(from).unwrap();
                        (sent, acknowledged) = (from, from);
                    }
                }
                prop_assert!(window.room() <= OUTPUT_WINDOW);
                prop_assert_eq!(window.end() - acknowledged, (OUTPUT_WINDOW - window.room()) as u64);
                prop_assert_eq!(window.pending(sent).is_empty(), sent == window.end());
            }
        }
    }

    #[test]
    fn offsets_outside_are_refused() {
        let mut window = Window::default();
        window.push(b"12345");
        window.acknowledge(3).unwrap();
        assert_eq!(window.acknowledge(6), Err(OutOfWindow { offset: 6, base: 3, end: 5 }));
        assert_eq!(window.resume(2), Err(OutOfWindow { offset: 2, base: 3, end: 5 }));
        window.acknowledge(1).unwrap();
        assert_eq!(window.pending(3), b"45");
    }
}
