//! `docker update`: what a container's host config is afterwards. Pure.
//!
//! As in Docker, what is zero, empty or null in the request stays as it was.

use crate::{
    api::types::container::HostConfig,
    engine::{Error, Result},
};

/// The host config with the request's changes.
///
/// # Errors
/// Conflict: a change that does not fit what is set already, in dockerd's words.
pub(crate) fn merge(host: &HostConfig, request: &HostConfig) -> Result<HostConfig> {
    let conflict = |text: &str| Err(Error::conflict(text));
    for (wanted, has, text) in [
        (
            request.nano_cpus,
            host.cpu_period,
            "Nano CPUs cannot be updated as CPU Period has already been set",
        ),
        (request.nano_cpus, host.cpu_quota, "Nano CPUs cannot be updated as CPU Quota has already been set"),
        (request.cpu_period, host.nano_cpus, "CPU Period cannot be updated as NanoCPUs has already been set"),
        (request.cpu_quota, host.nano_cpus, "CPU Quota cannot be updated as NanoCPUs has already been set"),
    ] {
        if wanted > 0 && has > 0 {
            return conflict(&format!("Conflicting options: {text}"));
        }
    }
    if request.memory != 0
        && request.memory > host.memory_swap
        && request.memory_swap == 0
        && host.memory_swap > 0
    {
        return conflict(
            "Memory limit should be smaller than already set memoryswap limit, update the memoryswap at the same time",
        );
    }
    let mut next = host.clone();
    let number = |own: &mut i64, new: i64| *own = if new == 0 { *own } else { new };
    number(&mut next.cpu_shares, request.cpu_shares);
    number(&mut next.nano_cpus, request.nano_cpus);
    number(&mut next.cpu_period, request.cpu_period);
    number(&mut next.cpu_quota, request.cpu_quota);
    number(&mut next.memory, request.memory);
    number(&mut next.memory_swap, request.memory_swap);
    number(&mut next.memory_reservation, request.memory_reservation);
    if request.memory != 0 && next.memory_swap == 0 {
        // As at its creation: without a word, as much swap as memory.
        next.memory_swap = next.memory.saturating_mul(2);
    }
    for (own, new) in
        [(&mut next.cpuset_cpus, &request.cpuset_cpus), (&mut next.cpuset_mems, &request.cpuset_mems)]
    {
        if !new.is_empty() {
            own.clone_from(new);
        }
    }
    if request.blkio_weight != 0 {
        next.blkio_weight = request.blkio_weight;
    }
    for (own, new) in [
        (&mut next.blkio_device_read_bps, &request.blkio_device_read_bps),
        (&mut next.blkio_device_write_bps, &request.blkio_device_write_bps),
        (&mut next.blkio_device_read_iops, &request.blkio_device_read_iops),
        (&mut next.blkio_device_write_iops, &request.blkio_device_write_iops),
    ] {
        if new.is_some() {
            own.clone_from(new);
        }
    }
    if let Some(limit) = request.pids_limit {
        next.pids_limit = Some(limit.max(-1));
    }
    if !request.restart_policy.name.is_empty() {
        if host.auto_remove && request.restart_policy.name != "no" {
            return conflict(
                "Restart policy cannot be updated because AutoRemove is enabled for the container",
            );
        }
        next.restart_policy.clone_from(&request.restart_policy);
    }
    // What holds of each alone need not hold of both.
    if next.memory > 0 && next.memory_swap > 0 && next.memory_swap < next.memory {
        return conflict("Minimum memoryswap limit should be larger than memory limit, see usage");
    }
    if next.memory > 0 && next.memory_reservation > next.memory {
        return conflict("Minimum memory limit can not be less than memory reservation limit, see usage");
    }
    if next.memory == 0 && next.memory_swap > 0 {
        return conflict("You should always set the Memory limit when using Memoryswap limit, see usage");
    }
    Ok(next)
}

