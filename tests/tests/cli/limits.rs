//! Limits as people set, change and watch them.

use bulkhead_tests::{Suite, bulkhead};
use serde_json::Value;

use crate::{Test, docker};

/// A container's file in its cgroup.
fn limit(container: &bulkhead_tests::docker::Container, file: &str) -> anyhow::Result<String> {
    container.exec(&["cat", &format!("/sys/fs/cgroup/{file}")])
}

#[test]
fn limits_of_a_running_container_change_at_once_and_for_good() -> Test {
    let docker = docker()?;
    let container = docker.run_detached(&[
        "--pids-limit",
        "100",
        "busybox",
        "sh",
        "-c",
        "trap exit TERM; while :; do usleep 100000; done",
    ])?;
    assert_eq!(limit(&container, "pids.max")?, "100");
    docker.ok(&[
        "update",
        "--cpus",
        "0.5",
        "--pids-limit",
        "20",
        "--restart",
        "on-failure:3",
        container.name(),
    ])?;
    assert_eq!(
        (limit(&container, "cpu.max")?.as_str(), limit(&container, "pids.max")?.as_str()),
        ("50000 100000", "20")
    );
    let shown = "{{.HostConfig.NanoCpus}} {{.HostConfig.PidsLimit}} {{.HostConfig.RestartPolicy.Name}}";
    assert_eq!(docker.inspect(container.name(), shown)?, "500000000 20 on-failure");
    docker.ok(&["update", "--pids-limit", "-1", container.name()])?;
    assert_eq!(limit(&container, "pids.max")?, "max");

    container.docker(&["stop"])?;
    docker.ok(&["update", "--pids-limit", "30", container.name()])?;
    container.docker(&["start"])?;
    assert_eq!(
        (limit(&container, "cpu.max")?.as_str(), limit(&container, "pids.max")?.as_str()),
        ("50000 100000", "30")
    );

    let filter = format!("container={}", container.name());
    let events = docker.events(&[&filter, "event=update"], "{{.Action}}")?;
    assert_eq!(events.lines().count(), 3, "{events}");
    Ok(())
}

#[test]
fn a_limit_of_processes_limits_processes() -> Test {
    let docker = docker()?;
    let container = docker.run_detached(&["busybox", "sleep", "1000"])?;
    let forks = "for i in 1 2 3 4 5 6 7 8; do sleep 1000 & done 2>&1; echo started";
    docker.ok(&["update", "--pids-limit", "4", container.name()])?;
    let output = docker.run(&["exec", container.name(), "sh", "-c", forks])?;
    assert!(output.code != 0 && (output.text() + &output.stderr).contains("fork"), "{output:?}");
    Ok(())
}

#[test]
fn an_update_that_does_not_fit_changes_nothing() -> Test {
    let docker = docker()?;
    let container = docker.run_detached(&["--rm", "--cpus", "0.5", "busybox", "sleep", "1000"])?;
    for (flags, words) in [
        (&["--cpus", "1000"][..], "range of CPUs is from 0.01 to"),
        (
            &["--cpu-quota", "5000"],
            "Conflicting options: CPU Quota cannot be updated as NanoCPUs has already been set",
        ),
        (&["--cpuset-cpus", "1000"], "Requested CPUs are not available - requested 1000, available: 0"),
        (&["--memory", "1m"], "Minimum memory limit allowed is 6MB"),
        (&["--restart", "always"], "Restart policy cannot be updated because AutoRemove is enabled"),
    ] {
        let output = docker.run(&[&["update"], flags, &[container.name()]].concat())?;
        assert!(output.code != 0 && output.stderr.contains(words), "{flags:?}: {}", output.stderr);
    }
    assert_eq!(limit(&container, "cpu.max")?, "50000 100000");
    let output = docker.run(&["update", "--cpus", "1", "nosuch"])?;
    assert!(output.stderr.contains("No such container: nosuch"), "{}", output.stderr);
    Ok(())
}

#[test]
fn cpu_limits_are_refused_in_docker_s_words() -> Test {
    for (flags, words) in [
        (&["--cpus", "1000"][..], "range of CPUs is from 0.01 to"),
        (&["--cpuset-cpus", "a"], "Invalid value a for cpuset cpus: invalid format: a"),
        (&["--cpuset-mems", "77"], "Requested memory nodes are not available - requested 77"),
        (&["--cpu-period", "10"], "CPU cfs period can not be less than 1ms"),
        (&["--device-write-bps", "/dev/nosuch:1mb"], "stat /dev/nosuch: no such file or directory"),
        (&["--device-read-iops", "/dev/null:10"], "/dev/null is not a block device"),
        (&["--blkio-weight", "5"], "Range of blkio weight is from 10 to 1000"),
        (&["--label", "bulkhead.net.tx-bps=fast"], "is no number of bytes or frames a second"),
    ] {
        let output = docker()?.run(&[&["create"], flags, &["busybox"]].concat())?;
        assert!(output.code != 0 && output.stderr.contains(words), "{flags:?}: {}", output.stderr);
    }
    Ok(())
}

#[test]
fn a_set_of_cpus_is_as_many_vcpus() -> Test {
    assert_eq!(docker()?.ok(&["run", "--rm", "--cpuset-cpus", "0", "busybox", "nproc"])?, "1");
    Ok(())
}

