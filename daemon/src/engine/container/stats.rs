//! What a container uses, sample by sample.
//!
//! ```text
//!   agent ── its cgroup in the guest ──┐
//!   host ─── /proc/stat ───────────────┴─▶ sample ──▶ precpu of the next
//! ```
//! Processor time is the guest's own count: that of the container's processes and nothing else. It is set
//! against the host's, as clients do to tell percents of a host CPU.

use std::time::Duration;

use bulkhead_agent_api::{self as agent, Answer, Call};
use jiff::Timestamp;
use tokio::sync::mpsc;

use super::{View, workload::Workload};
use crate::{
    api::types::container::stats::{
        BlkioEntry, BlkioStats, CpuStats, CpuUsage, MemoryStats, NetworkStats, PidsStats, Stats,
        ThrottlingData,
    },
    engine::{Engine, Error, Name, Result},
    sandbox::CallError,
};

/// Between two samples, as Docker's collector has it.
const PERIOD: Duration = Duration::from_secs(1);

/// How long a guest may take for one.
const SAMPLE_WITHIN: Duration = Duration::from_secs(10);

/// How the stats of a container are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StatsMode {
    /// Sample after sample, until the container is removed or the client goes.
    Stream,
    /// One, after another that fills its `precpu_stats`.
    Pair,
    /// One at once.
    OneShot,
}

impl Engine {
    /// What a container uses. Samples of one that does not run are empty.
    ///
    /// # Errors
    /// No such container; without a stream, that its guest does not tell.
    pub async fn container_stats(&self, name: Name<'_>, mode: StatsMode) -> Result<mpsc::Receiver<Stats>> {
        let container = self.shared.registry.find(name)?;
        let (sender, receiver) = mpsc::channel(1);
        match mode {
            StatsMode::Stream => {
                let registry = std::sync::Arc::clone(&self.shared);
                tokio::spawn(async move {
                    let mut ticks = tokio::time::interval(PERIOD);
                    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
                    let mut before: Option<Stats> = None;
                    loop {
                        tokio::select! {
                            _ = ticks.tick() => {}
                            () = sender.closed() => return,
                        }
                        if registry.registry.find(container.id()).is_err() {
                            return;
                        }
                        let view = container.view();
                        // One that ends at this moment has nothing to tell, and no error.
                        let now = sample(&view).await.unwrap_or_else(|_| empty(&view));
                        let told =
                            before.as_ref().map_or_else(|| now.clone(), |before| now.clone().after(before));
                        before = Some(now);
                        if sender.send(told).await.is_err() {
                            return;
                        }
                    }
                });
            }
            StatsMode::OneShot => {
                // There is room for one.
                let _ = sender.try_send(sample(&container.view()).await?);
            }
            StatsMode::Pair => {
                let mut stats = sample(&container.view()).await?;
                if container.view().workload.is_some() {
                    tokio::time::sleep(PERIOD).await;
                    stats = sample(&container.view()).await?.after(&stats);
                }
                let _ = sender.try_send(stats);
            }
        }
        Ok(receiver)
    }
}

fn empty(view: &View) -> Stats {
    Stats::empty(&view.record.id, &view.record.name)
}

async fn sample(view: &View) -> Result<Stats> {
    let Some(workload) = &view.workload else { return Ok(empty(view)) };
    let used = match used(workload).await {
        Ok(used) => used,
        // It has just ended.
        Err(CallError::Gone) => return Ok(empty(view)),
        Err(error) => return Err(Error::internal(format!("the guest does not tell: {error}"))),
    };
    let host = tokio::task::spawn_blocking(|| std::fs::read_to_string("/proc/stat"));
    let host = HostCpus::parse(&host.await.map_err(|error| Error::internal(error.to_string()))??);
    Ok(render(empty(view), used, host, Timestamp::now()))
}

async fn used(workload: &Workload) -> Result<agent::Stats, CallError> {
    let call = workload.sandbox.call(Call::Stats { container: workload.init().container });
    match tokio::time::timeout(SAMPLE_WITHIN, call).await {
        Ok(Ok(Answer::Stats(stats))) => Ok(*stats),
        Ok(Ok(_)) => Err(CallError::Unexpected),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(CallError::Gone),
    }
}

