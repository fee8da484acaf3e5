//! The build itself: source unpacked once, one build directory a kernel, removed when done.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};

use super::Plan;
use super::options::{Lost, Options};
use crate::sh;

/// Makes the plan's kernel. What is in the cache is always whole: it is moved there last.
pub(crate) fn build(plan: &Plan) -> Result<()> {
    let _lock = lock(plan)?;
    if plan.vmlinux().is_file() {
        return Ok(()); // Another process built it meanwhile.
    }
    let (source, output) = configure(plan)?;
    compile(plan, &source, &output)?;
    let new = plan.directory().with_extension("new");
    fs::create_dir_all(&new)?;
    sh::run(Command::new("strip").arg("-o").arg(new.join("vmlinux")).arg(output.join("vmlinux")))?;
    fs::copy(output.join(".config"), new.join("config"))?;
    fs::rename(&new, plan.directory()).context("move the kernel into the cache")?;
    fs::remove_dir_all(&output)?;
    Ok(())
}

/// Configures and stops there.
pub(crate) fn check(plan: &Plan) -> Result<()> {
    let _lock = lock(plan)?;
    let (_, output) = configure(plan)?;
    Ok(fs::remove_dir_all(output)?)
}

/// One build at a time: two would only halve each other's speed.
fn lock(plan: &Plan) -> Result<File> {
    fs::create_dir_all(&plan.cache)?;
    let file = File::create(plan.cache.join("lock"))?;
    if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        println!("kernel {}: waiting for another build", plan.set.name());
        flock(&file, FlockOperation::LockExclusive)?;
    }
    Ok(file)
}

/// The source and a build directory with the final `.config`.
fn configure(plan: &Plan) -> Result<(PathBuf, PathBuf)> {
    let source = unpack(plan)?;
    let output = plan.cache.join(format!("build-{}-{}", plan.set.name(), plan.key));
    fs::create_dir_all(&output)?;
    let config = output.join(".config");
    make(&source, &output, "allnoconfig")?;
    let mut text = fs::read_to_string(&config)?;
    text.push_str(&plan.options.to_text());
    fs::write(&config, text)?;
    make(&source, &output, "olddefconfig")?;
    let lost = plan.options.lost_in(&Options::of_config(&fs::read_to_string(&config)?));
    if lost.is_empty() {
        return Ok((source, output));
    }
    fs::remove_dir_all(&output)?;
    bail!("kernel {}: options that did not survive:\n{}", plan.set.name(), describe(&lost))
}

fn describe(lost: &[Lost]) -> String {
    let line = |lost: &Lost| match &lost.got {
        Some(got) => format!("  {} asked {}, got {got}", lost.name, lost.asked),
        None => format!("  {} asked {}: unknown, or its dependencies are not met", lost.name, lost.asked),
    };
    lost.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// Quiet: kconfig warns of each option that a later line sets again, which is how fragments work.
fn make(source: &Path, output: &Path, target: &str) -> Result<()> {
    sh::output(
        Command::new("make")
            .arg("-s")
            .arg("-C")
            .arg(source)
            .arg(format!("O={}", output.display()))
            .arg(target),
    )
    .map(drop)
}

fn unpack(plan: &Plan) -> Result<PathBuf> {
    let source = plan.cache.join(format!("source-{}", plan.source_version));
    if source.is_dir() {
        return Ok(source);
    }
    println!("kernel {}: unpacking {}", plan.set.name(), plan.tarball.display());
    let new = source.with_extension("new");
    let _ = fs::remove_dir_all(&new);
    fs::create_dir_all(&new)?;
    let mut tar = Command::new("tar");
    tar.args(["--strip-components=1", "-xf"]).arg(&plan.tarball).arg("-C").arg(&new);
    sh::run(&mut tar).with_context(|| format!("unpack {}", plan.tarball.display()))?;
    fs::rename(&new, &source)?;
    Ok(source)
}

fn compile(plan: &Plan, source: &Path, output: &Path) -> Result<()> {
    let jobs = std::thread::available_parallelism().map_or(2, usize::from);
    let log_path = plan.cache.join(format!("{}.log", plan.set.name()));
    let log = File::create(&log_path)?;
    let mut child = Command::new("nice")
        .args(["-n", "10", "make"])
        .arg(format!("-j{jobs}"))
        .arg("-C")
        .arg(source)
        .arg(format!("O={}", output.display()))
        .arg("vmlinux")
        .env("KBUILD_BUILD_USER", "bulkhead")
        .env("KBUILD_BUILD_HOST", "bulkhead")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .context("start make")?;
    let mut progress = Progress::new(plan.set.name(), plan.objects);
    if let Some(stdout) = child.stdout.take() {
        for line in BufReader::new(stdout).lines() {
            progress.line(&line?);
        }
    }
    let status = child.wait()?;
    if !status.success() {
        let log = fs::read_to_string(&log_path).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        let tail = lines.get(lines.len().saturating_sub(30)..).unwrap_or_default().join("\n");
        bail!("kernel {}: make: {status}\n{tail}\n(all of it: {})", plan.set.name(), log_path.display());
    }
    progress.done();
    Ok(())
}

/// A line for every tenth of the expected number of compiled files.
struct Progress {
    name: &'static str,
    expected: u32,
    compiled: u32,
    tenths: u32,
    start: Instant,
}

impl Progress {
    fn new(name: &'static str, expected: u32) -> Progress {
        println!("kernel {name}: building, about {expected} files");
        Progress { name, expected: expected.max(1), compiled: 0, tenths: 0, start: Instant::now() }
    }

    fn line(&mut self, line: &str) {
        if !matches!(line.split_whitespace().next(), Some("CC" | "AS")) {
            return;
        }
        self.compiled += 1;
        let tenths = (self.compiled * 10 / self.expected).min(9);
        if tenths > self.tenths {
            self.tenths = tenths;
            println!(
                "kernel {}: {tenths}0%, {} files, {} s",
                self.name,
                self.compiled,
                self.start.elapsed().as_secs()
            );
        }
    }

    fn done(&self) {
        println!(
            "kernel {}: built {} files in {} s",
            self.name,
            self.compiled,
            self.start.elapsed().as_secs()
        );
    }
}
