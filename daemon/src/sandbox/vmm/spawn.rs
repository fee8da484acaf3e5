//! Starts a VMM: its whole configuration in a sealed memory file, every resource an inherited descriptor.

use std::{
    ffi::CString,
    fs::File,
    io::{self, Seek, Write},
    os::fd::{AsFd, AsRawFd, OwnedFd, RawFd},
    path::Path,
};

use bulkhead_vmm_api::{DeviceConfig, Jail, Start, VERSION, VmConfig};
use rustix::{
    fs::{MemfdFlags, SealFlags},
    net::SocketType,
};

use super::{
    child::{self, Program, Rights},
    jail::Cell,
    process::{Process, boot_id},
};
use crate::sandbox::dir::{CONTROL, IDENTITY, LOG, REPORT, SandboxDir, VSOCK};

/// What a new VMM gets.
pub(crate) struct Launch<'a> {
    /// The VMM's executable.
    pub(crate) program: &'a Path,
    /// Shown in its logs.
    pub(crate) name: &'a str,
    pub(crate) vcpus: u8,
    pub(crate) memory_mib: u32,
    pub(crate) start: StartFiles,
    /// `/dev/kvm`.
    pub(crate) kvm: File,
    /// With the listener's number still to be filled in.
    pub(crate) devices: DeviceConfig,
    /// What it is confined by.
    pub(crate) cell: &'a Cell,
}

/// Where a new VMM's machine begins: [`Start`], with the files themselves.
pub(crate) enum StartFiles {
    /// Boots a kernel.
    Boot { kernel: File, initramfs: File, cmdline: String },
    /// Goes on from a saved machine, paused.
    Restore { state: File, memory: File },
}

impl StartFiles {
    /// What the VMM is told, and the descriptors that it inherits.
    fn inherited(&self) -> (Start, [RawFd; 2]) {
        match self {
            Self::Boot { kernel, initramfs, cmdline } => {
                let (kernel, initramfs) = (kernel.as_raw_fd(), initramfs.as_raw_fd());
                let start = Start::Boot { kernel, initramfs: Some(initramfs), cmdline: cmdline.clone() };
                (start, [kernel, initramfs])
            }
            Self::Restore { state, memory } => {
                let (state, memory) = (state.as_raw_fd(), memory.as_raw_fd());
                (Start::Restore { state, memory }, [state, memory])
            }
        }
    }
}

/// Spawns a VMM whose sockets and files are in `dir`. It is in a session of its own, so that signals meant
/// for the daemon's group or terminal do not reach it, and it outlives the daemon.
///
/// It begins only when it is written down who it is, so that there is no moment at which a daemon could die and
/// leave a VMM that its successor cannot find.
pub(crate) fn spawn(dir: &SandboxDir, launch: Launch<'_>) -> io::Result<Process> {
    let control = dir.listen(CONTROL, SocketType::SEQPACKET)?;
    let vsock = dir.listen(VSOCK, SocketType::STREAM)?;
    let report = dir.new_file(REPORT)?;
    let log = dir.new_file(LOG)?;
    let boot_id = boot_id()?;

    let mut devices = launch.devices;
    if let Some(device) = &mut devices.vsock {
        device.listener = vsock.as_raw_fd();
    }
    let (start, [first, second]) = launch.start.inherited();
    let config = VmConfig {
        version: VERSION,
        name: launch.name.to_owned(),
        vcpus: launch.vcpus,
        memory_mib: launch.memory_mib,
        start,
        control: control.as_raw_fd(),
        report: report.as_raw_fd(),
        kvm: launch.kvm.as_raw_fd(),
        jail: if launch.cell.uid.is_some() { Jail::Full } else { Jail::Process },
        console: None,
        devices,
    };
    let config = memory_file(&serde_json::to_vec(&config)?)?;

    let null = File::options().read(true).write(true).open("/dev/null")?;
    let program = Program {
        path: launch.program,
        arguments: vec![c"bulkhead-vmm".into(), c"--config-fd".into(), number(config.as_raw_fd())],
        streams: [null.as_fd(), null.as_fd(), log.as_fd()],
        inherited: vec![
            config.as_raw_fd(),
            first,
            second,
            launch.kvm.as_raw_fd(),
            control.as_raw_fd(),
            report.as_raw_fd(),
            vsock.as_raw_fd(),
        ],
        uid: launch.cell.uid,
        rights: Rights::Own,
        cgroup: launch.cell.cgroup.as_ref().map(AsFd::as_fd),
    };
    let (pid, pidfd) = child::start(&program, |pid| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        dir.new_file(IDENTITY)?.write_all(format!("{boot_id}\n{stat}").as_bytes())
    })?;
    Process::of_child(pid, pidfd)
}

