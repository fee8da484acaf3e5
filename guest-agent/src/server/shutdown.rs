//! Ends: of one container's processes, and of the machine.

use std::time::{Duration, Instant};

use bulkhead_agent_api::Answer;
use rustix::system::RebootCommand;

use super::{Asked, Server};
use crate::log;

/// How long killed processes may take to be gone. Nothing of theirs runs any more; the kernel may still
/// be closing their files.
const PATIENCE: Duration = Duration::from_secs(5);

const STEP: Duration = Duration::from_millis(1);

/// How long whoever asked for the end may take to kill the machine.
const LAST: Duration = Duration::from_secs(1);

impl Server {
    /// Kills whatever is in a container and waits until it is gone.
    pub(super) fn empty(&mut self, container: &str) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let Some(found) = self.containers.get(container) else { return };
            let populated = found.cgroup.is_populated();
            if !populated && !self.transfers.of(container) {
                break;
            }
            if populated && let Err(error) = found.cgroup.kill() {
                log::warn(error);
            }
            self.transfers.kill(container);
            self.wait_for_children();
            if Instant::now() > deadline {
                log::warn(format_args!("processes of {container} do not end"));
                break;
            }
            std::thread::sleep(STEP);
        }
        self.wait_for_children();
        self.bury();
    }

    /// Ends everything in order, and says so. Of PID 1 it does not return: the machine is gone.
    pub(super) fn shut_down(mut self, (epoch, call): Asked) {
        let containers: Vec<String> = self.containers.keys().cloned().collect();
        for id in &containers {
            self.empty(id);
        }
        for (_, container) in std::mem::take(&mut self.containers) {
            if let Err(error) = container.destroy() {
                log::warn(error);
            }
        }
        rustix::fs::sync();
        // A short answer goes out at once.
        self.control.answer(epoch, call, Ok(Answer::Done));
        std::thread::sleep(LAST);
        power_off();
    }
}

/// Flushes and ends the machine. A reset is what a microVM understands as its end: it has no firmware to
/// power off with, and the kernel's `reboot=k` makes it a byte to the keyboard controller.
pub fn power_off() {
    rustix::fs::sync();
    if std::process::id() == 1
        && let Err(error) = rustix::system::reboot(RebootCommand::Restart)
    {
        log::warn(format_args!("reboot: {error}"));
    }
}
