//! `docker checkpoint` and `docker start --checkpoint`: a container goes on where it was.

use anyhow::Context;
use bulkhead_tests::docker::Container;
use bulkhead_tests::{Daemon, DaemonOptions, Docker, Host, Suite, with_daemon};

use crate::Test;

fn options() -> anyhow::Result<DaemonOptions> {
    Ok(Suite::from_env()?.daemon_options())
}

/// Counts in memory, to a file, and aloud; ends with 7 when it is told to.
const COUNT: &str =
    "i=0; while [ ! -e /go ]; do i=$((i+1)); echo $i >>/count; echo $i; sleep 0.05; done; exit 7";

fn counter(daemon: &Daemon) -> anyhow::Result<(Docker, Container)> {
    let docker = daemon.docker();
    docker.ok(&["pull", "-q", "busybox"])?;
    let container = docker.run_detached(&["busybox", "sh", "-c", COUNT])?;
    until(&container, 10)?;
    Ok((docker, container))
}

/// Waits until it has counted so far.
fn until(container: &Container, number: u32) -> anyhow::Result<()> {
    while last(container)? < number {}
    Ok(())
}

fn last(container: &Container) -> anyhow::Result<u32> {
    Ok(container.exec(&["sh", "-c", "tail -n 1 /count 2>/dev/null || echo 0"])?.parse().unwrap_or(0))
}

fn numbers(text: &str) -> anyhow::Result<Vec<u32>> {
    Ok(text.lines().map(str::parse).collect::<Result<_, _>>()?)
}

#[test]
fn a_counter_goes_on_without_a_gap_after_daemon_and_vmm_were_killed() -> Test {
    with_daemon(options()?, |daemon| {
        let (docker, container) = counter(daemon)?;
        let name = container.name();
        docker.ok(&["checkpoint", "create", "--leave-running", name, "c1"])?;
        let at = last(&container)?;
        // It runs on: what it does from here is not in the checkpoint.
        until(&container, at + 10)?;
        let pid = docker.inspect(name, "{{.State.Pid}}")?;
        daemon.kill()?;
        Host::from_env()?.sh("kill -9 \"$1\"", &[&pid])?;
        daemon.start_again()?;
        assert_eq!(docker.inspect(name, "{{.State.Status}} {{.State.ExitCode}}")?, "exited 137");
        let before = numbers(&container.docker(&["logs"])?)?;

        docker.ok(&["start", "--checkpoint", "c1", name])?;
        let resumed = last(&container)?;
        assert!(resumed < before.len().try_into()?, "{resumed} is from before {}", before.len());
        until(&container, resumed + 10)?;
        let file = numbers(&container.exec(&["cat", "/count"])?)?;
        container.touch("/go")?;
        assert_eq!(container.docker(&["wait"])?, "7");
        assert_eq!(docker.inspect(name, "{{.State.Status}} {{.State.ExitCode}}")?, "exited 7");

        // Memory, disk and output are of one moment: each number follows the one before.
        let logged = numbers(&container.docker(&["logs"])?)?;
        let (first, second) = logged.split_at(before.len());
        assert_eq!(first, (1..=u32::try_from(before.len())?).collect::<Vec<_>>());
        let (begin, end) = (*second.first().context("empty")?, *second.last().context("empty")?);
        assert_eq!(second, (begin..=end).collect::<Vec<_>>());
        assert!((9..=at + 1).contains(&begin), "{begin} follows the checkpoint at about {at}");
        assert_eq!(file, (1..=u32::try_from(file.len())?).collect::<Vec<_>>());
        Ok(())
    })
}

#[test]
fn a_checkpoint_that_ends_its_container_loses_and_doubles_nothing() -> Test {
    with_daemon(options()?, |daemon| {
        let (docker, container) = counter(daemon)?;
        let name = container.name();
        for (checkpoint, more) in [("c1", 10), ("c2", 10)] {
            let at = last(&container)?;
            docker.ok(&["checkpoint", "create", name, checkpoint])?;
            assert_eq!(docker.inspect(name, "{{.State.Status}} {{.State.ExitCode}}")?, "exited 137");
            docker.ok(&["start", "--checkpoint", checkpoint, name])?;
            until(&container, at + more)?;
        }
        assert_eq!(docker.ok(&["checkpoint", "ls", name])?, "CHECKPOINT NAME\nc1\nc2");
        container.touch("/go")?;
        assert_eq!(container.docker(&["wait"])?, "7");
        let logged = numbers(&container.docker(&["logs"])?)?;
        assert_eq!(logged, (1..=u32::try_from(logged.len())?).collect::<Vec<_>>());
        Ok(())
    })
}

