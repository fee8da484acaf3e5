//! What the store takes, what it says that it takes, and what it gives back.

use anyhow::{Context, Result, ensure};
use bulkhead_tests::image::{Image, LayerBuilder};
use bulkhead_tests::{Daemon, DaemonOptions, Docker, Host, with_daemon};
use serde_json::Value;

use crate::Test;

const MIB: usize = 1 << 20;

/// An image of a layer that it shares with others of its kind, and one of its own.
fn image(own_mib: usize, seed: u32) -> Result<Image> {
    let noise = |bytes: usize, seed: u32| -> Result<Vec<u8>> {
        let words = u32::try_from(bytes / 4)?;
        Ok((0..words).flat_map(|n| (n ^ seed).wrapping_mul(2_654_435_761).to_le_bytes()).collect())
    };
    let mut layers = Vec::new();
    for (name, bytes, seed) in [("common", 8 * MIB, 1), ("own", own_mib * MIB, seed)] {
        let mut layer = LayerBuilder::new();
        layer.file(name, 0o644, &noise(bytes, seed)?)?;
        layers.push(layer.finish()?);
    }
    Ok(Image::new(layers, serde_json::json!({"Cmd": ["/none"]})))
}

fn usage(daemon: &Daemon) -> Result<Value> {
    daemon.api().request("GET", "/v1.41/system/df", &[], b"")?.success()?.json()
}

/// Bytes that the layer store takes on the host's disk.
fn on_disk(host: &Host, daemon: &Daemon) -> Result<u64> {
    let kib: u64 = host.sh("du -sk \"$1/layers\" | cut -f1", &[&daemon.data_root()])?.parse()?;
    Ok(kib << 10)
}

fn load(docker: &Docker, image: &Image, name: &str) -> Test {
    docker.run_with(&["load"], image.archive(name)?)?.ok().map(drop)
}

#[test]
fn layers_are_counted_to_the_byte_and_given_back_at_once_also_after_a_crash() -> Test {
    let host = Host::from_env()?;
    with_daemon(DaemonOptions::default(), |daemon| {
        let docker = daemon.docker();
        let empty = on_disk(&host, daemon)?;
        let (first, second) = (image(4, 2)?, image(2, 3)?);
        load(&docker, &first, "first:latest")?;
        load(&docker, &second, "second:latest")?;

        let mib = |mib: usize| Some((mib * MIB) as u64);
        let told = usage(daemon)?;
        assert_eq!(told["LayersSize"].as_u64(), mib(8 + 4 + 2), "{told}");
        for (image, own) in [(&first, 4), (&second, 2)] {
            let images = told["Images"].as_array().context("no Images")?;
            let told = images.iter().find(|told| told["Id"] == image.id()).context("not listed")?;
            assert_eq!(
                (told["SharedSize"].as_u64(), told["Size"].as_u64()),
                (mib(8), mib(8 + own)),
                "{told}"
            );
        }
        let full = on_disk(&host, daemon)?;
        ensure!(full - empty >= 14 * MIB as u64, "{empty} {full}");

        // A container keeps its image's layers; counts come from what is on disk, so a crash forgets none.
        let container = docker.container();
        docker.ok(&["create", "--name", container.name(), "first"])?;
        daemon.kill()?;
        daemon.start_again()?;
        let docker = daemon.docker();
        ensure!(docker.run(&["rmi", "first"])?.code != 0, "an image in use was removed");
        docker.ok(&["rmi", "second"])?;
        let after = on_disk(&host, daemon)?;
        let given = full - after;
        // Its own layer, and nothing of the common one.
        ensure!((2 * MIB as u64..6 * MIB as u64).contains(&given), "{given} bytes were given back");
        assert_eq!(usage(daemon)?["LayersSize"].as_u64(), mib(8 + 4));

        docker.ok(&["rm", container.name()])?;
        let pruned = daemon.api().request(
            "POST",
            "/v1.41/images/prune?filters=%7B%22dangling%22%3A%5B%22false%22%5D%7D",
            &[],
            b"",
        )?;
        let pruned = pruned.success()?.json()?;
        assert_eq!(pruned["SpaceReclaimed"].as_u64(), mib(8 + 4), "{pruned}");
        let left = on_disk(&host, daemon)?;
        ensure!(left <= empty + 64 * 1024, "{left} bytes are left of {full}, where {empty} were");
        assert_eq!(usage(daemon)?["LayersSize"].as_u64(), Some(0));
        Ok(())
    })
}
