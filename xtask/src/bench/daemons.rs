//! The figures that need daemons: ours, ours without templates, and Docker's with runc.
//!
//! Ours clones microVMs of a template, which it makes in the background at the first start: it is waited for, since
//! a daemon makes one once in its life. The other one of ours boots every kernel.

use std::time::Instant;

use anyhow::{Context, Result};
use bulkhead_tests::image::Image;
use bulkhead_tests::{Daemon, DaemonOptions, Docker, Registry};

use super::Bench;
use super::dockerd::{Bridge, Dockerd};
use super::figures::{Aim, Figure, Samples, Unit};

const PEER: &str = "dockerd-runc";
const COLD: &str = "bulkhead-cold";

/// What each container figure's name begins with.
const NAMES: [&str; 6] = ["docker-run-api", "docker-run-cli", "start-", "idle-", "containers-held", "known-"];

impl Bench<'_> {
    /// Containers, all of them without a network, on both sides: that is another figure.
    pub(super) fn containers(&self, figures: &mut Vec<Figure>, notes: &mut Vec<String>) -> Result<()> {
        if !self.wants_any(&NAMES) {
            return Ok(());
        }
        let registry = Registry::start(self.host)?;
        registry.push(&Image::busybox()?, "library/busybox", "latest")?;
        let start = |arguments: &[&str]| {
            let arguments = arguments.iter().map(|&argument| argument.to_owned()).collect();
            let registry = Some(registry.address().to_owned());
            let options = DaemonOptions { registry, arguments, ..DaemonOptions::default() };
            let daemon = Daemon::start_from(self.host, self.bundle.dir(), options)?;
            daemon.docker().ok(&["pull", "-q", "busybox"])?;
            anyhow::Ok(daemon)
        };
        let ours = start(&[])?;
        let cold = start(&["--templates=false"])?;
        let theirs = Dockerd::start(self.host, registry.address(), Bridge::None)?;
        theirs.docker().ok(&["pull", "-q", "busybox"])?;
        let socket = |name: &str, socket: &str| format!("{name}={socket}");
        let bulkhead = socket("bulkhead", &ours.inner_socket());
        let cold = socket(COLD, &cold.inner_socket());
        let runc = socket(PEER, &theirs.inner_socket());
        self.probe(&["warm", "--daemon", &bulkhead])?;

        if self.wants("docker-run-api") {
            let rounds = self.args.rounds.to_string();
            let mut command = vec!["run", "--rounds", &rounds];
            [&bulkhead, &cold, &runc].iter().for_each(|daemon| command.extend(["--daemon", daemon]));
            let samples = Samples::parse(&self.probe(&command)?)?;
            figures.push(run_figure("docker-run-api", &samples, "bulkhead")?.aim(Aim::Ratio(0.25)));
            figures.push(run_figure("docker-run-api-cold", &samples, COLD)?);
            notes.push(self.phases("docker-run-api", &bulkhead)?);
            notes.push(self.phases("docker-run-api-cold", &cold)?);
        }
        if self.wants("docker-run-cli") {
            let samples = self.by_cli(&[("bulkhead", ours.docker()), (PEER, theirs.docker())])?;
            figures.push(run_figure("docker-run-cli", &samples, "bulkhead")?.aim(Aim::Ratio(0.25)));
        }
        if self.wants_any(&["start-", "idle-"]) {
            figures.extend(self.bursts(&[&bulkhead, &cold, &runc])?);
        }
        if self.wants("known-") {
            let (rounds, count) = (self.args.rounds.to_string(), self.args.known.to_string());
            let command =
                ["known", "--rounds", &rounds, "--count", &count, "--daemon", &bulkhead, "--daemon", &runc];
            let samples = Samples::parse(&self.probe(&command)?)?;
            for what in ["create", "ps", "inspect", "events"] {
                let (name, ours) = (format!("known-{count}-{what}"), format!("bulkhead {what}"));
                let peer = format!("{PEER} {what}");
                figures.push(Figure::beside(&name, Unit::Milliseconds, &samples, &ours, (PEER, &peer))?);
            }
        }
        if self.wants("containers-held") {
            let seconds = self.args.fill_seconds.to_string();
            let samples = self.probe(&["fill", "--daemon", &bulkhead, "--seconds", &seconds])?;
            let samples = Samples::parse(&samples)?;
            figures.push(Figure::alone("containers-held", Unit::Count, &samples, "bulkhead held")?);
            if samples.has("bulkhead full") && samples.sum("bulkhead full") == 0 {
                notes.push(format!("containers-held: memory was left when {seconds} s were over"));
            }
        }
        Ok(())
    }

    fn bursts(&self, daemons: &[&str]) -> Result<Vec<Figure>> {
        let counts: Vec<String> = self.args.counts.iter().map(ToString::to_string).collect();
        let (counts, rounds) = (counts.join(","), self.args.rounds.to_string());
        let mut command = vec!["burst", "--rounds", &rounds, "--counts", &counts];
        daemons.iter().for_each(|daemon| command.extend(["--daemon", daemon]));
        let samples = Samples::parse(&self.probe(&command)?)?;
        let mut figures = Vec::new();
        for count in &self.args.counts {
            for (who, suffix) in [("bulkhead", ""), (COLD, "-cold")] {
                let both = |name: &str, unit, part: &str| {
                    let (ours, theirs) = (format!("{who} {count}{part}"), format!("{PEER} {count}{part}"));
                    let name = format!("{}{suffix}", name.replace('N', &count.to_string()));
                    Figure::beside(&name, unit, &samples, &ours, (PEER, &theirs))
                };
                figures.push(both("start-N-at-once", Unit::Milliseconds, "")?);
                let idle = both("idle-N-private", Unit::Mebibytes, " memory")?;
                figures.push(if who == COLD { idle } else { idle.aim(Aim::AtMost(8.0)) });
                figures.push(both("idle-N-vmm", Unit::Mebibytes, " own")?.aim(Aim::AtMost(3.0)));
                figures.push(both("idle-N-host", Unit::Mebibytes, " host")?);
            }
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
                    samples.add_time(name, start.elapsed());
                }
            }
        }
        Ok(samples)
    }

    /// Where our daemon's time went, as it recorded it: the medians of the stages.
    fn phases(&self, figure: &str, daemon: &str) -> Result<String> {
        let output = self.probe(&["phases", "--daemon", daemon])?;
        let text = String::from_utf8_lossy(&output);
        let (order, samples) = text.split_once('\n').context("phases")?;
        let order: Vec<String> = serde_json::from_str(order)?;
        let samples = Samples::parse(samples.trim().as_bytes())?;
        let steps = order.iter().map(|stage| Ok(format!("{stage} {:.1}", samples.median_ms(stage)?)));
        let steps = steps.collect::<Result<Vec<_>>>()?.join(" · ");
        Ok(format!("where {figure} goes, median ms to each stage from the one before: {steps}"))
    }
}

fn run_figure(name: &str, samples: &Samples, ours: &str) -> Result<Figure> {
    Figure::beside(name, Unit::Milliseconds, samples, ours, (PEER, PEER))
}
