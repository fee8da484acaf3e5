//! `docker cp`, `diff` and `export`, of containers that run and of those that do not.

use std::fs;
use std::path::Path;
use std::thread;

use anyhow::Context;
use bulkhead_tests::{Container, Docker, Suite, size};

use crate::Test;
use crate::local::{few, many, tree};

fn from(container: &Container, path: &str) -> String {
    format!("{}:{path}", container.name())
}

/// Copies to a container and back, and compares what comes back.
fn there_and_back(docker: &Docker, container: &Container, local: &Path, to: &str) -> Test {
    let back = tempfile::tempdir()?;
    docker.ok(&["cp", &local.display().to_string(), &from(container, to)])?;
    docker.ok(&["cp", "-a", &from(container, to), &back.path().join("x").display().to_string()])?;
    let (sent, came) = (tree(local)?, tree(&back.path().join("x"))?);
    let names = |tree: &std::collections::BTreeMap<String, _>| tree.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&came), names(&sent));
    for (name, file) in sent {
        assert!(came[&name] == file, "{name} differs");
    }
    Ok(())
}

#[test]
fn many_files_and_a_large_one_go_both_ways_whether_it_runs_or_not() -> Test {
    let suite = Suite::from_env()?;
    let docker = suite.docker();
    let (count, mib) = (size(1500, 50_000), size(24, 1024));
    let local = tempfile::tempdir()?;
    many(local.path(), count, mib)?;
    let container = docker.run_detached(&["busybox", "sleep", "100000"])?;
    there_and_back(&docker, &container, local.path(), "/running")?;
    let found = container.exec(&["sh", "-c", "find /running -type f | wc -l"])?;
    assert_eq!(found.trim(), (count + 1).to_string());
    container.docker(&["kill"])?;
    there_and_back(&docker, &container, local.path(), "/stopped")?;
    // What was copied while nothing ran is there when it runs.
    container.docker(&["start"])?;
    let same = "cmp /running/large /stopped/large && find /stopped -type f | wc -l";
    assert_eq!(container.exec(&["sh", "-c", same])?.trim(), (count + 1).to_string());
    Ok(())
}

#[test]
fn every_form_of_cp_means_what_it_means_to_docker() -> Test {
    let suite = Suite::from_env()?;
    let docker = suite.docker();
    let local = tempfile::tempdir()?;
    let src = local.path().join("src");
    few(&src)?;
    let text = |name: &str| local.path().join(name).display().to_string();
    let setup = "mkdir -p /dir /to; echo old > /file; ln -s /dir /dlink; ln -s /file /flink; \
                 ln -s /gone/file /dangling; echo up; exec sleep 100000";
    let container = docker.run_detached(&["busybox", "sh", "-c", setup])?;
    container.exec(&["sh", "-c", "until [ -L /dangling ]; do sleep 0.1; done"])?;
    let at = |path: &str| from(&container, path);
    let forms = |of: &str| -> Test {
        // A directory into one that is there, into one that is not, and its content alone.
        docker.ok(&["cp", &text("src"), &at("/to")])?;
        docker.ok(&["cp", &text("src"), &at(&format!("/new{of}"))])?;
        docker.ok(&["cp", &text("src/."), &at("/dlink")])?;
        for path in ["/to/src", &format!("/new{of}"), "/dir"] {
            let out = tempfile::tempdir()?;
            docker.ok(&["cp", "-a", &at(&format!("{path}/.")), &out.path().display().to_string()])?;
            // What the CLI writes here is its user's own, whose it was in the container.
            let mut expected = tree(&src)?;
            expected.values_mut().for_each(|file| file.owner = (0, 0));
            assert_eq!(tree(out.path())?, expected, "{path} {of}");
            if of == "-running" {
                let owner = container.exec(&["stat", "-c", "%u:%g", &format!("{path}/a")])?;
                assert_eq!(owner, "70000:80000", "{path}");
            }
        }
        // A file onto a name, into a directory, through a link; from there, and its link followed.
        docker.ok(&["cp", &text("src/a"), &at(&format!("/renamed{of}"))])?;
        docker.ok(&["cp", &text("src/a"), &at("/flink")])?;
        docker.ok(&["cp", &at("/flink"), &text("as-link")])?;
        assert_eq!(fs::read_link(text("as-link"))?, Path::new("/file"));
        docker.ok(&["cp", "-L", &at("/flink"), &text("followed")])?;
        assert_eq!(fs::read_to_string(text("followed"))?, "one");
        docker.ok(&["cp", &at(&format!("/renamed{of}")), &text("src-out")])?;
        assert_eq!(fs::read_to_string(text("src-out"))?, "one");
        for name in ["as-link", "followed", "src-out"] {
            fs::remove_file(text(name))?;
        }
        // To stdout and from stdin.
        let archive = docker.run(&["cp", &at("/dir/sub"), "-"])?.stdout;
        docker.run_with(&["cp", "-", &at("/to")], archive)?.ok()?;
        // What cannot be, in Docker's words.
        for (words, says) in [
            (["cp", &at("/no/such"), "/tmp"], "Could not find the file /no/such in container"),
            (["cp", &text("src/a"), &at("/no/dir/")], "no such directory"),
            (["cp", &text("src"), &at("/file")], "cannot copy directory"),
            (["cp", &text("src"), &at("/dangling")], ""),
        ] {
            let output = docker.run(&words)?;
            assert!(output.code != 0 && output.stderr.contains(says), "{words:?}: {}", output.stderr);
        }
        Ok(())
    };
    forms("-running")?;
    container.docker(&["stop", "-t", "0"])?;
    forms("-stopped")?;
    Ok(())
}

