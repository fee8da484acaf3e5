//! What is sent arrives as it was: between containers, and between a container and the host, each way.

use std::env;

use bulkhead_tests::docker::Container;

use crate::{Network, Test, docker, host};

/// MiB each way. An emulated CPU makes, hashes and moves every byte several times: a GiB each way, which
/// `BULKHEAD_TEST_TRANSFER_MIB=1024` asks for, takes it half an hour.
fn mebibytes() -> String {
    env::var("BULKHEAD_TEST_TRANSFER_MIB").unwrap_or_else(|_| "16".into())
}

/// Sends `$1` MiB to `$2`, port 99, and prints their hash.
const SEND: &str = "cd $(mktemp -d); mkfifo copy; sha256sum <copy >sum & \
                    dd if=/dev/urandom bs=64k count=$((16 * $1)) 2>/dev/null | tee copy | nc $2 99; wait; cat sum";

/// Prints the hash of what one connection to port 99 brings. (Its own side stays open, else nc would take its end
/// for the connection's.)
const RECEIVE: &str = "cd $(mktemp -d); mkfifo open; exec 3<>open; nc -l -p 99 <&3 | sha256sum";

/// The host has the program as busybox's alone.
const NC: &str = "nc() { busybox nc \"$@\"; };";

/// Waits until somebody listens.
const LISTENED: &str = "until grep -q ':0063 0*:0000 0A' /proc/net/tcp /proc/net/tcp6; do sleep 0.1; done";

/// Starts a receiver.
fn receiver(network: &Network) -> anyhow::Result<Container> {
    let container =
        network.docker.run_detached(&["--network", &network.name, "busybox", "sh", "-c", RECEIVE])?;
    container.exec(&["sh", "-c", LISTENED])?;
    Ok(container)
}

fn received(container: &Container) -> anyhow::Result<String> {
    container.docker(&["wait"])?;
    container.docker(&["logs"])
}

fn send(network: &Network, to: &str) -> anyhow::Result<String> {
    let size = mebibytes();
    let words = ["run", "--rm", "--network", &network.name, "busybox", "sh", "-c", SEND, "sh", &size, to];
    network.docker.ok(&words)
}

#[test]
fn what_is_sent_arrives_between_containers_with_frames_of_9000_bytes() -> Test {
    let network = Network::create(&docker()?, &["-o", "com.docker.network.driver.mtu=9000"])?;
    let container = receiver(&network)?;
    let sent = send(&network, container.name())?;
    assert_eq!(sent.len(), 67, "{sent}");
    assert_eq!(received(&container)?, sent);
    Ok(())
}

#[test]
fn what_is_sent_arrives_between_host_and_container() -> Test {
    let network = Network::create(&docker()?, &[])?;
    let container = receiver(&network)?;
    let address = container.docker(&[
        "inspect",
        "--format",
        "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}",
    ])?;
    let sent = host()?.sh(&format!("{NC} {SEND}"), &[&mebibytes(), &address])?;
    assert_eq!(sent.len(), 67, "{sent}");
    assert_eq!(received(&container)?, sent);
    let gateway = network.inspect("{{range .IPAM.Config}}{{.Gateway}}{{end}}")?;
    let sum = host()?.sh("mktemp", &[])?;
    host()?.sh(&format!("{NC} ({RECEIVE}) >\"$1\" 2>&1 & {LISTENED}"), &[&sum])?;
    let sent = send(&network, &gateway)?;
    assert_eq!(host()?.sh("until [ -s \"$1\" ]; do sleep 0.1; done; cat \"$1\"", &[&sum])?, sent);
    Ok(())
}
