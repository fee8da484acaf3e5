//! The socket device (virtio 1.3, 5.10), in user space: sockets in the guest meet Unix sockets on the host.
//!
//! ```text
//!   client (daemon)          this device                     guest (agent)
//!   ── CONNECT 1025\n ─────▶  REQUEST  2:p → cid:1025 ─────▶  listen(1025)
//!   ◀─ OK p\n ──────────────  RESPONSE ◀────────────────────  accept
//!
//!   ── LISTEN 1024\n ──────▶  (waits)
//!                             REQUEST  cid:q → 2:1024 ◀─────  connect(2, 1024)
//!   ◀─ OK q\n ──────────────  RESPONSE ────────────────────▶
//!
//!   ◀═ bytes ══════════════▶  RW, CREDIT_UPDATE ◀══════════▶
//!   shutdown(WR) ──────────▶  SHUTDOWN SEND ───────────────▶  read() = 0
//!   read() = 0 ◀────────────  SHUTDOWN SEND ◀───────────────  shutdown(WR)
//!   close() ───────────────▶  RST ─────────────────────────▶
//!   read() = 0 ◀────────────  SHUTDOWN both ◀───────────────  close()
//!                             RST ─────────────────────────▶
//! ```
//!
//! Three queues: rx (to the guest), tx (from the guest), and events. Packets go from guest memory straight
//! into the client's socket and from there straight into guest memory; only what a slow client does not take
//! is buffered, within the credit that the guest was given.
//!
//! `packet` is the wire, `connection` one connection's state, `muxer` all of them, `command` a client's first
//! line; here is what joins them to the queues.
//!
//! A guest that comes from a saved state believes in connections that are gone. It is told by the event
//! TRANSPORT_RESET (`reset`), which also makes it read its context id anew.

use std::{
    io,
    os::{
        fd::{AsRawFd, RawFd},
        unix::net::UnixListener,
    },
};

use muxer::Muxer;
use packet::{HEADER, Header};
use reset::Announcement;
use serde::{Deserialize, Serialize};
use virtio_queue::{QueueOwnedT, QueueT};

use super::{
    common::{self, TURN, Wake},
    device::{
        Activation, DeviceError, DeviceType, Resources, VIRTIO_F_VERSION_1, VIRTIO_RING_F_EVENT_IDX,
        VIRTIO_RING_F_INDIRECT_DESC, VirtioDevice,
    },
    iovec::copy_out,
    queue::{Buffers, complete, notify, pop, queue_error},
};

mod command;
mod connection;
mod muxer;
mod outbox;
mod packet;
mod reset;
#[cfg(test)]
mod tests;

const RX: usize = 0;
const TX: usize = 1;
const EVENTS: usize = 2;
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];
/// VIRTIO_VSOCK_F_STREAM: there are stream sockets (5.10.3).
const F_STREAM: u64 = 1;
const FEATURES: u64 = VIRTIO_F_VERSION_1 | VIRTIO_RING_F_INDIRECT_DESC | VIRTIO_RING_F_EVENT_IDX | F_STREAM;
/// The least context id that a guest can have.
const MIN_CID: u64 = 3;
const STATE_VERSION: u32 = 2;

/// What is saved besides features and queues. Connections are not: they end.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    next_port: u32,
    /// TRANSPORT_RESETs that the guest was told of and has not heard.
    unheard: u16,
}

/// The device.
pub struct Vsock {
    cid: u64,
    muxer: Muxer,
    active: Option<Activation>,
    wake: Wake,
    /// The guest's packets wait until it has fetched RSTs.
    stalled: bool,
    /// Whether the guest knows that the connections of its former life are gone.
    announcement: Announcement,
}

impl Vsock {
    /// A device whose guest has context id `cid`; clients connect to `listener`, as described in
    /// [`bulkhead_vmm_api::vsock`].
    ///
    /// # Errors
    /// `cid` is less than 3, or the listener cannot be watched.
    pub fn new(cid: u64, listener: UnixListener) -> io::Result<Self> {
        if cid < MIN_CID {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a guest's context id is at least 3"));
        }
        let (muxer, wake) = (Muxer::new(cid, listener)?, Wake::new()?);
        muxer.watch(wake.as_raw_fd())?;
        Ok(Self { cid, muxer, active: None, wake, stalled: false, announcement: Announcement::default() })
    }

