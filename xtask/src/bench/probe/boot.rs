//! Machines, from the start of their VMM's process: ours, and QEMU's `microvm` with the same kernel, initramfs,
//! command line and memory.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bulkhead_agent_api::CONTROL_PORT;
use bulkhead_vmm_api::{BlockConfig, DeviceConfig, FsConfig, Jail, Start, VERSION, VmConfig, VsockConfig};
use rustix::fs::MemfdFlags;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::bench::figures::Samples;
use crate::sh;

const MEMORY_MIB: u32 = 128;
/// What the measured init prints first.
const MARK: &str = "init-has-begun";
const CMDLINE: &str = "console=ttyS0 quiet panic=-1 reboot=k 8250.nr_uarts=1 rdinit=/init";

/// From the start of the process to a line that the first process of the guest prints.
pub(super) fn until_init(bundle: &Path, rounds: u32) -> Result<Samples> {
    let dir = tempfile::tempdir()?;
    let initramfs = marking_initramfs(dir.path())?;
    let mut samples = Samples::default();
    for round in 0..=rounds {
        let ours = time(|| bulkhead(bundle, &initramfs, dir.path(), DeviceConfig::default()), wait_for_mark)?;
        let theirs = time(|| qemu(bundle, &initramfs), wait_for_mark)?;
        // The first round warms caches.
        if round > 0 {
            samples.add("bulkhead", ours);
            samples.add("qemu-microvm", theirs);
        }
    }
    Ok(samples)
}

/// From the start of the process to the agent's first message, with the devices that a container's machine has.
pub(super) fn until_agent_ready(bundle: &Path, rounds: u32) -> Result<Samples> {
    let dir = tempfile::tempdir()?;
    let initramfs = bundle.join("initramfs.cpio");
    let mut samples = Samples::default();
    for round in 0..=rounds {
        let devices = || DeviceConfig {
            block: vec![BlockConfig { id: "root".into() }],
            fs: vec![FsConfig { tag: "layers".into() }],
            vsock: Some(VsockConfig { cid: 3, listener: -1 }),
            net: Vec::new(),
            rng: true,
            balloon: false,
            memory: None,
        };
        let ready = |machine: &mut Machine| wait_for_agent(&dir.path().join("vsock"), machine);
        let taken = time(|| bulkhead(bundle, &initramfs, dir.path(), devices()), ready)?;
        if round > 0 {
            samples.add("bulkhead", taken);
        }
    }
    Ok(samples)
}

