//! The guest's statistics: pairs of a little-endian `u16` tag and a `u64` value (virtio 1.3, 5.5.6.3).

use bulkhead_vmm_api::GuestMemoryFigures;

use super::super::{
    device::GuestMemory,
    iovec::copy_out,
    queue::{Buffers, Chain},
};

const PAIR: usize = 10;
/// Pairs that are looked at; Linux has 16.
const MAX_PAIRS: usize = 64;

/// The figures in a buffer; None where it is malformed. Tags that are not known are passed over.
pub(super) fn read(chain: Chain<'_>, memory: &GuestMemory) -> Option<GuestMemoryFigures> {
    let buffers = Buffers::of(chain).ok()?;
    let length = usize::try_from(buffers.readable_bytes()).unwrap_or(usize::MAX).min(MAX_PAIRS * PAIR);
    let mut bytes = vec![0; length];
    (length > 0 && copy_out(memory, &buffers.readable, 0, &mut bytes)).then(|| parse(&bytes))
}

fn parse(bytes: &[u8]) -> GuestMemoryFigures {
    let mut figures = GuestMemoryFigures::default();
    let (pairs, _) = bytes.as_chunks::<PAIR>();
    for [tag @ .., a, b, c, d, e, f, g, h] in pairs {
        let value = u64::from_le_bytes([*a, *b, *c, *d, *e, *f, *g, *h]);
        match u16::from_le_bytes(*tag) {
            2 => figures.major_faults = value,
            4 => figures.free = value,
            5 => figures.total = value,
            6 => figures.available = value,
            7 => figures.caches = value,
            10 => figures.oom_kills = value,
            _ => {}
        }
    }
    figures
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_tags_are_taken_and_half_a_pair_is_not() {
        let pair = |tag: u16, value: u64| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat();
        let mut bytes = [pair(5, 7 << 40), pair(999, 1), pair(4, 3), pair(4, 4)].concat();
        bytes.extend([6, 0, 1]);
        let expected = GuestMemoryFigures { total: 7 << 40, free: 4, ..GuestMemoryFigures::default() };
        assert_eq!(parse(&bytes), expected);
        assert_eq!(parse(&[]), GuestMemoryFigures::default());
    }
}
