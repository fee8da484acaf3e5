//! The memory file: guest memory as it is, region after region, and a trailer that ties it to its state file.
//!
//! ```text
//!  region 0 │ region 1 │ … │ trailer: "BLKHMEM1", id of the snapshot
//!  └ runs of pages that are not all zero; the rest are holes
//! ```
//!
//! The runs stand in the state file too, so that a restore maps them, and nothing else, from the file: what
//! the guest had never touched is anonymous memory again, and the file need not be as sparse as it was.

use std::{fs::File, io, ops::Range, os::unix::fs::FileExt};

use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::devices::virtio::device::GuestMemory;

const PAGE: usize = 4096;
/// Bytes looked at at a time.
const CHUNK: usize = 64 << 10;
/// The most runs: each costs a restore a mapping, and a process has 65,530 of them.
const MAX_RUNS: usize = 4096;
/// Runs that are no further apart are one from the beginning.
const LEAST_GAP: u64 = 32 << 10;
/// Regions at most: below and above the device gap, and what can be plugged.
const MAX_REGIONS: usize = 16;

const TRAILER_MAGIC: [u8; 8] = *b"BLKHMEM1";
const TRAILER: u64 = 24;

/// Names one snapshot: its state file and its memory file carry the same.
pub type SnapshotId = [u8; 16];

/// Why a memory file cannot be written or is refused.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It cannot be read or written.
    #[error("the memory file: {0}")]
    Io(#[from] io::Error),
    /// Guest memory cannot be read.
    #[error("guest memory: {0}")]
    Guest(#[from] GuestMemoryError),
    /// It has another length than its state says.
    #[error("the memory file has {found} bytes, its state says {said}")]
    Length {
        /// As it is.
        found: u64,
        /// As it should be.
        said: u64,
    },
    /// It belongs to another state file.
    #[error("the memory file is of another snapshot")]
    Other,
    /// The saved layout contradicts itself.
    #[error("the saved memory layout is impossible: {0}")]
    Layout(&'static str),
    /// The machine has other memory.
    #[error("the machine had memory at {saved:x?}, and is to have it at {wanted:x?}")]
    Regions {
        /// As saved.
        saved: Vec<Range<u64>>,
        /// As configured.
        wanted: Vec<Range<u64>>,
    },
}

/// A region of guest memory in the file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedRegion {
    /// Its guest addresses.
    pub addresses: Range<u64>,
    /// What is not all zero: offsets into the region, page-aligned, ascending, apart.
    pub runs: Vec<Range<u64>>,
}

impl SavedRegion {
    /// In bytes, in the file too.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.addresses.end.saturating_sub(self.addresses.start)
    }

    fn check(&self) -> Result<(), ImageError> {
        let aligned = |value: u64| value.is_multiple_of(PAGE as u64);
        if self.addresses.is_empty() || !aligned(self.addresses.start) || !aligned(self.addresses.end) {
            return Err(ImageError::Layout("a region"));
        }
        let mut end = 0;
        for run in &self.runs {
            if run.is_empty()
                || run.start < end
                || run.end > self.size()
                || !aligned(run.start)
                || !aligned(run.end)
            {
                return Err(ImageError::Layout("a run of pages"));
            }
            end = run.end;
        }
        Ok(())
    }
}

/// A memory file and what its state says of it, both checked.
#[derive(Debug)]
pub struct Image<'a> {
    /// The file.
    pub file: &'a File,
    /// Its regions, in the file's order.
    pub regions: &'a [SavedRegion],
}

impl<'a> Image<'a> {
    /// Checks a memory file against its state, and both against the memory that the machine is to have.
    ///
    /// # Errors
    /// See [`ImageError`].
    pub fn new(
        file: &'a File,
        id: SnapshotId,
        regions: &'a [SavedRegion],
        wanted: &[Range<u64>],
    ) -> Result<Self, ImageError> {
        if regions.len() > MAX_REGIONS
            || regions.iter().map(|region| region.runs.len()).sum::<usize>() > MAX_RUNS
        {
            return Err(ImageError::Layout("too many regions or runs"));
        }
        regions.iter().try_for_each(SavedRegion::check)?;
        if !regions.iter().map(|region| &region.addresses).eq(wanted) {
            let saved = regions.iter().map(|region| region.addresses.clone()).collect();
            return Err(ImageError::Regions { saved, wanted: wanted.to_vec() });
        }
        // The regions are those of a machine, so the sum does not overflow.
        let content: u64 = regions.iter().map(SavedRegion::size).sum();
        let (found, said) = (file.metadata()?.len(), content + TRAILER);
        if found != said {
            return Err(ImageError::Length { found, said });
        }
        let mut trailer = [0; TRAILER as usize];
        file.read_exact_at(&mut trailer, content)?;
        if trailer != self::trailer(id) {
            return Err(ImageError::Other);
        }
        Ok(Self { file, regions })
    }
}

