//! How long the steps of a sandbox's coming up took, for logs, benchmarks and people.

use std::{
    fmt,
    time::{Duration, Instant},
};

/// Durations by name, in the order of their ends. Each begins where the one before ends.
#[derive(Debug, Clone, Default)]
pub struct Phases(Vec<(&'static str, Duration)>);

impl Phases {
    /// The steps.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, Duration)> {
        self.0.iter().copied()
    }

    /// All of them together.
    pub fn total(&self) -> Duration {
        self.iter().map(|(_, duration)| duration).sum()
    }
}

/// `spawn 1.2 ms, attach 0.3 ms`.
impl fmt::Display for Phases {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (name, duration)) in self.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            write!(f, "{comma}{name} {:.1} ms", duration.as_secs_f64() * 1e3)?;
        }
        Ok(())
    }
}

/// Takes the times.
#[derive(Debug)]
pub(super) struct Stopwatch {
    last: Instant,
    phases: Phases,
}

impl Stopwatch {
    pub(super) fn start() -> Self {
        Self { last: Instant::now(), phases: Phases::default() }
    }

    /// A step has ended.
    pub(super) fn lap(&mut self, name: &'static str) {
        let now = Instant::now();
        self.phases.0.push((name, now.duration_since(self.last)));
        self.last = now;
    }

    pub(super) fn stop(self) -> Phases {
        self.phases
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_are_told_in_order_and_add_up() {
        let mut watch = Stopwatch::start();
        watch.lap("spawn");
        watch.lap("attach");
        let phases = watch.stop();
        assert_eq!(phases.iter().map(|(name, _)| name).collect::<Vec<_>>(), ["spawn", "attach"]);
        assert_eq!(phases.total(), phases.iter().map(|(_, duration)| duration).sum::<Duration>());
        let text = Phases(vec![("a", Duration::from_micros(1250)), ("b", Duration::ZERO)]).to_string();
        assert_eq!(text, "a 1.2 ms, b 0.0 ms");
    }
}
