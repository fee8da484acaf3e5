//! From the link to the guest (virtio 1.3, 5.1.6.3 and 5.1.6.4).
//!
//! ```text
//!  avail ring ──gather──▶ held buffers, at least one largest frame ──readv──▶ header + frame
//!                             ▲                                                  │
//!                             └── those that the frame did not reach             ▼
//!                                                  num_buffers, then all of them into the used ring at once
//! ```
//!
//! How long a frame is shows only when it is read, so buffers for the longest one are held ready and the
//! frame is read straight into them. Held buffers count as not popped when the device is saved.

use std::{
    collections::VecDeque,
    os::fd::BorrowedFd,
    sync::atomic::{Ordering, fence},
};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::tap::HEADER;
use crate::{
    devices::virtio::{
        common::TURN,
        device::{DeviceError, GuestMemory, Resources},
        iovec::{Buffer, IoVec, copy_in},
        queue::{Buffers, complete, pop, queue_error},
    },
    rate_limiter::{Direction, RateLimiter},
};

/// Where `num_buffers` lies in the header.
const NUM_BUFFERS: u64 = 10;

/// A popped chain that waits for a frame.
struct Held {
    head: u16,
    buffers: Vec<Buffer>,
    length: u64,
}

/// How frames are laid into buffers, as negotiated.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    /// A frame may span several chains (MRG_RXBUF).
    pub(super) mergeable: bool,
    /// The longest frame that may come, header included.
    pub(super) longest: u64,
}

/// Why receiving has stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stopped {
    /// The link has no frame now.
    NoFrame,
    /// The driver has offered too little; it kicks when it offers more.
    NoBuffer,
    /// The rate limit is reached.
    HeldBack,
    /// It was somebody else's turn.
    TurnOver,
}

/// The receiving half of a device.
#[derive(Default)]
pub(super) struct Receiver {
    held: VecDeque<Held>,
}

impl Receiver {
    /// The number of chains that were popped and not used yet: the queue's last.
    pub(super) fn held(&self) -> u16 {
        u16::try_from(self.held.len()).unwrap_or(u16::MAX)
    }

    /// Moves frames from `link` into the queue until something is wanting.
    ///
    /// # Errors
    /// The queue is corrupt.
    pub(super) fn receive(
        &mut self,
        link: BorrowedFd<'_>,
        limiter: &mut RateLimiter,
        layout: Layout,
        (queue, index): (&mut Queue, usize),
        resources: &Resources,
    ) -> Result<Stopped, DeviceError> {
        let Resources { memory, interrupt } = resources;
        let before = queue.next_used();
        queue.disable_notification(memory).map_err(|error| queue_error(index, &error))?;
        let mut stopped = Stopped::TurnOver;
        for _ in 0..TURN {
            if !self.gather(layout, queue, index, memory)? {
                stopped = Stopped::NoBuffer;
                break;
            }
            // How long a frame is shows only when it is there: it is paid for afterwards.
            if !limiter.admit(Direction::Read) {
                stopped = Stopped::HeldBack;
                break;
            }
            let buffers = self.target(layout);
            let Ok(mut target) = IoVec::new(memory, &buffers, 0, layout.longest) else {
                return Err(queue_error(index, &"a checked buffer has left guest memory"));
            };
            match target.read(link) {
                Ok(length) if length < HEADER as usize => {}
                Ok(length) => {
                    limiter.charge(Direction::Read, (length - HEADER as usize) as u64);
                    self.deliver(length as u64, &buffers, queue, index, memory)?;
                }
                Err(_) => {
                    // Nothing there; or the interface is gone or down, and an event says when that changes.
                    stopped = Stopped::NoFrame;
                    break;
                }
            }
        }
        if wants_interrupt(queue, before, memory).map_err(|error| queue_error(index, &error))? {
            interrupt.used_ring();
        }
        Ok(stopped)
    }

