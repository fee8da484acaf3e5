//! Where daemons run: this machine, or the test host that `cargo xtask host` keeps.

use std::env;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

/// Names the host in the environment of tests; its value is JSON.
const VARIABLE: &str = "BULKHEAD_TEST_HOST";

/// A machine with a usable `/dev/kvm` that sees the files of this one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Host {
    /// This machine.
    Direct,
    /// A test host that is up.
    TestHost {
        /// The xtask program, which runs commands in it.
        xtask: PathBuf,
        /// The work tree whose test host it is.
        tree: PathBuf,
        /// The test host's name.
        name: String,
    },
}

impl Host {
    /// The host that `cargo xtask test` chose.
    ///
    /// # Errors
    /// When the tests were started in another way.
    pub fn from_env() -> Result<Host> {
        let text =
            env::var(VARIABLE).context("end-to-end tests are run by `cargo xtask test e2e [FILTER]`")?;
        serde_json::from_str(&text).with_context(|| format!("${VARIABLE}"))
    }

    /// What [`Host::from_env`] reads: name and value.
    ///
    /// # Errors
    /// When a path is not UTF-8.
    pub fn to_env(&self) -> Result<(&'static str, String)> {
        Ok((VARIABLE, serde_json::to_string(self)?))
    }

    /// A command that runs the program in the host, with this process's directory and environment.
    #[must_use]
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        match self {
            Host::Direct => Command::new(program),
            Host::TestHost { xtask, tree, name } => {
                let mut command = Command::new(xtask);
                command.arg("--tree").arg(tree).args(["host", "--name", name, "exec", "--"]).arg(program);
                command
            }
        }
    }

    /// Runs a shell script in the host, its arguments as `$1`…; gives what it printed, without the last newline.
    ///
    /// # Errors
    /// When it fails, with what it complained.
    pub fn sh(&self, script: &str, arguments: &[&str]) -> Result<String> {
        let mut command = self.command("sh");
        let output = command.args(["-euc", script, "sh"]).args(arguments).stdin(Stdio::null()).output()?;
        if !output.status.success() {
            bail!("{script}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr).trim_end());
        }
        Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
    }

    /// Makes a socket of the host (a path, or `ADDRESS:PORT`) reachable here as a unix socket.
    ///
    /// # Errors
    /// When the host is gone.
    pub fn forward(&self, inner: &str) -> Result<Forward> {
        let (Host::TestHost { xtask, tree, name }, dir) = (self, tempfile::tempdir()?) else {
            return Ok(Forward { address: inner.to_owned(), process: None });
        };
        let outer = dir.path().join("s");
        let mut process = Command::new(xtask)
            .arg("--tree")
            .arg(tree)
            .args(["host", "--name", name, "forward", "--listen"])
            .arg(&outer)
            .args(["--to", inner])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let mut line = String::new();
        if let Some(stdout) = process.stdout.take() {
            BufReader::new(stdout).read_line(&mut line)?;
        }
        if line.is_empty() {
            bail!("forward of {inner}: {}", process.wait()?);
        }
        let address = outer.to_str().context("temporary directory's path")?.to_owned();
        Ok(Forward { address, process: Some((process, dir)) })
    }

    /// A new directory in the host, on a file system that an engine can keep its data on.
    ///
    /// # Errors
    /// When the host is gone or full.
    pub fn scratch(&self) -> Result<Scratch> {
        let make = "mkdir -p /var/lib/bulkhead && mktemp -d /var/lib/bulkhead/test-XXXXXX";
        Ok(Scratch { path: PathBuf::from(self.sh(make, &[])?), host: self.clone() })
    }
}

/// A socket of the host, reachable here while this lives.
#[derive(Debug)]
pub struct Forward {
    address: String,
    process: Option<(Child, tempfile::TempDir)>,
}

impl Forward {
    /// Where to connect here: a path, or `ADDRESS:PORT`.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }
}

impl Drop for Forward {
    fn drop(&mut self) {
        if let Some((process, _)) = &mut self.process {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

/// A directory in the host, removed when dropped.
#[derive(Debug)]
pub struct Scratch {
    host: Host,
    path: PathBuf,
}

impl Scratch {
    /// Its path in the host.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A path below it, as text.
    #[must_use]
    pub fn join(&self, name: &str) -> String {
        self.path.join(name).display().to_string()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What a test mounted below it goes first.
        let script = "grep -F \" $1/\" /proc/mounts | cut -d' ' -f2 | sort -r | while read -r m; do umount \"$m\"; done; rm -rf \"$1\"";
        let _ = self.host.sh(script, &[&self.path.display().to_string()]);
    }
}