fn trailer(id: SnapshotId) -> [u8; TRAILER as usize] {
    let mut trailer = [0; TRAILER as usize];
    for (to, from) in trailer.iter_mut().zip(TRAILER_MAGIC.iter().chain(&id)) {
        *to = *from;
    }
    trailer
}

/// Guest addresses that are saved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extent {
    /// All of them.
    pub addresses: Range<u64>,
    /// Those that can have content, page-aligned, ascending, within [`Extent::addresses`]. The others are not
    /// looked at: looking would give them pages.
    pub content: Vec<Range<u64>>,
}

impl Extent {
    /// One of which everything can have content.
    #[must_use]
    pub fn whole(addresses: Range<u64>) -> Self {
        Self { content: vec![addresses.clone()], addresses }
    }
}

/// Writes guest memory, which nobody changes meanwhile, to an empty file.
///
/// # Errors
/// The file takes no more, or memory cannot be read.
pub fn write(
    memory: &GuestMemory,
    extents: &[Extent],
    id: SnapshotId,
    file: &File,
) -> Result<Vec<SavedRegion>, ImageError> {
    let mut regions = Vec::new();
    let mut at = 0;
    for Extent { addresses, content } in extents {
        let mut runs = Vec::new();
        for content in content {
            write_range(memory, addresses.start, content, file, at, &mut runs)?;
        }
        at += addresses.end - addresses.start;
        regions.push(SavedRegion { addresses: addresses.clone(), runs });
    }
    file.write_all_at(&trailer(id), at)?;
    limit_runs(&mut regions);
    Ok(regions)
}

/// Writes the pages of a range of addresses to the file, in which what begins at `start` is at `base`, and
/// adds them to the runs, in offsets from `start`.
fn write_range(
    memory: &GuestMemory,
    start: u64,
    content: &Range<u64>,
    file: &File,
    base: u64,
    runs: &mut Vec<Range<u64>>,
) -> Result<(), ImageError> {
    let mut buffer = vec![0; CHUNK];
    let mut offset = content.start - start;
    let end = content.end - start;
    while offset < end {
        let length = usize::try_from(end - offset).map_or(CHUNK, |left| left.min(CHUNK));
        let Some(buffer) = buffer.get_mut(..length) else { break };
        memory.read_slice(buffer, GuestAddress(start + offset))?;
        for run in pages_in_use(buffer) {
            let bytes = buffer.get(run.clone()).unwrap_or_default();
            file.write_all_at(bytes, base + offset + run.start as u64)?;
            let run = offset + run.start as u64..offset + run.end as u64;
            match runs.last_mut() {
                Some(last) if run.start - last.end <= LEAST_GAP => last.end = run.end,
                _ => runs.push(run),
            }
        }
        offset += length as u64;
    }
    Ok(())
}

/// The pages of a buffer that are not all zero, neighbours together.
fn pages_in_use(buffer: &[u8]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (start, page) in (0..).step_by(PAGE).zip(buffer.chunks(PAGE)) {
        if is_zero(page) {
            continue;
        }
        let end = start + page.len();
        match runs.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => runs.push(start..end),
        }
    }
    runs
}

fn is_zero(page: &[u8]) -> bool {
    let (words, rest) = page.as_chunks::<8>();
    words.iter().all(|word| u64::from_ne_bytes(*word) == 0) && rest.iter().all(|byte| *byte == 0)
}

