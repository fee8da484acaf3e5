//! Devices and rings, with nothing that keeps anybody from misusing them.

use crate::{
    cpu,
    memory::{self, BUFFERS, RING_SPACING, RINGS, WINDOWS},
};

/// Register offsets (virtio 1.3, table 4.1).
#[allow(missing_docs, reason = "the standard's own names")]
pub mod register {
    pub const MAGIC: u64 = 0x000;
    pub const DEVICE_ID: u64 = 0x008;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub const QUEUE_SEL: u64 = 0x030;
    pub const QUEUE_SIZE_MAX: u64 = 0x034;
    pub const QUEUE_SIZE: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_ACK: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESC: u64 = 0x080;
    pub const QUEUE_DRIVER: u64 = 0x090;
    pub const QUEUE_DEVICE: u64 = 0x0a0;
    pub const CONFIG_GENERATION: u64 = 0x0fc;
    pub const CONFIG: u64 = 0x100;
}

/// Status bits.
#[allow(missing_docs, reason = "the standard's own names")]
pub mod status {
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
}

/// VIRTIO_F_VERSION_1.
pub const VERSION_1: u64 = 1 << 32;
/// VIRTIO_RING_F_INDIRECT_DESC.
pub const INDIRECT_DESC: u64 = 1 << 28;
/// VIRTIO_RING_F_EVENT_IDX.
pub const EVENT_IDX: u64 = 1 << 29;

const MAGIC: u32 = 0x7472_6976;
/// The most devices that a machine has.
const MOST: usize = 19;
/// The most queues that a device has.
pub const MOST_QUEUES: usize = 4;

/// What a device is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Device id 1.
    Net,
    /// Device id 2.
    Block,
    /// Device id 4.
    Rng,
    /// Device id 5.
    Balloon,
    /// Device id 19.
    Vsock,
    /// Device id 24.
    Mem,
    /// Device id 26.
    Fs,
    /// Any other.
    Other,
}

impl Kind {
    fn of(id: u32) -> Self {
        match id {
            1 => Self::Net,
            2 => Self::Block,
            4 => Self::Rng,
            5 => Self::Balloon,
            19 => Self::Vsock,
            24 => Self::Mem,
            26 => Self::Fs,
            _ => Self::Other,
        }
    }
}

/// A device's window.
#[derive(Debug, Clone, Copy)]
pub struct Device {
    /// Its first address.
    pub base: u64,
    /// Its number on the bus.
    pub index: u64,
    /// What it is.
    pub kind: Kind,
}

/// All devices that there are.
pub struct Machine {
    /// The end of memory below the device gap.
    pub memory_end: u64,
    devices: [Option<Device>; MOST],
}

impl Machine {
    /// Looks into every window.
    #[must_use]
    pub fn probe(memory_end: u64) -> Self {
        let mut devices = [None; MOST];
        for (index, slot) in (0..).zip(&mut devices) {
            let device = Device { base: WINDOWS + index * 0x1000, index, kind: Kind::Other };
            if device.read(register::MAGIC) == MAGIC {
                *slot = Some(Device { kind: Kind::of(device.read(register::DEVICE_ID)), ..device });
            }
        }
        Self { memory_end, devices }
    }

    /// Waits for the disk, which is what the test attaches last.
    pub fn wait_until_attached(&self) {
        for device in self.devices().filter(|device| device.kind == Kind::Block) {
            while device.read(register::CONFIG) == 0 {
                cpu::relax();
            }
        }
    }

    /// Every device.
    pub fn devices(&self) -> impl Iterator<Item = Device> {
        self.devices.iter().filter_map(|device| *device)
    }

    /// The first device of a kind.
    #[must_use]
    pub fn find(&self, kind: Kind) -> Device {
        match self.devices().find(|device| device.kind == kind) {
            Some(device) => device,
            None => panic!("the machine has no {kind:?}"),
        }
    }
}

impl Device {
    /// Reads a register.
    #[must_use]
    pub fn read(&self, register: u64) -> u32 {
        cpu::load(self.base + register, 4) as u32
    }

    /// Writes a register.
    pub fn write(&self, register: u64, value: u32) {
        cpu::store(self.base + register, 4, u64::from(value));
    }

