//! Brings a sandbox up as a list of steps, each with its undo: when one fails, or the start is given up half-way,
//! those before it are undone in reverse and nothing is left.
//!
//! ```text
//!    cold                                    restored: a template's clone, or a saved machine
//!  1 directory                               directory              undo: remove it
//!  2 user id, control group                  user id, control group undo: given back with the directory
//!  3 spawn the VMM                           spawn the VMM          undo: kill it, and wait
//!  4 attach disk, layers (as it boots)       attach all, resume
//!  5 wait for Hello                          connect to the agent   or hear of the VMM's death
//!  6 begin to grow, personalize              personalize, thaw; a clone begins to grow when it is resumed
//! ```
//! A clone that does not come up is no failure of the sandbox: its template is discarded, and the kernel is
//! booted.

use std::{
    fs::File,
    num::NonZero,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
    sync::{Arc, LazyLock},
    time::{Duration, SystemTime},
};

use bulkhead_agent_api::{Call, ContainerIdentity, Event, Identity, MIN_ENTROPY};
use bulkhead_vmm_api::{
    BlockConfig, DeviceConfig, FsConfig, FsServer, LimitedDevice, MemoryDeviceConfig, NetConfig, Request,
    ShareKind, VsockConfig,
};
use tokio::sync::{Semaphore, mpsc};

use crate::phases::Stage;

use super::{
    BootError, Confinement, ControlError, DISK, NICS, Origin, Rates, SHARES, Sandbox, SandboxSpec, ShareSpec,
    TAG,
    agent::Agent,
    dir::{SHARES_LOG, SandboxDir},
    extra_disk,
    memory::region_mib,
    tenants::{LATE_DISKS, LATE_SHARES, Place, Tenants, late_shares},
    vmm::{
        Death,
        control::{ANSWER_WITHIN, Control},
        jail::{self, Cell},
        process::Process,
        shares,
        spawn::{Launch, StartFiles, spawn},
    },
};

/// How long a guest may take from spawn to Hello. Far above what the slowest emulated host needs; a guest
/// that takes longer hangs.
const HELLO_WITHIN: Duration = Duration::from_secs(120);

/// How long a restored guest may take to be ready: it has nothing to boot.
const RESTORED_WITHIN: Duration = Duration::from_secs(30);

/// The context id of every guest: its vsock reaches its own VMM and nothing else, so they need not differ.
const GUEST_CID: u64 = 3;

type Booted = (Sandbox, mpsc::Receiver<Event>);

pub(super) async fn boot(spec: SandboxSpec) -> Result<Booted, BootError> {
    match &spec.origin {
        Origin::Cold => cold(&spec).await,
        Origin::Saved { machine, containers } => {
            let files = machine.try_clone().map_err(|e| BootError::io("cannot take the saved machine", e))?;
            restored(&spec, files.into(), containers.clone()).await
        }
        Origin::Template(templates) => {
            let (machine, domain) = (spec.machine(), templates.domain.clone());
            if let Some(template) = templates.store.find(&machine, domain.as_deref()) {
                match restored(&spec, template.files.into(), Vec::new()).await {
                    Ok(booted) => return Ok(booted),
                    // No fault of the template's.
                    Err(error @ BootError::Shares(_)) => return Err(error),
                    Err(error) => templates.store.discard(&template.key, &error.to_string()),
                }
            }
            let booted = cold(&spec).await?;
            templates.store.want(machine, domain);
            Ok(booted)
        }
    }
}

impl From<super::OpenMachine> for StartFiles {
    fn from(machine: super::OpenMachine) -> Self {
        Self::Restore { state: machine.state, memory: machine.memory }
    }
}

/// Turns for cold boots, some for each CPU: of a hundred kernels that boot at once none is up in time. Nothing of a
/// tenant's runs in a guest before its agent has greeted, so nobody can hold a turn for longer than a boot takes.
static TURNS: LazyLock<Semaphore> = LazyLock::new(|| {
    let cpus = std::thread::available_parallelism().map_or(1, NonZero::get);
    Semaphore::new((2 * cpus).max(4))
});

async fn cold(spec: &SandboxSpec) -> Result<Booted, BootError> {
    // Never closed; and if it were, a boot without a turn is a boot.
    let _turn = TURNS.acquire().await;
    let start = StartFiles::Boot {
        kernel: open("the guest kernel", &spec.kernel)?,
        initramfs: open("the initramfs", &spec.initramfs)?,
        cmdline: spec.cmdline.clone(),
    };
    let ready = async |vmm: &Vmm| {
        vmm.attach(spec, false).await?;
        let (agent, events) = Agent::awaited(&vmm.dir).await?;
        spec.timeline.mark(Stage::Greeted);
        // Only now: the agent knows how much there was without it.
        if let Some(growth) = growth(spec) {
            vmm.control.call(&vmm.dir, &growth, &[], ANSWER_WITHIN).await?;
        }
        personalize(&agent, Vec::new()).await?;
        spec.timeline.mark(Stage::Personalised);
        Ok((agent, events))
    };
    Vmm::spawn(spec, start)?.up(HELLO_WITHIN, ready).await
}

