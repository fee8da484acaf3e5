//! A file system device whose server is another process: requests are handed on as they are.
//!
//! ```text
//!            copied into a free slot                    copied from the slot
//!   chain ──────────────────────────▶ share server ──────────────────────────▶ chain, used
//!     └ no slot is free: it stays in its queue until one is        └ put off: the chain waits, the slot does not
//! ```
//!
//! The device keeps a chain's buffers while its slot is away, checked once. A reset forgets the chains; slots that
//! are away then come back, and nothing is done with them. A server that is gone answers nothing: then everything
//! gets ENOTCONN. See [`crate::shares`].

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsRawFd, OwnedFd, RawFd},
};

use bulkhead_vmm_api::share::{Call, Return, SLOT_SIZE, SLOTS};
use rustix::{
    io::Errno,
    net::{RecvFlags, SendFlags},
};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::{
    super::{
        common::{self, Verdict, Wake},
        device::{Activation, DeviceError, DeviceType, GuestMemory, Resources, VirtioDevice},
        iovec::{Buffer, copy_in, copy_out},
        queue::{Buffers, Chain, complete, notify},
    },
    FEATURES, MAX_TAG, QUEUE_SIZES, config_space,
    wire::{InHeader, OutHeader, Wire, encode, opcode},
};
use crate::shares::area::Area;

/// Changes whenever what is saved does.
const VERSION: u32 = 1;

/// The largest error number that Linux knows.
const MAX_ERRNO: i32 = 4095;

const TOKEN_WAKE: u64 = 0;
const TOKEN_CHANNEL: u64 = 1;

/// Why a device gets no server.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// It has one.
    #[error("the device has a server already")]
    Exists,
    /// The channel or the memory is not what it should be.
    #[error("the share server's channel: {0}")]
    Channel(#[from] io::Error),
}

/// The device.
pub struct Forward {
    config: [u8; MAX_TAG + 4],
    link: Option<Link>,
    active: Option<Activation>,
    epoll: Epoll,
    wake: Wake,
}

/// The way to the server.
struct Link {
    /// None once the server is gone.
    channel: Option<OwnedFd>,
    area: Area,
    slots: [Slot; SLOTS as usize],
    /// Those that were put off, by ticket.
    put_off: BTreeMap<u32, Asked>,
    last_ticket: u32,
}

/// A request whose chain the device holds.
struct Asked {
    queue: usize,
    head: u16,
    header: InHeader,
    writable: Vec<Buffer>,
}

/// Where a slot is.
#[derive(Default)]
enum Slot {
    /// Here.
    #[default]
    Free,
    /// With the server, for this chain.
    Away { asked: Asked, ticket: u32 },
    /// With the server, for a chain that a reset has forgotten.
    Orphaned,
}

impl Forward {
    /// A device without a server, mounted in the guest by its tag.
    ///
    /// # Errors
    /// The tag cannot be one, or there is no epoll or eventfd left.
    pub fn new(tag: &str) -> Result<Self, DeviceError> {
        let failed = |context| move |source| DeviceError::Backend { context, source };
        let wake = Wake::new().map_err(failed("making an eventfd"))?;
        let epoll = Epoll::new().map_err(failed("making an epoll"))?;
        let event = EpollEvent::new(EventSet::IN, TOKEN_WAKE);
        epoll.ctl(ControlOperation::Add, wake.as_raw_fd(), event).map_err(failed("EPOLL_CTL_ADD"))?;
        Ok(Self { config: config_space(tag)?, link: None, active: None, epoll, wake })
    }

    /// Gives it its server.
    ///
    /// # Errors
    /// See [`ServerError`].
    pub fn attach(&mut self, channel: OwnedFd, area: OwnedFd) -> Result<(), ServerError> {
        if self.link.is_some() {
            return Err(ServerError::Exists);
        }
        let area = Area::map(area)?;
        let event = EpollEvent::new(EventSet::IN, TOKEN_CHANNEL);
        self.epoll.ctl(ControlOperation::Add, channel.as_raw_fd(), event)?;
        self.link = Some(Link::new(channel, area));
        self.wake.request();
        Ok(())
    }

    /// Hands on what the guest has offered, as far as there are slots.
    fn take(&mut self, queue: usize) -> Result<(), DeviceError> {
        let Some(active) = &mut self.active else { return Ok(()) };
        let mut link = self.link.as_mut();
        common::take_turn(active, queue, common::TURN, &self.wake, |chain, memory| match &mut link {
            Some(link) if link.channel.is_some() => link.hand_on(queue, chain, memory),
            _ => Step::Done(refuse(chain, memory)),
        })
    }