    /// Holds enough for the longest frame. False where the driver has not offered it.
    fn gather(
        &mut self,
        layout: Layout,
        queue: &mut Queue,
        index: usize,
        memory: &GuestMemory,
    ) -> Result<bool, DeviceError> {
        let mut room: u64 = self.held.iter().map(|held| held.length).sum();
        loop {
            // A ring that is too short for the longest frame may well do for those that come.
            let whole_ring = self.held.len() >= usize::from(queue.size());
            if whole_ring || room >= layout.longest || (!layout.mergeable && !self.held.is_empty()) {
                return Ok(true);
            }
            let Some(chain) = pop(queue, index, memory)? else {
                if queue.enable_notification(memory).map_err(|error| queue_error(index, &error))? {
                    continue;
                }
                return Ok(false);
            };
            let head = chain.head_index();
            match Buffers::of(chain) {
                Ok(buffers) if !buffers.writable.is_empty() => {
                    let length = buffers.writable_bytes();
                    room = room.saturating_add(length);
                    self.held.push_back(Held { head, buffers: buffers.writable, length });
                }
                _ => complete(queue, index, memory, head, 0)?,
            }
        }
    }

    fn target(&self, layout: Layout) -> Vec<Buffer> {
        let chains = if layout.mergeable { self.held.len() } else { 1 };
        self.held.iter().take(chains).flat_map(|held| held.buffers.iter().copied()).collect()
    }

    /// Hands over what a frame of `length` bytes, header included, has reached.
    fn deliver(
        &mut self,
        length: u64,
        buffers: &[Buffer],
        queue: &mut Queue,
        index: usize,
        memory: &GuestMemory,
    ) -> Result<(), DeviceError> {
        let mut left = length;
        let mut used = Vec::new();
        while left > 0
            && let Some(held) = self.held.pop_front()
        {
            let written = left.min(held.length);
            left -= written;
            used.push((held.head, u32::try_from(written).unwrap_or(u32::MAX)));
        }
        let count = u16::try_from(used.len()).unwrap_or(u16::MAX);
        if !copy_in(memory, buffers, NUM_BUFFERS, &count.to_le_bytes()) {
            return Err(queue_error(index, &"a checked buffer has left guest memory"));
        }
        publish(queue, &used, memory).map_err(|error| queue_error(index, &error))
    }
}

/// Puts all chains of one frame into the used ring with one step of its index: a driver that polls must never
/// find some of them only.
fn publish(queue: &mut Queue, used: &[(u16, u32)], memory: &GuestMemory) -> Result<(), virtio_queue::Error> {
    let Some(((last, written), others)) = used.split_last() else { return Ok(()) };
    for (head, written) in others {
        if *head >= queue.size() {
            return Err(virtio_queue::Error::InvalidDescriptorIndex);
        }
        let next = queue.next_used();
        let slot = u64::from(next % queue.size()) * 8 + 4;
        let address = queue.used_ring().checked_add(slot).ok_or(virtio_queue::Error::AddressOverflow)?;
        // Little-endian id and length, 32 bits each (2.7.8).
        let element = u64::from(*head) | u64::from(*written) << 32;
        memory
            .write_slice(&element.to_le_bytes(), GuestAddress(address))
            .map_err(virtio_queue::Error::GuestMemory)?;
        queue.set_next_used(next.wrapping_add(1));
    }
    queue.add_used(memory, *last, *written)
}

/// Whether the driver wants to know of what was used since the index was `before` (virtio 1.3, 2.7.7.1).
fn wants_interrupt(queue: &Queue, before: u16, memory: &GuestMemory) -> Result<bool, virtio_queue::Error> {
    let now = queue.next_used();
    if now == before {
        return Ok(false);
    }
    // The used index is written before the driver's wish is read.
    fence(Ordering::SeqCst);
    let read = |offset: u64| {
        let address = queue.avail_ring().checked_add(offset).ok_or(virtio_queue::Error::AddressOverflow)?;
        let value = memory.load::<u16>(GuestAddress(address), Ordering::Relaxed);
        value.map(u16::from_le).map_err(virtio_queue::Error::GuestMemory)
    };
    if queue.event_idx_enabled() {
        let event = read(4 + 2 * u64::from(queue.size()))?;
        Ok(now.wrapping_sub(event).wrapping_sub(1) < now.wrapping_sub(before))
    } else {
        Ok(read(0)? & 1 == 0)
    }
}
