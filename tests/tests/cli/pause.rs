//! `docker pause` and what can be done with a container that stands still.

use std::thread::sleep;
use std::time::Duration;

use crate::{Test, docker};

#[test]
fn a_paused_container_stands_still_and_then_goes_on() -> Test {
    let docker = docker()?;
    let container =
        docker.run_detached(&["busybox", "sh", "-c", "while :; do echo tick; usleep 20000; done"])?;
    let ticks = || -> anyhow::Result<usize> { Ok(container.docker(&["logs"])?.lines().count()) };
    while ticks()? == 0 {}
    container.docker(&["pause"])?;
    let state = "{{.State.Status}} {{.State.Running}} {{.State.Paused}}";
    assert_eq!(docker.inspect(container.name(), state)?, "paused true true");
    let listed = docker.ok(&["ps", "--filter", "status=paused", "--format", "{{.Names}} {{.Status}}"])?;
    assert!(listed.contains(container.name()) && listed.contains("(Paused)"), "{listed}");
    // What was on its way when it was paused has come by now; nothing more does.
    sleep(Duration::from_secs(1));
    let before = ticks()?;
    sleep(Duration::from_secs(3));
    assert_eq!(ticks()?, before);
    container.docker(&["unpause"])?;
    assert_eq!(docker.inspect(container.name(), state)?, "running true false");
    while ticks()? == before {}
    Ok(())
}

#[test]
fn what_is_paused_can_be_looked_at_and_nothing_started_in_it() -> Test {
    let docker = docker()?;
    let container = docker.run_detached(&["busybox", "sleep", "1000"])?;
    let id = docker.inspect(container.name(), "{{.Id}}")?;
    container.docker(&["pause"])?;
    assert!(container.docker(&["top"])?.contains("sleep 1000"));
    assert!(
        docker.ok(&["stats", "--no-stream", "--format", "{{.PIDs}}", container.name()])?.parse::<u32>()? >= 1
    );
    for (command, words) in [
        (
            &["exec", container.name(), "true"][..],
            format!("Container {id} is paused, unpause the container before exec"),
        ),
        (&["pause", container.name()], format!("container {id} is already paused")),
        (&["start", container.name()], "cannot start a paused container, try unpause instead".to_owned()),
        (&["rm", container.name()], "container is paused and must be unpaused first".to_owned()),
    ] {
        let output = docker.run(command)?;
        assert!(output.code != 0 && output.stderr.contains(&words), "{command:?}: {}", output.stderr);
    }
    container.docker(&["unpause"])?;
    let output = docker.run(&["unpause", container.name()])?;
    assert!(output.stderr.contains(&format!("Container {id} is not paused")), "{}", output.stderr);
    assert_eq!(container.exec(&["echo", "awake"])?, "awake");
    Ok(())
}

#[test]
fn a_paused_container_is_stopped_by_its_own_handler() -> Test {
    let docker = docker()?;
    let script = "trap 'echo bye; exit 7' TERM; echo up; while :; do usleep 100000; done";
    let container = docker.run_detached(&["busybox", "sh", "-c", script])?;
    while container.docker(&["logs"])? != "up" {}
    container.docker(&["pause"])?;
    container.docker(&["stop", "-t", "60"])?;
    assert_eq!(docker.inspect(container.name(), "{{.State.Status}} {{.State.ExitCode}}")?, "exited 7");
    assert_eq!(container.docker(&["logs"])?, "up\nbye");
    Ok(())
}

#[test]
fn a_paused_container_is_killed_and_removed() -> Test {
    let docker = docker()?;
    let killed = docker.run_detached(&["busybox", "sleep", "1000"])?;
    killed.docker(&["pause"])?;
    killed.docker(&["kill"])?;
    assert_eq!(docker.inspect(killed.name(), "{{.State.Status}} {{.State.ExitCode}}")?, "exited 137");
    let removed = docker.run_detached(&["busybox", "sleep", "1000"])?;
    removed.docker(&["pause"])?;
    removed.docker(&["rm", "-f"])?;
    assert_ne!(docker.run(&["inspect", removed.name()])?.code, 0);
    Ok(())
}

#[test]
fn pausing_is_told_as_events() -> Test {
    let docker = docker()?;
    let container = docker.run_detached(&["busybox", "sleep", "1000"])?;
    container.docker(&["pause"])?;
    container.docker(&["unpause"])?;
    let filter = format!("container={}", container.name());
    let events = docker.events(&[&filter], "{{.Action}}")?;
    let actions: Vec<&str> = events.lines().collect();
    assert_eq!(actions, ["create", "start", "pause", "unpause"]);
    Ok(())
}
