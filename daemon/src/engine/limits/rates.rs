//! Rates of a container's disk and network: `--device-read-bps` and its kin, and labels.
//!
//! Docker's flags name a device of the host. Here a container's writable layer is a disk of its own, which the
//! guest sees as `/dev/vda` and which is a file below the daemon's data root. So the flags mean that disk when
//! they name `/dev/vda`, or the host's device that the data root lies on (or the disk of which that is a
//! partition). Any other device of the host is one that the container never uses: create says so. Image layers
//! are read from the host's page cache and are not limited.
//!
//! For the network there are no such flags; labels of the container say it: [`NET_LABELS`].

use std::{
    fs, io,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
};

use crate::{
    api::types::container::{Config, HostConfig, ThrottleDevice},
    engine::{Error, Result},
    sandbox::{
        Rates,
        vocabulary::{Bucket, RateLimit, RateLimits},
    },
    units,
};

/// The container's disk as the guest sees it.
const DISK: &str = "/dev/vda";

/// The labels that limit a container's network: bytes and frames a second, received and sent.
const NET_LABELS: [&str; 4] =
    ["bulkhead.net.rx-bps", "bulkhead.net.tx-bps", "bulkhead.net.rx-pps", "bulkhead.net.tx-pps"];

/// How much a bucket holds: what flows into it in a tenth of a second.
const BURST_PARTS: u64 = 10;

fn bucket(per_second: u64) -> Option<Bucket> {
    (per_second > 0).then(|| Bucket { per_second, burst: (per_second / BURST_PARTS).max(1) })
}

