//! Boots a sandbox as a list of steps, each with its undo: when one fails, or the boot is given up half-way,
//! those before it are undone in reverse and nothing is left.
//!
//! ```text
//!  1 directory            undo: remove it
//!  2 spawn the VMM        undo: kill it
//!  3 attach disk, taps, layers(while the guest boots; goes with the VMM)
//!  4 wait for Hello       or for the VMM's death
//!  5 set the clock
//! ```

use std::{
    fs::File,
    os::fd::AsFd,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bulkhead_agent_api::{Call, Event};
use bulkhead_vmm_api::{BlockConfig, DeviceConfig, FsConfig, NetConfig, Request, ShareKind, VsockConfig};
use tokio::sync::mpsc;

use super::{
    BootError, DISK, NICS, Nic, Sandbox, SandboxSpec, TAG,
    agent::Agent,
    dir::SandboxDir,
    vmm::{
        Death,
        control::{Control, ControlError},
        process::Process,
        spawn::{Launch, spawn},
    },
};

/// How long a guest may take from spawn to Hello. Far above what the slowest emulated host needs; a guest
/// that takes longer hangs.
const HELLO_WITHIN: Duration = Duration::from_secs(120);

/// The context id of every guest: its vsock reaches its own VMM and nothing else, so they need not differ.
const GUEST_CID: u64 = 3;

pub(super) async fn boot(spec: SandboxSpec) -> Result<(Sandbox, mpsc::Receiver<Event>), BootError> {
    let mut undo = Undo::default();

    let path = spec.parent.join(&spec.id);
    let dir = SandboxDir::create(path.clone()).map_err(|e| BootError::io("cannot make the directory", e))?;
    let dir = Arc::new(dir);
    undo.push({
        let dir = Arc::clone(&dir);
        move || {
            if let Err(error) = dir.remove() {
                tracing::error!(path = %dir.path().display(), %error, "a sandbox's directory stays behind");
            }
        }
    });

    let launch = Launch {
        program: &spec.program,
        name: &spec.id,
        vcpus: spec.vcpus,
        memory_mib: spec.memory_mib,
        kernel: open("the guest kernel", &spec.kernel)?,
        initramfs: open("the initramfs", &spec.initramfs)?,
        cmdline: spec.cmdline.clone(),
        devices: devices(),
    };
    let process = spawn(&dir, launch)
        .map_err(|e| BootError::io(&format!("cannot start the VMM {}", spec.program.display()), e))?;
    let process = Arc::new(process);
    undo.push({
        let process = Arc::clone(&process);
        move || {
            process.kill();
            // Somebody must stay to reap it.
            tokio::spawn(async move { process.ended().await });
        }
    });

    let control = Control::default();
    let ready = async {
        attach(&control, &dir, &spec).await?;
        let (agent, events) = Agent::awaited(&dir).await?;
        set_clock(&agent).await?;
        Ok::<_, BootError>((agent, events))
    };
    let (agent, events) = tokio::select! {
        biased;
        status = process.ended() => return Err(BootError::Died(Box::new(Death::read(&dir, status)))),
        ready = tokio::time::timeout(HELLO_WITHIN, ready) => match ready {
            Ok(Ok(ready)) => ready,
            // A VMM that dies takes its sockets along: its own words tell more than theirs.
            Ok(Err(error)) => return Err(match settled(&process).await {
                Some(status) => BootError::Died(Box::new(Death::read(&dir, status))),
                None => error,
            }),
            Err(_) => return Err(BootError::Silent(console(&control, &dir).await)),
        },
    };

    undo.disarm();
    Ok((Sandbox { id: spec.id, dir, process, control, agent }, events))
}

/// The machine of every sandbox: nothing in it belongs to one container.
fn devices() -> DeviceConfig {
    DeviceConfig {
        block: vec![BlockConfig { id: DISK.into() }],
        fs: vec![FsConfig { tag: TAG.into() }],
        vsock: Some(VsockConfig { cid: GUEST_CID, listener: -1 }),
        net: (0..NICS).map(|slot| NetConfig { id: super::nic(slot) }).collect(),
        rng: true,
    }
}

fn open(what: &str, path: &Path) -> Result<File, BootError> {
    File::open(path).map_err(|e| BootError::io(&format!("cannot open {what} {}", path.display()), e))
}

async fn attach(control: &Control, dir: &SandboxDir, spec: &SandboxSpec) -> Result<(), BootError> {
    let request = Request::AttachDisk { id: DISK.into(), read_only: false };
    control.call(dir, &request, Some(spec.disk.as_fd())).await?;
    for nic in &spec.nics {
        plug(control, dir, nic).await?;
    }
    for (name, path) in &spec.layers {
        let layer = open("the layer", path)?;
        let request = Request::AttachShare { tag: TAG.into(), name: name.clone(), kind: ShareKind::Layer };
        control.call(dir, &request, Some(layer.as_fd())).await?;
    }
    Ok(())
}

/// Gives a network slot its tap.
pub(super) async fn plug(control: &Control, dir: &SandboxDir, nic: &Nic) -> Result<(), ControlError> {
    let Nic { slot, tap, mac, mtu } = nic;
    let request = Request::AttachTap { id: super::nic(*slot), mac: *mac, mtu: *mtu };
    control.call(dir, &request, Some(tap.as_fd())).await.map(drop)
}

async fn set_clock(agent: &Agent) -> Result<(), BootError> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let unix_ns = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
    agent.call(Call::SetClock { unix_ns }).await.map(drop)?;
    Ok(())
}

