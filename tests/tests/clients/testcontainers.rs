//! testcontainers for Python: the core of it, and the reaper that removes what a killed test has left.

use std::{
    path::Path,
    process::{Command, Output},
};

use anyhow::{Context, bail};
use bulkhead_tests::{
    Daemon, Host, Suite,
    image::{Image, LayerBuilder},
    suite::PYTHON_VARIABLE,
    with_daemon,
};

use crate::Test;

/// The name that the library asks for.
const REAPER: (&str, &str) = ("testcontainers/ryuk", "0.8.1");

const PYTHON: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/clients/session.py");

#[test]
fn testcontainers_starts_what_it_is_told_and_its_reaper_removes_what_is_left() -> Test {
    let suite = Suite::from_env()?;
    suite.push(&reaper()?, REAPER.0, REAPER.1)?;
    with_daemon(suite.daemon_options(), |daemon| {
        let docker = daemon.docker();
        docker.ok(&["pull", "-q", "busybox"])?;
        docker.ok(&["pull", "-q", &format!("{}:{}", REAPER.0, REAPER.1)])?;

        let whole = session(daemon, "whole")?;
        let text = String::from_utf8_lossy(&whole.stdout).into_owned();
        assert!(whole.status.success(), "{text}\n{}", String::from_utf8_lossy(&whole.stderr));
        assert_eq!(text.lines().take(2).collect::<Vec<_>>(), ["first", "0 first"]);

        let cut = session(daemon, "cut")?;
        let text = String::from_utf8_lossy(&cut.stdout).into_owned();
        let session = text.lines().last().context("it printed nothing")?;
        let label = format!("label=org.testcontainers.session-id={session}");
        let left = docker.ok(&["ps", "-aq", "--filter", &label])?;
        assert_eq!(left.lines().count(), 2, "{text}\n{}", String::from_utf8_lossy(&cut.stderr));
        // The reaper removes what is the session's, then ends and goes itself.
        while !docker.ok(&["ps", "-aq"])?.is_empty() {}
        assert_eq!(docker.ok(&["ps", "-aq", "--filter", &label])?, "");
        Ok(())
    })
}

/// Runs the script in the host, where published ports are.
fn session(daemon: &Daemon, how: &str) -> anyhow::Result<Output> {
    let mut python = Host::from_env()?.command("python3");
    python.args([PYTHON, how]);
    python.env("PYTHONPATH", std::env::var_os(PYTHON_VARIABLE).context(PYTHON_VARIABLE)?);
    python.env("PYTHONDONTWRITEBYTECODE", "1").env("DOCKER_CONFIG", "/nonexistent");
    python.env("DOCKER_HOST", format!("unix://{}", daemon.inner_socket()));
    python.env("RYUK_RECONNECTION_TIMEOUT", "2s");
    Ok(python.stdin(std::process::Stdio::null()).output()?)
}

/// An image of the stand-in for the reaper.
fn reaper() -> anyhow::Result<Image> {
    let directory = tempfile::tempdir_in(Path::new(env!("CARGO_TARGET_TMPDIR")))?;
    let program = directory.path().join("reaper");
    let output = Command::new("rustc")
        .args(["--edition", "2024", "-O", "-C", "target-feature=+crt-static", "-C", "panic=abort", "-o"])
        .arg(&program)
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/clients/reaper.rs"))
        .output()?;
    if !output.status.success() {
        bail!("rustc: {}", String::from_utf8_lossy(&output.stderr));
    }
    let mut layer = LayerBuilder::new();
    layer.file("bin/ryuk", 0o755, &std::fs::read(&program)?)?;
    Ok(Image::busybox()?.with_layer(layer.finish()?).with_command(&["/bin/ryuk"]))
}
