//! Samples, what is computed from them, and how they are shown.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize, Serializer};

/// Measured numbers by what they are of: durations in nanoseconds, memory in bytes.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Samples(BTreeMap<String, Vec<u64>>);

impl Samples {
    pub(crate) fn add(&mut self, what: &str, number: u64) {
        self.0.entry(what.to_owned()).or_default().push(number);
    }

    pub(crate) fn add_time(&mut self, what: &str, duration: Duration) {
        self.add(what, u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX));
    }

    /// What [`Samples::to_json`] made.
    pub(crate) fn parse(json: &[u8]) -> Result<Samples> {
        serde_json::from_slice(json).with_context(|| format!("samples: {}", String::from_utf8_lossy(json)))
    }

    pub(crate) fn to_json(&self) -> Result<String> {
        Ok(serde_json::to_string(self)?)
    }

    /// Whether there is any of it.
    pub(crate) fn has(&self, what: &str) -> bool {
        self.0.get(what).is_some_and(|samples| !samples.is_empty())
    }

    pub(crate) fn sum(&self, what: &str) -> u64 {
        self.0.get(what).into_iter().flatten().sum()
    }

    /// Of durations.
    pub(crate) fn median_ms(&self, what: &str) -> Result<f64> {
        Ok(median(&self.sorted(what, Unit::Milliseconds)?))
    }

    fn sorted(&self, what: &str, unit: Unit) -> Result<Vec<f64>> {
        let samples = self.0.get(what).filter(|samples| !samples.is_empty());
        let samples = samples.with_context(|| format!("nothing was measured of {what}"))?;
        let mut numbers: Vec<f64> = samples.iter().map(|number| unit.of(*number)).collect();
        numbers.sort_by(f64::total_cmp);
        Ok(numbers)
    }
}

/// What a figure is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    /// From nanoseconds.
    Milliseconds,
    /// From bytes.
    Mebibytes,
    /// As it is.
    Count,
}

impl Unit {
    fn name(self) -> &'static str {
        match self {
            Unit::Milliseconds => "ms",
            Unit::Mebibytes => "MiB",
            Unit::Count => "",
        }
    }

    fn of(self, number: u64) -> f64 {
        match self {
            Unit::Milliseconds => Duration::from_nanos(number).as_secs_f64() * 1e3,
            #[allow(clippy::cast_precision_loss, reason = "memory is far below 2^53 bytes")]
            Unit::Mebibytes => number as f64 / f64::from(1 << 20),
            #[allow(clippy::cast_precision_loss, reason = "what is counted here is far below 2^53")]
            Unit::Count => number as f64,
        }
    }
}

impl Serialize for Unit {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// What a figure should be.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Aim {
    /// At most this part of the peer's median.
    Ratio(f64),
    /// A median of at most this.
    AtMost(f64),
}

/// A row of `target/bench/results.json`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Figure {
    figure: String,
    unit: Unit,
    median: f64,
    min: f64,
    max: f64,
    n: usize,
    peer: Option<String>,
    peer_median: Option<f64>,
    peer_min: Option<f64>,
    peer_max: Option<f64>,
    /// Ours divided by the peer's: below 1 we take less.
    ratio: Option<f64>,
    aim: Option<Aim>,
    met: Option<bool>,
}

impl Figure {
    /// Of something that nobody else has.
    pub(crate) fn alone(figure: &str, unit: Unit, samples: &Samples, ours: &str) -> Result<Figure> {
        let sorted = samples.sorted(ours, unit)?;
        Ok(Figure {
            figure: figure.to_owned(),
            unit,
            median: round(median(&sorted)),
            min: round(sorted.first().copied().unwrap_or_default()),
            max: round(sorted.last().copied().unwrap_or_default()),
            n: sorted.len(),
            peer: None,
            peer_median: None,
            peer_min: None,
            peer_max: None,
            ratio: None,
            aim: None,
            met: None,
        })
    }

    /// Of something that the peer does too, measured in the same turns. `peer` is its name and the name of its
    /// samples.
    pub(crate) fn beside(
        figure: &str,
        unit: Unit,
        samples: &Samples,
        ours: &str,
        peer: (&str, &str),
    ) -> Result<Figure> {
        let alone = Figure::alone(figure, unit, samples, ours)?;
        let theirs = samples.sorted(peer.1, unit)?;
        let (mine, other) = (median(&samples.sorted(ours, unit)?), median(&theirs));
        Ok(Figure {
            peer: Some(peer.0.to_owned()),
            peer_median: Some(round(other)),
            peer_min: theirs.first().copied().map(round),
            peer_max: theirs.last().copied().map(round),
            ratio: (other > 0.0).then(|| (mine / other * 100.0).round() / 100.0),
            ..alone
        })
    }

