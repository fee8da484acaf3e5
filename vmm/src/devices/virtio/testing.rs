//! A driver for unit tests: it lays queues out in guest memory and writes whatever descriptors a test wants,
//! well-formed or hostile, then kicks the device and looks at the used ring.
//!
//! ```ignore
//! let mut bench = Bench::new(Rng::new());
//! bench.activate(bench.offered());
//! bench.queue(0).table(0, &[Desc::writable(0x8000, 16)]);
//! bench.queue(0).offer(0);
//! bench.kick(0).unwrap();
//! assert_eq!(bench.queue(0).used(), [(0, 16)]);
//! ```

use std::sync::Arc;

use virtio_queue::{
    Queue, QueueT,
    desc::{RawDescriptor, split::Descriptor},
    mock::DescriptorTable,
};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::device::{Activation, DeviceError, GuestMemory, Interrupt, Resources, VirtioDevice};

/// Bytes of guest memory in a test, beginning at address 0.
pub(crate) const MEMORY_SIZE: usize = 4 << 20;

const QUEUE_SPACING: u64 = 0x1_0000;
const FIRST_QUEUE: u64 = 0x30_0000;

/// Fresh guest memory of [`MEMORY_SIZE`] bytes. Queues of a [`Bench`] lie at 3 MiB and above.
pub(crate) fn memory() -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY_SIZE)]).unwrap()
}

/// One descriptor.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Desc {
    address: u64,
    length: u32,
    flags: u16,
    next: u16,
}

impl Desc {
    const NEXT: u16 = 1;
    const WRITE: u16 = 2;
    const INDIRECT: u16 = 4;

    /// A buffer that the device reads.
    pub(crate) fn readable(address: u64, length: u32) -> Self {
        Self { address, length, flags: 0, next: 0 }
    }

    /// A buffer that the device writes.
    pub(crate) fn writable(address: u64, length: u32) -> Self {
        Self { address, length, flags: Self::WRITE, next: 0 }
    }

    /// An indirect table of `length` bytes.
    pub(crate) fn indirect(address: u64, length: u32) -> Self {
        Self { address, length, flags: Self::INDIRECT, next: 0 }
    }

    /// The same, followed by descriptor `next`.
    pub(crate) fn next(self, next: u16) -> Self {
        Self { flags: self.flags | Self::NEXT, next, ..self }
    }

    /// Whether the buffer has a byte in `range`.
    pub(crate) fn covers(&self, range: std::ops::Range<u64>) -> bool {
        self.address < range.end && self.address.saturating_add(u64::from(self.length)) > range.start
    }

    fn raw(self) -> RawDescriptor {
        RawDescriptor::from(Descriptor::new(self.address, self.length, self.flags, self.next))
    }
}

/// The driver's side of one queue.
#[derive(Debug)]
pub(crate) struct Driver {
    memory: GuestMemory,
    size: u16,
    descriptors: u64,
    avail: u64,
    used: u64,
    seen: u16,
}

impl Driver {
    /// A queue of `size` descriptors whose rings begin at `base`.
    pub(crate) fn new(memory: &GuestMemory, base: u64, size: u16) -> Self {
        let avail = base + 16 * u64::from(size);
        let used = (avail + 6 + 2 * u64::from(size)).next_multiple_of(4);
        Self { memory: memory.clone(), size, descriptors: base, avail, used, seen: 0 }
    }

    /// Zeroes descriptors and rings.
    pub(crate) fn clear(&mut self) {
        let end = self.used + 6 + 8 * u64::from(self.size);
        let zeroes = vec![0; usize::try_from(end - self.descriptors).unwrap()];
        self.memory.write_slice(&zeroes, GuestAddress(self.descriptors)).unwrap();
        self.seen = 0;
    }

    /// Addresses of descriptor table, available ring and used ring.
    pub(crate) fn addresses(&self) -> (u64, u64, u64) {
        (self.descriptors, self.avail, self.used)
    }

    /// The device's side of it, ready.
    pub(crate) fn queue(&self) -> Queue {
        let mut queue = Queue::new(self.size).unwrap();
        queue.try_set_desc_table_address(GuestAddress(self.descriptors)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(self.avail)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(self.used)).unwrap();
        queue.set_ready(true);
        queue
    }

    /// Writes descriptors into the queue's own table from index `first` on.
    pub(crate) fn table(&mut self, first: u16, descriptors: &[Desc]) {
        self.write_table(self.descriptors + 16 * u64::from(first), descriptors);
    }

