//! Locks between guest and host, on the same files.

use anyhow::ensure;
use bulkhead_tests::size;

use crate::{Test, docker, host};

/// Adds one to a number in a file, again and again, each time under the lock.
const COUNT: &str = "cd \"$1\"; i=0; while [ $i -lt \"$2\" ]; do flock lock sh -c 'n=$(cat n); echo $((n+1)) >n'; i=$((i+1)); done";

#[test]
#[ignore = "not seen to end within ten emulated minutes: to be run by name"]
fn locks_exclude_host_and_guests_from_each_other() -> Test {
    let docker = docker()?;
    let (host, scratch) = host()?;
    let path = scratch.join("shared");
    host.sh("mkdir \"$1\"; echo 0 >\"$1/n\"; : >\"$1/lock\"", &[&path])?;
    let mount = format!("{path}:/shared");
    let first = docker.run_detached(&["-v", &mount, "busybox", "sleep", "1000"])?;
    let second = docker.run_detached(&["-v", &mount, "busybox", "sleep", "1000"])?;
    // One holds it: nobody else gets it, wherever they are.
    first.exec(&["sh", "-c", "flock /shared/lock sh -c ': >/shared/held; while [ -e /shared/held ]; do sleep 0.1; done' >/dev/null 2>&1 & while [ ! -e /shared/held ]; do sleep 0.1; done"])?;
    let try_lock = "flock -n \"$1/lock\" true && echo free || echo taken";
    ensure!(second.exec(&["sh", "-c", try_lock, "sh", "/shared"])? == "taken");
    ensure!(host.sh(try_lock, &[&path])? == "taken");
    host.sh("rm \"$1/held\"", &[&path])?;
    ensure!(host.sh("flock \"$1/lock\" echo mine", &[&path])? == "mine", "a lock that is waited for comes");

    let count = size(5, 100);
    let rounds = count.to_string();
    let counting: Vec<_> = [&first, &second]
        .map(|container| {
            docker.spawn(&["exec", container.name(), "sh", "-c", COUNT, "sh", "/shared", &rounds])
        })
        .into_iter()
        .collect::<Result<_, _>>()?;
    host.sh(COUNT, &[&path, &rounds])?;
    for counter in counting {
        ensure!(counter.wait_with_output()?.status.success());
    }
    let counted = host.sh("cat \"$1/n\"", &[&path])?.parse::<usize>()?;
    ensure!(counted == 3 * count, "{counted}");
    Ok(())
}