    /// Takes packets from the guest.
    fn drain_tx(&mut self) -> Result<(), DeviceError> {
        let Some(active) = &mut self.active else { return Ok(()) };
        let Resources { memory, interrupt } = &active.resources;
        let Some(queue) = active.queues.get_mut(TX) else { return Ok(()) };
        queue.disable_notification(memory).map_err(|error| queue_error(TX, &error))?;
        let mut left = TURN;
        loop {
            self.stalled = self.muxer.congested();
            if self.stalled {
                break;
            }
            if left == 0 {
                self.wake.request();
                break;
            }
            let Some(chain) = pop(queue, TX, memory)? else {
                if queue.enable_notification(memory).map_err(|error| queue_error(TX, &error))? {
                    continue;
                }
                break;
            };
            left -= 1;
            let head = chain.head_index();
            let mut header = [0; HEADER];
            // What has no whole header cannot even be refused.
            if let Ok(buffers) = Buffers::of(chain)
                && copy_out(memory, &buffers.readable, 0, &mut header)
            {
                let available = buffers.readable_bytes() - HEADER as u64;
                self.muxer.receive(&Header::parse(&header), available, memory, &buffers.readable);
            }
            complete(queue, TX, memory, head, 0)?;
        }
        if left < TURN {
            notify(queue, TX, memory, interrupt)?;
        }
        Ok(())
    }

    /// Gives the guest its packets, as far as it has buffers for them.
    fn fill_rx(&mut self) -> Result<(), DeviceError> {
        let Some(active) = self.active.as_mut().filter(|_| self.announcement.heard()) else { return Ok(()) };
        let Resources { memory, interrupt } = &active.resources;
        let Some(queue) = active.queues.get_mut(RX) else { return Ok(()) };
        queue.disable_notification(memory).map_err(|error| queue_error(RX, &error))?;
        let mut left = TURN;
        while self.muxer.has_packet() {
            if left == 0 {
                self.wake.request();
                break;
            }
            let Some(chain) = pop(queue, RX, memory)? else {
                if queue.enable_notification(memory).map_err(|error| queue_error(RX, &error))? {
                    continue;
                }
                break;
            };
            left -= 1;
            let head = chain.head_index();
            let written = match Buffers::of(chain) {
                Ok(buffers) if buffers.writable_bytes() > HEADER as u64 => {
                    match self.muxer.next_packet(memory, &buffers.writable) {
                        Some(written) => written,
                        None => {
                            queue.go_to_previous_position();
                            break;
                        }
                    }
                }
                _ => 0,
            };
            complete(queue, RX, memory, head, written)?;
        }
        if left < TURN {
            notify(queue, RX, memory, interrupt)?;
        }
        Ok(())
    }

    /// Tells the guest that its connections are gone, if it does not know yet.
    fn tell_reset(&mut self) -> Result<(), DeviceError> {
        let Some(active) = &mut self.active else { return Ok(()) };
        let Resources { memory, interrupt } = &active.resources;
        match active.queues.get_mut(EVENTS) {
            Some(queue) => self.announcement.advance(queue, memory, interrupt),
            None => Ok(()),
        }
    }

    /// Moves packets both ways. What the guest sends may be answered at once, and fetching the answers may
    /// let it send more.
    fn exchange(&mut self, tx_too: bool) -> Result<(), DeviceError> {
        if tx_too {
            self.drain_tx()?;
        }
        self.fill_rx()?;
        if self.stalled && !self.muxer.congested() {
            self.wake.request();
        }
        Ok(())
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> DeviceType {
        DeviceType::Vsock
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        common::read_config(&self.cid.to_le_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        common::require_queues(&activation)?;
        self.active = Some(activation);
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
        self.stalled = false;
        self.announcement = Announcement::default();
        self.muxer.disconnect_all();
    }

    fn queue_event(&mut self, queue: usize) -> Result<(), DeviceError> {
        match queue {
            EVENTS => {
                self.tell_reset()?;
                self.exchange(true)
            }
            TX => self.exchange(true),
            _ => self.exchange(false),
        }
    }

    fn event_sources(&self) -> Vec<RawFd> {
        vec![self.muxer.epoll_fd()]
    }

    fn source_event(&mut self, _source: usize) -> Result<(), DeviceError> {
        let polled = self.muxer.poll(self.active.is_some());
        let woken = polled.map_err(|source| DeviceError::Backend { context: "epoll", source })?;
        if woken {
            self.wake.take();
            self.tell_reset()?;
        }
        self.exchange(woken)
    }

    fn save(&self) -> Result<Vec<u8>, DeviceError> {
        let events = self.active.as_ref().and_then(|active| Some((active.queues.get(EVENTS)?, active)));
        let unheard = events
            .map(|(queue, active)| self.announcement.unheard(queue, &active.resources.memory))
            .transpose()?;
        let state = State { next_port: self.muxer.next_port(), unheard: unheard.unwrap_or(0) };
        common::save(self, STATE_VERSION, self.active.as_ref(), &[], state)
    }

    fn restore(&mut self, state: &[u8], resources: Resources) -> Result<(), DeviceError> {
        let memory = resources.memory.clone();
        let (active, State { next_port, unheard }) = common::restore(self, STATE_VERSION, state, resources)?;
        self.muxer.disconnect_all();
        self.muxer.set_next_port(next_port);
        let events = active.as_ref().and_then(|active| active.queues.get(EVENTS));
        self.announcement = Announcement::due(events, unheard, &memory)?;
        self.active = active;
        // The event, and what the driver offered just before it was saved.
        self.wake.request();
        Ok(())
    }
}
