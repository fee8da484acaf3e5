//! Sandboxes that are clones of a template: what must differ does, and a template that is bad costs nobody a start.

use std::collections::HashSet;

use anyhow::Context;
use bulkhead_tests::{Daemon, DaemonOptions, Docker, Host, Suite, with_daemon};

use crate::Test;

fn options(arguments: &[&str]) -> anyhow::Result<DaemonOptions> {
    let arguments = arguments.iter().map(|argument| (*argument).to_owned()).collect();
    Ok(DaemonOptions { arguments, ..Suite::from_env()?.daemon_options() })
}

/// A daemon's CLI, with busybox.
fn busybox(daemon: &Daemon) -> anyhow::Result<Docker> {
    let docker = daemon.docker();
    docker.ok(&["pull", "-q", "busybox"])?;
    Ok(docker)
}

fn run(docker: &Docker) -> anyhow::Result<String> {
    docker.ok(&["run", "--rm", "busybox", "echo", "hello"])
}

/// The daemon's clock in seconds since the epoch.
fn host_clock() -> anyhow::Result<u64> {
    Ok(Host::from_env()?.sh("date +%s", &[])?.trim().parse()?)
}

/// What a clone says of itself, one value a line: what is random, what names it, what time it is.
const WHO: &str = "cat /proc/sys/kernel/random/uuid; head -c 16 /dev/urandom | od -An -tx1 | tr -d ' ';
    cat /proc/sys/kernel/random/boot_id; cat /etc/machine-id; hostname; date +%s; cut -d. -f1 /proc/uptime;
    cat /sys/class/net/eth0/address";

#[test]
fn a_hundred_clones_differ_in_all_that_must() -> Test {
    with_daemon(options(&[])?, |daemon| {
        let docker = busybox(daemon)?;
        run(&docker)?;
        daemon.await_template(1)?;
        let before = host_clock()?;
        let mut said: Vec<Vec<String>> = Vec::new();
        for _ in 0..25 {
            let started: Vec<_> = (0..4)
                .map(|_| docker.spawn(&["run", "--rm", "busybox", "sh", "-c", WHO]))
                .collect::<anyhow::Result<_>>()?;
            for clone in started {
                let output = clone.wait_with_output()?;
                let text = String::from_utf8(output.stdout)?;
                assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
                said.push(text.lines().map(str::to_owned).collect());
            }
        }
        let after = host_clock()?;
        assert_eq!(daemon.restored_runs()?, (100, 101));
        let fields =
            [("uuid", 0), ("urandom", 1), ("boot_id", 2), ("machine-id", 3), ("hostname", 4), ("MAC", 7)];
        for (what, field) in fields {
            let distinct: HashSet<&String> = said
                .iter()
                .map(|who| who.get(field).context("a line is missing"))
                .collect::<Result<_, _>>()?;
            assert_eq!(distinct.len(), 100, "{what}: {distinct:?}");
        }
        for who in &said {
            let number =
                |field: usize| -> anyhow::Result<u64> { Ok(who.get(field).context("line")?.parse()?) };
            let (clock, uptime) = (number(5)?, number(6)?);
            assert!((before..=after).contains(&clock), "{clock} is not between {before} and {after}");
            // A clone's time since boot goes on from its template's: never that of the hundred before it.
            assert!(uptime <= 60 + after - before, "{uptime}");
        }
        Ok(())
    })
}

#[test]
fn a_template_that_is_damaged_or_cannot_be_restored_costs_nobody_a_start() -> Test {
    with_daemon(options(&[])?, |daemon| {
        let docker = busybox(daemon)?;
        run(&docker)?;
        daemon.await_template(1)?;
        let host = Host::from_env()?;
        // Of the same size and time: the VMM alone can tell.
        let state = "cd \"$1\"/templates/*/ && chmod 600 state && touch -r state /tmp/then &&
            dd if=/dev/urandom of=state bs=64 seek=1 count=8 conv=notrunc 2>/dev/null && touch -r /tmp/then state";
        host.sh(state, &[&daemon.data_root()])?;
        assert_eq!(run(&docker)?, "hello");
        assert_eq!(host.sh("ls \"$1\"/templates", &[&daemon.data_root()])?, "");
        assert_eq!(run(&docker)?, "hello");
        assert_eq!(daemon.restored_runs()?.0, 0, "what cannot be restored is booted");
        let told = docker.events(&["event=template"], "{{index .Actor.Attributes \"status\"}}")?;
        // And made again, as soon as there is time for it.
        assert_eq!(told.lines().take(2).collect::<Vec<_>>(), ["built", "discarded"]);
        Ok(())
    })
}

#[test]
fn templates_outlive_their_daemon_and_can_be_switched_off() -> Test {
    let mut daemon = Daemon::start(&Host::from_env()?, options(&[])?)?;
    let docker = busybox(&daemon)?;
    run(&docker)?;
    daemon.await_template(1)?;
    daemon.kill()?;
    daemon.start_again()?;
    // The first may come before the daemon has read what its key is made of.
    while daemon.restored_runs()?.0 == 0 {
        assert_eq!(run(&docker)?, "hello");
    }
    let templates = Host::from_env()?.sh("ls \"$1\"/templates | wc -l", &[&daemon.data_root()])?;
    assert_eq!(templates.trim(), "1");
    drop(daemon);
    with_daemon(options(&["--templates=false"])?, |daemon| {
        let docker = busybox(daemon)?;
        for _ in 0..2 {
            assert_eq!(run(&docker)?, "hello");
        }
        assert_eq!(daemon.restored_runs()?, (0, 2));
        let made = Host::from_env()?.sh("ls \"$1\" | grep -c templates || true", &[&daemon.data_root()])?;
        assert_eq!(made.trim(), "0");
        Ok(())
    })
}

#[test]
fn tenants_do_not_share_templates() -> Test {
    with_daemon(options(&["--template-domain-label", "tenant"])?, |daemon| {
        let docker = busybox(daemon)?;
        for (index, tenant) in ["tenant=a", "tenant=b"].into_iter().enumerate() {
            docker.ok(&["run", "--rm", "--label", tenant, "busybox", "true"])?;
            daemon.await_template(index + 1)?;
        }
        assert_eq!(daemon.restored_runs()?, (0, 2));
        docker.ok(&["run", "--rm", "--label", "tenant=a", "busybox", "true"])?;
        assert_eq!(daemon.restored_runs()?, (1, 3));
        Ok(())
    })
}
