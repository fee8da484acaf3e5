//! The block device (virtio 1.3, 5.2): a slot whose medium, a raw file, is attached and detached while the
//! machine runs.
//!
//! ```text
//!   empty ──────── attach(file) ───────▶ occupied
//!   capacity 0, ◀── detach() ─────────── capacity of the file when it was attached
//!   requests fail                        requests work on the file
//! ```
//!
//! A late slot is no device at all before its first medium, and becomes none again:
//!
//! ```text
//!   absent ── attach ──▶ occupied ── detach ──▶ empty ── driver resets ──▶ absent
//!     no device             ▲                     │
//!                           └────── attach ───────┘
//! ```
//!
//! Each change raises a configuration interrupt, and Linux takes the new capacity. Requests are served one by
//! one on the worker's thread, straight between the file and guest memory, so none is ever under way when
//! the device is reset, saved, or loses its medium.
//!
//! A request that its rate limit holds back stays in the queue, and so do those behind it.
//!
//! VIRTIO_BLK_F_RO is never offered, since a medium may come after the negotiation: writing to a read-only
//! medium is an I/O error.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, RawFd},
};

use bulkhead_vmm_api::{RateLimits, Traffic};
use medium::{Medium, SECTOR};
use request::ID_BYTES;

use super::{
    common::{self, Wake},
    device::{
        Activation, DeviceError, DeviceType, Resources, VIRTIO_F_VERSION_1, VIRTIO_RING_F_EVENT_IDX,
        VIRTIO_RING_F_INDIRECT_DESC, VirtioDevice,
    },
};
use crate::rate_limiter::RateLimiter;

mod medium;
mod request;
#[cfg(test)]
mod tests;

pub use medium::AttachError;

/// Feature bits (virtio 1.3, 5.2.3).
pub mod feature {
    /// The length of a buffer is limited.
    pub const SIZE_MAX: u64 = 1 << 1;
    /// The number of buffers in a request is limited.
    pub const SEG_MAX: u64 = 1 << 2;
    /// The block size is told.
    pub const BLK_SIZE: u64 = 1 << 6;
    /// Cache flush.
    pub const FLUSH: u64 = 1 << 9;
    /// Discard.
    pub const DISCARD: u64 = 1 << 13;
    /// Write zeroes.
    pub const WRITE_ZEROES: u64 = 1 << 14;
}

const QUEUE: usize = 0;
const QUEUE_SIZES: [u16; 1] = [256];
const FEATURES: u64 = VIRTIO_F_VERSION_1
    | VIRTIO_RING_F_INDIRECT_DESC
    | VIRTIO_RING_F_EVENT_IDX
    | feature::SIZE_MAX
    | feature::SEG_MAX
    | feature::BLK_SIZE
    | feature::FLUSH
    | feature::DISCARD
    | feature::WRITE_ZEROES;
/// Requests served before the device lets go of its lock: fewer than elsewhere, since each may be long.
const TURN: usize = 32;
/// The longest data buffer, in bytes.
const SIZE_MAX: u32 = 256 * 1024;
/// Data buffers in a request: with header and status they fit a queue.
const SEG_MAX: u32 = 254;
/// Discards of less than a page give nothing back.
const DISCARD_ALIGNMENT: u32 = 8;
const CONFIG_BYTES: usize = 60;
const STATE_VERSION: u32 = 1;

/// The device.
pub struct Block {
    id: [u8; ID_BYTES],
    late: bool,
    medium: Option<Medium>,
    active: Option<Activation>,
    wake: Wake,
    limiter: RateLimiter,
}

/// Indices of the device's event sources.
const SOURCE_LIMITER: usize = 1;

