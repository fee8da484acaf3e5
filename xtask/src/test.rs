//! Every check and test. Lints and unit tests need neither root nor KVM; end-to-end tests get a daemon, a registry
//! and real clients.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use bulkhead_tests::daemon::BUNDLE_VARIABLE;
use bulkhead_tests::hostile::GUEST_VARIABLE;
use bulkhead_tests::image::Image;
use bulkhead_tests::posix::PROGRAMS_VARIABLE;
use bulkhead_tests::suite::{DEVCONTAINER_VARIABLE, NODE_VARIABLE, PYTHON_VARIABLE, SuiteOwner};
use bulkhead_tests::{Host, Registry};
use clap::{Args, ValueEnum};

use crate::bench::dockerd::{Bridge, Dockerd};
use crate::bundle::{self, Bundle, cargo};
use crate::deps;
use crate::docker_py;
use crate::node;
use crate::posix;
use crate::python;
use crate::sh;
use crate::tidy;
use crate::tree::Tree;
use crate::venue::{self, Place, Venue};

/// For one daemon with its registry and a dozen microVMs.
const MEMORY_MIB: u32 = 6144;

#[derive(Args, Default)]
pub(crate) struct TestArgs {
    /// Which part. Default: all of them.
    #[arg(value_enum)]
    part: Option<Part>,
    /// Only tests whose name contains one of these.
    filter: Vec<String>,
    /// Run end-to-end tests on what lies in target/bulkhead/, without building it anew.
    #[arg(long)]
    built: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Formatting, clippy, licences, boundaries.
    Lint,
    /// What needs neither root nor KVM.
    Unit,
    /// Real clients against a real daemon.
    E2e,
    /// The integration tests of Docker's library for Python.
    DockerPy,
    /// The CLI's tables against Debian's dockerd: whether what is expected of us is what Docker does.
    Table,
}

pub(crate) fn run(tree: &Tree, args: &TestArgs) -> Result<()> {
    let parts = args.part.map_or_else(|| vec![Part::Lint, Part::Unit, Part::E2e], |part| vec![part]);
    if args.part != Some(Part::Lint) && args.part != Some(Part::Unit) {
        deps::ensure()?;
    }
    for part in parts {
        let start = Instant::now();
        match part {
            Part::Lint => lint(tree),
            Part::Unit => unit(tree, &args.filter),
            Part::E2e => end_to_end(tree, args),
            Part::DockerPy => {
                let bundle =
                    if args.built { Bundle::existing(tree)? } else { bundle::build(tree, "release")? };
                docker_py::run(tree, &bundle, &args.filter)
            }
            Part::Table => table(tree),
        }?;
        println!("{part:?}: passed in {} s", start.elapsed().as_secs());
    }
    Ok(())
}

fn lint(tree: &Tree) -> Result<()> {
    sh::run(cargo(tree).args(["fmt", "--all", "--check"]))?;
    tidy::run(tree)?;
    if sh::output(cargo(tree).args(["deny", "--version"])).is_ok() {
        sh::run(cargo(tree).args([
            "deny",
            "--offline",
            "--log-level",
            "error",
            "check",
            "licenses",
            "bans",
            "sources",
        ]))?;
    } else {
        println!("cargo-deny is not installed: licences are not checked");
    }
    sh::run(cargo(tree).args(["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"]))
}

fn unit(tree: &Tree, filter: &[String]) -> Result<()> {
    let mut tests = cargo(tree);
    // Where a registry is at hand, the client's tests ask it too.
    tests.env("PATH", deps::path_with_tools()?);
    if has_nextest(tree) {
        tests.args(["nextest", "run", "--workspace", "--status-level", "fail", "--no-tests", "pass"]);
    } else {
        // Without nextest the end-to-end tests are left out by target, not by its filter.
        tests.args(["test", "--quiet", "--workspace", "--lib", "--bins"]);
    }
    sh::run(tests.args(filter))
}

fn end_to_end(tree: &Tree, args: &TestArgs) -> Result<()> {
    let filter = args.filter.as_slice();
    let bundle = if args.built { Bundle::existing(tree)? } else { bundle::build(tree, "release")? };
    sh::run(test_command(tree, "e2e").arg("--no-run"))?;
    let guest = bundle::build_hostile_guest(tree)?;
    let posix = posix::ensure()?;
    let venue = venue::choose(&bundle)?;
    println!("end-to-end tests run on {}", venue.describe());
    // An emulated host keeps one CPU busy and no more: with two CPUs, two hosts share the tests.
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    let shares =
        if venue == Venue::TestHost && filter.is_empty() && has_nextest(tree) { cpus.clamp(1, 2) } else { 1 };
    let machine_tests = if filter.is_empty() { Some(machine_tests(tree)?) } else { None };
    let programs = &Programs { bundle: &bundle, hostile_guest: &guest, posix: &posix };
    thread::scope(|scope| {
        let machine_tests = machine_tests.as_deref();
        let run = |share| {
            // The last share, since the first has the longest test.
            let machine_tests = machine_tests.filter(|_| share == shares);
            scope.spawn(move || run_share(tree, programs, venue, filter, machine_tests, (share, shares)))
        };
        let runs: Vec<_> = (1..=shares).map(run).collect();
        let outcomes: Vec<Result<()>> = runs
            .into_iter()
            .map(|run| run.join().unwrap_or_else(|_| bail!("a share of the tests panicked")))
            .collect();
        for (share, outcome) in outcomes.iter().enumerate() {
            if let Err(error) = outcome {
                eprintln!("share {} of {shares}: {error:#}", share + 1);
            }
        }
        outcomes.into_iter().collect()
    })
}

