//! A container's life as a pure function: [`Lifecycle::step`] takes an event and gives the next state and
//! what is to be done. Nothing here waits, looks at a clock or touches a disk; the actor does.
//!
//! ```text
//!                    ┌──────────────── start failed ───────────────┐
//!                    ▼                                             │
//!  create ──▶ Resting(Created) ──── start ──────────────────▶ Starting ◀── back-off over ── Restarting
//!             Resting(Exited) ◀─┐                                  │                            ▲
//!                    │          │                               started                         │
//!                    │          └─── exited ◀──────────────── Running ─── exited, policy ───────┘
//!                  remove                                          │
//!                    ▼                                     exited, --rm or rm -f
//!                Removing ◀────────────────────────────────────────┘
//!                    └─ removal failed ──▶ Dead ── remove ──▶ Removing
//! ```
//!
//! A running workload may be paused: that is part of Running, since everything else that can happen to one can
//! happen to it while it stands still.
//!
//! A state carries only what exists in it. Docker's status words and booleans are derived in [`super::inspect`].

use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::sandbox::Place;

/// The first delay before an automatic restart.
const FIRST_DELAY: Duration = Duration::from_millis(100);

/// The longest; each delay is twice the one before.
const LONGEST_DELAY: Duration = Duration::from_secs(60);

/// A run of this length makes the next delay the first again.
const GOOD_RUN: Duration = Duration::from_secs(10);

/// Where a container is in its life, and what decides where it goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Lifecycle {
    /// The state.
    pub state: State,
    /// Whether a user's stop or kill was the last word, for `unless-stopped`.
    pub manually_stopped: bool,
    /// Automatic restarts since the user's last start.
    pub restart_count: u32,
    /// The last delay before an automatic restart, 0 before the first.
    pub delay_ms: u32,
}

/// The states.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum State {
    /// Nothing runs.
    Resting(Rest),
    /// A sandbox is being booted; the rest is what a failure goes back to.
    Starting(Rest),
    /// The workload runs.
    Running(Running),
    /// The workload has ended and is to be started again after a delay.
    Restarting(Ended),
    /// It is being deleted.
    Removing(Rest),
    /// It could not be deleted.
    Dead(Rest),
}

/// What a container is when nothing runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Rest {
    /// It never ran; why the last attempt failed.
    Created(Option<Failure>),
    /// It ran.
    Exited(Ended),
}

/// Why a start failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Failure {
    /// 127: no such executable; 126: not executable; 128: anything else.
    pub code: i32,
    /// In Docker's words.
    pub error: String,
}

/// A running workload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Running {
    /// The sandbox's name.
    pub sandbox: String,
    /// The VMM's pid on the host.
    pub pid: i32,
    /// Where the run begins in the log.
    pub log_start: u64,
    /// Since when.
    pub started_at: Timestamp,
    /// The container's name in its guest, where that is not its id: it is a clone, or goes on from a
    /// checkpoint that a clone has made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<String>,
    /// What it has of its machine.
    #[serde(default, skip_serializing_if = "Place::is_usual")]
    pub place: Place,
    /// What the user wants after its end; None: what the restart policy says.
    pub then: Option<Then>,
    /// Whether it stands still.
    #[serde(default)]
    pub paused: bool,
}

/// What the user wants after the workload's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Then {
    /// No automatic restart.
    Rest,
    /// Another start (`docker restart`).
    Start,
    /// Its removal (`docker rm -f`).
    Remove,
}

/// A workload that ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Ended {
    /// Its exit code, or that of a later start that failed.
    pub code: i32,
    /// Whether the OOM killer struck.
    pub oom_killed: bool,
    /// What went wrong beyond its exit code; mostly empty.
    pub error: String,
    /// When it began.
    pub started_at: Timestamp,
    /// When it ended.
    pub finished_at: Timestamp,
}

/// A workload's end as it is reported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    /// 0 to 255.
    pub code: i32,
    /// Whether the OOM killer struck.
    pub oom_killed: bool,
    /// Why, when the sandbox itself died.
    pub error: String,
    /// When.
    pub at: Timestamp,
}