/// A VMM that runs, and its guest's console; killed when dropped.
struct Machine {
    process: Child,
    console: BufReader<File>,
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn time(
    start: impl FnOnce() -> Result<Machine>,
    wait: impl FnOnce(&mut Machine) -> Result<()>,
) -> Result<Duration> {
    let begin = Instant::now();
    let mut machine = start()?;
    wait(&mut machine)?;
    Ok(begin.elapsed())
}

fn wait_for_mark(machine: &mut Machine) -> Result<()> {
    let (mut line, mut seen) = (Vec::new(), String::new());
    while machine.console.read_until(b'\n', &mut line)? > 0 {
        let text = String::from_utf8_lossy(&line);
        if text.contains(MARK) {
            return Ok(());
        }
        seen.push_str(&text);
        line.clear();
    }
    bail!("the machine ended before its init began: {}\n{seen}", machine.process.wait()?)
}

fn wait_for_agent(vsock: &Path, machine: &mut Machine) -> Result<()> {
    let mut connection = UnixStream::connect(vsock)?;
    writeln!(connection, "LISTEN {CONTROL_PORT}")?;
    // The answer's line, then the first frame's length: the agent has spoken.
    let mut reader = BufReader::new(connection);
    let mut answer = String::new();
    reader.read_line(&mut answer)?;
    if !answer.starts_with("OK ") || reader.read_exact(&mut [0; 4]).is_err() {
        bail!("the machine ended before its agent spoke: {}", machine.process.wait()?);
    }
    Ok(())
}

fn bulkhead(bundle: &Path, initramfs: &Path, dir: &Path, mut devices: DeviceConfig) -> Result<Machine> {
    let open = |path: PathBuf| File::open(&path).with_context(|| format!("open {}", path.display()));
    let (kernel, initramfs) = (open(bundle.join("vmlinux"))?, open(initramfs.to_owned())?);
    let control = seqpacket_listener(&dir.join("control"))?;
    let _ = fs::remove_file(dir.join("vsock"));
    let vsock = UnixListener::bind(dir.join("vsock"))?;
    if let Some(device) = &mut devices.vsock {
        device.listener = vsock.as_raw_fd();
    }
    let report = File::create(dir.join("report"))?;
    let kvm = File::options().read(true).write(true).open("/dev/kvm").context("open /dev/kvm")?;
    let (console, guest_console) = io::pipe()?;
    let config = VmConfig {
        version: VERSION,
        name: "bench".into(),
        vcpus: 1,
        memory_mib: MEMORY_MIB,
        start: Start::Boot {
            kernel: kernel.as_raw_fd(),
            initramfs: Some(initramfs.as_raw_fd()),
            cmdline: CMDLINE.into(),
        },
        control: control.as_raw_fd(),
        report: report.as_raw_fd(),
        kvm: kvm.as_raw_fd(),
        jail: Jail::Process,
        console: Some(guest_console.as_raw_fd()),
        devices,
    };
    let mut config_file = File::from(rustix::fs::memfd_create("config", MemfdFlags::CLOEXEC)?);
    config_file.write_all(&serde_json::to_vec(&config)?)?;
    io::Seek::rewind(&mut config_file)?;
    for fd in [
        kernel.as_fd(),
        initramfs.as_fd(),
        control.as_fd(),
        vsock.as_fd(),
        report.as_fd(),
        kvm.as_fd(),
        guest_console.as_fd(),
        config_file.as_fd(),
    ] {
        rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())?;
    }
    let mut command = Command::new(bundle.join("bulkhead-vmm"));
    command.arg("--config-fd").arg(config_file.as_raw_fd().to_string());
    let process = command.stdin(Stdio::null()).spawn().context("start bulkhead-vmm")?;
    Ok(Machine { process, console: BufReader::new(File::from(OwnedFd::from(console))) })
}

fn seqpacket_listener(path: &Path) -> Result<OwnedFd> {
    let _ = fs::remove_file(path);
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, 1)?;
    Ok(socket)
}

fn qemu(bundle: &Path, initramfs: &Path) -> Result<Machine> {
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args([
            "-M",
            "microvm,x-option-roms=off,pit=off,pic=off,isa-serial=on,rtc=off",
            "-enable-kvm",
            "-cpu",
            "host",
        ])
        .args(["-m", &MEMORY_MIB.to_string(), "-smp", "1", "-nodefaults", "-no-user-config", "-no-reboot"])
        .args(["-display", "none", "-serial", "stdio", "-append", CMDLINE, "-kernel"])
        .arg(bundle.join("vmlinux"))
        .arg("-initrd")
        .arg(initramfs);
    let mut process = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("start QEMU")?;
    let console = process.stdout.take().context("QEMU's stdout")?;
    Ok(Machine { process, console: BufReader::new(File::from(OwnedFd::from(console))) })
}

/// busybox, and an init that says that it has begun.
fn marking_initramfs(dir: &Path) -> Result<PathBuf> {
    let root = dir.join("root");
    fs::create_dir(&root)?;
    fs::copy("/bin/busybox", root.join("busybox")).context("/bin/busybox (package busybox-static)")?;
    let init = root.join("init");
    fs::write(&init, format!("#!/busybox sh\necho {MARK}\nexec /busybox sleep 1000\n"))?;
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;
    let archive = dir.join("initramfs.cpio");
    let pack = "cd \"$1\" && find . | cpio --quiet -o -H newc >\"$2\"";
    sh::output(Command::new("sh").args(["-euc", pack, "sh"]).arg(&root).arg(&archive))?;
    Ok(archive)
}