/// A descriptor's number as an argument.
pub(super) fn number(fd: RawFd) -> CString {
    CString::new(fd.to_string()).unwrap_or_default()
}

/// A memory file with this content that nobody can change any more.
pub(super) fn memory_file(content: &[u8]) -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let mut file = File::from(rustix::fs::memfd_create("bulkhead-vm-config", flags)?);
    file.write_all(content)?;
    file.rewind()?;
    let seals = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
    rustix::fs::fcntl_add_seals(&file, seals)?;
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use bulkhead_vmm_api::VsockConfig;

    use super::*;
    use crate::sandbox::vmm::{Death, process::read_identity};

    /// A "VMM" that copies its configuration and its session id where a test can see them.
    const SCRIPT: &str = "#!/bin/sh
exec 2>/dev/null
dir=\"$(dirname \"$0\")\"
cat \"/proc/self/fd/$2\" >\"$dir/config\"
ls /proc/$$/fd | tr '\\n' ' ' >\"$dir/fds\"
cut -d' ' -f6 /proc/$$/stat >\"$dir/session\"; echo $$ >>\"$dir/session\"
exit 3
";

    #[tokio::test]
    async fn the_child_has_its_configuration_its_descriptors_and_a_session_of_its_own() {
        let base = tempfile::tempdir().unwrap();
        let program = base.path().join("vmm");
        std::fs::write(&program, SCRIPT).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o700)).unwrap();
        let dir = SandboxDir::create(base.path().join("sandbox")).unwrap();
        let empty = || File::open("/dev/null").unwrap();
        let launch = Launch {
            program: &program,
            name: "test",
            vcpus: 1,
            memory_mib: 128,
            start: StartFiles::Boot { kernel: empty(), initramfs: empty(), cmdline: "quiet".into() },
            kvm: empty(),
            devices: DeviceConfig {
                vsock: Some(VsockConfig { cid: 3, listener: -1 }),
                ..DeviceConfig::default()
            },
            cell: &Cell::default(),
        };
        let process = spawn(&dir, launch).unwrap();
        let identity = read_identity(&dir.path().join(IDENTITY)).unwrap();
        assert_eq!(identity.pid, process.pid());
        let status = process.ended().await;
        assert_eq!(status.as_deref(), Some("exit status: 3"));
        assert!(Process::adopt(&identity).unwrap().is_none(), "a dead process is not adopted");

        let config = std::fs::read(base.path().join("config")).unwrap();
        let config: VmConfig = serde_json::from_slice(&config).unwrap();
        let fds = std::fs::read_to_string(base.path().join("fds")).unwrap();
        let fds: Vec<RawFd> = fds.split_whitespace().map(|fd| fd.parse().unwrap()).collect();
        let listener = config.devices.vsock.as_ref().unwrap().listener;
        let Start::Boot { kernel, initramfs: Some(initramfs), .. } = config.start else { panic!() };
        for fd in [kernel, initramfs, config.control, config.report, listener] {
            assert!(fds.contains(&fd), "descriptor {fd} of {fds:?}");
        }
        let session = std::fs::read_to_string(base.path().join("session")).unwrap();
        let (session, pid) = session.trim().split_once('\n').unwrap();
        assert_eq!(session, pid);

        let death = Death::read(&dir, status);
        assert_eq!(death.to_string(), "the VMM ended without a report (exit status: 3)");
        assert!(!death.in_order());
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_is_an_error() {
        let base = tempfile::tempdir().unwrap();
        let dir = SandboxDir::create(base.path().join("sandbox")).unwrap();
        let empty = || File::open("/dev/null").unwrap();
        let launch = Launch {
            program: &base.path().join("nosuch"),
            name: "test",
            vcpus: 1,
            memory_mib: 128,
            start: StartFiles::Boot { kernel: empty(), initramfs: empty(), cmdline: String::new() },
            kvm: empty(),
            devices: DeviceConfig::default(),
            cell: &Cell::default(),
        };
        assert_eq!(spawn(&dir, launch).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
