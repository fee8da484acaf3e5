//! A line printed in a workload's last millisecond is never lost, whatever else goes on.

use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use anyhow::bail;

use crate::{Test, docker};

#[test]
fn two_hundred_short_workloads_in_a_row_lose_no_line() -> Test {
    run_all(200, 1)
}

#[test]
fn a_hundred_short_workloads_eight_at_a_time_lose_no_line() -> Test {
    run_all(100, 8)
}

fn run_all(runs: u32, at_a_time: u32) -> Test {
    let docker = docker()?;
    let next = AtomicU32::new(0);
    let worker = || -> Test {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= runs {
                return Ok(());
            }
            let line = format!("line {number}");
            let output = docker.run(&["run", "--rm", "busybox", "echo", &line])?;
            if output.code != 0 || output.text() != format!("{line}\n") {
                bail!("run {number}: exit code {}, {:?}, {}", output.code, output.text(), output.stderr);
            }
        }
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..at_a_time).map(|_| scope.spawn(worker)).collect();
        workers
            .into_iter()
            .try_for_each(|worker| worker.join().unwrap_or_else(|_| bail!("a worker panicked")))
    })
}