#[test]
fn stats_have_every_column() -> Test {
    let docker = docker()?;
    let script = "dd if=/dev/zero of=/f bs=64k count=64 conv=fsync 2>/dev/null; echo up; while :; do :; done";
    let container =
        docker.run_detached(&["-m", "64m", "--pids-limit", "50", "busybox", "sh", "-c", script])?;
    while container.docker(&["logs"])? != "up" {}
    let text = docker.ok(&["stats", "--no-stream", "--format", "{{json .}}", container.name()])?;
    let columns: Value = serde_json::from_str(&text)?;
    let column = |name: &str| columns[name].as_str().unwrap_or_default().to_owned();
    assert_eq!(column("Name"), container.name());
    let percent = column("CPUPerc").trim_end_matches('%').parse::<f64>()?;
    assert!(percent > 1.0, "{text}");
    assert!(column("MemUsage").ends_with(" / 64MiB") && !column("MemUsage").starts_with("0B"), "{text}");
    assert_eq!(column("PIDs"), "1");
    let written = column("BlockIO");
    assert!(!written.ends_with("/ 0B") && written != "--", "{text}");
    Ok(())
}

#[test]
fn stats_are_pairs_shots_and_streams() -> Test {
    let suite = Suite::from_env()?;
    let docker = suite.docker();
    let container = docker.run_detached(&["busybox", "sh", "-c", "while :; do :; done"])?;
    let get = |query: &str| {
        let path = format!("/v1.50/containers/{}/stats?{query}", container.name());
        suite.api().request("GET", &path, &[], b"")?.json()
    };
    let used = |stats: &Value, which: &str| stats[which]["cpu_usage"]["total_usage"].as_u64().unwrap_or(0);
    let pair = get("stream=0")?;
    assert!(
        used(&pair, "cpu_stats") > used(&pair, "precpu_stats") && used(&pair, "precpu_stats") > 0,
        "{pair}"
    );
    assert!(
        pair["cpu_stats"]["system_cpu_usage"].as_u64() > pair["precpu_stats"]["system_cpu_usage"].as_u64()
    );
    assert!(pair["cpu_stats"]["online_cpus"].as_u64() >= Some(1));
    let shot = get("stream=0&one-shot=1")?;
    assert!(
        used(&shot, "cpu_stats") > used(&pair, "cpu_stats") && used(&shot, "precpu_stats") == 0,
        "{shot}"
    );
    assert!(shot.get("networks").is_none() || shot["networks"].is_object());

    let mut stream = docker.spawn(&["stats", "--format", "{{.CPUPerc}}", container.name()])?;
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(stream.stdout.take().unwrap()));
    // The CLI redraws for ever; three lines with a figure show that samples follow one another.
    let figures = lines.by_ref().flatten().filter(|line| line.contains('%')).take(3).count();
    stream.kill()?;
    stream.wait()?;
    assert_eq!(figures, 3);

    container.docker(&["kill"])?;
    let ended = get("stream=0")?;
    assert_eq!((used(&ended, "cpu_stats"), ended["read"].as_str()), (0, Some("0001-01-01T00:00:00Z")));
    assert_eq!(ended["id"].as_str().map(str::len), Some(64));
    Ok(())
}

#[test]
fn a_rate_of_writing_holds_a_container_back_and_nobody_else() -> Test {
    let suite = Suite::from_env()?;
    let docker = suite.docker();
    let script = "dd if=/dev/zero of=/f bs=64k count=48 conv=fsync 2>/dev/null && echo written; sleep 1000";
    let limited =
        docker.run_detached(&["--device-write-bps", "/dev/vda:1mb", "busybox", "sh", "-c", script])?;
    let free = docker.run_detached(&["busybox", "sh", "-c", script])?;
    let disk = |name: &str| -> anyhow::Result<Value> {
        let machine: Value =
            serde_json::from_str(&bulkhead(&suite.docker_socket, &["vmm", "--json", name])?.ok()?)?;
        Ok(machine["Devices"]
            .as_array()
            .into_iter()
            .flatten()
            .find(|device| device["Name"] == "block0")
            .cloned()
            .unwrap_or_default())
    };
    for container in [&limited, &free] {
        while container.docker(&["logs"])? != "written" {}
    }
    let (limited, free) = (disk(limited.name())?, disk(free.name())?);
    for disk in [&limited, &free] {
        assert!(disk["Write"]["Bytes"].as_u64() >= Some(3 << 20), "{disk}");
        assert_eq!(disk["Read"]["Throttled"], 0, "{disk}");
    }
    assert_eq!(free["Write"]["Throttled"], 0, "{free}");
    // 3 MiB at 1 MiB a second, less what the bucket held and a last request.
    assert!(limited["Write"]["Throttled"].as_u64() > Some(0), "{limited}");
    assert!(limited["Write"]["ThrottledUs"].as_u64() > Some(500_000), "{limited}");
    Ok(())
}

#[test]
fn a_disk_that_is_held_back_is_whole_after_a_quick_stop() -> Test {
    let docker = docker()?;
    // 4 MiB in the guest's page cache, which its disk would take minutes to write.
    let script = "[ -e /f ] && exec wc -c /f; dd if=/dev/zero of=/f bs=64k count=64 2>/dev/null; trap exit TERM; echo up; \
                  while :; do usleep 100000; done";
    let container =
        docker.run_detached(&["--device-write-bps", "/dev/vda:16kb", "busybox", "sh", "-c", script])?;
    while container.docker(&["logs"])? != "up" {}
    container.docker(&["stop"])?;
    assert_eq!(docker.ok(&["start", "-a", container.name()])?, "4194304 /f");
    Ok(())
}
