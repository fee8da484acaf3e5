//! The wire between the daemon and the guest agent, over vsock.
//!
//! ```text
//!  agent ──connect host port CONTROL_PORT───▶ daemon     the first control connection, at boot
//!  daemon ─connect guest port CONTROL_PORT──▶ agent      every later one; it replaces the one before
//!        frames: agent sends Hello, then Answers and Events; daemon sends Calls
//!  daemon ─connect guest port STREAM_PORT──▶ agent       one connection for each stdio stream
//!        one frame StreamOpen →, one frame StreamReady ←, then raw bytes
//!  daemon ─connect guest port NAMES_PORT───▶ agent       name queries to the daemon, answers back ([`names`])
//!  daemon ─connect guest port FILES_PORT───▶ agent       one connection for each transfer of files: [`files`]
//! ```
//!
//! **Who is the agent.** Anything in the guest that may open a vsock socket can connect to the host, so a
//! connection from the guest says nothing of who made it, but for the first: then nothing but the agent
//! runs. From before that on, the agent holds the guest port CONTROL_PORT, and a daemon that comes later
//! connects there, where nobody else can be.
//!
//! A frame is a little-endian `u32` length and that many bytes of JSON ([`frame`]). JSON describes
//! itself: an agent that was started by an older daemon goes on working after an upgrade, and unknown
//! fields are ignored by both.
//!
//! **Nothing is lost when the daemon dies.** The agent keeps every process's exit and its unacknowledged
//! output until the daemon, the same or a restarted one, has taken them:
//! * Output: the daemon opens the stream with [`StreamOpen::from`], the number of bytes it has safely;
//!   the agent sends from there, then shuts its side down when the process's output has ended. The daemon
//!   writes acknowledgements on the same connection: each a little-endian `u64`, the number of bytes that
//!   are safe now. The agent holds at most [`OUTPUT_WINDOW`] unacknowledged bytes and stops reading the
//!   workload's pipe beyond, which is the back-pressure.
//! * Exits: [`Event::Exited`] is sent when it happens; [`Call::State`] tells it again.
//! * Input: the end of a stdin *connection* does not end the workload's input, since the daemon may have
//!   died; [`Call::CloseStdin`] does. To end the input in order: shut down the writing side of the stdin
//!   connection, then call. The agent closes the connection when it has taken everything from it, or when
//!   the workload has closed its end. A connection that is replaced by a second is dropped with what was
//!   not yet taken from it.
//!
//! **A machine that is to be saved** is made quiet first, and a copy of it is told who it is before anything
//! in it runs:
//! ```text
//!              Quiesce: containers frozen, disks flushed        Thaw (on the connection that made it quiet)
//!   awake ────────────────────────────────────────▶ quiet ─────────────────────────────────────────▶ awake
//!                                                     │ any other connection: a copy, or a later daemon
//!                                                     ▼
//!                                                  nameless ── Personalize ──▶ quiet, named ── Thaw ──▶ awake
//! ```
//! A nameless agent refuses every call but [`Call::Personalize`] and [`Call::Shutdown`]. It cannot know whether
//! it is the original or a copy, so it need not: whoever has not been there since [`Call::Quiesce`] personalizes.
//! What is quiet starts nothing; it answers [`Call::State`], and streams flow.
//!
//! **What the runtime spec leaves open** is settled by names in this crate: whose passwd file knows a
//! user's name ([`USER`]), which groups are added ([`GROUP_ADD_ANNOTATION`]), who is PID 1
//! ([`INIT_ANNOTATION`]).

use std::net::IpAddr;

use oci_spec::runtime;
use serde::{Deserialize, Serialize};

pub mod files;
pub mod frame;
pub mod names;

/// Version of this wire, in [`Hello`].
pub const VERSION: u32 = 1;

/// The host port that the agent connects to at boot, and the guest port at which it is found afterwards.
pub const CONTROL_PORT: u32 = 1024;

/// The guest port on which the agent takes stdio streams.
pub const STREAM_PORT: u32 = 1025;

/// The guest port on which the agent takes the connection for name queries; a second replaces the first.
pub const NAMES_PORT: u32 = 1026;

/// How many unacknowledged bytes of one output stream the agent holds.
pub const OUTPUT_WINDOW: usize = 1 << 20;

/// The longest frame, in bytes after the length.
pub const MAX_FRAME: usize = 4 << 20;

