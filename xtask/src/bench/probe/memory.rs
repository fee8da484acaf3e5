//! Memory that a process has for itself, and how much of it is its guest's.

use std::fs;

use anyhow::{Context, Result};

/// A mapping of at least this many bytes is guest memory: nothing else of a VMM is nearly as big.
const GUEST_AT_LEAST: u64 = 32 << 20;

/// What `VmFlags` says of memory about whose huge pages somebody has decided, which VMMs do for guest memory alone.
const ADVISED: [&str; 2] = ["hg", "nh"];

/// Private bytes of a VMM.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Private {
    /// The guest's.
    pub(super) guest: u64,
    /// Its own.
    pub(super) own: u64,
}

/// Of the process.
pub(super) fn private(pid: u32) -> Result<Private> {
    let path = format!("/proc/{pid}/smaps");
    let smaps = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    Ok(sum(&smaps))
}

/// A mapping, or several that adjoin and are of the same file: the kernel splits one where its parts differ in
/// advice or protection.
#[derive(Debug, Default)]
struct Mapping {
    end: u64,
    size: u64,
    /// Whether it can be written, and is copied when it is.
    private_data: bool,
    /// Device, inode and path.
    file: String,
    private: u64,
    advised: bool,
}

fn sum(smaps: &str) -> Private {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        if let Some(found) = header(line) {
            match mappings.last_mut() {
                Some(last)
                    if last.end == found.end - found.size
                        && last.file == found.file
                        && last.private_data == found.private_data =>
                {
                    last.end = found.end;
                    last.size += found.size;
                }
                _ => mappings.push(found),
            }
        } else if let Some(mapping) = mappings.last_mut() {
            mapping.private += private_kib(line).unwrap_or_default() << 10;
            mapping.advised |=
                line.starts_with("VmFlags:") && line.split_whitespace().any(|flag| ADVISED.contains(&flag));
        }
    }
    // A restored guest's memory is parts of a file that is mapped for nothing else; a library has code, too.
    let is_guest = |mapping: &Mapping| {
        let saved = || {
            mapping.private_data
                && !mapping.file.starts_with("00:00 0")
                && mappings.iter().all(|other| other.file != mapping.file || other.private_data)
        };
        mapping.advised || mapping.size >= GUEST_AT_LEAST || saved()
    };
    let mut private = Private::default();
    for mapping in &mappings {
        if is_guest(mapping) {
            private.guest += mapping.private;
        } else {
            private.own += mapping.private;
        }
    }
    private
}

/// `7f00-7f10 rw-p 00000000 00:01 12 /path`.
fn header(line: &str) -> Option<Mapping> {
    let mut words = line.split_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let (start, end) = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
    let private_data = words.next()? == "rw-p";
    let file = words.skip(1).collect::<Vec<_>>().join(" ");
    Some(Mapping { end, size: end.checked_sub(start)?, private_data, file, ..Mapping::default() })
}

fn private_kib(line: &str) -> Option<u64> {
    let rest = line.strip_prefix("Private_Clean:").or_else(|| line.strip_prefix("Private_Dirty:"))?;
    rest.trim().strip_suffix("kB")?.trim().parse().ok()
}

/// `MemTotal` and `MemAvailable` in bytes.
pub(super) fn of_host() -> Result<(u64, u64)> {
    let text = fs::read_to_string("/proc/meminfo").context("read /proc/meminfo")?;
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        let kib =
            line.and_then(|rest| rest.trim_start_matches(':').trim().strip_suffix("kB")?.trim().parse().ok());
        kib.map(|kib: u64| kib << 10).with_context(|| format!("no {name} in /proc/meminfo"))
    };
    Ok((field("MemTotal")?, field("MemAvailable")?))
}

/// The parent's pid.
pub(super) fn parent(pid: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse().ok()
}

/// Its name, at most 15 bytes.
pub(super) fn command(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
55d0c0000000-55d0c0100000 r-xp 00000000 fe:00 77   /usr/libexec/bulkhead-vmm
Rss:                 900 kB
Private_Clean:       100 kB
Private_Dirty:         4 kB
55d0c0100000-55d0c0101000 rw-p 00100000 fe:00 77   /usr/libexec/bulkhead-vmm
Private_Dirty:         4 kB
7f0000000000-7f0001000000 rw-p 00000000 00:00 0
Private_Clean:         0 kB
Private_Dirty:      2048 kB
7f0001000000-7f0004000000 rw-p 00000000 00:00 0
Private_Dirty:      1024 kB
VmFlags: rd wr
7f1000000000-7f1000200000 rw-p 00000000 00:00 0
Private_Dirty:       512 kB
VmFlags: rd wr nh
7f1000200000-7f1000300000 rw-p 00200000 00:1a 9    /memory
Private_Dirty:       256 kB
7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0    [stack]
Private_Dirty:        16 kB
";

    #[test]
    fn big_advised_and_saved_mappings_are_the_guests() {
        assert_eq!(sum(SMAPS), Private { guest: (3072 + 768) << 10, own: 124 << 10 });
    }

    #[test]
    fn this_process_has_memory_and_so_has_the_host() {
        assert!(private(std::process::id()).unwrap().own > 0);
        let (total, available) = of_host().unwrap();
        assert!(total >= available && available > 0);
        assert!(parent(std::process::id()).is_some());
    }
}
