//! Telling a restored guest that its connections are gone (virtio 1.3, 5.10.6.7).
//!
//! ```text
//!   restored ─▶ due ── an event is put into the guest's buffer ─▶ told ── the guest offers that buffer anew ─▶ heard
//! ```
//!
//! A guest that hears of it closes every socket that is connected *then*. So no packet may reach it before: a
//! connection that it accepted in between would be among them, and it would not even say so. Linux works on
//! its event queue and on the others in any order; but it offers an event's buffer again only when it is
//! done with the event, and that can be seen.

use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueT};

use super::EVENTS;
use crate::devices::virtio::{
    device::{DeviceError, GuestMemory, Interrupt},
    iovec::copy_in,
    queue::{Buffers, complete, notify, pop, queue_error},
};

/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET, as a little-endian u32.
const TRANSPORT_RESET: [u8; 4] = [0; 4];

/// How far the guest has been told.
#[derive(Debug, Default)]
pub(super) struct Announcement {
    /// It is to be told.
    due: bool,
    /// It has heard of all that it was told when the event queue's available index is here.
    heard_at: Option<u16>,
}

impl Announcement {
    /// For a guest that is restored while it had not heard of `unheard` earlier ones.
    pub(super) fn due(
        queue: Option<&Queue>,
        unheard: u16,
        memory: &GuestMemory,
    ) -> Result<Self, DeviceError> {
        let Some(queue) = queue else { return Ok(Self::default()) };
        let available = available(queue, memory)?;
        Ok(Self { due: true, heard_at: (unheard > 0).then(|| available.wrapping_add(unheard)) })
    }

    /// Whether the guest has heard of everything, and may be sent packets.
    pub(super) fn heard(&self) -> bool {
        !self.due && self.heard_at.is_none()
    }

    /// How many announcements it was told of and has not heard.
    pub(super) fn unheard(&self, queue: &Queue, memory: &GuestMemory) -> Result<u16, DeviceError> {
        match self.heard_at {
            None => Ok(0),
            Some(at) => Ok(remaining(at, available(queue, memory)?)),
        }
    }

    /// Tells the guest, if it is to be told and has a buffer for that, and looks whether it has heard.
    ///
    /// # Errors
    /// The queue is corrupt.
    pub(super) fn advance(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemory,
        interrupt: &Interrupt,
    ) -> Result<(), DeviceError> {
        // Never more than the queue holds, so that a driver that offers useless buffers cannot hold us up.
        for _ in 0..queue.size() {
            if !self.due {
                break;
            }
            let Some(chain) = pop(queue, EVENTS, memory)? else {
                if queue.enable_notification(memory).map_err(|error| queue_error(EVENTS, &error))? {
                    continue;
                }
                return Ok(());
            };
            let head = chain.head_index();
            let told = Buffers::of(chain)
                .is_ok_and(|buffers| copy_in(memory, &buffers.writable, 0, &TRANSPORT_RESET));
            if told {
                self.due = false;
                let before = self.heard_at.map_or_else(|| available(queue, memory), Ok)?;
                self.heard_at = Some(before.wrapping_add(1));
            }
            complete(queue, EVENTS, memory, head, if told { TRANSPORT_RESET.len() as u32 } else { 0 })?;
            notify(queue, EVENTS, memory, interrupt)?;
        }
        self.listen(queue, memory)
    }

    /// Looks whether the guest has heard, and has it kick when it does.
    fn listen(&mut self, queue: &mut Queue, memory: &GuestMemory) -> Result<(), DeviceError> {
        let Some(at) = self.heard_at else { return Ok(()) };
        if remaining(at, available(queue, memory)?) > 0 {
            // The kick is wanted for the buffer that comes there, not for the next that we would take.
            let next = queue.next_avail();
            queue.set_next_avail(at.wrapping_sub(1));
            let asked = queue.enable_notification(memory);
            queue.set_next_avail(next);
            asked.map_err(|error| queue_error(EVENTS, &error))?;
        }
        // Once more: it may have come before it knew that a kick is wanted.
        if remaining(at, available(queue, memory)?) == 0 {
            self.heard_at = None;
        }
        Ok(())
    }
}

/// The queue's available index.
fn available(queue: &Queue, memory: &GuestMemory) -> Result<u16, DeviceError> {
    let index = queue.avail_idx(memory, Ordering::Acquire);
    index.map(|index| index.0).map_err(|error| queue_error(EVENTS, &error))
}

/// How far an index is from where it is waited for; 0 from there on.
fn remaining(at: u16, index: u16) -> u16 {
    let distance = at.wrapping_sub(index);
    if distance < 1 << 15 { distance } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn indices_wrap() {
        assert_eq!(remaining(5, 3), 2);
        assert_eq!(remaining(5, 5), 0);
        assert_eq!(remaining(5, 9), 0);
        assert_eq!(remaining(1, u16::MAX), 2);
        assert_eq!(remaining(u16::MAX, 1), 0);
    }
}
