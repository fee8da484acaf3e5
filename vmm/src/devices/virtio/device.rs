//! What a virtio device is to its transport.
//!
//! ```text
//!            driver writes DRIVER_OK               driver writes 0 to status
//!  inactive ────────────────────────▶ active ─────────────────────────▶ inactive
//!              activate(Activation)                     reset()
//! ```
//!
//! A device lives behind one mutex, shared by the vCPU threads (configuration space, status) and the
//! device's own worker thread (queue kicks and the device's event sources). So a reset can never run in
//! the middle of a request, and a paused machine's device can be saved by taking its lock.
//!
//! Queues are validated and frozen by the transport before `activate`: what the driver writes to queue
//! registers afterwards has no effect until a reset (virtio 1.3, 4.2.2.2; CVE-2026-5747).

use std::{
    os::fd::RawFd,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
};

use bulkhead_vmm_api::Traffic;
use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

/// The guest's memory as devices see it.
pub type GuestMemory = GuestMemoryMmap<()>;

/// The feature that every device must have: virtio 1.x (virtio 1.3, section 6).
pub const VIRTIO_F_VERSION_1: u64 = 1 << 32;
/// Indirect descriptors (virtio 1.3, 2.7.5.3).
pub const VIRTIO_RING_F_INDIRECT_DESC: u64 = 1 << 28;
/// Notification suppression by index (virtio 1.3, 2.7.7.1, 2.7.10).
pub const VIRTIO_RING_F_EVENT_IDX: u64 = 1 << 29;

/// Device ids (virtio 1.3, section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum DeviceType {
    /// Network device.
    Net = 1,
    /// Block device.
    Block = 2,
    /// Entropy device.
    Rng = 4,
    /// Traditional memory balloon.
    Balloon = 5,
    /// Socket device.
    Vsock = 19,
    /// Memory device.
    Mem = 24,
    /// File system device.
    Fs = 26,
}

/// A device model. Every method is called with the device's lock held.
pub trait VirtioDevice: Send {
    /// Its id.
    fn device_type(&self) -> DeviceType;

    /// Whether there is a device at all: an empty slot reads as device id 0, which drivers pass by (virtio
    /// 1.3, 4.2.2).
    fn present(&self) -> bool {
        true
    }

    /// The largest size of each queue; powers of two.
    fn queue_max_sizes(&self) -> &[u16];

    /// How many of the queues, from the first on, a driver with these features must have set up. All of them
    /// unless the device says otherwise.
    fn required_queues(&self, features: u64) -> usize {
        let _ = features;
        self.queue_max_sizes().len()
    }

    /// Features offered, [`VIRTIO_F_VERSION_1`] included.
    fn features(&self) -> u64;

    /// Reads configuration space. Bytes past its end are left zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes configuration space. Only few devices have writable fields; anything else is ignored.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }

    /// A shared memory region (virtio 1.3, 2.10) by its id: guest physical address and length in bytes. None
    /// if there is no such region.
    fn shared_memory(&self, id: u8) -> Option<(u64, u64)> {
        let _ = id;
        None
    }

    /// The driver is ready.
    ///
    /// # Errors
    /// The device cannot work with what was negotiated; the transport then sets DEVICE_NEEDS_RESET.
    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError>;

    /// Forgets everything the driver set up: queues, requests under way. Backends stay attached.
    fn reset(&mut self);

    /// The driver kicked a queue. Never called while inactive. Must not block for long on anything that the
    /// guest or an outside party controls.
    ///
    /// # Errors
    /// The queue or the backend is broken beyond use: the transport sets DEVICE_NEEDS_RESET and kicks no
    /// more. A malformed *request* is not an error: it is completed with the device's error status, or
    /// dropped with zero bytes written.
    fn queue_event(&mut self, queue: usize) -> Result<(), DeviceError>;

    /// File descriptors to watch for readability besides the queues, for the machine's whole life: asked
    /// once, before the first activation. A device with a changing set watches it through an epoll fd of
    /// its own and names that here.
    fn event_sources(&self) -> Vec<RawFd> {
        Vec::new()
    }

    /// The source of that index is readable; called while inactive too.
    ///
    /// # Errors
    /// As for [`VirtioDevice::queue_event`].
    fn source_event(&mut self, source: usize) -> Result<(), DeviceError> {
        let _ = source;
        Ok(())
    }

