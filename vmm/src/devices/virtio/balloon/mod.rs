//! The memory balloon (virtio 1.3, 5.5): the guest hands memory to the host.
//!
//! ```text
//!   inflate   guest ─ page numbers ──────────▶ released; the guest does not use them until it deflates
//!   deflate   guest ─ page numbers ──────────▶ nothing to do: a page that is touched is there again
//!   stats     guest ─ figures ───────────────▶ kept; the buffer is returned to ask for newer ones
//!   reporting guest ─ ranges it has free ────▶ released, then returned: the guest may use them at once
//! ```
//!
//! *Reporting* needs no word from the host: two seconds after memory became free in large pieces, Linux
//! reports it, and so what a workload frees is the host's again. *Inflating* is on request: `num_pages` says
//! how many pages the host would like, `actual` how many the guest says it has given. A guest that runs out of
//! memory takes pages back by itself (`DEFLATE_ON_OOM`).
//!
//! What a driver may do to the host is to have pages of its own memory dropped; see
//! [`release`](super::release).

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
};

use bulkhead_vmm_api::GuestMemoryFigures;
use serde::{Deserialize, Serialize};
use virtio_queue::QueueT;
use vm_memory::GuestAddress;

use super::{
    common::{self, TURN, Wake},
    device::{
        Activation, DeviceError, DeviceType, GuestMemory, Resources, VIRTIO_F_VERSION_1,
        VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VirtioDevice,
    },
    iovec::copy_out,
    queue::{Buffers, Chain, complete, notify, pop, queue_error},
    release::release,
};

mod pages;
mod stats;
#[cfg(test)]
mod tests;

/// VIRTIO_BALLOON_F_STATS_VQ: there is a queue for statistics.
const F_STATS_VQ: u64 = 1 << 1;
/// VIRTIO_BALLOON_F_DEFLATE_ON_OOM: the guest may take pages back by itself when it runs out of memory.
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
/// VIRTIO_BALLOON_F_REPORTING: there is a queue for free pages.
const F_REPORTING: u64 = 1 << 5;
const FEATURES: u64 = VIRTIO_F_VERSION_1
    | VIRTIO_RING_F_INDIRECT_DESC
    | VIRTIO_RING_F_EVENT_IDX
    | F_STATS_VQ
    | F_DEFLATE_ON_OOM
    | F_REPORTING;

const QUEUE_SIZES: [u16; 4] = [64, 64, 16, 64];
/// Offset and length of `actual`, the one field that the driver writes.
const ACTUAL: (u64, usize) = (4, 4);
const STATE_VERSION: u32 = 1;

/// What a queue is for. Those of features that the driver did not accept have no number (5.5.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Stats,
    Reporting,
}

/// The roles of the queues, in order, with these features negotiated.
fn roles(features: u64) -> impl Iterator<Item = Role> {
    let stats = (features & F_STATS_VQ != 0).then_some(Role::Stats);
    let reporting = (features & F_REPORTING != 0).then_some(Role::Reporting);
    [Role::Inflate, Role::Deflate].into_iter().chain(stats).chain(reporting)
}

/// What is saved besides features and queues.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
struct State {
    target: u32,
    actual: u32,
}

/// The device.
pub struct Balloon {
    state: State,
    /// Bytes given back to the host so far.
    returned: u64,
    figures: Option<GuestMemoryFigures>,
    /// The statistics' buffer, kept until newer ones are wanted.
    stats_buffer: Option<u16>,
    active: Option<Activation>,
    wake: Wake,
}

