//! Memory that a process has for itself, and how much of it is its guest's.

use std::fs;

use anyhow::{Context, Result};

/// A mapping of at least this many bytes is guest memory: nothing else of a VMM is nearly as big.
const GUEST_AT_LEAST: u64 = 32 << 20;

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
    file: String,
    private: u64,
}

fn sum(smaps: &str) -> Private {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        if let Some((start, end, file)) = header(line) {
            match mappings.last_mut() {
                Some(last) if last.end == start && last.file == file => {
                    last.end = end;
                    last.size += end - start;
                }
                _ => mappings.push(Mapping { end, size: end - start, file, private: 0 }),
            }
        } else if let (Some(mapping), Some(kib)) = (mappings.last_mut(), private_kib(line)) {
            mapping.private += kib << 10;
        }
    }
    let mut private = Private::default();
    for mapping in mappings {
        if mapping.size >= GUEST_AT_LEAST {
            private.guest += mapping.private;
        } else {
            private.own += mapping.private;
        }
    }
    private
}

/// `7f00-7f10 rw-p 00000000 00:01 12 /path`: start, end, and device, inode and path.
fn header(line: &str) -> Option<(u64, u64, String)> {
    let mut words = line.split_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let (start, end) = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
    Some((start, end, words.skip(2).collect::<Vec<_>>().join(" ")))
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
7f0000000000-7f0001000000 rw-p 00000000 00:00 0
Private_Clean:         0 kB
Private_Dirty:      2048 kB
7f0001000000-7f0004000000 rw-p 00000000 00:00 0
Private_Dirty:      1024 kB
VmFlags: rd wr
7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0    [stack]
Private_Dirty:        16 kB
";

    #[test]
    fn big_mappings_are_the_guests_even_when_they_are_split() {
        assert_eq!(sum(SMAPS), Private { guest: 3072 << 10, own: 120 << 10 });
    }

    #[test]
    fn this_process_has_memory_and_so_has_the_host() {
        assert!(private(std::process::id()).unwrap().own > 0);
        let (total, available) = of_host().unwrap();
        assert!(total >= available && available > 0);
        assert!(parent(std::process::id()).is_some());
    }
}
