//! `bulkhead`: what Bulkhead has beyond Docker, for people. It talks to the daemon's API as docker does, and
//! needs nothing of the daemon's but its socket.

mod client;
mod vmm;

use std::{io::Write, process::ExitCode};

use bulkhead_daemon::api::{types::container::ForkedContainer, version};
use clap::Parser;
use client::{Client, ClientError};
use http::Method;

/// Looks into the microVMs of Bulkhead's containers.
#[derive(Parser)]
#[command(name = "bulkhead", version = version::DAEMON)]
struct Flags {
    /// The daemon's address: unix://PATH or tcp://HOST:PORT
    #[arg(
        short = 'H',
        long,
        global = true,
        env = "DOCKER_HOST",
        default_value = "unix:///run/bulkhead.sock",
        value_name = "HOST"
    )]
    host: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Show the guest's console: the last 16 KiB of what its kernel said; of a container whose microVM died,
    /// its last words. It takes no input
    Console {
        /// Go on showing what comes until the microVM ends
        #[arg(short, long)]
        follow: bool,
        /// Name or id
        container: String,
    },
    /// Make running clones of a running container, which share its memory until they change it, and print their
    /// names
    Fork {
        /// Name or id
        container: String,
        /// A clone for each; without any, one whose name is made up
        names: Vec<String>,
    },
    /// Show the figures of the container's microVM, and what happened in it last
    Vmm {
        /// For programs
        #[arg(long)]
        json: bool,
        /// Name or id
        container: String,
    },
}

fn main() -> ExitCode {
    let flags = Flags::parse();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let outcome = match runtime {
        Ok(runtime) => runtime.block_on(run(&flags)),
        Err(error) => Err(error.into()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read has read enough.
        Err(ClientError::Io(error)) if error.kind() == std::io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bulkhead: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(flags: &Flags) -> Result<(), ClientError> {
    let client = Client::new(&flags.host)?;
    let mut out = std::io::stdout().lock();
    match &flags.command {
        Command::Console { follow, container } => {
            let path = client::path(&["bulkhead", "containers", container, "console"]);
            let query = if *follow { "?follow=1" } else { "" };
            let mut body = client.get(&format!("{path}{query}")).await?;
            while let Some(piece) = body.next().await? {
                out.write_all(client::printable(&piece).as_bytes())?;
                out.flush()?;
            }
        }
        Command::Fork { container, names } => {
            let path = client::path(&["bulkhead", "containers", container, "fork"]);
            let body = serde_json::json!({ "Names": names }).to_string().into();
            let text = client.request(Method::POST, &path, body).await?.text().await?;
            for clone in client::parse::<Vec<ForkedContainer>>(&text)? {
                writeln!(out, "{}", clone.name)?;
            }
        }
        Command::Vmm { json, container } => {
            let path = client::path(&["bulkhead", "containers", container, "vmm"]);
            let text = client.get(&path).await?.text().await?;
            if *json {
                out.write_all(&text)?;
            } else {
                out.write_all(vmm::render(&client::parse(&text)?).as_bytes())?;
            }
        }
    }
    Ok(())
}
