//! Suites of others' for POSIX file systems: pjdfstest and fsx, on the writable layer and on a volume. What is
//! expected to fail stands in `tests/posix`, with the reason.

use anyhow::ensure;
use bulkhead_tests::{
    Container, Suite,
    image::{Image, LayerBuilder},
    posix, size,
};

use crate::{Test, Volume, docker};

/// The tests of pjdfstest on a volume, where each operation is a way to the host and back: parts of their names.
const OF_VOLUMES: [&str; 5] = ["::regular", "::dir", "utimensat::", "ftruncate::", "posix_fallocate::"];

fn image() -> anyhow::Result<Image> {
    let mut layer = LayerBuilder::new();
    let programs = ["pjdfstest", "fsx"].map(posix::program).into_iter().collect::<Result<Vec<_>, _>>()?;
    posix::add_programs(&mut layer, &programs)?;
    layer.file(
        "etc/passwd",
        0o644,
        b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\ntests:x:900:900::/:/bin/false\n",
    )?;
    layer.file("etc/group", 0o644, b"root:x:0:\nnogroup:x:65534:\ntests:x:900:\n")?;
    for (name, text) in [
        ("layer", include_str!("../../posix/layer.toml")),
        ("volume", include_str!("../../posix/volume.toml")),
        ("fsx", include_str!("../../posix/fsx.toml")),
    ] {
        layer.file(&format!("etc/{name}.toml"), 0o644, text.as_bytes())?;
    }
    layer.directory("layer", 0o755)?;
    Ok(Image::busybox()?.with_layer(layer.finish()?))
}

/// A container of that image, and the volume that it has at `/volume`.
fn start(purpose: &str) -> anyhow::Result<(Volume, Container)> {
    let suite = Suite::from_env()?;
    let docker = docker()?;
    suite.push(&image()?, "storage/posix", "1")?;
    docker.ok(&["pull", "-q", "storage/posix:1"])?;
    let volume = Volume::new(&docker, purpose);
    let container =
        docker.run_detached(&["-v", &volume.at("/volume"), "storage/posix:1", "sleep", "10000"])?;
    Ok((volume, container))
}

/// Runs pjdfstest at `/NAME`, with `/etc/NAME.toml`: the tests whose names contain one of these, or all.
fn pjdfstest(container: &Container, name: &str, names: &[&str]) -> Test {
    let (config, place) = (format!("/etc/{name}.toml"), format!("/{name}"));
    let script = "c=$1 p=$2; shift 2; pjdfstest -c $c -p $p -s /dev/shm -- \"$@\" 2>&1 || true";
    let told = container.exec(&[&["sh", "-c", script, "sh", &config, &place], names].concat())?;
    let summary = told.lines().last().unwrap_or_default();
    let failed: Vec<&str> = told
        .lines()
        .skip_while(|line| line.is_empty())
        .filter(|line| line.ends_with("FAILED") || line.ends_with("UNEXPECTEDLY"))
        .collect();
    ensure!(summary.starts_with("Summary: 0 failed") && failed.is_empty(), "{failed:#?}\n{told}");
    println!("{name}: {summary}");
    Ok(())
}

#[test]
#[ignore = "many emulated minutes: `cargo xtask bench --only whole-pjdfstest`"]
fn pjdfstest_finds_the_writable_layer_and_volumes_as_posix_has_them() -> Test {
    let (_volume, container) = start("pjdfstest")?;
    pjdfstest(&container, "layer", &[])?;
    pjdfstest(&container, "volume", if size::is_whole() { &[] } else { &OF_VOLUMES })
}

#[test]
fn fsx_finds_what_it_wrote_on_the_writable_layer_and_on_volumes() -> Test {
    let (_volume, container) = start("fsx")?;
    let operations = size(2000, 20_000).to_string();
    for place in ["/layer/file", "/volume/file"] {
        let script =
            "fsx -f /etc/fsx.toml -S 7 -N \"$1\" \"$2\" 2>&1 || { echo \"fsx: exit code $?\"; exit 1; }";
        let told = container.exec(&["sh", "-c", script, "sh", &operations, place])?;
        ensure!(told.contains("All operations completed"), "{place}: {told}");
    }
    Ok(())
}
