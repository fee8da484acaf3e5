//! Registries that lie or leave, disks that are full, KVM that is not there: a clear error each, and nothing half-made
//! left behind (which `with_daemon` checks too).

use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};

use anyhow::Context;
use bulkhead_tests::image::{Image, LayerBuilder};
use bulkhead_tests::{DaemonOptions, Docker, Host, Suite, with_daemon};

use crate::Test;

/// A layer of a megabyte that is unlike any other test's.
fn image_of(seed: u32) -> anyhow::Result<Image> {
    let mut layer = LayerBuilder::new();
    let bytes: Vec<u8> =
        (0..1 << 18).flat_map(|n: u32| (n ^ seed).wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    layer.file("noise", 0o644, &bytes)?;
    Ok(Image::new(vec![layer.finish()?], serde_json::json!({"Cmd": ["x"]})))
}

/// No image, and no layer on disk.
fn assert_nothing_kept(docker: &Docker, layers: &str) -> Test {
    assert_eq!(docker.ok(&["images", "-q", "-a"])?, "");
    let script = "[ ! -d \"$1\" ] || find \"$1\" -name noise";
    assert_eq!(Host::from_env()?.sh(script, &[layers])?, "");
    Ok(())
}

/// In the host, between daemon and registry; ends with the test.
struct Proxy {
    process: Child,
    address: String,
}

impl Proxy {
    fn start(upstream: &str, limit: u32, times: u32) -> anyhow::Result<Proxy> {
        let mut command = Host::from_env()?.command(env!("CARGO_BIN_EXE_cutting-proxy"));
        command.args([upstream, &limit.to_string(), &times.to_string()]);
        let mut process = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let mut address = String::new();
        BufReader::new(process.stdout.take().context("stdout")?).read_line(&mut address)?;
        Ok(Proxy { process, address: address.trim().to_owned() })
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn a_corrupt_layer_is_refused_and_nothing_is_kept() -> Test {
    let suite = Suite::from_env()?;
    let image = image_of(1)?;
    suite.push(&image, "broken/corrupt", "latest")?;
    let digest = image.layers()[0].digest();
    let hex = digest.trim_start_matches("sha256:");
    let blob = format!("{}/docker/registry/v2/blobs/sha256/{}/{hex}/data", suite.registry_storage, &hex[..2]);
    // One byte in the middle; the size stays.
    Host::from_env()?.sh("printf X | dd of=\"$1\" bs=1 seek=500000 conv=notrunc status=none", &[&blob])?;
    with_daemon(suite.daemon_options(), |daemon| {
        let docker = daemon.docker();
        let output = docker.run(&["pull", &format!("{}/broken/corrupt", suite.registry)])?;
        assert_ne!(output.code, 0);
        assert!(
            output.stderr.contains(hex.get(..12).unwrap_or(hex)) || output.stderr.contains("digest"),
            "{}",
            output.stderr
        );
        assert_nothing_kept(&docker, &format!("{}/layers", daemon.data_root()))
    })
}

#[test]
fn a_registry_that_cuts_once_is_asked_again() -> Test {
    let suite = Suite::from_env()?;
    let image = image_of(2)?;
    suite.push(&image, "library/cut-once", "latest")?;
    let proxy = Proxy::start(&suite.registry, 300_000, 1)?;
    let options = DaemonOptions { registry: Some(proxy.address.clone()), ..DaemonOptions::default() };
    with_daemon(options, |daemon| {
        let docker = daemon.docker();
        docker.ok(&["pull", "cut-once"])?;
        assert_eq!(docker.inspect("cut-once", "{{.Id}}")?, image.id());
        Ok(())
    })
}

#[test]
fn a_registry_that_always_cuts_is_an_error_and_nothing_is_kept() -> Test {
    let suite = Suite::from_env()?;
    suite.push(&image_of(3)?, "library/cut-always", "latest")?;
    let proxy = Proxy::start(&suite.registry, 20_000, u32::MAX)?;
    let options = DaemonOptions { registry: Some(proxy.address.clone()), ..DaemonOptions::default() };
    with_daemon(options, |daemon| {
        let docker = daemon.docker();
        let output = docker.run(&["pull", "cut-always"])?;
        assert_ne!(output.code, 0);
        assert!(!output.stderr.trim().is_empty());
        assert_nothing_kept(&docker, &format!("{}/layers", daemon.data_root()))
    })
}

#[test]
fn a_pull_without_space_says_so_and_leaves_the_disk_as_it_was() -> Test {
    let suite = Suite::from_env()?;
    let mut layer = LayerBuilder::new();
    layer.file("noise", 0o644, &vec![7; 64 << 20])?;
    let image = Image::new(vec![layer.finish()?], serde_json::json!({"Cmd": ["x"]}));
    suite.push(&image, "team/large", "latest")?;
    let options = DaemonOptions { data_limit_mib: Some(32), ..suite.daemon_options() };
    with_daemon(options, |daemon| {
        let docker = daemon.docker();
        let output = docker.run(&["pull", &format!("{}/team/large", suite.registry)])?;
        assert_ne!(output.code, 0);
        assert!(output.stderr.to_lowercase().contains("no space left"), "{}", output.stderr);
        assert_nothing_kept(&docker, &format!("{}/layers", daemon.data_root()))?;
        let used =
            Host::from_env()?.sh("df -k \"$1\" | tail -1 | awk '{print $3}'", &[&daemon.data_root()])?;
        assert!(used.parse::<u64>()? < 4 << 10, "{used} KiB are still used");
        Ok(())
    })
}

#[test]
fn without_kvm_start_fails_with_the_reason_and_the_rest_works() -> Test {
    let hide = ["unshare", "--mount", "sh", "-c", "mount --bind /dev/null /dev/kvm && exec \"$@\"", "sh"];
    let wrapper = hide.iter().map(|word| (*word).to_owned()).collect();
    let options = DaemonOptions { wrapper, ..Suite::from_env()?.daemon_options() };
    with_daemon(options, |daemon| {
        let docker = daemon.docker();
        docker.ok(&["pull", "-q", "busybox"])?;
        let container = docker.container();
        let output = docker.run(&["run", "--name", container.name(), "busybox", "true"])?;
        assert!(output.code >= 125, "{} {}", output.code, output.stderr);
        assert!(output.stderr.to_lowercase().contains("kvm"), "{}", output.stderr);
        assert_eq!(
            docker.inspect(container.name(), "{{.State.Status}} {{.State.Running}}")?,
            "created false"
        );
        Ok(())
    })
}

#[test]
fn two_daemons_do_not_share_a_data_root() -> Test {
    with_daemon(Suite::from_env()?.daemon_options(), |daemon| {
        let socket = format!("unix://{}/second.sock", daemon.data_root());
        let bundle = std::env::var(bulkhead_tests::daemon::BUNDLE_VARIABLE)?;
        // One that is not refused would run on.
        let mut second = Host::from_env()?.command("timeout");
        second.args(["-s", "KILL", "30", &format!("{bundle}/bulkheadd")]);
        second.args([
            "--host",
            &socket,
            "--data-root",
            &daemon.data_root(),
            "--exec-root",
            "/run/bulkhead-second",
        ]);
        second.args(["--pidfile", "/run/bulkhead-second.pid"]);
        let output = second.stdin(Stdio::null()).output()?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "not refused: {stderr}");
        assert!(stderr.contains(&daemon.data_root()) || stderr.contains("in use"), "{stderr}");
        Ok(())
    })
}
