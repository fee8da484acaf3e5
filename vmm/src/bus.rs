//! Port I/O and memory-mapped I/O: which device answers at an address.
//!
//! A bus is fixed when the machine is built. A read that no device answers gives all ones, as an empty bus
//! does; a write that no device answers is lost.

use std::sync::Arc;

/// Something on a bus. It synchronises itself: any vCPU may call it at any time.
pub trait BusDevice: Send + Sync {
    /// The guest reads at `offset` from the device's base. An access may reach past the device's end; what
    /// lies there reads as the device pleases.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// The guest writes at `offset` from the device's base.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Two devices want the same address.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the range {base:#x}+{length:#x} is taken, empty or too high")]
pub struct RangeError {
    base: u64,
    length: u64,
}

struct Range {
    base: u64,
    length: u64,
    device: Arc<dyn BusDevice>,
}

/// An address space with devices in it.
#[derive(Default)]
pub struct Bus {
    /// Sorted by base; disjoint.
    ranges: Vec<Range>,
}

impl Bus {
    /// Puts a device at `base`.
    ///
    /// # Errors
    /// The range is empty, overflows, or overlaps another.
    pub fn insert(&mut self, base: u64, length: u64, device: Arc<dyn BusDevice>) -> Result<(), RangeError> {
        let error = RangeError { base, length };
        let Some(end) = base.checked_add(length).filter(|end| *end > base) else { return Err(error) };
        let at = self.ranges.partition_point(|range| range.base < base);
        let free_before = at.checked_sub(1).and_then(|at| self.ranges.get(at));
        if free_before.is_some_and(|before| before.base + before.length > base)
            || self.ranges.get(at).is_some_and(|after| after.base < end)
        {
            return Err(error);
        }
        self.ranges.insert(at, Range { base, length, device });
        Ok(())
    }

    /// A read of the guest.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address) {
            Some((device, offset)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// A write of the guest.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.find(address) {
            device.write(offset, data);
        }
    }

    fn find(&self, address: u64) -> Option<(&dyn BusDevice, u64)> {
        let at = self.ranges.partition_point(|range| range.base <= address).checked_sub(1)?;
        let range = self.ranges.get(at)?;
        let offset = address - range.base;
        (offset < range.length).then_some((&*range.device, offset))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use proptest::prelude::*;

    use super::*;

    #[derive(Default)]
    struct Probe(Mutex<Vec<u64>>);

    impl BusDevice for Probe {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(0);
            self.0.lock().unwrap().push(offset);
        }
        fn write(&self, offset: u64, _: &[u8]) {
            self.0.lock().unwrap().push(offset);
        }
    }

    #[test]
    fn an_empty_address_reads_as_ones() {
        let mut bus = Bus::default();
        let probe = Arc::new(Probe::default());
        bus.insert(0x10, 4, Arc::<Probe>::clone(&probe)).unwrap();
        for address in [0, 0xf, 0x14, u64::MAX] {
            let mut data = [0; 2];
            bus.read(address, &mut data);
            bus.write(address, &data);
            assert_eq!(data, [0xff; 2], "{address:#x}");
        }
        assert!(probe.0.lock().unwrap().is_empty());
        bus.read(0x13, &mut [0; 1]);
        assert_eq!(*probe.0.lock().unwrap(), [3]);
    }

    proptest! {
        #[test]
        fn ranges_never_overlap(wanted in prop::collection::vec((0u64..64, 0u64..8), 0..20), address in 0u64..80) {
            let mut bus = Bus::default();
            let mut taken: Vec<(u64, u64, Arc<Probe>)> = Vec::new();
            for (base, length) in wanted {
                let probe = Arc::new(Probe::default());
                let free = length > 0 && taken.iter().all(|(b, l, _)| base >= b + l || *b >= base + length);
                let inserted = bus.insert(base, length, Arc::<Probe>::clone(&probe)).is_ok();
                prop_assert_eq!(inserted, free);
                if inserted {
                    taken.push((base, length, probe));
                }
            }
            bus.write(address, &[0]);
            for (base, length, probe) in taken {
                let hit = (base..base + length).contains(&address);
                prop_assert_eq!(&*probe.0.lock().unwrap(), &if hit { vec![address - base] } else { vec![] });
            }
        }
    }
}