impl Balloon {
    /// An empty balloon.
    ///
    /// # Errors
    /// No eventfd could be made.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            state: State::default(),
            returned: 0,
            figures: None,
            stats_buffer: None,
            active: None,
            wake: Wake::new()?,
        })
    }

    /// Asks the guest for `pages` pages of 4 KiB in all.
    pub fn set_target(&mut self, pages: u32) {
        if self.state.target != pages {
            self.state.target = pages;
            if let Some(interrupt) = common::interrupt(self.active.as_ref()) {
                interrupt.config_changed();
            }
        }
    }

    /// How many pages it was asked for.
    #[must_use]
    pub fn target(&self) -> u32 {
        self.state.target
    }

    /// How many pages it says are in the balloon.
    #[must_use]
    pub fn actual(&self) -> u32 {
        self.state.actual
    }

    /// Bytes given back to the host so far.
    #[must_use]
    pub fn returned(&self) -> u64 {
        self.returned
    }

    /// The guest's last figures; asks it for new ones.
    ///
    /// # Errors
    /// The queue is corrupt.
    pub fn figures(&mut self) -> Result<Option<GuestMemoryFigures>, DeviceError> {
        if let (Some(head), Some(active)) = (self.stats_buffer.take(), &mut self.active)
            && let Some(index) = roles(active.features).position(|role| role == Role::Stats)
            && let Some(queue) = active.queues.get_mut(index)
        {
            let Resources { memory, interrupt } = &active.resources;
            complete(queue, index, memory, head, 0)?;
            notify(queue, index, memory, interrupt)?;
        }
        Ok(self.figures)
    }

    fn serve(&mut self, index: usize) -> Result<(), DeviceError> {
        let Self { active: Some(active), returned, wake, .. } = self else { return Ok(()) };
        let role = roles(active.features).nth(index);
        match role {
            Some(Role::Inflate) => common::take_turn(active, index, TURN, wake, |chain, memory| {
                *returned += inflate(chain, memory);
                0
            }),
            Some(Role::Reporting) => common::take_turn(active, index, TURN, wake, |chain, memory| {
                *returned += report(chain, memory);
                0
            }),
            // The pages are there again as soon as they are touched.
            Some(Role::Deflate) => common::take_turn(active, index, TURN, wake, |_, _| 0),
            Some(Role::Stats) => self.take_figures(index),
            None => Ok(()),
        }
    }

    /// Reads the newest statistics and keeps their buffer; every older one is returned.
    fn take_figures(&mut self, index: usize) -> Result<(), DeviceError> {
        let Some(Activation { queues, resources, .. }) = &mut self.active else { return Ok(()) };
        let Resources { memory, interrupt } = &*resources;
        let Some(queue) = queues.get_mut(index) else { return Ok(()) };
        let mut left = queue.size();
        loop {
            queue.disable_notification(memory).map_err(|error| queue_error(index, &error))?;
            while left > 0
                && let Some(chain) = pop(queue, index, memory)?
            {
                left -= 1;
                let head = chain.head_index();
                match stats::read(chain, memory) {
                    Some(figures) => {
                        self.figures = Some(figures);
                        if let Some(older) = self.stats_buffer.replace(head) {
                            complete(queue, index, memory, older, 0)?;
                        }
                    }
                    None => complete(queue, index, memory, head, 0)?,
                }
            }
            if left == 0 {
                self.wake.request();
                break;
            }
            if !queue.enable_notification(memory).map_err(|error| queue_error(index, &error))? {
                break;
            }
        }
        notify(queue, index, memory, interrupt)
    }
}

/// Gives back the pages that a request names, and says how many bytes they were.
fn inflate(chain: Chain<'_>, memory: &GuestMemory) -> u64 {
    let Ok(buffers) = Buffers::of(chain) else { return 0 };
    let length = usize::try_from(buffers.readable_bytes()).unwrap_or(usize::MAX).min(pages::MAX_REQUEST);
    let mut bytes = vec![0; length];
    if !copy_out(memory, &buffers.readable, 0, &mut bytes) {
        return 0;
    }
    pages::runs(&bytes).into_iter().map(|run| release(memory, GuestAddress(run.start), run.length())).sum()
}

/// Gives back the ranges that a request consists of, and says how many bytes they were.
fn report(chain: Chain<'_>, memory: &GuestMemory) -> u64 {
    let Ok(buffers) = Buffers::of(chain) else { return 0 };
    buffers.writable.iter().map(|(start, length)| release(memory, *start, u64::from(*length))).sum()
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> DeviceType {
        DeviceType::Balloon
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn required_queues(&self, features: u64) -> usize {
        roles(features).count()
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut space = [0; 8];
        space[..4].copy_from_slice(&self.state.target.to_le_bytes());
        space[4..].copy_from_slice(&self.state.actual.to_le_bytes());
        common::read_config(&space, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if (offset, data.len()) == ACTUAL
            && let Ok(bytes) = data.try_into()
        {
            self.state.actual = u32::from_le_bytes(bytes);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        common::require_first_queues(&activation, self.required_queues(activation.features))?;
        self.active = Some(activation);
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
        self.stats_buffer = None;
        self.figures = None;
        // The driver's pages are its own again.
        self.state.actual = 0;
    }

    fn queue_event(&mut self, queue: usize) -> Result<(), DeviceError> {
        self.serve(queue)
    }

    fn event_sources(&self) -> Vec<RawFd> {
        vec![self.wake.as_raw_fd()]
    }

    fn source_event(&mut self, _source: usize) -> Result<(), DeviceError> {
        self.wake.take();
        (0..QUEUE_SIZES.len()).try_for_each(|queue| self.serve(queue))
    }

    fn save(&self) -> Result<Vec<u8>, DeviceError> {
        let mut returned = [0; QUEUE_SIZES.len()];
        let features = self.active.as_ref().map_or(0, |active| active.features);
        for (count, role) in returned.iter_mut().zip(roles(features)) {
            *count = u16::from(role == Role::Stats && self.stats_buffer.is_some());
        }
        common::save(self, STATE_VERSION, self.active.as_ref(), &returned, self.state)
    }

    fn restore(&mut self, state: &[u8], resources: Resources) -> Result<(), DeviceError> {
        let (active, state) = common::restore(self, STATE_VERSION, state, resources)?;
        self.state = state;
        self.stats_buffer = None;
        self.active = active;
        // What the driver offered just before it was saved.
        self.wake.request();
        Ok(())
    }
}
