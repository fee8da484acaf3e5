//! One process held by a pidfd, and how a restarted daemon knows it again.

use std::{
    fs::File,
    io::{self, Read},
    os::fd::{AsFd, OwnedFd},
    process::ExitStatus,
    sync::OnceLock,
};

use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};
use tokio::io::{Interest, unix::AsyncFd};

use super::watch;

/// Names a process for ever: a pid is used again, a pid and its start time within one boot are not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    /// The kernel's random id of this boot.
    pub(crate) boot_id: String,
    /// The process's number.
    pub(crate) pid: i32,
    /// In clock ticks since boot, field 22 of `/proc/<pid>/stat`.
    pub(crate) start_time: u64,
}

impl Identity {
    /// Parses an identity file: the boot id's line, then `/proc/self/stat` as the process itself copied it.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (boot_id, stat) = text.split_once('\n')?;
        let (pid, start_time) = parse_stat(stat)?;
        Some(Self { boot_id: boot_id.to_owned(), pid, start_time })
    }
}

/// The kernel's random id of this boot.
pub(crate) fn boot_id() -> io::Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// The pid and start time in a line of `/proc/<pid>/stat`. The second field, the command in parentheses, may
/// hold anything, so fields are counted from the last parenthesis.
fn parse_stat(stat: &str) -> Option<(i32, u64)> {
    let pid = stat.split(' ').next()?.parse().ok()?;
    let after_command = stat.get(stat.rfind(')')? + 1..)?;
    let start_time = after_command.split_ascii_whitespace().nth(19)?.parse().ok()?;
    Some((pid, start_time))
}

/// A process, alive or a zombie or gone, that no other can be mistaken for.
#[derive(Debug)]
pub(crate) struct Process {
    pid: i32,
    pidfd: AsyncFd<OwnedFd>,
    status: OnceLock<Option<String>>,
}

impl Process {
    /// A child of ours, by its descriptor.
    pub(crate) fn of_child(pid: i32, pidfd: OwnedFd) -> io::Result<Self> {
        Ok(Self { pid, pidfd: watch(pidfd, Interest::READABLE)?, status: OnceLock::new() })
    }

    /// The process of this identity, or None when it is no more.
    pub(crate) fn adopt(identity: &Identity) -> io::Result<Option<Self>> {
        if boot_id()? != identity.boot_id {
            return Ok(None);
        }
        let Some(pid) = Pid::from_raw(identity.pid) else { return Ok(None) };
        let process = match Self::from_pid(pid) {
            Ok(process) => process,
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
            Err(error) => return Err(error),
        };
        // Only now, with the pidfd held: what has this start time now is what the pidfd refers to.
        let Ok(stat) = std::fs::read_to_string(format!("/proc/{}/stat", identity.pid)) else {
            return Ok(None);
        };
        let found = parse_stat(&stat);
        Ok((found == Some((identity.pid, identity.start_time))).then_some(process))
    }

    fn from_pid(pid: Pid) -> io::Result<Self> {
        let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::NONBLOCK)?;
        Self::of_child(pid.as_raw_nonzero().get(), pidfd)
    }

    /// Its number, for logs.
    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }

    /// Sends SIGKILL; a process that has ended is no error.
    pub(crate) fn kill(&self) {
        if let Err(error) = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL)
            && error != rustix::io::Errno::SRCH
        {
            tracing::error!(pid = self.pid, %error, "a process cannot be killed");
        }
    }

    /// Resolves when the process has ended, with its status in words where it was our child. Any number of
    /// tasks may wait, and each may stop waiting.
    pub(crate) async fn ended(&self) -> Option<String> {
        if let Err(error) = self.pidfd.readable().await.map(drop) {
            // Only a runtime that shuts down fails here; nobody is left to care.
            tracing::debug!(pid = self.pid, %error, "waiting for a process was cut short");
            return None;
        }
        self.status.get_or_init(|| self.reap()).clone()
    }

    fn reap(&self) -> Option<String> {
        use std::os::unix::process::ExitStatusExt;
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        let status = rustix::process::waitid(WaitId::PidFd(self.pidfd.as_fd()), options).ok()??;
        let raw = match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => code << 8,
            (None, Some(signal)) => signal,
            (None, None) => return None,
        };
        Some(ExitStatus::from_raw(raw).to_string())
    }
}

/// Reads an identity file's beginning; None when it is damaged or not there.
pub(crate) fn read_identity(path: &std::path::Path) -> Option<Identity> {
    let mut text = String::new();
    File::open(path).ok()?.take(4096).read_to_string(&mut text).ok()?;
    Identity::parse(&text)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn identity_of(pid: u32) -> Identity {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        Identity::parse(&format!("{}\n{stat}", boot_id().unwrap())).unwrap()
    }

    #[test]
    fn a_command_with_parentheses_and_spaces_does_not_shift_the_fields() {
        let stat = "42 (a) b) (c) S 1 42 42 0 -1 4194304 1 2 3 4 5 6 7 8 20 0 1 0 98765 1 1";
        assert_eq!(parse_stat(stat), Some((42, 98765)));
        assert_eq!(parse_stat("42 (a"), None);
        assert_eq!(parse_stat(""), None);
    }

    #[tokio::test]
    async fn a_living_process_is_adopted_and_its_end_is_heard() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let process = Process::adopt(&identity_of(child.id())).unwrap().unwrap();
        process.kill();
        assert!(process.ended().await.unwrap().contains("signal: 9"));
        assert!(child.wait().is_err(), "the process was reaped through its pidfd");
    }

    #[tokio::test]
    async fn another_start_time_or_another_boot_is_another_process() {
        let own = identity_of(std::process::id());
        assert!(Process::adopt(&own).unwrap().is_some());
        let other = Identity { start_time: own.start_time + 1, ..own.clone() };
        assert!(Process::adopt(&other).unwrap().is_none());
        let other = Identity { boot_id: "another".into(), ..own };
        assert!(Process::adopt(&other).unwrap().is_none());
    }
}
