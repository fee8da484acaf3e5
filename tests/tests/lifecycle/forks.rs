//! Forks: running clones of a running container.

use std::collections::HashSet;

use anyhow::Context;
use bulkhead_tests::{Daemon, DaemonOptions, Docker, Host, Suite, with_daemon};
use serde_json::json;

use crate::Test;

fn options() -> anyhow::Result<DaemonOptions> {
    Ok(Suite::from_env()?.daemon_options())
}

/// Writes random ids, one after the other.
const IDS: &str = "while :; do cat /proc/sys/kernel/random/uuid >>/ids; sleep 0.1; done";

fn parent(daemon: &Daemon) -> anyhow::Result<(Docker, bulkhead_tests::docker::Container)> {
    let docker = daemon.docker();
    docker.ok(&["pull", "-q", "busybox"])?;
    let parent = docker.run_detached(&["busybox", "sh", "-c", IDS])?;
    while lines(&docker, parent.name())?.len() < 5 {}
    Ok((docker, parent))
}

fn lines(docker: &Docker, name: &str) -> anyhow::Result<Vec<String>> {
    let text = docker.ok(&["exec", name, "sh", "-c", "cat /ids 2>/dev/null || true"])?;
    Ok(text.lines().map(str::to_owned).collect())
}

/// Removed by force when dropped.
struct Clones<'a>(&'a Docker, Vec<String>);

impl Drop for Clones<'_> {
    fn drop(&mut self) {
        for name in &self.1 {
            let _ = self.0.run(&["rm", "-f", name]);
        }
    }
}

fn fork<'a>(daemon: &Daemon, docker: &'a Docker, of: &str, names: &[&str]) -> anyhow::Result<Clones<'a>> {
    let answer =
        daemon.api().json("POST", &format!("/bulkhead/containers/{of}/fork"), &json!({ "Names": names }))?;
    assert_eq!(answer.head.status, 201, "{}", answer.text());
    let made = answer.json()?;
    let made = made.as_array().context("no list")?;
    let name = |clone: &serde_json::Value| clone["Name"].as_str().map(str::to_owned).context("no name");
    Ok(Clones(docker, made.iter().map(name).collect::<anyhow::Result<_>>()?))
}

#[test]
fn clones_share_the_past_and_nothing_else() -> Test {
    with_daemon(options()?, |daemon| {
        let (docker, parent) = parent(daemon)?;
        let clones = fork(daemon, &docker, parent.name(), &["first", "", "third"])?;
        assert_eq!((clones.1.len(), &*clones.1[0], &*clones.1[2]), (3, "first", "third"));
        let past = lines(&docker, parent.name())?;
        let family: Vec<&str> =
            clones.1.iter().map(String::as_str).chain(std::iter::once(parent.name())).collect();
        let mut future = HashSet::new();
        let mut hostnames = HashSet::new();
        let mut machines = HashSet::new();
        for name in &family {
            let mut ids = lines(&docker, name)?;
            while ids.len() < past.len() + 5 {
                ids = lines(&docker, name)?;
            }
            assert_eq!(ids[..4], past[..4], "the disk is the parent's of that moment");
            // Which of them were before the fork is not known to the line: the last are after it.
            for id in &ids[ids.len() - 5..] {
                assert!(future.insert(id.clone()), "{name} has another's random number: {id}");
            }
            hostnames.insert(docker.ok(&["exec", name, "hostname"])?);
            machines.insert(docker.ok(&["exec", name, "cat", "/etc/machine-id"])?);
            docker.ok(&["exec", name, "sh", "-c", "echo $0 >/own", name])?;
            assert_eq!(docker.inspect(name, "{{.State.Status}}")?, "running");
            let short = docker.inspect(name, "{{.Config.Hostname}} {{printf \"%.12s\" .Id}}")?;
            let (hostname, id) = short.split_once(' ').context("two words")?;
            assert_eq!(hostname, id);
            assert!(hostnames.contains(id));
        }
        assert_eq!((hostnames.len(), machines.len()), (4, 4));
        for name in &family {
            assert_eq!(docker.ok(&["exec", name, "cat", "/own"])?, *name, "disks are their own");
        }
        // The parent's end is not theirs; a daemon's neither; and one can be started anew as itself.
        docker.ok(&["rm", "-f", parent.name()])?;
        daemon.kill()?;
        daemon.start_again()?;
        for name in &clones.1 {
            assert_eq!(docker.ok(&["exec", name, "cat", "/own"])?, *name);
        }
        docker.ok(&["restart", "-t", "0", "first"])?;
        assert_eq!(docker.ok(&["exec", "first", "cat", "/own"])?, "first");
        let left = Host::from_env()?.sh("ls \"$1\"/forks", &[&daemon.data_root()])?;
        assert_eq!(left, "");
        Ok(())
    })
}

#[test]
fn output_and_exit_are_each_clones_own() -> Test {
    with_daemon(options()?, |daemon| {
        let docker = daemon.docker();
        docker.ok(&["pull", "-q", "busybox"])?;
        let script = "echo before; while [ ! -e /go ]; do sleep 0.1; done; cat /go; exit 9";
        let parent = docker.run_detached(&["busybox", "sh", "-c", script])?;
        while parent.docker(&["logs"])? != "before" {}
        let clones = fork(daemon, &docker, parent.name(), &["one", "two"])?;
        for name in &clones.1 {
            assert_eq!(docker.ok(&["logs", name])?, "", "what was said before is the parent's");
            docker.ok(&["exec", "-d", name, "sh", "-c", "echo $0 >/g; mv /g /go", name])?;
            assert_eq!(docker.ok(&["wait", name])?, "9");
            assert_eq!(docker.ok(&["logs", name])?, *name);
        }
        assert_eq!(docker.inspect(parent.name(), "{{.State.Status}}")?, "running");
        Ok(())
    })
}

#[test]
fn a_fork_that_cannot_be_makes_no_clone() -> Test {
    with_daemon(options()?, |daemon| {
        let (docker, parent) = parent(daemon)?;
        let refused = |of: &str, names: &[&str], status: u16| -> anyhow::Result<String> {
            let path = format!("/bulkhead/containers/{of}/fork");
            let answer = daemon.api().json("POST", &path, &json!({ "Names": names }))?;
            assert_eq!(answer.head.status, status, "{}", answer.text());
            Ok(answer.json()?["message"].as_str().unwrap_or_default().to_owned())
        };
        assert!(refused(parent.name(), &["fresh", parent.name()], 409)?.contains("already in use"));
        assert!(refused(parent.name(), &["fresh", "not a name"], 400)?.contains("Invalid container name"));
        assert!(refused("nosuch", &["fresh"], 404)?.contains("No such container"));
        docker.ok(&["stop", "-t", "0", parent.name()])?;
        assert!(refused(parent.name(), &["fresh"], 409)?.contains("is not running"));
        assert_eq!(docker.ok(&["ps", "-aq"])?.lines().count(), 1);
        // The name was given back.
        docker.ok(&["create", "--name", "fresh", "busybox"])?;
        docker.ok(&["rm", "fresh"])?;
        Ok(())
    })
}
