//! The processes of a container, as `/proc` tells of them.

use std::{
    fs,
    io::{self, Read},
};

use bulkhead_agent_api::{ProcessDetail, ProcessInfo};

/// The longest command line that is told, in bytes.
const MAX_COMMAND: usize = 4096;

/// The most processes that are told: an answer has to fit a frame.
const MAX_PROCESSES: usize = 800;

/// Clock ticks a second in `/proc/<pid>/stat` (`USER_HZ`, the same on every Linux of this architecture).
const TICKS: u64 = 100;

/// Bytes of a page.
const PAGE: u64 = 4096;

/// Information on each pid that still exists.
pub fn list(pids: &[i32]) -> Vec<ProcessInfo> {
    let guest = Guest { boot: boot_time(), memory: total_memory() };
    pids.iter().take(MAX_PROCESSES).filter_map(|pid| one(*pid, guest)).collect()
}

/// What is the same for all processes.
#[derive(Clone, Copy)]
struct Guest {
    /// When it was booted: seconds since the Unix epoch.
    boot: u64,
    /// Its memory in bytes.
    memory: u64,
}

fn total_memory() -> u64 {
    let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = info.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok())
        .unwrap_or(0)
        .saturating_mul(1024)
}

fn boot_time() -> u64 {
    let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
    stat.lines().find_map(|line| line.strip_prefix("btime ")?.parse().ok()).unwrap_or(0)
}

fn one(pid: i32, guest: Guest) -> Option<ProcessInfo> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = read_command(format!("/proc/{pid}/cmdline")).ok()?;
    parse(pid, &stat, &status, &line, guest)
}

/// As much of a command line as is told. A workload makes them megabytes long.
fn read_command(path: impl AsRef<std::path::Path>) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    fs::File::open(path)?.take(MAX_COMMAND as u64).read_to_end(&mut line)?;
    Ok(line)
}

fn parse(pid: i32, stat: &str, status: &str, line: &[u8], guest: Guest) -> Option<ProcessInfo> {
    // The name is in parentheses and may contain anything, parentheses too.
    let (head, tail) = stat.rsplit_once(')')?;
    let (_, name) = head.split_once('(')?;
    let fields: Vec<&str> = tail.split_whitespace().collect();
    // Field n of proc(5) is at n - 3 here.
    let number = |index: usize| fields.get(index - 3).and_then(|field| field.parse::<i64>().ok());
    let ticks = |index: usize| number(index).and_then(|value| u64::try_from(value).ok());
    let ids = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let mut ids = line.unwrap_or_default().split_whitespace().map(|id| id.parse::<u32>().ok());
        let (real, effective) = (ids.next().flatten(), ids.next().flatten());
        (real, effective.or(real))
    };
    let ((uid, euid), (gid, _)) = (ids("Uid:"), ids("Gid:"));
    let small = |index: usize| number(index).and_then(|value| i32::try_from(value).ok()).unwrap_or(0);
    let detail = ProcessDetail {
        name: name.to_owned(),
        state: fields.first().copied().unwrap_or_default().to_owned(),
        group: small(5),
        session: small(6),
        foreground: small(8),
        nice: small(19),
        threads: u32::try_from(small(20)).unwrap_or(0),
        euid: euid?,
        gid: gid.unwrap_or(0),
        virtual_bytes: ticks(23).unwrap_or(0),
        resident_bytes: ticks(24).unwrap_or(0).saturating_mul(PAGE),
        total_bytes: guest.memory,
    };
    let command = command(line);
    Some(ProcessInfo {
        pid,
        ppid: i32::try_from(number(4)?).ok()?,
        uid: uid?,
        tty: terminal(number(7)?),
        start_unix: guest.boot.saturating_add(ticks(22)? / TICKS),
        cpu_ms: ticks(14)?.saturating_add(ticks(15)?).saturating_mul(1000 / TICKS),
        command: if command.is_empty() { format!("[{name}]") } else { command },
        detail: Some(detail),
    })
}

fn command(line: &[u8]) -> String {
    let text: Vec<u8> = line.iter().map(|byte| if *byte == 0 { b' ' } else { *byte }).collect();
    String::from_utf8_lossy(&text).trim_end().to_owned()
}

/// A terminal's device number as `ps` prints it.
fn terminal(device: i64) -> String {
    let Ok(device) = u64::try_from(device) else { return "?".into() };
    let (major, minor) = ((device >> 8) & 0xfff, (device & 0xff) | ((device >> 12) & 0xf_ff00));
    match major {
        136..=143 => format!("pts/{}", minor + (major - 136) * 256),
        _ => "?".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAT: &str = "42 (a) (b)) S 7 42 42 34818 42 4194560 1 0 0 0 150 50 0 0 20 5 3 0 1234 8192 2";
    const GUEST: Guest = Guest { boot: 1000, memory: 1 << 20 };

    #[test]
    fn names_with_parentheses_do_not_shift_the_fields() {
        let info = parse(42, STAT, "Name:\tx\nUid:\t33\t0\t0\t0\n", b"sleep\x0010\0", GUEST).unwrap();
        let expected = ProcessInfo {
            pid: 42,
            ppid: 7,
            uid: 33,
            tty: "pts/2".into(),
            start_unix: 1012,
            cpu_ms: 2000,
            command: "sleep 10".into(),
            detail: Some(ProcessDetail {
                name: "a) (b)".into(),
                state: "S".into(),
                group: 42,
                session: 42,
                foreground: 42,
                nice: 5,
                threads: 3,
                euid: 0,
                gid: 0,
                virtual_bytes: 8192,
                resident_bytes: 8192,
                total_bytes: 1 << 20,
            }),
        };
        assert_eq!(info, expected);
        assert_eq!(parse(42, STAT, "Uid:\t0", b"", GUEST).unwrap().command, "[a) (b)]");
    }

    #[test]
    fn this_process_is_found_and_damage_is_not() {
        let own = list(&[std::process::id() as i32]);
        assert!(own[0].command.contains("bulkhead"), "{own:?}");
        assert!(parse(1, "1 (x", "", b"", GUEST).is_none());
        assert!(parse(1, "1 (x) S", "Uid: 0", b"", GUEST).is_none());
        assert!(list(&[i32::MAX]).is_empty());
    }

    #[test]
    fn no_more_of_a_command_line_is_read_than_is_told() {
        assert_eq!(read_command("/dev/zero").unwrap().len(), MAX_COMMAND);
    }

    #[test]
    fn only_pseudo_terminals_have_names() {
        assert_eq!([terminal(0), terminal(-1), terminal(136 << 8 | 5)], ["?", "?", "pts/5"]);
    }
}
