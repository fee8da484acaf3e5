//! What a container uses, from its cgroup's files and its network namespace.

use std::{fs, path::Path};

use bulkhead_agent_api::{CpuStats, IoStats, MemoryStats, NetworkStats, Stats};
use nix::unistd::{SysconfVar, sysconf};

use super::{Cgroup, counter, memory::total_memory};

/// Bounds of what is told, whatever the kernel lists.
const MAX_LINES: usize = 128;

impl Cgroup {
    /// What it uses now. `init` is the pid of a process whose network namespace is the container's. What cannot
    /// be read is zero.
    pub fn stats(&self, init: Option<i32>) -> Stats {
        let read = |file: &str| fs::read_to_string(self.path.join(file)).unwrap_or_default();
        let network =
            init.and_then(|pid| fs::read_to_string(Path::new("/proc").join(format!("{pid}/net/dev"))).ok());
        Stats {
            cpu: cpu(&read("cpu.stat")),
            memory: MemoryStats {
                usage: number(&read("memory.current")),
                limit: limit(&read("memory.max")),
                total: total_memory(),
                limit_hits: counter(&read("memory.events"), "oom"),
                stat: pairs(&read("memory.stat")),
            },
            pids: number(&read("pids.current")),
            pids_limit: limit(&read("pids.max")),
            io: read("io.stat").lines().filter_map(io).take(MAX_LINES).collect(),
            networks: network.map_or_else(Vec::new, |text| networks(&text)),
        }
    }
}

fn number(text: &str) -> u64 {
    text.trim().parse().unwrap_or(0)
}

/// None for `max`.
fn limit(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

fn pairs(text: &str) -> Vec<(String, u64)> {
    let pair = |line: &str| {
        let (name, value) = line.split_once(' ')?;
        Some((name.to_owned(), value.trim().parse().ok()?))
    };
    text.lines().filter_map(pair).take(MAX_LINES).collect()
}

fn cpu(stat: &str) -> CpuStats {
    CpuStats {
        usage_us: counter(stat, "usage_usec"),
        user_us: counter(stat, "user_usec"),
        system_us: counter(stat, "system_usec"),
        periods: counter(stat, "nr_periods"),
        throttled_periods: counter(stat, "nr_throttled"),
        throttled_us: counter(stat, "throttled_usec"),
        online: sysconf(SysconfVar::_NPROCESSORS_ONLN)
            .ok()
            .flatten()
            .and_then(|count| u32::try_from(count).ok())
            .unwrap_or(1),
    }
}

/// A line of `io.stat`: `254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6`.
fn io(line: &str) -> Option<IoStats> {
    let (device, rest) = line.split_once(' ')?;
    let (major, minor) = device.split_once(':')?;
    let mut stats = IoStats { major: major.parse().ok()?, minor: minor.parse().ok()?, ..IoStats::default() };
    for (name, value) in rest.split_whitespace().filter_map(|word| word.split_once('=')) {
        let slot = match name {
            "rbytes" => &mut stats.read_bytes,
            "wbytes" => &mut stats.written_bytes,
            "dbytes" => &mut stats.discarded_bytes,
            "rios" => &mut stats.reads,
            "wios" => &mut stats.writes,
            "dios" => &mut stats.discards,
            _ => continue,
        };
        *slot = value.parse().unwrap_or(0);
    }
    Some(stats)
}

/// `/proc/<pid>/net/dev`: two lines of headings, then `name: ` and eight columns each way.
fn networks(text: &str) -> Vec<(String, NetworkStats)> {
    let interface = |line: &str| {
        let (name, columns) = line.split_once(':')?;
        let columns: Vec<u64> = columns.split_whitespace().map(|word| word.parse().unwrap_or(0)).collect();
        let [
            rx_bytes,
            rx_packets,
            rx_errors,
            rx_dropped,
            _,
            _,
            _,
            _,
            tx_bytes,
            tx_packets,
            tx_errors,
            tx_dropped,
            ..,
        ] = columns[..]
        else {
            return None;
        };
        let stats = NetworkStats {
            rx_bytes,
            rx_packets,
            rx_errors,
            rx_dropped,
            tx_bytes,
            tx_packets,
            tx_errors,
            tx_dropped,
        };
        Some((name.trim().to_owned(), stats))
    };
    text.lines().skip(2).filter_map(interface).filter(|(name, _)| name != "lo").take(MAX_LINES).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_io_has_a_device_and_counters() {
        let stats = io("254:0 rbytes=10 wbytes=20 rios=3 wios=4 dbytes=5 dios=6 new=7").unwrap();
        let expected = IoStats {
            major: 254,
            minor: 0,
            read_bytes: 10,
            written_bytes: 20,
            discarded_bytes: 5,
            reads: 3,
            writes: 4,
            discards: 6,
        };
        assert_eq!(stats, expected);
        assert_eq!(io("254:0 rbytes=x").unwrap().read_bytes, 0);
        assert!(io("garbage").is_none() && io("a:b c=d").is_none());
    }

    #[test]
    fn interfaces_are_told_but_the_loopback() {
        let text = "Inter-|   Receive                                                |  Transmit\n face |bytes    \
                    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls \
                    carrier compressed\n    lo:  10 1 0 0 0 0 0 0 10 1 0 0 0 0 0 0\n  eth0:100 2 3 4 0 0 0 0 200 \
                    5 6 7 0 0 0 0\n short: 1 2\n";
        let found = networks(text);
        let expected = NetworkStats {
            rx_bytes: 100,
            rx_packets: 2,
            rx_errors: 3,
            rx_dropped: 4,
            tx_bytes: 200,
            tx_packets: 5,
            tx_errors: 6,
            tx_dropped: 7,
        };
        assert_eq!(found, [("eth0".to_owned(), expected)]);
    }

    #[test]
    fn no_limit_is_none() {
        assert_eq!((limit("max\n"), limit("4096\n"), number("x")), (None, Some(4096), 0));
    }

    #[test]
    fn processor_time_is_read_by_name() {
        let stats = cpu(
            "usage_usec 30\nuser_usec 10\nsystem_usec 20\nnr_periods 5\nnr_throttled 2\nthrottled_usec 9\n",
        );
        assert_eq!((stats.usage_us, stats.user_us, stats.system_us), (30, 10, 20));
        assert_eq!((stats.periods, stats.throttled_periods, stats.throttled_us), (5, 2, 9));
        assert!(stats.online > 0 && total_memory() > 0);
    }
}