    /// Writes the two halves of an address.
    pub fn write64(&self, register: u64, value: u64) {
        self.write(register, value as u32);
        self.write(register + 4, (value >> 32) as u32);
    }

    /// Writes 0 to the status.
    pub fn reset(&self) {
        self.write(register::STATUS, 0);
    }

    /// The features it offers.
    #[must_use]
    pub fn offered(&self) -> u64 {
        self.write(register::DEVICE_FEATURES_SEL, 1);
        let high = u64::from(self.read(register::DEVICE_FEATURES));
        self.write(register::DEVICE_FEATURES_SEL, 0);
        (high << 32) | u64::from(self.read(register::DEVICE_FEATURES))
    }

    /// From a reset to FEATURES_OK with these features; whether the device took them.
    pub fn negotiate(&self, features: u64) -> bool {
        self.reset();
        self.write(register::STATUS, status::ACKNOWLEDGE);
        self.write(register::STATUS, status::ACKNOWLEDGE | status::DRIVER);
        for half in 0..2 {
            self.write(register::DRIVER_FEATURES_SEL, half);
            self.write(register::DRIVER_FEATURES, (features >> (32 * half)) as u32);
        }
        let wanted = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
        self.write(register::STATUS, wanted);
        self.read(register::STATUS) == wanted
    }

    /// The largest size of a queue; 0 where there is none.
    #[must_use]
    pub fn queue_max(&self, queue: u32) -> u16 {
        self.write(register::QUEUE_SEL, queue);
        self.read(register::QUEUE_SIZE_MAX) as u16
    }

    /// How many queues it has.
    #[must_use]
    pub fn queues(&self) -> usize {
        (0..MOST_QUEUES as u32).take_while(|queue| self.queue_max(*queue) > 0).count()
    }

    /// Writes a queue's registers as given, and makes it ready.
    pub fn set_queue(&self, queue: u32, size: u32, desc: u64, driver: u64, device: u64) {
        self.write(register::QUEUE_SEL, queue);
        self.write(register::QUEUE_SIZE, size);
        self.write64(register::QUEUE_DESC, desc);
        self.write64(register::QUEUE_DRIVER, driver);
        self.write64(register::QUEUE_DEVICE, device);
        self.write(register::QUEUE_READY, 1);
    }

    /// Sets DRIVER_OK.
    pub fn go(&self) {
        let ok = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK;
        self.write(register::STATUS, ok);
    }

    /// Kicks a queue.
    pub fn kick(&self, queue: u32) {
        self.write(register::QUEUE_NOTIFY, queue);
    }

    /// Brings it up as an honest driver does, with every feature but the event index.
    #[must_use]
    pub fn up(&self) -> Driver {
        self.up_with(self.offered() & !EVENT_IDX)
    }

    /// Brings it up with these features.
    #[must_use]
    pub fn up_with(&self, features: u64) -> Driver {
        match self.try_up(features) {
            Some(driver) => driver,
            None => panic!("{:?} refuses features {features:#x}", self.kind),
        }
    }

    /// Brings it up with these features, if it takes them: where several processors do so at once, it need not.
    #[must_use]
    pub fn try_up(&self, features: u64) -> Option<Driver> {
        if !self.negotiate(features) {
            return None;
        }
        let mut rings = [Ring::default(); MOST_QUEUES];
        for (queue, ring) in (0..self.queues() as u32).zip(&mut rings) {
            *ring = Ring::new(self.ring_base(queue), self.queue_max(queue));
            ring.clear();
            self.set_queue(queue, u32::from(ring.size), ring.desc, ring.avail, ring.used);
        }
        self.go();
        Some(Driver { device: *self, rings })
    }

    /// Where this program puts the ring of one of its queues.
    #[must_use]
    pub fn ring_base(&self, queue: u32) -> u64 {
        RINGS + (self.index * MOST_QUEUES as u64 + u64::from(queue)) * RING_SPACING
    }
}

/// A buffer in a chain.
#[derive(Debug, Clone, Copy, Default)]
pub struct Desc {
    /// Guest physical address.
    pub address: u64,
    /// Bytes.
    pub length: u32,
    /// NEXT 1, WRITE 2, INDIRECT 4, and whatever else.
    pub flags: u16,
    /// The next descriptor.
    pub next: u16,
}

