//! The contract between the daemon and one VMM process.
//!
//! ```text
//!  daemon                                   bulkhead-vmm
//!    │ spawn: --config-fd N ────────────────▶ reads one [`VmConfig`] (JSON), then never opens a path
//!    │ connect control socket (seqpacket) ──▶ [`Request`] + fds (SCM_RIGHTS)  →  [`Response`]
//!    │ connect vsock socket (stream) ───────▶ `CONNECT <port>\n` or `LISTEN <port>\n`  →  `OK <port>\n`
//!    │ pidfd readable ◀────────────────────── the process has ended; [`Report`] lies in the report file
//! ```
//!
//! Everything a VMM uses arrives as a file descriptor: it is inherited, and named in the
//! configuration by its number, or comes with a control message. So that a jail can take every path
//! away before a guest runs. Both sockets *listen* (the daemon made them and keeps their paths), so
//! that a restarted daemon can connect to a running machine again.

use serde::{Deserialize, Serialize};

pub mod share;

/// The number of a file descriptor that the VMM inherits.
pub type FdNumber = i32;

/// Version of this contract. A VMM refuses a configuration of another version.
pub const VERSION: u32 = 2;

/// Largest control message in bytes, either way: a seqpacket datagram of JSON.
pub const MAX_MESSAGE: usize = 64 * 1024;

/// How much of the guest's console the VMM keeps and puts into a [`Report`], in bytes.
pub const CONSOLE_TAIL: usize = 16 * 1024;

/// Everything that is fixed when a machine is built. What belongs to one container comes later, in
/// [`Request`]s.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// [`VERSION`].
    pub version: u32,
    /// Shown in thread names, logs and reports; at most 64 bytes.
    pub name: String,
    /// Number of vCPUs, 1 to 64.
    pub vcpus: u8,
    /// Guest memory in MiB, at least 32.
    pub memory_mib: u32,
    /// Where the machine's first instruction comes from.
    pub start: Start,
    /// A listening `SOCK_SEQPACKET` Unix socket for [`Request`]s.
    pub control: FdNumber,
    /// A writable, empty regular file; the last thing the VMM does is to write one [`Report`] to it.
    pub report: FdNumber,
    /// `/dev/kvm`, open for reading and writing: the VMM opens no path, not even this one.
    pub kvm: FdNumber,
    /// How the process confines itself before the guest runs.
    pub jail: Jail,
    /// A writable file or pipe for every byte of the guest's console; capped by the VMM at 1 MiB. None:
    /// only the tail is kept.
    pub console: Option<FdNumber>,
    /// The devices, fixed for the machine's life.
    pub devices: DeviceConfig,
}

/// How far a VMM is confined. Either way each of its threads runs under its own system call filter, and what
/// fails of it ends the machine before it has begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Jail {
    /// The process was started under a user id and in namespaces of its own, with the capabilities of its own
    /// user namespace. It makes its root an empty directory and gives all of them up.
    Full,
    /// It was not, since nobody with the right to do so started it: only what needs no privilege is done.
    Process,
}

/// How a machine begins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "from", deny_unknown_fields)]
pub enum Start {
    /// Boots a kernel; the machine runs at once.
    Boot {
        /// An uncompressed x86-64 ELF `vmlinux`.
        kernel: FdNumber,
        /// The initramfs (a cpio archive) that holds the guest agent.
        initramfs: Option<FdNumber>,
        /// The guest kernel's command line; the VMM appends one `virtio_mmio.device=` for each device.
        cmdline: String,
    },
    /// Goes on from what [`Request::Snapshot`] saved, paused until [`Request::Resume`].
    ///
    /// vCPUs, memory and device set must be those that were saved. Nothing is attached yet: disks, shares
    /// and taps come by requests, before the machine is resumed. Connections over vsock have ended, and the
    /// guest is told so; its listeners are still there.
    Restore {
        /// The state file.
        state: FdNumber,
        /// The memory file. It is mapped copy-on-write for the machine's life, so it must not change.
        memory: FdNumber,
    },
}

