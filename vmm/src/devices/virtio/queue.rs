//! What every device does with its queues: pop a chain, check it, put it back, and notify the driver; and
//! the form in which a queue is saved.
//!
//! ```text
//!  pop ──▶ Chain ──▶ Buffers::of (checks, caps) ──▶ device reads/writes guest memory ──▶ complete
//!                        └─ malformed ──▶ complete(0) or the device's own error status
//! ```
//!
//! `virtio-queue` ends an iteration quietly when a chain is malformed (a loop, an index past the table, a
//! table outside memory). [`Buffers::of`] makes that an error, so no device works on half a request.

use serde::{Deserialize, Serialize};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueState, QueueT, desc::split::Descriptor};
use vm_memory::{GuestAddress, GuestMemory as _, Permissions};

use super::device::{DeviceError, GuestMemory, Interrupt};

/// A chain of descriptors popped from a queue.
pub type Chain<'m> = DescriptorChain<&'m GuestMemory>;

/// The longest chain any device takes: more than Linux ever builds (a queue's size, at most 256 here, plus
/// what an indirect table may add), and little enough to bound the work of one request.
pub const MAX_CHAIN: usize = 1024;

/// Pops the next available chain.
///
/// # Errors
/// The available index is further ahead than the queue is long, or the ring cannot be read: the driver broke
/// the protocol, and the queue is of no more use.
pub fn pop<'m>(
    queue: &mut Queue,
    index: usize,
    memory: &'m GuestMemory,
) -> Result<Option<Chain<'m>>, DeviceError> {
    let mut available = queue.iter(memory).map_err(|error| queue_error(index, &error))?;
    Ok(available.next())
}

/// Puts a chain into the used ring; `written` is the number of bytes that the device wrote into it.
///
/// # Errors
/// The head index is outside the queue (it came from the driver), or the ring cannot be written.
pub fn complete(
    queue: &mut Queue,
    index: usize,
    memory: &GuestMemory,
    head: u16,
    written: u32,
) -> Result<(), DeviceError> {
    queue.add_used(memory, head, written).map_err(|error| queue_error(index, &error))
}

/// Raises the interrupt if the driver wants to know of what was completed since the last call.
///
/// # Errors
/// The driver's event index cannot be read.
pub fn notify(
    queue: &mut Queue,
    index: usize,
    memory: &GuestMemory,
    interrupt: &Interrupt,
) -> Result<(), DeviceError> {
    if queue.needs_notification(memory).map_err(|error| queue_error(index, &error))? {
        interrupt.used_ring();
    }
    Ok(())
}

/// A [`DeviceError::Queue`] from whatever went wrong with queue `queue`.
pub fn queue_error(queue: usize, error: &dyn std::fmt::Display) -> DeviceError {
    DeviceError::Queue { queue, message: error.to_string() }
}

/// A checked chain: every buffer lies in guest memory, all readable ones come before all writable ones
/// (virtio 1.3, 2.7.4.2), and there are at most [`MAX_CHAIN`] of them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Buffers {
    /// What the device reads: address and length in bytes.
    pub readable: Vec<(GuestAddress, u32)>,
    /// What the device writes: address and length in bytes.
    pub writable: Vec<(GuestAddress, u32)>,
}

impl Buffers {
    /// Checks a chain. Buffers of length 0 are dropped.
    ///
    /// # Errors
    /// The chain is malformed; the device answers that in its own way and goes on.
    pub fn of(mut chain: Chain<'_>) -> Result<Self, ChainError> {
        let mut buffers = Self::default();
        let mut last: Option<Descriptor> = None;
        let mut count = 0;
        while let Some(descriptor) = chain.next() {
            count += 1;
            if count > MAX_CHAIN {
                return Err(ChainError::TooLong);
            }
            let (address, length) = (descriptor.addr(), descriptor.len());
            let access = if descriptor.is_write_only() { Permissions::Write } else { Permissions::Read };
            if length > 0 && !chain.memory().check_range(address, length as usize, access) {
                return Err(ChainError::OutsideMemory { address: address.0, length });
            }
            if descriptor.is_write_only() {
                if length > 0 {
                    buffers.writable.push((address, length));
                }
            } else if last.is_some_and(|last| last.is_write_only()) {
                return Err(ChainError::ReadableAfterWritable);
            } else if length > 0 {
                buffers.readable.push((address, length));
            }
            last = Some(descriptor);
        }
        match last {
            Some(last) if !last.has_next() => Ok(buffers),
            _ => Err(ChainError::Broken),
        }
    }

    /// The number of bytes that the device can read.
    #[must_use]
    pub fn readable_bytes(&self) -> u64 {
        self.readable.iter().map(|(_, length)| u64::from(*length)).sum()
    }

    /// The number of bytes that the device can write.
    #[must_use]
    pub fn writable_bytes(&self) -> u64 {
        self.writable.iter().map(|(_, length)| u64::from(*length)).sum()
    }
}