    /// Takes back what the server has done.
    fn take_back(&mut self) -> Result<(), DeviceError> {
        let Some(link) = &mut self.link else { return Ok(()) };
        let mut touched = [false; QUEUE_SIZES.len()];
        let mut datagram = [0; Return::SIZE + 1];
        // More than there are slots is a turn.
        for _ in 0..=SLOTS {
            let Some(channel) = &link.channel else { break };
            let length = match rustix::net::recv(channel, &mut datagram[..], RecvFlags::DONTWAIT) {
                Ok((length, _)) if length > 0 => length,
                Err(Errno::AGAIN | Errno::INTR) => break,
                Ok(_) | Err(_) => {
                    link.lose(&self.epoll, &mut self.active, &mut touched)?;
                    break;
                }
            };
            let Some(back) = datagram.get(..length).and_then(Return::decode) else { continue };
            let Some(active) = &mut self.active else {
                // Nobody waits for it.
                link.forget(back);
                continue;
            };
            let memory = &active.resources.memory;
            let Some((asked, written)) = link.answered(back, memory) else { continue };
            if let Some(ring) = active.queues.get_mut(asked.queue) {
                complete(ring, asked.queue, memory, asked.head, written)?;
            }
            if let Some(touched) = touched.get_mut(asked.queue) {
                *touched = true;
            }
        }
        if let Some(Activation { queues, resources, .. }) = &mut self.active {
            for (index, queue) in queues.iter_mut().enumerate() {
                if touched.get(index) == Some(&true) {
                    notify(queue, index, &resources.memory, &resources.interrupt)?;
                }
            }
        }
        // Slots are free again.
        for queue in 0..QUEUE_SIZES.len() {
            self.take(queue)?;
        }
        Ok(())
    }
}

/// What comes of a chain now.
enum Step {
    /// It is used.
    Done(u32),
    /// It is with the server.
    Away,
    /// It stays in its queue.
    Waits,
}

impl From<Step> for Verdict {
    fn from(step: Step) -> Self {
        match step {
            Step::Done(written) => Self::Used(written),
            Step::Away => Self::Kept,
            Step::Waits => Self::Waits,
        }
    }
}

impl Link {
    fn new(channel: OwnedFd, area: Area) -> Self {
        let (slots, put_off) = (Default::default(), BTreeMap::new());
        Self { channel: Some(channel), area, slots, put_off, last_ticket: 0 }
    }

    /// What a return answers, and how many bytes were written to the guest.
    fn answered(&mut self, back: Return, memory: &GuestMemory) -> Option<(Asked, u32)> {
        match back {
            Return::Done { slot: number, reply } => {
                let slot = self.slots.get_mut(number as usize).map(std::mem::take);
                let Some(Slot::Away { asked, .. }) = slot else { return None };
                let length = (reply as usize).min(SLOT_SIZE);
                let room: u64 = asked.writable.iter().map(|(_, length)| u64::from(*length)).sum();
                let copied = length as u64 <= room
                    && self
                        .area
                        .slot(number)
                        .is_some_and(|slot| slot.copy_to_guest(memory, &asked.writable, length));
                Some((asked, if copied { reply } else { 0 }))
            }
            Return::PutOff { slot } => {
                let slot = self.slots.get_mut(slot as usize).map(std::mem::take);
                if let Some(Slot::Away { asked, ticket }) = slot {
                    self.put_off.insert(ticket, asked);
                }
                None
            }
            Return::Settled { ticket, error } => {
                let asked = self.put_off.remove(&ticket)?;
                let error = i32::try_from(error).unwrap_or(MAX_ERRNO).min(MAX_ERRNO);
                let written = answer_empty(&asked.header, error, memory, &asked.writable);
                Some((asked, written))
            }
        }
    }

    /// What was asked is not waited for any more.
    fn forget(&mut self, back: Return) {
        if let Return::Done { slot, .. } | Return::PutOff { slot } = back
            && let Some(slot) = self.slots.get_mut(slot as usize)
        {
            *slot = Slot::Free;
        }
    }

    /// A number that nobody has who was put off.
    fn ticket(&mut self) -> u32 {
        loop {
            self.last_ticket = self.last_ticket.wrapping_add(1);
            if !self.put_off.contains_key(&self.last_ticket) {
                return self.last_ticket;
            }
        }
    }