/// The lists of a host config, each with the flag's name.
fn lists(host: &HostConfig) -> [(&'static str, &Option<Vec<ThrottleDevice>>); 4] {
    [
        ("device-read-bps", &host.blkio_device_read_bps),
        ("device-write-bps", &host.blkio_device_write_bps),
        ("device-read-iops", &host.blkio_device_read_iops),
        ("device-write-iops", &host.blkio_device_write_iops),
    ]
}

/// The rates that a container has. What [`check`] did not refuse and is no rate of its own is left out.
pub(crate) fn rates(config: &Config, host: &HostConfig, data_root: &Path) -> Rates {
    let of_disk = |list: &Option<Vec<ThrottleDevice>>| {
        let mine = list.iter().flatten().filter(|device| is_disk(&device.path, data_root));
        // The strictest, where it is limited twice; 0 is no limit.
        mine.map(|device| device.rate).filter(|rate| *rate > 0).min().and_then(bucket)
    };
    let [read_bps, write_bps, read_iops, write_iops] = lists(host).map(|(_, list)| of_disk(list));
    let [rx_bps, tx_bps, rx_pps, tx_pps] = NET_LABELS.map(|label| {
        let text = config.labels.as_ref().and_then(|labels| labels.get(label))?;
        bucket(size(text)?)
    });
    let limit = |bytes, operations| RateLimit { bytes, operations };
    Rates {
        disk: RateLimits { read: limit(read_bps, read_iops), write: limit(write_bps, write_iops) },
        net: RateLimits { read: limit(rx_bps, rx_pps), write: limit(tx_bps, tx_pps) },
    }
}

/// Checks what limits rates.
///
/// # Errors
/// Invalid: no such device, or a label that is no number.
pub(super) fn check(config: &Config, host: &HostConfig) -> Result<()> {
    for label in NET_LABELS {
        let text = config.labels.as_ref().and_then(|labels| labels.get(label));
        if let Some(text) = text.filter(|text| size(text).is_none()) {
            return Err(Error::invalid(format!(
                "label {label}: {text:?} is no number of bytes or frames a second, 10m for instance"
            )));
        }
    }
    for (_, list) in lists(host) {
        for device in list.iter().flatten().filter(|device| device.path != DISK) {
            let path = &device.path;
            let file = fs::metadata(path).map_err(|error| {
                Error::invalid(match error.kind() {
                    io::ErrorKind::NotFound => format!("stat {path}: no such file or directory"),
                    _ => format!("stat {path}: {error}"),
                })
            })?;
            if !file.file_type().is_block_device() {
                return Err(Error::invalid(format!("{path} is not a block device")));
            }
        }
    }
    Ok(())
}

/// The warnings of rates that name a device on which the container's disk does not lie.
pub(super) fn warnings(host: &HostConfig, data_root: &Path) -> Vec<String> {
    let mut warnings = Vec::new();
    for (flag, list) in lists(host) {
        for device in list.iter().flatten().filter(|device| !is_disk(&device.path, data_root)) {
            warnings.push(format!(
                "--{flag} {}: the container's disk, {DISK}, does not lie on that device. Limit discarded.",
                device.path
            ));
        }
    }
    warnings
}

/// Whether a device means the container's disk.
fn is_disk(path: &str, data_root: &Path) -> bool {
    if path == DISK {
        return true;
    }
    let (Ok(device), Ok(root)) = (fs::metadata(path), fs::metadata(data_root)) else { return false };
    if !device.file_type().is_block_device() {
        return false;
    }
    device.rdev() == root.dev() || whole_disk(root.dev()) == Some(device.rdev())
}

/// The disk of which a device is a partition.
fn whole_disk(partition: u64) -> Option<u64> {
    let (major, minor) = (rustix::fs::major(partition), rustix::fs::minor(partition));
    let sysfs = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
    if !sysfs.join("partition").exists() {
        return None;
    }
    let text = fs::read_to_string(fs::canonicalize(sysfs).ok()?.parent()?.join("dev")).ok()?;
    let (major, minor) = text.trim().split_once(':')?;
    Some(rustix::fs::makedev(major.parse().ok()?, minor.parse().ok()?))
}

/// More than nothing.
fn size(text: &str) -> Option<u64> {
    units::size(text).filter(|size| *size > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn throttle(path: &str, rate: u64) -> Option<Vec<ThrottleDevice>> {
        Some(vec![ThrottleDevice { path: path.into(), rate }])
    }

    fn labels(pairs: &[(&str, &str)]) -> Config {
        let labels = pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Config { labels: Some(labels), ..Config::default() }
    }

    #[test]
    fn the_containers_disk_is_dev_vda() {
        let host = HostConfig {
            blkio_device_read_bps: throttle(DISK, 1 << 20),
            blkio_device_write_iops: throttle(DISK, 5),
            blkio_device_write_bps: throttle("/dev/null", 7),
            ..HostConfig::default()
        };
        let rates = rates(&Config::default(), &host, Path::new("/"));
        let read =
            RateLimit { bytes: Some(Bucket { per_second: 1 << 20, burst: 104_857 }), operations: None };
        let write = RateLimit { bytes: None, operations: Some(Bucket { per_second: 5, burst: 1 }) };
        assert_eq!((rates.disk, rates.net), (RateLimits { read, write }, RateLimits::default()));
    }

    #[test]
    fn the_strictest_of_two_counts_and_zero_is_none() {
        let two = |a, b| {
            let mut list = throttle(DISK, a).unwrap();
            list.extend(throttle(DISK, b).unwrap());
            let host = HostConfig { blkio_device_read_bps: Some(list), ..HostConfig::default() };
            rates(&Config::default(), &host, Path::new("/")).disk.read.bytes.map(|bucket| bucket.per_second)
        };
        assert_eq!((two(5, 3), two(0, 4), two(0, 0)), (Some(3), Some(4), None));
    }

    #[test]
    fn what_is_no_block_device_is_refused_as_docker_does() {
        let of = |path: &str| {
            let host = HostConfig { blkio_device_read_bps: throttle(path, 1), ..HostConfig::default() };
            check(&Config::default(), &host).map_err(|error| error.message)
        };
        assert_eq!(of(DISK), Ok(()));
        assert_eq!(of("/dev/nosuch"), Err("stat /dev/nosuch: no such file or directory".into()));
        assert_eq!(of("/dev/null"), Err("/dev/null is not a block device".into()));
        let host = HostConfig { blkio_device_read_iops: throttle("/dev/sdzz", 1), ..HostConfig::default() };
        assert!(
            warnings(&host, Path::new("/"))[0]
                .starts_with("--device-read-iops /dev/sdzz: the container's disk")
        );
    }

    #[test]
    fn labels_limit_the_network() {
        let config =
            labels(&[("bulkhead.net.rx-bps", "10m"), ("bulkhead.net.tx-pps", "100"), ("other", "x")]);
        let net = rates(&config, &HostConfig::default(), Path::new("/")).net;
        assert_eq!(net.read.bytes.unwrap().per_second, 10 << 20);
        assert_eq!(net.write.operations, Some(Bucket { per_second: 100, burst: 10 }));
        assert_eq!((net.read.operations, net.write.bytes), (None, None));
        for wrong in ["", "0", "-1", "10x", "99999999999999999999", "20000000000g"] {
            let error = check(&labels(&[("bulkhead.net.tx-bps", wrong)]), &HostConfig::default());
            assert!(error.unwrap_err().message.starts_with("label bulkhead.net.tx-bps"), "{wrong}");
        }
    }
}
