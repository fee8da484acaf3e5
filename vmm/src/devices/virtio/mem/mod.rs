//! The memory device (virtio 1.3, 5.15): guest memory that grows and shrinks in blocks while the guest runs.
//!
//! ```text
//!   address          region: fixed when the machine is built, all of it unplugged
//!   ├─────────────────────────────┬──────────────────────────────┐
//!   │ ████ ██████   ███           │                              │
//!   └─────────────────────────────┴──────────────────────────────┘
//!     plugged ≤ requested         usable: grows with what is requested, never shrinks
//!
//!   host                          device                         guest
//!   set_requested(bytes) ───────▶ requested_size, interrupt ───▶ how far am I?
//!                                 ACK, or NACK ◀──────────────── PLUG / UNPLUG blocks
//! ```
//!
//! The guest decides which blocks, the host how many. What is unplugged goes back to the host. The machine lets
//! the guest reach only what is usable, and sees to it that devices can reach all of the region: a guest that
//! uses blocks which it has not plugged (it must not, `UNPLUGGED_INACCESSIBLE`) gets memory all the same, and
//! is stopped where every other excess is, by the limit of its process's control group.

use std::{
    io,
    ops::Range,
    os::fd::{AsRawFd, RawFd},
};

use serde::{Deserialize, Serialize};
use vm_memory::GuestAddress;

use super::{
    common::{self, TURN, Wake},
    device::{
        Activation, DeviceError, DeviceType, GuestMemory, Resources, VIRTIO_F_VERSION_1,
        VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VirtioDevice,
    },
    iovec::{copy_in, copy_out},
    queue::{Buffers, Chain},
    release::release,
};

mod blocks;
mod request;
#[cfg(test)]
mod tests;

use blocks::{Blocks, Found, Run};
use request::{Extent, REQUEST, RESPONSE, Request, Response};

/// Bytes of a block: what the host's memory comes in at best, a huge page.
pub const BLOCK: u64 = (bulkhead_vmm_api::MEMORY_BLOCK_MIB as u64) << 20;

/// VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE: the driver must not touch what is unplugged.
const F_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;
const FEATURES: u64 =
    VIRTIO_F_VERSION_1 | VIRTIO_RING_F_INDIRECT_DESC | VIRTIO_RING_F_EVENT_IDX | F_UNPLUGGED_INACCESSIBLE;
const QUEUE: usize = 0;
const QUEUE_SIZES: [u16; 1] = [64];
const STATE_VERSION: u32 = 1;

/// What is saved besides features and queues. The region must be the same again.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    address: u64,
    region: u64,
    requested: u64,
    usable: u64,
    plugged: Vec<Run>,
}

/// The region's state: everything but the queue.
#[derive(Debug)]
struct Region {
    address: u64,
    blocks: Blocks,
    requested: u64,
    usable: u64,
    returned: u64,
}

/// The device.
pub struct Mem {
    region: Region,
    active: Option<Activation>,
    wake: Wake,
}

impl Mem {
    /// A device for the region of `size` bytes at guest physical `address`.
    ///
    /// # Errors
    /// Either is no multiple of [`BLOCK`], there are too many blocks, or no eventfd could be made.
    pub fn new(address: u64, size: u64) -> io::Result<Self> {
        let count = u32::try_from(size / BLOCK).ok().filter(|count| *count > 0);
        let fits = address.is_multiple_of(BLOCK) && size.is_multiple_of(BLOCK);
        let Some(count) = count.filter(|_| fits && address.checked_add(size).is_some()) else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the region is not made of blocks"));
        };
        let region = Region { address, blocks: Blocks::new(count), requested: 0, usable: 0, returned: 0 };
        Ok(Self { region, active: None, wake: Wake::new()? })
    }

    /// Asks the guest to have `bytes` plugged in all, within the first `usable` bytes of the region: what was
    /// usable stays so. Both are cut to the region and to whole blocks.
    pub fn set_requested(&mut self, bytes: u64, usable: u64) {
        let size = self.region.size();
        let cut = |bytes: u64| bytes.min(size) / BLOCK * BLOCK;
        self.region.usable = cut(usable).max(self.region.usable);
        self.region.requested = cut(bytes).min(self.region.usable);
        if let Some(interrupt) = common::interrupt(self.active.as_ref()) {
            interrupt.config_changed();
        }
    }

    /// Bytes asked for.
    #[must_use]
    pub fn requested(&self) -> u64 {
        self.region.requested
    }

    /// Bytes plugged.
    #[must_use]
    pub fn plugged(&self) -> u64 {
        self.region.plugged()
    }

    /// How much of the region, from its beginning, the guest may reach.
    #[must_use]
    pub fn usable(&self) -> u64 {
        self.region.usable
    }

    /// Bytes given back to the host so far.
    #[must_use]
    pub fn returned(&self) -> u64 {
        self.region.returned
    }

    /// What is plugged, as ranges of guest physical addresses in ascending order: all of the region that has
    /// content worth saving.
    pub fn plugged_ranges(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.region
            .blocks
            .runs()
            .map(|run| self.region.address_of(run.start)..self.region.address_of(run.end))
    }

    fn serve(&mut self) -> Result<(), DeviceError> {
        let Self { region, active: Some(active), wake } = self else { return Ok(()) };
        common::take_turn(active, QUEUE, TURN, wake, |chain, memory| region.serve(chain, memory))
    }
}

