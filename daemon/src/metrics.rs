//! Counters and histograms in Prometheus' text form, for `GET /metrics`.
//!
//! Names that dockerd has too are dockerd's (`engine_daemon_…`), so that its dashboards work; ours begin with
//! `bulkhead_`.

use std::{
    fmt::Write,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

/// The media type of [`Text`].
pub const MEDIA_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Upper bounds of a histogram's buckets, in microseconds: from 1 ms to a minute.
const BOUNDS_US: [u64; 14] = [
    1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 2_500_000, 5_000_000,
    10_000_000, 60_000_000,
];

/// How long something took, many times.
#[derive(Debug, Default)]
pub struct Histogram {
    /// By [`BOUNDS_US`], each for itself; the last is of what took longer.
    buckets: [AtomicU64; BOUNDS_US.len() + 1],
    sum_us: AtomicU64,
}

impl Histogram {
    /// It took so long once more.
    pub fn observe(&self, took: Duration) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let index = BOUNDS_US.partition_point(|bound| *bound < micros);
        if let Some(bucket) = self.buckets.get(index) {
            bucket.fetch_add(1, Ordering::Relaxed);
        }
        self.sum_us.fetch_add(micros, Ordering::Relaxed);
    }
}

/// Labels of a sample.
pub type Labels<'a> = &'a [(&'a str, &'a str)];

/// The exposition, as it grows.
#[derive(Debug, Default)]
pub struct Text(String);

impl Text {
    /// A metric's name, kind and meaning; its samples follow.
    fn begin(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: Labels<'_>, value: &dyn std::fmt::Display) {
        self.0.push_str(name);
        for (index, (label, text)) in labels.iter().enumerate() {
            let text = text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            let _ = write!(self.0, "{}{label}=\"{text}\"", if index == 0 { "{" } else { "," });
        }
        let _ = writeln!(self.0, "{} {value}", if labels.is_empty() { "" } else { "}" });
    }

    /// What only grows.
    pub fn counter(&mut self, name: &str, help: &str, samples: &[(Labels<'_>, f64)]) {
        self.begin(name, "counter", help);
        samples.iter().for_each(|(labels, value)| self.sample(name, labels, value));
    }

    /// What goes up and down.
    pub fn gauge(&mut self, name: &str, help: &str, samples: &[(Labels<'_>, f64)]) {
        self.begin(name, "gauge", help);
        samples.iter().for_each(|(labels, value)| self.sample(name, labels, value));
    }

    /// Histograms of one name. In seconds, as Prometheus wants all times.
    pub fn histograms(&mut self, name: &str, help: &str, samples: &[(Labels<'_>, &Histogram)]) {
        self.begin(name, "histogram", help);
        for (labels, histogram) in samples {
            let mut total = 0;
            let bounds =
                BOUNDS_US.iter().map(|bound| format!("{}", *bound as f64 / 1e6)).chain(["+Inf".to_owned()]);
            for (bound, bucket) in bounds.zip(&histogram.buckets) {
                total += bucket.load(Ordering::Relaxed);
                let labels = [labels, &[("le", bound.as_str())][..]].concat();
                self.sample(&format!("{name}_bucket"), &labels, &total);
            }
            let sum = histogram.sum_us.load(Ordering::Relaxed) as f64 / 1e6;
            self.sample(&format!("{name}_sum"), labels, &sum);
            self.sample(&format!("{name}_count"), labels, &total);
        }
    }

    /// The whole text.
    #[must_use]
    pub fn finish(self) -> String {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_is_prometheus() {
        let histogram = Histogram::default();
        for millis in [1, 2, 40, 120_000] {
            histogram.observe(Duration::from_millis(millis));
        }
        let mut text = Text::default();
        text.gauge("things", "How many.", &[(&[("kind", "a \"b\"\\")], 2.0), (&[], 0.5)]);
        text.histograms("took_seconds", "How long.", &[(&[("what", "x")], &histogram)]);
        let text = text.finish();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines[..4],
            ["# HELP things How many.", "# TYPE things gauge", r#"things{kind="a \"b\"\\"} 2"#, "things 0.5"]
        );
        for line in [
            r#"took_seconds_bucket{what="x",le="0.001"} 1"#,
            r#"took_seconds_bucket{what="x",le="0.0025"} 2"#,
            r#"took_seconds_bucket{what="x",le="0.025"} 2"#,
            r#"took_seconds_bucket{what="x",le="0.05"} 3"#,
            r#"took_seconds_bucket{what="x",le="60"} 3"#,
            r#"took_seconds_bucket{what="x",le="+Inf"} 4"#,
            r#"took_seconds_count{what="x"} 4"#,
            r#"took_seconds_sum{what="x"} 120.043"#,
        ] {
            assert!(lines.contains(&line), "{line} is not in\n{text}");
        }
    }
}
