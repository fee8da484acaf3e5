//! Health checks: a command that is run in the container again and again, and what its results say.
//!
//! ```text
//!              ┌── failed (within the start period, or fewer than `retries` in a row) ──┐
//!              ▼                                                                        │
//!   start ─▶ starting ── one success ──▶ healthy ── `retries` failures in a row ──▶ unhealthy
//!                │                          ▲                                           │
//!                └── `retries` failures ────┼───────────────────────▶ unhealthy         │
//!                                           └──────────── one success ──────────────────┘
//! ```
//! [`judge`] is that picture, pure. [`monitor`] is the task that runs the command as an exec of the container and
//! reports to its actor; it stands still while the container is paused and ends with the workload.

use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use jiff::Timestamp;
use tokio::sync::watch;

use super::{View, state::State, workload::Workload};
use crate::{
    api::types::{
        container::{Config, Health, Healthcheck, HealthcheckResult},
        exec::CreateRequest,
    },
    engine::{Shared, exec},
};

/// The results that are kept.
const KEPT: usize = 5;

/// How much of a check's output is kept, in bytes.
const MAX_OUTPUT: usize = 4096;

/// How often a check is tried, and how long it may take, when nobody says.
const INTERVAL: Duration = Duration::from_secs(30);
const START_INTERVAL: Duration = Duration::from_secs(5);
const TIMEOUT: Duration = Duration::from_secs(30);
const RETRIES: i64 = 3;

/// The least that an interval or timeout may be.
pub(crate) const SHORTEST: Duration = Duration::from_millis(1);

/// How long a check that was killed may take to end.
const DIE_WITHIN: Duration = Duration::from_secs(10);

/// The words of `State.Health.Status`.
pub(crate) const STARTING: &str = "starting";
pub(crate) const HEALTHY: &str = "healthy";
pub(crate) const UNHEALTHY: &str = "unhealthy";

/// How many checks there were since the daemon began.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    /// In all.
    pub(crate) run: AtomicU64,
    /// Of those that failed.
    pub(crate) failed: AtomicU64,
}

/// A health check, resolved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Check {
    command: Vec<String>,
    interval: Duration,
    start_interval: Duration,
    start_period: Duration,
    timeout: Duration,
    retries: i64,
}

impl Check {
    /// The check of a container, None when it has none.
    pub(crate) fn of(config: &Config) -> Option<Self> {
        let Healthcheck { test, interval, timeout, start_period, start_interval, retries } =
            config.healthcheck.as_ref()?;
        let (kind, words) = test.as_deref()?.split_first()?;
        let command = match kind.as_str() {
            "CMD" => words.to_vec(),
            "CMD-SHELL" => {
                let shell = config.shell.clone().filter(|shell| !shell.is_empty());
                let shell = shell.unwrap_or_else(|| vec!["/bin/sh".into(), "-c".into()]);
                shell.into_iter().chain(words.iter().cloned()).collect()
            }
            // NONE, and what Docker does not know either.
            _ => return None,
        };
        let or = |nanoseconds: i64, default| match u64::try_from(nanoseconds) {
            Ok(0) | Err(_) => default,
            Ok(nanoseconds) => Duration::from_nanos(nanoseconds),
        };
        (!command.is_empty()).then(|| Self {
            command,
            interval: or(*interval, INTERVAL),
            start_interval: or(*start_interval, START_INTERVAL),
            start_period: or(*start_period, Duration::ZERO),
            timeout: or(*timeout, TIMEOUT),
            retries: if *retries > 0 { *retries } else { RETRIES },
        })
    }

    /// How long to wait before the next check.
    fn pause(&self, started: Timestamp, now: Timestamp, status: &str) -> Duration {
        let warming_up = since(started, now) < self.start_period && status == STARTING;
        if warming_up { self.start_interval } else { self.interval }
    }
}

fn since(then: Timestamp, now: Timestamp) -> Duration {
    now.duration_since(then).try_into().unwrap_or_default()
}

/// Health at a start: the results of earlier runs stay.
pub(crate) fn begin(check: Option<&Check>, before: Option<Health>) -> Option<Health> {
    check?;
    let log = before.map(|health| health.log).unwrap_or_default();
    Some(Health { status: STARTING.into(), failing_streak: 0, log })
}

/// Takes a result. Whether the status has changed.
pub(crate) fn judge(
    check: &Check,
    health: &mut Health,
    result: HealthcheckResult,
    began: Timestamp,
    started: Timestamp,
) -> bool {
    let before = health.status.clone();
    if result.exit_code == 0 {
        health.failing_streak = 0;
        health.status = HEALTHY.into();
    } else if health.status != STARTING || since(started, began) >= check.start_period {
        health.failing_streak = health.failing_streak.saturating_add(1);
        if health.failing_streak >= check.retries {
            health.status = UNHEALTHY.into();
        }
    }
    let surplus = (health.log.len() + 1).saturating_sub(KEPT);
    health.log.drain(..surplus.min(health.log.len()));
    health.log.push(result);
    before != health.status
}

