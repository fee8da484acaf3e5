//! A machine that is saved, and a copy of it that is told who it is.
//!
//! ```text
//!            Quiesce              another connection: a copy, or a later daemon
//!   Awake ──────────▶ Quiet(epoch) ───────────────────────────────────────────▶ (nameless)
//!     ▲                 │    ▲                                                      │
//!     └───── Thaw ──────┘    └──────────────────── Personalize ─────────────────────┘
//! ```
//! Nameless is no state of its own: it is to be quiet by the word of a connection that is no more. A copy loses
//! every connection, so a copy is always nameless, and what the copy was made of never is while its daemon lives.

use std::time::{Duration, Instant};

use bulkhead_agent_api::{Answer, Call, Identity, MAX_ENTROPY, MIN_ENTROPY};

use super::{
    Server,
    calls::{no_container, set_clock},
    control::Epoch,
};
use crate::{
    cgroup,
    error::{Context, Result, conflict, internal, invalid},
    log, sys,
};

/// How long processes may take to be frozen: one that waits for its disk is frozen afterwards.
const FREEZE_WITHIN: Duration = Duration::from_secs(10);

const STEP: Duration = Duration::from_millis(1);

/// Whether the machine may be saved now, and who said so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Stillness {
    #[default]
    Awake,
    /// By the connection of this epoch.
    Quiet(Epoch),
}

impl Stillness {
    /// Whether a call may be served now.
    pub(super) fn admit(self, epoch: Epoch, call: &Call) -> Result<()> {
        let Self::Quiet(by) = self else { return Ok(()) };
        match call {
            Call::Shutdown | Call::Personalize(_) => Ok(()),
            _ if by != epoch => Err(conflict("the machine may be a copy and must be personalized first")),
            Call::Create(_)
            | Call::Start { .. }
            | Call::Exec { .. }
            | Call::Delete { .. }
            | Call::Pause { .. }
            | Call::Resume { .. } => Err(conflict("the machine is being saved")),
            _ => Ok(()),
        }
    }
}

impl Server {
    /// Becomes a machine of its own. In this order: what is done after the first step may use the generator.
    pub(super) fn personalize(&mut self, epoch: Epoch, identity: &Identity) -> Result<Answer> {
        if !(MIN_ENTROPY..=MAX_ENTROPY).contains(&identity.entropy.len()) {
            return Err(invalid(format!("the entropy must be {MIN_ENTROPY} to {MAX_ENTROPY} bytes")));
        }
        if self.stillness == Stillness::Awake && !identity.containers.is_empty() {
            return Err(conflict("containers that run keep their identity"));
        }
        sys::reseed(&identity.entropy).context("reseed the random generator")?;
        set_clock(identity.unix_ns)?;
        if !identity.hostname.is_empty() {
            rustix::system::sethostname(identity.hostname.as_bytes()).context("set the host name")?;
        }
        for own in &identity.containers {
            let container = self.containers.get_mut(&own.container).ok_or_else(no_container)?;
            container.assume(own, &mut self.scratch)?;
        }
        if let Stillness::Quiet(by) = &mut self.stillness {
            *by = epoch;
        }
        Ok(Answer::Done)
    }

    /// Freezes every container and flushes every disk.
    pub(super) fn quiesce(&mut self, epoch: Epoch) -> Result<Answer> {
        if !self.pending.is_empty()
            || !self.freezing.is_empty()
            || self.containers.values().any(super::Container::is_starting)
        {
            return Err(conflict("a process is being started"));
        }
        if !self.transfers.is_empty() {
            return Err(conflict("files are being copied"));
        }
        if self.containers.is_empty() && self.programs.is_none() {
            // To be saved without a container is to become a template.
            self.programs = cgroup::prepare_programs().map_err(log::warn).ok();
        }
        if let Err(error) = self.freeze() {
            self.unfreeze();
            return Err(error);
        }
        // Not for what is in the copy, which has the dirty pages too: so that no request is under way.
        rustix::fs::sync();
        self.stillness = Stillness::Quiet(epoch);
        Ok(Answer::Done)
    }

    pub(super) fn thaw(&mut self) -> Result<Answer> {
        self.unfreeze();
        self.stillness = Stillness::Awake;
        Ok(Answer::Done)
    }

    fn freeze(&self) -> Result<()> {
        for container in self.containers.values() {
            container.cgroup.freeze()?;
        }
        let deadline = Instant::now() + FREEZE_WITHIN;
        while !self.containers.values().all(|container| container.cgroup.is_frozen()) {
            if Instant::now() > deadline {
                return Err(internal("a process waits in the kernel and cannot be frozen"));
            }
            std::thread::sleep(STEP);
        }
        Ok(())
    }

    fn unfreeze(&self) {
        // One that is paused was frozen before, and stays so.
        for container in self.containers.values().filter(|container| !container.paused) {
            container.cgroup.thaw().unwrap_or_else(log::warn);
        }
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_agent_api::{ErrorKind, ProcessId};

    use super::*;

    #[test]
    fn a_copy_does_nothing_before_it_has_a_name() {
        let identity = Identity { entropy: vec![], unix_ns: 0, hostname: String::new(), containers: vec![] };
        let personalize = Call::Personalize(Box::new(identity));
        let process = ProcessId { container: "c".into(), exec: None };
        let calls = [
            Call::State,
            Call::Thaw,
            Call::Quiesce,
            Call::SetClock { unix_ns: 1 },
            Call::Signal { process: process.clone(), signal: 9 },
            Call::Delete { process },
            Call::Start { container: "c".into(), stdio: bulkhead_agent_api::Stdio::default() },
            Call::Resume { container: "c".into() },
        ];
        let (first, second) = (Epoch::of(1), Epoch::of(2));
        let quiet = Stillness::Quiet(first);
        for call in &calls {
            assert!(Stillness::Awake.admit(second, call).is_ok(), "{call:?}");
            let refused = quiet.admit(second, call).unwrap_err();
            assert_eq!(refused.kind, ErrorKind::Conflict, "{call:?}");
        }
        for call in [&personalize, &Call::Shutdown] {
            assert!(quiet.admit(second, call).is_ok() && quiet.admit(first, call).is_ok());
        }
        // Who made it quiet may look, signal and end it, and start nothing.
        let admitted: Vec<bool> = calls.iter().map(|call| quiet.admit(first, call).is_ok()).collect();
        assert_eq!(admitted, [true, true, true, true, true, false, false, false]);
    }
}
