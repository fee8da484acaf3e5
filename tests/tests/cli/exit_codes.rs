//! A workload's end is the CLI's exit code.

use crate::{Test, docker};

fn code(args: &[&str]) -> anyhow::Result<(i32, String)> {
    let output = docker()?.run(&[&["run", "--rm"], args].concat())?;
    Ok((output.code, output.stderr))
}

#[test]
fn a_workload_s_code_is_the_command_s() -> Test {
    assert_eq!(code(&["busybox", "sh", "-c", "exit 7"])?.0, 7);
    assert_eq!(code(&["busybox", "true"])?.0, 0);
    Ok(())
}

#[test]
fn a_missing_program_is_127_and_named() -> Test {
    let (code, stderr) = code(&["busybox", "no-such-program"])?;
    assert_eq!(code, 127, "{stderr}");
    assert!(stderr.contains("no-such-program"), "{stderr}");
    Ok(())
}

#[test]
fn a_file_that_is_not_executable_is_126() -> Test {
    let (code, stderr) = code(&["busybox", "/etc/not-executable"])?;
    assert_eq!(code, 126, "{stderr}");
    Ok(())
}

#[test]
fn a_directory_as_the_program_is_126() -> Test {
    let (code, stderr) = code(&["busybox", "/etc"])?;
    assert_eq!(code, 126, "{stderr}");
    Ok(())
}

#[test]
fn a_workload_killed_with_signal_9_is_137() -> Test {
    let docker = docker()?;
    let container = docker.run_detached(&["busybox", "sleep", "1000"])?;
    container.docker(&["kill"])?;
    assert_eq!(container.docker(&["wait"])?, "137");
    assert_eq!(docker.inspect(container.name(), "{{.State.Status}} {{.State.ExitCode}}")?, "exited 137");
    Ok(())
}

#[test]
fn a_child_killed_with_signal_9_is_137_to_its_parent() -> Test {
    let (code, stderr) = code(&["busybox", "sh", "-c", "sh -c 'kill -9 $$'; exit $?"])?;
    assert_eq!(code, 137, "{stderr}");
    Ok(())
}

#[test]
fn stop_asks_with_sigterm_and_gets_143() -> Test {
    let docker = docker()?;
    let container = docker.run_detached(&["--init", "busybox", "sleep", "1000"])?;
    container.docker(&["stop", "-t", "60"])?;
    assert_eq!(docker.inspect(container.name(), "{{.State.ExitCode}}")?, "143");
    Ok(())
}

#[test]
fn stop_kills_what_will_not_end() -> Test {
    let docker = docker()?;
    let container =
        docker.run_detached(&["busybox", "sh", "-c", "trap '' TERM; while :; do sleep 1; done"])?;
    container.docker(&["stop", "-t", "1"])?;
    assert_eq!(docker.inspect(container.name(), "{{.State.ExitCode}}")?, "137");
    Ok(())
}

#[test]
fn stop_runs_the_workload_s_own_end() -> Test {
    let docker = docker()?;
    let script = "trap 'echo bye; exit 5' TERM; echo up; while :; do sleep 1; done";
    let container = docker.run_detached(&["busybox", "sh", "-c", script])?;
    while !container.docker(&["logs"])?.contains("up") {}
    container.docker(&["stop", "-t", "60"])?;
    assert_eq!(docker.inspect(container.name(), "{{.State.ExitCode}}")?, "5");
    assert_eq!(container.docker(&["logs"])?, "up\nbye");
    Ok(())
}
