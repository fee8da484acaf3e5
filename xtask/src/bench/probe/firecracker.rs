//! Firecracker, where it is given by the path to its executable.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bulkhead_agent_api::CONTROL_PORT;
use bulkhead_tests::http::Client;
use serde_json::{Value, json};

use super::machine::{MEMORY_MIB, Machine, Scene, agent_answers, first_frame, remove};

/// How often its API's socket is looked for.
const POLL: Duration = Duration::from_micros(200);
const API_WITHIN: Duration = Duration::from_secs(60);

/// A machine that was saved.
pub(super) struct Saved {
    state: PathBuf,
    memory: PathBuf,
}

/// Boots from a configuration file, which spares it the API's calls.
pub(super) fn boot(program: &Path, scene: &Scene<'_>) -> Result<Machine> {
    start(program, scene, &["--no-api"])
}

fn start(program: &Path, scene: &Scene<'_>, arguments: &[&str]) -> Result<Machine> {
    let mut config = json!({
        "boot-source": {
            "kernel_image_path": scene.kernel(),
            "initrd_path": scene.initramfs,
            "boot_args": scene.cmdline,
        },
        "drives": [],
        "machine-config": {"vcpu_count": 1, "mem_size_mib": MEMORY_MIB},
    });
    if let Some(template) = cpu_template(scene)? {
        config["cpu-config"] = json!(template);
    }
    if scene.devices {
        config["vsock"] = json!({"guest_cid": 3, "uds_path": vsock(scene)});
        config["entropy"] = json!({});
        remove(&vsock(scene))?;
    }
    let file = scene.dir.join("firecracker.json");
    fs::write(&file, serde_json::to_vec(&config)?)?;
    let mut command = Command::new(program);
    command.args(arguments).arg("--config-file").arg(file);
    spawn(&mut command)
}

/// It insists on KVM_CAP_XCRS (56), which a host without XSAVE has not, unless it is told not to.
fn cpu_template(scene: &Scene<'_>) -> Result<Option<PathBuf>> {
    let cpu = fs::read_to_string("/proc/cpuinfo").context("read /proc/cpuinfo")?;
    if cpu.split_whitespace().any(|flag| flag == "xsave") {
        return Ok(None);
    }
    let path = scene.dir.join("firecracker-cpu.json");
    let template = json!({"kvm_capabilities": ["!56"], "cpuid_modifiers": [], "msr_modifiers": []});
    fs::write(&path, serde_json::to_vec(&template)?)?;
    Ok(Some(path))
}

fn spawn(command: &mut Command) -> Result<Machine> {
    let mut process = command
        .args(["--level", "Error"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("start Firecracker")?;
    let console = process.stdout.take().context("Firecracker's stdout")?;
    Ok(Machine::new(process, File::from(OwnedFd::from(console))))
}

fn vsock(scene: &Scene<'_>) -> PathBuf {
    scene.dir.join("fc-vsock")
}

fn api(scene: &Scene<'_>) -> PathBuf {
    scene.dir.join("fc-api")
}

/// Boots until the agent has connected to us and said Hello.
pub(super) fn boot_to_agent(program: &Path, scene: &Scene<'_>, arguments: &[&str]) -> Result<Machine> {
    let path = scene.dir.join(format!("fc-vsock_{CONTROL_PORT}"));
    remove(&path)?;
    let listener = UnixListener::bind(&path)?;
    let machine = start(program, scene, arguments)?;
    let (mut connection, _) = listener.accept()?;
    first_frame(&mut connection)?;
    Ok(machine)
}

/// Boots one and saves it.
pub(super) fn save(program: &Path, scene: &Scene<'_>) -> Result<Saved> {
    let saved = Saved { state: scene.dir.join("fc-state"), memory: scene.dir.join("fc-memory") };
    let api = api(scene);
    remove(&api)?;
    let _machine = boot_to_agent(program, scene, &["--api-sock", path(&api)?])?;
    call(&api, "PATCH", "/vm", &json!({"state": "Paused"}))?;
    let files = json!({
        "snapshot_type": "Full",
        "snapshot_path": saved.state,
        "mem_file_path": saved.memory,
    });
    call(&api, "PUT", "/snapshot/create", &files)?;
    Ok(saved)
}

/// Starts its process, restores, and waits for the agent's answer on a new connection.
pub(super) fn restore(program: &Path, scene: &Scene<'_>, saved: &Saved) -> Result<Machine> {
    let api = api(scene);
    remove(&api)?;
    remove(&vsock(scene))?;
    let mut machine = spawn(Command::new(program).arg("--api-sock").arg(&api))?;
    let deadline = Instant::now() + API_WITHIN;
    while !listens(&api) {
        if let Some(status) = machine.process.try_wait()? {
            bail!("Firecracker ended: {status}");
        }
        if Instant::now() > deadline {
            bail!("Firecracker does not open its API");
        }
        thread::sleep(POLL);
    }
    let load = json!({
        "snapshot_path": saved.state,
        "mem_backend": {"backend_type": "File", "backend_path": saved.memory},
        "resume_vm": true,
    });
    call(&api, "PUT", "/snapshot/load", &load)?;
    agent_answers(&vsock(scene), &format!("CONNECT {CONTROL_PORT}"))?
        .context("the agent in Firecracker's restored guest does not answer")?;
    Ok(machine)
}

fn listens(socket: &Path) -> bool {
    match std::os::unix::net::UnixStream::connect(socket) {
        Ok(_) => true,
        Err(error) => !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused),
    }
}

fn call(api: &Path, method: &str, path_: &str, body: &Value) -> Result<()> {
    let headers = [("Content-Type", "application/json")];
    let (head, mut rest) =
        Client::new(path(api)?).open(method, path_, &headers, body.to_string().as_bytes())?;
    if (200..300).contains(&head.status) {
        return Ok(());
    }
    let text = rest.read_body(&head).unwrap_or_default();
    bail!("Firecracker: {method} {path_}: {} {}", head.status, String::from_utf8_lossy(&text))
}

fn path(path: &Path) -> Result<&str> {
    path.to_str().context("temporary directory's path")
}
