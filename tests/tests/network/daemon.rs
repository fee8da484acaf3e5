//! A daemon that dies leaves nothing that the next does not take over or remove.

use std::{thread, time::Duration};

use bulkhead_tests::{Daemon, Docker, Host, Suite, size, with_daemon};

use crate::{Test, serve};

/// The daemon's id, and what its tables in the packet filter are called.
fn table(daemon: &Daemon) -> anyhow::Result<(String, String)> {
    let id = daemon.docker().ok(&["info", "--format", "{{.ID}}"])?;
    let digits: String = id.chars().filter(char::is_ascii_hexdigit).take(12).collect();
    Ok((id, format!("bulkhead-{digits}")))
}

/// What of networks is on the host for containers of this daemon: taps in its bridges and elements of the packet
/// filter's sets, each a line.
fn traces(daemon: &Daemon) -> anyhow::Result<String> {
    let (id, table) = table(daemon)?;
    let script = r#"
        for alias in /sys/class/net/*/ifalias; do
          case "$(cat "$alias")" in "bulkhead $1") ls "${alias%ifalias}brif";; esac
        done
        nft list table bridge "$2" | grep -o 'bht-[0-9a-f]*' | sort -u
        nft list table inet "$2" | grep -oE '(tcp|udp) [.] [0-9]+ : [^,}]*' | sort"#;
    Host::from_env()?.sh(script, &[&id, &table])
}

/// Removes all containers, running or not.
fn remove_all(docker: &Docker) -> Test {
    let ids = docker.ok(&["ps", "-aq"])?;
    let ids: Vec<&str> = ids.lines().collect();
    if ids.is_empty() { Ok(()) } else { docker.ok(&[&["rm", "-f"], ids.as_slice()].concat()).map(drop) }
}

#[test]
fn many_that_come_and_go_at_once_leave_nothing() -> Test {
    let count = size(16, 200);
    with_daemon(Suite::from_env()?.daemon_options(), |daemon| {
        let docker = daemon.docker();
        docker.ok(&["pull", "-q", "busybox"])?;
        docker.ok(&["network", "create", "mine"])?;
        let run = || {
            let script =
                "ping -c 1 -W 60 $(ip route | sed -n 's/default via \\([^ ]*\\).*/\\1/p') >/dev/null";
            let words = ["run", "--rm", "--network", "mine", "-p", "80", "busybox", "sh", "-c", script];
            docker.ok(&words).map(drop)
        };
        thread::scope(|scope| {
            let share = || scope.spawn(|| (0..count.div_ceil(8)).try_for_each(|_| run()));
            let shares: Vec<_> = (0..8).map(|_| share()).collect();
            shares.into_iter().try_for_each(|share| share.join().unwrap_or_else(|_| anyhow::bail!("a panic")))
        })?;
        assert_eq!(traces(daemon)?, "");
        docker.ok(&["network", "rm", "mine"]).map(drop)
    })
}

#[test]
fn killed_while_containers_come_and_go_it_leaves_nothing() -> Test {
    with_daemon(Suite::from_env()?.daemon_options(), |daemon| {
        let docker = daemon.docker();
        docker.ok(&["pull", "-q", "busybox"])?;
        docker.ok(&["network", "create", "mine"])?;
        for tenths in [3, 9, 18] {
            let begun: Vec<_> = (0..3)
                .map(|_| {
                    docker.spawn(&["run", "-d", "--network", "mine", "-p", "80", "busybox", "sleep", "1000"])
                })
                .collect::<anyhow::Result<_>>()?;
            let removed = docker.ok(&["ps", "-q"])?;
            let removal = removed.lines().next().map(|id| docker.spawn(&["rm", "-f", id])).transpose()?;
            thread::sleep(Duration::from_millis(100 * tenths));
            daemon.kill()?;
            for client in begun.into_iter().chain(removal) {
                client.wait_with_output()?;
            }
            daemon.start_again()?;
            // Those that run have their network.
            let running = docker.ok(&["ps", "-q"])?;
            for id in running.lines() {
                let gateway = docker.inspect(id, "{{.NetworkSettings.Networks.mine.Gateway}}")?;
                docker.ok(&["exec", id, "ping", "-c", "1", "-W", "60", &gateway])?;
            }
        }
        remove_all(&docker)?;
        assert_eq!(traces(daemon)?, "");
        docker.ok(&["network", "rm", "mine"])?;
        Ok(())
    })
}

