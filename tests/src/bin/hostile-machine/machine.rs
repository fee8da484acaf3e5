//! One VMM process with the hostile guest.

use std::fs::{self, File};
use std::io::{IoSlice, IoSliceMut, Seek, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use bulkhead_tests::hostile::{MEMORY_MIB, Plan};
use bulkhead_vmm_api::{
    BlockConfig, DeviceConfig, FsConfig, Jail, MAX_MESSAGE, MemoryDeviceConfig, NetConfig, Report, Request,
    Response, ShareKind, Start, VERSION, VmConfig, VsockConfig,
};
use nix::libc;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    SocketAddrUnix, SocketFlags, SocketType,
};

use super::world::{SHARE, World};

const DISK: &str = "disk";
const TAG: &str = "layers";
const NIC: &str = "nic";
/// What the guest's lines begin with.
const SAYS: &str = "hostile: ";

pub(crate) struct Machine {
    dir: PathBuf,
    pid: i32,
    control: OwnedFd,
    /// Reaped.
    done: bool,
}

/// How the process ended.
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) most_kib: u64,
}

impl Machine {
    pub(crate) fn start(plan: &Plan, scenario: &str, vcpus: u8, world: &World) -> Result<Self> {
        let dir = world.private()?;
        let control = seqpacket()?;
        rustix::net::bind(&control, &SocketAddrUnix::new(dir.join("control"))?)?;
        rustix::net::listen(&control, 4)?;
        let vsock: OwnedFd = UnixListener::bind(dir.join("vsock"))?.into();
        let file = |name: &str| File::create(dir.join(name)).map(OwnedFd::from);
        let (report, console, words) = (file("report")?, file("console")?, file("words")?);
        let guest = OwnedFd::from(File::open(&plan.guest)?);
        let kvm = OwnedFd::from(File::options().read(true).write(true).open("/dev/kvm")?);
        let config = VmConfig {
            version: VERSION,
            name: "hostile".into(),
            vcpus,
            memory_mib: MEMORY_MIB,
            start: Start::Boot {
                kernel: inherit(&guest)?,
                initramfs: None,
                cmdline: format!("hostile={scenario}"),
            },
            control: inherit(&control)?,
            kvm: inherit(&kvm)?,
            jail: Jail::Process,
            report: inherit(&report)?,
            console: Some(inherit(&console)?),
            devices: DeviceConfig {
                block: vec![BlockConfig { id: DISK.into(), late: false }],
                fs: vec![FsConfig {
                    tag: TAG.into(),
                    server: bulkhead_vmm_api::FsServer::Vmm,
                    late: false,
                    window_mib: 0,
                }],
                vsock: Some(VsockConfig { cid: 3, listener: inherit(&vsock)? }),
                net: vec![NetConfig { id: NIC.into() }],
                rng: true,
                balloon: true,
                memory: Some(MemoryDeviceConfig { region_mib: 1024 }),
            },
        };
        let mut config_file = tempfile::tempfile()?;
        config_file.write_all(&serde_json::to_vec(&config)?)?;
        config_file.rewind()?;
        let config_file = OwnedFd::from(config_file);
        let mut command = Command::new(&plan.vmm);
        command.arg("--config-fd").arg(inherit(&config_file)?.to_string()).env_clear();
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(words).spawn()?;
        let pid = i32::try_from(child.id())?;
        let client = seqpacket()?;
        rustix::net::connect(&client, &SocketAddrUnix::new(dir.join("control"))?)?;
        // Ours are closed, so that only the VMM has them.
        drop((control, vsock, kvm));
        let machine = Self { dir, pid, control: client, done: false };
        world.listen(&machine.dir.join("vsock"));
        let share = Request::AttachShare { tag: TAG.into(), name: SHARE.into(), kind: ShareKind::Layer };
        machine.done(&share, Some(&world.share()?))?;
        let tap = Request::AttachTap { id: NIC.into(), mac: [2, 0, 0, 0, 0, 1], mtu: 1500 };
        machine.done(&tap, Some(&world.tap()?))?;
        // The guest begins when its disk is there.
        machine.done(&Request::AttachDisk { id: DISK.into(), read_only: false }, Some(&world.disk()?))?;
        Ok(machine)
    }

