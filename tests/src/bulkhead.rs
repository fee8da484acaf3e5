//! The `bulkhead` program of the build.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use crate::daemon::BUNDLE_VARIABLE;
use crate::docker::Output;

/// Runs `bulkhead ARGS` on the daemon behind the socket.
///
/// # Errors
/// When it is not there. A failing command is no error.
pub fn bulkhead(socket: &str, args: &[&str]) -> Result<Output> {
    let bundle = std::env::var_os(BUNDLE_VARIABLE)
        .context("no directory of built programs: `cargo xtask test e2e`")?;
    let mut command = Command::new(Path::new(&bundle).join("bulkhead"));
    command.args(args).env("DOCKER_HOST", format!("unix://{socket}")).stdin(Stdio::null());
    let output = command.output().context("start bulkhead")?;
    Ok(Output {
        code: output.status.code().unwrap_or(-1),
        stdout: output.stdout,
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}
