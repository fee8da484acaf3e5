//! The daemon may die at any moment: what runs goes on, and a new daemon knows all of it.

use std::io::{BufRead, BufReader};

use anyhow::Context;
use bulkhead_tests::{Daemon, Docker, Suite, with_daemon};

use crate::Test;

fn options() -> anyhow::Result<bulkhead_tests::DaemonOptions> {
    Ok(Suite::from_env()?.daemon_options())
}

fn busybox(daemon: &Daemon) -> anyhow::Result<Docker> {
    let docker = daemon.docker();
    docker.ok(&["pull", "-q", "busybox"])?;
    Ok(docker)
}

#[test]
fn after_kill_9_ps_logs_exec_and_wait_work_on_what_runs() -> Test {
    with_daemon(options()?, |daemon| {
        let docker = busybox(daemon)?;
        let script = "echo before; while [ ! -e /go ]; do sleep 0.1; done; echo after; exit 23";
        let container = docker.run_detached(&["busybox", "sh", "-c", script])?;
        let started = docker.inspect(container.name(), "{{.Id}} {{.State.StartedAt}}")?;
        daemon.kill()?;
        daemon.start_again()?;
        assert_eq!(docker.ok(&["ps", "--format", "{{.Names}}"])?, container.name());
        assert_eq!(docker.inspect(container.name(), "{{.Id}} {{.State.StartedAt}}")?, started);
        assert_eq!(container.docker(&["logs"])?, "before");
        assert_eq!(container.exec(&["echo", "still there"])?, "still there");
        let waiting = docker.spawn(&["wait", container.name()])?;
        container.touch("/go")?;
        let output = waiting.wait_with_output()?;
        assert_eq!(String::from_utf8(output.stdout)?.trim(), "23");
        assert_eq!(container.docker(&["logs"])?, "before\nafter");
        Ok(())
    })
}

#[test]
fn after_kill_9_two_containers_of_one_microvm_are_both_there_and_end_one_by_one() -> Test {
    with_daemon(options()?, |daemon| {
        let docker = busybox(daemon)?;
        let script = "while [ ! -e /go ]; do sleep 0.1; done; echo after; exit $1";
        let first = docker.run_detached(&["busybox", "sh", "-c", script, "sh", "23"])?;
        let network = format!("container:{}", first.name());
        let words = ["--network", &network, "-v", "kept:/data", "busybox", "sh", "-c", script, "sh", "24"];
        let second = docker.run_detached(&words)?;
        let pid = "{{.State.Pid}}";
        let vmm = docker.inspect(first.name(), pid)?;
        daemon.kill()?;
        daemon.start_again()?;
        assert_eq!(
            [docker.inspect(first.name(), pid)?, docker.inspect(second.name(), pid)?],
            [vmm.clone(), vmm.clone()]
        );
        for (container, code) in [(&first, "23"), (&second, "24")] {
            assert_eq!(container.exec(&["echo", "still there"])?, "still there");
            let waiting = docker.spawn(&["wait", container.name()])?;
            container.touch("/go")?;
            let output = waiting.wait_with_output()?;
            assert_eq!(String::from_utf8(output.stdout)?.trim(), code);
            assert_eq!(container.docker(&["logs"])?, "after");
        }
        // The last one has taken the machine along.
        docker.ok(&["rm", first.name(), second.name()])?;
        let gone = "kill -0 \"$1\" 2>/dev/null && echo there || echo gone";
        assert_eq!(bulkhead_tests::Host::from_env()?.sh(gone, &[&vmm])?, "gone");
        docker.ok(&["volume", "rm", "kept"]).map(drop)
    })
}

