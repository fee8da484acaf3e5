//! `GET /containers/{id}/top`: the guest's processes in the columns of `ps`. There is no `ps` to hand arguments
//! to: here they are read as procps reads them, as far as they choose columns. Which processes are shown is never
//! theirs to say, since all of a container's are.

use bulkhead_agent_api::{ProcessDetail, ProcessInfo};
use jiff::{Timestamp, tz::TimeZone};

use crate::{
    api::types::container::Top,
    engine::{Error, Result},
};

/// How a column is filled.
type Render = fn(&Row<'_>) -> String;

/// A process, and what its columns need beside it.
struct Row<'a> {
    process: &'a ProcessInfo,
    detail: &'a ProcessDetail,
    now: Timestamp,
}

/// The columns of `ps`: names for `-o`, title, contents.
const COLUMNS: [(&[&str], &str, Render); 34] = [
    (&["user", "uname", "euser"], "USER", |row| user(row.detail.euid)),
    (&["ruser"], "RUSER", |row| user(row.process.uid)),
    (&["uid", "euid"], "UID", |row| row.detail.euid.to_string()),
    (&["ruid"], "RUID", |row| row.process.uid.to_string()),
    (&["gid", "egid"], "GID", |row| row.detail.gid.to_string()),
    (&["pid", "tgid"], "PID", |row| row.process.pid.to_string()),
    (&["ppid"], "PPID", |row| row.process.ppid.to_string()),
    (&["pgid", "pgrp"], "PGID", |row| row.detail.group.to_string()),
    (&["sid", "sess", "session"], "SID", |row| row.detail.session.to_string()),
    (&["tpgid"], "TPGID", |row| row.detail.foreground.to_string()),
    (&["c"], "C", |row| (cpu_tenths(row) / 10).min(99).to_string()),
    (&["pcpu", "%cpu"], "%CPU", |row| tenths(cpu_tenths(row))),
    (&["pmem", "%mem"], "%MEM", |row| {
        tenths(row.detail.resident_bytes.saturating_mul(1000) / row.detail.total_bytes.max(1))
    }),
    (&["vsz", "vsize"], "VSZ", |row| (row.detail.virtual_bytes / 1024).to_string()),
    (&["rss", "rssize", "rsz"], "RSS", |row| (row.detail.resident_bytes / 1024).to_string()),
    (&["tty", "tt", "tname"], "TTY", |row| row.process.tty.clone()),
    (&["stat"], "STAT", stat),
    (&["s", "state"], "S", |row| row.detail.state.clone()),
    (&["stime", "start_time"], "STIME", |row| start_time(row)),
    (&["start"], "START", |row| start_time(row)),
    (&["lstart"], "STARTED", |row| started(row, "%a %b %e %H:%M:%S %Y")),
    (&["etime"], "ELAPSED", |row| elapsed(age(row))),
    (&["etimes"], "ELAPSED", |row| age(row).to_string()),
    (&["time", "cputime"], "TIME", |row| clock(row.process.cpu_ms / 1000)),
    (&["bsdtime"], "TIME", |row| short_clock(row.process.cpu_ms / 1000)),
    (&["cputimes"], "TIME", |row| (row.process.cpu_ms / 1000).to_string()),
    (&["ni", "nice"], "NI", |row| row.detail.nice.to_string()),
    (&["pri"], "PRI", |row| (19 - row.detail.nice).to_string()),
    (&["nlwp", "thcount"], "NLWP", |row| row.detail.threads.to_string()),
    (&["f", "flag", "flags"], "F", |_| "0".into()),
    (&["sz"], "SZ", |row| (row.detail.virtual_bytes / 4096).to_string()),
    (&["cmd"], "CMD", |row| row.process.command.clone()),
    (&["args", "command"], "COMMAND", |row| row.process.command.clone()),
    (&["comm", "ucmd", "ucomm"], "COMMAND", |row| row.detail.name.clone()),
];

const FULL: &str = "euser=UID,pid,ppid,c,stime,tty,time,cmd";
const PLAIN: &str = "pid,tty,time,comm=CMD";
const LONG: &str = "f,s,uid,pid,ppid,c,pri,ni,sz,tty,time,comm=CMD";
const BSD: &str = "pid,tty,stat,bsdtime,args";
const BSD_USER: &str = "user,pid,%cpu,%mem,vsz,rss,tty,stat,start,bsdtime,args";

/// A column as it was asked for.
struct Column {
    title: String,
    render: Render,
}