async fn restored(
    spec: &SandboxSpec,
    start: StartFiles,
    containers: Vec<ContainerIdentity>,
) -> Result<Booted, BootError> {
    let ready = async |vmm: &Vmm| {
        // At once: a connection waits in the VMM until the guest runs.
        let ((), named) = tokio::try_join!(vmm.attach(spec, true), vmm.named(spec, containers))?;
        Ok(named)
    };
    Vmm::spawn(spec, start)?.up(RESTORED_WITHIN, ready).await
}

/// A VMM that is coming up; dropped, nothing is left of it.
struct Vmm {
    id: String,
    dir: Arc<SandboxDir>,
    process: Arc<Process>,
    control: Control,
    cell: Cell,
    undo: Undo,
}

impl Vmm {
    fn spawn(spec: &SandboxSpec, start: StartFiles) -> Result<Self, BootError> {
        let mut undo = Undo::default();
        let path = spec.parent.join(&spec.id);
        let dir = SandboxDir::create(path).map_err(|e| BootError::io("cannot make the directory", e))?;
        let dir = Arc::new(dir);
        undo.push({
            let dir = Arc::clone(&dir);
            move || {
                if let Err(error) = dir.remove() {
                    tracing::error!(path = %dir.path().display(), %error, "a sandbox's directory stays behind");
                }
            }
        });
        let cell = Cell::make(&spec.confinement, &dir, &spec.id, &spec.limits)?;
        let launch = Launch {
            program: &spec.program,
            name: &spec.id,
            vcpus: spec.vcpus,
            memory_mib: spec.memory.base_mib,
            start,
            kvm: open_kvm(&spec.kvm)?,
            devices: devices(spec.window_mib),
            cell: &cell,
        };
        let process = spawn(&dir, launch)
            .map_err(|e| BootError::io(&format!("cannot start the VMM {}", spec.program.display()), e))?;
        let process = Arc::new(process);
        undo.push({
            let process = Arc::clone(&process);
            move || {
                process.kill();
                // Somebody must stay to reap it; its control group is busy until it has ended.
                tokio::spawn(async move { process.ended().await });
            }
        });
        spec.timeline.mark(Stage::Spawned);
        Ok(Self { id: spec.id.clone(), dir, process, control: Control::default(), cell, undo })
    }

