//! Lists of page numbers, as the driver inflates the balloon with them: little-endian `u32`s that count pages
//! of 4 KiB, whatever the guest's page size is (virtio 1.3, 5.5.6).

/// Bytes of one request that are looked at. Linux sends 256 page numbers at a time.
pub(super) const MAX_REQUEST: usize = 4096 * NUMBER;

const NUMBER: usize = size_of::<u32>();
const PAGE: u64 = 4096;

/// Adjacent pages, as guest physical addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    /// The first page's address.
    pub start: u64,
    end: u64,
}

impl Run {
    /// In bytes.
    #[must_use]
    pub(super) fn length(self) -> u64 {
        self.end - self.start
    }
}

/// The pages of a request, in ascending order, each once, and adjacent ones together. Bytes that are no whole
/// number at the end are ignored.
#[must_use]
pub(super) fn runs(request: &[u8]) -> Vec<Run> {
    let (numbers, _) = request.as_chunks::<NUMBER>();
    let mut pages: Vec<u32> = numbers.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect();
    pages.sort_unstable();
    pages.dedup();
    let mut runs: Vec<Run> = Vec::new();
    for start in pages.into_iter().map(|page| u64::from(page) * PAGE) {
        match runs.last_mut() {
            Some(last) if last.end == start => last.end += PAGE,
            _ => runs.push(Run { start, end: start + PAGE }),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_page_is_in_one_run(
            pages in proptest::collection::vec(prop_oneof![0..64u32, any::<u32>()], 0..200),
            tail in 0..NUMBER,
        ) {
            let mut bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
            bytes.extend(vec![0xff; tail]);
            let runs = runs(&bytes);
            let found: Vec<u64> =
                runs.iter().flat_map(|run| (run.start..run.end).step_by(PAGE as usize)).collect();
            let expected: BTreeSet<u64> = pages.iter().map(|page| u64::from(*page) * PAGE).collect();
            prop_assert_eq!(found, expected.into_iter().collect::<Vec<_>>());
            for pair in runs.windows(2) {
                prop_assert!(pair[0].end < pair[1].start);
            }
        }
    }
}