    fn hand_on(&mut self, queue: usize, chain: Chain<'_>, memory: &GuestMemory) -> Step {
        let Some(number) = self.slots.iter().position(|slot| matches!(slot, Slot::Free)) else {
            return Step::Waits;
        };
        let head = chain.head_index();
        // A chain that is malformed, or too long for any request, is dropped: zero bytes written.
        let Ok(Buffers { readable, writable }) = Buffers::of(chain) else { return Step::Done(0) };
        let bytes = |buffers: &[Buffer]| buffers.iter().map(|(_, length)| u64::from(*length)).sum::<u64>();
        let request = bytes(&readable);
        let room = u32::try_from(bytes(&writable)).unwrap_or(u32::MAX);
        let number = u32::try_from(number).unwrap_or(u32::MAX);
        let (Some(slot), Ok(length)) = (self.area.slot(number), usize::try_from(request)) else {
            return Step::Done(0);
        };
        if length > SLOT_SIZE || !slot.copy_from_guest(memory, &readable, length) {
            return Step::Done(0);
        }
        // As it was copied: what the guest makes of its memory meanwhile is nothing to go by.
        let mut bytes = [0; InHeader::SIZE];
        let header = if slot.read(0, &mut bytes) { InHeader::take(&mut &bytes[..]) } else { None };
        let Some(header) = header.filter(|_| length >= InHeader::SIZE) else { return Step::Done(0) };
        let request = u32::try_from(length).unwrap_or(u32::MAX);
        let ticket = self.ticket();
        let call = Call { slot: number, request, room, ticket };
        let Some(channel) = &self.channel else { return Step::Waits };
        match rustix::net::send(channel, &call.encode(), SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            // There are fewer slots than any socket holds datagrams; a server that is gone is noticed when it is
            // listened to.
            Err(_) => Step::Waits,
            Ok(_) => {
                if let Some(slot) = self.slots.get_mut(number as usize) {
                    let asked = Asked { queue, head, header, writable };
                    *slot = Slot::Away { asked, ticket };
                }
                Step::Away
            }
        }
    }

    /// The server is gone: whoever waits for it is told.
    fn lose(
        &mut self,
        epoll: &Epoll,
        active: &mut Option<Activation>,
        touched: &mut [bool],
    ) -> Result<(), DeviceError> {
        if let Some(channel) = self.channel.take() {
            let gone = epoll.ctl(ControlOperation::Delete, channel.as_raw_fd(), EpollEvent::default());
            gone.map_err(|source| DeviceError::Backend { context: "EPOLL_CTL_DEL", source })?;
        }
        let away = self.slots.iter_mut().filter_map(|slot| match std::mem::take(slot) {
            Slot::Away { asked, .. } => Some(asked),
            Slot::Free | Slot::Orphaned => None,
        });
        for asked in away.chain(std::mem::take(&mut self.put_off).into_values()) {
            let Some(Activation { queues, resources, .. }) = active else { continue };
            let written = answer_gone(&asked.header, &resources.memory, &asked.writable);
            if let Some(ring) = queues.get_mut(asked.queue) {
                complete(ring, asked.queue, &resources.memory, asked.head, written)?;
            }
            if let Some(touched) = touched.get_mut(asked.queue) {
                *touched = true;
            }
        }
        Ok(())
    }
}

/// The answer to a request that nobody can serve.
fn refuse(chain: Chain<'_>, memory: &GuestMemory) -> u32 {
    let Ok(Buffers { readable, writable }) = Buffers::of(chain) else { return 0 };
    let mut header = [0; InHeader::SIZE];
    if !copy_out(memory, &readable, 0, &mut header) {
        return 0;
    }
    InHeader::take(&mut &header[..]).map_or(0, |header| answer_gone(&header, memory, &writable))
}

fn answer_gone(header: &InHeader, memory: &GuestMemory, writable: &[Buffer]) -> u32 {
    if matches!(header.opcode, opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT) {
        return 0;
    }
    answer_empty(header, Errno::NOTCONN.raw_os_error(), memory, writable)
}

/// Writes a reply without content: an error, or 0.
fn answer_empty(header: &InHeader, error: i32, memory: &GuestMemory, writable: &[Buffer]) -> u32 {
    let len = OutHeader::SIZE as u32;
    let reply = OutHeader { len, error: -error, unique: header.unique };
    if copy_in(memory, writable, 0, &encode(&reply)) { len } else { 0 }
}

impl VirtioDevice for Forward {
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
        common::read_config(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        common::require_queues(&activation)?;
        self.active = Some(activation);
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
        let Some(link) = &mut self.link else { return };
        // When they are settled, nobody has their tickets.
        link.put_off.clear();
        for slot in &mut link.slots {
            if matches!(slot, Slot::Away { .. }) {
                *slot = Slot::Orphaned;
            }
        }
    }

    fn queue_event(&mut self, queue: usize) -> Result<(), DeviceError> {
        self.take(queue)
    }

    fn event_sources(&self) -> Vec<RawFd> {
        vec![self.epoll.as_raw_fd()]
    }

    fn source_event(&mut self, _source: usize) -> Result<(), DeviceError> {
        self.wake.take();
        self.take_back()?;
        for queue in 0..QUEUE_SIZES.len() {
            self.take(queue)?;
        }
        Ok(())
    }

    fn save(&self) -> Result<Vec<u8>, DeviceError> {
        if self.link.is_some() {
            // What its guest knows and has open is another process's.
            return Err(DeviceError::Invalid("a machine with volumes or bind mounts cannot be saved".into()));
        }
        common::save(self, VERSION, self.active.as_ref(), &[], ())
    }

    fn restore(&mut self, state: &[u8], resources: Resources) -> Result<(), DeviceError> {
        let (active, ()) = common::restore(self, VERSION, state, resources)?;
        self.active = active;
        // What the driver offered just before it was saved.
        self.wake.request();
        Ok(())
    }
}