/// Builds the guest agent's tests on a machine of their own and gives the program.
fn machine_tests(tree: &Tree) -> Result<PathBuf> {
    let built = sh::output(cargo(tree).args([
        "test",
        "--quiet",
        "--no-run",
        "-p",
        "bulkhead-agent",
        "--test",
        "machine",
        "--message-format",
        "json",
    ]))?;
    built
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        // Beside the agent's own program, which cargo builds too.
        .filter(|message| message["target"]["name"] == "machine")
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .context("cargo named no program for the agent's machine tests")
}

/// What end-to-end tests want to have been built.
pub(crate) struct Programs<'a> {
    pub(crate) bundle: &'a Bundle,
    pub(crate) hostile_guest: &'a Path,
    pub(crate) posix: &'a Path,
}

/// Runs the tests of one share of several, in a host of its own.
fn run_share(
    tree: &Tree,
    programs: &Programs<'_>,
    venue: Venue,
    filter: &[String],
    machine_tests: Option<&Path>,
    (share, of): (usize, usize),
) -> Result<()> {
    let place = venue.open(tree, &format!("e2e-{share}"), MEMORY_MIB)?;
    let bundle = programs.bundle;
    let on_machine = machine_tests.map(|program| {
        // Bounded: a guest that hangs must not hold up everything else for ever.
        let mut command = place.host.command("timeout");
        command.args(["-k", "10", "600"]).arg(program);
        command.env("BULKHEAD_VMM", bundle.vmm()).env("BULKHEAD_KERNEL", bundle.kernel());
        // Layers need a file system with extended attributes of users: in the test host, /run and not /tmp.
        command.env("BULKHEAD_INITRAMFS", bundle.initramfs()).env("TMPDIR", "/run");
        sh::run(&mut command).context("the guest agent's tests on a machine")
    });
    let suite = SuiteOwner::start(&place.host, bundle.dir()).with_context(|| console(&place))?;
    let mut tests = suite_command(tree, &place.host, &suite, programs, "e2e")?;
    if of > 1 {
        tests.args(["--partition", &format!("count:{share}/{of}")]);
    }
    if let Err(failed) = sh::run(tests.args(filter)) {
        let log = tree.target().join(format!("e2e-{share}.log"));
        std::fs::write(&log, suite.daemon_log().unwrap_or_default())?;
        bail!("{failed}; the shared daemon's log: {}", log.display());
    }
    suite.finish()?;
    // What came after it was run nonetheless: one failure hides no other.
    on_machine.unwrap_or(Ok(()))
}

/// The tests on a suite, still to be told which.
pub(crate) fn suite_command(
    tree: &Tree,
    host: &Host,
    suite: &SuiteOwner,
    programs: &Programs<'_>,
    profile: &str,
) -> Result<Command> {
    let mut tests = test_command(tree, profile);
    tests.env(BUNDLE_VARIABLE, programs.bundle.dir()).env(GUEST_VARIABLE, programs.hostile_guest);
    tests.env(PYTHON_VARIABLE, python::site(&python::TESTCONTAINERS)?);
    let devcontainers = node::devcontainers()?;
    tests.env(NODE_VARIABLE, devcontainers.node).env(DEVCONTAINER_VARIABLE, devcontainers.script);
    tests.env(PROGRAMS_VARIABLE, programs.posix).envs([host.to_env()?, suite.to_env()?]);
    Ok(tests)
}

/// Has dockerd meet the expectations that the CLI's tables record.
fn table(tree: &Tree) -> Result<()> {
    let place = venue::choose(&Bundle::existing(tree)?)?.open(tree, "table", MEMORY_MIB)?;
    let registry = Registry::start(&place.host)?;
    registry.push(&Image::busybox()?, "library/busybox", "latest")?;
    let dockerd = Dockerd::start(&place.host, registry.address(), Bridge::None)?;
    dockerd.docker().ok(&["pull", "-q", "busybox"])?;
    let mut tests = test_command(tree, "e2e");
    tests.env("BULKHEAD_TABLE_DOCKER", format!("unix://{}", dockerd.socket()));
    sh::run(tests.args(["--test", "cli", "--no-fail-fast", "table::"]))
}

pub(crate) fn test_command(tree: &Tree, profile: &str) -> Command {
    let mut command = cargo(tree);
    if has_nextest(tree) {
        command.args(["nextest", "run", "--profile", profile, "-p", "bulkhead-tests"]);
    } else {
        command.args(["test", "-p", "bulkhead-tests", "--tests"]);
    }
    command
}

fn has_nextest(tree: &Tree) -> bool {
    sh::output(cargo(tree).args(["nextest", "--version"])).is_ok()
}

fn console(place: &Place) -> String {
    match place.console() {
        Some(console) if !console.is_empty() => {
            format!("start of the suite; console of the test host:\n{console}")
        }
        _ => "start of the suite".to_owned(),
    }
}
