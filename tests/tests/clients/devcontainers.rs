//! `devcontainer up`, with which editors start a container to develop in, and `devcontainer exec`.

use std::{
    fs,
    process::{Command, Stdio},
};

use anyhow::{Context, bail};
use bulkhead_tests::{
    Suite,
    suite::{DEVCONTAINER_VARIABLE, NODE_VARIABLE},
};
use serde_json::Value;

use crate::Test;

#[test]
fn devcontainer_up_brings_a_workspace_up_finds_it_again_and_runs_commands_in_it() -> Test {
    let suite = Suite::from_env()?;
    // Where the host sees it.
    let workspace = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    fs::create_dir(workspace.path().join(".devcontainer"))?;
    fs::write(
        workspace.path().join(".devcontainer/devcontainer.json"),
        r#"{
            "image": "busybox",
            "remoteUser": "root",
            "updateRemoteUserUID": false,
            "containerEnv": {"IN_CONTAINER": "yes"},
            "remoteEnv": {"WHERE": "${containerWorkspaceFolder}"},
            "onCreateCommand": "echo created $IN_CONTAINER >/root/created",
            "postStartCommand": "cp marker /root/started"
        }"#,
    )?;
    fs::write(workspace.path().join("marker"), "of the workspace\n")?;
    let run = |verb: &str, command: &[&str]| -> anyhow::Result<String> {
        let mut node = Command::new(std::env::var_os(NODE_VARIABLE).context(NODE_VARIABLE)?);
        node.arg(std::env::var_os(DEVCONTAINER_VARIABLE).context(DEVCONTAINER_VARIABLE)?);
        node.args([verb, "--workspace-folder"]).arg(workspace.path()).args(command);
        node.env("DOCKER_HOST", format!("unix://{}", suite.docker_socket))
            .env("DOCKER_CONFIG", "/nonexistent");
        let output = node.stdin(Stdio::null()).output()?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
        if !output.status.success() {
            bail!("{verb}: {}\n{}\n{}", output.status, text(&output.stdout), text(&output.stderr));
        }
        Ok(text(&output.stdout))
    };
    let up = || -> anyhow::Result<String> {
        let said: Value = serde_json::from_str(run("up", &[])?.lines().last().context("it said nothing")?)?;
        assert_eq!(said["outcome"], "success", "{said}");
        Ok(said["containerId"].as_str().context("no containerId")?.to_owned())
    };
    let id = up()?;
    let _removed = suite.docker().adopt(&id);
    let script = "cat /root/created /root/started; echo $WHERE; cat marker; echo written >new; uname -r";
    let seen = run("exec", &["sh", "-c", script])?;
    let lines: Vec<&str> = seen.lines().collect();
    let name = workspace.path().file_name().and_then(|name| name.to_str()).context("a name")?;
    let folder = format!("/workspaces/{name}");
    assert_eq!(
        lines.get(..4).context(seen.clone())?,
        ["created yes", "of the workspace", folder.as_str(), "of the workspace"]
    );
    assert!(lines.last().is_some_and(|kernel| kernel.contains("microvm")), "{seen}");
    assert_eq!(up()?, id, "it is found again");
    Ok(())
}
