//! Samples, what is computed from them, and how they are shown.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// Durations by who took them, in nanoseconds.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Samples(BTreeMap<String, Vec<u64>>);

impl Samples {
    pub(crate) fn add(&mut self, who: &str, duration: Duration) {
        self.0
            .entry(who.to_owned())
            .or_default()
            .push(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX));
    }

    /// What [`Samples::to_json`] made.
    pub(crate) fn parse(json: &[u8]) -> Result<Samples> {
        serde_json::from_slice(json).with_context(|| format!("samples: {}", String::from_utf8_lossy(json)))
    }

    pub(crate) fn to_json(&self) -> Result<String> {
        Ok(serde_json::to_string(self)?)
    }

    fn of(&self, who: &str) -> Result<Vec<f64>> {
        let samples = self.0.get(who).filter(|samples| !samples.is_empty());
        let mut milliseconds: Vec<f64> = samples
            .with_context(|| format!("nothing was measured of {who}"))?
            .iter()
            .map(|nanoseconds| Duration::from_nanos(*nanoseconds).as_secs_f64() * 1e3)
            .collect();
        milliseconds.sort_by(f64::total_cmp);
        Ok(milliseconds)
    }
}

/// A row of `target/bench/results.json`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Figure {
    figure: String,
    unit: &'static str,
    median: f64,
    min: f64,
    max: f64,
    n: usize,
    peer: Option<String>,
    peer_median: Option<f64>,
    /// Ours divided by the peer's: below 1 we take less time.
    ratio: Option<f64>,
}

impl Figure {
    /// Of something that nobody else has.
    pub(crate) fn alone(figure: &str, samples: &Samples, ours: &str) -> Result<Figure> {
        let sorted = samples.of(ours)?;
        Ok(Figure {
            figure: figure.to_owned(),
            unit: "ms",
            median: round(median(&sorted)),
            min: round(sorted.first().copied().unwrap_or_default()),
            max: round(sorted.last().copied().unwrap_or_default()),
            n: sorted.len(),
            peer: None,
            peer_median: None,
            ratio: None,
        })
    }

    /// Of something that the peer does too, measured in the same turns.
    pub(crate) fn beside(figure: &str, samples: &Samples, ours: &str, peer: &str) -> Result<Figure> {
        let alone = Figure::alone(figure, samples, ours)?;
        let (mine, theirs) = (median(&samples.of(ours)?), median(&samples.of(peer)?));
        let ratio = (theirs > 0.0).then(|| (mine / theirs * 100.0).round() / 100.0);
        Ok(Figure { peer: Some(peer.to_owned()), peer_median: Some(round(theirs)), ratio, ..alone })
    }
}

/// For people.
pub(crate) fn table(figures: &[Figure]) -> String {
    let mut text = format!(
        "\n{:<24} {:>10} {:>10} {:>10} {:>4}  {:<14} {:>10} {:>6}\n",
        "figure", "median ms", "min", "max", "n", "peer", "median ms", "ratio"
    );
    for row in figures {
        let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value}"));
        let _ = writeln!(
            text,
            "{:<24} {:>10} {:>10} {:>10} {:>4}  {:<14} {:>10} {:>6}",
            row.figure,
            row.median,
            row.min,
            row.max,
            row.n,
            row.peer.as_deref().unwrap_or("-"),
            number(row.peer_median),
            number(row.ratio),
        );
    }
    text
}

/// Of sorted values; of two in the middle the mean.
fn median(sorted: &[f64]) -> f64 {
    let at = |index: usize| sorted.get(index).copied().unwrap_or_default();
    match sorted.len() {
        0 => 0.0,
        count if count % 2 == 1 => at(count / 2),
        count => f64::midpoint(at(count / 2 - 1), at(count / 2)),
    }
}

/// To a tenth: more digits would only be noise.
fn round(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples() -> Samples {
        let mut samples = Samples::default();
        for (ours, theirs) in [(30, 60), (10, 20), (20, 100), (40, 60)] {
            samples.add("ours", Duration::from_millis(ours));
            samples.add("theirs", Duration::from_millis(theirs));
        }
        samples
    }

    #[test]
    fn a_row_has_what_programs_read() {
        let row =
            serde_json::to_value(Figure::beside("start", &samples(), "ours", "theirs").unwrap()).unwrap();
        let expected = serde_json::json!({
            "figure": "start", "unit": "ms", "median": 25.0, "min": 10.0, "max": 40.0, "n": 4,
            "peer": "theirs", "peer_median": 60.0, "ratio": 0.42,
        });
        assert_eq!(row, expected);
    }

    #[test]
    fn a_figure_without_peer_says_null_and_one_without_samples_is_an_error() {
        let row = serde_json::to_value(Figure::alone("start", &samples(), "ours").unwrap()).unwrap();
        assert!(row["peer"].is_null() && row["peer_median"].is_null() && row["ratio"].is_null());
        assert!(Figure::alone("start", &samples(), "nobody").is_err());
    }

    #[test]
    fn samples_travel_as_json() {
        assert_eq!(Samples::parse(samples().to_json().unwrap().as_bytes()).unwrap(), samples());
    }

    #[test]
    fn the_middle_of_an_odd_number_is_one_of_them() {
        assert!((median(&[1.0, 2.0, 9.0]) - 2.0).abs() < f64::EPSILON);
    }
}