    /// Attaches what is the sandbox's own, and lets a restored machine run.
    async fn attach(&self, spec: &SandboxSpec, resume: bool) -> Result<(), BootError> {
        self.attach_shares(spec).await?;
        let mut layers = Vec::with_capacity(spec.layers.len());
        for (name, path) in &spec.layers {
            layers.push((name, open_layer(path, &spec.confinement)?));
        }
        let disk = spec
            .disk
            .iter()
            .map(|disk| (Request::AttachDisk { id: DISK.into(), read_only: false }, Some(disk.as_fd())));
        let extra = spec.disks.iter().take(usize::from(LATE_DISKS)).enumerate().map(|(slot, disk)| {
            let request = Request::AttachDisk { id: extra_disk(slot), read_only: disk.read_only };
            (request, Some(disk.file.as_fd()))
        });
        let layers = layers.iter().map(|(name, layer)| {
            let name = (*name).clone();
            (Request::AttachShare { tag: TAG.into(), name, kind: ShareKind::Layer }, Some(layer.as_fd()))
        });
        let growth = growth(spec).filter(|_| resume).map(|growth| (growth, None));
        let goes_on = resume.then_some((Request::Resume, None));
        let requests: Vec<(Request, Option<BorrowedFd<'_>>)> =
            disk.chain(extra).chain(layers).chain(goes_on).chain(growth).collect();
        self.control.call_all(&self.dir, &requests).await?;
        spec.timeline.mark(Stage::Attached);
        if resume {
            spec.timeline.mark(Stage::Restored);
        }
        Ok(())
    }

    /// Starts the share server where there is anything for it to serve. It ends with the VMM.
    async fn attach_shares(&self, spec: &SandboxSpec) -> Result<(), BootError> {
        if spec.shares.is_empty() {
            return Ok(());
        }
        let served = Served {
            tag: SHARES.to_owned(),
            log: SHARES_LOG.to_owned(),
            memory_mib: spec.memory.total_mib(),
            shares: &spec.shares,
        };
        attach_shares(&self.dir, &self.control, &self.cell, &spec.program, &served).await
    }

    /// Connects to a restored guest's agent and makes the guest one of its own.
    async fn named(
        &self,
        spec: &SandboxSpec,
        containers: Vec<ContainerIdentity>,
    ) -> Result<(Agent, mpsc::Receiver<Event>), BootError> {
        // The VMM lets a connection through once the guest has heard that all earlier ones have ended.
        let (agent, events) = Agent::connect(&self.dir).await?;
        spec.timeline.mark(Stage::Greeted);
        // Thawed without a wait in between: an agent that was not given a name does not obey.
        let (named, thawed) = tokio::join!(personalize(&agent, containers), agent.call(Call::Thaw));
        named?;
        thawed?;
        spec.timeline.mark(Stage::Personalised);
        Ok((agent, events))
    }

    /// Waits until it is `ready`, within bounds, or for its death.
    async fn up(
        self,
        within: Duration,
        ready: impl AsyncFnOnce(&Self) -> Result<(Agent, mpsc::Receiver<Event>), BootError>,
    ) -> Result<Booted, BootError> {
        let (process, dir) = (Arc::clone(&self.process), Arc::clone(&self.dir));
        let died = |status| BootError::Died(Box::new(Death::read(&dir, status)));
        let (agent, events) = tokio::select! {
            biased;
            status = process.ended() => return Err(died(status)),
            ready = tokio::time::timeout(within, ready(&self)) => match ready {
                Ok(Ok(ready)) => ready,
                // A VMM that dies takes its sockets along: its own words tell more than theirs.
                Ok(Err(error)) => return Err(match settled(&process).await {
                    Some(status) => died(status),
                    None => error,
                }),
                Err(_) => return Err(BootError::Silent(console(&self.control, &dir).await)),
            },
        };
        let Self { id, dir, process, control, cell: Cell { cgroup, .. }, undo } = self;
        undo.disarm();
        Ok((Sandbox { id, dir, process, control, agent, cgroup, tenants: Tenants::default() }, events))
    }
}

/// What one share server serves.
pub(super) struct Served<'a> {
    pub(super) tag: String,
    /// Its standard error, in the sandbox's directory.
    pub(super) log: String,
    /// Of the guest.
    pub(super) memory_mib: u32,
    pub(super) shares: &'a [ShareSpec],
}

/// Starts a share server and joins it to its device. It ends with the VMM, or when it is detached.
pub(super) async fn attach_shares(
    dir: &SandboxDir,
    control: &Control,
    cell: &Cell,
    program: &Path,
    served: &Served<'_>,
) -> Result<(), BootError> {
    let (server, theirs) = shares::spawn(dir, program, cell, served.memory_mib, served.shares, &served.log)?;
    // Somebody must reap it.
    tokio::spawn(async move { server.ended().await });
    let request = Request::AttachServer { tag: served.tag.clone() };
    let fds = [theirs.channel.as_fd(), theirs.area.as_fd()];
    control.call(dir, &request, &fds, ANSWER_WITHIN).await?;
    Ok(())
}

/// The machine of a sandbox: nothing in it belongs to one container.
pub(super) fn devices(window_mib: u32) -> DeviceConfig {
    let disks = (0..LATE_DISKS).map(|slot| BlockConfig { id: extra_disk(slot.into()), late: true });
    let shares = (0..LATE_SHARES).map(|slot| FsConfig {
        tag: late_shares(slot),
        server: FsServer::Process,
        late: true,
        window_mib: 0,
    });
    let first = [
        FsConfig { tag: TAG.into(), server: FsServer::Vmm, late: false, window_mib },
        FsConfig { tag: SHARES.into(), server: FsServer::Process, late: false, window_mib: 0 },
    ];
    DeviceConfig {
        block: std::iter::once(BlockConfig { id: DISK.into(), late: false }).chain(disks).collect(),
        fs: first.into_iter().chain(shares).collect(),
        vsock: Some(VsockConfig { cid: GUEST_CID, listener: -1 }),
        net: (0..NICS).map(|slot| NetConfig { id: super::nic(slot) }).collect(),
        rng: true,
        balloon: true,
        memory: Some(MemoryDeviceConfig { region_mib: region_mib() }),
    }
}

/// Lets the guest begin to take what is more than its base; see [`Sandbox::memory_is_there`].
fn growth(spec: &SandboxSpec) -> Option<Request> {
    let plugged_mib = spec.memory.plugged_mib;
    (plugged_mib > 0).then_some(Request::SetMemory { plugged_mib })
}

