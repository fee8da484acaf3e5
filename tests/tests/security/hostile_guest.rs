//! The hostile guest under a real daemon, in place of a guest kernel: what attacks devices, and what lies in the
//! agent's name. Beside it, a healthy container that was started with a kernel.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use bulkhead_tests::docker::Container;
use bulkhead_tests::hostile::image_of;
use bulkhead_tests::{Daemon, Suite, with_daemon};

use crate::Test;

/// What the daemon may need for all of it.
const MOST_KIB: u64 = 200 << 10;

/// An image of the guest for the scenario, where the host sees it.
fn image(scenario: &str) -> anyhow::Result<PathBuf> {
    let name = scenario.replace(':', "-");
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("hostile-{name}-{}", std::process::id()));
    image_of(scenario, &path)?;
    Ok(path)
}

/// A daemon with a healthy container, then with a hostile guest as its kernel, one after the other; each time, and
/// afterwards, both must be well.
fn beside_a_healthy_container(scenarios: &[&str], test: impl Fn(&Daemon, &str) -> Test) -> Test {
    with_daemon(Suite::from_env()?.daemon_options(), |daemon| {
        daemon.docker().ok(&["pull", "-q", "busybox"])?;
        let healthy = daemon.docker().run_detached(&["busybox", "sleep", "10000"])?;
        for scenario in scenarios {
            let image = image(scenario)?;
            daemon.change_kernel(&image)?;
            assert_eq!(healthy.exec(&["echo", "before"])?, "before");
            test(daemon, scenario).with_context(|| (*scenario).to_owned())?;
            assert_eq!(healthy.exec(&["echo", "after"])?, "after");
            std::fs::remove_file(&image)?;
        }
        let memory = daemon.memory_kib()?;
        assert!(memory < MOST_KIB, "the daemon has {memory} KiB");
        Ok(())
    })
}

/// Runs a container that cannot start; gives what docker says of it.
fn refused(daemon: &Daemon, container: &Container) -> anyhow::Result<String> {
    let output = daemon.docker().run(&["run", "--name", container.name(), "busybox", "true"])?;
    if output.code < 125 {
        bail!("exit code {}: {}", output.code, output.stderr);
    }
    Ok(output.stderr)
}

#[test]
fn a_guest_that_corrupts_a_queue_is_ended_and_the_reason_told() -> Test {
    beside_a_healthy_container(&["index_runs:0"], |daemon, _| {
        let container = daemon.docker().container();
        let words = refused(daemon, &container)?;
        assert!(words.contains("device block0") && words.contains("queue 0"), "{words}");
        let error = daemon.docker().inspect(container.name(), "{{.State.Error}}")?;
        assert!(error.contains("device block0"), "{error}");
        Ok(())
    })
}

#[test]
fn a_storm_does_not_keep_the_daemon_from_its_work() -> Test {
    beside_a_healthy_container(&["doorbells:1000"], |daemon, _| {
        let docker = daemon.docker();
        let container = docker.container();
        let mut storm = docker.spawn(&["run", "--name", container.name(), "busybox", "true"])?;
        // It never greets. Meanwhile the daemon does what it is asked, and in the end what it is told.
        wait_for(|| Ok(docker.run(&["inspect", container.name()])?.code == 0))?;
        docker.ok(&["ps", "-a"])?;
        docker.ok(&["images"])?;
        docker.ok(&["rm", "-f", container.name()])?;
        assert_ne!(storm.wait()?.code(), Some(0));
        Ok(())
    })
}

#[test]
fn agents_that_speak_nonsense_are_hung_up_on() -> Test {
    let lies = ["vsock_agent:0", "vsock_agent:1", "vsock_agent:2", "vsock_agent:3"];
    beside_a_healthy_container(&lies, |daemon, _| {
        let container = daemon.docker().container();
        let words = refused(daemon, &container)?;
        assert!(words.contains("agent"), "{words}");
        Ok(())
    })
}

#[test]
fn an_agent_that_floods_or_falls_silent_can_be_removed() -> Test {
    beside_a_healthy_container(&["vsock_agent:4", "vsock_agent:5"], |daemon, _| {
        let docker = daemon.docker();
        let container = docker.container();
        let mut command = docker.command(&["run", "--name", container.name(), "busybox", "true"]);
        let mut run = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        wait_for(|| Ok(docker.run(&["inspect", container.name()])?.code == 0))?;
        // Let it flood for a while.
        for _ in 0..10 {
            docker.ok(&["ps"])?;
            thread::sleep(Duration::from_millis(200));
        }
        docker.ok(&["rm", "-f", container.name()]).context("a container whose agent lies")?;
        assert_ne!(run.wait()?.code(), Some(0));
        Ok(())
    })
}

fn wait_for(mut what: impl FnMut() -> anyhow::Result<bool>) -> Test {
    let begun = Instant::now();
    while !what()? {
        if begun.elapsed() > Duration::from_secs(60) {
            bail!("it did not come");
        }
        thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}
