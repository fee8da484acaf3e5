//! Guests give up page cache when the host runs short of memory.
//!
//! ```text
//!   every 2 s: is less than so many percent of the host's memory available?
//!      no  ─▶ nothing
//!      yes ─▶ each running container is asked for a tenth of its page cache, 64 MiB at most
//!                guest: memory.reclaim ─▶ free pages ─▶ reported by the balloon ─▶ the host's again
//! ```
//!
//! A guest's page cache is memory to the host, which cannot tell it from what a workload holds; so the guest
//! has to be asked. Only cache is taken, never what would have to be written to a swap: a workload reads
//! again what it still needs, at worst. Nothing is ever handed back by a rule, so nothing swings: a cache
//! grows again by being used, and is asked for again only as long as the host is short. A round is over before
//! the next begins, and a guest that does not answer is passed over.

use std::{
    pin::pin,
    sync::{Arc, Weak},
    time::Duration,
};

use bulkhead_agent_api::{Answer, Call};
use futures_util::{StreamExt, stream};
use tokio::time::MissedTickBehavior;

use super::{Shared, container::workload::Workload};

/// How often the host is looked at.
const PERIOD: Duration = Duration::from_secs(2);

/// Which part of its page cache a container is asked for in a round.
const PERCENT: u8 = 10;

/// How many guests are asked at a time.
const AT_ONCE: usize = 8;

/// How long a guest may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Watches until the engine is gone. `below` percent of the host's memory available is too little; 0: never.
pub(super) async fn watch(shared: Weak<Shared>, below: u8) {
    if below == 0 {
        return;
    }
    let mut ticks = tokio::time::interval(PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Some(shared) = shared.upgrade() else { return };
        let short = std::fs::read_to_string("/proc/meminfo").is_ok_and(|text| is_short(&text, below));
        if short {
            reclaim(&shared).await;
        }
    }
}

/// Asks every running container.
async fn reclaim(shared: &Shared) {
    let running: Vec<(String, Arc<Workload>)> = shared
        .registry
        .all()
        .iter()
        .filter_map(|container| Some((container.id().to_owned(), container.view().workload?)))
        .collect();
    let asked = stream::iter(running).map(|(id, workload)| async move {
        let call = workload.sandbox.call(Call::Reclaim { container: id.clone(), percent: PERCENT });
        match tokio::time::timeout(PATIENCE, call).await {
            Ok(Ok(Answer::Reclaimed { bytes })) => bytes,
            other => {
                tracing::debug!(container = id, ?other, "a guest gives up no page cache");
                0
            }
        }
    });
    let mut asked = pin!(asked.buffer_unordered(AT_ONCE));
    let mut given = 0u64;
    while let Some(bytes) = asked.next().await {
        given = given.saturating_add(bytes);
    }
    tracing::debug!(bytes = given, "the host is short of memory: page cache was given up");
}

/// Whether `/proc/meminfo` says that less than `below` percent are available.
fn is_short(meminfo: &str, below: u8) -> bool {
    let field = |name: &str| -> Option<u64> {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().strip_suffix(" kB")?.parse().ok()
    };
    match (field("MemTotal:"), field("MemAvailable:")) {
        (Some(total), Some(available)) => available < total / 100 * u64::from(below),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_short_below_its_part() {
        let text =
            |available: u64| format!("MemTotal:  1000 kB\nMemFree: 1 kB\nMemAvailable: {available} kB\n");
        assert!(is_short(&text(99), 10));
        assert!(!is_short(&text(100), 10));
        assert!(is_short(&text(980), 99));
        assert!(!is_short("", 10));
        assert!(!is_short("MemTotal: 5 kB\nMemAvailable: x", 10));
    }
}