fn open(what: &str, path: &Path) -> Result<File, BootError> {
    File::open(path).map_err(|e| BootError::io(&format!("cannot open {what} {}", path.display()), e))
}

fn open_kvm(path: &Path) -> Result<File, BootError> {
    let opened = File::options().read(true).write(true).open(path);
    opened.map_err(|e| BootError::io(&format!("cannot open {}", path.display()), e))
}

/// Tells the VMM how fast the devices of a place may be.
pub(super) async fn set_rates(
    control: &Control,
    dir: &SandboxDir,
    place: &Place,
    rates: Rates,
) -> Result<(), ControlError> {
    let disk = (LimitedDevice::Block { id: place.disk() }, rates.disk);
    let nics = if place.is_joined() { 0 } else { NICS };
    let net = (0..nics).map(|slot| (LimitedDevice::Net { id: super::nic(slot) }, rates.net));
    for (device, limits) in std::iter::once(disk).chain(net) {
        control.call(dir, &Request::SetRateLimit { device, limits }, &[], ANSWER_WITHIN).await?;
    }
    Ok(())
}

/// A VMM in a jail gets a layer as a mount that has no parent: an open directory would lead it to the host's.
pub(super) fn open_layer(path: &Path, confinement: &Confinement) -> Result<OwnedFd, BootError> {
    if confinement.uids.is_none() {
        return open("the layer", path).map(OwnedFd::from);
    }
    jail::detached(path).map_err(|e| BootError::io(&format!("cannot mount the layer {}", path.display()), e))
}

/// Makes the guest one of its own: fresh entropy, the time, its containers' names.
pub(super) async fn personalize(agent: &Agent, containers: Vec<ContainerIdentity>) -> Result<(), BootError> {
    let mut entropy = vec![0; MIN_ENTROPY];
    getrandom::fill(&mut entropy).map_err(|e| BootError::io("no entropy", std::io::Error::other(e)))?;

    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let unix_ns = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
    let identity = Identity { entropy, unix_ns, hostname: String::new(), containers };
    agent.call(Call::Personalize(Box::new(identity))).await.map(drop)?;
    Ok(())
}

/// The status of a process that is dying: sockets close a little before the process has ended.
async fn settled(process: &Process) -> Option<Option<String>> {
    tokio::time::timeout(Duration::from_secs(2), process.ended()).await.ok()
}

async fn console(control: &Control, dir: &SandboxDir) -> String {
    match control.call(dir, &Request::Console, &[], ANSWER_WITHIN).await {
        Ok(bulkhead_vmm_api::Response::Console { text }) => {
            text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default().to_owned()
        }
        _ => String::new(),
    }
}

/// What has been done and can be undone, latest last.
#[derive(Default)]
struct Undo(Vec<Box<dyn FnOnce() + Send + Sync>>);

impl Undo {
    fn push(&mut self, step: impl FnOnce() + Send + Sync + 'static) {
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

/// A sandbox that ends with this, however that ends.
pub(super) struct Ends(Arc<Sandbox>);

impl Ends {
    pub(super) fn new(sandbox: Sandbox) -> Self {
        Self(Arc::new(sandbox))
    }
}

impl std::ops::Deref for Ends {
    type Target = Sandbox;

    fn deref(&self) -> &Sandbox {
        &self.0
    }
}

impl Drop for Ends {
    fn drop(&mut self) {
        self.0.kill();
        let sandbox = Arc::clone(&self.0);
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move { sandbox.destroy().await });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::{
        phases::{Timeline, TimelineKind},
        sandbox::{HostLimits, Memory, dir::IDENTITY, vmm::process::read_identity},
    };

    fn spec(base: &Path, program: &str) -> SandboxSpec {
        let file = base.join("vmm");
        std::fs::write(&file, program).unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o700)).unwrap();
        SandboxSpec {
            id: "0123456789abcdef".into(),
            parent: base.to_owned(),
            program: file,
            vcpus: 1,
            memory: Memory { base_mib: 128, plugged_mib: 0 },
            kernel: "/dev/null".into(),
            initramfs: "/dev/null".into(),
            cmdline: String::new(),
            disk: Some(File::open("/dev/null").unwrap()),
            disks: vec![],
            layers: vec![],
            window_mib: 0,
            shares: vec![],
            timeline: Timeline::begin("c", TimelineKind::Run),
            kvm: "/dev/null".into(),
            limits: HostLimits::default(),
            origin: Origin::Cold,
            confinement: Confinement::default(),
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