/// What a container that runs on `has` vCPUs is told when it may now use more.
pub(crate) fn vcpus_warning(has: u8, wanted: u8) -> Option<String> {
    (wanted > has).then(|| {
        format!(
            "The container runs on {has} vCPU{}: it can use no more of its new limit until it is started again.",
            if has == 1 { "" } else { "s" }
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::types::container::{RestartPolicy, ThrottleDevice};

    fn of(change: impl FnOnce(&mut HostConfig)) -> HostConfig {
        let mut host = HostConfig::default();
        change(&mut host);
        host
    }

    #[test]
    fn what_is_not_said_stays() {
        let host = of(|host| {
            (host.memory, host.memory_swap, host.cpu_shares) = (64 << 20, 128 << 20, 512);
            host.cpuset_cpus = "0".into();
            host.pids_limit = Some(5);
            host.privileged = true;
        });
        assert_eq!(merge(&host, &HostConfig::default()).unwrap(), host);
    }

    #[test]
    fn everything_that_docker_updates_is_updated() {
        let request = of(|host| {
            (host.cpu_shares, host.cpu_period, host.cpu_quota) = (1, 2, 3);
            (host.memory, host.memory_swap, host.memory_reservation) = (64 << 20, -1, 32 << 20);
            (host.cpuset_cpus, host.cpuset_mems) = ("0".into(), "1".into());
            host.blkio_weight = 10;
            host.blkio_device_read_bps = Some(vec![ThrottleDevice { path: "/dev/vda".into(), rate: 1 }]);
            host.pids_limit = Some(7);
            host.restart_policy = RestartPolicy { name: "always".into(), maximum_retry_count: 0 };
        });
        assert_eq!(merge(&HostConfig::default(), &request).unwrap(), request);
        // And nothing else is.
        let other = of(|host| (host.privileged, host.network_mode) = (true, "host".into()));
        assert_eq!(merge(&HostConfig::default(), &other).unwrap(), HostConfig::default());
    }

    #[test]
    fn conflicts_are_dockers() {
        type Change = fn(&mut HostConfig);
        let cases: [(Change, Change, &str); 7] = [
            (
                |h| h.cpu_quota = 5000,
                |r| r.nano_cpus = 1,
                "Conflicting options: Nano CPUs cannot be updated as CPU Quota",
            ),
            (
                |h| h.cpu_period = 5000,
                |r| r.nano_cpus = 1,
                "Conflicting options: Nano CPUs cannot be updated as CPU Period",
            ),
            (|h| h.nano_cpus = 1, |r| r.cpu_quota = 5000, "Conflicting options: CPU Quota cannot be updated"),
            (
                |h| h.nano_cpus = 1,
                |r| r.cpu_period = 5000,
                "Conflicting options: CPU Period cannot be updated",
            ),
            (
                |h| (h.memory, h.memory_swap) = (1 << 26, 1 << 27),
                |r| r.memory = 1 << 28,
                "Memory limit should be smaller than",
            ),
            (
                |h| h.auto_remove = true,
                |r| r.restart_policy.name = "always".into(),
                "Restart policy cannot be updated because AutoRemove",
            ),
            (
                |h| (h.memory, h.memory_swap, h.memory_reservation) = (1 << 28, -1, 1 << 27),
                |r| r.memory = 1 << 26,
                "Minimum memory limit can not be less than memory reservation",
            ),
        ];
        for (has, wants, words) in cases {
            let error = merge(&of(has), &of(wants)).unwrap_err();
            assert!(error.message.starts_with(words), "{words}: {}", error.message);
        }
    }

    #[test]
    fn a_first_limit_of_memory_brings_its_swap() {
        assert_eq!(merge(&HostConfig::default(), &of(|r| r.memory = 1 << 26)).unwrap().memory_swap, 1 << 27);
    }

    #[test]
    fn no_limit_on_processes_is_minus_one() {
        for (asked, expected) in [(-1, -1), (0, 0), (-5, -1), (3, 3)] {
            let next = merge(&HostConfig::default(), &of(|r| r.pids_limit = Some(asked))).unwrap();
            assert_eq!(next.pids_limit, Some(expected));
        }
    }

    #[test]
    fn more_cpus_than_vcpus_are_told() {
        assert_eq!(vcpus_warning(2, 2), None);
        assert!(vcpus_warning(1, 4).unwrap().contains("on 1 vCPU:"));
    }
}