#[test]
fn after_kill_9_names_ports_and_rules_are_there_again() -> Test {
    with_daemon(Suite::from_env()?.daemon_options(), |daemon| {
        let docker = daemon.docker();
        docker.ok(&["pull", "-q", "busybox"])?;
        docker.ok(&["network", "create", "mine"])?;
        let web = serve(&docker, &["--network", "mine", "-p", "127.0.0.1::80"], "still here")?;
        let before = docker.inspect(web.name(), "{{json .NetworkSettings}}")?;
        daemon.kill()?;
        daemon.start_again()?;
        assert_eq!(docker.inspect(web.name(), "{{json .NetworkSettings}}")?, before);
        let port = docker.ok(&["port", web.name(), "80"])?;
        let host = Host::from_env()?;
        assert_eq!(host.sh("wget -qO- \"http://$1\"", &[&port])?, "still here");
        let traced = traces(daemon)?;
        assert!(traced.contains("bht-"), "{traced}");
        // Tables that somebody has flushed are made anew, of all that runs.
        let (_, table) = table(daemon)?;
        host.sh("nft delete table bridge \"$1\"; nft delete table inet \"$1\"", &[&table])?;
        let url = format!("http://{}", web.name());
        assert_eq!(
            docker.ok(&["run", "--rm", "--network", "mine", "busybox", "wget", "-qO-", &url])?,
            "still here"
        );
        assert_eq!(traces(daemon)?, traced);
        // Its own address is not given away.
        let own = docker.inspect(web.name(), "{{.NetworkSettings.Networks.mine.IPAddress}}")?;
        let other = docker.ok(&[
            "run",
            "--rm",
            "--network",
            "mine",
            "busybox",
            "ip",
            "-4",
            "-o",
            "addr",
            "show",
            "eth0",
        ])?;
        assert!(!other.contains(&format!("{own}/")), "{other}");
        drop(web);
        docker.ok(&["network", "rm", "mine"])?;
        Ok(())
    })
}

#[test]
fn what_a_killed_daemon_left_is_removed_by_the_next() -> Test {
    with_daemon(Suite::from_env()?.daemon_options(), |daemon| {
        let docker = daemon.docker();
        docker.ok(&["pull", "-q", "busybox"])?;
        docker.ok(&["network", "create", "mine"])?;
        let bridge = docker.ok(&["network", "inspect", "mine", "--format", "{{slice .Id 0 12}}"])?;
        let id = docker.ok(&["network", "inspect", "mine", "--format", "{{.Id}}"])?;
        let container = docker.run_detached(&["--network", "mine", "busybox", "sleep", "1000"])?;
        let host = Host::from_env()?;
        let bridge = format!("bh-{bridge}");
        assert_eq!(host.sh("ls /sys/class/net/$1/brif | wc -l", &[&bridge])?, "1");
        daemon.kill()?;
        // The VMM dies too, and the network's record is lost.
        host.sh(
            "kill -9 $(tail -q -n +2 \"$1\"/s/*/identity | cut -d' ' -f1); rm \"$2/networks/$3.json\"",
            &[daemon.inner_socket().trim_end_matches("/d.sock"), &daemon.data_root(), &id],
        )?;
        host.sh("while ls /sys/class/net/$1/brif | grep -q .; do sleep 0.1; done", &[&bridge])?;
        daemon.start_again()?;
        host.sh("! ip link show \"$1\" 2>/dev/null", &[&bridge])?;
        let rules = host.sh("nft list ruleset", &[])?;
        assert!(!rules.contains(&bridge), "{rules}");
        drop(container);
        Ok(())
    })
}