/// The device set of a machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceConfig {
    /// virtio-blk slots, `/dev/vda` first. Their media come with [`Request::AttachDisk`].
    pub block: Vec<BlockConfig>,
    /// virtio-fs devices. Their shares come with [`Request::AttachShare`].
    pub fs: Vec<FsConfig>,
    /// virtio-vsock.
    pub vsock: Option<VsockConfig>,
    /// virtio-net slots. Their taps come with [`Request::AttachTap`].
    pub net: Vec<NetConfig>,
    /// Whether there is a virtio-rng fed by the host's getrandom.
    pub rng: bool,
    /// Whether there is a virtio-balloon: it gives what the guest frees back to the host by itself, and can be
    /// inflated with [`Request::SetBalloon`].
    #[serde(default)]
    pub balloon: bool,
    /// virtio-mem: memory that is added to [`VmConfig::memory_mib`] and taken away while the machine runs.
    #[serde(default)]
    pub memory: Option<MemoryDeviceConfig>,
}

/// A virtio-blk slot: a device whose medium is attached later (capacity 0 until then, or no device at all).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockConfig {
    /// Names the slot in requests; also the guest-visible serial, at most 20 bytes.
    pub id: String,
    /// No device at all until its medium is attached: see [`NetConfig`] for what the guest sees of the slot. It
    /// stays one, without a medium after [`Request::DetachDisk`], until its driver lets go of it.
    #[serde(default)]
    pub late: bool,
}

/// A virtio-fs device whose root directory lists the attached shares by name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FsConfig {
    /// The tag that the guest mounts, at most 36 bytes.
    pub tag: String,
    /// Who serves it.
    #[serde(default)]
    pub server: FsServer,
    /// No device at all until its server is attached, as [`BlockConfig::late`]. Only of a device of kind
    /// [`FsServer::Process`].
    #[serde(default)]
    pub late: bool,
    /// MiB of guest addresses at which the guest can map files of its shares, instead of reading them into memory of
    /// its own: a multiple of 2, and 0 for none. One device of kind [`FsServer::Vmm`] may have such a window.
    #[serde(default)]
    pub window_mib: u32,
}

/// Who serves a virtio-fs device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FsServer {
    /// The VMM itself: read-only shares, which come with [`Request::AttachShare`].
    #[default]
    Vmm,
    /// A share server ([`share`]), which comes with [`Request::AttachServer`].
    Process,
}

/// The virtio-vsock device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's context id, at least 3.
    pub cid: u64,
    /// A listening `SOCK_STREAM` Unix socket; see [`vsock`] for what a client writes to it.
    pub listener: FdNumber,
}

/// A virtio-net slot. Until it gets a tap there is no device in it: the guest's kernel reads device id 0 in
/// its window (virtio 1.3, 4.2.2) and goes on. The guest looks again when it is told to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// Names the slot in requests.
    pub id: String,
}

/// The virtio-mem device. All of its memory is absent when the machine boots.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryDeviceConfig {
    /// How far memory can grow, in MiB: a multiple of [`MEMORY_BLOCK_MIB`]. What is not plugged costs address
    /// space alone.
    pub region_mib: u32,
}

/// The unit in which virtio-mem is plugged, in MiB.
pub const MEMORY_BLOCK_MIB: u32 = 2;

/// The first line that a client writes to the vsock socket, and the answer.
///
/// * `CONNECT <port>\n` asks the *guest* for a connection to its port. When the guest has accepted, the
///   VMM answers `OK <host port>\n` and the stream is the connection. When it refuses, or is not there,
///   the VMM closes the stream.
/// * `LISTEN <port>\n` waits for the guest to connect to the *host's* port: the next such connection is
///   this stream, begun by `OK <guest port>\n`. A guest's connection waits (bounded in number) while
///   nobody listens, so neither side ever polls.
///
/// A client that shuts down its writing side gives the guest an end of file; one that closes the stream
/// resets the connection.
pub mod vsock {
    /// The longest first line, its newline included.
    pub const MAX_COMMAND: usize = 32;
}

