//! A token bucket, told the time by its caller.
//!
//! ```text
//!   level ──▶ 1 or more: a request may begin; its whole cost is taken, so the level may fall below 0
//!         ──▶ below 1: the next request waits until the level is 1 again
//! ```
//! So a request may be larger than the bucket: what it took beyond is owed, and the next ones wait until it is
//! paid. In any span the cost of all requests that began in it, but for the last, is at most what the bucket
//! held and what flowed in.

use std::time::Duration;

use bulkhead_vmm_api::Bucket;

/// Levels are counted in billionths of a token: at `n` tokens a second, each nanosecond brings `n` of them.
const TOKEN: i128 = 1_000_000_000;

/// A bucket.
#[derive(Debug, Clone)]
pub(super) struct TokenBucket {
    rate: Bucket,
    level: i128,
    /// When the level was right.
    at: Duration,
}

impl TokenBucket {
    /// A full bucket. A rate or size of 0 counts as 1.
    pub(super) fn new(rate: Bucket, now: Duration) -> Self {
        let rate = Bucket { per_second: rate.per_second.max(1), burst: rate.burst.max(1) };
        Self { rate, level: i128::from(rate.burst) * TOKEN, at: now }
    }

    /// None: a request may begin. Else how long until one may, if nothing else is taken.
    pub(super) fn wait(&mut self, now: Duration) -> Option<Duration> {
        self.fill(now);
        if self.level >= TOKEN {
            return None;
        }
        // Both are positive, and the rate is at least 1.
        let nanoseconds =
            (TOKEN.saturating_sub(self.level)).unsigned_abs().div_ceil(u128::from(self.rate.per_second));
        Some(Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX)))
    }

    /// Takes a request's cost, whatever the level.
    pub(super) fn take(&mut self, cost: u64) {
        self.level = self.level.saturating_sub(i128::from(cost) * TOKEN);
    }

    fn fill(&mut self, now: Duration) {
        // A clock that goes back brings nothing, and what it brought is not brought again.
        let Some(elapsed) = now.checked_sub(self.at) else { return };
        self.at = now;
        let elapsed = i128::try_from(elapsed.as_nanos()).unwrap_or(i128::MAX);
        let flow = elapsed.saturating_mul(i128::from(self.rate.per_second));
        self.level = self.level.saturating_add(flow).min(i128::from(self.rate.burst) * TOKEN);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bucket(per_second: u64, burst: u64) -> TokenBucket {
        TokenBucket::new(Bucket { per_second, burst }, Duration::ZERO)
    }

    #[test]
    fn a_full_bucket_lets_its_burst_through_and_then_the_rate() {
        let mut bucket = bucket(1000, 100);
        assert_eq!(bucket.wait(Duration::ZERO), None);
        bucket.take(100);
        let wait = bucket.wait(Duration::ZERO).unwrap();
        assert!(wait <= Duration::from_millis(1), "{wait:?}");
        assert_eq!(bucket.wait(Duration::from_millis(1)), None);
        bucket.take(1);
        assert!(bucket.wait(Duration::from_millis(1)).is_some());
    }

    #[test]
    fn what_was_taken_beyond_is_owed() {
        let mut bucket = bucket(10, 1);
        bucket.take(101);
        assert_eq!(bucket.wait(Duration::ZERO).unwrap().as_secs(), 10);
        assert!(bucket.wait(Duration::from_secs(9)).is_some());
        assert_eq!(bucket.wait(Duration::from_secs(11)), None);
    }

    #[test]
    fn no_number_is_too_great() {
        let mut extreme = bucket(u64::MAX, u64::MAX);
        for _ in 0..1000 {
            extreme.take(u64::MAX);
        }
        assert!(extreme.wait(Duration::from_nanos(1)).is_some());
        assert_eq!(extreme.wait(Duration::MAX), None);
        let mut slow = bucket(0, 0);
        slow.take(u64::MAX);
        slow.take(u64::MAX);
        assert_eq!(slow.wait(Duration::ZERO), Some(Duration::from_nanos(u64::MAX)));
    }

    #[test]
    fn a_clock_that_goes_back_brings_nothing() {
        let mut bucket = bucket(1, 1);
        assert_eq!(bucket.wait(Duration::from_secs(10)), None);
        bucket.take(1);
        assert!(bucket.wait(Duration::from_secs(5)).is_some());
        assert!(bucket.wait(Duration::from_secs(10)).is_some());
        assert_eq!(bucket.wait(Duration::from_secs(11)), None);
    }

    /// A rate of everyday size, or any.
    fn rates() -> impl Strategy<Value = u64> {
        prop_oneof![1u64..1_000_000, any::<u64>()]
    }

    proptest! {
        /// Between any two requests that began, no more was taken than the bucket held and what flowed in.
        #[test]
        fn no_span_gets_more_than_its_share(
            per_second in rates(),
            burst in rates(),
            steps in prop::collection::vec((0u64..2_000_000_000, rates()), 1..60),
        ) {
            let mut bucket = bucket(per_second, burst);
            let mut now = 0u64;
            // When each request began, and its cost.
            let mut begun: Vec<(u64, u64)> = Vec::new();
            for (pause, cost) in steps {
                now += pause;
                if bucket.wait(Duration::from_nanos(now)).is_none() {
                    bucket.take(cost);
                    begun.push((now, cost));
                }
            }
            let (per_second, burst) = (u128::from(per_second.max(1)), u128::from(burst.max(1)));
            for first in 0..begun.len() {
                let mut taken = 0u128;
                for last in first..begun.len() {
                    // Those before the last one are within the share; it itself may go beyond.
                    let span = u128::from(begun[last].0 - begun[first].0);
                    prop_assert!(taken * 1_000_000_000 <= burst * 1_000_000_000 + span.saturating_mul(per_second));
                    taken += u128::from(begun[last].1);
                }
            }
        }

        /// Whoever waits as long as told may go on: a limiter never comes to a stand.
        #[test]
        fn whoever_waits_as_told_gets_through(
            per_second in 1u64..1_000_000_000,
            burst in 1u64..1_000_000_000,
            costs in prop::collection::vec(0u64..10_000_000, 1..60),
        ) {
            let mut bucket = bucket(per_second, burst);
            let mut now = Duration::ZERO;
            for cost in costs {
                if let Some(wait) = bucket.wait(now) {
                    prop_assert!(wait > Duration::ZERO);
                    // Not a nanosecond too late either.
                    prop_assert!(bucket.wait(now + wait - Duration::from_nanos(1)).is_some());
                    now += wait;
                }
                prop_assert_eq!(bucket.wait(now), None);
                bucket.take(cost);
            }
        }

        #[test]
        fn a_debt_is_paid_at_the_rate(per_second in 1u64..1_000_000, debt in 1u64..1_000_000) {
            let mut bucket = bucket(per_second, 1);
            bucket.take(1 + debt);
            let wait = bucket.wait(Duration::ZERO).unwrap();
            // And the token that the next one needs.
            let exact = Duration::from_nanos((u128::from(debt + 1) * 1_000_000_000).div_ceil(u128::from(per_second)) as u64);
            prop_assert_eq!(wait, exact);
        }
    }
}
