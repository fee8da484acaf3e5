//! Flags of `docker run`, as the workload sees them.

use crate::{Test, docker};

/// What the shell script prints in a container of these flags.
fn inside(flags: &[&str], script: &str) -> anyhow::Result<String> {
    docker()?.ok(&[&["run", "--rm"], flags, &["busybox", "sh", "-c", script]].concat())
}

#[test]
fn e_sets_variables_and_the_image_s_stay() -> Test {
    let text = inside(&["-e", "A=1", "-e", "B=two words"], "echo \"$A|$B|$PATH\"")?;
    assert!(text.starts_with("1|two words|/usr/local/sbin:"), "{text}");
    Ok(())
}

#[test]
fn w_is_the_working_directory_and_is_made() -> Test {
    assert_eq!(inside(&["-w", "/made/for/this"], "pwd")?, "/made/for/this");
    Ok(())
}

#[test]
fn u_takes_names_numbers_and_groups() -> Test {
    assert_eq!(inside(&["-u", "nobody"], "echo $(id -u) $(id -g)")?, "65534 65534");
    assert_eq!(
        inside(&["-u", "1234:5678", "--group-add", "wheel"], "echo $(id -u) $(id -G)")?,
        "1234 5678 10"
    );
    Ok(())
}

#[test]
fn an_unknown_user_is_refused_by_name() -> Test {
    let output = docker()?.run(&["run", "--rm", "-u", "stranger", "busybox", "true"])?;
    assert!(output.code > 124 && output.stderr.contains("stranger"), "{} {}", output.code, output.stderr);
    Ok(())
}

#[test]
fn h_is_the_host_name() -> Test {
    assert_eq!(inside(&["-h", "walrus"], "hostname; cat /etc/hostname")?, "walrus\nwalrus");
    Ok(())
}

#[test]
fn the_host_name_is_the_container_s_short_id_by_default() -> Test {
    let docker = docker()?;
    let container = docker.run_detached(&["busybox", "hostname"])?;
    container.docker(&["wait"])?;
    let id = docker.inspect(container.name(), "{{.Id}}")?;
    assert_eq!(Some(container.docker(&["logs"])?.as_str()), id.get(..12));
    Ok(())
}

#[test]
fn read_only_is_the_root_and_tmpfs_is_not() -> Test {
    let text = inside(
        &["--read-only", "--tmpfs", "/scratch:size=1m"],
        "touch /x 2>/dev/null || echo refused; touch /scratch/x && echo written; df -k /scratch | tail -1 | awk '{print $2}'",
    )?;
    assert_eq!(text, "refused\nwritten\n1024");
    Ok(())
}

#[test]
fn capabilities_are_docker_s_and_can_be_dropped_and_added() -> Test {
    let effective = "grep CapEff /proc/self/status | awk '{print $2}'";
    assert_eq!(inside(&[], effective)?, "00000000a80425fb");
    assert_eq!(inside(&["--cap-drop", "ALL"], effective)?, "0000000000000000");
    assert_eq!(inside(&["--cap-drop", "ALL", "--cap-add", "CHOWN"], effective)?, "0000000000000001");
    assert_eq!(
        inside(&["--cap-drop", "CHOWN"], "touch /x; chown 1 /x 2>/dev/null || echo refused")?,
        "refused"
    );
    Ok(())
}

#[test]
fn ulimit_is_set() -> Test {
    assert_eq!(inside(&["--ulimit", "nofile=123:456"], "ulimit -Sn; ulimit -Hn")?, "123\n456");
    Ok(())
}

#[test]
fn memory_cpu_and_pids_limits_are_the_cgroup_s() -> Test {
    let script = "cd /sys/fs/cgroup; cat memory.max cpu.max pids.max";
    let text = inside(&["-m", "64m", "--cpus", "0.5", "--pids-limit", "20"], script)?;
    assert_eq!(text, "67108864\n50000 100000\n20");
    Ok(())
}

#[test]
fn a_workload_over_its_memory_limit_is_killed_and_said_to_be() -> Test {
    let docker = docker()?;
    let container =
        docker.run_detached(&["-m", "32m", "busybox", "sh", "-c", "head -c 100m /dev/zero | tail"])?;
    container.docker(&["wait"])?;
    assert_eq!(docker.inspect(container.name(), "{{.State.OOMKilled}}")?, "true");
    Ok(())
}

#[test]
fn a_fork_bomb_stops_at_the_pids_limit() -> Test {
    let script = "for i in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 5 & done; echo survived";
    let output = docker()?.run(&["run", "--rm", "--pids-limit", "8", "busybox", "sh", "-c", script])?;
    assert!(output.stderr.contains("can't fork"), "{}", output.stderr);
    assert_eq!(output.text(), "");
    Ok(())
}

#[test]
fn entrypoint_replaces_the_image_s() -> Test {
    let text = docker()?.ok(&["run", "--rm", "--entrypoint", "/bin/echo", "busybox", "a", "b"])?;
    assert_eq!(text, "a b");
    Ok(())
}

#[test]
fn init_is_pid_1_and_the_workload_is_not() -> Test {
    assert_eq!(inside(&[], "echo $$")?, "1");
    assert_ne!(inside(&["--init"], "echo $$")?, "1");
    Ok(())
}

#[test]
fn the_kernel_is_the_container_s_own() -> Test {
    let suite_host = bulkhead_tests::Host::from_env()?;
    let release = inside(&[], "uname -r")?;
    assert!(release.ends_with("-microvm"), "{release}");
    assert_ne!(release, suite_host.sh("uname -r", &[])?);
    Ok(())
}

#[test]
fn what_a_microvm_cannot_honour_is_refused_with_the_reason() -> Test {
    for flags in [&["--network", "host"][..], &["--pid", "host"], &["--ipc", "host"]] {
        let output = docker()?.run(&[&["run", "--rm"], flags, &["busybox", "true"]].concat())?;
        assert_eq!(output.code, 125, "{flags:?}: {}", output.stderr);
        assert!(output.stderr.contains("host"), "{flags:?}: {}", output.stderr);
    }
    Ok(())
}

#[test]
fn sensitive_paths_of_proc_are_masked() -> Test {
    assert_eq!(
        inside(&[], "wc -c </proc/keys; touch /proc/sysrq-trigger 2>/dev/null || echo refused")?,
        "0\nrefused"
    );
    Ok(())
}