/// The table that `ps_args` asks for.
pub(super) fn top(processes: &[ProcessInfo], ps_args: &str, now: Timestamp) -> Result<Top> {
    let columns = parse(ps_args)?;
    let titles = columns.iter().map(|column| column.title.clone()).collect();
    let mut processes: Vec<_> = processes.iter().collect();
    processes.sort_by_key(|process| process.pid);
    let unknown = ProcessDetail::default();
    let rows = processes.iter().map(|process| {
        let row = Row { process, detail: process.detail.as_ref().unwrap_or(&unknown), now };
        columns.iter().map(|column| (column.render)(&row)).collect()
    });
    Ok(Top { processes: rows.collect(), titles })
}

/// What procps would make of the arguments.
fn parse(ps_args: &str) -> Result<Vec<Column>> {
    let unsupported = || {
        Error::invalid(format!(
            "ps arguments {ps_args:?} are not supported here: use -ef, -l, aux, or -o with names of columns"
        ))
    };
    let mut chosen: Vec<Column> = Vec::new();
    let mut preset = None;
    let mut words = ps_args.split_whitespace();
    while let Some(word) = words.next() {
        let (dashed, letters) = match word.strip_prefix('-') {
            Some(letters) => (true, letters),
            None => (false, word),
        };
        if let Some(list) = letters.strip_prefix("-format") {
            let list = list.strip_prefix('=').or_else(|| words.next()).ok_or_else(unsupported)?;
            chosen.extend(list_of(list)?);
            continue;
        }
        // As procps does, which takes `-aux` for `aux`.
        let bsd = !dashed || letters == "aux";
        for (at, letter) in letters.char_indices() {
            match (letter, bsd) {
                ('o', _) => {
                    let rest = &letters[at + 1..];
                    let list = if rest.is_empty() { words.next().ok_or_else(unsupported)? } else { rest };
                    chosen.extend(list_of(list)?);
                    break;
                }
                ('f', false) | ('F', false) => preset = Some(FULL),
                ('l', false) => preset = Some(LONG),
                ('u', true) => preset = Some(BSD_USER),
                ('a' | 'x', true) => preset = preset.or(Some(BSD)),
                // Which processes, and how wide.
                ('e' | 'A' | 'a' | 'd' | 'w' | 'H' | 'y', _) => {}
                _ => return Err(unsupported()),
            }
        }
    }
    if !chosen.is_empty() {
        return Ok(chosen);
    }
    list_of(preset.unwrap_or(if ps_args.trim().is_empty() { FULL } else { PLAIN }))
}

/// `pid,comm=NAME`.
fn list_of(list: &str) -> Result<Vec<Column>> {
    let column = |entry: &str| {
        let (name, title) = match entry.split_once('=') {
            Some((name, title)) => (name, Some(title)),
            None => (entry, None),
        };
        let lower = name.to_ascii_lowercase();
        let found = COLUMNS.iter().find(|(names, ..)| names.contains(&lower.as_str()));
        let (_, default, render) = found.ok_or_else(|| {
            Error::invalid(format!("ps: error: unknown user-defined format specifier {name:?}"))
        })?;
        Ok(Column { title: title.unwrap_or(default).to_owned(), render: *render })
    };
    list.split(',').map(column).collect()
}

fn user(uid: u32) -> String {
    if uid == 0 { "root".into() } else { uid.to_string() }
}

/// How long a process has lived, in seconds.
fn age(row: &Row<'_>) -> u64 {
    u64::try_from(row.now.as_second()).unwrap_or(0).saturating_sub(row.process.start_unix)
}

/// Processor time over life time, in thousandths.
fn cpu_tenths(row: &Row<'_>) -> u64 {
    (row.process.cpu_ms / age(row).max(1)).min(999)
}

fn tenths(thousandths: u64) -> String {
    format!("{}.{}", thousandths / 10, thousandths % 10)
}

fn stat(row: &Row<'_>) -> String {
    let ProcessDetail { state, group, session, foreground, nice, threads, .. } = row.detail;
    let mut text = state.clone();
    for (holds, letter) in [
        (*nice < 0, '<'),
        (*nice > 0, 'N'),
        (*session == row.process.pid, 's'),
        (*threads > 1, 'l'),
        (foreground == group, '+'),
    ] {
        if holds {
            text.push(letter);
        }
    }
    text
}

fn clock(seconds: u64) -> String {
    let days = match seconds / 86_400 {
        0 => String::new(),
        days => format!("{days}-"),
    };
    format!("{days}{:02}:{:02}:{:02}", seconds / 3600 % 24, seconds / 60 % 60, seconds % 60)
}

fn short_clock(seconds: u64) -> String {
    format!("{}:{:02}", seconds / 60, seconds % 60)
}

