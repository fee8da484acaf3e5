//! From a fresh clone to `docker run` in a microVM, step by step.

use std::io::Read;
use std::process::Command;

use anyhow::Result;
use bulkhead_tests::image::Image;
use bulkhead_tests::{Daemon, DaemonOptions, Docker, Registry};
use clap::Args;

use crate::bundle;
use crate::deps;
use crate::sh;
use crate::tree::Tree;
use crate::venue;

#[derive(Args)]
pub(crate) struct DemoArgs {
    /// Leave the daemon up afterwards, to try more, until Enter is pressed.
    #[arg(long)]
    keep: bool,
}

pub(crate) fn run(tree: &Tree, args: &DemoArgs) -> Result<()> {
    step("packages");
    deps::ensure()?;
    step("daemon, VMM, guest agent and guest kernel");
    let bundle = bundle::build(tree, "release")?;
    let venue = venue::choose(&bundle)?;
    step(&format!("host: {}", venue.describe()));
    let place = venue.open(tree, "demo", 4096)?;
    step("a registry on the host's loopback, with busybox in it");
    let registry = Registry::start(&place.host)?;
    registry.push(&Image::busybox()?, "library/busybox", "latest")?;
    step("bulkheadd, with that registry for Docker Hub");
    let options = DaemonOptions { registry: Some(registry.address().to_owned()), ..DaemonOptions::default() };
    let daemon = Daemon::start_from(&place.host, bundle.dir(), options)?;
    let docker = daemon.docker();
    show(&docker, &["version", "--format", "client {{.Client.Version}}, server {{.Server.Version}}"])?;
    show(&docker, &["pull", "busybox"])?;
    show(&docker, &["run", "--rm", "busybox", "uname", "-r"])?;
    println!("$ uname -r        # on the host of that container");
    println!("{}", place.host.sh("uname -r", &[])?);
    if args.keep {
        println!(
            "\nTry:  DOCKER_HOST=unix://{} docker run -it --rm busybox\nEnter stops the daemon.",
            daemon.socket()
        );
        let _ = std::io::stdin().read(&mut [0]);
    }
    Ok(())
}

fn step(text: &str) {
    println!("\n== {text}");
}

/// Runs it as a person would see it.
fn show(docker: &Docker, args: &[&str]) -> Result<()> {
    println!("$ docker {}", args.join(" "));
    let mut command: Command = docker.command(args);
    sh::run(&mut command)
}
