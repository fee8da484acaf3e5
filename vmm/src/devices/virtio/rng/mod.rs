//! The entropy device (virtio 1.3, 5.4), fed by the host's getrandom.
//!
//! One queue. A request is a chain of device-writable buffers; it is completed with as many random bytes as
//! were written, at most [`MAX_REQUEST`], fewer than it has room for being allowed (5.4.6.2).

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
};

use super::{
    common::{self, TURN, Wake},
    device::{
        Activation, DeviceError, DeviceType, GuestMemory, Resources, VIRTIO_F_VERSION_1,
        VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VirtioDevice,
    },
    iovec::copy_in,
    queue::{Buffers, Chain},
};

#[cfg(test)]
mod tests;

/// The most bytes that one request gets. Linux asks for 64 at a time.
pub const MAX_REQUEST: usize = 4096;

const QUEUE: usize = 0;
const QUEUE_SIZES: [u16; 1] = [64];
const FEATURES: u64 = VIRTIO_F_VERSION_1 | VIRTIO_RING_F_INDIRECT_DESC | VIRTIO_RING_F_EVENT_IDX;
const STATE_VERSION: u32 = 1;

/// The device.
pub struct Rng {
    active: Option<Activation>,
    wake: Wake,
}

impl Rng {
    /// An inactive device.
    ///
    /// # Errors
    /// No eventfd could be made.
    pub fn new() -> io::Result<Self> {
        Ok(Self { active: None, wake: Wake::new()? })
    }

    fn serve(&mut self) -> Result<(), DeviceError> {
        let Some(active) = &mut self.active else { return Ok(()) };
        common::take_turn(active, QUEUE, TURN, &self.wake, fill)
    }
}

/// Fills a request; malformed ones, and all while the host has no entropy, get nothing.
fn fill(chain: Chain<'_>, memory: &GuestMemory) -> u32 {
    let Ok(buffers) = Buffers::of(chain) else { return 0 };
    let mut bytes = [0; MAX_REQUEST];
    let wanted = usize::try_from(buffers.writable_bytes()).map_or(MAX_REQUEST, |room| room.min(MAX_REQUEST));
    let bytes = &mut bytes[..wanted];
    if crate::entropy::fill(bytes).is_err() || !copy_in(memory, &buffers.writable, 0, bytes) {
        return 0;
    }
    u32::try_from(wanted).unwrap_or(0)
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> DeviceType {
        DeviceType::Rng
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        common::require_queues(&activation)?;
        self.active = Some(activation);
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
    }

    fn queue_event(&mut self, _queue: usize) -> Result<(), DeviceError> {
        self.serve()
    }

    fn event_sources(&self) -> Vec<RawFd> {
        vec![self.wake.as_raw_fd()]
    }

    fn source_event(&mut self, _source: usize) -> Result<(), DeviceError> {
        self.wake.take();
        self.serve()
    }

    fn save(&self) -> Result<Vec<u8>, DeviceError> {
        common::save(self, STATE_VERSION, self.active.as_ref(), &[], ())
    }

    fn restore(&mut self, state: &[u8], resources: Resources) -> Result<(), DeviceError> {
        let (active, ()) = common::restore(self, STATE_VERSION, state, resources)?;
        self.active = active;
        // What the driver offered just before it was saved.
        self.wake.request();
        Ok(())
    }
}
