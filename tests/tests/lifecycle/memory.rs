//! Guest memory is lent: it grows to the limit, what is freed goes back to the host, and who takes too much is killed
//! alone.

use std::thread;
use std::time::Duration;

use anyhow::{Context, bail};
use bulkhead_tests::docker::Container;
use bulkhead_tests::{DaemonOptions, Docker, Host, Suite, with_daemon};

use crate::Test;

const MIB: u64 = 1 << 20;

fn docker() -> anyhow::Result<Docker> {
    Ok(Suite::from_env()?.docker())
}

/// Bytes of the host's memory that the container's VMM has, guest memory included.
fn resident(docker: &Docker, container: &Container) -> anyhow::Result<u64> {
    let pid = docker.inspect(container.name(), "{{.State.Pid}}")?;
    let line = Host::from_env()?.sh("grep VmRSS /proc/$1/status", &[&pid])?;
    let kib = line.split_whitespace().nth(1).context("VmRSS")?;
    Ok(kib.parse::<u64>()? * 1024)
}

/// Bytes that `/proc/meminfo` in the container says.
fn meminfo(container: &Container, field: &str) -> anyhow::Result<u64> {
    let line = container.exec(&["grep", &format!("^{field}:"), "/proc/meminfo"])?;
    Ok(line.split_whitespace().nth(1).context("a number")?.parse::<u64>()? * 1024)
}

/// Asks until the answer is right. The bound is for a host that hangs, and far above what a slow one needs.
fn until<T: std::fmt::Debug>(
    what: &str,
    mut ask: impl FnMut() -> anyhow::Result<T>,
    right: impl Fn(&T) -> bool,
) -> anyhow::Result<T> {
    let mut last = None;
    for _ in 0..300 {
        let answer = ask()?;
        if right(&answer) {
            return Ok(answer);
        }
        last = Some(answer);
        thread::sleep(Duration::from_millis(400));
    }
    bail!("{what} did not come: {last:?}")
}

fn fill(container: &Container, path: &str, mib: u64) -> anyhow::Result<()> {
    let count = format!("count={mib}");
    container.exec(&["dd", "if=/dev/zero", &format!("of={path}"), "bs=1M", &count]).map(drop)
}

#[test]
fn what_a_workload_frees_is_the_host_s_again() -> Test {
    let docker = docker()?;
    let flags = ["-m", "700m", "--init", "--tmpfs", "/scratch:size=600m"];
    let container = docker.run_detached(&[&flags[..], &["busybox", "sleep", "100000"]].concat())?;
    let idle = resident(&docker, &container)?;
    fill(&container, "/scratch/file", 512)?;
    let full = resident(&docker, &container)?;
    assert!(full >= idle + 500 * MIB, "{idle} {full}");
    container.exec(&["rm", "/scratch/file"])?;
    let back = |now: &u64| *now <= full - 450 * MIB;
    let freed = until("memory", || resident(&docker, &container), back)?;
    println!("MiB of a VMM: idle {}, 512 MiB in use {}, freed {}", idle / MIB, full / MIB, freed / MIB);
    // And it can be had again.
    fill(&container, "/scratch/again", 512)
}

#[test]
fn a_workload_finds_all_of_its_memory_when_it_starts() -> Test {
    let docker = docker()?;
    for (limit, least) in [("64m", 64), ("200m", 200)] {
        // Its first instructions see it, and may use it at once.
        let script = "grep MemTotal /proc/meminfo; head -c \"$1\" /dev/zero >/scratch/file && echo filled";
        let bytes = ((least - 16) * MIB).to_string();
        let flags = ["run", "--rm", "-m", limit, "--tmpfs", "/scratch:size=100%"];
        let text = docker.ok(&[&flags[..], &["busybox", "sh", "-c", script, "sh", &bytes]].concat())?;
        let (total, rest) = text.split_once('\n').context("two lines")?;
        let kib: u64 = total.split_whitespace().nth(1).context("MemTotal")?.parse()?;
        assert!(kib >= least * 1024, "{limit}: {total}");
        assert_eq!(rest, "filled", "{limit}");
    }
    Ok(())
}

