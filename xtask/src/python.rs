//! Packages of PyPI, each set in a directory of the cache, where `PYTHONPATH` finds it.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::sh;
use crate::tree;

/// testcontainers, with which tests let others' tests start containers.
pub(crate) const TESTCONTAINERS: [&str; 1] = ["testcontainers==4.15.0"];

/// The directory with these packages, each with its exact version; the first gives its name. Does nothing, and quickly,
/// where it is there.
pub(crate) fn site(packages: &[&str]) -> Result<PathBuf> {
    let first = packages.first().context("no packages")?;
    let site = tree::cache_dir()?.join("tools").join(format!("python-{}", first.replace("==", "-")));
    if !site.is_dir() {
        println!("installing {} into {}", packages.join(" "), site.display());
        tree::whole(&site, |new| {
            sh::output(pip("install").arg("--target").arg(new).args(packages)).map(drop)
        })?;
    }
    Ok(site)
}

/// A command of pip's.
pub(crate) fn pip(command: &str) -> Command {
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", command, "-q", "--disable-pip-version-check"])
        .env("PIP_ROOT_USER_ACTION", "ignore");
    pip
}
