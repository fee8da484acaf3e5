//! What a network costs: bytes and questions between a container and the host, and between two containers, beside
//! the same of containers that dockerd has made on a bridge of its own.
//!
//! ```text
//!   host ──▶ server     sent to a container
//!   host ◀── client     sent by a container
//!   server ◀── client   between two
//! ```

use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use bulkhead_tests::docker::Container;
use bulkhead_tests::host::Scratch;
use bulkhead_tests::image::{Image, LayerBuilder};
use bulkhead_tests::{Daemon, DaemonOptions, Docker, Host, Registry};

use super::Bench;
use super::dockerd::{Bridge, Dockerd};
use super::figures::{Figure, Samples, Unit};

const PEER: &str = "dockerd-runc";
const IMAGE: &str = "transfer:latest";

/// How much is sent for one sample, in MiB, and how many questions are asked.
const SIZE: &str = "64";
const QUESTIONS: &str = "200";

/// What is measured, between whom.
const FIGURES: [&str; 6] = [
    "net-host-to-guest",
    "net-guest-to-host",
    "net-guest-to-guest",
    "net-host-asks-guest",
    "net-guest-asks-host",
    "net-guest-asks-guest",
];

impl Bench<'_> {
    /// Milliseconds for [`SIZE`] MiB or for [`QUESTIONS`] questions; and a container's run on its default network.
    pub(super) fn networks(&self) -> Result<Vec<Figure>> {
        let run = "docker-run-network";
        if !self.wants(run) && !self.wants_any(&FIGURES) {
            return Ok(Vec::new());
        }
        let registry = Registry::start(self.host)?;
        registry.push(&Image::busybox()?, "library/busybox", "latest")?;
        let theirs = Dockerd::start(self.host, registry.address(), Bridge::Default)?;
        let options = DaemonOptions { registry: Some(registry.address().to_owned()), ..Default::default() };
        let ours = Daemon::start_from(self.host, self.bundle.dir(), options)?;
        let program = super::program("transfer")?;
        let layer = {
            let mut layer = LayerBuilder::new();
            layer.file("bin/transfer", 0o755, &std::fs::read(&program)?)?;
            layer.finish()?
        };
        let archive = Image::busybox()?.with_layer(layer).archive(IMAGE)?;
        let mut samples = Samples::default();
        let daemons = [("bulkhead", ours.docker()), (PEER, theirs.docker())];
        for (_, docker) in &daemons {
            docker.run_with(&["load"], archive.clone())?.ok()?;
        }
        docker_run(&daemons[0].1)?;
        ours.await_template(1)?;
        if self.wants_any(&FIGURES) {
            let host = Server::start(self.host, &program)?;
            let ends = daemons
                .iter()
                .map(|(name, docker)| Ok((*name, Ends::start(docker)?)))
                .collect::<Result<Vec<_>>>()?;
            for _ in 0..self.args.rounds {
                for (name, ends) in &ends {
                    ends.measure(name, &host, &mut samples)?;
                }
            }
        }
        if self.wants(run) {
            for round in 0..=self.args.rounds {
                for (name, docker) in &daemons {
                    let start = Instant::now();
                    docker_run(docker)?;
                    // The first round warms caches.
                    if round > 0 {
                        samples.add_time(&format!("{name} {run}"), start.elapsed());
                    }
                }
            }
        }
        let figure = |name: &&str| {
            let (ours, theirs) = (format!("bulkhead {name}"), format!("{PEER} {name}"));
            Figure::beside(name, Unit::Milliseconds, &samples, &ours, (PEER, &theirs))
        };
        let measured = |name: &&str| samples.has(&format!("bulkhead {name}"));
        FIGURES.iter().chain([&run]).filter(|name| measured(name)).map(figure).collect()
    }
}

fn docker_run(docker: &Docker) -> Result<String> {
    docker.ok(&["run", "--rm", IMAGE, "true"])
}

/// Two containers of one daemon, one of which serves.
struct Ends {
    client: Container,
    _server: Container,
    address: String,
    gateway: String,
}

impl Ends {
    fn start(docker: &Docker) -> Result<Ends> {
        let server = docker.run_detached(&[IMAGE, "transfer", "serve", "7000"])?;
        let client = docker.run_detached(&[IMAGE, "sleep", "100000"])?;
        while server.docker(&["logs"])?.is_empty() {}
        let field = |field| docker.inspect(server.name(), &format!("{{{{.NetworkSettings.{field}}}}}"));
        let (address, gateway) = (field("IPAddress")?, field("Gateway")?);
        Ok(Ends { client, _server: server, address, gateway })
    }

    fn measure(&self, name: &str, host: &Server, samples: &mut Samples) -> Result<()> {
        let (server, to_host) = (format!("{}:7000", self.address), format!("{}:7001", self.gateway));
        let inside = |words: &[&str]| self.client.exec(&[&["transfer"], words].concat());
        let outside = |words: &[&str]| host.client(words);
        let mut add = |figure: &str, output: String| {
            let nanoseconds: u64 = output.trim().parse().with_context(|| output.clone())?;
            samples.add(&format!("{name} {figure}"), nanoseconds);
            anyhow::Ok(())
        };
        add("net-host-to-guest", outside(&["send", &server, SIZE])?)?;
        add("net-guest-to-host", inside(&["send", &to_host, SIZE])?)?;
        add("net-guest-to-guest", inside(&["send", &server, SIZE])?)?;
        add("net-host-asks-guest", outside(&["ask", &server, QUESTIONS])?)?;
        add("net-guest-asks-host", inside(&["ask", &to_host, QUESTIONS])?)?;
        add("net-guest-asks-guest", inside(&["ask", &server, QUESTIONS])?)
    }
}

/// The program as a server in the host; ended when dropped.
struct Server {
    host: Host,
    program: String,
    scratch: Scratch,
}

impl Server {
    fn start(host: &Host, program: &std::path::Path) -> Result<Server> {
        let (scratch, program) = (host.scratch()?, program.display().to_string());
        let script = "\"$1\" serve 7001 >\"$2/out\" 2>&1 & echo $! >\"$2/pid\"; until [ -s \"$2/out\" ]; do sleep 0.1; done";
        host.sh(script, &[&program, &scratch.path().display().to_string()])?;
        Ok(Server { host: host.clone(), program, scratch })
    }

    fn client(&self, words: &[&str]) -> Result<String> {
        let output = self.host.command(&self.program).args(words).stdin(Stdio::null()).output()?;
        if !output.status.success() {
            bail!("{words:?}: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.host.sh("kill \"$(cat \"$1\")\"", &[&self.scratch.join("pid")]);
    }
}