/// The status of a process that is dying: sockets close a little before the process has ended.
async fn settled(process: &Process) -> Option<Option<String>> {
    tokio::time::timeout(Duration::from_secs(2), process.ended()).await.ok()
}

async fn console(control: &Control, dir: &SandboxDir) -> String {
    match control.call(dir, &Request::Console, None).await {
        Ok(bulkhead_vmm_api::Response::Console { text }) => {
            text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default().to_owned()
        }
        _ => String::new(),
    }
}

/// What has been done and can be undone, latest last.
#[derive(Default)]
struct Undo(Vec<Box<dyn FnOnce() + Send>>);

impl Undo {
    fn push(&mut self, step: impl FnOnce() + Send + 'static) {
        self.0.push(Box::new(step));
    }

    /// All is well: nothing is undone.
    fn disarm(mut self) {
        self.0.clear();
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        while let Some(step) = self.0.pop() {
            step();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::sandbox::{dir::IDENTITY, vmm::process::read_identity};

    fn spec(base: &Path, program: &str) -> SandboxSpec {
        let file = base.join("vmm");
        std::fs::write(&file, program).unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o700)).unwrap();
        SandboxSpec {
            id: "0123456789abcdef".into(),
            parent: base.to_owned(),
            program: file,
            vcpus: 1,
            memory_mib: 128,
            kernel: "/dev/null".into(),
            initramfs: "/dev/null".into(),
            cmdline: String::new(),
            disk: File::open("/dev/null").unwrap(),
            layers: vec![],
            nics: vec![],
        }
    }

    #[test]
    fn steps_are_undone_in_reverse_unless_disarmed() {
        let log = Arc::new(std::sync::Mutex::new(Vec::new()));
        let record = |undo: &mut Undo, n| {
            let log = Arc::clone(&log);
            undo.push(move || log.lock().unwrap().push(n));
        };
        let mut undo = Undo::default();
        record(&mut undo, 1);
        record(&mut undo, 2);
        drop(undo);
        let mut undo = Undo::default();
        record(&mut undo, 3);
        undo.disarm();
        assert_eq!(*log.lock().unwrap(), [2, 1]);
    }

    #[tokio::test]
    async fn a_vmm_that_dies_tells_why_and_leaves_nothing() {
        let base = tempfile::tempdir().unwrap();
        let error =
            boot(spec(base.path(), "#!/bin/sh\necho no such device >&2\nexit 4\n")).await.err().unwrap();
        assert!(matches!(&error, BootError::Died(_)), "{error}");
        assert!(error.to_string().contains("no such device"), "{error}");
        assert!(!base.path().join("0123456789abcdef").exists());
    }

    #[tokio::test]
    async fn a_missing_kernel_is_named_and_nothing_is_started() {
        let base = tempfile::tempdir().unwrap();
        let mut spec = spec(base.path(), "#!/bin/sh\nexit 0\n");
        spec.kernel = base.path().join("nokernel");
        let error = boot(spec).await.err().unwrap();
        assert!(error.to_string().contains("nokernel"), "{error}");
        assert!(!base.path().join("0123456789abcdef").exists());
    }

    #[tokio::test]
    async fn a_boot_that_is_given_up_kills_its_vmm() {
        let base = tempfile::tempdir().unwrap();
        let spec = spec(base.path(), "#!/bin/sh\nexec sleep 1000\n");
        let sandbox = spec.parent.join(&spec.id);
        let mut boot = Box::pin(boot(spec));
        assert!(futures_util::poll!(&mut boot).is_pending());
        let identity = read_identity(&sandbox.join(IDENTITY)).unwrap();
        let vmm = Process::adopt(&identity).unwrap().unwrap();
        drop(boot);
        vmm.ended().await;
        assert!(!sandbox.exists());
    }
}