/// How long a stream's [`StreamOpen`] frame may be.
pub const MAX_STREAM_OPEN: usize = 4096;

/// What `process.user.username` means: Docker's `USER`, as `user[:group]`, each a name or a number. Names
/// are looked up by the agent in the container's own `/etc/passwd` and `/etc/group`, when the process
/// starts; then `uid` and `gid` of the spec are not used, and `HOME` is set unless the environment has it.
/// Absent or empty: `uid` and `gid` stand as they are. `additionalGids` are added either way. For an image
/// without `USER` send `"0"`: Docker gives such a process root's groups too.
pub const USER: &str = "process.user.username";

/// An annotation of the spec: names or numbers of groups, separated by commas, that every process of the
/// container gets (Docker's `--group-add`); names are looked up in the container's `/etc/group`.
pub const GROUP_ADD_ANNOTATION: &str = "org.bulkhead.group-add";

/// An annotation of the spec: `"true"` makes a minimal init PID 1 of the container, which starts the
/// workload as its child, passes signals on, reaps orphans, and ends with the workload's code (Docker's
/// `--init`). The spec's args are the workload's alone.
pub const INIT_ANNOTATION: &str = "org.bulkhead.init";

/// The first frame that the agent sends on a control connection: it is ready for calls.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`VERSION`].
    pub version: u32,
    /// `uname -r` of the guest kernel.
    pub kernel: String,
    /// Microseconds of guest uptime when the agent's `main` began.
    pub started_us: u64,
}

/// What the agent sends after [`Hello`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromAgent {
    /// The answer to the call of that number.
    Answer {
        /// [`ToAgent::id`].
        id: u64,
        /// What came of it.
        result: Result<Answer, AgentError>,
    },
    /// Something happened.
    Event(Event),
}

/// What the daemon sends. Calls may overlap; each is answered once.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ToAgent {
    /// Chosen by the daemon, unique on this connection.
    pub id: u64,
    /// The call.
    pub call: Call,
}

/// Names a process: a container's first process (`exec` is None), or one of its execs.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ProcessId {
    /// The container's id.
    pub container: String,
    /// The exec's id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exec: Option<String>,
}