impl Block {
    /// An empty slot. The guest reads `id` as the disk's serial number.
    ///
    /// # Errors
    /// `id` is longer than 20 bytes, or no eventfd or timer could be made.
    pub fn new(id: &str) -> io::Result<Self> {
        let mut bytes = [0; ID_BYTES];
        let Some(start) = bytes.get_mut(..id.len()) else {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "a block slot's id is longer than 20 bytes",
            ));
        };
        start.copy_from_slice(id.as_bytes());
        let (wake, limiter) = (Wake::new()?, RateLimiter::new()?);
        Ok(Self { id: bytes, late: false, medium: None, active: None, wake, limiter })
    }

    /// Whether the slot is late: no device as long as it has neither a medium nor a driver.
    #[must_use]
    pub fn late(self, late: bool) -> Self {
        Self { late, ..self }
    }

    /// Gives the slot its medium, in raw format whatever the content looks like.
    ///
    /// # Errors
    /// The slot is occupied, or the file is not regular or not open as needed. Nothing was changed.
    pub fn attach(&mut self, file: File, read_only: bool) -> Result<(), AttachError> {
        if self.medium.is_some() {
            return Err(AttachError::Occupied);
        }
        self.medium = Some(Medium::new(file, read_only)?);
        self.capacity_changed();
        Ok(())
    }

    /// Takes the medium away, if there is one: what the guest has not flushed may not be on stable storage.
    pub fn detach(&mut self) -> Option<File> {
        let medium = self.medium.take()?;
        self.capacity_changed();
        Some(medium.into_file())
    }

    /// Limits it from now on.
    pub fn limit(&mut self, limits: RateLimits) {
        self.limiter.set(limits);
        self.wake.request();
    }

    fn capacity_changed(&self) {
        if let Some(interrupt) = common::interrupt(self.active.as_ref()) {
            interrupt.config_changed();
        }
    }

    /// `struct virtio_blk_config` (5.2.4).
    fn config(&self) -> [u8; CONFIG_BYTES] {
        let mut config = [0; CONFIG_BYTES];
        let mut put =
            |offset: usize, bytes: &[u8]| config[offset..offset + bytes.len()].copy_from_slice(bytes);
        put(0, &self.medium.as_ref().map_or(0, Medium::sectors).to_le_bytes());
        put(8, &SIZE_MAX.to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &(SECTOR as u32).to_le_bytes());
        put(34, &1u16.to_le_bytes());
        put(36, &request::MAX_DISCARD_SECTORS.to_le_bytes());
        put(40, &request::MAX_DISCARD_SEGMENTS.to_le_bytes());
        put(44, &DISCARD_ALIGNMENT.to_le_bytes());
        put(48, &request::MAX_ZEROES_SECTORS.to_le_bytes());
        put(52, &request::MAX_ZEROES_SEGMENTS.to_le_bytes());
        put(56, &[1]);
        config
    }

    fn serve(&mut self) -> Result<(), DeviceError> {
        let Some(active) = &mut self.active else { return Ok(()) };
        let target = request::Target {
            medium: self.medium.as_ref(),
            id: &self.id,
            discard: active.features & feature::DISCARD != 0,
            write_zeroes: active.features & feature::WRITE_ZEROES != 0,
            write_through: active.features & feature::FLUSH == 0,
        };
        let limiter = &mut self.limiter;
        let served = common::take_turn(active, QUEUE, TURN, &self.wake, |chain, memory| {
            request::serve(chain, memory, &target, limiter)
        });
        self.limiter.arm();
        served
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn present(&self) -> bool {
        !self.late || self.medium.is_some() || self.active.is_some()
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        common::read_config(&self.config(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        common::require_queues(&activation)?;
        common::require_presence(self)?;
        self.active = Some(activation);
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
        self.limiter.reset();
    }

    fn queue_event(&mut self, _queue: usize) -> Result<(), DeviceError> {
        self.serve()
    }

    fn event_sources(&self) -> Vec<RawFd> {
        vec![self.wake.as_raw_fd(), self.limiter.as_raw_fd()]
    }

    fn source_event(&mut self, source: usize) -> Result<(), DeviceError> {
        match source {
            SOURCE_LIMITER => self.limiter.take(),
            _ => self.wake.take(),
        }
        self.serve()
    }

    fn traffic(&self) -> Option<[Traffic; 2]> {
        Some(self.limiter.traffic())
    }

    fn save(&self) -> Result<Vec<u8>, DeviceError> {
        common::save(self, STATE_VERSION, self.active.as_ref(), &[], ())
    }

    fn restore(&mut self, state: &[u8], resources: Resources) -> Result<(), DeviceError> {
        let (active, ()) = common::restore(self, STATE_VERSION, state, resources)?;
        self.active = active;
        // The medium may be another than the saved machine's, and the driver may have offered requests.
        self.capacity_changed();
        self.wake.request();
        Ok(())
    }
}
