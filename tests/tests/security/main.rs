//! Hostile images and workloads, against a daemon of the test's own.

mod jail;

use bulkhead_tests::image::{Image, Layer, LayerBuilder};
use bulkhead_tests::{Daemon, Host, Suite, with_daemon};

mod hostile_guest;

/// An error fails the test, with its whole story.
type Test = anyhow::Result<()>;

const MARK: &str = "escaped-from-a-layer";

/// Loads a busybox with the layer on top, in place of an earlier one; says whether the daemon took it.
fn load(daemon: &Daemon, layer: Layer) -> anyhow::Result<bool> {
    daemon.docker().run(&["rmi", "hostile"])?;
    let archive = Image::busybox()?.with_layer(layer).archive("hostile:latest")?;
    let output = daemon.docker().run_with(&["load"], archive)?;
    if output.code != 0 {
        assert!(!output.stderr.trim().is_empty());
        let kept = daemon.docker().ok(&["images", "-q", "hostile"])?;
        assert_eq!(kept, "", "kept, though refused with: {}", output.stderr);
    }
    Ok(output.code == 0)
}

/// The mark may lie below the layer store, and nowhere else that the layers here aim at. Other tests' files come and go
/// meanwhile.
fn assert_no_escape() -> Test {
    let script = "find / /tmp /run /dev/shm -ignore_readdir_race -maxdepth 1 -name \"$1\"; \
                  find /var/lib/bulkhead -ignore_readdir_race -name \"$1\" -not -path \"*/data/layers/*\"";
    assert_eq!(Host::from_env()?.sh(script, &[MARK])?, "");
    Ok(())
}

#[test]
fn a_layer_whose_names_climb_writes_nothing_outside() -> Test {
    with_daemon(Suite::from_env()?.daemon_options(), |daemon| {
        let climbs = "../../../../../../../../../../..";
        for name in [format!("{climbs}/tmp/{MARK}"), format!("/tmp/{MARK}"), format!("a/../../{MARK}")] {
            let mut layer = LayerBuilder::new();
            layer.raw_name(&name, b"x")?;
            load(daemon, layer.finish()?)?;
            assert_no_escape()?;
        }
        Ok(())
    })
}

#[test]
fn a_layer_that_writes_through_its_own_links_writes_nothing_outside() -> Test {
    with_daemon(Suite::from_env()?.daemon_options(), |daemon| {
        for target in ["/tmp", "/run", "../../../../../../../../../../../tmp"] {
            let mut layer = LayerBuilder::new();
            layer.symlink("way", target)?;
            layer.file(&format!("way/{MARK}"), 0o644, b"x")?;
            load(daemon, layer.finish()?)?;
            assert_no_escape()?;
        }
        Ok(())
    })
}

#[test]
fn a_hard_link_to_a_host_file_is_not_made() -> Test {
    with_daemon(Suite::from_env()?.daemon_options(), |daemon| {
        for target in ["/etc/shadow", "../../../../../../../../../../etc/shadow"] {
            let mut layer = LayerBuilder::new();
            layer.hard_link("stolen", target)?;
            if load(daemon, layer.finish()?)? {
                let text = daemon.docker().run(&["run", "--rm", "hostile", "cat", "/stolen"])?.text();
                assert!(!text.contains("root:"), "{text}");
            }
        }
        Ok(())
    })
}

#[test]
fn a_workload_with_every_capability_cannot_change_its_image() -> Test {
    with_daemon(Suite::from_env()?.daemon_options(), |daemon| {
        let docker = daemon.docker();
        docker.ok(&["pull", "-q", "busybox"])?;
        let sums = "find \"$1\" -type f -exec sha256sum {} + | sort | sha256sum";
        let layers = format!("{}/layers", daemon.data_root());
        let host = Host::from_env()?;
        let before = host.sh(sums, &[&layers])?;
        let script = "for m in $(cut -d' ' -f2 /proc/mounts); do mount -o remount,rw $m 2>/dev/null; done; \
                      echo x >/bin/busybox-new; echo x >>/etc/passwd; rm -rf /bin/vi; true";
        docker.ok(&["run", "--rm", "--privileged", "busybox", "sh", "-c", script])?;
        assert_eq!(host.sh(sums, &[&layers])?, before);
        assert!(docker.ok(&["run", "--rm", "busybox", "ls", "/bin/vi"])?.contains("/bin/vi"));
        Ok(())
    })
}

#[test]
fn a_workload_that_reboots_its_machine_ends_alone() -> Test {
    with_daemon(Suite::from_env()?.daemon_options(), |daemon| {
        let docker = daemon.docker();
        docker.ok(&["pull", "-q", "busybox"])?;
        let other = docker.run_detached(&["busybox", "sleep", "1000"])?;
        // A privileged workload may do as it likes with its machine: that is its own end, and only its own.
        let victim =
            docker.run_detached(&["--privileged", "busybox", "sh", "-c", "reboot -f; sleep 1000"])?;
        assert_ne!(victim.docker(&["wait"])?, "0");
        assert_eq!(other.exec(&["echo", "alive"])?, "alive");
        Ok(())
    })
}

#[test]
fn the_socket_and_the_data_root_are_not_for_everybody() -> Test {
    with_daemon(Suite::from_env()?.daemon_options(), |daemon| {
        let host = Host::from_env()?;
        let mode = |path: &str| host.sh("stat -c %a \"$1\"", &[path]);
        assert_eq!(mode(&daemon.inner_socket())?, "660");
        let data_root = mode(&daemon.data_root())?;
        assert!(["700", "710", "711"].contains(&data_root.as_str()), "{data_root}");
        Ok(())
    })
}

/// CVE-2026-24054: an image without layers must not be given anything else as its root.
#[test]
fn an_image_without_layers_gets_nothing_of_the_hosts() -> Test {
    with_daemon(Suite::from_env()?.daemon_options(), |daemon| {
        let docker = daemon.docker();
        let image = Image::new(vec![], serde_json::json!({"Cmd": ["/bin/sh", "-c", "cat /etc/hostname"]}));
        let loaded = docker.run_with(&["load"], image.archive("empty:latest")?)?;
        if loaded.code == 0 {
            let ran = docker.run(&["run", "--rm", "empty:latest"])?;
            // There is no program in it: what docker says of that, and nothing else.
            assert!(ran.code >= 125, "{} {}", ran.code, ran.text());
            assert!(!ran.stderr.is_empty() && ran.text().is_empty(), "{} {}", ran.stderr, ran.text());
        } else {
            assert!(!loaded.stderr.trim().is_empty());
        }
        Ok(())
    })
}