/// The calls.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "call")]
pub enum Call {
    /// Mounts the root filesystem and binds [`Create::files`] over it; waits up to 30 s for the disks, also in slots
    /// that were empty until now. A share device's server has to be there. What was in those slots before must not be
    /// in use any more: that is a [`ErrorKind::Conflict`]. The first process is not started, so files can be read and
    /// written in a container that does not run. Answer: [`Answer::Done`].
    Create(Box<Create>),
    /// Starts the first process of a created container, as the spec given to `Create` says. Answered when
    /// `execve` has succeeded ([`Answer::Started`]) or failed (an error of kind
    /// [`ErrorKind::NotFound`], [`ErrorKind::NotExecutable`] or another).
    Start {
        /// The container's id.
        container: String,
        /// How its stdio is made.
        stdio: Stdio,
    },
    /// Starts an additional process in a running container. Answered as `Start` is.
    Exec {
        /// Both parts set.
        process: ProcessId,
        /// What to run: args, env, cwd, user, capabilities, rlimits.
        spec: Box<runtime::Process>,
        /// How its stdio is made.
        stdio: Stdio,
    },
    /// Sends a signal. A process that has ended already is an error of kind [`ErrorKind::NotFound`].
    Signal {
        /// To whom.
        process: ProcessId,
        /// The number.
        signal: i32,
    },
    /// Sets a terminal's size.
    Resize {
        /// Whose.
        process: ProcessId,
        /// Rows.
        rows: u16,
        /// Columns.
        columns: u16,
    },
    /// Ends a process's standard input once all bytes of its stdin connection have been delivered.
    CloseStdin {
        /// Whose.
        process: ProcessId,
    },
    /// Everything that the agent knows. Answer: [`Answer::State`].
    State,
    /// The processes in a container. Answer: [`Answer::Processes`].
    Processes {
        /// The container's id.
        container: String,
    },
    /// Freezes every process of a container: those that run, and those started while it is frozen. Answered
    /// when all of them stand still. Nothing if it is frozen already.
    Pause {
        /// The container's id.
        container: String,
    },
    /// Lets a frozen container run on. Nothing if it is not frozen.
    Resume {
        /// The container's id.
        container: String,
    },
    /// Changes the limits of a container that was created: those that are given are set, all others stay.
    Update {
        /// The container's id.
        container: String,
        /// The limits; devices are ignored.
        resources: Box<runtime::LinuxResources>,
    },
    /// What a container uses. Answer: [`Answer::Stats`].
    Stats {
        /// The container's id.
        container: String,
    },
    /// Waits until this much memory, in MiB, has been plugged and is in use: 30 s at most.
    /// Answer: [`Answer::Done`], or an error of kind [`ErrorKind::Internal`].
    AwaitMemory {
        /// Beyond what the agent found when it began.
        plugged_mib: u32,
    },
    /// Frees page cache of a container that it does not need at the moment; its own memory is left alone.
    /// Answer: [`Answer::Reclaimed`].
    Reclaim {
        /// The container's id.
        container: String,
        /// Which part of it, in percent: 1 to 100.
        percent: u8,
    },
    /// Forgets an ended exec, or with `exec: None` a whole container whose first process has ended: kills
    /// what is left of it, flushes its disks and unmounts all, and waits for the end of every mount, but not for long:
    /// a container in the same pid namespace may hold files of it. After the answer its disks and its share server can
    /// be taken away.
    Delete {
        /// What to forget.
        process: ProcessId,
    },
    /// Sets the wall clock: nanoseconds since the Unix epoch.
    SetClock {
        /// The time.
        unix_ns: u64,
    },
    /// Finds the network device, whose tap the machine has, and makes it an interface as said. Answer:
    /// [`Answer::Done`]. Called again for an interface that is there, it is made as said anew.
    NetworkConnect(Box<Interface>),
    /// Takes an interface away, its device included, so that the daemon can take its tap.
    NetworkDisconnect {
        /// [`Interface::mac`].
        mac: [u8; 6],
    },
    /// Replaces the default routes, of both families: without a gateway of its family, there is none.
    NetworkRoutes {
        /// At most one a family.
        gateways: Vec<Gateway>,
    },
    /// Replaces the content of files that were injected by `Create`.
    NetworkFiles {
        /// The container's id.
        container: String,
        /// By their paths.
        files: Vec<InjectedFile>,
    },
    /// Kills everything, unmounts and flushes. The answer says that the disks are whole: whoever asked may kill
    /// the machine then, which spares it its kernel's way down. One that is not killed powers itself off. No
    /// answer but the connection's end is an older agent's, which powers off at once.
    Shutdown,
    /// Makes the machine one of its own: the first call to a copy of a machine, before anything of it runs on.
    /// Also good for a machine that was booted. The kernel's random generator is reseeded before the rest is
    /// looked at.
    Personalize(Box<Identity>),
    /// Freezes every container and flushes every disk, so that the machine can be saved. Refused
    /// ([`ErrorKind::Conflict`]) while a process is being started or a container is being made, and
    /// ([`ErrorKind::Internal`]) when a process cannot be frozen; then nothing is frozen.
    Quiesce,
    /// Lets the containers run on.
    Thaw,
}

/// The least entropy that an [`Identity`] brings, in bytes: twice what the kernel's generator holds.
pub const MIN_ENTROPY: usize = 64;

/// The most, in bytes.
pub const MAX_ENTROPY: usize = 512;

/// What must differ from one machine to the next, although both are copies of a third.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Fresh from the host's generator, [`MIN_ENTROPY`] to [`MAX_ENTROPY`] bytes: credited in full to the guest
    /// kernel's, which is then reseeded.
    pub entropy: Vec<u8>,
    /// The wall clock: nanoseconds since the Unix epoch.
    pub unix_ns: u64,
    /// The machine's own host name, which a container without a UTS namespace sees. Empty: as it is.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub hostname: String,
    /// For each container that the copy holds and that becomes another.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub containers: Vec<ContainerIdentity>,
}

impl std::fmt::Debug for Identity {
    /// Without the entropy: it seeds every secret of the guest's and belongs into no log.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity")
            .field("unix_ns", &self.unix_ns)
            .field("hostname", &self.hostname)
            .field("containers", &self.containers)
            .finish_non_exhaustive()
    }
}

