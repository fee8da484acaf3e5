//! Measures beside others, in one run, in turns: ours, theirs, ours, theirs… What is compared is always side by side
//! on one machine in one state; a figure of another day says nothing. What is measured, and how: docs/benchmarks.md.
//!
//! ```text
//!  xtask bench (here)                     in the host
//!   builds, starts daemons  ────────────▶ bulkheadd, dockerd
//!   docker CLI, forwarded sockets ──────▶   docker-run-cli
//!   exec ───────────────────────────────▶ xtask bench-probe: boots VMMs, drives both APIs, prints numbers
//! ```

mod daemons;
pub(crate) mod dockerd;
mod figures;
mod networks;
pub(crate) mod probe;
mod storage;
mod whole;

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use bulkhead_tests::Host;
use clap::Args;

use self::figures::{Aim, Figure, Samples, Unit};
use crate::bundle::{self, Bundle};
use crate::deps;
use crate::host::Equipment;
use crate::sh;
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
    /// Measure what was built before.
    #[arg(long, conflicts_with = "dist")]
    built: bool,
    /// Only figures whose name contains one of these.
    #[arg(long, value_name = "TEXT")]
    only: Vec<String>,
    /// Firecracker's executable, the peer of boots and restores; without it, QEMU's microvm machine is the peer of
    /// boots, and restores have none. docs/benchmarks.md tells how it is built.
    #[arg(long, env = "BULKHEAD_BENCH_FIRECRACKER", value_name = "PATH")]
    firecracker: Option<PathBuf>,
    /// How many containers are started at once, a row each.
    #[arg(long, value_delimiter = ',', default_value = "1,10,50", value_name = "N,N")]
    counts: Vec<usize>,
    /// The large file in the image with which file systems are measured.
    #[arg(long, default_value_t = 64, value_name = "MIB")]
    large_mib: usize,
    /// How many containers there are, created and not started, when lists and inspects are measured.
    #[arg(long, default_value_t = 1000, value_name = "N")]
    known: usize,
    /// How long containers are started at most, to see how many the host holds.
    #[arg(long, default_value_t = 300, value_name = "SECONDS")]
    fill_seconds: u64,
}

/// The test host's. Fifty guests of 512 MiB are lent its memory, and use a small part. Data lie on a disk: in memory they
/// would count as their container's, and writing them would cost nothing.
const EQUIPMENT: Equipment = Equipment { memory_mib: 6144, disk_gib: 16 };

pub(crate) fn run(tree: &Tree, args: &BenchArgs) -> Result<()> {
    if args.rounds == 0 {
        bail!("nothing comes of no rounds");
    }
    deps::ensure()?;
    let bundle = if args.built {
        Bundle::existing(tree)?
    } else {
        bundle::build(tree, if args.dist { "dist" } else { "release" })?
    };
    let firecracker =
        args.firecracker.as_ref().map(|path| path.canonicalize().with_context(|| path.display().to_string()));
    let firecracker = firecracker.transpose()?;
    let venue = venue::choose(&bundle)?;
    println!("measuring on {}", venue.describe());
    let place = venue.open_with(tree, "bench", EQUIPMENT)?;
    let bench = Bench { tree, host: &place.host, bundle: &bundle, args, firecracker };
    let (mut figures, mut notes) = (Vec::new(), Vec::new());
    // What was measured before something failed is shown.
    let outcome = bench.measure(&mut figures, &mut notes);
    print!("{}", figures::table(&figures));
    notes.iter().for_each(|note| println!("{note}"));
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
    outcome
}

struct Bench<'a> {
    tree: &'a Tree,
    host: &'a Host,
    bundle: &'a Bundle,
    args: &'a BenchArgs,
    firecracker: Option<PathBuf>,
}

