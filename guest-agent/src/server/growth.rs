//! The machine's memory, which grows while the agent runs.
//!
//! ```text
//!   daemon ── SetMemory ──▶ VMM ── virtio-mem ──▶ kernel: plugs, adds, puts in use
//!      └───── AwaitMemory ─────────────────────▶ agent: Done when all of it is there
//! ```
//!
//! A workload whose start waits for this finds the memory that it was promised, and one that sizes itself by
//! the machine's memory sizes itself right.
//!
//! Whatever there is, the containers together may not have all of it ([`cgroup::set_room`]): what the kernel
//! and the agent need stays theirs, and a workload that wants everything meets the OOM killer in its own
//! cgroup rather than starving the machine.

use std::{
    fs,
    time::{Duration, Instant},
};

use bulkhead_agent_api::Answer;

use super::{Server, control::Epoch};
use crate::{
    cgroup,
    error::{Result, conflict, internal},
    log,
};

/// How soon memory that is on its way is looked for again.
pub(super) const STEP: Duration = Duration::from_millis(4);

/// How long it may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// Calls that wait at a time.
const MAX_WAITING: usize = 16;

/// Bytes that the kernel and the agent may come to need besides what they have when the agent begins.
const SLACK: u64 = 8 << 20;

/// What the kernel needs of memory that is plugged to keep account of it: 64 bytes for each 4 KiB.
const ACCOUNT: u64 = 64;

/// How much memory there was in the beginning, and who waits for more.
pub(super) struct Growth {
    /// Bytes when the agent began.
    base: u64,
    /// Bytes of them that are not the containers'.
    own: u64,
    waiting: Vec<Waiting>,
}

/// A call that is to be answered.
struct Waiting {
    epoch: Epoch,
    call: u64,
    total: u64,
    deadline: Instant,
}

impl Growth {
    /// Looks at the memory that there is, and leaves the containers what the system does not need.
    pub(super) fn new() -> Self {
        let base = cgroup::total_memory();
        let available = fs::read_to_string("/proc/meminfo").ok().and_then(|text| available(&text));
        let own = base.saturating_sub(available.unwrap_or(base / 2)).saturating_add(SLACK);
        let growth = Self { base, own, waiting: Vec::new() };
        growth.share_out(base);
        growth
    }

    /// Memory may have come or gone.
    pub(super) fn look(&self) {
        self.share_out(cgroup::total_memory());
    }

    /// Whether somebody waits.
    pub(super) fn awaited(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Lets the containers have what there is.
    fn share_out(&self, total: u64) {
        let room = total.saturating_sub(self.own).saturating_sub(total.saturating_sub(self.base) / ACCOUNT);
        cgroup::set_room(room).unwrap_or_else(log::warn);
    }
}

impl Server {
    /// Begins to wait for memory; whether it is there already.
    pub(super) fn await_memory(&mut self, epoch: Epoch, call: u64, plugged_mib: u32) -> Result<bool> {
        let wanted = self.growth.base.saturating_add(u64::from(plugged_mib) << 20);
        let total = cgroup::total_memory();
        self.growth.share_out(total);
        if total >= wanted {
            return Ok(true);
        }
        if self.growth.waiting.len() >= MAX_WAITING {
            return Err(conflict("too many calls wait for memory"));
        }
        let deadline = Instant::now() + PATIENCE;
        self.growth.waiting.push(Waiting { epoch, call, total: wanted, deadline });
        Ok(false)
    }

    /// Answers those whose memory is there by now, or has not come in time.
    pub(super) fn look_at_memory(&mut self) {
        if self.growth.waiting.is_empty() {
            return;
        }
        let (total, now) = (cgroup::total_memory(), Instant::now());
        for waiting in std::mem::take(&mut self.growth.waiting) {
            let result = if total >= waiting.total {
                self.growth.share_out(total);
                Ok(Answer::Done)
            } else if now < waiting.deadline {
                self.growth.waiting.push(waiting);
                continue;
            } else {
                let missing = (waiting.total - total).div_ceil(1 << 20);
                Err(internal(format!("the machine's memory has not grown: {missing} MiB are missing")))
            };
            self.control.answer(waiting.epoch, waiting.call, result);
        }
    }
}

/// `MemAvailable` in `/proc/meminfo`, in bytes.
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn available_memory_is_found() {
        let text = "MemTotal:  100 kB\nMemFree: 7 kB\nMemAvailable:      42 kB\nBuffers: 0 kB\n";
        assert_eq!(available(text), Some(42 * 1024));
        for text in ["", "MemAvailable: x kB", "MemAvailable: 5"] {
            assert_eq!(available(text), None, "{text}");
        }
    }
}
