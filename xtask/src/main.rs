//! `cargo xtask`: every chore of the project, typed. `cargo xtask help` lists them.

mod bench;
mod bundle;
mod demo;
mod deps;
mod docker_py;
mod fuzz;
mod host;
mod install;
mod kernel;
mod node;
mod posix;
mod python;
mod sh;
mod test;
mod tidy;
mod tree;
mod venue;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::tree::Tree;

/// The chores of the Bulkhead work tree.
#[derive(Parser)]
#[command(name = "cargo xtask", version, max_term_width = 100)]
struct Cli {
    /// The work tree. Default: the nearest one above the current directory.
    #[arg(long, global = true, value_name = "DIR")]
    tree: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// See docker run a container in a microVM, from a fresh clone.
    Demo(demo::DemoArgs),
    /// Every check and test: lints, unit tests, end-to-end tests.
    Test(test::TestArgs),
    /// Fuzz one target with libFuzzer, for as long as is wanted. Needs a C++ compiler.
    Fuzz(fuzz::FuzzArgs),
    /// Measure beside dockerd and QEMU; writes target/bench/results.json.
    Bench(bench::BenchArgs),
    /// What CI runs: packages, then every check and test.
    Ci,
    /// Install what the project needs of Debian.
    Deps(deps::DepsArgs),
    /// Build everything a host runs into target/bulkhead/.
    Build(bundle::BuildArgs),
    /// Build for production, and install with a systemd unit.
    Install(install::InstallArgs),
    /// Check boundaries and habits that no compiler checks.
    Tidy,
    /// The test host: a Linux with a working /dev/kvm, for machines that have none.
    Host(host::HostArgs),
    /// Build the kernels that kernel-config/ describes; cached outside the tree.
    Kernel(kernel::KernelArgs),
    /// The part of the benchmark that runs in the host.
    #[command(hide = true)]
    BenchProbe(bench::probe::ProbeArgs),
    /// What the test host runs as PID 1.
    #[command(hide = true)]
    HostInit(host::init::InitArgs),
    /// What the test host's PID 1 starts to serve commands.
    #[command(hide = true)]
    HostServe(host::serve::ServeArgs),
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::from(125)
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode> {
    if !matches!(cli.command, Command::HostInit(_) | Command::HostServe(_)) {
        let path = deps::path_with_tools()?;
        // SAFETY: nothing has started a thread yet, so nobody reads the environment meanwhile.
        unsafe { std::env::set_var("PATH", path) };
    }
    let tree = || Tree::find(cli.tree.as_deref());
    match cli.command {
        Command::Demo(args) => demo::run(&tree()?, &args).map(|()| ExitCode::SUCCESS),
        Command::Test(args) => test::run(&tree()?, &args).map(|()| ExitCode::SUCCESS),
        Command::Fuzz(args) => fuzz::run(&tree()?, &args).map(|()| ExitCode::SUCCESS),
        Command::Bench(args) => bench::run(&tree()?, &args).map(|()| ExitCode::SUCCESS),
        Command::BenchProbe(args) => bench::probe::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Ci => test::run(&tree()?, &test::TestArgs::default()).map(|()| ExitCode::SUCCESS),
        Command::Deps(args) => deps::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Build(args) => bundle::run(&tree()?, &args).map(|()| ExitCode::SUCCESS),
        Command::Install(args) => install::run(&tree()?, &args).map(|()| ExitCode::SUCCESS),
        Command::Tidy => tidy::run(&tree()?).map(|()| ExitCode::SUCCESS),
        Command::Host(args) => host::run(&tree()?, args),
        Command::Kernel(args) => kernel::run(&tree()?, &args).map(|()| ExitCode::SUCCESS),
        Command::HostInit(args) => host::init::run(&args),
        Command::HostServe(args) => host::serve::run(&args).map(|()| ExitCode::SUCCESS),
    }
}
