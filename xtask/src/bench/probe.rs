//! The part of the benchmark that runs in the host, so that nothing between here and there is timed. Prints
//! [`Samples`].

mod boot;
mod containers;
mod firecracker;
mod known;
mod layers;
mod machine;
mod memory;
mod ours;
mod qemu;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};

use self::containers::Daemon;
use super::figures::Samples;

#[derive(Args)]
pub(crate) struct ProbeArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Boot machines to their init and to their end.
    Init {
        #[command(flatten)]
        machines: Machines,
    },
    /// Boot machines to their agent's first message, and restore saved ones.
    Agent {
        /// Leave the saved ones out.
        #[arg(long)]
        cold_only: bool,
        #[command(flatten)]
        machines: Machines,
    },
    /// Boot one machine and print its console.
    Show {
        #[arg(long)]
        bundle: PathBuf,
        /// With the agent, and what a container's machine has.
        #[arg(long)]
        agent: bool,
        /// More words for the command line.
        #[arg(last = true)]
        more: Vec<String>,
    },
    /// Wait until a daemon of ours clones.
    Warm {
        #[command(flatten)]
        daemons: Daemons,
    },
    /// Run containers one after the other.
    Run {
        #[command(flatten)]
        daemons: Daemons,
        #[arg(long)]
        rounds: u32,
    },
    /// Start many at once, and look at their memory.
    Burst {
        #[command(flatten)]
        daemons: Daemons,
        #[arg(long)]
        rounds: u32,
        #[arg(long, value_delimiter = ',', required = true)]
        counts: Vec<usize>,
    },
    /// Start as many as there is room for.
    Fill {
        #[command(flatten)]
        daemons: Daemons,
        #[arg(long)]
        seconds: u64,
    },
    /// Create many and ask about them.
    Known {
        #[command(flatten)]
        daemons: Daemons,
        #[arg(long)]
        rounds: u32,
        #[arg(long)]
        count: usize,
    },
    /// Give a layer to a machine in several ways.
    Layers {
        #[arg(long)]
        bundle: PathBuf,
        #[arg(long)]
        rounds: u32,
        /// The layer as the store has it.
        #[arg(long)]
        directory: PathBuf,
        /// The same as an EROFS image.
        #[arg(long)]
        erofs: PathBuf,
        /// The program that measures.
        #[arg(long)]
        program: PathBuf,
    },
    /// Say where a daemon's time went.
    Phases {
        #[command(flatten)]
        daemons: Daemons,
    },
}

#[derive(Args)]
struct Machines {
    #[arg(long)]
    rounds: u32,
    #[arg(long)]
    bundle: PathBuf,
    #[arg(long)]
    firecracker: Option<PathBuf>,
}

#[derive(Args)]
struct Daemons {
    /// NAME=SOCKET
    #[arg(long = "daemon", required = true)]
    daemons: Vec<Daemon>,
}

impl Daemons {
    fn first(&self) -> Result<&Daemon> {
        self.daemons.first().context("no daemon")
    }
}

pub(crate) fn run(args: &ProbeArgs) -> Result<()> {
    let samples = match &args.what {
        What::Init { machines: Machines { rounds, bundle, firecracker } } => {
            boot::init_and_exit(bundle, *rounds, firecracker.as_deref())?
        }
        What::Agent { machines: Machines { rounds, bundle, firecracker }, cold_only } => {
            boot::agent(bundle, *rounds, firecracker.as_deref(), !cold_only)?
        }
        What::Show { bundle, agent, more } => return boot::show(bundle, &more.join(" "), *agent),
        What::Warm { daemons } => return containers::warm(daemons.first()?),
        What::Run { daemons, rounds } => containers::run(&daemons.daemons, *rounds)?,
        What::Burst { daemons, rounds, counts } => containers::burst(&daemons.daemons, *rounds, counts)?,
        What::Fill { daemons, seconds } => containers::fill(daemons.first()?, Duration::from_secs(*seconds))?,
        What::Known { daemons, rounds, count } => known::known(&daemons.daemons, *rounds, *count)?,
        What::Layers { bundle, rounds, directory, erofs, program } => {
            layers::ways(bundle, &layers::Layer { directory, erofs, program }, *rounds)?
        }
        What::Phases { daemons } => {
            let (samples, order): (Samples, _) = containers::phases(daemons.first()?)?;
            println!("{}", serde_json::to_string(&order)?);
            samples
        }
    };
    println!("{}", samples.to_json()?);
    Ok(())
}
