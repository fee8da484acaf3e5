//! CPUs: how many a microVM has, and what its VMM gets of the host's.
//!
//! A container without a word about CPUs has the daemon's default number of vCPUs. With `--cpus` or a quota it
//! has as many as that needs, with `--cpuset-cpus` as many as there are in the set, with both the fewer. The
//! number is rounded up to a power of two, so that few shapes of microVM are in use, and is never above the
//! host's: the quota is what limits, not the number.

use super::cpuset::{Host, Set};
use crate::{api::types::container::HostConfig, sandbox::HostLimits};

/// What a period is when nobody says, in microseconds.
const PERIOD: u64 = 100_000;

/// vCPUs beyond this a VMM does not have.
const MAX_VCPUS: u32 = 64;

/// The container's quota and period, in microseconds; None without a limit.
fn quota(host: &HostConfig) -> Option<(u64, u64)> {
    let positive = |value: i64| u64::try_from(value).ok().filter(|value| *value > 0);
    if let Some(nano) = positive(host.nano_cpus) {
        return Some((nano.saturating_mul(PERIOD) / 1_000_000_000, PERIOD));
    }
    Some((positive(host.cpu_quota)?, positive(host.cpu_period).unwrap_or(PERIOD)))
}

/// The number of vCPUs.
pub(crate) fn vcpus(host: &HostConfig, default: u8) -> u8 {
    vcpus_of(host, default, Host::this().count())
}

fn vcpus_of(host: &HostConfig, default: u8, available: u32) -> u8 {
    let by_quota = quota(host).map(|(quota, period)| quota.div_ceil(period));
    let set = Set::parse(&host.cpuset_cpus).unwrap_or_default();
    let by_set = Some(u64::from(set.len())).filter(|count| *count > 0);
    let Some(wanted) = [by_quota, by_set].into_iter().flatten().min() else { return default };
    let wanted = u32::try_from(wanted).unwrap_or(MAX_VCPUS).clamp(1, MAX_VCPUS).next_power_of_two();
    u8::try_from(wanted.min(available).max(1)).unwrap_or(1)
}

/// What the VMM gets of the host's CPUs; memory is not in it.
///
/// The quota is a tenth of a CPU more than the container's: for the guest's kernel, the agent and the VMM's
/// devices. So it is the guest that holds the workload back, where that is gentle, and the host's quota is what a
/// guest that does not cannot pass.
pub(crate) fn host_limits(host: &HostConfig) -> HostLimits {
    let list = |text: &String| Some(text.clone()).filter(|text| !text.is_empty());
    let shares = u64::try_from(host.cpu_shares).ok().filter(|shares| *shares > 0);
    HostLimits {
        cpu_quota: quota(host).map(|(quota, period)| (quota.saturating_add(period / 10), period)),
        cpu_weight: shares.map(weight),
        cpuset: list(&host.cpuset_cpus),
        mems: list(&host.cpuset_mems),
        ..HostLimits::default()
    }
}

/// Shares (2 to 262,144, 1,024 being everybody's) as a weight (1 to 10,000, 100 being everybody's). On a
/// logarithmic curve through all three, as newer runtimes have it: a straight line would make everybody's shares
/// 39, less than those who say nothing.
fn weight(shares: u64) -> u64 {
    let log = (shares.clamp(2, 262_144) as f64).log2();
    let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
    (10f64.powf(exponent).round() as u64).clamp(1, 10_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(change: impl FnOnce(&mut HostConfig)) -> HostConfig {
        let mut host = HostConfig::default();
        change(&mut host);
        host
    }

    #[test]
    fn vcpus_are_as_many_as_the_limit_needs() {
        let of = |nano_cpus, cpuset: &str| {
            let host = host(|host| (host.nano_cpus, host.cpuset_cpus) = (nano_cpus, cpuset.to_owned()));
            vcpus_of(&host, 9, 6)
        };
        assert_eq!(of(0, ""), 9, "the default is the administrator's word");
        for (nano, expected) in [(10_000_000, 1), (1_000_000_000, 1), (1_500_000_000, 2), (3_000_000_000, 4)]
        {
            assert_eq!(of(nano, ""), expected, "{nano}");
        }
        assert_eq!((of(5_000_000_000, ""), of(i64::MAX, "")), (6, 6), "no more than the host has");
        assert_eq!((of(0, "1"), of(0, "0-2"), of(0, "0-5")), (1, 4, 6));
        assert_eq!((of(4_000_000_000, "0-1"), of(500_000_000, "0-3")), (2, 1), "the fewer of both");
    }

    #[test]
    fn a_quota_has_its_own_period() {
        let quota = |cpu_quota, cpu_period| {
            vcpus_of(&host(|host| (host.cpu_quota, host.cpu_period) = (cpu_quota, cpu_period)), 1, 64)
        };
        assert_eq!((quota(250_000, 0), quota(250_000, 1_000_000), quota(-1, 0)), (4, 1, 1));
    }

    #[test]
    fn the_hosts_quota_is_a_little_more_than_the_guests() {
        let limits = host_limits(&host(|host| host.nano_cpus = 500_000_000));
        assert_eq!(limits.cpu_quota, Some((60_000, 100_000)));
        let limits = host_limits(&host(|host| (host.cpu_quota, host.cpu_period) = (20_000, 10_000)));
        assert_eq!(limits.cpu_quota, Some((21_000, 10_000)));
        assert_eq!(host_limits(&host(|host| host.cpu_quota = -1)), HostLimits::default());
    }

    #[test]
    fn shares_are_a_weight_in_which_the_usual_is_the_usual() {
        for (shares, expected) in [(1, 1), (2, 1), (512, 58), (1024, 100), (2048, 173), (262_144, 10_000)] {
            assert_eq!(weight(shares), expected, "{shares}");
        }
        assert!((2..262_144).step_by(97).map(weight).is_sorted());
        assert_eq!(host_limits(&host(|host| host.cpu_shares = 1024)).cpu_weight, Some(100));
    }

    #[test]
    fn sets_are_passed_on() {
        let limits =
            host_limits(&host(|host| (host.cpuset_cpus, host.cpuset_mems) = ("0-1".into(), "0".into())));
        assert_eq!((limits.cpuset.as_deref(), limits.mems.as_deref()), (Some("0-1"), Some("0")));
    }
}
