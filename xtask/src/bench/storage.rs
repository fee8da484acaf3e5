//! What files cost: a tree of small files and a large one in an image's layer, what is written to the writable layer,
//! and pulling an image; beside dockerd with overlay2 and runc.
//!
//! A container is started anew for each round, so what is read first is read with nothing in its kernel's caches; the
//! host has it cached on both sides.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bulkhead_tests::image::{Image, Layer, LayerBuilder};
use bulkhead_tests::{Daemon, DaemonOptions, Docker, Host, Registry};

use super::Bench;
use super::dockerd::{Bridge, Dockerd};
use super::figures::{Figure, Samples, Unit};

const PEER: &str = "dockerd-runc";
/// Our daemon, whose guests read files; and one whose guests map large files in a window.
const READ: &str = "bulkhead";
const MAPPED: &str = "bulkhead-window";
const WINDOW_MIB: u32 = 256;
const IMAGE: &str = "files:latest";

/// The tree: directories, files in each, and the bytes of each.
const TREE: (usize, usize, usize) = (200, 100, 1500);

/// What the program in the container prints.
const FIGURES: [&str; 8] =
    ["walk", "walk-again", "read", "read-again", "read-large", "read-large-again", "write", "fsync"];

const PULL: &str = "fs-pull";
const PULLED: &str = "library/large";
/// The pulled image: layers, and MiB of each.
const LAYERS: (usize, usize) = (4, 125);

