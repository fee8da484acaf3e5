//! One microVM: its VMM process, its guest agent and its stdio streams. Knows nothing of containers as
//! Docker means them.
//!
//! ```text
//!   boot ──▶ running ──▶ shut down (by the agent, bounded) ──▶ gone
//!    │          │  ╲
//!    ╳ undone   │   ╲ the VMM dies: `ended` resolves with its Death, streams and events end
//!               ▼
//!        the daemon dies ──▶ adopt (same process, new connections) ──▶ running
//! ```
//!
//! A dropped [`Sandbox`] goes on running: that is how a daemon stops without its containers. Ending one
//! is said in words: [`Sandbox::shut_down`] or [`Sandbox::destroy`].

mod adopted;
mod agent;
mod dir;
#[cfg(test)]
pub(crate) mod fake;
pub(crate) mod files;
mod memory;
mod plan;
mod save;
pub(crate) mod saved;
mod stream;
pub mod template;
mod tenants;
mod vmm;
mod vsock;

use std::{
    collections::HashSet,
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bulkhead_agent_api::{
    Answer, Call, ContainerIdentity, Event, Hello, NAMES_PORT, ProcessId, StreamKind, StreamOpen,
    files::FilesOpen,
};
use bulkhead_vmm_api::{MemoryStatus, RateLimits, Request, Response, Status};
use tokio::sync::mpsc;

pub(crate) use adopted::Adopted;
pub use agent::{CallError, ConnectError};
pub use memory::{Memory, region_mib, total_mib};
pub use save::{Leave, SaveError, SaveOptions};
pub(crate) use saved::Check;
pub use saved::{Digests, MachineSpec, OpenMachine, SavedError, SavedMachine, Shape};
pub(crate) use stream::{InputStream, OutputStream};
pub use tenants::{EnterError, Furniture, LATE_DISKS, Place, Tenant};
pub use vmm::{
    Death, Violation,
    cgroup::{Cgroup, CgroupError, HostLimits},
    control::ControlError,
    jail::{Confinement, JailError},
    shares::{ShareSpec, SharesError},
    uids::Uids,
};

use crate::phases::Timeline;
use agent::Agent;
use dir::{IDENTITY, SandboxDir};
use template::TemplateUse;
use tenants::Tenants;
use vmm::{
    control::{ANSWER_WITHIN, Control},
    jail::Cell,
    process::{Process, read_identity},
};

/// What a microVM tells of itself and is told, as data.
pub(crate) mod vocabulary {
    pub(crate) use bulkhead_vmm_api::{
        Bucket, CONSOLE_TAIL, DeviceFigures, RECENT, RateLimit, RateLimits, Recorded, Request, Response,
        Traffic,
    };
    #[cfg(test)]
    pub(crate) use bulkhead_vmm_api::{ExitReason, Report};
}

/// The block slot of the writable layer.
pub const DISK: &str = "root";

/// A volume that is a disk.
#[derive(Debug)]
pub struct ExtraDisk {
    /// Open for writing, unless it is read-only.
    pub file: File,
    /// Whether the guest's writes are refused.
    pub read_only: bool,
}

/// The block slot of a late disk, from 0.
#[must_use]
pub fn extra_disk(slot: usize) -> String {
    format!("disk{slot}")
}

/// The virtio-fs tag below which image layers are shared.
pub const TAG: &str = "layers";

/// The virtio-fs tag below which volumes and bind mounts are shared.
pub const SHARES: &str = "shares";

/// How many network slots a machine has. An empty one costs a boot one look of the guest's kernel.
pub const NICS: u8 = 4;

/// The name of a network slot.
fn nic(slot: u8) -> String {
    format!("net{slot}")
}

/// A network slot's tap.
#[derive(Debug)]
pub struct Nic {
    /// Below [`NICS`].
    pub slot: u8,
    /// Opened with `IFF_NO_PI | IFF_VNET_HDR`.
    pub tap: OwnedFd,
    /// The guest's MAC address.
    pub mac: [u8; 6],
    /// In bytes.
    pub mtu: u16,
}

/// How long a running guest may take to answer a restarted daemon.
const ADOPT_WITHIN: Duration = Duration::from_secs(30);

/// What a sandbox is booted from.
#[derive(Debug)]
pub struct SandboxSpec {
    /// Its name, see [`new_id`].
    pub id: String,
    /// The directory in which its own is made.
    pub parent: PathBuf,
    /// The VMM's executable.
    pub program: PathBuf,
    /// Number of vCPUs.
    pub vcpus: u8,
    /// Guest memory.
    pub memory: Memory,
    /// The guest kernel, an uncompressed ELF.
    pub kernel: PathBuf,
    /// The initramfs with the agent.
    pub initramfs: PathBuf,
    /// The guest kernel's command line.
    pub cmdline: String,
    /// The writable layer, open for reading and writing; None: the slot stays empty.
    pub disk: Option<File>,
    /// What is in its late disks, the first first: [`LATE_DISKS`] at most.
    pub disks: Vec<ExtraDisk>,
    /// The image's layers by the name of their share.
    pub layers: Vec<(String, PathBuf)>,
    /// MiB of guest addresses at which the guest can map files of layers; 0: it reads them.
    pub window_mib: u32,
    /// What it gets of the host to read and write.
    pub shares: Vec<ShareSpec>,
    /// Where the stages of the boot are marked.
    pub timeline: Arc<Timeline>,
    /// `/dev/kvm`.
    pub kvm: PathBuf,
    /// What the VMM may use of the host.
    pub limits: HostLimits,
    /// Where its machine comes from.
    pub origin: Origin,
    /// How VMMs are confined here.
    pub confinement: Confinement,
}

/// Where a sandbox's machine comes from.
#[derive(Debug)]
pub enum Origin {
    /// Its kernel is booted.
    Cold,
    /// A template's clone, if there is a template by now; else its kernel is booted, and a template made for
    /// those that follow.
    Template(TemplateUse),
    /// A saved machine, which must be of the same shape.
    Saved {
        /// Its files.
        machine: OpenMachine,
        /// What becomes of the containers in it.
        containers: Vec<ContainerIdentity>,
    },
}

impl SandboxSpec {
    /// What its machine is made of.
    #[must_use]
    pub fn machine(&self) -> MachineSpec {
        MachineSpec {
            program: self.program.clone(),
            kernel: self.kernel.clone(),
            initramfs: self.initramfs.clone(),
            cmdline: self.cmdline.clone(),
            vcpus: self.vcpus,
            memory_mib: self.memory.base_mib,
            devices: plan::devices(self.window_mib),
            kvm: self.kvm.clone(),
            confinement: self.confinement.clone(),
        }
    }
}

/// How fast a sandbox's devices may be.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rates {
    /// The writable layer.
    pub disk: RateLimits,
    /// Each network interface.
    pub net: RateLimits,
}