/// Why a chain cannot be worked on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// More descriptors than [`MAX_CHAIN`].
    #[error("the chain has more than {MAX_CHAIN} descriptors")]
    TooLong,
    /// A loop, an index past the table, a table outside memory, a nested indirect table, or a total of more
    /// than 2³² bytes.
    #[error("the chain does not end")]
    Broken,
    /// A buffer outside guest memory.
    #[error("the buffer of {length} bytes at {address:#x} is outside guest memory")]
    OutsideMemory {
        /// Its guest physical address.
        address: u64,
        /// Its length in bytes.
        length: u32,
    },
    /// A device-readable buffer follows a device-writable one.
    #[error("a readable buffer follows a writable one")]
    ReadableAfterWritable,
}

/// A queue as it is saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedQueue {
    max_size: u16,
    size: u16,
    ready: bool,
    next_avail: u16,
    next_used: u16,
    event_idx: bool,
    desc_table: u64,
    avail_ring: u64,
    used_ring: u64,
}

impl From<&Queue> for SavedQueue {
    fn from(queue: &Queue) -> Self {
        let state = queue.state();
        Self {
            max_size: state.max_size,
            size: state.size,
            ready: state.ready,
            next_avail: state.next_avail,
            next_used: state.next_used,
            event_idx: state.event_idx_enabled,
            desc_table: state.desc_table,
            avail_ring: state.avail_ring,
            used_ring: state.used_ring,
        }
    }
}

impl SavedQueue {
    /// The queue again, of a device whose own limit is `max_size`.
    ///
    /// # Errors
    /// The limit differs, the size or an alignment is impossible, or a ring lies outside `memory`.
    pub fn restore(&self, max_size: u16, memory: &GuestMemory) -> Result<Queue, DeviceError> {
        if self.max_size != max_size {
            return Err(DeviceError::Invalid(format!(
                "saved queue of at most {} descriptors, the device has {max_size}",
                self.max_size
            )));
        }
        let queue = Queue::try_from(QueueState {
            max_size: self.max_size,
            next_avail: self.next_avail,
            next_used: self.next_used,
            event_idx_enabled: self.event_idx,
            size: self.size,
            ready: self.ready,
            desc_table: self.desc_table,
            avail_ring: self.avail_ring,
            used_ring: self.used_ring,
        })
        .map_err(|error| DeviceError::Invalid(format!("saved queue: {error}")))?;
        if queue.ready() && !queue.is_valid(memory) {
            return Err(DeviceError::Invalid("saved queue outside guest memory".to_owned()));
        }
        Ok(queue)
    }

