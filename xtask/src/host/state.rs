//! What is kept of a test host between commands: `target/host/NAME/`, readable by its owner alone.

use std::fs::{self, DirBuilder, File};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::qemu::Machine;

/// The directory of one test host.
#[derive(Debug, Clone)]
pub(crate) struct StateDir {
    path: PathBuf,
}

/// A test host that was started.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Started {
    pub(crate) qemu: Process,
    /// The loopback port outside that leads to the command server.
    pub(crate) port: u16,
    pub(crate) wire_version: u32,
    pub(crate) machine: Machine,
}

/// A process, told apart from a later one with the same number by its start time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Process {
    pub(crate) pid: i32,
    started: u64,
}

impl Process {
    pub(crate) fn of(pid: i32) -> Result<Process> {
        let started = start_time(pid).with_context(|| format!("process {pid} is gone"))?;
        Ok(Process { pid, started })
    }

    pub(crate) fn is_alive(self) -> bool {
        start_time(self.pid) == Some(self.started)
    }

    /// Kills it and waits until it is gone.
    pub(crate) fn kill(self) {
        let Some(pid) = rustix::process::Pid::from_raw(self.pid) else { return };
        let Ok(handle) = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()) else {
            return;
        };
        // The handle was opened before the check, so it is this very process that is killed.
        if self.is_alive() {
            let _ = rustix::process::pidfd_send_signal(&handle, rustix::process::Signal::KILL);
            wait_for_end(&handle);
        }
    }

    /// Waits until it is gone.
    pub(crate) fn wait(self) {
        let Some(pid) = rustix::process::Pid::from_raw(self.pid) else { return };
        let Ok(handle) = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()) else {
            return;
        };
        if self.is_alive() {
            wait_for_end(&handle);
        }
    }
}

fn wait_for_end(handle: &impl std::os::fd::AsFd) {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    // A process killed here is gone at once; one told to stop gets a while.
    let limit = Timespec { tv_sec: 10, tv_nsec: 0 };
    let _ = poll(&mut [PollFd::new(handle, PollFlags::IN)], Some(&limit));
}

/// Field 22 of /proc/PID/stat, or `None` for a process that is gone or a zombie.
fn start_time(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, field 2, is in parentheses and may hold anything.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    if state == "Z" || state == "X" {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

impl StateDir {
    pub(crate) fn new(target: &Path, name: &str) -> Result<StateDir> {
        if name.is_empty()
            || name.starts_with('.')
            || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
        {
            bail!("test host name {name:?}: letters, digits, '-', '_' and '.' only");
        }
        let path = target.join("host").join(name);
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&path)
            .with_context(|| format!("create {}", path.display()))?;
        Ok(StateDir { path })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The kernel's console.
    pub(crate) fn console(&self) -> PathBuf {
        self.path.join("console.log")
    }

    /// What QEMU says.
    pub(crate) fn qemu_log(&self) -> PathBuf {
        self.path.join("qemu.log")
    }

    /// Its disk, where it has one.
    pub(crate) fn disk(&self) -> PathBuf {
        self.path.join("data.img")
    }

    /// Only one process at a time starts or stops this test host.
    pub(crate) fn lock(&self) -> Result<File> {
        let file = File::create(self.path.join("lock"))?;
        rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive)
            .context("lock the state directory")?;
        Ok(file)
    }

    /// A new random token, kept in the directory.
    pub(crate) fn create_token(&self) -> Result<()> {
        let mut random = [0; 16];
        std::io::Read::read_exact(&mut File::open("/dev/urandom")?, &mut random)?;
        self.write_secret("token", hex::encode(random).as_bytes())
    }

    pub(crate) fn token(&self) -> Result<String> {
        read_token(&self.path)
    }

    /// What was started here, whether it still runs or not.
    pub(crate) fn started(&self) -> Option<Started> {
        serde_json::from_slice(&fs::read(self.path.join("state.json")).ok()?).ok()
    }

    pub(crate) fn save(&self, started: &Started) -> Result<()> {
        self.write_secret("state.json", &serde_json::to_vec_pretty(started)?)
    }

    /// Forwards in the background, to be ended with the test host.
    pub(crate) fn forwards(&self) -> Vec<Process> {
        fs::read(self.path.join("forwards.json"))
            .ok()
            .and_then(|json| serde_json::from_slice(&json).ok())
            .unwrap_or_default()
    }

    pub(crate) fn save_forwards(&self, forwards: &[Process]) -> Result<()> {
        self.write_secret("forwards.json", &serde_json::to_vec(forwards)?)
    }

    /// Forgets what was started; logs stay.
    pub(crate) fn clear(&self) {
        for name in ["state.json", "token", "forwards.json", "data.img"] {
            let _ = fs::remove_file(self.path.join(name));
        }
    }

    pub(crate) fn remove(self) {
        let _ = fs::remove_dir_all(&self.path);
    }

    fn write_secret(&self, name: &str, contents: &[u8]) -> Result<()> {
        let path = self.path.join(name);
        let new = self.path.join(format!("{name}.new"));
        let mut file = File::options().create(true).truncate(true).write(true).mode(0o600).open(&new)?;
        file.write_all(contents)?;
        fs::rename(&new, &path).with_context(|| format!("write {}", path.display()))
    }
}

/// The secret that a client shows to the command server.
pub(crate) fn read_token(dir: &Path) -> Result<String> {
    let path = dir.join("token");
    fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_alive_and_an_earlier_namesake_is_not() {
        let me = Process::of(i32::try_from(std::process::id()).unwrap()).unwrap();
        assert!(me.is_alive());
        assert!(!Process { started: me.started + 1, ..me }.is_alive());
    }

    #[test]
    fn names_cannot_leave_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["", ".", "..", "a/b", "../x"] {
            assert!(StateDir::new(dir.path(), name).is_err(), "{name:?}");
        }
        assert!(StateDir::new(dir.path(), "ci-1").is_ok());
    }
}
