//! What is sent arrives as it was: between containers, and between a container and the host, each way.

use std::{
    io::Write,
    process::{Command, Stdio},
};

use anyhow::{Context, ensure};
use bulkhead_tests::{
    Suite,
    docker::Container,
    image::{Image, LayerBuilder},
    posix, size,
};
use sha2::{Digest, Sha256};

use crate::{Network, Test, docker, host};

const TRANSFER: &str = env!("CARGO_BIN_EXE_transfer");
const IMAGE: &str = "network/transfer:1";

/// What is sent: a block, again and again, each time behind its number. The sender has no need to hash it, which
/// takes an emulated CPU longer than all else.
struct Data {
    block: Vec<u8>,
    times: usize,
}

impl Data {
    fn new() -> Data {
        let mut state = u64::from(std::process::id()) | 1;
        let block = std::iter::repeat_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            state.to_be_bytes()
        });
        // 4 MiB.
        let block = block.take(1 << 19).flatten().collect();
        Data { block, times: size(64, 1024) / 4 }
    }

    /// As `sha256sum` prints it.
    fn hash(&self) -> String {
        let mut hash = Sha256::new();
        for number in 0..self.times {
            hash.update(format!("{number}\n"));
            hash.update(&self.block);
        }
        format!("{}  -", hex::encode(hash.finalize()))
    }

    /// Sends it by `transfer`, as a command runs it, to port 99 of an address.
    fn send(&self, mut transfer: Command, to: &str) -> Test {
        transfer.args(["repeat", &format!("{to}:99"), &self.times.to_string()]).stdin(Stdio::piped());
        let mut child = transfer.stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
        let written = child.stdin.take().context("no input")?.write_all(&self.block);
        let output = child.wait_with_output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(written?)
    }
}

/// Waits until somebody listens at port 99.
const LISTENED: &str = "until grep -q ':0063 0*:0000 0A' /proc/net/tcp /proc/net/tcp6; do sleep 0.1; done";

/// A network, and an image with the program.
fn network(options: &[&str]) -> anyhow::Result<Network> {
    let (suite, docker) = (Suite::from_env()?, docker()?);
    let mut layer = LayerBuilder::new();
    posix::add_programs(&mut layer, &[TRANSFER.into()])?;
    suite.push(&Image::busybox()?.with_layer(layer.finish()?), "network/transfer", "1")?;
    docker.ok(&["pull", "-q", IMAGE])?;
    Network::create(&docker, options)
}

/// Starts a container that prints the hash of what comes to its port 99.
fn receiver(network: &Network) -> anyhow::Result<Container> {
    let receive = "transfer receive 99 | sha256sum";
    let container = network.docker.run_detached(&["--network", &network.name, IMAGE, "sh", "-c", receive])?;
    container.exec(&["sh", "-c", LISTENED])?;
    Ok(container)
}

fn received(container: &Container) -> anyhow::Result<String> {
    container.docker(&["wait"])?;
    container.docker(&["logs"])
}

fn send(network: &Network, data: &Data, to: &str) -> Test {
    data.send(
        network.docker.command(&["run", "-i", "--rm", "--network", &network.name, IMAGE, "transfer"]),
        to,
    )
}

#[test]
fn what_is_sent_arrives_between_containers_with_frames_of_9000_bytes() -> Test {
    let network = network(&["-o", "com.docker.network.driver.mtu=9000"])?;
    let (container, data) = (receiver(&network)?, Data::new());
    send(&network, &data, container.name())?;
    assert_eq!(received(&container)?.trim_end(), data.hash());
    Ok(())
}

#[test]
fn what_is_sent_arrives_between_host_and_container() -> Test {
    let network = network(&[])?;
    let (container, data) = (receiver(&network)?, Data::new());
    let address = container.docker(&[
        "inspect",
        "--format",
        "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}",
    ])?;
    data.send(host()?.command(TRANSFER), &address)?;
    assert_eq!(received(&container)?.trim_end(), data.hash());
    let gateway = network.inspect("{{range .IPAM.Config}}{{.Gateway}}{{end}}")?;
    let sum = host()?.sh("mktemp", &[])?;
    let receive = format!("{{ \"$2\" receive 99 | sha256sum; }} >\"$1\" 2>&1 & {LISTENED}");
    host()?.sh(&receive, &[&sum, TRANSFER])?;
    send(&network, &data, &gateway)?;
    let came = host()?.sh("until [ -s \"$1\" ]; do sleep 0.1; done; cat \"$1\"", &[&sum])?;
    assert_eq!(came, data.hash());
    Ok(())
}