/// Which controllers a host lacks, by what its `cgroup.controllers` says.
#[must_use]
pub fn missing_controllers(given: &str) -> Vec<&'static str> {
    vmm::cgroup::missing(given)
}

/// Starts a process as a VMM is started, and waits for its end.
///
/// # Errors
/// What this host does not permit.
pub fn probe_jail(uids: &Uids) -> io::Result<()> {
    vmm::jail::probe(uids)
}

/// The kernel's version of Landlock; None where it has none.
#[must_use]
pub fn landlock_version() -> Option<i64> {
    vmm::jail::landlock_version()
}

/// A new sandbox's name: 16 hexadecimal digits, never used twice.
#[must_use]
pub fn new_id() -> String {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).expect("the kernel's random source does not fail once it is up");
    hex::encode(bytes)
}

/// Why a sandbox did not boot. Nothing of it is left.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A host resource.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// What the host said.
        source: io::Error,
    },
    /// The VMM cannot be confined.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// What it is to be given of the host is not there.
    #[error(transparent)]
    Shares(#[from] SharesError),
    /// The VMM refused a request.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The agent did not greet.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The agent refused a call.
    #[error(transparent)]
    Call(#[from] CallError),
    /// The VMM ended.
    #[error("the microVM did not come up: {0}")]
    Died(Box<Death>),
    /// The agent was not heard of in time; the console's last line.
    #[error("the guest did not come up in time; its console's last line: {0:?}")]
    Silent(String),
}

impl BootError {
    fn io(what: &str, source: io::Error) -> Self {
        Self::Io { what: what.to_owned(), source }
    }
}

/// Why a sandbox's memory is not what it should be.
#[derive(Debug, thiserror::Error)]
pub enum ResizeError {
    /// The VMM refused it.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The guest did not follow.
    #[error(transparent)]
    Call(#[from] CallError),
    /// The host refused it.
    #[error(transparent)]
    Host(#[from] CgroupError),
    /// The VMM answered something else.
    #[error("the VMM's answer is not valid")]
    Unexpected,
}

/// Why a running sandbox could not be taken over.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    /// Its process is no more.
    #[error("{0}")]
    Dead(Death),
    /// It runs and does not answer.
    #[error("the sandbox does not answer: {0}")]
    Mute(String),
}

/// A running microVM.
#[derive(Debug)]
pub struct Sandbox {
    id: String,
    dir: Arc<SandboxDir>,
    process: Arc<Process>,
    control: Control,
    agent: Agent,
    cgroup: Option<Cgroup>,
    tenants: Tenants,
}

impl Sandbox {
    /// Boots one; when this returns its agent is ready for calls. Its events come on the channel, which ends
    /// with the agent's connection.
    ///
    /// # Errors
    /// [`BootError`]; nothing is left behind. So too when the future is dropped.
    pub async fn boot(spec: SandboxSpec) -> Result<(Self, mpsc::Receiver<Event>), BootError> {
        plan::boot(spec).await
    }

    /// Takes over a sandbox that an earlier daemon booted.
    ///
    /// # Errors
    /// [`AdoptError`]; the caller then calls [`discard`].
    pub async fn adopt(parent: &Path, id: &str) -> Result<(Self, mpsc::Receiver<Event>), AdoptError> {
        let path = parent.join(id);
        let gone = Death { report: None, status: None, last_words: None };
        let Ok(dir) = SandboxDir::open(path.clone()) else { return Err(AdoptError::Dead(gone)) };
        let Some(identity) = read_identity(&path.join(IDENTITY)) else {
            return Err(AdoptError::Dead(Death::read(&dir, None)));
        };
        let process = match Process::adopt(&identity) {
            Ok(Some(process)) => process,
            Ok(None) => return Err(AdoptError::Dead(Death::read(&dir, None))),
            Err(error) => return Err(AdoptError::Mute(error.to_string())),
        };
        let control = Control::default();
        let connect = async {
            if !dir.is_saving() {
                return Ok(Agent::connect(&dir).await?);
            }
            wake(&control, &dir).await?;
            let (agent, events) = Agent::connect(&dir).await?;
            // The guest cannot know that it is no copy, and so gets what a copy gets; its containers are as
            // they were.
            plan::personalize(&agent, Vec::new()).await?;
            agent.call(Call::Thaw).await?;
            dir.unmark_saving().map_err(|e| BootError::io("cannot note that the machine runs", e))?;
            Ok::<_, BootError>((agent, events))
        };
        let connected = tokio::select! {
            biased;
            status = process.ended() => return Err(AdoptError::Dead(Death::read(&dir, status))),
            connected = tokio::time::timeout(ADOPT_WITHIN, connect) => connected,
        };
        match connected {
            Ok(Ok((agent, events))) => {
                let cgroup = vmm::jail::adopt_cgroup(&path);
                let (dir, process) = (Arc::new(dir), Arc::new(process));
                let (id, tenants) = (id.to_owned(), Tenants::default());
                Ok((Self { id, dir, process, control, agent, cgroup, tenants }, events))
            }
            Ok(Err(error)) => Err(AdoptError::Mute(error.to_string())),
            Err(_) => Err(AdoptError::Mute("the guest agent does not connect".into())),
        }
    }

    /// Its name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The VMM's pid, for people.
    pub fn pid(&self) -> i32 {
        self.process.pid()
    }

    /// The executable that its VMM runs, where `current` is no longer that.
    pub(crate) fn program(&self, current: PathBuf) -> PathBuf {
        use std::os::unix::fs::MetadataExt;
        let running = PathBuf::from(format!("/proc/{}/exe", self.pid()));
        let same = |a: &std::fs::Metadata, b: &std::fs::Metadata| (a.dev(), a.ino()) == (b.dev(), b.ino());
        match (std::fs::metadata(&running), std::fs::metadata(&current)) {
            (Ok(running_file), Ok(file)) if !same(&running_file, &file) => running,
            _ => current,
        }
    }

    /// Lets containers run on that were left frozen when the machine was saved.
    ///
    /// # Errors
    /// [`CallError`].
    pub(crate) async fn thaw(&self) -> Result<(), CallError> {
        self.call(Call::Thaw).await?;
        if let Err(error) = self.dir.unmark_saving() {
            // A later daemon then wakes a guest that is awake, which changes nothing.
            tracing::warn!(sandbox = self.id, %error, "it could not be noted that a machine runs on");
        }
        Ok(())
    }

    /// The VMM's control group on the host; None where it has none.
    pub fn cgroup(&self) -> Option<&Cgroup> {
        self.cgroup.as_ref()
    }

    /// What its agent said of itself.
    pub fn hello(&self) -> &Hello {
        self.agent.hello()
    }

    /// The events of one of its containers, by its name towards the agent; those of all others come on the channel
    /// that it was booted or adopted with.
    pub fn events(&self, guest: &str) -> mpsc::Receiver<Event> {
        self.agent.route(guest)
    }

    /// Calls the agent.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn call(&self, call: Call) -> Result<Answer, CallError> {
        self.agent.call(call).await
    }

    /// Asks the VMM.
    ///
    /// # Errors
    /// [`ControlError`].
    pub async fn control(&self, request: &Request) -> Result<Response, ControlError> {
        self.control.call(&self.dir, request, &[], ANSWER_WITHIN).await
    }

    /// Limits what its VMM gets of the host's CPUs for the sake of a container, from now on. A VMM without a
    /// control group of its own has no such limits; the guest's own cgroups then hold the workload alone.
    ///
    /// # Errors
    /// [`CgroupError`].
    pub fn limit_cpus(&self, container: &str, limits: &HostLimits) -> Result<(), CgroupError> {
        let limits = self.note_cpus(container, limits);
        match &self.cgroup {
            Some(group) => group.update_cpus(&limits),
            None => {
                tracing::debug!(sandbox = self.id, "a VMM has no control group to be limited by");
                Ok(())
            }
        }
    }

    /// Limits a container's devices, from now on. One that has joined has no network interfaces.
    ///
    /// # Errors
    /// [`ControlError`].
    pub async fn set_rates(&self, container: &str, rates: Rates) -> Result<(), ControlError> {
        self.rate(&self.place(container), rates).await
    }

    async fn rate(&self, place: &Place, rates: Rates) -> Result<(), ControlError> {
        plan::set_rates(&self.control, &self.dir, place, rates).await
    }

    /// What its processes are confined by.
    fn cell(&self) -> Cell {
        Cell::adopt(self.dir.path())
    }

    /// A connection for the guest's name queries ([`bulkhead_agent_api::names`]); an earlier one ends.
    ///
    /// # Errors
    /// The guest does not answer.
    pub async fn names(&self) -> io::Result<tokio::net::UnixStream> {
        vsock::connect(&self.dir, NAMES_PORT).await
    }

    /// Gives network slots their taps.
    ///
    /// # Errors
    /// [`ControlError`].
    pub async fn plug(&self, nics: &[Nic]) -> Result<(), ControlError> {
        let request = |nic: &Nic| Request::AttachTap { id: self::nic(nic.slot), mac: nic.mac, mtu: nic.mtu };
        let requests: Vec<_> = nics.iter().map(|nic| (request(nic), Some(nic.tap.as_fd()))).collect();
        if requests.is_empty() {
            return Ok(());
        }
        self.control.call_all(&self.dir, &requests).await
    }

    /// Takes a network slot's tap away.
    ///
    /// # Errors
    /// [`ControlError`].
    pub async fn unplug(&self, slot: u8) -> Result<(), ControlError> {
        self.control(&Request::DetachTap { id: nic(slot) }).await.map(drop)
    }

    /// How much memory it has been given.
    ///
    /// # Errors
    /// [`ResizeError`].
    pub async fn memory(&self) -> Result<Memory, ResizeError> {
        let status = self.memory_status().await?;
        Ok(Memory { base_mib: status.base_mib, plugged_mib: status.requested_mib })
    }

    async fn memory_status(&self) -> Result<MemoryStatus, ResizeError> {
        match self.control(&Request::Status).await? {
            Response::Status(Status { memory, .. }) => Ok(memory),
            _ => Err(ResizeError::Unexpected),
        }
    }

    /// Gives it more memory, or takes some away. More is there when this returns; what is to be taken away goes
    /// when the guest can spare it.
    ///
    /// # Errors
    /// [`ResizeError`].
    pub async fn set_memory(&self, memory: Memory) -> Result<(), ResizeError> {
        self.control(&Request::SetMemory { plugged_mib: memory.plugged_mib }).await?;
        // Before the guest uses it, or after it has given up what it could at once.
        self.limit_memory().await?;
        self.memory_is_there(memory).await
    }

    /// Limits what its VMM gets of the host's memory: all that the guest has, or is to have, and what the VMM
    /// itself needs.
    ///
    /// # Errors
    /// [`ResizeError`].
    pub async fn limit_memory(&self) -> Result<(), ResizeError> {
        let status = self.memory_status().await?;
        let plugged_mib = status.plugged_mib.max(status.requested_mib);
        let memory = Memory { base_mib: status.base_mib, plugged_mib };
        if let Some(group) = &self.cgroup {
            group.update_memory(memory.host_bytes())?;
        }
        Ok(())
    }

    /// Waits until the guest has taken the memory into use that it was given.
    ///
    /// # Errors
    /// [`ResizeError::Call`].
    pub async fn memory_is_there(&self, memory: Memory) -> Result<(), ResizeError> {
        if memory.plugged_mib > 0 {
            self.agent.call(Call::AwaitMemory { plugged_mib: memory.plugged_mib }).await?;
        }
        Ok(())
    }

    /// Opens a process's output from byte `from`, or from the oldest that the agent still holds; an earlier connection to the same stream ends.
    pub(crate) async fn output(
        &self,
        process: ProcessId,
        stream: StreamKind,
        from: Option<u64>,
    ) -> io::Result<OutputStream> {
        let request = StreamOpen { process, stream, from };
        let (stream, from) = stream::open(&self.dir, &request).await?;
        Ok(OutputStream::new(stream, from))
    }

    /// Waits until the guest connects to the host's port.
    pub(crate) async fn accept(&self, port: u32) -> io::Result<tokio::net::UnixStream> {
        vsock::listen(&self.dir, port).await
    }

    /// Opens a process's input.
    pub(crate) async fn input(&self, process: ProcessId) -> io::Result<InputStream> {
        let request = StreamOpen { process, stream: StreamKind::Stdin, from: Some(0) };
        Ok(InputStream::new(stream::open(&self.dir, &request).await?.0))
    }

    /// Opens a transfer of a container's files.
    ///
    /// # Errors
    /// [`files::TransferError`].
    pub(crate) async fn files(&self, open: &FilesOpen) -> Result<files::Transfer, files::TransferError> {
        files::Transfer::open(&self.dir, open).await
    }

    /// Resolves when the VMM has ended.
    pub async fn ended(&self) -> Death {
        let status = self.process.ended().await;
        Death::read(&self.dir, status)
    }

    /// Kills the VMM. [`Sandbox::ended`] tells when it is done.
    pub fn kill(&self) {
        self.process.kill();
    }

    /// Has the guest end everything and write its disk, kills it, and removes every trace. A guest that has not
    /// done so within `grace` is killed as it is.
    pub async fn shut_down(&self, grace: Duration) {
        let off = async {
            // What is still to be written must not wait for the rate at which a workload may write.
            for place in self.tenants.places() {
                let _ = self.rate(&place, Rates::default()).await;
            }
            if let Some(group) = &self.cgroup {
                let _ = group.update_cpus(&HostLimits::default());
            }
            // An answer says that the disk is whole: the rest of the kernel's way down helps nobody. Without one
            // the machine ends by itself.
            if self.agent.call(Call::Shutdown).await.is_err() {
                self.process.ended().await;
            }
        };
        if tokio::time::timeout(grace, off).await.is_err() {
            tracing::warn!(sandbox = self.id, "a guest did not power off in time and is killed");
        }
        self.destroy().await;
    }

    /// Kills the VMM and removes every trace. Nothing is flushed: for a guest whose disk nobody will read.
    pub async fn destroy(&self) {
        self.process.kill();
        if let Some(violation) = self.ended().await.violation() {
            tracing::error!(sandbox = self.id, ?violation, "a VMM made a system call that it may not");
        }
        if let Err(error) = self.dir.remove() {
            tracing::error!(path = %self.dir.path().display(), %error, "a sandbox's directory stays behind");
        }
    }
}

/// Lets a machine run that an earlier daemon paused to save it, and then died.
async fn wake(control: &Control, dir: &SandboxDir) -> Result<(), ControlError> {
    let status = control.call(dir, &Request::Status, &[], ANSWER_WITHIN).await?;
    if matches!(status, Response::Status(status) if status.paused) {
        control.call(dir, &Request::Resume, &[], ANSWER_WITHIN).await?;
    }
    Ok(())
}

/// Kills a sandbox by its directory alone and removes it.
pub async fn discard(parent: &Path, id: &str) {
    let path = parent.join(id);
    if let Some(identity) = read_identity(&path.join(IDENTITY)) {
        match Process::adopt(&identity) {
            Ok(Some(process)) => {
                process.kill();
                process.ended().await;
            }
            Ok(None) => {}
            Err(error) => tracing::error!(sandbox = id, %error, "an old sandbox cannot be looked at"),
        }
    }
    if let Err(error) = dir::remove(&path) {
        tracing::error!(path = %path.display(), %error, "an old sandbox's directory stays behind");
    }
}

/// Ends every sandbox below `parent` that is not in `keep`: what a daemon that died left half booted or half
/// ended. A guest that answers is powered off in order, so that its disk is whole; all within `grace`.
///
/// # Errors
/// When the directory, or that of the user ids in use, cannot be read.
pub async fn sweep(
    parent: &Path,
    keep: &HashSet<String>,
    grace: Duration,
    confinement: &Confinement,
) -> io::Result<()> {
    let mut tasks = tokio::task::JoinSet::new();
    for entry in std::fs::read_dir(parent)? {
        let name = entry?.file_name();
        let Some(id) = name.to_str().filter(|id| !keep.contains(*id)) else { continue };
        tracing::info!(sandbox = id, "an old sandbox is ended");
        let (parent, id) = (parent.to_owned(), id.to_owned());
        tasks.spawn(async move {
            let in_order = async {
                if let Ok((sandbox, _events)) = Sandbox::adopt(&parent, &id).await {
                    sandbox.shut_down(grace).await;
                }
            };
            // Whatever is still there is killed below.
            let _ = tokio::time::timeout(grace, in_order).await;
            discard(&parent, &id).await;
        });
    }
    tasks.join_all().await;
    vmm::jail::sweep(confinement, parent)
}

#[cfg(test)]
mod tests;
