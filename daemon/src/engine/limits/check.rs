//! Which limits are refused, in dockerd's words, and which are told to be without effect.

use std::path::Path;

use super::{
    cpuset::{Host, Set},
    rates,
};
use crate::{
    api::types::container::{Config, HostConfig},
    engine::{Error, Result},
};

/// Checks the limits of a creation, or those that an update changes. Answers the warnings.
///
/// # Errors
/// Invalid.
pub(crate) fn check(
    config: &Config,
    host: &HostConfig,
    data_root: &Path,
    update: bool,
) -> Result<Vec<String>> {
    check_memory(host, update)?;
    check_cpu(host, Host::this())?;
    rates::check(config, host)?;
    let mut warnings = rates::warnings(host, data_root);
    if host.blkio_weight != 0 && !(10..=1000).contains(&host.blkio_weight) {
        return Err(Error::invalid("Range of blkio weight is from 10 to 1000"));
    }
    if host.blkio_weight != 0 {
        warnings.push(
            "Block I/O weights are not supported: a container's disk is a file on the host. Weight discarded.".into(),
        );
    }
    if host.blkio_weight_device.as_ref().is_some_and(|list| !list.is_empty()) {
        warnings.push("Block I/O weights are not supported. Weight-device discarded.".into());
    }
    if host.io_maximum_iops != 0 || host.io_maximum_bandwidth != 0 {
        return Err(Error::invalid(
            "Invalid QoS settings: linux does not support Maximum IO Bandwidth or Maximum IO IOps",
        ));
    }
    Ok(warnings)
}

fn check_memory(host: &HostConfig, update: bool) -> Result<()> {
    const LEAST: i64 = 6 << 20;
    let refuse = |text: &str| Err(Error::invalid(text));
    if host.memory != 0 && host.memory < LEAST {
        return refuse("Minimum memory limit allowed is 6MB");
    }
    if host.memory > 0 && host.memory_swap > 0 && host.memory_swap < host.memory {
        return refuse("Minimum memoryswap limit should be larger than memory limit, see usage");
    }
    if host.memory == 0 && host.memory_swap > 0 && !update {
        return refuse("You should always set the Memory limit when using Memoryswap limit, see usage");
    }
    if host.memory_reservation < 0 || (host.memory_reservation > 0 && host.memory_reservation < LEAST) {
        return refuse("Minimum memory reservation allowed is 6MB");
    }
    if host.memory > 0 && host.memory < host.memory_reservation {
        return refuse("Minimum memory limit can not be less than memory reservation limit, see usage");
    }
    if let Some(value) = host.memory_swappiness.filter(|value| !(-1..=100).contains(value)) {
        return Err(Error::invalid(format!(
            "Invalid value: {value}, valid memory swappiness range is 0-100"
        )));
    }
    Ok(())
}

fn check_cpu(host: &HostConfig, available: &Host) -> Result<()> {
    let refuse = |text: &str| Err(Error::invalid(text));
    if host.nano_cpus > 0 && host.cpu_period > 0 {
        return refuse("Conflicting options: Nano CPUs and CPU Period cannot both be set");
    }
    if host.nano_cpus > 0 && host.cpu_quota > 0 {
        return refuse("Conflicting options: Nano CPUs and CPU Quota cannot both be set");
    }
    let count = available.count();
    if host.nano_cpus != 0 && !(10_000_000..=i64::from(count) * 1_000_000_000).contains(&host.nano_cpus) {
        return Err(Error::invalid(format!(
            "range of CPUs is from 0.01 to {count}.00, as there are only {count} CPUs available"
        )));
    }
    if host.cpu_period != 0 && !(1000..=1_000_000).contains(&host.cpu_period) {
        return refuse(
            "CPU cfs period can not be less than 1ms (i.e. 1000) or larger than 1s (i.e. 1000000)",
        );
    }
    if host.cpu_quota > 0 && host.cpu_quota < 1000 {
        return refuse("CPU cfs quota can not be less than 1ms (i.e. 1000)");
    }
    if host.cpu_shares < 0 {
        return refuse("invalid CPU shares (must be a non-negative number)");
    }
    if host.cpu_realtime_period != 0 || host.cpu_realtime_runtime != 0 {
        return refuse("real-time CPU limits are not there with cgroup version 2");
    }
    if host.cpu_count != 0 || host.cpu_percent != 0 {
        return refuse("Invalid option: CpuCount and CpuPercent are Windows options");
    }
    for (name, what, wanted, available) in [
        ("cpus", "CPUs", &host.cpuset_cpus, &available.cpus),
        ("mems", "memory nodes", &host.cpuset_mems, &available.mems),
    ] {
        let set = Set::parse(wanted)
            .map_err(|error| Error::invalid(format!("Invalid value {wanted} for cpuset {name}: {error}")))?;
        if !set.within(&Set::parse(available).unwrap_or_default()) {
            return Err(Error::invalid(format!(
                "Requested {what} are not available - requested {wanted}, available: {available}"
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_dockers() {
        let host = Host { cpus: "0-3".into(), mems: "0".into() };
        type Change = fn(&mut HostConfig);
        let cases: [(Change, &str); 12] = [
            (|h| h.memory = 1, "Minimum memory limit allowed is 6MB"),
            (|h| h.memory_swap = 1 << 30, "You should always set the Memory limit"),
            (
                |h| (h.memory, h.memory_swap) = (64 << 20, 32 << 20),
                "Minimum memoryswap limit should be larger than memory limit",
            ),
            (|h| h.memory_reservation = 1, "Minimum memory reservation allowed is 6MB"),
            (|h| h.memory_swappiness = Some(101), "Invalid value: 101, valid memory swappiness range"),
            (|h| h.nano_cpus = 4_000_000_001, "range of CPUs is from 0.01 to 4.00, as there are only 4 CPUs"),
            (
                |h| (h.nano_cpus, h.cpu_period) = (1 << 30, 5000),
                "Conflicting options: Nano CPUs and CPU Period",
            ),
            (
                |h| (h.nano_cpus, h.cpu_quota) = (1 << 30, 5000),
                "Conflicting options: Nano CPUs and CPU Quota",
            ),
            (|h| h.cpu_period = 1, "CPU cfs period can not be less than 1ms"),
            (|h| h.cpuset_cpus = "3-x".into(), "Invalid value 3-x for cpuset cpus: invalid format: 3-x"),
            (
                |h| h.cpuset_cpus = "0-4".into(),
                "Requested CPUs are not available - requested 0-4, available: 0-3",
            ),
            (
                |h| h.cpuset_mems = "1".into(),
                "Requested memory nodes are not available - requested 1, available: 0",
            ),
        ];
        for (change, words) in cases {
            let mut limits = HostConfig::default();
            change(&mut limits);
            let error = check_memory(&limits, false).and_then(|()| check_cpu(&limits, &host)).unwrap_err();
            assert!(error.message.starts_with(words), "{words}: {}", error.message);
        }
        let swap = HostConfig { memory_swap: 1 << 30, ..HostConfig::default() };
        check_memory(&swap, true).unwrap();
    }

    #[test]
    fn weights_are_told_to_be_without_effect() {
        let config = Config::default();
        let of = |blkio_weight| {
            let host = HostConfig { blkio_weight, ..HostConfig::default() };
            check(&config, &host, Path::new("/"), false)
        };
        assert_eq!((of(0).unwrap().len(), of(500).unwrap().len()), (0, 1));
        assert!(of(9).unwrap_err().message.starts_with("Range of blkio weight"));
    }
}