/// What becomes of a container in a copied machine. It keeps its id towards the agent.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerIdentity {
    /// Its id.
    pub container: String,
    /// Its new host name. Empty, or without a UTS namespace of its own: as it is.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub hostname: String,
    /// New contents of [`Create::files`], by path; those that were not injected are left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<InjectedFile>,
    /// Whether its execs are killed: who asked for them has no connection to the copy.
    #[serde(default)]
    pub end_execs: bool,
    /// What of its first process's output is known already or is not this copy's: as far as the copy holds it,
    /// it is dropped, and offsets count from 0 after it. None: output is as it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub known: Option<KnownOutput>,
}

/// How many bytes of a process's output are not to come again. More than there were: all of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownOutput {
    /// Of stdout, or of the terminal.
    pub stdout: u64,
    /// Of stderr.
    pub stderr: u64,
}

/// A container as the agent is to build it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Create {
    /// The container's id.
    pub container: String,
    /// Where its root comes from.
    pub rootfs: Rootfs,
    /// What to apply: process, mounts, hostname, namespaces, masked paths, cgroup limits. `root.path` is
    /// ignored; `root.readonly` is honoured.
    pub spec: Box<runtime::Spec>,
    /// Files that Docker puts into every container (`/etc/hosts`, `/etc/resolv.conf`, `/etc/hostname`):
    /// bind-mounted over the root, writable, not part of the container's own layer.
    #[serde(default)]
    pub files: Vec<InjectedFile>,
    /// The virtio-fs tag of what the host shares for reading and writing: mounted where bind mounts of the spec
    /// come from, at `/run/bulkhead/fs/<tag>`. Each directory or file in its root is a share. It is this container's
    /// alone, and unmounted when the container is deleted: then the device can get another server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shares: Option<String>,
    /// What of the root is copied into shares before the workload sees them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub copy_up: Vec<CopyUp>,
    /// Unix sockets of the host's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sockets: Vec<ForwardedSocket>,
    /// Volumes that are disks.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<VolumeDisk>,
    /// What it and others have as their `/dev/shm`: mounted where bind mounts of the spec come from, at
    /// [`SHARED_MEMORY`]`/<id of the container>`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shared_memory: Option<SharedMemory>,
}

/// Where [`SharedMemory`] is mounted.
pub const SHARED_MEMORY: &str = "/run/bulkhead/fs/shm";

/// A tmpfs that several containers of a machine can have as their `/dev/shm`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SharedMemory {
    /// A new one, of so many bytes at most.
    Own(u64),
    /// That of another container, by its id, which has one.
    Of(String),
}

/// A volume with a file system of its own, ext4: mounted where bind mounts of the spec come from, at
/// [`VOLUME_DISKS`]`/<id of the disk>`. Its files are in the directory [`VOLUME_DATA`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeDisk {
    /// The device.
    pub disk: Disk,
    /// Whether nothing of it may change. The host's side does not let it then, either.
    #[serde(default)]
    pub read_only: bool,
    /// Where in the container its first content is, as for [`CopyUp`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copy_up: Option<String>,
}

/// Where [`VolumeDisk`]s are mounted.
pub const VOLUME_DISKS: &str = "/run/bulkhead/fs/disks";

/// The directory of a [`VolumeDisk`] that containers see.
pub const VOLUME_DATA: &str = "_data";

/// A share that is empty gets what the image has at its place, owner and permissions of the directory itself
/// included (Docker's volumes, when they are used first). One that is not empty stays as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyUp {
    /// The share's name.
    pub share: String,
    /// Absolute, in the container. Nothing is copied where there is no directory.
    pub path: String,
}

/// A socket that listens in the container; each connection to it becomes one over vsock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForwardedSocket {
    /// Absolute, in the container.
    pub path: String,
    /// The host port that is connected to.
    pub port: u32,
    /// Its owner.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// Its permissions.
    pub mode: u32,
}

/// An overlay: read-only layers over virtio-fs below, a block device above.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rootfs {
    /// The virtio-fs tag under which the layers are shared.
    pub tag: String,
    /// Names of the layers' shares, the topmost first. May be empty (an image of no layers).
    pub layers: Vec<String>,
    /// The writable layer's disk.
    pub disk: Disk,
}

/// A block device by the serial of its virtio-blk slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// The slot's id in the VMM's configuration, which is the device's serial.
    pub id: String,
    /// How many bytes the medium has: the agent waits until the device shows this.
    pub size: u64,
}

