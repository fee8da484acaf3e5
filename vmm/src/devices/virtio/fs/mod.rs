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
//! * `server`: shares, node ids, open files. The root directory is made up and lists the shares.
//! * `backend`, `layer`: what a share's files look like. A further kind of share is a further backend.
//! * `state`: how all this is saved.
//!
//! Requests are served one at a time on the device's worker thread: with the device's lock held, as a reset
//! or a save may come at any moment. A pool of workers, and more request queues with it, would share the
//! server behind a lock of its own and keep only the file reads outside; `OpenFiles` hands files out as `Arc`
//! for that.
//!
//! DAX is not offered yet. Its window will be shared memory region 0 ([`VirtioDevice::shared_memory`]), placed
//! by the machine's memory layout; SETUPMAPPING and REMOVEMAPPING then join the dispatch, and INIT
//! negotiates MAP_ALIGNMENT.

use std::os::fd::OwnedFd;

use bulkhead_vmm_api::ShareKind;
use virtio_queue::QueueT;

use super::{
    device::{
        Activation, DeviceError, DeviceType, Resources, VIRTIO_F_VERSION_1, VIRTIO_RING_F_EVENT_IDX,
        VIRTIO_RING_F_INDIRECT_DESC, VirtioDevice,
    },
    queue::{self, Buffers, SavedQueue},
};

mod backend;
mod directory;
mod dispatch;
mod files;
mod inodes;
mod layer;
mod memory;
mod server;
mod state;
#[cfg(test)]
mod tests;
pub mod wire;

pub use server::ShareError;

use server::Server;

/// The longest tag in bytes.
pub const MAX_TAG: usize = 36;

/// The high-priority queue (FORGET and INTERRUPT), then one request queue; as long as a READ of 256 pages
/// without indirect descriptors needs.
const QUEUE_SIZES: [u16; 2] = [128, 1024];
const REQUEST_QUEUES: u32 = 1;
const FEATURES: u64 = VIRTIO_F_VERSION_1 | VIRTIO_RING_F_INDIRECT_DESC | VIRTIO_RING_F_EVENT_IDX;

/// The device.
pub struct Fs {
    /// `struct virtio_fs_config`: the tag, padded with NULs, and the number of request queues.
    config: [u8; MAX_TAG + 4],
    server: Server,
    active: Option<Activation>,
}

impl Fs {
    /// A device with no shares, mounted in the guest by its tag.
    ///
    /// # Errors
    /// The tag is empty, longer than [`MAX_TAG`] bytes or holds a NUL.
    pub fn new(tag: &str) -> Result<Self, DeviceError> {
        if tag.is_empty() || tag.len() > MAX_TAG || tag.contains('\0') {
            return Err(DeviceError::Invalid(format!("{tag:?} cannot be a file system's tag")));
        }
        let mut config = [0; MAX_TAG + 4];
        config[..tag.len()].copy_from_slice(tag.as_bytes());
        config[MAX_TAG..].copy_from_slice(&REQUEST_QUEUES.to_le_bytes());
        Ok(Self { config, server: Server::new(), active: None })
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

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let rest = usize::try_from(offset).ok().and_then(|offset| self.config.get(offset..));
        for (to, from) in data.iter_mut().zip(rest.unwrap_or_default()) {
            *to = *from;
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        if activation.queues.len() != QUEUE_SIZES.len() {
            return Err(DeviceError::Invalid(format!(
                "{} queues for a file system",
                activation.queues.len()
            )));
        }
        self.active = Some(activation);
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
        self.server.forget_all();
    }

    fn queue_event(&mut self, index: usize) -> Result<(), DeviceError> {
        let Some(Activation { queues, resources, .. }) = &mut self.active else { return Ok(()) };
        let Some(queue) = queues.get_mut(index).filter(|queue| queue.ready()) else { return Ok(()) };
        let Resources { memory, interrupt } = resources;
        let server = &mut self.server;
        queue::drain(queue, index, memory, interrupt, |chain| {
            // A chain that is malformed, or too short for a request, is dropped: zero bytes written.
            Ok(Some(Buffers::of(chain).map_or(0, |buffers| memory::serve(server, memory, &buffers))))
        })
    }

    fn save(&self) -> Result<Vec<u8>, DeviceError> {
        let active = self.active.as_ref().map(|active| state::SavedActivation {
            features: active.features,
            queues: active.queues.iter().map(SavedQueue::from).collect(),
        });
        state::save(&self.server, active)
    }

    fn restore(&mut self, state: &[u8], resources: Resources) -> Result<(), DeviceError> {
        let active = state::restore(&mut self.server, state)?;
        self.active = match active {
            Some(saved) => Some(Activation {
                features: saved.features & FEATURES,
                queues: SavedQueue::restore_all(&saved.queues, &QUEUE_SIZES, &resources.memory)?,
                resources,
            }),
            None => None,
        };
        Ok(())
    }
}
