//! What a container's microVM tells of itself: its figures, its console, and why the last one ended.
//!
//! ```text
//!   it runs ───────▶ asked over its control socket
//!   it has died ───▶ the report of its end ──▶ the daemon's log, and a file beside the container's record
//!   it ended in order, or never ran ──▶ nothing to tell
//! ```
//! The report is written by a process that a hostile guest may have taken over: all of it is capped.

use std::{
    fs::{self, File},
    io::Read,
    path::Path,
    time::Duration,
};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::{View, record::Record, workload::Workload};
use crate::{
    api::types::machine::{Device, Exits, Machine, Recorded, Traffic},
    engine::{Engine, Error, Name, Result, Shared},
    sandbox::{
        ControlError, Death,
        vocabulary::{self as vmm, CONSOLE_TAIL, RECENT, Request, Response},
    },
};

/// How often a console that is followed is looked at.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// Longest texts that are taken from a VMM, in bytes.
const MAX_EVENT: usize = 256;
const MAX_REASON: usize = 1024;

/// Most devices and kinds of exits.
const MAX_ENTRIES: usize = 64;

/// Events that the daemon's log gets of a machine that died; the file has all.
const LOGGED: usize = 24;

/// Lines of its console that the log gets: those of a kernel's panic, from its first word on.
const LOGGED_LINES: usize = 96;

/// The end of a machine that did not end in order, as it is kept.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct LastEnd {
    reason: String,
    console: String,
    recent: Vec<Recorded>,
}

/// The longest such file: its texts, each byte escaped by JSON at worst.
const MAX_FILE: u64 = 6 * (CONSOLE_TAIL + RECENT * (MAX_EVENT + 64) + MAX_REASON) as u64;

impl LastEnd {
    fn of(death: &Death) -> Self {
        let mut reason = death.to_string();
        cap(&mut reason, MAX_REASON);
        let Some(report) = &death.report else { return Self { reason, ..Self::default() } };
        let mut console = report.console.clone();
        // Its end is what counts.
        console.drain(..console.ceil_char_boundary(console.len().saturating_sub(CONSOLE_TAIL)));
        Self { reason, console, recent: recorded(report.recent.clone()) }
    }

    /// None where there is none, or it is damaged.
    fn read(path: &Path) -> Option<Self> {
        let mut text = Vec::new();
        File::open(path).ok()?.take(MAX_FILE).read_to_end(&mut text).ok()?;
        serde_json::from_slice(&text).ok()
    }
}

/// Logs why a machine died, and keeps it for whoever asks later. That it died of its jail is an event.
pub(super) async fn remember(shared: &Shared, record: &Record, death: &Death) {
    if let Some(violation) = death.violation() {
        let call = violation.call.map_or_else(|| "unknown".to_owned(), |call| call.to_string());
        let thread = violation.thread.unwrap_or_else(|| "unknown".to_owned());
        shared.publish(record, "jail-violation", [("syscall".into(), call), ("thread".into(), thread)]);
    }
    let last = LastEnd::of(death);
    tracing::error!(container = record.id, reason = last.reason, "a microVM died");
    for event in last.recent.iter().skip(last.recent.len().saturating_sub(LOGGED)) {
        tracing::warn!(container = record.id, at_us = event.at_us, event = ?event.text, "before it died");
    }
    let lines: Vec<&str> = last.console.lines().rev().take(LOGGED_LINES).collect();
    for line in lines.into_iter().rev() {
        tracing::warn!(container = record.id, ?line, "on its console");
    }
    let path = shared.layout().container_last_end(&record.id);
    let written = tokio::task::spawn_blocking(move || {
        // One that is not whole is not read.
        serde_json::to_vec(&last).map_err(std::io::Error::from).and_then(|text| fs::write(path, text))
    });
    if let Ok(Err(error)) = written.await {
        tracing::warn!(container = record.id, %error, "the report of a microVM's end is not kept");
    }
}

impl Engine {
    /// The figures of its microVM, or why the last one died.
    ///
    /// # Errors
    /// No such container; its VMM does not answer.
    pub async fn container_machine(&self, name: Name<'_>) -> Result<Machine> {
        let view = self.shared.registry.find(name)?.view();
        match &view.workload {
            Some(workload) => running(&view, workload).await,
            None => {
                let id = view.record.id.clone();
                let last = self.last_end(&view).await.unwrap_or_default();
                Ok(Machine { id, ended: last.reason, recent: last.recent, ..Machine::default() })
            }
        }
    }

    /// Its console: what is kept of it and, with `follow`, what comes until the machine ends.
    ///
    /// # Errors
    /// No such container; it does not run, and its last machine ended in order.
    pub async fn container_console(&self, name: Name<'_>, follow: bool) -> Result<mpsc::Receiver<Bytes>> {
        let view = self.shared.registry.find(name)?.view();
        let (sender, receiver) = mpsc::channel(4);
        match view.workload.clone() {
            Some(workload) => {
                tokio::spawn(async move { copy_console(&workload, follow, &sender).await });
            }
            None => {
                let Some(last) = self.last_end(&view).await else {
                    let id = &view.record.id;
                    return Err(Error::conflict(format!("container {id} is not running")));
                };
                // There is room for one.
                let _ = sender.try_send(last.console.into());
            }
        }
        Ok(receiver)
    }