#[test]
fn a_container_from_a_checkpoint_has_its_streams_execs_and_a_daemon_to_come() -> Test {
    with_daemon(options()?, |daemon| {
        let docker = daemon.docker();
        docker.ok(&["pull", "-q", "busybox"])?;
        let container = docker.run_detached(&["-i", "busybox", "head", "-n", "1"])?;
        let name = container.name();
        docker.ok(&["checkpoint", "create", name, "c1"])?;
        docker.ok(&["start", "--checkpoint", "c1", name])?;
        assert_eq!(container.exec(&["echo", "an exec"])?, "an exec");
        let uuid = ["cat", "/proc/sys/kernel/random/uuid"];
        assert_ne!(container.exec(&uuid)?, container.exec(&uuid)?);
        daemon.kill()?;
        daemon.start_again()?;
        let attached = docker.run_with(&["attach", name], b"some input\n".to_vec())?;
        assert_eq!((attached.code, attached.text().as_str()), (0, "some input\n"), "{}", attached.stderr);
        assert_eq!(container.docker(&["wait"])?, "0");
        Ok(())
    })
}

#[test]
fn checkpoints_are_listed_removed_and_refused_as_dockers() -> Test {
    with_daemon(options()?, |daemon| {
        let (docker, container) = counter(daemon)?;
        let name = container.name();
        docker.ok(&["checkpoint", "create", "--leave-running", name, "c1"])?;
        let again = docker.run(&["checkpoint", "create", "--leave-running", name, "c1"])?;
        assert!(again.stderr.contains("checkpoint with name c1 already exists"), "{}", again.stderr);
        for bad in ["../c2", "a/b", ".", "c2."] {
            let refused = docker.run(&["checkpoint", "create", "--leave-running", name, bad])?;
            assert!(
                refused.code != 0 && refused.stderr.contains("invalid checkpoint ID"),
                "{}",
                refused.stderr
            );
        }
        let elsewhere = docker.run(&[
            "checkpoint",
            "create",
            "--leave-running",
            "--checkpoint-dir",
            "/tmp",
            name,
            "c2",
        ])?;
        assert!(elsewhere.code != 0 && elsewhere.stderr.contains("directory"), "{}", elsewhere.stderr);
        let none = docker.run(&["checkpoint", "rm", name, "nosuch"])?;
        assert!(none.stderr.contains("checkpoint nosuch does not exist"), "{}", none.stderr);

        docker.ok(&["stop", "-t", "0", name])?;
        let stopped = docker.run(&["checkpoint", "create", name, "c2"])?;
        assert!(stopped.code != 0 && stopped.stderr.contains("is not running"), "{}", stopped.stderr);
        // One that is damaged is refused, and the container is as it was.
        let damage = "cd \"$1\"/containers/*/checkpoints/c1 && chmod 600 memory && printf x >>memory";
        Host::from_env()?.sh(damage, &[&daemon.data_root()])?;
        let damaged = docker.run(&["start", "--checkpoint", "c1", name])?;
        assert!(damaged.code != 0 && damaged.stderr.contains("damaged"), "{}", damaged.stderr);
        assert_eq!(docker.inspect(name, "{{.State.Status}}")?, "exited");
        docker.ok(&["checkpoint", "rm", name, "c1"])?;
        assert_eq!(docker.ok(&["checkpoint", "ls", name])?, "CHECKPOINT NAME");
        let gone = docker.run(&["start", "--checkpoint", "c1", name])?;
        assert!(gone.code != 0 && gone.stderr.contains("does not exist"), "{}", gone.stderr);
        docker.ok(&["start", name])?;
        assert_eq!(docker.events(&["event=checkpoint"], "{{.Action}}")?, "checkpoint");
        Ok(())
    })
}
