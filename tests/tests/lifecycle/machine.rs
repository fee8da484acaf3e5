//! What microVMs tell of themselves, alive and dead; several vCPUs; and what a new daemon knows of paused ones.

use bulkhead_tests::{DaemonOptions, Docker, Suite, bulkhead, with_daemon};
use serde_json::Value;

use crate::Test;

fn options(arguments: &[&str]) -> anyhow::Result<DaemonOptions> {
    let arguments = arguments.iter().map(|word| (*word).to_owned()).collect();
    Ok(DaemonOptions { arguments, ..Suite::from_env()?.daemon_options() })
}

fn busybox(docker: &Docker) -> Test {
    docker.ok(&["pull", "-q", "busybox"]).map(drop)
}

#[test]
fn a_guest_s_console_and_figures_are_shown() -> Test {
    with_daemon(options(&[])?, |daemon| {
        let docker = daemon.docker();
        busybox(&docker)?;
        let script = "echo '<1>hello from the guest' > /dev/kmsg; echo up; sleep 1000";
        let container = docker.run_detached(&["--privileged", "busybox", "sh", "-c", script])?;
        while container.docker(&["logs"])? != "up" {}
        let text = bulkhead(daemon.socket(), &["console", container.name()])?.ok()?;
        assert!(text.contains("hello from the guest"), "{text}");

        let text = bulkhead(daemon.socket(), &["vmm", container.name()])?.ok()?;
        for expected in ["Exits", "mmio_write", "block0", "vsock", "set up by the driver", "done: AttachDisk"]
        {
            assert!(text.contains(expected), "{expected}: {text}");
        }
        let machine: Value =
            serde_json::from_str(&bulkhead(daemon.socket(), &["vmm", "--json", container.name()])?.ok()?)?;
        assert!(
            machine["Pid"].as_i64() > Some(0) && machine["EnteredGuestUs"].as_u64() > Some(0),
            "{machine}"
        );
        let vsock =
            machine["Devices"].as_array().and_then(|all| all.iter().find(|d| d["Name"] == "vsock")).cloned();
        let vsock = vsock.unwrap_or_default();
        assert!(vsock["Kicks"].as_u64() > Some(0) && vsock["Interrupts"].as_u64() > Some(0), "{vsock}");

        // Followed, it ends with the machine.
        let socket = daemon.socket().to_owned();
        let name = container.name().to_owned();
        let following = std::thread::spawn(move || bulkhead(&socket, &["console", "--follow", &name]));
        container.docker(&["kill"])?;
        let text = following.join().expect("it does not panic")?.text();
        assert!(text.is_empty() || text.contains("hello from the guest"), "{text}");
        let output = bulkhead(daemon.socket(), &["console", container.name()])?;
        assert!(output.code == 1 && output.stderr.contains("is not running"), "{}", output.stderr);
        let output = bulkhead(daemon.socket(), &["vmm", "nosuch"])?;
        assert!(output.code == 1 && output.stderr.contains("No such container: nosuch"), "{}", output.stderr);
        Ok(())
    })
}

#[test]
fn a_guest_that_panics_leaves_its_reason_its_last_words_and_what_happened_before() -> Test {
    with_daemon(options(&[])?, |daemon| {
        let docker = daemon.docker();
        busybox(&docker)?;
        let script = "echo 2 > /proc/sys/vm/panic_on_oom; tail /dev/zero";
        let container = docker.run_detached(&["--privileged", "-m", "32m", "busybox", "sh", "-c", script])?;
        assert_eq!(container.docker(&["wait"])?, "137");
        let error = docker.inspect(container.name(), "{{.State.Error}}")?;
        assert!(error.contains("Kernel panic") && error.contains("panic_on_oom"), "{error}");
        let text = bulkhead(daemon.socket(), &["vmm", container.name()])?.ok()?;
        for expected in ["Ended", "Kernel panic", "LATEST EVENTS", "block0", "queue 0 kicked"] {
            assert!(text.contains(expected), "{expected}: {text}");
        }
        let text = bulkhead(daemon.socket(), &["console", container.name()])?.ok()?;
        assert!(text.contains("Kernel panic"), "{text}");
        let log = daemon.log()?;
        assert!(log.contains("a microVM died") && log.contains("before it died"), "{log}");
        // The next run has a clean sheet.
        docker.ok(&["update", "--restart", "no", container.name()])?;
        Ok(())
    })
}

#[test]
fn a_paused_container_is_still_paused_for_a_new_daemon() -> Test {
    with_daemon(options(&[])?, |daemon| {
        let docker = daemon.docker();
        busybox(&docker)?;
        let container = docker.run_detached(&["busybox", "sleep", "1000"])?;
        container.docker(&["pause"])?;
        daemon.kill()?;
        daemon.start_again()?;
        assert_eq!(docker.inspect(container.name(), "{{.State.Status}}")?, "paused");
        assert_eq!(docker.ok(&["info", "--format", "{{.ContainersPaused}} {{.ContainersRunning}}"])?, "1 0");
        container.docker(&["unpause"])?;
        assert_eq!(container.exec(&["echo", "awake"])?, "awake");
        Ok(())
    })
}

#[test]
fn four_vcpus_under_load_run_on_through_execs_pauses_and_updates() -> Test {
    with_daemon(options(&["--default-vcpus", "4"])?, |daemon| {
        let docker = daemon.docker();
        busybox(&docker)?;
        // Four that count for ever, and a fifth that only looks on.
        let script = "echo $(nproc); for i in 1 2 3 4; do (n=0; while :; do n=$((n+1)); [ $((n % 500)) = 0 ] && echo $n > /n$i; done) & \
                      done; trap 'exit 9' TERM; while :; do usleep 100000; done";
        let container = docker.run_detached(&["busybox", "sh", "-c", script])?;
        while container.docker(&["logs"])? != "4" {}
        let counts = || -> anyhow::Result<Vec<u64>> {
            let text = container.exec(&["sh", "-c", "cat /n1 /n2 /n3 /n4 2>/dev/null"])?;
            Ok(text.lines().filter_map(|line| line.trim().parse().ok()).collect())
        };
        let mut before = Vec::new();
        for round in 0..4 {
            // Each of the four has got on since the last round.
            loop {
                let now = counts()?;
                if now.len() == 4 && now.iter().zip(&before).all(|(now, then)| now > then) {
                    before = now;
                    break;
                }
            }
            container.docker(&["pause"])?;
            docker.ok(&["update", "--cpus", if round % 2 == 0 { "0.9" } else { "1" }, container.name()])?;
            container.docker(&["unpause"])?;
            assert_eq!(container.exec(&["grep", "-c", "^processor", "/proc/cpuinfo"])?, "4");
        }
        container.docker(&["stop", "-t", "60"])?;
        assert_eq!(docker.inspect(container.name(), "{{.State.ExitCode}}")?, "9");
        Ok(())
    })
}
