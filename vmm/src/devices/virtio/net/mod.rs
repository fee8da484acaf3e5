//! The network device (virtio 1.3, 5.1) over a tap.
//!
//! ```text
//!            readv straight into rx buffers            guest memory straight to writev
//!   tap ────────────────▶ queue 0 (rx)        queue 1 (tx) ────────────────▶ tap
//! ```
//!
//! Every frame has a `virtio_net_hdr_v1` before it on both sides, so checksums and segmentation are the host
//! kernel's work: it checks the headers that the guest writes.
//!
//! ```text
//!   empty ──attach──▶ link up ──detach──▶ link down ──driver resets──▶ empty
//!     no device          ▲                    │
//!                        └──────attach────────┘
//! ```
//! The tap comes when it comes, and with it who the device is: its address and its MTU. Until then there is
//! no device. While the link is down, what the guest sends is dropped.
//!
//! The device watches the tap, edge-triggered, through an epoll of its own, since a tap can come after the
//! worker has asked for the event sources, and since a tap with frames and a guest without buffers must not
//! keep the worker running.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd, RawFd},
};

use bulkhead_vmm_api::{RateLimits, Traffic};
use serde::{Deserialize, Serialize};
use tap::{HEADER, Link, Offloads, Tap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::{
    common::{self, TURN, Verdict, Wake},
    device::{
        Activation, DeviceError, DeviceType, GuestMemory, Resources, VIRTIO_F_VERSION_1,
        VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VirtioDevice,
    },
    iovec::IoVec,
    queue::{Buffers, Chain},
};
use crate::rate_limiter::{Direction, RateLimiter};
use receive::{Layout, Receiver, Stopped};

mod receive;
mod tap;
#[cfg(test)]
mod tests;

pub use tap::AttachError;

/// Feature bits (virtio 1.3, 5.1.3).
pub mod feature {
    /// The device takes frames with partial checksums.
    pub const CSUM: u64 = 1 << 0;
    /// The driver takes frames with partial checksums.
    pub const GUEST_CSUM: u64 = 1 << 1;
    /// The device tells an MTU.
    pub const MTU: u64 = 1 << 3;
    /// The device tells a MAC address.
    pub const MAC: u64 = 1 << 5;
    /// The driver takes TSOv4.
    pub const GUEST_TSO4: u64 = 1 << 7;
    /// The driver takes TSOv6.
    pub const GUEST_TSO6: u64 = 1 << 8;
    /// The device takes TSOv4.
    pub const HOST_TSO4: u64 = 1 << 11;
    /// The device takes TSOv6.
    pub const HOST_TSO6: u64 = 1 << 12;
    /// A received frame may span several buffers.
    pub const MRG_RXBUF: u64 = 1 << 15;
    /// The device tells the link's state.
    pub const STATUS: u64 = 1 << 16;
}

const RX: usize = 0;
const TX: usize = 1;
const QUEUE_SIZES: [u16; 2] = [256, 256];
const FEATURES: u64 = VIRTIO_F_VERSION_1
    | VIRTIO_RING_F_INDIRECT_DESC
    | VIRTIO_RING_F_EVENT_IDX
    | feature::CSUM
    | feature::GUEST_CSUM
    | feature::MTU
    | feature::MAC
    | feature::GUEST_TSO4
    | feature::GUEST_TSO6
    | feature::HOST_TSO4
    | feature::HOST_TSO6
    | feature::MRG_RXBUF
    | feature::STATUS;
/// Ethernet header and one VLAN tag.
const ETHERNET: u64 = 14 + 4;
/// The longest frame with segmentation left to its receiver, header included.
const LONGEST: u64 = HEADER as u64 + ETHERNET + 65_535;
/// The least MTU that may be told (5.1.4.1).
const MIN_MTU: u16 = 68;
const LINK_UP: u16 = 1;
const CONFIG_BYTES: usize = 12;
const STATE_VERSION: u32 = 2;

/// Tokens in the device's epoll.
const TOKEN_WAKE: u64 = 0;
const TOKEN_LINK: u64 = 1;
const TOKEN_LIMITER: u64 = 2;

/// What the guest sees of a device besides its link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetIdentity {
    /// A unicast MAC address.
    pub mac: [u8; 6],
    /// At least 68.
    pub mtu: u16,
}

impl NetIdentity {
    fn is_valid(self) -> bool {
        self.mac[0] & 1 == 0 && self.mac != [0; 6] && self.mtu >= MIN_MTU
    }
}

/// The device.
pub struct Net {
    /// None: the slot is empty.
    identity: Option<NetIdentity>,
    link: Option<Box<dyn Link>>,
    /// The link may have frames: an edge was seen, and no read has found it empty since.
    readable: bool,
    receiver: Receiver,
    active: Option<Activation>,
    epoll: Epoll,
    wake: Wake,
    limiter: RateLimiter,
}