/// What decides about a container's next start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules {
    /// `HostConfig.RestartPolicy`.
    pub policy: Policy,
    /// `HostConfig.AutoRemove`.
    pub auto_remove: bool,
}

/// `HostConfig.RestartPolicy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// `no`.
    Never,
    /// `always`.
    Always,
    /// `unless-stopped`.
    UnlessStopped,
    /// `on-failure`; None: without end.
    OnFailure(Option<u32>),
}

/// What happens to a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The user's start.
    Start,
    /// The sandbox is up and the workload runs.
    Started {
        /// The sandbox's name.
        sandbox: String,
        /// The VMM's pid.
        pid: i32,
        /// Where the run begins in the log.
        log_start: u64,
        /// When.
        at: Timestamp,
        /// [`Running::guest`].
        guest: Option<String>,
        /// [`Running::place`].
        place: Place,
    },
    /// The start failed; nothing of it is left.
    StartFailed(Failure),
    /// Its processes stand still, or run on.
    Paused(bool),
    /// The user stops or kills it.
    Stop,
    /// The user restarts it.
    Restart,
    /// The user removes it.
    Remove {
        /// Even if it runs.
        force: bool,
    },
    /// The workload has ended and all of its output is taken.
    Exited(Exit),
    /// The delay of an automatic restart is over.
    BackOffOver,
    /// The removal failed.
    RemoveFailed,
    /// A daemon finds the container on disk; nothing of it runs.
    Found(Timestamp),
}

/// What is to be done, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Boot a sandbox (once the old one is gone) and report `Started` or `StartFailed`.
    Boot,
    /// Give the boot up.
    AbortBoot,
    /// Kill the workload now.
    Kill,
    /// Tell those who wait for the exit, and publish `die`.
    Ended(i32),
    /// Power the sandbox off so that its disk is whole.
    ShutDown,
    /// Kill the sandbox; its disk is of no use any more.
    Destroy,
    /// Report `BackOffOver` after so long.
    BackOff(Duration),
    /// Delete it from disk (once its sandbox is gone), and report `RemoveFailed` if that fails.
    Delete,
}

/// Why an event does not fit the state. Nothing was changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// It is so already.
    Already,
    /// It does not run.
    NotRunning,
    /// It runs; the word is its status.
    Runs(&'static str),
    /// It is paused.
    Paused,
    /// It is being removed.
    BeingRemoved,
    /// It is dead.
    Dead,
    /// An event of the actor's own that comes too late.
    Stale,
}

impl Default for Lifecycle {
    fn default() -> Self {
        Self {
            state: State::Resting(Rest::Created(None)),
            manually_stopped: false,
            restart_count: 0,
            delay_ms: 0,
        }
    }
}

impl Lifecycle {
    /// The next state and what is to be done.
    ///
    /// # Errors
    /// [`Refusal`]: the event does not fit.
    pub fn step(&self, rules: Rules, event: Event) -> Result<(Self, Vec<Effect>), Refusal> {
        let mut next = self.clone();
        let effects = match event {
            Event::Start => next.start()?,
            Event::Started { sandbox, pid, log_start, at, guest, place } => {
                let State::Starting(_) = self.state else { return Err(Refusal::Stale) };
                let (then, paused) = (None, false);
                let running = Running { sandbox, pid, log_start, started_at: at, guest, place, then, paused };
                next.state = State::Running(running);
                vec![]
            }
            Event::StartFailed(failure) => next.start_failed(rules, failure)?,
            Event::Paused(paused) => {
                let State::Running(running) = &mut next.state else { return Err(Refusal::NotRunning) };
                if running.paused == paused {
                    return Err(Refusal::Already);
                }
                running.paused = paused;
                vec![]
            }
            Event::Stop => next.stop(rules)?,
            Event::Restart => next.restart()?,
            Event::Remove { force } => next.remove(force)?,
            Event::Exited(exit) => next.exited(rules, exit)?,
            Event::BackOffOver => {
                let State::Restarting(ended) = &self.state else { return Err(Refusal::Stale) };
                next.state = State::Starting(Rest::Exited(ended.clone()));
                vec![Effect::Boot]
            }
            Event::RemoveFailed => {
                let State::Removing(rest) = &self.state else { return Err(Refusal::Stale) };
                next.state = State::Dead(rest.clone());
                vec![]
            }
            Event::Found(now) => next.found(rules, now),
        };
        Ok((next, effects))
    }