/// Runs the check until the workload ends; `tell` gets each result, with the time at which it began.
pub(crate) async fn monitor<F, R>(
    shared: Arc<Shared>,
    workload: Arc<Workload>,
    mut view: watch::Receiver<View>,
    check: Check,
    tell: F,
) where
    F: Fn(Timestamp, HealthcheckResult) -> R,
    R: Future<Output = ()>,
{
    let watch = async {
        loop {
            let Some((started, status)) = awake(&mut view).await else { return };
            tokio::time::sleep(check.pause(started, Timestamp::now(), &status)).await;
            if awake(&mut view).await.is_none() {
                return;
            }
            let record = Arc::clone(&view.borrow().record);
            let began = Timestamp::now();
            let (exit_code, output) = probe(&shared, &record, &workload, &check).await;
            let end = Timestamp::now();
            shared.health_checks.run.fetch_add(1, Ordering::Relaxed);
            if exit_code != 0 {
                shared.health_checks.failed.fetch_add(1, Ordering::Relaxed);
            }
            let result =
                HealthcheckResult { start: began.to_string(), end: end.to_string(), exit_code, output };
            tell(began, result).await;
        }
    };
    tokio::select! {
        () = watch => {}
        () = workload.exited() => {}
    }
}

/// Waits until the container is not paused; when it was started and its health's status. None: it runs no more.
async fn awake(view: &mut watch::Receiver<View>) -> Option<(Timestamp, String)> {
    loop {
        let record = Arc::clone(&view.borrow_and_update().record);
        match &record.life.state {
            State::Running(running) if !running.paused => {
                let status = record.health.as_ref().map(|health| health.status.clone());
                return Some((running.started_at, status.unwrap_or_default()));
            }
            State::Running(_) => view.changed().await.ok()?,
            _ => return None,
        }
    }
}

/// Runs the command once: its exit code (-1: it could not be run, or took too long) and its output.
async fn probe(
    shared: &Arc<Shared>,
    record: &Arc<super::record::Record>,
    workload: &Arc<Workload>,
    check: &Check,
) -> (i64, String) {
    let request = CreateRequest {
        attach_stdout: true,
        attach_stderr: true,
        cmd: Some(check.command.clone()),
        ..CreateRequest::default()
    };
    let mut started = match exec::spawn(shared, record, workload, request).await {
        Ok(started) => started,
        Err(error) => return (-1, error.message),
    };
    let mut output = Output::default();
    let ended = tokio::time::timeout(check.timeout, async {
        while let Some(chunk) = started.output.recv().await {
            output.take(&chunk.bytes);
        }
        started.exit().await
    })
    .await;
    match ended {
        Ok(code) => (code.into(), output.text()),
        Err(_) => {
            started.kill().await;
            // A check that cannot be killed must not be joined by others for ever; the next one waits a while.
            let _ = tokio::time::timeout(DIE_WITHIN, started.exit()).await;
            let text = output.text();
            let limit = go_duration(check.timeout);
            let separator = if text.is_empty() { "" } else { ": " };
            (-1, format!("Health check exceeded timeout ({limit}){separator}{text}"))
        }
    }
}

/// A check's output, as much of it as is kept.
#[derive(Default)]
struct Output {
    bytes: Vec<u8>,
    cut: bool,
}

impl Output {
    fn take(&mut self, bytes: &[u8]) {
        let room = MAX_OUTPUT - self.bytes.len().min(MAX_OUTPUT);
        self.cut |= bytes.len() > room;
        self.bytes.extend_from_slice(bytes.get(..room).unwrap_or(bytes));
    }

    fn text(&self) -> String {
        let text = String::from_utf8_lossy(&self.bytes);
        if self.cut { format!("{text}...") } else { text.into_owned() }
    }
}

/// A duration as Go prints it: `1m30s`, `500ms`.
fn go_duration(duration: Duration) -> String {
    let (seconds, nanos) = (duration.as_secs(), duration.subsec_nanos());
    if seconds == 0 {
        return match nanos {
            0 => "0s".into(),
            1..1_000 => format!("{nanos}ns"),
            1_000..1_000_000 => format!("{}µs", decimal(nanos.into(), 1_000)),
            _ => format!("{}ms", decimal(nanos.into(), 1_000_000)),
        };
    }
    let rest = decimal(u64::from(nanos) + seconds % 60 * 1_000_000_000, 1_000_000_000);
    match (seconds / 3600, seconds / 60 % 60) {
        (0, 0) => format!("{rest}s"),
        (0, minutes) => format!("{minutes}m{rest}s"),
        (hours, minutes) => format!("{hours}h{minutes}m{rest}s"),
    }
}