fn elapsed(seconds: u64) -> String {
    match seconds {
        0..3600 => format!("{:02}:{:02}", seconds / 60, seconds % 60),
        _ => clock(seconds),
    }
}

/// The time of today's start, the day of an earlier.
fn start_time(row: &Row<'_>) -> String {
    let zone = TimeZone::system();
    let today = row.now.to_zoned(zone.clone()).date();
    let start = start(row).map(|start| start.to_zoned(zone).date());
    started(row, if start == Some(today) { "%H:%M" } else { "%b%d" })
}

fn start(row: &Row<'_>) -> Option<Timestamp> {
    i64::try_from(row.process.start_unix).ok().and_then(|second| Timestamp::from_second(second).ok())
}

fn started(row: &Row<'_>, format: &str) -> String {
    start(row)
        .map_or_else(|| "?".into(), |start| start.to_zoned(TimeZone::system()).strftime(format).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(pid: i32, command: &str) -> ProcessInfo {
        let detail = ProcessDetail {
            name: command.split(' ').next().unwrap_or_default().to_owned(),
            state: "S".into(),
            group: pid,
            session: pid,
            foreground: pid,
            nice: 0,
            threads: 2,
            euid: 1000,
            gid: 1000,
            virtual_bytes: 4 << 20,
            resident_bytes: 1 << 20,
            total_bytes: 512 << 20,
        };
        ProcessInfo {
            pid,
            ppid: 1,
            uid: 1000,
            tty: "?".into(),
            start_unix: 1_000_000,
            cpu_ms: 3_723_000,
            command: command.into(),
            detail: Some(detail),
        }
    }

    fn now() -> Timestamp {
        Timestamp::from_second(1_010_000).unwrap()
    }

    fn titles(args: &str) -> Vec<String> {
        top(&[], args, now()).unwrap().titles
    }

    #[test]
    fn the_full_format_has_ps_columns_in_order_of_pid() {
        let top = top(&[process(9, "sleep 1"), process(7, "sh")], "-ef", now()).unwrap();
        assert_eq!(top.titles, ["UID", "PID", "PPID", "C", "STIME", "TTY", "TIME", "CMD"]);
        assert_eq!(top.processes.len(), 2);
        let row = &top.processes[1];
        assert_eq!([&row[0], &row[1], &row[3], &row[6], &row[7]], ["1000", "9", "37", "01:02:03", "sleep 1"]);
        assert_eq!(titles(""), top.titles);
    }

    #[test]
    fn the_bsd_format_has_what_a_process_uses() {
        let top = top(&[process(9, "sleep 1")], "aux", now()).unwrap();
        let expected =
            ["USER", "PID", "%CPU", "%MEM", "VSZ", "RSS", "TTY", "STAT", "START", "TIME", "COMMAND"];
        assert_eq!(top.titles, expected);
        let row = &top.processes[0];
        assert_eq!(row[..8], ["1000", "9", "37.2", "0.1", "4096", "1024", "?", "Ssl+"]);
        assert_eq!(row[9..], ["62:03", "sleep 1"]);
        for same in ["-aux", "waux", "auxww"] {
            assert_eq!(titles(same), expected, "{same}");
        }
        assert_eq!(titles("ax"), ["PID", "TTY", "STAT", "TIME", "COMMAND"]);
    }

    #[test]
    fn chosen_columns_and_what_is_not_known() {
        for args in ["-o pid,comm", "o pid,comm", "-opid,comm", "-eo pid,comm", "-e -o pid -o comm"] {
            let top = top(&[process(9, "sleep 1")], args, now()).unwrap();
            assert_eq!(top.titles, ["PID", "COMMAND"], "{args}");
            assert_eq!(top.processes, [["9", "sleep"]], "{args}");
        }
        assert_eq!(titles("-eo pid=P,user,etime"), ["P", "USER", "ELAPSED"]);
        assert_eq!(titles("-e"), ["PID", "TTY", "TIME", "CMD"]);
        for args in ["-o", "-o pid,", "-o nosuch", "-p 1", "--forest", "-ef; reboot"] {
            assert!(top(&[], args, now()).is_err(), "{args}");
        }
    }

    #[test]
    fn every_column_has_a_text_for_an_older_agents_process() {
        let process = ProcessInfo { detail: None, ..process(9, "sleep 1") };
        for (names, ..) in COLUMNS {
            let top = top(std::slice::from_ref(&process), &format!("-o {}", names[0]), now()).unwrap();
            assert_eq!(top.processes.len(), 1);
        }
    }
}
