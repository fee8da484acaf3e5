//! Which blocks of a memory device are plugged: a bitmap, and ranges of blocks in it.

use std::ops::Range;

use serde::{Deserialize, Serialize};

/// The state of a range of blocks (virtio 1.3, 5.15.6.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    /// All are plugged.
    Plugged,
    /// None is.
    Unplugged,
    /// Some are.
    Mixed,
}

/// A run of plugged blocks, as it is saved: the first, and how many.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Run(u32, u32);

/// The bitmap. A range beyond its end is the caller's mistake: it is cut off.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Blocks {
    words: Vec<u64>,
    count: u32,
    plugged: u32,
}

impl Blocks {
    /// `count` blocks, all unplugged.
    #[must_use]
    pub(super) fn new(count: u32) -> Self {
        Self { words: vec![0; count.div_ceil(u64::BITS) as usize], count, plugged: 0 }
    }

    /// How many there are.
    #[must_use]
    pub(super) fn count(&self) -> u32 {
        self.count
    }

    /// How many are plugged.
    #[must_use]
    pub(super) fn plugged(&self) -> u32 {
        self.plugged
    }

    /// The state of a range; an empty one is unplugged.
    #[must_use]
    pub(super) fn state(&self, range: Range<u32>) -> Found {
        let length = range.end.min(self.count).saturating_sub(range.start);
        let plugged: u32 =
            self.parts(range).map(|(index, mask)| (self.word(index) & mask).count_ones()).sum();
        match plugged {
            0 => Found::Unplugged,
            plugged if plugged == length => Found::Plugged,
            _ => Found::Mixed,
        }
    }

    /// Plugs or unplugs every block of a range.
    pub(super) fn set(&mut self, range: Range<u32>, plugged: bool) {
        for (index, mask) in self.parts(range) {
            let Some(word) = self.words.get_mut(index) else { continue };
            let before = word.count_ones();
            if plugged {
                *word |= mask;
            } else {
                *word &= !mask;
            }
            self.plugged = self.plugged - before + word.count_ones();
        }
    }

    /// The runs of plugged blocks, in ascending order, adjacent ones together.
    pub(super) fn runs(&self) -> impl Iterator<Item = Range<u32>> + '_ {
        let mut at = 0;
        std::iter::from_fn(move || {
            let start = self.next(at, true)?;
            at = self.next(start, false).unwrap_or(self.count);
            Some(start..at)
        })
    }

    /// As it is saved.
    #[must_use]
    pub(super) fn save(&self) -> Vec<Run> {
        self.runs().map(|run| Run(run.start, run.end - run.start)).collect()
    }

    /// The blocks again, of which only those below `limit` may be plugged. None where the runs are not
    /// ascending and apart, or reach beyond.
    #[must_use]
    pub(super) fn restore(count: u32, limit: u32, runs: &[Run]) -> Option<Self> {
        let mut blocks = Self::new(count);
        let mut free = 0;
        for Run(first, length) in runs {
            let end = first.checked_add(*length)?;
            if *length == 0 || *first < free || end > limit.min(count) {
                return None;
            }
            blocks.set(*first..end, true);
            free = end.saturating_add(1);
        }
        Some(blocks)
    }

    /// The first block from `from` on that is plugged, or is not.
    fn next(&self, from: u32, plugged: bool) -> Option<u32> {
        self.parts(from..self.count).find_map(|(index, mask)| {
            let word = self.word(index);
            let found = if plugged { word } else { !word } & mask;
            let word = u32::try_from(index).ok()?;
            (found != 0).then(|| word * u64::BITS + found.trailing_zeros())
        })
    }

    fn word(&self, index: usize) -> u64 {
        self.words.get(index).copied().unwrap_or(0)
    }

    /// The words that a range touches, each with the bits that are meant.
    fn parts(&self, range: Range<u32>) -> impl Iterator<Item = (usize, u64)> + use<> {
        let (start, end) = (range.start, range.end.min(self.count));
        let words = if start < end { start / u64::BITS..end.div_ceil(u64::BITS) } else { 0..0 };
        words.map(move |index| {
            let base = index * u64::BITS;
            let (from, to) = (start.max(base) - base, (end - base).min(u64::BITS));
            let below = |bits: u32| if bits == u64::BITS { u64::MAX } else { (1 << bits) - 1 };
            (index as usize, below(to) & !below(from))
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn range(count: u32) -> impl Strategy<Value = Range<u32>> {
        (0..=count, 0..=count).prop_map(|(a, b)| a.min(b)..a.max(b))
    }

    proptest! {
        #[test]
        fn the_bitmap_is_a_list_of_booleans(
            (count, steps) in (1..300u32).prop_flat_map(|count| {
                (Just(count), proptest::collection::vec((range(count), any::<bool>()), 0..20))
            }),
        ) {
            let mut blocks = Blocks::new(count);
            let mut model = vec![false; count as usize];
            for (range, plugged) in steps {
                blocks.set(range.clone(), plugged);
                model[range.start as usize..range.end as usize].fill(plugged);
                let here = &model[range.start as usize..range.end as usize];
                let expected = match (here.iter().any(|p| *p), here.iter().all(|p| *p)) {
                    (false, _) => Found::Unplugged,
                    (true, true) => Found::Plugged,
                    (true, false) => Found::Mixed,
                };
                prop_assert_eq!(blocks.state(range), expected);
            }
            prop_assert_eq!(blocks.plugged() as usize, model.iter().filter(|p| **p).count());
            let mut found = vec![false; count as usize];
            let mut last = None;
            for run in blocks.runs() {
                prop_assert!(run.start < run.end && last.is_none_or(|last| last < run.start));
                found[run.start as usize..run.end as usize].fill(true);
                last = Some(run.end);
            }
            prop_assert_eq!(&found, &model);
            let saved = blocks.save();
            prop_assert_eq!(Blocks::restore(count, count, &saved), Some(blocks.clone()));
            let top = blocks.runs().last().map_or(0, |run| run.end);
            prop_assert_eq!(Blocks::restore(count, top, &saved), Some(blocks));
            if top > 0 {
                prop_assert_eq!(Blocks::restore(count, top - 1, &saved), None);
            }
        }

        #[test]
        fn any_saved_runs_are_restored_as_they_are_or_refused(
            count in 1..200u32,
            runs in proptest::collection::vec((any::<u32>(), any::<u32>()), 0..5),
            small in proptest::collection::vec((0..200u32, 0..50u32), 0..5),
        ) {
            for runs in [runs, small] {
                let runs: Vec<Run> = runs.into_iter().map(|(first, length)| Run(first, length)).collect();
                if let Some(blocks) = Blocks::restore(count, count, &runs) {
                    prop_assert_eq!(blocks.save(), runs);
                }
            }
        }

        #[test]
        fn what_is_beyond_the_end_is_cut_off(count in 0..200u32, range in range(1000)) {
            let mut blocks = Blocks::new(count);
            blocks.set(range.clone(), true);
            prop_assert_eq!(blocks.plugged(), range.end.min(count).saturating_sub(range.start.min(count)));
        }
    }
}
