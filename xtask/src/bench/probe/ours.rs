//! Our VMM, driven as the daemon drives it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, IoSlice, Seek, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use bulkhead_agent_api::CONTROL_PORT;
use bulkhead_vmm_api::{
    BlockConfig, DeviceConfig, FsConfig, FsServer, Jail, MAX_MESSAGE, Request, Response, Start, VERSION,
    VmConfig, VsockConfig,
};
use rustix::fs::MemfdFlags;
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType,
};

use super::machine::{Machine, Scene, agent_answers, remove};

/// Its disk's slot.
pub(super) const DISK: &str = "root";
/// Its share.
pub(super) const TAG: &str = "layers";

/// A machine that was saved.
pub(super) struct Saved {
    state: File,
    memory: File,
}

/// Boots.
pub(super) fn boot(scene: &Scene<'_>) -> Result<Machine> {
    let open = |path: PathBuf| File::open(&path).with_context(|| format!("open {}", path.display()));
    let (kernel, initramfs) = (open(scene.kernel())?, open(scene.initramfs.clone())?);
    let start = Start::Boot {
        kernel: kernel.as_raw_fd(),
        initramfs: Some(initramfs.as_raw_fd()),
        cmdline: scene.cmdline.into(),
    };
    spawn(scene, start, &[kernel.as_fd(), initramfs.as_fd()])
}

/// Boots until the agent has connected to us and said Hello.
pub(super) fn boot_to_agent(scene: &Scene<'_>) -> Result<Machine> {
    let machine = boot(scene)?;
    agent_answers(&vsock(scene), &format!("LISTEN {CONTROL_PORT}"))?
        .context("the machine ended before its agent spoke")?;
    Ok(machine)
}

/// Boots one and saves it.
pub(super) fn save(scene: &Scene<'_>) -> Result<Saved> {
    let _machine = boot_to_agent(scene)?;
    let file = |name: &str| {
        let path = scene.dir.join(name);
        remove(&path)?;
        OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .with_context(|| name.to_owned())
    };
    let saved = Saved { state: file("state")?, memory: file("memory")? };
    let control = connect(scene)?;
    call(&control, &Request::Pause, &[])?;
    call(&control, &Request::Snapshot, &[saved.state.as_fd(), saved.memory.as_fd()])?;
    Ok(saved)
}

/// Starts its process, restores, resumes, and waits for the agent's answer on a new connection.
pub(super) fn restore(scene: &Scene<'_>, saved: &Saved) -> Result<Machine> {
    // Each reads from its own position.
    let again = |name: &str| File::open(scene.dir.join(name)).with_context(|| name.to_owned());
    let (state, memory) = (again("state")?, again("memory")?);
    debug_assert!(saved.state.metadata()?.len() > 0 && saved.memory.metadata()?.len() > 0);
    let start = Start::Restore { state: state.as_raw_fd(), memory: memory.as_raw_fd() };
    let machine = spawn(scene, start, &[state.as_fd(), memory.as_fd()])?;
    call(&connect(scene)?, &Request::Resume, &[])?;
    agent_answers(&vsock(scene), &format!("CONNECT {CONTROL_PORT}"))?
        .context("the agent in the restored guest does not answer")?;
    Ok(machine)
}

fn vsock(scene: &Scene<'_>) -> PathBuf {
    scene.dir.join("vsock")
}

fn devices(scene: &Scene<'_>, vsock: &UnixListener) -> DeviceConfig {
    if !scene.devices {
        return DeviceConfig::default();
    }
    DeviceConfig {
        block: vec![BlockConfig { id: DISK.into(), late: false }],
        fs: vec![FsConfig {
            tag: TAG.into(),
            server: FsServer::Vmm,
            late: false,
            window_mib: scene.window_mib,
        }],
        vsock: Some(VsockConfig { cid: 3, listener: vsock.as_raw_fd() }),
        rng: true,
        ..DeviceConfig::default()
    }
}

/// Starts a VMM that inherits `files` beside its sockets.
fn spawn(scene: &Scene<'_>, start: Start, files: &[BorrowedFd<'_>]) -> Result<Machine> {
    let control = seqpacket_listener(&scene.dir.join("control"))?;
    let _ = fs::remove_file(vsock(scene));
    let vsock = UnixListener::bind(vsock(scene))?;
    let report = File::create(scene.dir.join("report"))?;
    let kvm = File::options().read(true).write(true).open("/dev/kvm").context("open /dev/kvm")?;
    let (console, guest_console) = io::pipe()?;
    let config = VmConfig {
        version: VERSION,
        name: "bench".into(),
        vcpus: 1,
        memory_mib: scene.memory_mib,
        start,
        control: control.as_raw_fd(),
        report: report.as_raw_fd(),
        kvm: kvm.as_raw_fd(),
        // Confined as the daemon has it confined.
        jail: Jail::Process,
        console: Some(guest_console.as_raw_fd()),
        devices: devices(scene, &vsock),
    };
    let mut config_file = File::from(rustix::fs::memfd_create("config", MemfdFlags::CLOEXEC)?);
    config_file.write_all(&serde_json::to_vec(&config)?)?;
    config_file.rewind()?;
    let own = [control.as_fd(), report.as_fd(), kvm.as_fd(), guest_console.as_fd(), config_file.as_fd()];
    let vsock = scene.devices.then(|| vsock.as_fd());
    for fd in files.iter().chain(&own).chain(&vsock) {
        rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())?;
    }
    let mut command = Command::new(scene.bundle.join("bulkhead-vmm"));
    command.arg("--config-fd").arg(config_file.as_raw_fd().to_string());
    let process = command.stdin(Stdio::null()).spawn().context("start bulkhead-vmm")?;
    Ok(Machine::new(process, File::from(OwnedFd::from(console))))
}

fn seqpacket() -> Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC;
    Ok(rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?)
}

fn seqpacket_listener(path: &Path) -> Result<OwnedFd> {
    let _ = fs::remove_file(path);
    let socket = seqpacket()?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, 1)?;
    Ok(socket)
}

pub(super) fn connect(scene: &Scene<'_>) -> Result<OwnedFd> {
    let socket = seqpacket()?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(scene.dir.join("control"))?)?;
    Ok(socket)
}

pub(super) fn call(control: &OwnedFd, request: &Request, files: &[BorrowedFd<'_>]) -> Result<Response> {
    let message = serde_json::to_vec(request)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(files));
    }
    rustix::net::sendmsg(control, &[IoSlice::new(&message)], &mut ancillary, SendFlags::NOSIGNAL)?;
    let mut answer = vec![0; MAX_MESSAGE];
    let length = rustix::io::read(control, answer.as_mut_slice())?;
    match serde_json::from_slice(answer.get(..length).unwrap_or_default())? {
        Response::Error { message } => bail!("the VMM refuses {request:?}: {message}"),
        response => Ok(response),
    }
}
