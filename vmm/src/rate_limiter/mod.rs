//! Rate limits of a device: a bucket for bytes and one for operations, each way.
//!
//! ```text
//!             admit(direction) ── yes ──▶ serve, charge(bytes) ──▶ the next one
//!                    │ no
//!                    ▼
//!      the queue is left as it is, the timer armed ──▶ event source ──▶ the queue is served again
//! ```
//! While its first request waits, so do those behind it: a queue is served in order. Nothing of a request that
//! waits lies outside the queue, so a reset or a save finds nothing half done. Limits are not part of a saved
//! device: whoever restores it sets them anew.

mod bucket;

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd, RawFd},
    time::{Duration, Instant},
};

use bucket::TokenBucket;
use bulkhead_vmm_api::{RateLimit, RateLimits, Traffic};
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};

/// The shortest wait: a fast bucket fills by thousands of tokens meanwhile, and a timer costs a wake-up.
const SHORTEST: Duration = Duration::from_micros(500);

/// The longest, so that no timer's time overflows; then it is looked at again.
const LONGEST: Duration = Duration::from_secs(3600);

/// A direction by the guest's view.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Into the guest.
    Read,
    /// Out of the guest.
    Write,
}

/// One direction: its buckets and what has passed.
#[derive(Debug, Default)]
struct Lane {
    bytes: Option<TokenBucket>,
    operations: Option<TokenBucket>,
    traffic: Traffic,
    /// Since when something waits.
    waiting: Option<Duration>,
}

impl Lane {
    fn wait(&mut self, now: Duration) -> Option<Duration> {
        let buckets = [&mut self.bytes, &mut self.operations];
        buckets.into_iter().flatten().filter_map(|bucket| bucket.wait(now)).max()
    }

    fn set(&mut self, limit: RateLimit, now: Duration) {
        self.bytes = limit.bytes.map(|rate| TokenBucket::new(rate, now));
        self.operations = limit.operations.map(|rate| TokenBucket::new(rate, now));
    }

    fn admit(&mut self, now: Duration) -> bool {
        if self.wait(now).is_some() {
            if self.waiting.is_none() {
                self.waiting = Some(now);
                self.traffic.throttled += 1;
            }
            return false;
        }
        self.let_go(now);
        true
    }

    /// Nothing waits any more.
    fn let_go(&mut self, now: Duration) {
        if let Some(since) = self.waiting.take() {
            let waited = now.saturating_sub(since).as_micros();
            let waited = u64::try_from(waited).unwrap_or(u64::MAX);
            self.traffic.throttled_us = self.traffic.throttled_us.saturating_add(waited);
        }
    }

    fn charge(&mut self, bytes: u64) {
        self.traffic.operations = self.traffic.operations.saturating_add(1);
        self.traffic.bytes = self.traffic.bytes.saturating_add(bytes);
        if let Some(bucket) = &mut self.bytes {
            bucket.take(bytes);
        }
        if let Some(bucket) = &mut self.operations {
            bucket.take(1);
        }
    }
}

/// A device's limiter and counters. Without limits everything is admitted.
#[derive(Debug)]
pub struct RateLimiter {
    read: Lane,
    write: Lane,
    timer: OwnedFd,
    begun: Instant,
}

impl RateLimiter {
    /// A limiter without limits. Its timer is one of the device's event sources.
    ///
    /// # Errors
    /// No timer could be made.
    pub fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags)?;
        Ok(Self { read: Lane::default(), write: Lane::default(), timer, begun: Instant::now() })
    }

    /// Sets all limits; buckets begin full. The caller serves its queues afterwards.
    pub fn set(&mut self, limits: RateLimits) {
        let now = self.begun.elapsed();
        self.read.set(limits.read, now);
        self.write.set(limits.write, now);
    }

    /// Whether a request may begin. If not, [`RateLimiter::arm`] makes the timer tell when to ask again.
    pub fn admit(&mut self, direction: Direction) -> bool {
        let now = self.begun.elapsed();
        self.lane(direction).admit(now)
    }

    /// Counts a request that was admitted, and takes its cost.
    pub fn charge(&mut self, direction: Direction, bytes: u64) {
        self.lane(direction).charge(bytes);
    }

    /// Sets the timer for the earliest moment at which something that waits may go on, if anything does.
    pub fn arm(&mut self) {
        let now = self.begun.elapsed();
        let waits = [&mut self.read, &mut self.write]
            .map(|lane| lane.waiting.and_then(|_| lane.wait(now).or(Some(Duration::ZERO))));
        if let Some(wait) = waits.into_iter().flatten().min() {
            let wait = wait.clamp(SHORTEST, LONGEST);
            let value = Timespec {
                tv_sec: i64::try_from(wait.as_secs()).unwrap_or(0),
                tv_nsec: i64::from(wait.subsec_nanos()),
            };
            let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
            // Fails only for a time that is not valid, and this one is.
            let _ = rustix::time::timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once);
        }
    }

    /// Takes the timer's event.
    pub fn take(&self) {
        // Fails when it has not gone off after all.
        let _ = rustix::io::read(&self.timer, &mut [0; 8]);
    }

    /// What waited is gone: the driver has reset the device.
    pub fn reset(&mut self) {
        let now = self.begun.elapsed();
        self.read.let_go(now);
        self.write.let_go(now);
    }

    /// What has passed, into and out of the guest.
    #[must_use]
    pub fn traffic(&self) -> [Traffic; 2] {
        [self.read.traffic, self.write.traffic]
    }

    fn lane(&mut self, direction: Direction) -> &mut Lane {
        match direction {
            Direction::Read => &mut self.read,
            Direction::Write => &mut self.write,
        }
    }
}

