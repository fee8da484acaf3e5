//! The VMM process of one sandbox: spawn it, know it again, ask it, hear of its end.

pub(super) mod cgroup;
mod child;
pub(super) mod control;
pub(super) mod jail;
pub(super) mod process;
pub(crate) mod shares;
pub(super) mod spawn;
pub(super) mod uids;

use std::{
    fs::File,
    io::{self, Read},
    os::fd::OwnedFd,
};

use bulkhead_vmm_api::{CONSOLE_TAIL, ExitReason, RECENT, Report};
use tokio::io::{Interest, unix::AsyncFd};

use super::dir::{LOG, REPORT, SandboxDir};

/// The most that is read of a report: the console's tail and the latest events, each byte escaped by JSON at
/// worst, and the rest.
const MAX_REPORT: u64 = (6 * CONSOLE_TAIL + RECENT * (6 * 200 + 64) + 64 * 1024) as u64;

/// How a VMM ended.
#[derive(Debug, Clone)]
pub struct Death {
    /// Its own words, None when it could not write any (it was killed).
    pub report: Option<Report>,
    /// Its exit status in words, where this daemon is its parent.
    pub status: Option<String>,
    /// The last line on its standard error, when there is no report.
    pub last_words: Option<String>,
}

/// A VMM did what it never does: it has a fault, or it was not its own any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// The kind of its thread, where it could still be told.
    pub thread: Option<String>,
    /// The system call's number, likewise. The call was not made.
    pub call: Option<i32>,
}

impl Death {
    /// Whether it died because it made a system call that it may not.
    #[must_use]
    pub fn violation(&self) -> Option<Violation> {
        if let Some(Report { reason: ExitReason::Violation { thread, call }, .. }) = &self.report {
            return Some(Violation { thread: Some(thread.clone()), call: Some(*call) });
        }
        let by_the_kernel = self.status.as_ref().is_some_and(|status| status.contains("(SIGSYS)"));
        by_the_kernel.then_some(Violation { thread: None, call: None })
    }

    /// Reads what a dead VMM left in its directory.
    pub(super) fn read(dir: &SandboxDir, status: Option<String>) -> Self {
        let text = read_capped(dir, REPORT);
        let report = text.and_then(|text| serde_json::from_str(&text).ok());
        let last_words = if report.is_none() {
            read_capped(dir, LOG).and_then(|log| log.lines().last().map(str::to_owned))
        } else {
            None
        };
        Self { report, status, last_words }
    }

    /// Whether the guest ended in order.
    #[must_use]
    pub fn in_order(&self) -> bool {
        matches!(self.report, Some(Report { reason: ExitReason::PoweredOff, .. }))
    }
}

impl std::fmt::Display for Death {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (&self.report, &self.status, &self.last_words) {
            (Some(report), ..) => write!(f, "{}", report.reason),
            (None, Some(status), Some(words)) => {
                write!(f, "the VMM ended without a report ({status}): {words}")
            }
            (None, Some(status), None) => write!(f, "the VMM ended without a report ({status})"),
            (None, None, Some(words)) => write!(f, "the VMM ended without a report: {words}"),
            (None, None, None) => f.write_str("the VMM ended without a report"),
        }
    }
}

fn read_capped(dir: &SandboxDir, name: &str) -> Option<String> {
    let mut bytes = Vec::new();
    File::open(dir.path().join(name)).ok()?.take(MAX_REPORT).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// Registers a descriptor with the runtime.
fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` always gives the same descriptor, and it is open until it is dropped, which the
    // `AsyncFd` does after it has deregistered it.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}
