//! A container's own layer: its alone, and kept while it is.

use crate::{Test, docker};

#[test]
fn each_container_sees_only_its_own_writes() -> Test {
    let docker = docker()?;
    let first = docker.run_detached(&["busybox", "sleep", "1000"])?;
    let second = docker.run_detached(&["busybox", "sleep", "1000"])?;
    first.exec(&["sh", "-c", "echo mine >/etc/mine; rm /etc/group; echo changed >/etc/passwd"])?;
    assert_eq!(
        first.exec(&["sh", "-c", "cat /etc/mine /etc/passwd; ls /etc/group 2>/dev/null || true"])?,
        "mine\nchanged"
    );
    let other = second.exec(&["sh", "-c", "ls /etc/mine 2>/dev/null; head -1 /etc/passwd; ls /etc/group"])?;
    assert_eq!(other, "root:x:0:0:root:/root:/bin/sh\n/etc/group");
    Ok(())
}

#[test]
fn a_started_again_container_keeps_its_writes() -> Test {
    let docker = docker()?;
    let script = "echo run >>/count; wc -l </count";
    let container = docker.run_detached(&["busybox", "sh", "-c", script])?;
    container.docker(&["wait"])?;
    container.docker(&["start"])?;
    container.docker(&["wait"])?;
    assert_eq!(container.docker(&["logs"])?, "1\n2");
    Ok(())
}

#[test]
fn writes_survive_kill_too_once_synced() -> Test {
    let docker = docker()?;
    let container = docker.run_detached(&["busybox", "sleep", "1000"])?;
    container.exec(&["sh", "-c", "echo kept >/kept; sync"])?;
    container.docker(&["kill"])?;
    container.docker(&["wait"])?;
    container.docker(&["start"])?;
    assert_eq!(container.exec(&["cat", "/kept"])?, "kept");
    Ok(())
}

#[test]
fn a_new_container_starts_from_the_image() -> Test {
    let docker = docker()?;
    docker.ok(&["run", "--rm", "busybox", "touch", "/left"])?;
    assert_eq!(
        docker.ok(&["run", "--rm", "busybox", "sh", "-c", "ls /left 2>/dev/null || echo none"])?,
        "none"
    );
    Ok(())
}