    /// What has passed so far, into and out of the guest; None where that is not counted.
    fn traffic(&self) -> Option<[Traffic; 2]> {
        None
    }

    /// The device's state, queues included, as bytes that [`VirtioDevice::restore`] of the same version takes.
    /// Called only while every vCPU is paused.
    ///
    /// # Errors
    /// The device is in a state that cannot be saved.
    fn save(&self) -> Result<Vec<u8>, DeviceError>;

    /// Brings a fresh device to a saved state, active if it was. Backends are attached anew by the caller,
    /// before or after.
    ///
    /// # Errors
    /// The bytes are damaged, of another version, or name queues outside guest memory.
    fn restore(&mut self, state: &[u8], resources: Resources) -> Result<(), DeviceError>;
}

/// What a device gets when the driver has set DRIVER_OK.
pub struct Activation {
    /// Features that the driver accepted: a subset of those offered.
    pub features: u64,
    /// The queues in order, validated against guest memory. One that the driver left disabled is not ready
    /// (`QueueT::ready`).
    pub queues: Vec<Queue>,
    /// The rest.
    pub resources: Resources,
}

/// What an active device works with.
#[derive(Clone)]
pub struct Resources {
    /// All of the guest's memory.
    pub memory: GuestMemory,
    /// How to notify the driver.
    pub interrupt: Arc<Interrupt>,
}

/// A device's interrupt line and its status (virtio 1.3, 4.2.2: InterruptStatus).
#[derive(Debug)]
pub struct Interrupt {
    status: AtomicU32,
    irqfd: EventFd,
    raised: AtomicU64,
}

impl Interrupt {
    /// InterruptStatus bit 0: a queue was used.
    ///
    /// The driver's look at it takes it back, so that what it acknowledges with this bit alone need not reach the VMM
    /// ([`Interrupt::SILENT`]): the driver looks at its queues only afterwards, and what is used after its look sets
    /// the bit anew.
    const USED_RING: u32 = 1;
    /// InterruptStatus bit 1: the configuration changed.
    const CONFIG: u32 = 2;

    /// What a driver acknowledges most often, and without effect: an exit to the VMM for each would be in vain.
    pub const SILENT: u32 = Self::USED_RING;

    /// An interrupt that is raised by writing to `irqfd`.
    #[must_use]
    pub fn new(irqfd: EventFd) -> Self {
        Self { status: AtomicU32::new(0), irqfd, raised: AtomicU64::new(0) }
    }

    /// Tells the driver that a queue has used buffers. Ask `QueueT::needs_notification` before.
    pub fn used_ring(&self) {
        self.raise(Self::USED_RING);
    }

    /// Tells the driver that configuration space changed.
    pub fn config_changed(&self) {
        self.raise(Self::CONFIG);
    }

    fn raise(&self, bit: u32) {
        self.status.fetch_or(bit, Ordering::SeqCst);
        self.raised.fetch_add(1, Ordering::Relaxed);
        // An eventfd's write fails only when its counter is full, and then the interrupt is pending anyway.
        let _ = self.irqfd.write(1);
    }

    /// InterruptStatus as it is; saved and restored by the transport.
    #[must_use]
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// The driver reads InterruptStatus.
    pub fn look(&self) -> u32 {
        self.status.fetch_and(!Self::USED_RING, Ordering::SeqCst)
    }

    /// How often it was raised.
    #[must_use]
    pub fn raised(&self) -> u64 {
        self.raised.load(Ordering::Relaxed)
    }

    /// InterruptACK: clears the bits that the driver names.
    pub fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    /// Sets the status as it was saved, and raises the line if any bit is set.
    pub fn restore(&self, status: u32) {
        if status != 0 {
            self.raise(status);
        }
    }

    /// The eventfd that raises the line.
    #[must_use]
    pub fn irqfd(&self) -> &EventFd {
        &self.irqfd
    }
}

/// Why a device cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// A queue is corrupt: the driver broke the protocol.
    #[error("queue {queue}: {message}")]
    Queue {
        /// Its index.
        queue: usize,
        /// What is wrong.
        message: String,
    },
    /// The backend failed beyond one request.
    #[error("{context}: {source}")]
    Backend {
        /// What was being done.
        context: &'static str,
        /// The cause.
        source: std::io::Error,
    },
    /// What was negotiated or restored cannot be worked with.
    #[error("{0}")]
    Invalid(String),
}