/// What the daemon asks of a running VMM: one datagram each, answered in order by one [`Response`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "request")]
pub enum Request {
    /// Whether the machine runs, and its counters. Answer: [`Response::Status`].
    Status,
    /// Gives a block slot its medium: one fd, a regular file opened for reading (and writing). The format
    /// is raw, always. The guest sees a capacity change.
    AttachDisk {
        /// [`BlockConfig::id`].
        id: String,
        /// Whether writes are refused (then the fd may be read-only).
        read_only: bool,
    },
    /// Takes a block slot's medium away: capacity 0, every later request an I/O error.
    DetachDisk {
        /// [`BlockConfig::id`].
        id: String,
    },
    /// Adds a directory below the virtio-fs root: one fd, an `O_PATH` or readable directory.
    AttachShare {
        /// [`FsConfig::tag`].
        tag: String,
        /// The directory's name in the guest's view: 1 to 255 bytes, no `/`, not `.` or `..`.
        name: String,
        /// How the directory is to be read.
        kind: ShareKind,
    },
    /// Removes a share; its open files stay usable until closed, every new look-up fails.
    DetachShare {
        /// [`FsConfig::tag`].
        tag: String,
        /// As it was attached.
        name: String,
    },
    /// Gives a virtio-fs device of kind [`FsServer::Process`], which has none, its server: two fds, the channel and
    /// the area ([`share`]). While it has one the machine cannot be saved.
    AttachServer {
        /// [`FsConfig::tag`].
        tag: String,
    },
    /// Takes a virtio-fs device's server away, whether it lives or not: the channel is closed, which ends it, and
    /// every request under way and later gets ENOTCONN. Another can be attached; the guest has to mount anew then.
    DetachServer {
        /// [`FsConfig::tag`].
        tag: String,
    },
    /// Gives a network slot its tap: one fd, a tap opened with `IFF_NO_PI | IFF_VNET_HDR`. In a machine that
    /// was restored with a device in the slot, the driver keeps the address that it knows.
    AttachTap {
        /// [`NetConfig::id`].
        id: String,
        /// The MAC address the guest sees, a unicast one.
        mac: [u8; 6],
        /// The MTU offered to the guest, at least 68.
        mtu: u16,
    },
    /// Takes a network slot's tap away: the link goes down, and once its driver has let go of the device,
    /// there is none any more.
    DetachTap {
        /// [`NetConfig::id`].
        id: String,
    },
    /// How much memory the guest is to have beyond its base. It follows at its own pace (see
    /// [`MemoryStatus::plugged_mib`]); one that cannot free what is to be taken away keeps it, and goes on trying.
    SetMemory {
        /// A multiple of [`MEMORY_BLOCK_MIB`], at most [`MemoryDeviceConfig::region_mib`].
        plugged_mib: u32,
    },
    /// How much memory the guest is to hand over and not use. It follows at its own pace, and takes memory
    /// back by itself before it kills a process for want of it.
    SetBalloon {
        /// 0 gives everything back to the guest.
        mib: u32,
    },
    /// Limits what a device moves, from now on; every limit that is absent is lifted. The buckets begin full.
    SetRateLimit {
        /// The device.
        device: LimitedDevice,
        /// Its limits.
        limits: RateLimits,
    },
    /// The console from a byte on, or from the oldest that is kept. Answer: [`Response::ConsolePart`].
    ConsolePart {
        /// Counted from the machine's start.
        from: u64,
    },
    /// The flight recorder: what happened last. Answer: [`Response::Recent`].
    Recent,
    /// Stops every vCPU between two instructions.
    Pause,
    /// Lets the vCPUs run on.
    Resume,
    /// Saves the paused machine: two fds, the state file and the memory file, both regular, empty and
    /// writable. The memory file becomes sparse. What is attached is not saved; disks are the caller's to
    /// keep consistent. The machine stays paused and can be resumed.
    Snapshot,
    /// The console's last [`CONSOLE_TAIL`] bytes. Answer: [`Response::Console`].
    Console,
    /// Ends the process at once; the report says [`ExitReason::Killed`].
    Kill,
}