/// A small file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InjectedFile {
    /// Absolute, in the container.
    pub path: String,
    /// Its text.
    pub content: String,
    /// Its mode, 0o644 for instance.
    pub mode: u32,
}

/// A network interface as the agent is to make it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// The MAC address that the device has now. It differs from `mac` in a clone of a machine whose driver
    /// knows the address of before.
    pub device: [u8; 6],
    /// The MAC address that it is to have.
    pub mac: [u8; 6],
    /// Its name, `eth0` for instance: at most 15 bytes.
    pub name: String,
    /// Its MTU in bytes.
    pub mtu: u16,
    /// Its addresses; others that it had go.
    pub addresses: Vec<InterfaceAddress>,
}

/// An interface's address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterfaceAddress {
    /// The address.
    pub address: IpAddr,
    /// The prefix length of its network, which is on the link.
    pub prefix: u8,
}

/// Where a default route leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gateway {
    /// [`Interface::mac`].
    pub mac: [u8; 6],
    /// The next hop.
    pub address: IpAddr,
}

/// How a process's stdio is made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stdio {
    /// A pseudo-terminal for all three, its output on the stdout stream.
    pub terminal: bool,
    /// The terminal's first size, rows and columns.
    #[serde(default)]
    pub size: Option<(u16, u16)>,
    /// Whether stdin is a stream; else it is `/dev/null`. (With a terminal the input stays silent.)
    pub stdin: bool,
    /// Whether stdout is kept for the daemon; else it is thrown away.
    pub stdout: bool,
    /// Whether stderr is kept for the daemon; else it is thrown away.
    pub stderr: bool,
}

/// Successful answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "answer")]
pub enum Answer {
    /// Done.
    Done,
    /// The process runs.
    Started {
        /// Its pid in the guest's root pid namespace.
        pid: i32,
    },
    /// To [`Call::State`].
    State {
        /// All containers.
        containers: Vec<ContainerState>,
    },
    /// To [`Call::Processes`].
    Processes {
        /// One each.
        processes: Vec<ProcessInfo>,
    },
    /// To [`Call::Stats`].
    Stats(Box<Stats>),
    /// To [`Call::Reclaim`].
    Reclaimed {
        /// How many bytes the container uses less.
        bytes: u64,
    },
}

/// What a container uses, by its cgroup in the guest. Times are microseconds of guest processors, sizes are
/// bytes, counters begin with the container's creation.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Stats {
    /// Processor time.
    pub cpu: CpuStats,
    /// Memory.
    pub memory: MemoryStats,
    /// Processes and threads now.
    pub pids: u64,
    /// The most there may be; None: no limit.
    pub pids_limit: Option<u64>,
    /// Block devices.
    pub io: Vec<IoStats>,
    /// Network interfaces of the container but its loopback, by name.
    pub networks: Vec<(String, NetworkStats)>,
}

/// Processor time of a container.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CpuStats {
    /// In all.
    pub usage_us: u64,
    /// In user mode.
    pub user_us: u64,
    /// In the guest kernel.
    pub system_us: u64,
    /// Periods of the quota in which something ran.
    pub periods: u64,
    /// Those in which it was held back.
    pub throttled_periods: u64,
    /// How long it was held back.
    pub throttled_us: u64,
    /// Processors of the guest that are on line.
    pub online: u32,
}

/// Memory of a container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MemoryStats {
    /// Now, page cache included.
    pub usage: u64,
    /// The limit; None: no limit but the guest's memory.
    pub limit: Option<u64>,
    /// All of the guest's memory.
    pub total: u64,
    /// How often it ran out: the limit was hit, and nothing could be reclaimed.
    pub limit_hits: u64,
    /// The kernel's `memory.stat`.
    pub stat: Vec<(String, u64)>,
}

/// A container's use of one block device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct IoStats {
    /// Of the device number.
    pub major: u32,
    /// Of the device number.
    pub minor: u32,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Bytes discarded.
    pub discarded_bytes: u64,
    /// Reads.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
    /// Discards.
    pub discards: u64,
}

/// A container's use of one network interface.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NetworkStats {
    /// Bytes received.
    pub rx_bytes: u64,
    /// Frames received.
    pub rx_packets: u64,
    /// Frames received with errors.
    pub rx_errors: u64,
    /// Frames dropped on reception.
    pub rx_dropped: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Frames sent.
    pub tx_packets: u64,
    /// Frames not sent for errors.
    pub tx_errors: u64,
    /// Frames dropped on sending.
    pub tx_dropped: u64,
}

