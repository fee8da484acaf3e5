//! The integration tests of docker-py, Docker's own library for Python, against the daemon.
//!
//! ```text
//!  PyPI ─▶ cache: site/ (docker, pytest), suite/tests/     pytest, in the host ── unix socket ─▶ bulkheadd
//!                                                             denied.txt: what is not run, and why
//! ```
//!
//! The tests come out of the last source package of docker-py's that has them; they are run with the newest library.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};
use bulkhead_tests::image::{Image, LayerBuilder};
use bulkhead_tests::{Daemon, DaemonOptions, Registry};

use crate::bundle::Bundle;
use crate::python;
use crate::sh;
use crate::tree::{self, Tree};
use crate::venue::{self, Place};

/// What is installed of PyPI, by exact version: the cache's name has to change with it.
const LIBRARY: &str = "docker==7.2.0";
const PACKAGES: [&str; 4] =
    ["pytest==7.4.2", "pytest-timeout==2.1.0", "paramiko==3.5.1", "websocket-client==1.8.0"];

/// Later source packages have no tests.
const SUITE: &str = "docker==7.0.0";

const MEMORY_MIB: u32 = 6144;

/// How long one test may take, in seconds: where the processor is emulated most of it is waiting.
const TIMEOUT: &str = "240";

/// Where things are in the cache.
struct Installed {
    site: PathBuf,
    suite: PathBuf,
}

/// Runs the suite, or of it what the filters name: files, or `FILE::CLASS::TEST`.
pub(crate) fn run(tree: &Tree, bundle: &Bundle, filter: &[String]) -> Result<()> {
    let installed = ensure()?;
    let venue = venue::choose(bundle)?;
    println!("docker-py's tests run on {}", venue.describe());
    let place = venue.open(tree, "docker-py", MEMORY_MIB)?;
    let registry = Registry::start(&place.host)?;
    let busybox = Image::busybox()?;
    registry.push(&busybox, "library/busybox", "latest")?;
    let alpine = Image::like_alpine()?;
    registry.push(&alpine, "library/alpine", "3.10")?;
    // Another one: a prune of images takes a name from an image that has two, also when a container uses it.
    let mut newer = LayerBuilder::new();
    newer.file("etc/alpine-release", 0o644, b"3.22.0\n")?;
    registry.push(&alpine.with_layer(newer.finish()?), "library/alpine", "latest")?;
    // With something of its own, that a prune can free.
    let mut own = LayerBuilder::new();
    own.file("hello", 0o644, b"Hello from Docker!\n")?;
    let hello = busybox.with_layer(own.finish()?).with_command(&["cat", "/hello"]);
    registry.push(&hello, "library/hello-world", "latest")?;
    let options = DaemonOptions { registry: Some(registry.address().to_owned()), ..DaemonOptions::default() };
    let mut daemon = Daemon::start_from(&place.host, bundle.dir(), options)?;
    for image in ["busybox", "alpine:3.10", "alpine"] {
        daemon.docker().ok(&["pull", "-q", image])?;
    }
    let tested = sh::run(&mut pytest(tree, &installed, &place, &daemon, filter));
    if tested.is_err() {
        let log = tree.target().join("docker-py.log");
        fs::write(&log, daemon.log().unwrap_or_default())?;
        println!("the daemon's log: {}", log.display());
    }
    daemon.stop()?;
    tested
}

fn pytest(tree: &Tree, installed: &Installed, place: &Place, daemon: &Daemon, filter: &[String]) -> Command {
    let mut pytest = place.host.command("python3");
    pytest.args([
        "-m",
        "pytest",
        "-p",
        "bulkhead_denied",
        "-p",
        "no:cacheprovider",
        "-q",
        "--tb=short",
        "-rfEX",
    ]);
    pytest.args(["--timeout", TIMEOUT, "--durations=10", "--override-ini=addopts="]);
    if filter.is_empty() {
        pytest.arg("tests/integration").env("BULKHEAD_WHOLE_SUITE", "1");
    } else {
        pytest.args(filter.iter().map(|name| format!("tests/integration/{name}")));
    }
    let plugin = tree.root().join("tests/docker-py");
    let path = std::env::join_paths([plugin, installed.site.clone()]).unwrap_or_default();
    pytest.env("PYTHONPATH", path).env("PYTHONDONTWRITEBYTECODE", "1");
    pytest
        .env("DOCKER_HOST", format!("unix://{}", daemon.inner_socket()))
        .env("DOCKER_CONFIG", "/nonexistent");
    pytest.current_dir(&installed.suite);
    pytest
}

/// Installs the library and unpacks the tests; does nothing, and quickly, where both are.
fn ensure() -> Result<Installed> {
    let packages: Vec<&str> = [LIBRARY].into_iter().chain(PACKAGES).collect();
    let site = python::site(&packages)?;
    let suite = tree::cache_dir()?.join("tools").join(format!("python-{}-tests", SUITE.replace("==", "-")));
    if !suite.is_dir() {
        println!("unpacking the tests of {SUITE} into {}", suite.display());
        tree::whole(&suite, |new| {
            let downloads = new.with_extension("download");
            let _ = fs::remove_dir_all(&downloads);
            let mut download = python::pip("download");
            sh::output(
                download.args(["--no-deps", "--no-binary", "docker", "-d"]).arg(&downloads).arg(SUITE),
            )?;
            let packed = fs::read_dir(&downloads)?.next().context("pip downloaded nothing")??.path();
            let mut tar = Command::new("tar");
            // Without the library of its age.
            sh::run(
                tar.args(["-x", "--strip-components=1", "--exclude=*/docker", "-f"])
                    .arg(packed)
                    .arg("-C")
                    .arg(new),
            )?;
            fs::remove_dir_all(&downloads)?;
            if new.join("tests/integration").is_dir() {
                Ok(())
            } else {
                bail!("{SUITE} has no integration tests")
            }
        })?;
    }
    Ok(Installed { site, suite })
}