/// Joins the runs that are nearest to each other until there are few enough; what lies between is a hole in
/// the file and reads as zero.
fn limit_runs(regions: &mut [SavedRegion]) {
    let mut gap = LEAST_GAP;
    while regions.iter().map(|region| region.runs.len()).sum::<usize>() > MAX_RUNS {
        gap = gap.saturating_mul(2);
        for region in &mut *regions {
            region.runs.dedup_by(|next, last| {
                let near = next.start - last.end <= gap;
                if near {
                    last.end = next.end;
                }
                near
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::btree_set, prelude::*};

    use super::*;

    const PAGES: u64 = 64;
    const HIGH: u64 = 1 << 32;
    const ID: SnapshotId = [7; 16];

    fn memory() -> GuestMemory {
        let size = PAGES as usize * PAGE;
        GuestMemory::from_ranges(&[(GuestAddress(0), size), (GuestAddress(HIGH), size)]).unwrap()
    }

    fn wanted() -> [Range<u64>; 2] {
        let size = PAGES * PAGE as u64;
        [0..size, HIGH..HIGH + size]
    }

    fn extents() -> [Extent; 2] {
        wanted().map(Extent::whole)
    }

    fn written() -> (File, Vec<SavedRegion>) {
        let memory = memory();
        memory.write_obj(1u8, GuestAddress(5 * PAGE as u64 + 4095)).unwrap();
        memory.write_obj(2u8, GuestAddress(HIGH + 40 * PAGE as u64)).unwrap();
        let file = tempfile::tempfile().unwrap();
        let regions = write(&memory, &extents(), ID, &file).unwrap();
        (file, regions)
    }

    #[test]
    fn a_file_holds_what_is_not_zero() {
        let (file, regions) = written();
        let page = PAGE as u64;
        assert_eq!(regions[0].runs, std::slice::from_ref(&(5 * page..6 * page)));
        assert_eq!(regions[1].runs, std::slice::from_ref(&(40 * page..41 * page)));
        let mut byte = [0];
        file.read_exact_at(&mut byte, 6 * page - 1).unwrap();
        assert_eq!(byte, [1]);
        file.read_exact_at(&mut byte, (PAGES + 40) * page).unwrap();
        assert_eq!(byte, [2]);
        Image::new(&file, ID, &regions, &wanted()).unwrap();
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let (file, regions) = written();
        let other = Image::new(&file, [8; 16], &regions, &wanted());
        assert!(matches!(other, Err(ImageError::Other)));
        let smaller = Image::new(&file, ID, &regions, &wanted()[..1]);
        assert!(matches!(smaller, Err(ImageError::Regions { .. })));
        let backwards = Range { start: 8192, end: 4096 };
        for run in [1..4096, 4096..4096, 0..(PAGES + 1) * PAGE as u64, backwards] {
            let mut damaged = regions.clone();
            damaged[0].runs = vec![run];
            assert!(matches!(Image::new(&file, ID, &damaged, &wanted()), Err(ImageError::Layout(_))));
        }
        let mut backwards = regions.clone();
        backwards[0].runs = vec![8192..12288, 0..4096];
        assert!(matches!(Image::new(&file, ID, &backwards, &wanted()), Err(ImageError::Layout(_))));
        file.set_len(100).unwrap();
        assert!(matches!(Image::new(&file, ID, &regions, &wanted()), Err(ImageError::Length { .. })));
    }

    #[test]
    fn what_cannot_have_content_is_not_looked_at() {
        let (memory, page) = (memory(), PAGE as u64);
        for at in [3, 10, 20] {
            memory.write_obj(1u8, GuestAddress(HIGH + at * page)).unwrap();
        }
        let content = vec![HIGH + 2 * page..HIGH + 4 * page, HIGH + 20 * page..HIGH + 30 * page];
        let extents = [Extent { addresses: HIGH..HIGH + 40 * page, content }];
        let file = tempfile::tempfile().unwrap();
        let regions = write(&memory, &extents, ID, &file).unwrap();
        assert_eq!(regions[0].runs, [3 * page..4 * page, 20 * page..21 * page]);
        Image::new(&file, ID, &regions, std::slice::from_ref(&(HIGH..HIGH + 40 * page))).unwrap();
    }

    proptest! {
        #[test]
        fn every_page_in_use_is_in_a_run(pages in btree_set(0..PAGES, 0..20)) {
            let memory = memory();
            for page in &pages {
                memory.write_obj(1u8, GuestAddress(page * PAGE as u64)).unwrap();
            }
            let file = tempfile::tempfile().unwrap();
            let regions = write(&memory, &extents(), ID, &file).unwrap();
            for page in &pages {
                let at = page * PAGE as u64;
                prop_assert!(regions[0].runs.iter().any(|run| run.contains(&at)));
            }
            prop_assert!(regions[1].runs.is_empty());
            prop_assert!(Image::new(&file, ID, &regions, &wanted()).is_ok());
        }

        #[test]
        fn runs_become_few_and_lose_nothing(starts in btree_set(0..1u64 << 20, 0..9000)) {
            let runs: Vec<_> = starts.iter().map(|start| start * 4096..start * 4096 + 4096).collect();
            let mut regions = [SavedRegion { addresses: 0..1 << 32, runs: runs.clone() }];
            limit_runs(&mut regions);
            let joined = &regions[0].runs;
            prop_assert!(joined.len() <= MAX_RUNS);
            prop_assert!(regions[0].check().is_ok());
            for run in runs {
                let at = joined.partition_point(|joined| joined.end < run.end);
                prop_assert!(joined.get(at).is_some_and(|joined| joined.start <= run.start));
            }
        }
    }
}