impl Net {
    /// An empty slot.
    ///
    /// # Errors
    /// No epoll, eventfd or timer could be made.
    pub fn new() -> io::Result<Self> {
        let (epoll, wake, limiter) = (Epoll::new()?, Wake::new()?, RateLimiter::new()?);
        for (fd, token) in [(wake.as_raw_fd(), TOKEN_WAKE), (limiter.as_raw_fd(), TOKEN_LIMITER)] {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, token))?;
        }
        Ok(Self {
            identity: None,
            link: None,
            readable: false,
            receiver: Receiver::default(),
            active: None,
            epoll,
            wake,
            limiter,
        })
    }

    /// Gives the slot its tap. A driver that has the device already sees the link come up.
    ///
    /// # Errors
    /// The slot has one, or this is not a tap opened with `IFF_NO_PI | IFF_VNET_HDR`, or the identity is not
    /// valid, or the kernel refused to set it up. The slot is as it was.
    pub fn attach(&mut self, tap: OwnedFd, identity: NetIdentity) -> Result<(), AttachError> {
        if self.link.is_some() {
            return Err(AttachError::Occupied);
        }
        self.attach_link(Box::new(Tap::new(tap)?), identity)
    }

    /// Gives the slot a socket for a link, each datagram of it a header with its frame.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn attach_socket(
        &mut self,
        socket: std::os::unix::net::UnixDatagram,
        identity: NetIdentity,
    ) -> Result<(), AttachError> {
        self.attach_link(Box::new(tap::Cable(socket)), identity)
    }

    fn attach_link(&mut self, mut link: Box<dyn Link>, identity: NetIdentity) -> Result<(), AttachError> {
        if !identity.is_valid() {
            return Err(AttachError::Identity);
        }
        let setup = |context| move |source| AttachError::Setup { context, source };
        if let Some(active) = &self.active {
            link.set_offloads(offloads(active.features)).map_err(setup("TUNSETOFFLOAD"))?;
        }
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, TOKEN_LINK);
        let fd = link.as_fd().as_raw_fd();
        self.epoll.ctl(ControlOperation::Add, fd, event).map_err(setup("EPOLL_CTL_ADD"))?;
        self.identity = Some(identity);
        self.link = Some(link);
        self.readable = true;
        self.link_changed();
        Ok(())
    }

    /// Takes the tap away; whether there was one.
    pub fn detach(&mut self) -> bool {
        let Some(link) = self.link.take() else { return false };
        // It is closed below, and with that leaves the set in any case.
        let fd = link.as_fd().as_raw_fd();
        let _ = self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
        self.readable = false;
        self.vacate();
        self.link_changed();
        true
    }

    /// A device with neither link nor driver is none.
    fn vacate(&mut self) {
        if self.link.is_none() && self.active.is_none() {
            self.identity = None;
        }
    }

    fn mtu(&self) -> u16 {
        self.identity.map_or(0, |identity| identity.mtu)
    }

    /// Limits it from now on.
    pub fn limit(&mut self, limits: RateLimits) {
        self.limiter.set(limits);
        self.wake.request();
    }

    /// The link may be another than the driver knows.
    fn link_changed(&self) {
        if let Some(interrupt) = common::interrupt(self.active.as_ref()) {
            interrupt.config_changed();
        }
        self.wake.request();
    }

    /// `struct virtio_net_config` (5.1.4).
    fn config(&self) -> [u8; CONFIG_BYTES] {
        let mut config = [0; CONFIG_BYTES];
        let mut put =
            |offset: usize, bytes: &[u8]| config[offset..offset + bytes.len()].copy_from_slice(bytes);
        put(0, &self.identity.map_or([0; 6], |identity| identity.mac));
        put(6, &self.link.as_ref().map_or(0, |_| LINK_UP).to_le_bytes());
        put(8, &1u16.to_le_bytes());
        put(10, &self.mtu().to_le_bytes());
        config
    }

    /// Moves frames to the guest while there are both frames and buffers.
    fn receive(&mut self) -> Result<(), DeviceError> {
        let mtu = self.mtu();
        let (Some(active), Some(link)) = (&mut self.active, &self.link) else { return Ok(()) };
        if !self.readable {
            return Ok(());
        }
        let layout = layout(active.features, mtu);
        let Activation { queues, resources, .. } = active;
        let Some(queue) = queues.get_mut(RX) else { return Ok(()) };
        let limiter = &mut self.limiter;
        match self.receiver.receive(link.as_fd(), limiter, layout, (queue, RX), resources)? {
            Stopped::NoFrame => self.readable = false,
            Stopped::NoBuffer => {}
            Stopped::HeldBack => self.limiter.arm(),
            Stopped::TurnOver => self.wake.request(),
        }
        Ok(())
    }

    /// Sends what the guest has offered.
    fn transmit(&mut self) -> Result<(), DeviceError> {
        let Some(active) = &mut self.active else { return Ok(()) };
        let link = self.link.as_deref();
        let limiter = &mut self.limiter;
        let sent = common::take_turn(active, TX, TURN, &self.wake, |chain, memory| {
            // What is dropped needs no limit.
            let Some(link) = link else { return Verdict::Used(0) };
            if !limiter.admit(Direction::Write) {
                return Verdict::Waits;
            }
            if let Some(length) = send(chain, memory, link) {
                limiter.charge(Direction::Write, length);
            }
            Verdict::Used(0)
        });
        self.limiter.arm();
        sent
    }
}