impl Bench<'_> {
    fn measure(&self, figures: &mut Vec<Figure>, notes: &mut Vec<String>) -> Result<()> {
        figures.extend(self.machines()?);
        self.containers(figures, notes)?;
        figures.extend(self.networks()?);
        self.storage(figures, notes)?;
        self.whole(figures)
    }

    fn wants(&self, name: &str) -> bool {
        self.args.only.is_empty() || self.args.only.iter().any(|part| name.contains(part.as_str()))
    }

    fn wants_any(&self, names: &[&str]) -> bool {
        names.iter().any(|name| self.wants(name))
    }

    /// Machines without a daemon.
    fn machines(&self) -> Result<Vec<Figure>> {
        let mut figures = Vec::new();
        let (ms, mib) = (Unit::Milliseconds, Unit::Mebibytes);
        if self.wants_any(&["exec-to-init", "exec-to-exit"]) {
            let samples = self.probe_machines(&["init"])?;
            let peer = if self.firecracker.is_some() { "firecracker" } else { "qemu-microvm" };
            for part in ["init", "exit"] {
                let (ours, theirs) = (format!("bulkhead {part}"), format!("{peer} {part}"));
                let name = format!("exec-to-{part}");
                let figure = Figure::beside(&name, ms, &samples, &ours, (peer, &theirs))?;
                // What is aimed at is Firecracker; QEMU stands in.
                figures.push(if self.firecracker.is_some() { figure.aim(Aim::Ratio(0.8)) } else { figure });
            }
        }
        if self.wants_any(&["cold-to-agent", "restore-to-agent", "vmm-private"]) {
            let samples = self.probe_machines(&["agent"])?;
            let beside = |name: &str, unit, ours: &str, peer: (&str, &str)| {
                if samples.has(peer.1) {
                    Figure::beside(name, unit, &samples, ours, peer)
                } else {
                    Figure::alone(name, unit, &samples, ours)
                }
            };
            let firecracker = |what| ("firecracker", what);
            figures.push(beside("cold-to-agent", ms, "bulkhead cold", firecracker("firecracker cold"))?);
            let cold = ("own cold boot", "bulkhead cold");
            figures.push(beside("restore-to-agent", ms, "bulkhead restored", cold)?.aim(Aim::Ratio(0.15)));
            if self.firecracker.is_some() {
                let peer = firecracker("firecracker restored");
                figures.push(beside("restore-to-agent", ms, "bulkhead restored", peer)?);
            }
            for (name, ours, theirs) in [
                ("vmm-private-cold", "bulkhead cold own", "firecracker cold own"),
                ("vmm-private-restored", "bulkhead restored own", "firecracker restored own"),
            ] {
                figures.push(beside(name, mib, ours, firecracker(theirs))?.aim(Aim::AtMost(3.0)));
            }
        }
        Ok(figures)
    }

    fn probe_machines(&self, arguments: &[&str]) -> Result<Samples> {
        let mut command = vec![];
        command.extend_from_slice(arguments);
        let rounds = self.args.rounds.to_string();
        let bundle = self.bundle.dir().display().to_string();
        command.extend(["--rounds", &rounds, "--bundle", &bundle]);
        let firecracker = self.firecracker.as_ref().map(|path| path.display().to_string());
        if let Some(path) = &firecracker {
            command.extend(["--firecracker", path]);
        }
        Samples::parse(&self.probe(&command)?)
    }

    /// Runs the probe in the host.
    fn probe(&self, arguments: &[&str]) -> Result<Vec<u8>> {
        let mut command = self.host.command(std::env::current_exe()?);
        command.arg("bench-probe").args(arguments);
        let output = command.stdin(Stdio::null()).stderr(Stdio::inherit()).output()?;
        if !output.status.success() {
            bail!("bench-probe {}: {}", arguments.join(" "), output.status);
        }
        Ok(output.stdout)
    }
}

/// One of the programs that run in containers, static, below the target directory, which the host sees.
fn program(name: &str) -> Result<PathBuf> {
    let tree = Tree::find(None)?;
    let directory = tree.target().join("bench");
    fs::create_dir_all(&directory)?;
    let program = directory.join(name);
    let mut rustc = Command::new("rustc");
    rustc.args(["--edition", "2024", "-O", "-C", "target-feature=+crt-static", "-C", "panic=abort", "-o"]);
    sh::run(rustc.arg(&program).arg(tree.root().join(format!("tests/src/bin/{name}.rs"))))?;
    Ok(program)
}