#[test]
fn differences_and_the_whole_are_told_of_both_kinds() -> Test {
    let suite = Suite::from_env()?;
    let docker = suite.docker();
    let script = "mkdir -p /new/deep; echo x > /new/deep/f; rm /bin/wc; echo y >> /etc/passwd; \
                  ln /new/deep/f /new/hard; mkfifo /new/fifo; touch /done; exec sleep 100000";
    let container = docker.run_detached(&["busybox", "sh", "-c", script])?;
    container.exec(&["sh", "-c", "until [ -e /done ]; do sleep 0.1; done"])?;
    let expected = [
        "A /done",
        "A /new",
        "A /new/deep",
        "A /new/deep/f",
        "A /new/fifo",
        "A /new/hard",
        "C /bin",
        "C /etc",
        "C /etc/passwd",
        "D /bin/wc",
    ];
    let check = |of: &str| -> Test {
        let mut changes: Vec<String> = container.docker(&["diff"])?.lines().map(str::to_owned).collect();
        changes.sort();
        assert_eq!(changes, expected, "{of}");
        let archive = docker.run(&["export", container.name()])?;
        let names = names(&archive.stdout)?;
        for name in ["new/deep/f", "new/hard", "new/fifo", "etc/passwd", "bin/sh"] {
            assert!(names.iter().any(|have| have.trim_start_matches('/') == name), "{name} {of}: {names:?}");
        }
        assert!(!names.iter().any(|name| name.contains("bin/wc") || name.contains("proc/1")), "{of}");
        Ok(())
    };
    check("running")?;
    container.docker(&["pause"])?;
    check("paused")?;
    container.docker(&["kill"])?;
    check("stopped")?;
    let untouched = docker.container();
    docker.ok(&["create", "--name", untouched.name(), "busybox"])?;
    assert_eq!(untouched.docker(&["diff"])?, "", "what was never started has no changes");
    Ok(())
}

fn names(archive: &[u8]) -> anyhow::Result<Vec<String>> {
    let mut archive = tar::Archive::new(archive);
    let names =
        archive.entries()?.map(|entry| Ok(String::from_utf8_lossy(&entry?.path_bytes()).into_owned()));
    names.collect()
}

#[test]
fn copies_and_starts_at_once_never_share_the_disk() -> Test {
    let suite = Suite::from_env()?;
    let docker = suite.docker();
    let local = tempfile::tempdir()?;
    many(local.path(), 50, 4)?;
    let container = docker.container();
    docker.ok(&["create", "--name", container.name(), "busybox", "sleep", "100000"])?;
    for round in 0..2 {
        let copies: Vec<_> = (0..2)
            .map(|copy| {
                let (docker, source) = (docker.clone(), local.path().display().to_string());
                let target = from(&container, &format!("/copy-{round}-{copy}"));
                thread::spawn(move || docker.ok(&["cp", &source, &target]))
            })
            .collect();
        container.docker(&["start"])?;
        for copy in copies {
            copy.join().ok().context("a panic")??;
        }
        for copy in 0..2 {
            let count = format!("find /copy-{round}-{copy} -type f | wc -l");
            assert_eq!(container.exec(&["sh", "-c", &count])?.trim(), "51");
        }
        container.docker(&["kill"])?;
    }
    // A removal does not wait for a copy, and the copy ends.
    let (again, source) = (docker.clone(), local.path().display().to_string());
    let target = from(&container, "/last");
    let copy = thread::spawn(move || again.run(&["cp", &source, &target]));
    container.docker(&["rm"])?;
    copy.join().ok().context("a panic")??;
    Ok(())
}
