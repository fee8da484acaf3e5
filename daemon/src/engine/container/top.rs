//! `GET /containers/{id}/top`: the guest's processes in the columns of `ps`. There is no `ps` to hand arguments
//! to, so those are understood here that ask for what the agent knows; others are refused.

use bulkhead_agent_api::ProcessInfo;
use jiff::{Timestamp, tz::TimeZone};

use crate::{
    api::types::container::Top,
    engine::{Error, Result},
};

/// A column of `ps`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Column {
    Uid,
    Pid,
    Ppid,
    C,
    Stime,
    Tty,
    Time,
    Cmd,
    Comm,
}

const FULL: [Column; 8] = [
    Column::Uid,
    Column::Pid,
    Column::Ppid,
    Column::C,
    Column::Stime,
    Column::Tty,
    Column::Time,
    Column::Cmd,
];

/// The table that `ps_args` asks for.
pub(super) fn top(processes: &[ProcessInfo], ps_args: &str, now: Timestamp) -> Result<Top> {
    let columns = parse(ps_args)?;
    let titles = columns.iter().map(|(_, title)| title.clone()).collect();
    let mut processes: Vec<_> = processes.iter().collect();
    processes.sort_by_key(|process| process.pid);
    let rows = processes.iter().map(|process| columns.iter().map(|(c, _)| c.render(process, now)).collect());
    Ok(Top { processes: rows.collect(), titles })
}

/// `-ef` and nothing; `-o list`, `-olist`, `-eo list`, with or without the dash.
fn parse(ps_args: &str) -> Result<Vec<(Column, String)>> {
    let refuse = || {
        Error::invalid(format!(
            "ps arguments {ps_args:?} are not supported: use -ef, or -o with uid, user, pid, ppid, c, stime, tty, time, \
             cmd, args, command or comm"
        ))
    };
    let words: Vec<&str> = ps_args.split_whitespace().collect();
    let list = match words.as_slice() {
        [] | ["-ef" | "ef" | "-fe"] => {
            return Ok(FULL.iter().map(|column| (*column, column.title().to_owned())).collect());
        }
        ["-o" | "o" | "-eo" | "-ao" | "eo" | "ao", list] => *list,
        [word] => ["-eo", "-ao", "-o", "o"].iter().find_map(|o| word.strip_prefix(o)).ok_or_else(refuse)?,
        _ => return Err(refuse()),
    };
    let columns = list.split(',').map(|name| {
        let column = match name.to_ascii_lowercase().as_str() {
            "uid" | "user" | "euid" | "euser" | "ruser" | "ruid" => Column::Uid,
            "pid" => Column::Pid,
            "ppid" => Column::Ppid,
            "c" => Column::C,
            "stime" | "start" | "start_time" => Column::Stime,
            "tty" | "tt" | "tname" => Column::Tty,
            "time" | "cputime" => Column::Time,
            "cmd" => Column::Cmd,
            "args" | "command" => Column::Cmd,
            "comm" | "ucmd" => Column::Comm,
            _ => return Err(refuse()),
        };
        let title = match name.to_ascii_lowercase().as_str() {
            "args" | "command" | "comm" => "COMMAND".to_owned(),
            "tname" | "tt" => "TTY".to_owned(),
            other => other.to_ascii_uppercase(),
        };
        Ok((column, title))
    });
    columns.collect()
}

impl Column {
    fn title(self) -> &'static str {
        match self {
            Self::Uid => "UID",
            Self::Pid => "PID",
            Self::Ppid => "PPID",
            Self::C => "C",
            Self::Stime => "STIME",
            Self::Tty => "TTY",
            Self::Time => "TIME",
            Self::Cmd => "CMD",
            Self::Comm => "COMMAND",
        }
    }

    fn render(self, process: &ProcessInfo, now: Timestamp) -> String {
        match self {
            Self::Uid if process.uid == 0 => "root".into(),
            Self::Uid => process.uid.to_string(),
            Self::Pid => process.pid.to_string(),
            Self::Ppid => process.ppid.to_string(),
            Self::C => usage(process, now).to_string(),
            Self::Stime => start_time(process.start_unix, now),
            Self::Tty => process.tty.clone(),
            Self::Time => {
                let seconds = process.cpu_ms / 1000;
                format!("{:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)
            }
            Self::Cmd => process.command.clone(),
            Self::Comm => {
                let first = process.command.split(' ').next().unwrap_or_default();
                let name = first.rsplit('/').next().unwrap_or_default();
                name.trim_matches(['[', ']']).to_owned()
            }
        }
    }
}

/// Processor time over life time, in percent.
fn usage(process: &ProcessInfo, now: Timestamp) -> u64 {
    let lived = u64::try_from(now.as_second()).unwrap_or(0).saturating_sub(process.start_unix).max(1);
    (process.cpu_ms / 10 / lived).min(99)
}

/// The time of today's start, the day of an earlier.
fn start_time(unix: u64, now: Timestamp) -> String {
    let Some(start) = i64::try_from(unix).ok().and_then(|second| Timestamp::from_second(second).ok()) else {
        return "?".into();
    };
    let zone = TimeZone::system();
    let (start, now) = (start.to_zoned(zone.clone()), now.to_zoned(zone));
    let format = if start.date() == now.date() { "%H:%M" } else { "%b%d" };
    start.strftime(format).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(pid: i32, command: &str) -> ProcessInfo {
        ProcessInfo {
            pid,
            ppid: 1,
            uid: 1000,
            tty: "?".into(),
            start_unix: 1_000_000,
            cpu_ms: 3_723_000,
            command: command.into(),
        }
    }

    fn now() -> Timestamp {
        Timestamp::from_second(1_010_000).unwrap()
    }

    #[test]
    fn the_full_format_has_ps_columns_in_order_of_pid() {
        let top = top(&[process(9, "sleep 1"), process(7, "sh")], "-ef", now()).unwrap();
        assert_eq!(top.titles, ["UID", "PID", "PPID", "C", "STIME", "TTY", "TIME", "CMD"]);
        assert_eq!(top.processes.len(), 2);
        let row = &top.processes[1];
        assert_eq!([&row[0], &row[1], &row[3], &row[6], &row[7]], ["1000", "9", "37", "01:02:03", "sleep 1"]);
    }

    #[test]
    fn chosen_columns_and_what_is_not_known() {
        for args in ["-o pid,comm", "o pid,comm", "-opid,comm", "-eo pid,comm"] {
            let top = top(&[process(9, "/bin/sleep 1")], args, now()).unwrap();
            assert_eq!(top.titles, ["PID", "COMMAND"], "{args}");
            assert_eq!(top.processes, [["9", "sleep"]], "{args}");
        }
        for args in ["aux", "-o", "-o rss", "-ef -o pid", "-o pid,"] {
            let error = top(&[], args, now()).unwrap_err();
            assert!(error.message.contains("not supported"), "{args}");
        }
    }
}