impl Bench<'_> {
    pub(super) fn storage(&self, figures: &mut Vec<Figure>, notes: &mut Vec<String>) -> Result<()> {
        let (inside, shared) = (FIGURES.map(|name| format!("fs-{name}")), self.wants("fs-shared"));
        let inside = inside.iter().any(|name| self.wants(name));
        if inside || shared {
            let registry = Registry::start(self.host)?;
            let theirs = Dockerd::start(self.host, registry.address(), Bridge::None)?;
            let start = |window: u32| {
                let arguments = vec![format!("--layer-window-mib={window}")];
                let registry = Some(registry.address().to_owned());
                let options = DaemonOptions { registry, arguments, ..Default::default() };
                Daemon::start_from(self.host, self.bundle.dir(), options)
            };
            let (read, mapped) = (start(0)?, start(WINDOW_MIB)?);
            let daemons = [(READ, read.docker()), (MAPPED, mapped.docker()), (PEER, theirs.docker())];
            let archive = Image::busybox()?.with_layer(self.layer()?).archive(IMAGE)?;
            for (_, docker) in &daemons {
                docker.run_with(&["load"], archive.clone())?.ok()?;
            }
            drop(archive);
            for daemon in [&read, &mapped] {
                daemon.docker().ok(&["run", "--rm", "--network", "none", IMAGE, "true"])?;
                daemon.await_template(1)?;
            }
            if inside {
                figures.extend(self.in_containers(&daemons)?);
            }
            if shared {
                figures.extend(self.shared(&daemons)?);
            }
        }
        if self.wants("layer-") {
            figures.extend(self.ways()?);
        }
        if self.wants(PULL) {
            // No guest is needed for it: natively, where a dockerd can run.
            match self.pulls(&Host::Direct) {
                Ok(figure) => figures.push(figure),
                Err(error) => notes.push(format!("{PULL}: not measured: {error:#}")),
            }
        }
        Ok(())
    }

    /// A tree of small files, a large one, and the program that measures.
    fn layer(&self) -> Result<Layer> {
        let mut layer = LayerBuilder::new();
        layer.file("bin/files", 0o755, &std::fs::read(super::program("files")?)?)?;
        let (directories, files, size) = TREE;
        layer.directory("tree", 0o755)?;
        for directory in 0..directories {
            layer.directory(&format!("tree/{directory}"), 0o755)?;
            for file in 0..files {
                layer.file(&format!("tree/{directory}/a-small-file-{file}"), 0o644, &noise(file, size))?;
            }
        }
        layer.file("large", 0o644, &noise(1, self.args.large_mib << 20))?;
        layer.finish()
    }

    fn in_containers(&self, daemons: &[(&str, Docker)]) -> Result<Vec<Figure>> {
        let mut samples = Samples::default();
        for round in 0..=self.args.rounds {
            for (name, docker) in daemons {
                let words = ["run", "--rm", "--network", "none", IMAGE];
                let printed = docker.ok(&[&words[..], &["files", "/tree", "/large", "/written"]].concat())?;
                // The first round warms the host's caches.
                for line in printed.lines().filter(|_| round > 0) {
                    let (figure, nanoseconds) = line.split_once(' ').context("NAME NANOSECONDS")?;
                    samples.add(&format!("{name} {figure}"), nanoseconds.parse()?);
                }
            }
        }
        let mut figures = Vec::new();
        for figure in FIGURES.iter().filter(|name| self.wants(&format!("fs-{name}"))) {
            for (who, suffix) in [(READ, ""), (MAPPED, "-window")] {
                let (name, theirs) = (format!("fs-{figure}{suffix}"), format!("{PEER} {figure}"));
                let ours = format!("{who} {figure}");
                figures.push(Figure::beside(&name, Unit::Milliseconds, &samples, &ours, (PEER, &theirs))?);
            }
        }
        Ok(figures)
    }

    /// What the host's memory falls by for each of several containers that have read all of the image's large file.
    fn shared(&self, daemons: &[(&str, Docker)]) -> Result<Vec<Figure>> {
        let available = || {
            let script = "sync; awk '/^MemAvailable:/ { print $2 }' /proc/meminfo";
            let kib: u64 = self.host.sh(script, &[])?.parse()?;
            anyhow::Ok(kib << 10)
        };
        let (mut samples, mut figures) = (Samples::default(), Vec::new());
        for &count in &self.args.counts {
            for (name, docker) in daemons {
                let before = available()?;
                let mut containers = Vec::new();
                for _ in 0..count {
                    let read = "cat /large > /dev/null && echo up && exec sleep 100000";
                    let words = ["--network", "none", IMAGE, "sh", "-c", read];
                    containers.push(docker.run_detached(&words)?);
                }
                for container in &containers {
                    while !container.docker(&["logs"])?.contains("up") {
                        thread::sleep(Duration::from_millis(200));
                    }
                }
                let taken = before.saturating_sub(available()?) / count.max(1) as u64;
                samples.add(&format!("{name} {count}"), taken);
            }
            let (mapped, theirs) = (format!("{MAPPED} {count}"), format!("{READ} {count}"));
            let (name, runc) = (format!("fs-shared-{count}"), format!("{PEER} {count}"));
            let unit = Unit::Mebibytes;
            figures.push(Figure::beside(&name, unit, &samples, &theirs, (PEER, &runc))?);
            figures.push(Figure::beside(
                &format!("{name}-window"),
                unit,
                &samples,
                &mapped,
                (READ, &theirs),
            )?);
        }
        Ok(figures)
    }

    /// The ways of giving a layer to a guest.
    fn ways(&self) -> Result<Vec<Figure>> {
        let daemon = Daemon::start_from(self.host, self.bundle.dir(), DaemonOptions::default())?;
        let image = Image::new(vec![self.layer()?], serde_json::json!({}));
        let layer = image.diff_ids().pop().context("no layer")?;
        let archive = image.archive("layer:latest")?;
        daemon.docker().run_with(&["load"], archive.clone())?.ok()?;
        let directory = format!("{}/layers/{}/root", daemon.data_root(), layer.trim_start_matches("sha256:"));
        let scratch = self.host.scratch()?;
        // Both from one archive: the second is made of what tar unpacks.
        let tar = crate::tree::Tree::find(None)?.target().join("bench/layer.tar");
        std::fs::write(&tar, &archive)?;
        let make = "mkdir \"$1/a\" \"$1/l\" && tar -xf \"$2\" -C \"$1/a\" && tar -xf \"$1\"/a/*/layer.tar -C \"$1/l\" && \
                    rm -r \"$1/a\" && mkfs.erofs \"$1/erofs\" \"$1/l\" >/dev/null && rm -r \"$1/l\"";
        let path = scratch.path().display().to_string();
        self.host.sh(make, &[&path, &tar.display().to_string()])?;
        let (rounds, bundle) = (self.args.rounds.to_string(), self.bundle.dir().display().to_string());
        let (erofs, program) = (scratch.join("erofs"), super::program("files")?.display().to_string());
        let arguments = ["layers", "--rounds", &rounds, "--bundle", &bundle, "--directory", &directory];
        let samples = [&arguments[..], &["--erofs", &erofs, "--program", &program]].concat();
        let samples = Samples::parse(&self.probe(&samples)?)?;
        let mut figures = Vec::new();
        let times = ["mount", "walk", "walk-again", "read", "read-again", "read-large", "read-large-again"];
        let times = times.iter().map(|name| (*name, Unit::Milliseconds));
        for (what, unit) in times.chain(["guest", "own"].map(|name| (name, Unit::Mebibytes))) {
            let erofs = format!("erofs {what}");
            for (way, suffix) in [("directory", ""), ("window", "-window")] {
                let (name, ours) = (format!("layer-{what}{suffix}"), format!("{way} {what}"));
                figures.push(Figure::beside(&name, unit, &samples, &ours, ("erofs", &erofs))?);
            }
        }
        Ok(figures)
    }

    fn pulls(&self, host: &Host) -> Result<Figure> {
        let registry = Registry::start(host)?;
        let theirs = Dockerd::start(host, registry.address(), Bridge::None)?;
        let options = DaemonOptions { registry: Some(registry.address().to_owned()), ..Default::default() };
        let ours = Daemon::start_from(host, self.bundle.dir(), options)?;
        let (count, mib) = LAYERS;
        let layer = |number: usize| -> Result<Layer> {
            let mut layer = LayerBuilder::new();
            // Files of the sizes that a distribution has, and of content that halves when it is compressed.
            for file in 0..mib * 8 {
                let name = format!("layer-{number}/{}/{file}", file % 50);
                layer.file(&name, 0o644, &noise(number * 10_000 + file, 128 << 10))?;
            }
            layer.finish()
        };
        let layers = (0..count).map(layer).collect::<Result<Vec<_>>>()?;
        registry.push(&Image::new(layers, serde_json::json!({})), PULLED, "latest")?;
        let mut samples = Samples::default();
        for round in 0..=self.args.rounds {
            for (name, docker) in [("bulkhead", ours.docker()), (PEER, theirs.docker())] {
                let start = Instant::now();
                docker.ok(&["pull", "-q", "large"])?;
                let taken = start.elapsed();
                docker.ok(&["rmi", "large"])?;
                // The first round warms the host's caches.
                if round > 0 {
                    samples.add_time(name, taken);
                }
            }
        }
        Figure::beside(PULL, Unit::Milliseconds, &samples, "bulkhead", (PEER, PEER))
    }
}

/// Bytes that differ from file to file, and repeat themselves once.
fn noise(seed: usize, size: usize) -> Vec<u8> {
    let mut state = seed as u64 * 2 + 1;
    let mut half = Vec::with_capacity(size / 2 + 8);
    while half.len() < size.div_ceil(2) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        half.extend_from_slice(&state.to_le_bytes());
        // Nearer than the window of any compression.
        half.extend_from_slice(&state.to_le_bytes());
    }
    let mut bytes = half.repeat(2);
    bytes.truncate(size);
    bytes
}
