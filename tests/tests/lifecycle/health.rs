//! Health checks and restart policies: what the daemon does by itself for containers.

use std::io::{BufRead, BufReader};

use anyhow::Context;
use bulkhead_tests::{Docker, Suite, with_daemon};

use crate::Test;

fn docker() -> anyhow::Result<Docker> {
    Ok(Suite::from_env()?.docker())
}

/// Waits for the container's next events of the kind and gives their actions, so many of them.
fn actions(docker: &Docker, since: &str, filters: &[&str], count: usize) -> anyhow::Result<Vec<String>> {
    let mut arguments = vec!["events", "--since", since, "--format", "{{.Action}}"];
    for filter in filters {
        arguments.extend(["--filter", filter]);
    }
    let mut events = docker.spawn(&arguments)?;
    let lines = BufReader::new(events.stdout.take().context("stdout")?).lines();
    let found = lines.take(count).collect::<Result<Vec<_>, _>>()?;
    events.kill()?;
    events.wait()?;
    Ok(found)
}

fn now(docker: &Docker) -> anyhow::Result<String> {
    docker.ok(&["info", "--format", "{{.SystemTime}}"])
}

#[test]
fn a_health_check_tells_how_it_is_and_every_change_is_an_event() -> Test {
    let docker = docker()?;
    let since = now(&docker)?;
    let container = docker.run_detached(&[
        "--health-cmd",
        "echo checked; test -e /well",
        "--health-interval",
        "500ms",
        "--health-retries",
        "2",
        "busybox",
        "sleep",
        "1000",
    ])?;
    let name = container.name();
    let of_it = format!("container={name}");
    let health = ["event=health_status", of_it.as_str()];
    assert_eq!(actions(&docker, &since, &health, 1)?, ["health_status: unhealthy"]);
    assert_eq!(docker.inspect(name, "{{.State.Health.Status}}")?, "unhealthy");
    let last = "{{with index .State.Health.Log 0}}{{.ExitCode}} {{.Output}}{{end}}";
    assert_eq!(docker.inspect(name, last)?, "1 checked");
    container.exec(&["touch", "/well"])?;
    let both = ["health_status: unhealthy", "health_status: healthy"];
    assert_eq!(actions(&docker, &since, &health, 2)?, both);
    let listed = ["ps", "--filter", "health=healthy", "--format", "{{.Names}} {{.Status}}"];
    let listed = docker.ok(&listed)?;
    assert!(listed.lines().any(|line| line.starts_with(name) && line.ends_with("(healthy)")), "{listed}");
    assert_eq!(docker.inspect(name, "{{.State.Health.FailingStreak}}")?, "0");
    Ok(())
}

#[test]
fn a_check_that_hangs_is_killed_and_counts_as_failed() -> Test {
    let docker = docker()?;
    let since = now(&docker)?;
    let container = docker.run_detached(&[
        "--health-cmd",
        "echo before; sleep 1000",
        "--health-interval",
        "100ms",
        "--health-timeout",
        "2s",
        "--health-retries",
        "1",
        "busybox",
        "sleep",
        "1000",
    ])?;
    let of_it = format!("container={}", container.name());
    actions(&docker, &since, &["event=health_status", &of_it], 1)?;
    let log = docker
        .inspect(container.name(), "{{with index .State.Health.Log 0}}{{.ExitCode}} {{.Output}}{{end}}")?;
    assert_eq!(log, "-1 Health check exceeded timeout (2s): before");
    Ok(())
}

#[test]
fn without_a_check_there_is_no_health_and_a_bad_one_is_refused() -> Test {
    let docker = docker()?;
    let container = docker.container();
    docker.ok(&["create", "--name", container.name(), "--no-healthcheck", "busybox"])?;
    assert_eq!(docker.inspect(container.name(), "{{json .State.Health}}")?, "null");
    let refused = docker.run(&["create", "--health-cmd", "x", "--health-interval", "1us", "busybox"])?;
    assert!(refused.stderr.contains("Interval in Healthcheck cannot be less than 1ms"), "{}", refused.stderr);
    Ok(())
}

#[test]
fn on_failure_starts_again_so_often_and_no_more() -> Test {
    let docker = docker()?;
    let since = now(&docker)?;
    let container =
        docker.run_detached(&["--restart", "on-failure:2", "busybox", "sh", "-c", "echo ran; exit 3"])?;
    let of_it = format!("container={}", container.name());
    let seen = actions(&docker, &since, &[&of_it, "event=start", "event=die"], 6)?;
    assert_eq!(seen, ["start", "die", "start", "die", "start", "die"]);
    let state = "{{.State.Status}} {{.State.ExitCode}} {{.RestartCount}}";
    while !docker.inspect(container.name(), state)?.starts_with("exited") {}
    assert_eq!(docker.inspect(container.name(), state)?, "exited 3 2");
    assert_eq!(container.docker(&["logs"])?, "ran\nran\nran");
    Ok(())
}

#[test]
fn always_ends_with_a_stop_and_unless_stopped_outlives_the_daemon() -> Test {
    let options = Suite::from_env()?.daemon_options();
    with_daemon(options, |daemon| {
        let docker = daemon.docker();
        docker.ok(&["pull", "-q", "busybox"])?;
        let sleeper = ["busybox", "sh", "-c", "trap 'exit 0' TERM; echo up; while :; do sleep 0.1; done"];
        let run = |policy| docker.run_detached(&[&["--restart", policy], &sleeper[..]].concat());
        let (always, stopped, running) = (run("always")?, run("unless-stopped")?, run("unless-stopped")?);
        for container in [&always, &stopped] {
            while container.docker(&["logs"])?.is_empty() {}
            container.docker(&["stop", "-t", "60"])?;
            assert_eq!(docker.inspect(container.name(), "{{.State.Status}}")?, "exited");
        }
        let pid = docker.inspect(running.name(), "{{.State.Pid}}")?;
        daemon.kill()?;
        // What ran when the daemon died and did not live on starts again, too.
        bulkhead_tests::Host::from_env()?.sh("kill -9 \"$1\"", &[&pid])?;
        daemon.start_again()?;
        let status =
            |container: &bulkhead_tests::Container| docker.inspect(container.name(), "{{.State.Status}}");
        for container in [&always, &running] {
            while status(container)? != "running" {}
        }
        assert_eq!(status(&stopped)?, "exited");
        Ok(())
    })
}
