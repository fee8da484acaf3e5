//! How a container is asked to end, and who is told when it has.

use std::time::Duration;

use super::{
    super::{
        Grace, Stop, signal,
        state::{Rest, State},
        workload,
    },
    Actor, answer,
};

impl Actor {
    pub(super) async fn begin_stop(&mut self, stop: Stop) {
        let Some(workload) = self.workload.clone() else { return };
        let signal = stop.signal.unwrap_or_else(|| self.stop_signal());
        let own = || Grace::from_seconds(self.record.config.stop_timeout.unwrap_or(10));
        let grace = match stop.grace.unwrap_or_else(own) {
            Grace::For(grace) => Some(grace),
            Grace::Forever => None,
        };
        self.tell("kill", [("signal".into(), signal.to_string())]);
        let paused = self.wake().await;
        tokio::spawn(async move { workload::stop(&workload, signal, grace, paused).await });
    }

    pub(super) fn stop_signal(&self) -> i32 {
        signal::parse(&self.record.config.stop_signal).unwrap_or(libc::SIGTERM)
    }

    /// Answers those who wait for a stop: when nothing follows it, once the sandbox is gone too.
    pub(super) fn tell_stoppers(&mut self) {
        for reply in self.killers.drain(..) {
            answer(reply, Ok(()));
        }
        let stoppers = std::mem::take(&mut self.stoppers);
        if !stoppers.is_empty() || !self.restarters.is_empty() {
            self.tell("stop", []);
        }
        let tell = || stoppers.into_iter().for_each(|reply| answer(reply, Ok(())));
        match (&self.record.life.state, self.ending.take()) {
            (State::Resting(_), Some(ending)) => {
                self.ending = Some(tokio::spawn(async move {
                    let _ = ending.await;
                    tell();
                }));
            }
            (_, ending) => {
                self.ending = ending;
                tell();
            }
        }
    }

    pub(super) fn ran_for(&self) -> Duration {
        match &self.record.life.state {
            State::Resting(Rest::Exited(ended))
            | State::Starting(Rest::Exited(ended))
            | State::Removing(Rest::Exited(ended))
            | State::Restarting(ended) => {
                Duration::try_from(ended.finished_at.duration_since(ended.started_at)).unwrap_or_default()
            }
            _ => Duration::ZERO,
        }
    }
}