    /// One request and its answer.
    pub(crate) fn ask(&self, request: &Request, fd: Option<&OwnedFd>) -> Result<Response> {
        let text = serde_json::to_vec(request)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fds: Vec<_> = fd.iter().map(AsFd::as_fd).collect();
        if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
            bail!("no room for a descriptor");
        }
        rustix::net::sendmsg(&self.control, &[IoSlice::new(&text)], &mut ancillary, SendFlags::NOSIGNAL)?;
        let mut buffer = vec![0; MAX_MESSAGE];
        let mut none = RecvAncillaryBuffer::new(&mut []);
        let mut parts = [IoSliceMut::new(&mut buffer)];
        let received = rustix::net::recvmsg(&self.control, &mut parts, &mut none, RecvFlags::empty())?;
        let bytes = buffer.get(..received.bytes).unwrap_or_default();
        if bytes.is_empty() {
            bail!("the VMM hung up: {}", self.words().unwrap_or_default());
        }
        Ok(serde_json::from_slice(bytes)?)
    }

    /// A request that must be answered with Ok.
    pub(crate) fn done(&self, request: &Request, fd: Option<&OwnedFd>) -> Result<()> {
        match self.ask(request, fd).with_context(|| self.last_words())? {
            Response::Ok => Ok(()),
            other => bail!("{request:?}: {other:?}"),
        }
    }

    /// What a VMM that does not answer has left.
    fn last_words(&self) -> String {
        let reason = self.report().map(|report| report.reason.to_string());
        format!("the VMM reports {reason:?} and says {:?}", self.words().unwrap_or_default())
    }

    pub(crate) fn terminate(&self) -> Result<()> {
        self.signal(libc::SIGTERM)
    }

    pub(crate) fn kill(&self) -> Result<()> {
        self.signal(libc::SIGKILL)
    }

    fn signal(&self, signal: libc::c_int) -> Result<()> {
        let signal = nix::sys::signal::Signal::try_from(signal)?;
        Ok(nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.pid), signal)?)
    }

    /// How it ended, once it has.
    pub(crate) fn ended(&mut self) -> Result<Option<Ended>> {
        let mut status = 0;
        let mut usage = MaybeUninit::<libc::rusage>::zeroed();
        // SAFETY: both pointers are to memory of the types that wait4 fills.
        let pid = unsafe { libc::wait4(self.pid, &raw mut status, libc::WNOHANG, usage.as_mut_ptr()) };
        match pid {
            0 => return Ok(None),
            pid if pid == self.pid => self.done = true,
            _ => return Err(std::io::Error::last_os_error()).context("wait4"),
        }
        // SAFETY: zeroed, then filled: plain numbers either way.
        let usage = unsafe { usage.assume_init() };
        let code = libc::WIFEXITED(status).then(|| libc::WEXITSTATUS(status));
        Ok(Some(Ended { code, most_kib: u64::try_from(usage.ru_maxrss)? }))
    }

    pub(crate) fn report(&self) -> Option<Report> {
        serde_json::from_slice(&fs::read(self.dir.join("report")).ok()?).ok()
    }

    pub(crate) fn words(&self) -> Result<String> {
        Ok(String::from_utf8_lossy(&fs::read(self.dir.join("words"))?).into_owned())
    }

    pub(crate) fn console_bytes(&self) -> Result<u64> {
        Ok(fs::metadata(self.dir.join("console"))?.len())
    }

    /// The guest's lines so far.
    pub(crate) fn said(&self) -> Result<Vec<String>> {
        let text = String::from_utf8_lossy(&fs::read(self.dir.join("console"))?).into_owned();
        // The console's file is bounded; what was said last stands in the report.
        let last = self.report().map(|report| report.console).unwrap_or_default();
        let lines = |text: &str| -> Vec<String> {
            text.lines().filter_map(|line| line.strip_prefix(SAYS)).map(str::to_owned).collect()
        };
        let mut said = lines(&text);
        said.extend(lines(&last).into_iter().filter(|line| !said.contains(line)).collect::<Vec<_>>());
        Ok(said)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if !self.done {
            let _ = self.kill();
            let _ = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(self.pid), None);
        }
    }
}

fn inherit(fd: &OwnedFd) -> Result<i32> {
    rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())?;
    Ok(fd.as_raw_fd())
}

fn seqpacket() -> Result<OwnedFd> {
    Ok(rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}
