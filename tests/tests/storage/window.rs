//! Large files of layers, mapped in a window of shared memory.

use anyhow::{Context, ensure};
use bulkhead_tests::image::{Image, LayerBuilder};
use bulkhead_tests::{DaemonOptions, Host, with_daemon};
use sha2::{Digest, Sha256};

use crate::Test;

/// Of the window; the file is larger, so that what was mapped first has to go again.
const WINDOW_MIB: usize = 16;

#[test]
fn a_guest_maps_what_the_host_has_cached_also_when_it_is_saved_or_cut_short() -> Test {
    let large: Vec<u8> = (0..u32::try_from((WINDOW_MIB + 8) << 18)?)
        .flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes())
        .collect();
    let mut layer = LayerBuilder::new();
    layer.file("large", 0o644, &large)?;
    let image = Image::busybox()?.with_layer(layer.finish()?);
    let expected = format!("{}  /large", hex::encode(Sha256::digest(&large)));
    let options = DaemonOptions {
        arguments: vec![format!("--layer-window-mib={WINDOW_MIB}")],
        ..DaemonOptions::default()
    };
    let host = Host::from_env()?;
    with_daemon(options, |daemon| {
        let docker = daemon.docker();
        docker.run_with(&["load"], image.archive("mapped:latest")?)?.ok()?;
        // busybox, which every exec runs, is large enough to be mapped itself.
        let container = docker.run_detached(&["mapped", "sleep", "100000"])?;
        let sum = || container.exec(&["sha256sum", "/large"]);
        let mapped = || -> anyhow::Result<usize> {
            let pid = docker.inspect(container.name(), "{{.State.Pid}}")?;
            Ok(host.sh("grep -c '/large$' \"/proc/$1/maps\" || true", &[&pid])?.parse()?)
        };
        assert_eq!(sum()?, expected);
        assert_eq!(sum()?, expected, "once more, when others' places are taken");
        ensure!(mapped()? > 0, "the file is read and not mapped");
        // Written from there to the disk, and back.
        assert_eq!(
            container.exec(&["sh", "-c", "cp /large /copy && cmp /large /copy && echo same"])?,
            "same"
        );

        // A machine that is saved has in its window what it had.
        docker.ok(&["checkpoint", "create", container.name(), "one"])?;
        docker.ok(&["start", "--checkpoint", "one", container.name()])?;
        ensure!(mapped()? > 0, "nothing was mapped again");
        assert_eq!(sum()?, expected);

        // Nobody does this to a layer; a guest whose file loses its end finds zeros or an error, and lives.
        let layer = image.diff_ids().pop().context("no layer")?;
        let path =
            format!("{}/layers/{}/root/large", daemon.data_root(), layer.trim_start_matches("sha256:"));
        container.exec(&["sh", "-c", "head -c 8000000 /large | tail -c 1"])?;
        host.sh("truncate -s 1M \"$1\"", &[&path])?;
        let cut = container.exec(&["sh", "-c", "sha256sum /large || true; echo alive"])?;
        ensure!(cut.ends_with("alive") && !cut.contains(&expected), "{cut}");
        assert_eq!(docker.inspect(container.name(), "{{.State.Status}}")?, "running");
        Ok(())
    })
}