impl Region {
    fn size(&self) -> u64 {
        u64::from(self.blocks.count()) * BLOCK
    }

    fn plugged(&self) -> u64 {
        u64::from(self.blocks.plugged()) * BLOCK
    }

    fn address_of(&self, block: u32) -> u64 {
        self.address + u64::from(block) * BLOCK
    }

    /// Serves one request; a malformed one gets nothing.
    fn serve(&mut self, chain: Chain<'_>, memory: &GuestMemory) -> u32 {
        let Ok(buffers) = Buffers::of(chain) else { return 0 };
        let mut bytes = [0; REQUEST];
        // Without room for the answer nothing is done that the driver would not hear of.
        if buffers.writable_bytes() < RESPONSE as u64 || !copy_out(memory, &buffers.readable, 0, &mut bytes) {
            return 0;
        }
        let response =
            Request::parse(&bytes).map_or(Response::Error, |request| self.perform(request, memory));
        if copy_in(memory, &buffers.writable, 0, &response.bytes()) { RESPONSE as u32 } else { 0 }
    }

    fn perform(&mut self, request: Request, memory: &GuestMemory) -> Response {
        match request {
            Request::Plug(extent) => match self.range(extent) {
                Some(range) if self.blocks.state(range.clone()) == Found::Unplugged => {
                    let more = u64::from(extent.blocks) * BLOCK;
                    if self.plugged() + more > self.requested {
                        return Response::Nack;
                    }
                    self.blocks.set(range, true);
                    Response::Ack
                }
                _ => Response::Error,
            },
            Request::Unplug(extent) => match self.range(extent) {
                Some(range) if self.blocks.state(range.clone()) == Found::Plugged => {
                    self.unplug(range, memory);
                    Response::Ack
                }
                _ => Response::Error,
            },
            Request::UnplugAll => {
                let runs: Vec<_> = self.blocks.runs().collect();
                for run in runs {
                    self.unplug(run, memory);
                }
                Response::Ack
            }
            Request::State(extent) => match self.range(extent) {
                Some(range) => Response::State(self.blocks.state(range)),
                None => Response::Error,
            },
        }
    }

    fn unplug(&mut self, range: Range<u32>, memory: &GuestMemory) {
        let start = self.address_of(range.start);
        self.returned += release(memory, GuestAddress(start), self.address_of(range.end) - start);
        self.blocks.set(range, false);
    }

    /// The blocks of an extent; None where it is not made of blocks of the usable part.
    fn range(&self, extent: Extent) -> Option<Range<u32>> {
        let offset =
            extent.address.checked_sub(self.address).filter(|offset| offset.is_multiple_of(BLOCK))?;
        let first = u32::try_from(offset / BLOCK).ok()?;
        let end = first.checked_add(u32::from(extent.blocks))?;
        (extent.blocks > 0 && u64::from(end) * BLOCK <= self.usable).then_some(first..end)
    }
}

impl VirtioDevice for Mem {
    fn device_type(&self) -> DeviceType {
        DeviceType::Mem
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let region = &self.region;
        // Node id and padding are the second word.
        let words =
            [BLOCK, 0, region.address, region.size(), region.usable, region.plugged(), region.requested];
        common::read_config(words.map(u64::to_le_bytes).as_flattened(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        common::require_queues(&activation)?;
        self.active = Some(activation);
        Ok(())
    }

    /// What is plugged stays so: a driver that comes anew finds it, and unplugs all first.
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
        let Region { address, requested, usable, .. } = self.region;
        let (region, plugged) = (self.region.size(), self.region.blocks.save());
        let state = State { address, region, requested, usable, plugged };
        common::save(self, STATE_VERSION, self.active.as_ref(), &[], state)
    }

    fn restore(&mut self, state: &[u8], resources: Resources) -> Result<(), DeviceError> {
        let (active, state): (_, State) = common::restore(self, STATE_VERSION, state, resources)?;
        let invalid = |message: &str| DeviceError::Invalid(format!("saved memory device: {message}"));
        let whole = |bytes: u64| bytes.is_multiple_of(BLOCK);
        if (state.address, state.region) != (self.region.address, self.region.size()) {
            return Err(invalid("its region is another"));
        }
        if !whole(state.requested)
            || !whole(state.usable)
            || state.requested > state.usable
            || state.usable > state.region
        {
            return Err(invalid("its sizes do not fit together"));
        }
        let limit = u32::try_from(state.usable / BLOCK).unwrap_or(0);
        let blocks = Blocks::restore(self.region.blocks.count(), limit, &state.plugged)
            .ok_or_else(|| invalid("its blocks do not fit the region"))?;
        self.region.blocks = blocks;
        self.region.requested = state.requested;
        self.region.usable = state.usable;
        self.active = active;
        // What the driver offered just before it was saved.
        self.wake.request();
        Ok(())
    }
}