    /// Restores all queues of a device: one for each of `max_sizes`, in order.
    ///
    /// # Errors
    /// As for [`SavedQueue::restore`], or another number of queues.
    pub fn restore_all(
        saved: &[Self],
        max_sizes: &[u16],
        memory: &GuestMemory,
    ) -> Result<Vec<Queue>, DeviceError> {
        if saved.len() != max_sizes.len() {
            return Err(DeviceError::Invalid(format!(
                "{} saved queues, the device has {}",
                saved.len(),
                max_sizes.len()
            )));
        }
        saved.iter().zip(max_sizes).map(|(saved, max_size)| saved.restore(*max_size, memory)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::testing::{Desc, Driver, memory},
        *,
    };

    fn check(table: &[Desc]) -> Result<Buffers, ChainError> {
        let memory = memory();
        let mut driver = Driver::new(&memory, 0x1000, 16);
        let mut queue = driver.queue();
        driver.table(0, table);
        driver.offer(0);
        Buffers::of(pop(&mut queue, 0, &memory).unwrap().unwrap())
    }

    #[test]
    fn a_good_chain_is_split() {
        let buffers = check(&[
            Desc::readable(0x8000, 16).next(1),
            Desc::readable(0x9000, 0).next(2),
            Desc::writable(0xa000, 512),
        ])
        .unwrap();
        assert_eq!(buffers.readable, [(GuestAddress(0x8000), 16)]);
        assert_eq!(buffers.writable, [(GuestAddress(0xa000), 512)]);
        assert_eq!((buffers.readable_bytes(), buffers.writable_bytes()), (16, 512));
    }

    #[test]
    fn malformed_chains_are_refused() {
        assert_eq!(
            check(&[Desc::readable(0x8000, 1).next(1), Desc::readable(0x8000, 1).next(0)]),
            Err(ChainError::Broken)
        );
        assert_eq!(check(&[Desc::readable(0x8000, 1).next(99)]), Err(ChainError::Broken));
        assert_eq!(
            check(&[Desc::writable(0x8000, 1).next(1), Desc::readable(0x8000, 1)]),
            Err(ChainError::ReadableAfterWritable)
        );
        assert_eq!(
            check(&[Desc::readable(u64::MAX - 3, 8)]),
            Err(ChainError::OutsideMemory { address: u64::MAX - 3, length: 8 })
        );
        assert_eq!(check(&[Desc::indirect(0xffff_f000, 32)]), Err(ChainError::Broken));
        assert_eq!(check(&[Desc::indirect(0x8000, 33)]), Err(ChainError::Broken));
    }

    #[test]
    fn an_endless_indirect_table_is_cut() {
        let memory = memory();
        let mut driver = Driver::new(&memory, 0x1000, 16);
        let mut queue = driver.queue();
        let table: Vec<Desc> = (0..2048u16).map(|i| Desc::readable(0x8000, 1).next(i + 1)).collect();
        driver.write_table(0x10000, &table);
        driver.table(0, &[Desc::indirect(0x10000, 2048 * 16)]);
        driver.offer(0);
        let chain = pop(&mut queue, 0, &memory).unwrap().unwrap();
        assert_eq!(Buffers::of(chain), Err(ChainError::TooLong));
    }

    #[test]
    fn an_available_index_too_far_ahead_is_an_error() {
        let memory = memory();
        let mut driver = Driver::new(&memory, 0x1000, 16);
        let mut queue = driver.queue();
        driver.set_avail_idx(17);
        assert!(matches!(pop(&mut queue, 3, &memory), Err(DeviceError::Queue { queue: 3, .. })));
    }

    #[test]
    fn a_head_outside_the_queue_cannot_be_completed() {
        let memory = memory();
        let mut queue = Driver::new(&memory, 0x1000, 16).queue();
        assert!(complete(&mut queue, 0, &memory, 16, 0).is_err());
        assert!(complete(&mut queue, 0, &memory, 15, 0).is_ok());
    }

    #[test]
    fn saved_queues_come_back_or_are_refused() {
        let memory = memory();
        let mut queue = Driver::new(&memory, 0x1000, 16).queue();
        queue.set_next_avail(7);
        queue.set_next_used(5);
        let saved = SavedQueue::from(&queue);
        let bytes = postcard::to_stdvec(&saved).unwrap();
        let again: SavedQueue = postcard::from_bytes(&bytes).unwrap();
        assert_eq!(again.restore(16, &memory).unwrap(), queue);

        assert!(again.restore(32, &memory).is_err());
        assert!(SavedQueue { size: 3, ..again }.restore(16, &memory).is_err());
        assert!(SavedQueue { desc_table: 1, ..again }.restore(16, &memory).is_err());
        assert!(SavedQueue { used_ring: 1 << 40, ..again }.restore(16, &memory).is_err());
        assert!(SavedQueue::restore_all(&[again], &[16, 16], &memory).is_err());
    }

    proptest::proptest! {
        /// From any index on, across its end: every chain that was offered is popped once, in its order, the used ring
        /// says so, and an index that is further ahead than the queue is long is an error, whatever came before.
        #[test]
        fn indexes_wrap_and_never_run(
            power in 0..6u32,
            start in proptest::prelude::any::<u16>(),
            rounds in proptest::collection::vec(0..80u16, 1..12),
            ahead in proptest::prelude::any::<u16>(),
        ) {
            let (memory, size) = (memory(), 1u16 << power);
            let mut driver = Driver::new(&memory, 0x1000, size);
            let mut queue = driver.queue();
            driver.set_avail_idx(start);
            queue.set_next_avail(start);
            for index in 0..size {
                driver.table(index, &[Desc::readable(0x8000, u32::from(index) + 1)]);
            }
            let mut used = 0u16;
            for round in rounds {
                let offered: Vec<u16> = (0..round.min(size)).map(|chain| (chain * 3 + used) % size).collect();
                offered.iter().for_each(|head| driver.offer(*head));
                let mut popped = Vec::new();
                while let Some(chain) = pop(&mut queue, 0, &memory).unwrap() {
                    let head = chain.head_index();
                    let buffers = Buffers::of(chain).unwrap();
                    proptest::prop_assert_eq!(buffers.readable_bytes(), u64::from(head) + 1);
                    complete(&mut queue, 0, &memory, head, u32::from(head)).unwrap();
                    popped.push(head);
                }
                used = used.wrapping_add(round.min(size));
                proptest::prop_assert_eq!(&popped, &offered);
                let seen = driver.used();
                proptest::prop_assert_eq!(seen, popped.iter().map(|head| (*head, u32::from(*head))).collect::<Vec<_>>());
                proptest::prop_assert_eq!((queue.next_used(), queue.next_avail()), (used, start.wrapping_add(used)));
            }
            driver.set_avail_idx(queue.next_avail().wrapping_add(ahead));
            let runs = ahead > size;
            proptest::prop_assert_eq!(pop(&mut queue, 0, &memory).is_err(), runs);
        }
    }
}
