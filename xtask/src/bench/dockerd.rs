//! Debian's dockerd with containerd and runc, to compare with.

use std::process::{Child, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bulkhead_tests::host::{Forward, Scratch};
use bulkhead_tests::http::Client;
use bulkhead_tests::{Docker, Host};

use crate::deps;

/// A dockerd in the host, with directories of its own; stopped when dropped.
pub(crate) struct Dockerd {
    host: Host,
    scratch: Scratch,
    process: Child,
    forward: Forward,
}

/// Whether containers get a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bridge {
    /// It makes none: no bridge, no rules.
    None,
    /// Its own, on an address that ours does not choose. Without rules, which would hold back those who stand beside
    /// it: what they cost is to its advantage here.
    Default,
}

impl Bridge {
    fn arguments(self) -> &'static [&'static str] {
        match self {
            Bridge::None => &["--bridge", "none"],
            Bridge::Default => &["--bip", "10.201.0.1/16", "--ip-masq=false", "--ip-forward=false"],
        }
    }
}

impl Dockerd {
    /// Starts it with the registry as its Docker Hub.
    pub(crate) fn start(host: &Host, registry: &str, bridge: Bridge) -> Result<Dockerd> {
        let scratch = host.scratch()?;
        let (socket, log) = (scratch.join("d.sock"), scratch.join("log"));
        let init = deps::find_program("tini-static")?.context("tini-static: cargo xtask deps")?;
        let script = "log=$1; shift; exec \"$@\" >\"$log\" 2>&1";
        let process = host
            .command("sh")
            .args(["-c", script, "sh", &log, "dockerd", "--iptables=false", "--ip6tables=false"])
            .args(bridge.arguments())
            .arg("--init-path")
            .arg(init)
            .args(["--data-root", &scratch.join("data"), "--exec-root", &scratch.join("exec")])
            .args(["--pidfile", &scratch.join("pid"), "--host", &format!("unix://{socket}")])
            .args(["--storage-driver", "overlay2", "--exec-opt", "native.cgroupdriver=cgroupfs"])
            .args(["--registry-mirror", &format!("http://{registry}"), "--insecure-registry", registry])
            .stdin(Stdio::null())
            .spawn()
            .context("start dockerd")?;
        let forward = host.forward(&socket)?;
        let mut dockerd = Dockerd { host: host.clone(), scratch, process, forward };
        dockerd.wait_until_it_answers()?;
        Ok(dockerd)
    }

    /// The CLI here.
    pub(crate) fn docker(&self) -> Docker {
        Docker::new(self.forward.address())
    }

    /// Its socket here.
    pub(crate) fn socket(&self) -> &str {
        self.forward.address()
    }

    /// Its socket in the host.
    pub(crate) fn inner_socket(&self) -> String {
        self.scratch.join("d.sock")
    }

    fn wait_until_it_answers(&mut self) -> Result<()> {
        let client = Client::new(self.forward.address());
        while !client.request("GET", "/_ping", &[], b"").is_ok_and(|answer| answer.head.status == 200) {
            if let Some(status) = self.process.try_wait()? {
                let log = self.host.sh("tail -20 \"$1\"", &[&self.scratch.join("log")]).unwrap_or_default();
                bail!("dockerd ended: {status}\n{log}");
            }
            thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }
}

impl Drop for Dockerd {
    fn drop(&mut self) {
        // It stops its containerd in order.
        let _ = self.host.sh("kill \"$(cat \"$1\")\"", &[&self.scratch.join("pid")]);
        let _ = self.process.wait();
    }
}
