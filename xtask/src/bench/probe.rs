//! The part of the benchmark that runs in the host, so that nothing between here and there is timed. Prints
//! [`Samples`].

mod boot;

use std::io::Read;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use bulkhead_tests::http::Client;
use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Value, json};

use super::figures::Samples;

#[derive(Args)]
pub(crate) struct ProbeArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Boot machines.
    Boot {
        #[arg(long, value_enum)]
        until: Until,
        #[command(flatten)]
        common: Common,
    },
    /// Run containers through daemons' APIs.
    Run {
        /// NAME=SOCKET
        #[arg(long = "daemon", required = true)]
        daemons: Vec<String>,
        #[command(flatten)]
        common: Common,
    },
}

#[derive(Args)]
struct Common {
    #[arg(long)]
    rounds: u32,
    #[arg(long)]
    bundle: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Until {
    /// The first line of an init that prints one.
    Init,
    /// The agent's first message.
    AgentReady,
}

pub(crate) fn run(args: &ProbeArgs) -> Result<()> {
    let samples = match &args.what {
        What::Boot { until: Until::Init, common } => boot::until_init(&common.bundle, common.rounds)?,
        What::Boot { until: Until::AgentReady, common } => {
            boot::until_agent_ready(&common.bundle, common.rounds)?
        }
        What::Run { daemons, common } => containers(daemons, common.rounds)?,
    };
    println!("{}", samples.to_json()?);
    Ok(())
}

fn containers(daemons: &[String], rounds: u32) -> Result<Samples> {
    let mut samples = Samples::default();
    for round in 0..=rounds {
        for daemon in daemons {
            let (name, socket) = daemon.split_once('=').context("NAME=SOCKET")?;
            let start = Instant::now();
            run_container(&Client::new(socket)).with_context(|| name.to_owned())?;
            // The first round warms caches.
            if round > 0 {
                samples.add(name, start.elapsed());
            }
        }
    }
    Ok(samples)
}

/// What the CLI sends for `docker run --rm --network none busybox true`, and nothing else.
fn run_container(api: &Client) -> Result<()> {
    let create = json!({
        "Image": "busybox",
        "Cmd": ["true"],
        "AttachStdout": true,
        "AttachStderr": true,
        "HostConfig": {"AutoRemove": true, "NetworkMode": "none"},
    });
    let created = api.json("POST", "/v1.41/containers/create", &create)?.success()?.json()?;
    let id = created["Id"].as_str().context("no Id")?;
    let upgrade = [("Connection", "Upgrade"), ("Upgrade", "tcp")];
    let (head, mut output) = api.open(
        "POST",
        &format!("/v1.41/containers/{id}/attach?stream=1&stdout=1&stderr=1"),
        &upgrade,
        b"",
    )?;
    if head.status != 101 {
        bail!("attach: status {}", head.status);
    }
    let (head, mut wait) =
        api.open("POST", &format!("/v1.41/containers/{id}/wait?condition=removed"), &[], b"")?;
    api.request("POST", &format!("/v1.41/containers/{id}/start"), &[], b"")?.success()?;
    output.read_to_end(&mut Vec::new())?;
    let ended: Value = serde_json::from_slice(&wait.read_body(&head)?)?;
    if ended["StatusCode"] != 0 {
        bail!("the container ended with {ended}");
    }
    Ok(())
}