#[test]
fn a_limit_moves_up_and_down_while_the_workload_runs() -> Test {
    let docker = docker()?;
    let flags = ["-m", "100m", "--tmpfs", "/scratch:size=1g", "--init", "busybox", "sleep", "100000"];
    let container = docker.run_detached(&flags)?;
    let limit = |value: &str, bytes: u64| -> Test {
        docker.ok(&["update", "-m", value, "--memory-swap", value, container.name()])?;
        assert_eq!(container.exec(&["cat", "/sys/fs/cgroup/memory.max"])?, bytes.to_string());
        assert_eq!(docker.inspect(container.name(), "{{.HostConfig.Memory}}")?, bytes.to_string());
        Ok(())
    };
    let small = meminfo(&container, "MemTotal")?;
    assert!(small < 200 * MIB, "{small}");
    limit("260m", 260 * MIB)?;
    // It is there at once, and more can be used than there was before.
    let large = meminfo(&container, "MemTotal")?;
    assert!(large >= 260 * MIB, "{large}");
    fill(&container, "/scratch/file", 180)?;
    container.exec(&["rm", "/scratch/file"])?;
    limit("100m", 100 * MIB)?;
    until("less memory", || meminfo(&container, "MemTotal"), |total| *total <= small)?;
    let over = container.exec(&["sh", "-c", "head -c 150m /dev/zero >/scratch/file"]);
    assert!(over.is_err(), "what is over the new limit was written");
    Ok(())
}

#[test]
fn more_than_the_host_has_can_be_allowed() -> Test {
    let text = docker()?.ok(&["run", "--rm", "-m", "1t", "busybox", "cat", "/sys/fs/cgroup/memory.max"])?;
    assert_eq!(text, (1u64 << 40).to_string());
    Ok(())
}

#[test]
fn a_workload_over_its_limit_is_killed_and_nobody_else() -> Test {
    let docker = docker()?;
    let bystander = docker.run_detached(&["-m", "64m", "--init", "busybox", "sleep", "100000"])?;
    let hog = docker.run_detached(&["-m", "64m", "busybox", "tail", "/dev/zero"])?;
    assert_eq!(hog.docker(&["wait"])?, "137");
    assert_eq!(docker.inspect(hog.name(), "{{.State.OOMKilled}} {{.State.ExitCode}}")?, "true 137");
    let filter = format!("container={}", hog.name());
    let events = docker.events(&[&filter], "{{.Action}}")?;
    let events: Vec<&str> = events.lines().collect();
    let at = |action: &str| events.iter().position(|event| *event == action);
    assert!(at("oom").is_some() && at("oom") < at("die"), "{events:?}");
    assert_eq!(bystander.exec(&["echo", "alive"])?, "alive");
    assert_eq!(docker.inspect(bystander.name(), "{{.State.OOMKilled}} {{.State.Running}}")?, "false true");
    Ok(())
}

#[test]
fn a_workload_that_wants_all_of_the_guest_is_killed_and_the_guest_is_not() -> Test {
    let docker = docker()?;
    // The shell is not the one that takes too much; no limit but the guest's own memory.
    let container =
        docker.run_detached(&["busybox", "sh", "-c", "tail /dev/zero; echo $?; exec sleep 100000"])?;
    until("the end", || container.docker(&["logs"]), |log: &String| log.contains("137"))?;
    assert_eq!(container.exec(&["echo", "alive"])?, "alive");
    // Again and again, from several at once.
    let script = "for i in 1 2 3 4; do tail /dev/zero & done; wait; echo done";
    assert_eq!(container.exec(&["sh", "-c", script])?, "done");
    assert_eq!(container.exec(&["echo", "alive"])?, "alive");
    Ok(())
}

#[test]
fn page_cache_goes_when_the_host_is_short() -> Test {
    let short_always = "--reclaim-below-percent=99".to_owned();
    let options = DaemonOptions { arguments: vec![short_always], ..Suite::from_env()?.daemon_options() };
    with_daemon(options, |daemon| {
        let docker = daemon.docker();
        docker.ok(&["pull", "busybox"])?;
        let container = docker.run_detached(&["--init", "busybox", "sleep", "100000"])?;
        let held = "/dev/shm/held";
        fill(&container, held, 32)?;
        fill(&container, "/file", 128)?;
        container.exec(&["sync"])?;
        let cached = |container: &Container| meminfo(container, "Cached");
        until("less page cache", || cached(&container), |cached: &u64| *cached < 70 * MIB)?;
        // What is no cache stays.
        assert_eq!(
            container.exec(&["stat", "-c", "%s %b", held])?,
            format!("{} {}", 32 * MIB, 32 * MIB / 512)
        );
        assert_eq!(container.exec(&["sh", "-c", "cmp -n 134217728 /file /dev/zero && echo same"])?, "same");
        Ok(())
    })
}