/// A container as the agent knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerState {
    /// Its id.
    pub container: String,
    /// Its first process, None before `Start`.
    pub init: Option<ProcessState>,
    /// Its execs by id.
    pub execs: Vec<(String, ProcessState)>,
    /// Whether [`Call::Pause`] has frozen it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub paused: bool,
}

/// A process's state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum ProcessState {
    /// It runs.
    Running {
        /// Its pid in the guest's root pid namespace.
        pid: i32,
    },
    /// It has ended.
    Exited(Exit),
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// 0 to 255; 128 + the signal's number when a signal ended it.
    pub code: i32,
    /// Whether the kernel's OOM killer struck in the container's cgroup.
    #[serde(default)]
    pub oom_killed: bool,
    /// When: nanoseconds since the Unix epoch by the guest's clock.
    pub unix_ns: u64,
}

/// A process in a container, as `ps` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessInfo {
    /// In the guest's root pid namespace.
    pub pid: i32,
    /// Parent, likewise.
    pub ppid: i32,
    /// Numeric user.
    pub uid: u32,
    /// Controlling terminal as `ps` prints it, `?` for none.
    pub tty: String,
    /// When it started: seconds since the Unix epoch.
    pub start_unix: u64,
    /// Processor time used, in milliseconds.
    pub cpu_ms: u64,
    /// The command line, or `[name]` when there is none.
    pub command: String,
    /// More of it; an older agent does not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<ProcessDetail>,
}

/// What `ps` shows in its longer forms.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ProcessDetail {
    /// The kernel's name.
    pub name: String,
    /// `R`, `S`, `D`, `T`, `t`, `Z`, `X` or `I`.
    pub state: String,
    /// Process group.
    pub group: i32,
    /// Session.
    pub session: i32,
    /// The terminal's foreground process group, -1 without a terminal.
    pub foreground: i32,
    /// Nice value.
    pub nice: i32,
    /// Threads.
    pub threads: u32,
    /// Effective user.
    pub euid: u32,
    /// Group.
    pub gid: u32,
    /// Bytes of virtual memory.
    pub virtual_bytes: u64,
    /// Bytes in memory.
    pub resident_bytes: u64,
    /// Bytes of the guest's memory.
    pub total_bytes: u64,
}

/// What happens without being asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "event")]
pub enum Event {
    /// A process ended. When it is a container's first process, everything else in the container is dead
    /// too.
    Exited {
        /// Which.
        process: ProcessId,
        /// How.
        exit: Exit,
    },
    /// The OOM killer struck in a container.
    Oom {
        /// The container's id.
        container: String,
    },
}

/// Why a call failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct AgentError {
    /// Where callers branch.
    pub kind: ErrorKind,
    /// For people. For a failed `execve` in runc's words, since the docker CLI reads them:
    /// `exec: "nosuch": executable file not found in $PATH`,
    /// `exec: "/etc/passwd": permission denied`, `exec: "/nosuch": stat /nosuch: no such file or directory`.
    pub message: String,
}

/// Where callers branch on an [`AgentError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// No such container, process or executable.
    NotFound,
    /// The file is there and cannot be executed: permission denied, a directory, a wrong format.
    NotExecutable,
    /// The call does not fit the state (a start of a running container).
    Conflict,
    /// The spec asks for something that is not valid or cannot be had.
    Invalid,
    /// Anything else.
    Internal,
}

/// The daemon's first and only frame on a stream connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamOpen {
    /// Whose.
    pub process: ProcessId,
    /// Which.
    pub stream: StreamKind,
    /// For output: how many bytes of it the daemon has safely; None: it does not know (it keeps none), and
    /// takes what the agent still holds. Ignored for input.
    #[serde(default)]
    pub from: Option<u64>,
}

/// The agent's answer to [`StreamOpen`]; after an error it closes the connection. A second connection to
/// the same stream replaces the first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamReady {
    /// None: raw bytes follow.
    pub error: Option<AgentError>,
    /// For output: the offset of the first byte that follows.
    #[serde(default)]
    pub from: u64,
}

/// A stdio stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StreamKind {
    /// To the process.
    Stdin,
    /// From the process; with a terminal, all of its output.
    Stdout,
    /// From the process.
    Stderr,
}