/// Sends one frame. What is malformed, or refused or not taken now by the link, is dropped as on any wire. Gives
/// the length of what was handed to the link, without the header.
fn send(chain: Chain<'_>, memory: &GuestMemory, link: &dyn Link) -> Option<u64> {
    let buffers = Buffers::of(chain).ok()?;
    let length = buffers.readable_bytes();
    if length <= u64::from(HEADER) || length > LONGEST {
        return None;
    }
    let mut frame = IoVec::new(memory, &buffers.readable, 0, length).ok()?;
    if frame.exceeds_one_call() {
        return None;
    }
    let _ = frame.write(link.as_fd());
    Some(length - u64::from(HEADER))
}

fn offloads(features: u64) -> Offloads {
    Offloads {
        checksum: features & feature::GUEST_CSUM != 0,
        tso4: features & feature::GUEST_TSO4 != 0,
        tso6: features & feature::GUEST_TSO6 != 0,
    }
}

fn layout(features: u64, mtu: u16) -> Layout {
    let Offloads { tso4, tso6, .. } = offloads(features);
    let longest =
        if tso4 || tso6 { LONGEST } else { u64::from(HEADER) + ETHERNET + u64::from(mtu.max(1500)) };
    Layout { mergeable: features & feature::MRG_RXBUF != 0, longest }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> DeviceType {
        DeviceType::Net
    }

    fn present(&self) -> bool {
        self.identity.is_some()
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
        if let Some(link) = &mut self.link {
            let set = link.set_offloads(offloads(activation.features));
            set.map_err(|source| DeviceError::Backend { context: "TUNSETOFFLOAD", source })?;
        }
        self.active = Some(activation);
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
        self.receiver = Receiver::default();
        self.vacate();
        self.limiter.reset();
    }

    fn queue_event(&mut self, queue: usize) -> Result<(), DeviceError> {
        if queue == TX { self.transmit() } else { self.receive() }
    }

    fn event_sources(&self) -> Vec<RawFd> {
        vec![self.epoll.as_raw_fd()]
    }

    fn source_event(&mut self, _source: usize) -> Result<(), DeviceError> {
        let mut events = [EpollEvent::default(); 3];
        let count = match self.epoll.wait(0, &mut events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(()),
            Err(source) => return Err(DeviceError::Backend { context: "epoll", source }),
            Ok(count) => count,
        };
        for event in events.iter().take(count) {
            match event.data() {
                TOKEN_LINK => self.readable = true,
                TOKEN_LIMITER => {
                    self.limiter.take();
                    self.transmit()?;
                }
                _ => {
                    self.wake.take();
                    self.transmit()?;
                }
            }
        }
        self.receive()
    }

    fn traffic(&self) -> Option<[Traffic; 2]> {
        Some(self.limiter.traffic())
    }

    fn save(&self) -> Result<Vec<u8>, DeviceError> {
        common::save(self, STATE_VERSION, self.active.as_ref(), &[self.receiver.held()], self.identity)
    }

    fn restore(&mut self, state: &[u8], resources: Resources) -> Result<(), DeviceError> {
        let (active, identity): (_, Option<NetIdentity>) =
            common::restore(self, STATE_VERSION, state, resources)?;
        if identity.is_some_and(|identity| !identity.is_valid()) || (active.is_some() && identity.is_none()) {
            return Err(DeviceError::Invalid("saved state: not a device's address or MTU".to_owned()));
        }
        if let (Some(link), Some(active)) = (&mut self.link, &active) {
            let set = link.set_offloads(offloads(active.features));
            set.map_err(|source| DeviceError::Backend { context: "TUNSETOFFLOAD", source })?;
        }
        self.receiver = Receiver::default();
        self.active = active;
        // A tap that came first has brought the device's new address.
        self.identity = self.identity.or(identity);
        self.link_changed();
        Ok(())
    }
}
