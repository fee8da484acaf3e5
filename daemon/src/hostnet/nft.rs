//! Runs nft: one script, one transaction.

use std::{io, process::Stdio, time::Duration};

use tokio::{io::AsyncWriteExt, process::Command};

use super::HostError;

/// How long it may take; a script of a thousand endpoints takes a tenth of a second.
const WITHIN: Duration = Duration::from_secs(60);

/// Applies a script.
pub(super) async fn apply(script: &str) -> Result<(), HostError> {
    run(&["-f", "-"], script).await.map(drop)
}

/// Everything in a table, as JSON.
pub(super) async fn list_table(family: &str, table: &str) -> Result<String, HostError> {
    run(&["-j", "list", "table", family, table], "").await
}

/// The names of the tables of a family.
pub(super) async fn tables(family: &str) -> Result<Vec<String>, HostError> {
    let text = run(&["list", "tables", family], "").await?;
    Ok(text.lines().filter_map(|line| line.split_whitespace().nth(2)).map(str::to_owned).collect())
}

async fn run(arguments: &[&str], script: &str) -> Result<String, HostError> {
    let failed = |message: String| HostError::Rules(message);
    let run = async {
        let mut child = Command::new("nft")
            .args(arguments)
            .env("PATH", search_path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| match error.kind() {
                io::ErrorKind::NotFound => failed("nft is not installed (package nftables)".into()),
                _ => failed(format!("nft: {error}")),
            })?;
        if let Some(mut input) = child.stdin.take() {
            // Should it end early, its own words tell more.
            let _ = input.write_all(script.as_bytes()).await;
        }
        child.wait_with_output().await.map_err(|error| failed(format!("nft: {error}")))
    };
    let output = tokio::time::timeout(WITHIN, run).await.map_err(|_| failed("nft hangs".into()))??;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let words = String::from_utf8_lossy(&output.stderr);
    let words: String = words.chars().take(2000).collect();
    Err(failed(format!("nft ({}): {}", output.status, words.trim())))
}

/// Debian's system directories are not in every user's path.
fn search_path() -> String {
    let path = std::env::var("PATH").unwrap_or_default();
    format!("{path}:/usr/local/sbin:/usr/sbin:/sbin")
}