#[test]
fn what_is_said_and_ends_while_no_daemon_is_there_is_not_lost() -> Test {
    with_daemon(options()?, |daemon| {
        let docker = busybox(daemon)?;
        let script = "echo before; sleep 3; for i in 1 2 3 4 5; do echo meanwhile $i; done; exit 31";
        let container = docker.run_detached(&["busybox", "sh", "-c", script])?;
        while container.docker(&["logs"])? != "before" {}
        daemon.kill()?;
        // The workload's end needs no daemon; this only makes it likely that it comes before the next one.
        std::thread::sleep(std::time::Duration::from_secs(5));
        daemon.start_again()?;
        assert_eq!(container.docker(&["wait"])?, "31");
        let lines: String = (1..=5).map(|i| format!("\nmeanwhile {i}")).collect();
        assert_eq!(container.docker(&["logs"])?, format!("before{lines}"));
        Ok(())
    })
}

#[test]
fn kill_9_under_a_stream_of_output_loses_and_doubles_no_line() -> Test {
    with_daemon(options()?, |daemon| {
        let docker = busybox(daemon)?;
        let container = docker.run_detached(&["busybox", "seq", "1", "200000"])?;
        for _ in 0..3 {
            daemon.kill()?;
            daemon.start_again()?;
        }
        assert_eq!(container.docker(&["wait"])?, "0");
        let text = container.docker(&["logs"])?;
        let expected: Vec<String> = (1..=200_000).map(|number| number.to_string()).collect();
        let lines: Vec<&str> = text.lines().collect();
        let wrong = lines.iter().zip(&expected).position(|(line, expected)| line != expected);
        assert_eq!((lines.len(), wrong), (expected.len(), None));
        Ok(())
    })
}

#[test]
fn images_stopped_containers_and_their_writes_survive_a_restart() -> Test {
    with_daemon(options()?, |daemon| {
        let docker = busybox(daemon)?;
        let container =
            docker.run_detached(&["busybox", "sh", "-c", "echo kept >>/kept; cat /kept; exit 8"])?;
        container.docker(&["wait"])?;
        daemon.stop()?;
        daemon.start_again()?;
        assert_eq!(docker.ok(&["images", "--format", "{{.Repository}}"])?, "busybox");
        assert_eq!(docker.inspect(container.name(), "{{.State.Status}} {{.State.ExitCode}}")?, "exited 8");
        container.docker(&["start"])?;
        assert_eq!(container.docker(&["wait"])?, "8");
        assert_eq!(container.docker(&["logs"])?, "kept\nkept\nkept");
        Ok(())
    })
}

#[test]
fn a_following_client_sees_the_end_of_its_connection_and_can_follow_again() -> Test {
    with_daemon(options()?, |daemon| {
        let docker = busybox(daemon)?;
        let script = "echo up; while [ ! -e /go ]; do sleep 0.1; done; echo down";
        let container = docker.run_detached(&["busybox", "sh", "-c", script])?;
        let mut following = docker.spawn(&["logs", "-f", container.name()])?;
        let mut lines = BufReader::new(following.stdout.take().context("stdout")?).lines();
        assert_eq!(lines.next().context("no line")??, "up");
        daemon.kill()?;
        assert!(lines.next().is_none());
        following.wait()?;
        daemon.start_again()?;
        let following = docker.spawn(&["logs", "-f", container.name()])?;
        container.touch("/go")?;
        assert_eq!(String::from_utf8(following.wait_with_output()?.stdout)?, "up\ndown\n");
        Ok(())
    })
}

#[test]
fn a_vmm_that_is_killed_is_its_container_s_end_and_nobody_else_s() -> Test {
    with_daemon(options()?, |daemon| {
        let docker = busybox(daemon)?;
        let victim = docker.run_detached(&["busybox", "sleep", "1000"])?;
        let pid = docker.inspect(victim.name(), "{{.State.Pid}}")?;
        let other = docker.run_detached(&["busybox", "sleep", "1000"])?;
        bulkhead_tests::Host::from_env()?.sh("kill -9 \"$1\"", &[&pid])?;
        assert_eq!(victim.docker(&["wait"])?, "137");
        assert_eq!(other.exec(&["echo", "alive"])?, "alive");
        Ok(())
    })
}
