//! What a container said, later and as it comes.

use std::io::{BufRead, BufReader};

use anyhow::Context;

use crate::{Test, docker};

#[test]
fn logs_of_an_ended_container_are_whole_and_apart() -> Test {
    let docker = docker()?;
    let container = docker.run_detached(&["busybox", "sh", "-c", "echo one; echo two >&2; printf three"])?;
    container.docker(&["wait"])?;
    let output = docker.run(&["logs", container.name()])?;
    assert_eq!((output.text().as_str(), output.stderr.as_str()), ("one\nthree", "two\n"));
    Ok(())
}

#[test]
fn tail_gives_the_last_lines() -> Test {
    let docker = docker()?;
    let container = docker.run_detached(&["busybox", "seq", "1", "1000"])?;
    container.docker(&["wait"])?;
    assert_eq!(docker.ok(&["logs", "--tail", "3", container.name()])?, "998\n999\n1000");
    assert_eq!(docker.ok(&["logs", "--tail", "0", container.name()])?, "");
    Ok(())
}

#[test]
fn timestamps_are_given_and_since_starts_at_one_of_them() -> Test {
    let docker = docker()?;
    let container = docker.run_detached(&["busybox", "sh", "-c", "echo one; sleep 2; echo two"])?;
    container.docker(&["wait"])?;
    let stamped = docker.ok(&["logs", "-t", container.name()])?;
    let lines: Vec<(&str, &str)> = stamped.lines().filter_map(|line| line.split_once(' ')).collect();
    assert_eq!(lines.iter().map(|(_, text)| *text).collect::<Vec<_>>(), ["one", "two"], "{stamped}");
    assert!(lines[0].0 < lines[1].0 && lines[0].0.ends_with('Z'), "{stamped}");
    assert_eq!(docker.ok(&["logs", "--since", lines[1].0, container.name()])?, "two");
    Ok(())
}

#[test]
fn follow_shows_lines_as_they_come_and_ends_with_the_container() -> Test {
    let docker = docker()?;
    let script = "echo first; while [ ! -e /go ]; do sleep 0.1; done; echo last";
    let container = docker.run_detached(&["busybox", "sh", "-c", script])?;
    let mut child = docker.spawn(&["logs", "-f", container.name()])?;
    let mut lines = BufReader::new(child.stdout.take().context("stdout")?).lines();
    assert_eq!(lines.next().context("no line")??, "first");
    container.touch("/go")?;
    assert_eq!(lines.next().context("no line")??, "last");
    assert!(lines.next().is_none());
    assert!(child.wait()?.success());
    Ok(())
}

#[test]
fn full_files_go_and_their_lines_with_them() -> Test {
    let docker = docker()?;
    for driver in ["json-file", "local"] {
        let options = ["--log-driver", driver, "--log-opt", "max-size=4k", "--log-opt", "max-file=3"];
        // Files change between what was written at once, never within it.
        let script = "for i in $(seq 0 50 950); do seq $((i + 1)) $((i + 50)); sleep 0.2; done";
        let compress = ["--log-opt", "compress=true", "busybox", "sh", "-c", script];
        let container = docker.run_detached(&[&options[..], &compress].concat())?;
        container.docker(&["wait"])?;
        let text = container.docker(&["logs"])?;
        let lines: Vec<u32> = text.lines().map(str::parse).collect::<Result<_, _>>()?;
        assert_eq!(lines.last(), Some(&1000), "{driver}");
        assert!(lines.windows(2).all(|pair| pair[0] + 1 == pair[1]), "{driver}: {lines:?}");
        assert!((20..500).contains(&lines.len()), "{driver}: {} lines of 1000", lines.len());
        assert_eq!(
            docker.ok(&["logs", "--tail", "100", container.name()])?.lines().count(),
            100.min(lines.len())
        );
    }
    Ok(())
}

#[test]
fn details_are_what_the_options_choose() -> Test {
    let docker = docker()?;
    let container = docker.run_detached(&[
        "--label=team=blue sky",
        "--env=TIER=front",
        "--log-opt=labels=team",
        "--log-opt=env=TIER",
        "--log-opt=tag={{.Name}}",
        "busybox",
        "echo",
        "text",
    ])?;
    container.docker(&["wait"])?;
    let details = docker.ok(&["logs", "--details", container.name()])?;
    assert_eq!(details, format!("TIER=front,tag={},team=blue+sky text", container.name()));
    let refused = docker.run(&["create", "--log-opt", "max-file=0", "busybox"])?;
    assert!(refused.stderr.contains("max-file cannot be less than 1"), "{}", refused.stderr);
    let refused = docker.run(&["create", "--log-driver", "splunk", "busybox"])?;
    assert!(refused.stderr.contains("no log driver named 'splunk' is registered"), "{}", refused.stderr);
    Ok(())
}

#[test]
fn until_ends_at_a_time() -> Test {
    let docker = docker()?;
    let container = docker.run_detached(&["busybox", "sh", "-c", "echo one; sleep 2; echo two"])?;
    container.docker(&["wait"])?;
    let stamped = docker.ok(&["logs", "-t", container.name()])?;
    let first = stamped.split(' ').next().unwrap_or_default();
    assert_eq!(docker.ok(&["logs", "--until", first, container.name()])?, "one");
    Ok(())
}
