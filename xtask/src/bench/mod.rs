//! Measures beside others, in one run, in turns: ours, theirs, ours, theirs… What is compared is always side by side
//! on one machine in one state; a figure of another day says nothing.
//!
//! ```text
//!  xtask bench (here)                     in the host
//!   builds, starts daemons  ────────────▶ bulkheadd, dockerd
//!   docker CLI, forwarded sockets ──────▶   docker-run-cli
//!   exec ───────────────────────────────▶ xtask bench-probe: boots VMMs, drives both APIs, prints nanoseconds
//! ```

mod dockerd;
mod figures;
pub(crate) mod probe;

use std::fs;
use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use bulkhead_tests::image::Image;
use bulkhead_tests::{Daemon, DaemonOptions, Docker, Host, Registry};
use clap::Args;

use self::dockerd::Dockerd;
use self::figures::{Figure, Samples};
use crate::bundle::{self, Bundle};
use crate::deps;
use crate::tree::Tree;
use crate::venue::{self, Venue};

#[derive(Args)]
pub(crate) struct BenchArgs {
    /// How often each thing is measured.
    #[arg(long, default_value_t = 10, value_name = "N")]
    rounds: u32,
    /// Measure what `install` installs (link-time optimised, minutes to build) and not what the tests run.
    #[arg(long)]
    dist: bool,
    /// Only figures whose name contains this.
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
}

const MEMORY_MIB: u32 = 6144;

pub(crate) fn run(tree: &Tree, args: &BenchArgs) -> Result<()> {
    if args.rounds == 0 {
        bail!("nothing comes of no rounds");
    }
    deps::ensure()?;
    let bundle = bundle::build(tree, if args.dist { "dist" } else { "release" })?;
    let venue = venue::choose(&bundle)?;
    println!("measuring on {}", venue.describe());
    let place = venue.open(tree, "bench", MEMORY_MIB)?;
    let bench = Bench { host: &place.host, bundle: &bundle, args };
    let figures = [bench.boots()?, bench.containers()?].concat();
    print!("{}", figures::table(&figures));
    if venue == Venue::TestHost {
        println!(
            "Emulated: a time here is CPU time of a software CPU. Ratios between programs hold, but exaggerate whichever \
             runs much code once; the docker CLI itself runs outside, at full speed."
        );
    }
    let path = tree.target().join("bench/results.json");
    fs::create_dir_all(tree.target().join("bench"))?;
    fs::write(&path, serde_json::to_vec_pretty(&figures)?)
        .with_context(|| format!("write {}", path.display()))?;
    println!("{}", path.display());
    Ok(())
}

struct Bench<'a> {
    host: &'a Host,
    bundle: &'a Bundle,
    args: &'a BenchArgs,
}

impl Bench<'_> {
    fn wants(&self, name: &str) -> bool {
        self.args.only.as_deref().is_none_or(|part| name.contains(part))
    }

    /// Machines without a daemon.
    fn boots(&self) -> Result<Vec<Figure>> {
        let mut figures = Vec::new();
        if self.wants("vmm-start-to-init") {
            let samples = self.probe(&["boot", "--until", "init"])?;
            figures.push(Figure::beside("vmm-start-to-init", &samples, "bulkhead", "qemu-microvm")?);
        }
        if self.wants("start-to-agent-ready") {
            let samples = self.probe(&["boot", "--until", "agent-ready"])?;
            figures.push(Figure::alone("start-to-agent-ready", &samples, "bulkhead")?);
        }
        Ok(figures)
    }

    /// `docker run --rm --network none busybox true`: the network is left out on both sides, being another figure.
    fn containers(&self) -> Result<Vec<Figure>> {
        if !self.wants("docker-run-api") && !self.wants("docker-run-cli") {
            return Ok(Vec::new());
        }
        let registry = Registry::start(self.host)?;
        registry.push(&Image::busybox()?, "library/busybox", "latest")?;
        let options =
            DaemonOptions { registry: Some(registry.address().to_owned()), ..DaemonOptions::default() };
        let ours = Daemon::start_from(self.host, self.bundle.dir(), options)?;
        let theirs = Dockerd::start(self.host, registry.address())?;
        for docker in [ours.docker(), theirs.docker()] {
            docker.ok(&["pull", "-q", "busybox"])?;
        }
        let mut figures = Vec::new();
        if self.wants("docker-run-api") {
            let (a, b) = (
                format!("bulkhead={}", ours.inner_socket()),
                format!("dockerd-runc={}", theirs.inner_socket()),
            );
            let samples = self.probe(&["run", "--daemon", &a, "--daemon", &b])?;
            figures.push(Figure::beside("docker-run-api", &samples, "bulkhead", "dockerd-runc")?);
        }
        if self.wants("docker-run-cli") {
            let samples = self.by_cli(&[("bulkhead", ours.docker()), ("dockerd-runc", theirs.docker())])?;
            figures.push(Figure::beside("docker-run-cli", &samples, "bulkhead", "dockerd-runc")?);
        }
        Ok(figures)
    }

    fn by_cli(&self, daemons: &[(&str, Docker)]) -> Result<Samples> {
        let mut samples = Samples::default();
        for round in 0..=self.args.rounds {
            for (name, docker) in daemons {
                let start = Instant::now();
                docker.ok(&["run", "--rm", "--network", "none", "busybox", "true"])?;
                // The first round warms caches.
                if round > 0 {
                    samples.add(name, start.elapsed());
                }
            }
        }
        Ok(samples)
    }

    /// Runs the probe in the host.
    fn probe(&self, arguments: &[&str]) -> Result<Samples> {
        let mut command = self.host.command(std::env::current_exe()?);
        command.arg("bench-probe").args(arguments).args(["--rounds", &self.args.rounds.to_string()]);
        command.arg("--bundle").arg(self.bundle.dir());
        let output = command.stdin(Stdio::null()).stderr(Stdio::inherit()).output()?;
        if !output.status.success() {
            bail!("bench-probe {}: {}", arguments.join(" "), output.status);
        }
        Samples::parse(&output.stdout)
    }
}
