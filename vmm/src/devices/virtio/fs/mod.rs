//! The file system device (virtio 1.3, 5.11): shares of the host, served to the guest's FUSE.
//!
//! ```text
//!   guest: mount -t virtiofs <tag>          attach_share(name, directory, kind) / detach_share(name)
//!      │ FUSE requests, 7.41                                    │
//!  hiprio queue (FORGET), request queue ──▶ memory ──▶ dispatch ──▶ server ──▶ backend (a ShareKind)
//!                                           (chains)   (wire)       (inodes, open files)
//! ```
//!
//! * [`wire`]: the protocol's structures, byte by byte.
//! * `memory`: a chain's buffers; READ goes from the file straight into them.
//! * `dispatch`: from a request to an operation and back.
//! * `server`: the operations, on node ids and open files. The root directory is made up and lists the
//!   shares (`shares`).
//! * `backend`, `layer`: what a share's files look like. A further kind of share is a further backend.
//! * `state`: how all this is saved.
//! * `forward`: the other kind of device, whose server is another process ([`crate::shares`]).
//!
//! Requests are served one at a time on the device's worker thread: with the device's lock held, as a reset
//! or a save may come at any moment. A pool of workers, and more request queues with it, would share the
//! server behind a lock of its own and keep only the file reads outside; `OpenFiles` hands files out as `Arc`
//! for that.
//!
//! A device may have a window of shared memory ([`crate::window`]) in which the guest maps files instead of reading
//! them (`mapping`): shared memory region 0 (virtio 1.3, 5.11.6.4), placed by the machine's memory layout.

use std::{
    os::fd::{AsRawFd, OwnedFd, RawFd},
    sync::Arc,
};

use bulkhead_vmm_api::ShareKind;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::{
    common::{self, TURN, Wake},
    device::{
        Activation, DeviceError, DeviceType, GuestMemory, Resources, VIRTIO_F_VERSION_1,
        VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VirtioDevice,
    },
    queue::Buffers,
};
use crate::window::Window;

mod backend;
pub(crate) mod directory;
mod dispatch;
pub(crate) mod files;
mod forward;
pub(crate) mod inodes;
mod layer;
mod mapping;
mod memory;
pub(crate) mod server;
mod shares;
mod state;
#[cfg(test)]
mod tests;
pub mod wire;

pub use forward::{Forward, ServerError};
pub use shares::ShareError;

use server::Server;

/// The longest tag in bytes.
pub const MAX_TAG: usize = 36;

/// The high-priority queue (FORGET and INTERRUPT), then one request queue; as long as a READ of 256 pages
/// without indirect descriptors needs.
const QUEUE_SIZES: [u16; 2] = [128, 1024];
const REQUEST_QUEUES: u32 = 1;
const FEATURES: u64 = VIRTIO_F_VERSION_1 | VIRTIO_RING_F_INDIRECT_DESC | VIRTIO_RING_F_EVENT_IDX;

/// The shared memory region that the window is (`VIRTIO_FS_SHMCAP_ID_CACHE`).
const WINDOW_ID: u8 = 0;

/// The device.
pub struct Fs {
    /// `struct virtio_fs_config`: the tag, padded with NULs, and the number of request queues.
    config: [u8; MAX_TAG + 4],
    server: Server,
    active: Option<Activation>,
    /// For each queue: that a turn has ended with requests left.
    wakes: [Wake; QUEUE_SIZES.len()],
}

impl Fs {
    /// A device with no shares, mounted in the guest by its tag.
    ///
    /// # Errors
    /// The tag is empty, longer than [`MAX_TAG`] bytes or holds a NUL; or no eventfd could be made.
    pub fn new(tag: &str) -> Result<Self, DeviceError> {
        let config = config_space(tag)?;
        let wake =
            || Wake::new().map_err(|source| DeviceError::Backend { context: "making an eventfd", source });
        Ok(Self { config, server: Server::new(), active: None, wakes: [wake()?, wake()?] })
    }

