//! Pausing a container: the answer comes when every process of it stands still.
//!
//! ```text
//!   Pause ──▶ freeze ──▶ frozen at once ──▶ Done
//!                 └────▶ looked at again ─┬─▶ frozen ──▶ Done
//!                                         ├─▶ ended ───▶ Conflict
//!                                         └─▶ too late ▶ thawed, Internal
//! ```

use std::time::{Duration, Instant};

use bulkhead_agent_api::Answer;

use super::{Server, control::Epoch};
use crate::{
    container::{Container, Phase},
    error::{Result, conflict, internal},
    log,
};

/// How soon a container that is not yet frozen is looked at again.
pub(super) const STEP: Duration = Duration::from_millis(2);

/// How long it may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// A pause that is to be answered.
pub(super) struct Freeze {
    epoch: Epoch,
    call: u64,
    container: String,
    deadline: Instant,
}

impl Server {
    /// Begins a pause; whether it is done already.
    pub(super) fn pause(&mut self, epoch: Epoch, call: u64, id: String) -> Result<bool> {
        let container = self.containers.get_mut(&id).ok_or_else(super::calls::no_container)?;
        if !runs(container) {
            return Err(conflict("the container is not running"));
        }
        container.cgroup.freeze()?;
        container.paused = true;
        if container.cgroup.is_frozen() {
            return Ok(true);
        }
        self.freezing.push(Freeze { epoch, call, container: id, deadline: Instant::now() + PATIENCE });
        Ok(false)
    }

    /// Lets a container run on. A pause that is not yet done is given up.
    pub(super) fn resume(&mut self, id: &str) -> Result<()> {
        let container = self.containers.get_mut(id).ok_or_else(super::calls::no_container)?;
        container.cgroup.thaw()?;
        container.paused = false;
        Ok(())
    }

    /// Answers the pauses whose containers stand still by now, or never will.
    pub(super) fn look_at_frozen(&mut self) {
        for freeze in std::mem::take(&mut self.freezing) {
            let result = match self.containers.get_mut(&freeze.container) {
                Some(container) if runs(container) && container.paused => {
                    if container.cgroup.is_frozen() {
                        Ok(Answer::Done)
                    } else if Instant::now() < freeze.deadline {
                        self.freezing.push(freeze);
                        continue;
                    } else {
                        container.paused = false;
                        container.cgroup.thaw().unwrap_or_else(log::warn);
                        Err(internal("its processes do not come to a stand"))
                    }
                }
                Some(container) if runs(container) => Err(conflict("the container was resumed meanwhile")),
                _ => Err(conflict("the container has ended")),
            };
            self.control.answer(freeze.epoch, freeze.call, result);
        }
    }
}

/// Whether its first process was started and has not ended.
fn runs(container: &Container) -> bool {
    container.init.as_ref().is_some_and(|init| matches!(init.phase, Phase::Running))
}