/// What lies below a share's directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShareKind {
    /// An unpacked image layer in the layer store's own form (crate `bulkhead-layer-format`): immutable,
    /// served read-only.
    Layer,
}

/// A device whose traffic can be limited.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum LimitedDevice {
    /// A block slot.
    Block {
        /// [`BlockConfig::id`].
        id: String,
    },
    /// A network slot.
    Net {
        /// [`NetConfig::id`].
        id: String,
    },
}

/// What a device may move in each direction, by the guest's view.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RateLimits {
    /// Into the guest: reads of a disk, received frames.
    pub read: RateLimit,
    /// Out of the guest: writes, flushes and discards of a disk, sent frames.
    pub write: RateLimit,
}

/// The limits of one direction. Each that is there must be kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RateLimit {
    /// Bytes of data: of a disk's requests without their headers, of frames with their Ethernet headers.
    pub bytes: Option<Bucket>,
    /// Requests or frames.
    pub operations: Option<Bucket>,
}

/// A token bucket: in any span of t seconds at most `per_second` × t + `burst` pass, but for one last request
/// that was begun with tokens left and is longer than they.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bucket {
    /// How fast it fills, at least 1.
    pub per_second: u64,
    /// How much it holds, at least 1.
    pub burst: u64,
}

/// The answer to a [`Request`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "response")]
pub enum Response {
    /// Done.
    Ok,
    /// To [`Request::Status`].
    Status(Status),
    /// To [`Request::Console`]: lossy UTF-8.
    Console {
        /// The tail.
        text: String,
    },
    /// To [`Request::ConsolePart`].
    ConsolePart {
        /// Lossy UTF-8.
        text: String,
        /// The first byte that is not in `text`.
        next: u64,
    },
    /// To [`Request::Recent`].
    Recent {
        /// Oldest first, at most [`RECENT`].
        events: Vec<Recorded>,
    },
    /// Not done, and nothing was changed.
    Error {
        /// For people: what was refused and why.
        message: String,
    },
}

/// A running machine's state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// [`VmConfig::name`].
    pub name: String,
    /// Whether the vCPUs are paused.
    pub paused: bool,
    /// Microseconds from the start of the VMM process to the first entry into the guest.
    pub entered_guest_us: u64,
    /// Microseconds from the start of the VMM process to the end of each phase of building the machine, in
    /// order.
    pub phases: Vec<(String, u64)>,
    /// Exits to user space so far, by reason, most frequent first.
    pub exits: Vec<(String, u64)>,
    /// The virtio devices in bus order.
    #[serde(default)]
    pub devices: Vec<DeviceFigures>,
    /// The guest's memory.
    #[serde(default)]
    pub memory: MemoryStatus,
}

/// A guest's memory. What the guest tells of itself is not to be relied upon.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MemoryStatus {
    /// [`VmConfig::memory_mib`].
    pub base_mib: u32,
    /// What [`Request::SetMemory`] asked for.
    pub requested_mib: u32,
    /// What the guest has plugged.
    pub plugged_mib: u32,
    /// What [`Request::SetBalloon`] asked for.
    pub balloon_target_mib: u32,
    /// What the guest says is in the balloon.
    pub balloon_mib: u32,
    /// Bytes given back to the host so far: reported as free, put into the balloon, or unplugged.
    pub returned_bytes: u64,
    /// What the guest's kernel told last; every [`Request::Status`] asks it to tell again.
    pub guest: Option<GuestMemoryFigures>,
}