    /// Gives it a window, before it is used.
    #[must_use]
    pub fn with_window(mut self, window: Option<Arc<Window>>) -> Self {
        if let Some(window) = window {
            self.server.mappings.set_window(window);
        }
        self
    }

    /// The tag.
    #[must_use]
    pub fn tag(&self) -> &str {
        let tag = self.config[..MAX_TAG].split(|&byte| byte == 0).next().unwrap_or_default();
        std::str::from_utf8(tag).unwrap_or_default()
    }

    /// Adds a directory to the device's root under a name; `directory` may be an `O_PATH` descriptor. The
    /// guest finds it at once. After a restore this gives a saved share its directory back.
    ///
    /// # Errors
    /// See [`ShareError`].
    pub fn attach_share(
        &mut self,
        name: &str,
        directory: OwnedFd,
        kind: ShareKind,
    ) -> Result<(), ShareError> {
        self.server.attach(name, directory, kind)
    }

    /// Removes a share: its name, and every name in it, is not found any more. Files that the guest knows
    /// stay readable until it forgets them.
    ///
    /// # Errors
    /// [`ShareError::NotFound`].
    pub fn detach_share(&mut self, name: &str) -> Result<(), ShareError> {
        self.server.detach(name)
    }

    /// Serves a queue's requests for one turn.
    fn serve(&mut self, queue: usize) -> Result<(), DeviceError> {
        let (Some(active), Some(wake)) = (&mut self.active, self.wakes.get(queue)) else { return Ok(()) };
        let server = &mut self.server;
        common::take_turn(active, queue, TURN, wake, |chain, memory| {
            // A chain that is malformed, or too short for a request, is dropped: zero bytes written.
            Buffers::of(chain).map_or(0, |buffers| memory::serve(server, memory, &buffers))
        })
    }
}

/// `struct virtio_fs_config`.
fn config_space(tag: &str) -> Result<[u8; MAX_TAG + 4], DeviceError> {
    if tag.is_empty() || tag.len() > MAX_TAG || tag.contains('\0') {
        return Err(DeviceError::Invalid(format!("{tag:?} cannot be a file system's tag")));
    }
    let mut config = [0; MAX_TAG + 4];
    config[..tag.len()].copy_from_slice(tag.as_bytes());
    config[MAX_TAG..].copy_from_slice(&REQUEST_QUEUES.to_le_bytes());
    Ok(config)
}

/// Bytes of guest memory.
fn size(memory: &GuestMemory) -> u64 {
    memory.iter().map(GuestMemoryRegion::len).sum()
}

impl VirtioDevice for Fs {
    fn device_type(&self) -> DeviceType {
        DeviceType::Fs
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn shared_memory(&self, id: u8) -> Option<(u64, u64)> {
        let window = self.server.mappings.window().filter(|_| id == WINDOW_ID)?;
        Some((window.guest(), window.size()))
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        common::read_config(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        common::require_queues(&activation)?;
        self.server.serve_guest_of(size(&activation.resources.memory));
        self.active = Some(activation);
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
        self.server.forget_all();
    }

    fn queue_event(&mut self, queue: usize) -> Result<(), DeviceError> {
        self.serve(queue)
    }

    fn event_sources(&self) -> Vec<RawFd> {
        self.wakes.iter().map(AsRawFd::as_raw_fd).collect()
    }

    fn source_event(&mut self, source: usize) -> Result<(), DeviceError> {
        if let Some(wake) = self.wakes.get(source) {
            wake.take();
        }
        self.serve(source)
    }

    fn save(&self) -> Result<Vec<u8>, DeviceError> {
        common::save(self, state::VERSION, self.active.as_ref(), &[], state::save(&self.server))
    }

    fn restore(&mut self, state: &[u8], resources: Resources) -> Result<(), DeviceError> {
        self.server.serve_guest_of(size(&resources.memory));
        let (active, saved) = common::restore(self, state::VERSION, state, resources)?;
        state::restore(&mut self.server, saved)?;
        self.active = active;
        // What the driver offered just before it was saved.
        self.wakes.iter().for_each(Wake::request);
        Ok(())
    }
}