    /// Writes a table anywhere, for indirect ones.
    pub(crate) fn write_table(&mut self, address: u64, descriptors: &[Desc]) {
        let length = u16::try_from(descriptors.len()).unwrap();
        let table = DescriptorTable::new(&self.memory, GuestAddress(address), length);
        for (index, descriptor) in (0..length).zip(descriptors) {
            table.store(index, descriptor.raw()).unwrap();
        }
    }

    /// Puts a head into the available ring; any value.
    pub(crate) fn offer(&mut self, head: u16) {
        let index: u16 = self.memory.read_obj(GuestAddress(self.avail + 2)).unwrap();
        let slot = self.avail + 4 + 2 * u64::from(index % self.size);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.set_avail_idx(index.wrapping_add(1));
    }

    /// Sets the available index; any value.
    pub(crate) fn set_avail_idx(&mut self, index: u16) {
        self.memory.write_obj(index, GuestAddress(self.avail + 2)).unwrap();
    }

    /// Sets `used_event`, for when the event index is negotiated.
    pub(crate) fn set_used_event(&mut self, index: u16) {
        self.memory.write_obj(index, GuestAddress(self.avail + 4 + 2 * u64::from(self.size))).unwrap();
    }

    /// What the device has completed since the last call: head and bytes written.
    pub(crate) fn used(&mut self) -> Vec<(u16, u32)> {
        let index: u16 = self.memory.read_obj(GuestAddress(self.used + 2)).unwrap();
        let mut found = Vec::new();
        while self.seen != index {
            let slot = self.used + 4 + 8 * u64::from(self.seen % self.size);
            let head: u32 = self.memory.read_obj(GuestAddress(slot)).unwrap();
            let written: u32 = self.memory.read_obj(GuestAddress(slot + 4)).unwrap();
            found.push((u16::try_from(head).unwrap(), written));
            self.seen = self.seen.wrapping_add(1);
        }
        found
    }
}

/// A device, guest memory, and a driver for each of its queues.
pub(crate) struct Bench<D> {
    /// The device under test.
    pub(crate) device: D,
    /// Its guest's memory.
    pub(crate) memory: GuestMemory,
    /// Its interrupt.
    pub(crate) interrupt: Arc<Interrupt>,
    drivers: Vec<Driver>,
}

impl<D: VirtioDevice> Bench<D> {
    /// Lays out queues of the device's largest sizes (2048 at most).
    pub(crate) fn new(device: D) -> Self {
        let memory = memory();
        let interrupt = Arc::new(Interrupt::new(EventFd::new(EFD_NONBLOCK).unwrap()));
        let drivers = device
            .queue_max_sizes()
            .iter()
            .zip(0..)
            .map(|(size, index)| Driver::new(&memory, FIRST_QUEUE + QUEUE_SPACING * index, *size))
            .collect();
        Self { device, memory, interrupt, drivers }
    }

    /// Features that the device offers.
    pub(crate) fn offered(&self) -> u64 {
        self.device.features()
    }

    /// Memory and interrupt, as a device gets them.
    pub(crate) fn resources(&self) -> Resources {
        Resources { memory: self.memory.clone(), interrupt: Arc::clone(&self.interrupt) }
    }

    /// Activates the device with these features.
    pub(crate) fn activate(&mut self, features: u64) {
        let event_idx = features & super::device::VIRTIO_RING_F_EVENT_IDX != 0;
        let queues = self
            .drivers
            .iter()
            .map(|driver| {
                let mut queue = driver.queue();
                queue.set_event_idx(event_idx);
                queue
            })
            .collect();
        let resources = self.resources();
        self.device.activate(Activation { features, queues, resources }).unwrap();
    }

    /// After a reset of the device: its driver comes up anew, with empty rings.
    pub(crate) fn start_again(&mut self, features: u64) {
        self.drivers.iter_mut().for_each(Driver::clear);
        self.activate(features);
    }

    /// The driver's side of a queue.
    pub(crate) fn queue(&mut self, index: usize) -> &mut Driver {
        &mut self.drivers[index]
    }

    /// Kicks a queue.
    pub(crate) fn kick(&mut self, index: usize) -> Result<(), DeviceError> {
        self.device.queue_event(index)
    }

    /// Writes guest memory.
    pub(crate) fn write(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    /// Reads guest memory.
    pub(crate) fn read(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// Whether the interrupt was raised since the last call; acknowledges it.
    pub(crate) fn interrupted(&mut self) -> bool {
        let status = self.interrupt.status();
        self.interrupt.acknowledge(status);
        status != 0
    }
}