impl AsRawFd for RateLimiter {
    /// Readable when something that waited may go on.
    fn as_raw_fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_vmm_api::Bucket;
    use proptest::prelude::*;
    use rustix::event::{PollFd, PollFlags, poll};

    use super::*;

    fn limit(bytes: u64, operations: u64) -> RateLimit {
        let bucket = |rate| Some(Bucket { per_second: rate, burst: rate }).filter(|_| rate > 0);
        RateLimit { bytes: bucket(bytes), operations: bucket(operations) }
    }

    #[test]
    fn without_limits_everything_passes_and_is_counted() {
        let mut limiter = RateLimiter::new().unwrap();
        for _ in 0..1000 {
            assert!(limiter.admit(Direction::Read));
            limiter.charge(Direction::Read, 1 << 40);
        }
        let [read, write] = limiter.traffic();
        assert_eq!((read.operations, read.bytes, read.throttled), (1000, 1000 << 40, 0));
        assert_eq!(write, Traffic::default());
    }

    #[test]
    fn the_stricter_limit_counts_and_directions_are_apart() {
        let mut lane = Lane::default();
        lane.set(limit(1000, 2), Duration::ZERO);
        assert!(lane.admit(Duration::ZERO));
        lane.charge(1);
        assert!(lane.admit(Duration::ZERO));
        lane.charge(1);
        assert!(!lane.admit(Duration::ZERO));
        assert!(!lane.admit(Duration::from_micros(1)));
        assert_eq!(lane.traffic.throttled, 1, "one wait, however often it is asked");
        assert!(lane.admit(Duration::from_millis(600)));
        assert_eq!(lane.traffic.throttled_us, 600_000);

        let mut limiter = RateLimiter::new().unwrap();
        limiter.set(RateLimits { write: limit(1, 0), read: RateLimit::default() });
        limiter.charge(Direction::Write, 100);
        assert!(!limiter.admit(Direction::Write));
        assert!(limiter.admit(Direction::Read));
    }

    #[test]
    fn the_timer_tells_when_to_ask_again() {
        let mut limiter = RateLimiter::new().unwrap();
        limiter.set(RateLimits { write: limit(1_000_000, 0), read: RateLimit::default() });
        limiter.arm();
        limiter.charge(Direction::Write, 1_010_000);
        assert!(!limiter.admit(Direction::Write));
        limiter.arm();
        // SAFETY: the limiter, which owns the descriptor, outlives the borrow.
        let timer = unsafe { std::os::fd::BorrowedFd::borrow_raw(limiter.as_raw_fd()) };
        poll(&mut [PollFd::new(&timer, PollFlags::IN)], None).unwrap();
        limiter.take();
        limiter.take();
        assert!(limiter.admit(Direction::Write));
    }

    #[test]
    fn lifted_limits_let_what_waits_pass() {
        let mut limiter = RateLimiter::new().unwrap();
        limiter.set(RateLimits { write: limit(1, 0), read: RateLimit::default() });
        limiter.charge(Direction::Write, u64::MAX);
        assert!(!limiter.admit(Direction::Write));
        limiter.set(RateLimits::default());
        assert!(limiter.admit(Direction::Write));
        limiter.reset();
        assert_eq!(limiter.traffic()[1].throttled, 1);
    }

    proptest! {
        /// Asked at any times with any sizes, what passes in all is within both limits and one request more.
        #[test]
        fn both_limits_are_kept(
            bytes in 1u64..10_000,
            operations in 1u64..100,
            steps in prop::collection::vec((0u64..50_000_000, 0u64..5_000), 1..200),
        ) {
            let mut lane = Lane::default();
            lane.set(limit(bytes, operations), Duration::ZERO);
            let (mut now, mut largest) = (Duration::ZERO, 0);
            for (pause, size) in steps {
                now += Duration::from_nanos(pause);
                if lane.admit(now) {
                    lane.charge(size);
                    largest = size.max(largest);
                }
            }
            let seconds = now.as_secs_f64();
            let Traffic { bytes: moved, operations: done, .. } = lane.traffic;
            prop_assert!(moved as f64 <= bytes as f64 * (1.0 + seconds) + largest as f64 + 1.0);
            prop_assert!(done as f64 <= operations as f64 * (1.0 + seconds) + 1.0);
        }
    }
}
