//! Every byte in and out, and the ends of streams.

use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;

use anyhow::Context;
use sha2::{Digest, Sha256};

use crate::{Test, docker};

const HUNDRED_MIB: usize = 100 << 20;

/// Bytes that no compression and no repetition makes easy.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

fn sha256(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

#[test]
fn a_hundred_megabytes_in_arrive_whole() -> Test {
    let bytes = noise(HUNDRED_MIB);
    let expected = sha256(&bytes);
    let output = docker()?.run_with(&["run", "-i", "--rm", "busybox", "sha256sum"], bytes)?;
    assert_eq!(output.ok()?.split_whitespace().next(), Some(expected.as_str()));
    Ok(())
}

#[test]
fn a_hundred_megabytes_out_arrive_whole() -> Test {
    let line = b"all work and no play makes Jack a dull boy\n";
    let expected: Vec<u8> = line.iter().copied().cycle().take(HUNDRED_MIB).collect();
    let text = String::from_utf8(line.to_vec())?;
    let script = format!("yes '{}' | head -c {HUNDRED_MIB}", text.trim_end());
    let output = docker()?.run(&["run", "--rm", "busybox", "sh", "-c", &script])?;
    assert_eq!(output.code, 0, "{}", output.stderr);
    assert_eq!(output.stdout.len(), expected.len());
    assert_eq!(sha256(&output.stdout), sha256(&expected));
    Ok(())
}

#[test]
fn what_goes_in_comes_back_through_cat() -> Test {
    let bytes = noise(3 << 20);
    let output = docker()?.run_with(&["run", "-i", "--rm", "busybox", "cat"], bytes.clone())?;
    assert_eq!(output.code, 0, "{}", output.stderr);
    assert!(output.stdout == bytes, "{} bytes came back of {}", output.stdout.len(), bytes.len());
    Ok(())
}

#[test]
fn stdout_and_stderr_stay_apart() -> Test {
    // Without a network there is nothing that the CLI itself could say on stderr.
    let output = docker()?.run(&[
        "run",
        "--rm",
        "--network",
        "none",
        "busybox",
        "sh",
        "-c",
        "echo out; echo err >&2",
    ])?;
    assert_eq!((output.text().as_str(), output.stderr.as_str()), ("out\n", "err\n"));
    Ok(())
}

#[test]
fn output_comes_while_the_workload_runs() -> Test {
    let mut child =
        docker()?.spawn(&["run", "-i", "--rm", "busybox", "sh", "-c", "echo first; read x; echo got $x"])?;
    let mut lines = BufReader::new(child.stdout.take().context("stdout")?).lines();
    assert_eq!(lines.next().context("no line")??, "first");
    // Only after the first line has been seen is the second one's cause sent.
    child.stdin.take().context("stdin")?.write_all(b"this\n")?;
    assert_eq!(lines.next().context("no line")??, "got this");
    assert!(child.wait()?.success());
    Ok(())
}

#[test]
fn a_closed_stdin_is_the_workload_s_end_of_file_and_output_goes_on() -> Test {
    let script = "cat >/dev/null; echo after";
    let output = docker()?.run_with(&["run", "-i", "--rm", "busybox", "sh", "-c", script], b"x".to_vec())?;
    assert_eq!(output.ok()?, "after");
    Ok(())
}

#[test]
fn a_workload_without_i_has_an_empty_stdin() -> Test {
    let output = docker()?.run_with(&["run", "--rm", "busybox", "wc", "-c"], b"never sent".to_vec())?;
    assert_eq!(output.ok()?, "0");
    Ok(())
}

#[test]
fn a_client_that_leaves_does_not_end_the_workload() -> Test {
    let docker = docker()?;
    let container = docker.container();
    let script = "while :; do echo tick; sleep 1; done";
    let mut command = docker.command(&["run", "--name", container.name(), "busybox", "sh", "-c", script]);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let mut lines = BufReader::new(child.stdout.take().context("stdout")?).lines();
    assert_eq!(lines.next().context("no line")??, "tick");
    child.kill()?;
    child.wait()?;
    assert_eq!(docker.inspect(container.name(), "{{.State.Running}}")?, "true");
    Ok(())
}

#[test]
fn attach_joins_a_running_workload() -> Test {
    let docker = docker()?;
    let container = docker.container();
    docker.ok(&["create", "-i", "--name", container.name(), "busybox", "cat"])?;
    let mut child = docker.spawn(&["start", "-a", "-i", container.name()])?;
    let mut input = child.stdin.take().context("stdin")?;
    input.write_all(b"hello\n")?;
    let mut lines = BufReader::new(child.stdout.take().context("stdout")?).lines();
    assert_eq!(lines.next().context("no line")??, "hello");
    drop(input);
    assert!(child.wait()?.success());
    Ok(())
}