impl Desc {
    /// A buffer that the device reads.
    #[must_use]
    pub const fn readable(address: u64, length: u32) -> Self {
        Self { address, length, flags: 0, next: 0 }
    }

    /// A buffer that the device writes.
    #[must_use]
    pub const fn writable(address: u64, length: u32) -> Self {
        Self { address, length, flags: 2, next: 0 }
    }

    /// An indirect table of this many bytes.
    #[must_use]
    pub const fn indirect(address: u64, length: u32) -> Self {
        Self { address, length, flags: 4, next: 0 }
    }

    /// The same, followed by another.
    #[must_use]
    pub const fn then(self, next: u16) -> Self {
        Self { flags: self.flags | 1, next, ..self }
    }

    /// Writes it as entry `index` of a table.
    pub fn put(self, table: u64, index: u64) {
        let at = table + index * 16;
        memory::write(at, self.address);
        memory::write(at + 8, self.length);
        memory::write(at + 12, self.flags);
        memory::write(at + 14, self.next);
    }
}

/// A split queue in memory.
#[derive(Debug, Clone, Copy, Default)]
pub struct Ring {
    /// Descriptor table.
    pub desc: u64,
    /// Available ring.
    pub avail: u64,
    /// Used ring.
    pub used: u64,
    /// Entries.
    pub size: u16,
    /// Used entries that were looked at.
    pub seen: u16,
}

impl Ring {
    /// A ring laid out from an address on.
    #[must_use]
    pub fn new(base: u64, size: u16) -> Self {
        let avail = base + 16 * u64::from(size);
        let used = (avail + 6 + 2 * u64::from(size)).next_multiple_of(4);
        Self { desc: base, avail, used, size, seen: 0 }
    }

    /// The first address behind it.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.used + 6 + 8 * u64::from(self.size)
    }

    /// Zeroes it.
    pub fn clear(&mut self) {
        memory::fill(self.desc, self.end() - self.desc, 0);
        self.seen = 0;
    }

    /// Puts a head into the available ring.
    pub fn offer(&self, head: u16) {
        let index = memory::volatile16(self.avail + 2);
        if self.size > 0 {
            memory::write(self.avail + 4 + 2 * u64::from(index % self.size), head);
        }
        memory::publish16(self.avail + 2, index.wrapping_add(1));
    }

    /// Sets the available index to anything.
    pub fn set_avail(&self, index: u16) {
        memory::publish16(self.avail + 2, index);
    }

    /// The device's used index.
    #[must_use]
    pub fn used_index(&self) -> u16 {
        memory::volatile16(self.used + 2)
    }

    /// Waits for the next used chain; gives its head and the bytes written.
    pub fn wait(&mut self) -> (u32, u32) {
        while self.used_index() == self.seen {
            cpu::relax();
        }
        core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
        let at = self.used + 4 + 8 * u64::from(self.seen % self.size.max(1));
        self.seen = self.seen.wrapping_add(1);
        (memory::read(at), memory::read(at + 4))
    }
}

/// A device that is up.
pub struct Driver {
    /// The device.
    pub device: Device,
    /// Its queues' rings.
    pub rings: [Ring; MOST_QUEUES],
}

impl Driver {
    /// A queue's ring.
    pub fn ring(&mut self, queue: u32) -> &mut Ring {
        &mut self.rings[queue as usize]
    }

    /// Offers these descriptors, which are written to the table's beginning, as one chain from entry 0; kicks.
    pub fn offer(&mut self, queue: u32, table: &[Desc]) {
        let ring = self.ring(queue);
        for (index, desc) in (0..).zip(table) {
            desc.put(ring.desc, index);
        }
        ring.offer(0);
        self.device.kick(queue);
    }

    /// Offers a chain and waits for it; gives the bytes written.
    pub fn request(&mut self, queue: u32, table: &[Desc]) -> u32 {
        self.offer(queue, table);
        let (head, written) = self.ring(queue).wait();
        assert!(head == 0, "another chain was used: {head}");
        written
    }
}

/// A number that looks random, always the same from one seed (xorshift64*).
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub fn any(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// One below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        (self.any() >> 16) % limit.max(1)
    }
}

/// The n-th buffer of 64 KiB.
#[must_use]
pub fn buffer(n: u64) -> u64 {
    BUFFERS + n * 0x1_0000
}