    /// Says what it should be, and so whether it is.
    pub(crate) fn aim(mut self, aim: Aim) -> Figure {
        self.aim = Some(aim);
        self.met = match aim {
            Aim::Ratio(most) => self.ratio.map(|ratio| ratio <= most),
            Aim::AtMost(most) => Some(self.median <= most),
        };
        self
    }
}

/// For people.
pub(crate) fn table(figures: &[Figure]) -> String {
    let mut text = format!(
        "\n{:<26} {:>4} {:>9} {:>19} {:>4}  {:<18} {:>9} {:>19} {:>6}  {}\n",
        "figure", "unit", "median", "min … max", "n", "peer", "median", "min … max", "ratio", "aim"
    );
    for row in figures {
        let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value}"));
        let peer_range = match (row.peer_min, row.peer_max) {
            (Some(min), Some(max)) => format!("{min} … {max}"),
            _ => "-".to_owned(),
        };
        let aim = match (row.aim, row.met) {
            (None, _) => String::new(),
            (Some(aim), met) => {
                let wanted = match aim {
                    Aim::Ratio(most) => format!("≤ {most}×"),
                    Aim::AtMost(most) => format!("≤ {most} {}", row.unit.name()),
                };
                let verdict = match met {
                    Some(true) => "met",
                    Some(false) => "MISSED",
                    None => "no peer",
                };
                format!("{wanted} {verdict}")
            }
        };
        let _ = writeln!(
            text,
            "{:<26} {:>4} {:>9} {:>19} {:>4}  {:<18} {:>9} {:>19} {:>6}  {aim}",
            row.figure,
            row.unit.name(),
            row.median,
            format!("{} … {}", row.min, row.max),
            row.n,
            row.peer.as_deref().unwrap_or("-"),
            number(row.peer_median),
            peer_range,
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
            samples.add_time("ours", Duration::from_millis(ours));
            samples.add_time("theirs", Duration::from_millis(theirs));
        }
        samples
    }

    fn beside() -> Figure {
        Figure::beside("start", Unit::Milliseconds, &samples(), "ours", ("peer", "theirs")).unwrap()
    }

    #[test]
    fn a_row_has_what_programs_read() {
        let row = serde_json::to_value(beside().aim(Aim::Ratio(0.4))).unwrap();
        let expected = serde_json::json!({
            "figure": "start", "unit": "ms", "median": 25.0, "min": 10.0, "max": 40.0, "n": 4,
            "peer": "peer", "peer_median": 60.0, "peer_min": 20.0, "peer_max": 100.0, "ratio": 0.42,
            "aim": {"ratio": 0.4}, "met": false,
        });
        assert_eq!(row, expected);
    }

    #[test]
    fn an_aim_is_met_or_missed_or_has_no_peer() {
        let alone = || Figure::alone("start", Unit::Milliseconds, &samples(), "ours").unwrap();
        assert_eq!(beside().aim(Aim::Ratio(0.5)).met, Some(true));
        assert_eq!(alone().aim(Aim::AtMost(25.0)).met, Some(true));
        assert_eq!(alone().aim(Aim::AtMost(24.0)).met, Some(false));
        assert_eq!(alone().aim(Aim::Ratio(0.5)).met, None);
        let shown = table(&[beside().aim(Aim::Ratio(0.4)), alone().aim(Aim::Ratio(0.4))]);
        assert!(shown.contains("≤ 0.4× MISSED") && shown.contains("≤ 0.4× no peer"), "{shown}");
    }

    #[test]
    fn a_figure_without_peer_says_null_and_one_without_samples_is_an_error() {
        let row = Figure::alone("start", Unit::Milliseconds, &samples(), "ours").unwrap();
        let row = serde_json::to_value(row).unwrap();
        assert!(row["peer"].is_null() && row["peer_median"].is_null() && row["ratio"].is_null());
        assert!(Figure::alone("start", Unit::Milliseconds, &samples(), "nobody").is_err());
    }

    #[test]
    fn memory_is_in_mebibytes() {
        let mut samples = Samples::default();
        samples.add("memory", 3 << 19);
        let row = Figure::alone("memory", Unit::Mebibytes, &samples, "memory").unwrap();
        assert!((row.median - 1.5).abs() < f64::EPSILON);
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
