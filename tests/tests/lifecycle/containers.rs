//! States that a container goes through, as `ps`, `inspect` and `events` tell of them.

use bulkhead_tests::{Docker, Suite, with_daemon};

use crate::Test;

fn docker() -> anyhow::Result<Docker> {
    Ok(Suite::from_env()?.docker())
}

fn state(docker: &Docker, name: &str) -> anyhow::Result<String> {
    docker.inspect(name, "{{.State.Status}}")
}

#[test]
fn create_start_stop_start_remove() -> Test {
    let docker = docker()?;
    let container = docker.container();
    let name = container.name();
    docker.ok(&["create", "--init", "--name", name, "busybox", "sleep", "1000"])?;
    assert_eq!(state(&docker, name)?, "created");
    docker.ok(&["start", name])?;
    assert_eq!(state(&docker, name)?, "running");
    docker.ok(&["stop", "-t", "60", name])?;
    assert_eq!(state(&docker, name)?, "exited");
    docker.ok(&["start", name])?;
    assert_eq!(state(&docker, name)?, "running");
    let refused = docker.run(&["rm", name])?;
    assert!(refused.code != 0 && refused.stderr.contains("running"), "{}", refused.stderr);
    docker.ok(&["rm", "-f", name])?;
    assert!(docker.run(&["inspect", name])?.stderr.contains("No such object"));
    Ok(())
}

#[test]
fn restart_gives_a_new_process_on_the_same_disk() -> Test {
    let docker = docker()?;
    let container =
        docker.run_detached(&["--init", "busybox", "sh", "-c", "echo x >>/runs; exec sleep 1000"])?;
    while container.exec(&["cat", "/runs"]).is_err() {}
    let started = docker.inspect(container.name(), "{{.State.StartedAt}}")?;
    container.docker(&["restart", "-t", "60"])?;
    while container.exec(&["cat", "/runs"])? != "x\nx" {}
    assert_ne!(docker.inspect(container.name(), "{{.State.StartedAt}}")?, started);
    Ok(())
}

#[test]
fn ps_lists_the_running_and_with_a_all_of_them() -> Test {
    let docker = docker()?;
    let running = docker.run_detached(&["busybox", "sleep", "1000"])?;
    let ended = docker.run_detached(&["busybox", "sh", "-c", "exit 3"])?;
    ended.docker(&["wait"])?;
    let list = |flags: &[&str]| docker.ok(&[&["ps", "--format", "{{.Names}} {{.Status}}"], flags].concat());
    assert!(list(&[])?.contains(&format!("{} Up", running.name())));
    assert!(!list(&[])?.contains(ended.name()));
    assert!(list(&["-a"])?.contains(&format!("{} Exited (3)", ended.name())));
    let one = docker.ok(&[
        "ps",
        "-a",
        "--filter",
        &format!("name=^{}$", ended.name()),
        "--format",
        "{{.Names}}",
    ])?;
    assert_eq!(one, ended.name());
    Ok(())
}

#[test]
fn rename_keeps_the_container_and_frees_the_name() -> Test {
    let docker = docker()?;
    let (first, second) = (docker.container(), docker.container());
    docker.ok(&["create", "--name", first.name(), "busybox"])?;
    let id = docker.inspect(first.name(), "{{.Id}}")?;
    docker.ok(&["rename", first.name(), second.name()])?;
    assert_eq!(docker.inspect(second.name(), "{{.Id}}")?, id);
    docker.ok(&["create", "--name", first.name(), "busybox"])?;
    let taken = docker.run(&["rename", second.name(), first.name()])?;
    assert!(taken.code != 0 && taken.stderr.contains("already in use"), "{}", taken.stderr);
    Ok(())
}

#[test]
fn events_tell_the_story_in_order() -> Test {
    let docker = docker()?;
    let container = docker.container();
    docker
        .ok(&["run", "--name", container.name(), "busybox", "sh", "-c", "exit 4"])
        .expect_err("exit code 4");
    container.docker(&["rm"])?;
    let filter = format!("container={}", container.name());
    let format = "{{.Action}} {{.Actor.Attributes.exitCode}}";
    let text = docker.events(&[&filter], format)?;
    let actions: Vec<&str> = text.lines().filter_map(|line| line.split(' ').next()).collect();
    for (before, after) in [("create", "start"), ("start", "die"), ("die", "destroy")] {
        let at = |action: &str| actions.iter().position(|known| *known == action);
        assert!(at(before).is_some() && at(before) < at(after), "{before} before {after}: {text}");
    }
    assert!(text.contains("die 4"), "{text}");
    Ok(())
}

#[test]
fn rm_of_a_run_with_rm_is_done_when_the_cli_returns() -> Test {
    let docker = docker()?;
    let container = docker.container();
    assert_eq!(
        docker.run(&["run", "--rm", "--name", container.name(), "busybox", "sh", "-c", "exit 9"])?.code,
        9
    );
    assert!(docker.run(&["inspect", container.name()])?.stderr.contains("No such object"));
    Ok(())
}

#[test]
fn wait_answers_with_the_code_of_the_next_end() -> Test {
    let docker = docker()?;
    let container =
        docker.run_detached(&["busybox", "sh", "-c", "while [ ! -e /go ]; do sleep 0.1; done; exit 21"])?;
    let waiting = docker.spawn(&["wait", container.name()])?;
    container.touch("/go")?;
    let output = waiting.wait_with_output()?;
    assert_eq!(String::from_utf8(output.stdout)?.trim(), "21");
    Ok(())
}

#[test]
fn system_prune_takes_what_is_over_and_leaves_what_runs() -> Test {
    with_daemon(Suite::from_env()?.daemon_options(), |daemon| {
        let docker = daemon.docker();
        docker.ok(&["pull", "-q", "busybox"])?;
        docker.ok(&["create", "--name", "over", "busybox"])?;
        let container = docker.run_detached(&["busybox", "sleep", "1000"])?;
        docker.ok(&["system", "prune", "-f", "-a", "--volumes"])?;
        assert_eq!(docker.ok(&["ps", "-a", "--format", "{{.Names}}"])?, container.name());
        assert_eq!(docker.ok(&["images", "--format", "{{.Repository}}"])?, "busybox");
        assert_eq!(container.exec(&["echo", "still there"])?, "still there");
        Ok(())
    })
}