/// `number / unit` without the zeros at its end.
fn decimal(number: u64, unit: u64) -> String {
    let (whole, part) = (number / unit, number % unit);
    if part == 0 {
        return whole.to_string();
    }
    let width = unit.ilog10() as usize;
    format!("{whole}.{part:0width$}").trim_end_matches('0').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(test: &[&str]) -> Config {
        let test = Some(test.iter().map(ToString::to_string).collect());
        Config { healthcheck: Some(Healthcheck { test, ..Healthcheck::default() }), ..Config::default() }
    }

    fn result(exit_code: i64) -> HealthcheckResult {
        HealthcheckResult { exit_code, ..HealthcheckResult::default() }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn the_command_is_run_as_it_is_or_by_the_shell() {
        let command = |config: &Config| Check::of(config).map(|check| check.command);
        assert_eq!(command(&config(&["CMD", "a", "b c"])).unwrap(), ["a", "b c"]);
        assert_eq!(command(&config(&["CMD-SHELL", "a | b"])).unwrap(), ["/bin/sh", "-c", "a | b"]);
        let own =
            Config { shell: Some(vec!["/bin/ash".into(), "-ec".into()]), ..config(&["CMD-SHELL", "a"]) };
        assert_eq!(command(&own).unwrap(), ["/bin/ash", "-ec", "a"]);
        for none in [&["NONE"][..], &[], &["CMD"]] {
            assert_eq!(command(&config(none)), None, "{none:?}");
        }
        assert_eq!(command(&Config::default()), None);
    }

    #[test]
    fn so_many_failures_in_a_row_are_unhealthy_and_one_success_is_healthy() {
        let check = Check::of(&config(&["CMD", "x"])).unwrap();
        let mut health = begin(Some(&check), None).unwrap();
        let mut seen = Vec::new();
        for code in [1, 1, 0, 1, 1, 1, 1, 0] {
            let changed = judge(&check, &mut health, result(code), at(100), at(0));
            seen.push((health.status.clone(), health.failing_streak, changed));
        }
        let expected = [
            (STARTING, 1, false),
            (STARTING, 2, false),
            (HEALTHY, 0, true),
            (HEALTHY, 1, false),
            (HEALTHY, 2, false),
            (UNHEALTHY, 3, true),
            (UNHEALTHY, 4, false),
            (HEALTHY, 0, true),
        ];
        let expected: Vec<_> = expected.iter().map(|(s, n, c)| ((*s).to_owned(), *n, *c)).collect();
        assert_eq!(seen, expected);
        assert_eq!(health.log.iter().map(|entry| entry.exit_code).collect::<Vec<_>>(), [1, 1, 1, 1, 0]);
        let again = begin(Some(&check), Some(health)).unwrap();
        assert_eq!((again.status.as_str(), again.log.len()), (STARTING, 5));
        assert_eq!(begin(None, Some(again)), None);
    }

    #[test]
    fn failures_within_the_start_period_do_not_count_until_the_first_success() {
        let check =
            Check { start_period: Duration::from_secs(10), ..Check::of(&config(&["CMD", "x"])).unwrap() };
        let mut health = begin(Some(&check), None).unwrap();
        for _ in 0..5 {
            judge(&check, &mut health, result(1), at(5), at(0));
        }
        assert_eq!((health.status.as_str(), health.failing_streak), (STARTING, 0));
        judge(&check, &mut health, result(0), at(6), at(0));
        for _ in 0..3 {
            judge(&check, &mut health, result(1), at(7), at(0));
        }
        assert_eq!(health.status, UNHEALTHY, "the start period is over with the first success");
        assert_eq!(check.pause(at(0), at(5), STARTING), START_INTERVAL);
        assert_eq!(check.pause(at(0), at(5), HEALTHY), INTERVAL);
        assert_eq!(check.pause(at(0), at(10), STARTING), INTERVAL);
    }

    #[test]
    fn output_is_cut_and_says_so() {
        let mut output = Output::default();
        output.take(&[b'x'; MAX_OUTPUT - 1]);
        output.take(b"y");
        assert_eq!((output.text().len(), output.cut), (MAX_OUTPUT, false));
        output.take(b"z");
        assert!(output.text().ends_with("xy..."));
    }

    #[test]
    fn durations_are_gos() {
        for (nanos, text) in [
            (0, "0s"),
            (500, "500ns"),
            (1_500, "1.5µs"),
            (500_000_000, "500ms"),
            (1_000_000_000, "1s"),
            (1_250_000_000, "1.25s"),
            (90_000_000_000, "1m30s"),
            (3_600_000_000_000, "1h0m0s"),
        ] {
            assert_eq!(go_duration(Duration::from_nanos(nanos)), text);
        }
    }
}
