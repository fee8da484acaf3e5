//! A daemon that dies leaves nothing that the next does not take over or remove.

use bulkhead_tests::{Host, Suite, with_daemon};

use crate::{Test, serve};

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
        let url = format!("http://{}", web.name());
        assert_eq!(
            docker.ok(&["run", "--rm", "--network", "mine", "busybox", "wget", "-qO-", &url])?,
            "still here"
        );
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
            "kill -9 $(cat \"$1\"/s/*/identity | tail -n +2 | cut -d' ' -f1); rm \"$2/networks/$3.json\"",
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