    async fn last_end(&self, view: &View) -> Option<LastEnd> {
        let path = self.shared.layout().container_last_end(&view.record.id);
        tokio::task::spawn_blocking(move || LastEnd::read(&path)).await.ok().flatten()
    }
}

async fn running(view: &View, workload: &Workload) -> Result<Machine> {
    let failed = |error: ControlError| Error::internal(format!("the microVM does not tell: {error}"));
    let unexpected = || Error::internal("the microVM's answer does not fit the question");
    let Response::Status(status) = workload.sandbox.control(&Request::Status).await.map_err(failed)? else {
        return Err(unexpected());
    };
    let Response::Recent { events } = workload.sandbox.control(&Request::Recent).await.map_err(failed)?
    else {
        return Err(unexpected());
    };
    let exits = status.exits.into_iter().take(MAX_ENTRIES).map(|(mut reason, count)| {
        cap(&mut reason, MAX_EVENT);
        Exits { reason, count }
    });
    Ok(Machine {
        id: view.record.id.clone(),
        pid: workload.sandbox.pid(),
        ended: String::new(),
        paused: status.paused,
        entered_guest_us: status.entered_guest_us,
        exits: exits.collect(),
        devices: status.devices.into_iter().take(MAX_ENTRIES).map(device).collect(),
        recent: recorded(events),
    })
}

/// Copies the console until the machine has ended or nobody reads; without `follow`, what there is now.
async fn copy_console(workload: &Workload, follow: bool, to: &mpsc::Sender<Bytes>) {
    let mut from = 0;
    loop {
        // A machine that ends takes the socket along.
        let part = workload.sandbox.control(&Request::ConsolePart { from }).await;
        let Ok(Response::ConsolePart { text, next }) = part else { return };
        let nothing = text.is_empty();
        from = next;
        if nothing && !follow {
            return;
        }
        if nothing {
            tokio::select! {
                () = tokio::time::sleep(LOOK_AGAIN) => {}
                () = to.closed() => return,
            }
        } else if to.send(text.into()).await.is_err() {
            return;
        }
    }
}

fn device(device: vmm::DeviceFigures) -> Device {
    let vmm::DeviceFigures { mut name, active, kicks, interrupts, resets, read, write } = device;
    cap(&mut name, MAX_EVENT);
    Device { name, active, kicks, interrupts, resets, read: traffic(read), write: traffic(write) }
}

fn traffic(traffic: vmm::Traffic) -> Traffic {
    let vmm::Traffic { bytes, operations, throttled, throttled_us } = traffic;
    Traffic { bytes, operations, throttled, throttled_us }
}

fn recorded(events: Vec<vmm::Recorded>) -> Vec<Recorded> {
    let skip = events.len().saturating_sub(RECENT);
    let event = |vmm::Recorded { at_us, mut text }| {
        cap(&mut text, MAX_EVENT);
        Recorded { at_us, text }
    };
    events.into_iter().skip(skip).map(event).collect()
}

fn cap(text: &mut String, length: usize) {
    text.truncate(text.floor_char_boundary(length));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::vocabulary::{ExitReason, Report};

    fn death(console: String, recent: Vec<vmm::Recorded>) -> Death {
        let reason = ExitReason::GuestPanic { message: "x".repeat(10_000) };
        let report = Report { reason, console, uptime_us: 1, recent };
        Death { report: Some(report), status: None, last_words: None }
    }

    #[test]
    fn whatever_a_vmm_writes_is_capped() {
        let event = vmm::Recorded { at_us: u64::MAX, text: "\u{1}".repeat(10_000) };
        let last = LastEnd::of(&death("\u{1}".repeat(100_000), vec![event; 10_000]));
        assert_eq!((last.console.len(), last.reason.len()), (CONSOLE_TAIL, MAX_REASON));
        assert_eq!((last.recent.len(), last.recent[0].text.len()), (RECENT, MAX_EVENT));
        assert!(serde_json::to_vec(&last).unwrap().len() as u64 <= MAX_FILE);
    }

    #[test]
    fn an_end_is_kept_and_a_damaged_file_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("end.json");
        assert_eq!(LastEnd::read(&path), None);
        let last = LastEnd::of(&death("the last line\n".into(), vec![]));
        fs::write(&path, serde_json::to_vec(&last).unwrap()).unwrap();
        assert_eq!(LastEnd::read(&path), Some(last));
        fs::write(&path, "{").unwrap();
        assert_eq!(LastEnd::read(&path), None);
    }

    #[test]
    fn a_vmm_that_left_no_report_still_has_a_reason() {
        let death = Death { report: None, status: Some("signal 9".into()), last_words: None };
        assert!(LastEnd::of(&death).reason.contains("signal 9"));
    }
}