/// A guest kernel's own view of its memory, in bytes (virtio 1.3, 5.5.6.3).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct GuestMemoryFigures {
    /// Memory that the kernel manages.
    pub total: u64,
    /// Unused.
    pub free: u64,
    /// What could be had without swapping.
    pub available: u64,
    /// Page cache and the like.
    pub caches: u64,
    /// Major page faults.
    pub major_faults: u64,
    /// How often the OOM killer struck.
    pub oom_kills: u64,
}

/// What a virtio device has done so far. Counters begin at 0 with the process and never go back.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DeviceFigures {
    /// Its name in reports, `block0` for instance.
    pub name: String,
    /// Whether the driver has set it up and it works.
    pub active: bool,
    /// Kicks of a queue that the worker has taken; several of the driver's may be one.
    pub kicks: u64,
    /// Interrupts raised.
    pub interrupts: u64,
    /// Resets by the driver.
    pub resets: u64,
    /// Into the guest.
    pub read: Traffic,
    /// Out of the guest.
    pub write: Traffic,
}

/// What has passed in one direction; only of devices that can be limited ([`LimitedDevice`]).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Traffic {
    /// As [`RateLimit::bytes`] counts.
    pub bytes: u64,
    /// As [`RateLimit::operations`] counts.
    pub operations: u64,
    /// How often something had to wait for its rate limit.
    pub throttled: u64,
    /// How long in total, in microseconds.
    pub throttled_us: u64,
}

/// How many events the flight recorder keeps.
pub const RECENT: usize = 256;

/// An event of the flight recorder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recorded {
    /// Microseconds from the start of the VMM process.
    pub at_us: u64,
    /// For people: the device if it is of one, and what happened, at most 200 bytes.
    pub text: String,
}

/// Why a machine ended, and what its guest said last. Written to [`VmConfig::report`] as JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The reason.
    pub reason: ExitReason,
    /// The console's last [`CONSOLE_TAIL`] bytes as lossy UTF-8.
    pub console: String,
    /// Microseconds from the start of the VMM process to its end.
    pub uptime_us: u64,
    /// What happened last, oldest first, at most [`RECENT`].
    #[serde(default)]
    pub recent: Vec<Recorded>,
}

/// Why a machine ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum ExitReason {
    /// The guest powered off or rebooted in order (both end a machine).
    PoweredOff,
    /// The guest kernel panicked.
    GuestPanic {
        /// The console line that begins with "Kernel panic".
        message: String,
    },
    /// A triple fault with no panic before it.
    TripleFault,
    /// KVM could not go on.
    Kvm {
        /// The failing operation or exit, with its numbers.
        message: String,
    },
    /// A device broke beyond use (its queue was corrupted, its backend failed).
    Device {
        /// The device's name, `block0` for instance.
        device: String,
        /// What happened.
        message: String,
    },
    /// The machine could not be built.
    Setup {
        /// The step and its error.
        message: String,
    },
    /// One of the VMM's threads made a system call that its kind does not make: the VMM is at fault, or not
    /// its own any more. It was killed before the call was made.
    Violation {
        /// The kind of thread: `control`, `vcpu`, or a device's, `block` for instance.
        thread: String,
        /// The call's number.
        call: i32,
    },
    /// [`Request::Kill`] or a termination signal.
    Killed,
}

impl std::fmt::Display for ExitReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::PoweredOff => f.write_str("the guest powered off"),
            Self::GuestPanic { message } => write!(f, "the guest kernel panicked: {message}"),
            Self::TripleFault => f.write_str("the guest ended in a triple fault"),
            Self::Kvm { message } => write!(f, "KVM: {message}"),
            Self::Device { device, message } => write!(f, "device {device}: {message}"),
            Self::Setup { message } => write!(f, "the machine could not be built: {message}"),
            Self::Violation { thread, call } => {
                write!(f, "the VMM's {thread} thread made system call {call}, which it may not")
            }
            Self::Killed => f.write_str("the machine was killed"),
        }
    }
}
