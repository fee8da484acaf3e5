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

/// The number of a file descriptor that the VMM inherits.
pub type FdNumber = i32;

/// Version of this contract. A VMM refuses a configuration of another version.
pub const VERSION: u32 = 1;

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
    /// An uncompressed x86-64 ELF `vmlinux`.
    pub kernel: FdNumber,
    /// The initramfs (a cpio archive) that holds the guest agent.
    pub initramfs: Option<FdNumber>,
    /// The guest kernel's command line; the VMM appends one `virtio_mmio.device=` for each device.
    pub cmdline: String,
    /// A listening `SOCK_SEQPACKET` Unix socket for [`Request`]s.
    pub control: FdNumber,
    /// A writable, empty regular file; the last thing the VMM does is to write one [`Report`] to it.
    pub report: FdNumber,
    /// A writable file or pipe for every byte of the guest's console; capped by the VMM at 1 MiB. None:
    /// only the tail is kept.
    pub console: Option<FdNumber>,
    /// The devices, fixed for the machine's life.
    pub devices: DeviceConfig,
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
}

/// A virtio-blk slot: a device whose medium is attached later (capacity 0 until then).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockConfig {
    /// Names the slot in requests; also the guest-visible serial, at most 20 bytes.
    pub id: String,
}

/// A virtio-fs device whose root directory lists the attached shares by name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FsConfig {
    /// The tag that the guest mounts, at most 36 bytes.
    pub tag: String,
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
    /// Stops every vCPU between two instructions.
    Pause,
    /// Lets the vCPUs run on.
    Resume,
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
    /// Exits to user space so far, by reason, most frequent first.
    pub exits: Vec<(String, u64)>,
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
            Self::Killed => f.write_str("the machine was killed"),
        }
    }
}
