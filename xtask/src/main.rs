//! `cargo xtask`: every chore of the project, typed. `cargo xtask help` lists them.

mod bundle;
mod deps;
mod host;
mod install;
mod kernel;
mod sh;
mod tidy;
mod tree;

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
    let tree = || Tree::find(cli.tree.as_deref());
    match cli.command {
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