fn render(empty: Stats, used: agent::Stats, host: HostCpus, now: Timestamp) -> Stats {
    let agent::Stats { cpu, memory, pids, pids_limit, io, networks } = used;
    let nanoseconds = |us: u64| us.saturating_mul(1000);
    let entry = |io: &agent::IoStats, op: &str, value| BlkioEntry {
        major: io.major.into(),
        minor: io.minor.into(),
        op: op.to_owned(),
        value,
    };
    let both = |of: fn(&agent::IoStats) -> (u64, u64)| {
        let entries = io.iter().flat_map(|io| {
            let (read, written) = of(io);
            [entry(io, "read", read), entry(io, "write", written)]
        });
        Some(entries.collect::<Vec<_>>()).filter(|entries| !entries.is_empty())
    };
    Stats {
        read: format!("{now:.9}"),
        pids_stats: PidsStats { current: pids, limit: pids_limit.unwrap_or(u64::MAX) },
        blkio_stats: BlkioStats {
            io_service_bytes_recursive: both(|io| (io.read_bytes, io.written_bytes)),
            io_serviced_recursive: both(|io| (io.reads, io.writes)),
            ..BlkioStats::default()
        },
        cpu_stats: CpuStats {
            cpu_usage: CpuUsage {
                total_usage: nanoseconds(cpu.usage_us),
                usage_in_kernelmode: nanoseconds(cpu.system_us),
                usage_in_usermode: nanoseconds(cpu.user_us),
            },
            system_cpu_usage: host.used_ns,
            online_cpus: host.online,
            throttling_data: ThrottlingData {
                periods: cpu.periods,
                throttled_periods: cpu.throttled_periods,
                throttled_time: nanoseconds(cpu.throttled_us),
            },
        },
        memory_stats: MemoryStats {
            usage: memory.usage,
            limit: memory.limit.map_or(memory.total, |limit| limit.min(memory.total)),
            failcnt: memory.limit_hits,
            stats: memory.stat.into_iter().collect(),
        },
        networks: networks.into_iter().map(|(name, network)| (name, interface(network))).collect(),
        ..empty
    }
}

fn interface(network: agent::NetworkStats) -> NetworkStats {
    let agent::NetworkStats {
        rx_bytes,
        rx_packets,
        rx_errors,
        rx_dropped,
        tx_bytes,
        tx_packets,
        tx_errors,
        tx_dropped,
    } = network;
    NetworkStats { rx_bytes, rx_packets, rx_errors, rx_dropped, tx_bytes, tx_packets, tx_errors, tx_dropped }
}

/// The host's processors, by `/proc/stat`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct HostCpus {
    /// Time of all of them since the host's start, idle or not.
    used_ns: u64,
    online: u32,
}

impl HostCpus {
    fn parse(stat: &str) -> Self {
        /// Nanoseconds of a clock tick (`USER_HZ`, the same on every Linux of this architecture).
        const TICK: u64 = 10_000_000;
        let mut this = Self::default();
        for line in stat.lines().take_while(|line| line.starts_with("cpu")) {
            let (name, columns) = line.split_once(' ').unwrap_or((line, ""));
            if name == "cpu" {
                // What follows the eighth, guests' time, is part of the first.
                let ticks = columns.split_whitespace().take(8).filter_map(|word| word.parse::<u64>().ok());
                this.used_ns = ticks.fold(0u64, u64::saturating_add).saturating_mul(TICK);
            } else {
                this.online += 1;
            }
        }
        this
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROC_STAT: &str =
        "cpu  10 20 30 40 50 60 70 80 1000 1000\ncpu0 1 1 1 1\ncpu1 1 1 1 1\nintr 5\ncpufreq 7\n";

    fn used() -> agent::Stats {
        agent::Stats {
            cpu: agent::CpuStats { usage_us: 5, user_us: 3, system_us: 2, ..agent::CpuStats::default() },
            memory: agent::MemoryStats {
                usage: 4096,
                total: 1 << 20,
                stat: vec![("inactive_file".into(), 96)],
                ..agent::MemoryStats::default()
            },
            pids: 2,
            io: vec![agent::IoStats {
                major: 254,
                read_bytes: 7,
                written_bytes: 8,
                ..agent::IoStats::default()
            }],
            ..agent::Stats::default()
        }
    }

    #[test]
    fn the_hosts_time_is_all_but_the_guests_counted_twice() {
        assert_eq!(HostCpus::parse(PROC_STAT), HostCpus { used_ns: 3_600_000_000, online: 2 });
        assert_eq!(HostCpus::parse(""), HostCpus::default());
    }

    #[test]
    fn a_sample_has_the_form_that_clients_know() {
        let now = "2026-01-02T03:04:05.6Z".parse().unwrap();
        let stats = render(Stats::empty("ab", "web"), used(), HostCpus::parse(PROC_STAT), now);
        let after = stats.clone().after(&stats);
        insta::assert_snapshot!(serde_json::to_string_pretty(&after).unwrap());
    }

    #[test]
    fn nothing_runs_nothing_is_used() {
        insta::assert_snapshot!(serde_json::to_string(&Stats::empty("ab", "web")).unwrap());
    }

    #[test]
    fn a_limit_beyond_the_guests_memory_is_the_guests_memory() {
        let limited = |limit| {
            let mut used = used();
            used.memory.limit = limit;
            let empty = Stats::empty("ab", "web");
            render(empty, used, HostCpus::default(), Timestamp::UNIX_EPOCH).memory_stats.limit
        };
        assert_eq!((limited(None), limited(Some(8192)), limited(Some(1 << 40))), (1 << 20, 8192, 1 << 20));
    }
}