    fn start(&mut self) -> Result<Vec<Effect>, Refusal> {
        match &self.state {
            State::Resting(rest) => {
                self.state = State::Starting(rest.clone());
                self.manually_stopped = false;
                self.restart_count = 0;
                self.delay_ms = 0;
                Ok(vec![Effect::Boot])
            }
            State::Running(Running { paused: true, .. }) => Err(Refusal::Paused),
            State::Starting(_) | State::Running(_) | State::Restarting(_) => Err(Refusal::Already),
            State::Removing(_) => Err(Refusal::BeingRemoved),
            State::Dead(_) => Err(Refusal::Dead),
        }
    }

    fn start_failed(&mut self, rules: Rules, failure: Failure) -> Result<Vec<Effect>, Refusal> {
        let State::Starting(rest) = &self.state else { return Err(Refusal::Stale) };
        let rest = match rest {
            Rest::Created(_) => Rest::Created(Some(failure)),
            Rest::Exited(ended) => {
                Rest::Exited(Ended { code: failure.code, error: failure.error, ..ended.clone() })
            }
        };
        if rules.auto_remove {
            self.state = State::Removing(rest);
            Ok(vec![Effect::Delete])
        } else {
            self.state = State::Resting(rest);
            Ok(vec![])
        }
    }

    fn stop(&mut self, rules: Rules) -> Result<Vec<Effect>, Refusal> {
        match &mut self.state {
            State::Running(running) => {
                // A removal or restart that is under way is not taken back by a stop.
                running.then.get_or_insert(Then::Rest);
                self.manually_stopped = true;
                Ok(vec![])
            }
            State::Restarting(ended) => {
                self.state = State::Resting(Rest::Exited(ended.clone()));
                self.manually_stopped = true;
                Ok(vec![])
            }
            State::Starting(rest) if rules.auto_remove => {
                self.state = State::Removing(rest.clone());
                Ok(vec![Effect::AbortBoot, Effect::Delete])
            }
            State::Starting(rest) => {
                self.state = State::Resting(rest.clone());
                self.manually_stopped = true;
                Ok(vec![Effect::AbortBoot])
            }
            State::Resting(_) | State::Removing(_) | State::Dead(_) => Err(Refusal::NotRunning),
        }
    }

    fn restart(&mut self) -> Result<Vec<Effect>, Refusal> {
        match &mut self.state {
            State::Running(running) => {
                if running.then != Some(Then::Remove) {
                    running.then = Some(Then::Start);
                    // The user's last word is that it runs.
                    self.manually_stopped = false;
                }
                Ok(vec![])
            }
            State::Restarting(ended) => {
                self.state = State::Starting(Rest::Exited(ended.clone()));
                Ok(vec![Effect::Boot])
            }
            _ => self.start(),
        }
    }

    fn remove(&mut self, force: bool) -> Result<Vec<Effect>, Refusal> {
        let (rest, effects) = match &mut self.state {
            State::Removing(_) => return Err(Refusal::BeingRemoved),
            State::Running(Running { paused: true, .. }) if !force => return Err(Refusal::Paused),
            State::Running(_) if !force => return Err(Refusal::Runs("running")),
            State::Restarting(_) if !force => return Err(Refusal::Runs("restarting")),
            State::Starting(_) if !force => return Err(Refusal::Runs("starting")),
            State::Running(running) => {
                running.then = Some(Then::Remove);
                return Ok(vec![Effect::Kill]);
            }
            State::Restarting(ended) => (Rest::Exited(ended.clone()), vec![Effect::Delete]),
            State::Starting(rest) => (rest.clone(), vec![Effect::AbortBoot, Effect::Delete]),
            State::Resting(rest) | State::Dead(rest) => (rest.clone(), vec![Effect::Delete]),
        };
        self.state = State::Removing(rest);
        Ok(effects)
    }

    fn exited(&mut self, rules: Rules, exit: Exit) -> Result<Vec<Effect>, Refusal> {
        let State::Running(running) = &self.state else { return Err(Refusal::Stale) };
        let then = running.then;
        let code = exit.code;
        let ended = Ended {
            code,
            oom_killed: exit.oom_killed,
            error: exit.error,
            started_at: running.started_at,
            finished_at: exit.at.max(running.started_at),
        };
        let ran = Duration::try_from(ended.finished_at.duration_since(ended.started_at)).unwrap_or_default();
        let mut effects = vec![Effect::Ended(code)];
        let again = then.is_none() && rules.policy.restarts(code, self.restart_count);
        match then {
            Some(Then::Start) => {
                self.state = State::Starting(Rest::Exited(ended));
                effects.extend([Effect::ShutDown, Effect::Boot]);
            }
            _ if again => {
                let delay = next_delay(self.delay_ms, ran);
                self.delay_ms = u32::try_from(delay.as_millis()).unwrap_or(u32::MAX);
                self.restart_count = self.restart_count.saturating_add(1);
                self.state = State::Restarting(ended);
                effects.extend([Effect::ShutDown, Effect::BackOff(delay)]);
            }
            _ if rules.auto_remove || then == Some(Then::Remove) => {
                self.state = State::Removing(Rest::Exited(ended));
                effects.extend([Effect::Destroy, Effect::Delete]);
            }
            _ => {
                self.state = State::Resting(Rest::Exited(ended));
                effects.push(Effect::ShutDown);
            }
        }
        Ok(effects)
    }

    fn found(&mut self, rules: Rules, now: Timestamp) -> Vec<Effect> {
        let why = "the daemon ended while the container was running, and so did the container";
        match &self.state {
            State::Running(_) => {
                let exit = Exit { code: 137, oom_killed: false, error: why.into(), at: now };
                self.exited(rules, exit).unwrap_or_default()
            }
            State::Starting(_) => {
                let error = "the daemon ended while the container was starting".into();
                self.start_failed(rules, Failure { code: 128, error }).unwrap_or_default()
            }
            State::Restarting(_) => vec![Effect::BackOff(FIRST_DELAY)],
            State::Removing(_) => vec![Effect::Delete],
            State::Resting(rest @ Rest::Exited(_)) if rules.auto_remove => {
                self.state = State::Removing(rest.clone());
                vec![Effect::Delete]
            }
            State::Resting(rest @ Rest::Exited(_))
                if rules.policy.starts_with_daemon(self.manually_stopped) =>
            {
                self.state = State::Starting(rest.clone());
                vec![Effect::Boot]
            }
            State::Resting(_) | State::Dead(_) => vec![],
        }
    }
}

impl Policy {
    fn restarts(self, code: i32, restarts_so_far: u32) -> bool {
        match self {
            Self::Never => false,
            Self::Always | Self::UnlessStopped => true,
            Self::OnFailure(limit) => code != 0 && limit.is_none_or(|limit| restarts_so_far < limit),
        }
    }

    fn starts_with_daemon(self, manually_stopped: bool) -> bool {
        match self {
            Self::Always => true,
            Self::UnlessStopped => !manually_stopped,
            Self::Never | Self::OnFailure(_) => false,
        }
    }
}

fn next_delay(last_ms: u32, ran: Duration) -> Duration {
    if last_ms == 0 || ran >= GOOD_RUN {
        FIRST_DELAY
    } else {
        (Duration::from_millis(last_ms.into()) * 2).min(LONGEST_DELAY)
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
