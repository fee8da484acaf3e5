//! Gives parts of guest memory back to the host.
//!
//! The pages of the range are dropped (`MADV_DONTNEED`): the host has them back at once, and the guest finds
//! other content when it next looks. Which, depends on what the memory is:
//!
//! * anonymous: zeros;
//! * private over the file that a machine was restored from: what the file holds, which the guest had itself
//!   when it was saved. Its own copies are what is dropped; the file's pages are the page cache's, shared by
//!   all machines of that file.
//!
//! Either is sound, because the driver has promised not to rely on the content of what it gives away: of pages
//! in the balloon and of reported ones as long as `VIRTIO_BALLOON_F_PAGE_POISON` is not negotiated (virtio 1.3,
//! 5.5.6.1, 5.5.6.7; Linux does not report pages without it when it counts on their content), and of memory
//! that is unplugged (5.15.6). A driver that gives away what it needs hurts its own guest alone.
//!
//! Mapping fresh memory over the range instead would split the mapping each time, and a guest could exhaust
//! the process's number of mappings.

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::device::GuestMemory;

const PAGE: u64 = 4096;

/// Gives back every whole page of guest memory in `length` bytes at `start`; what is no memory is passed over.
/// How many bytes that were.
pub fn release(memory: &GuestMemory, start: GuestAddress, length: u64) -> u64 {
    let Some(first) = start.0.checked_next_multiple_of(PAGE) else { return 0 };
    let end = start.0.saturating_add(length) & !(PAGE - 1);
    let mut released = 0;
    for region in memory.iter() {
        let base = region.start_addr().0;
        let (from, to) = (first.max(base), end.min(base.saturating_add(region.len())));
        if from >= to {
            continue;
        }
        let (Ok(offset), Ok(size)) = (usize::try_from(from - base), usize::try_from(to - from)) else {
            continue;
        };
        // SAFETY: offset and size lie within the region, which is mapped for the process's life. Nothing in
        // this process holds a reference into guest memory, whose content may change at any time; the pages
        // stay mapped, and only their content becomes another.
        let result =
            unsafe { libc::madvise(region.as_ptr().wrapping_add(offset).cast(), size, libc::MADV_DONTNEED) };
        // Refused only for locked or device memory, of which there is none; then it stays where it is.
        if result == 0 {
            released += to - from;
        }
    }
    released
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::fd::AsRawFd};

    use vm_memory::{Bytes, GuestRegionMmap, MmapRegion};

    use super::*;

    fn byte(memory: &GuestMemory, address: u64) -> u8 {
        memory.read_obj(GuestAddress(address)).unwrap()
    }

    #[test]
    fn whole_pages_of_memory_alone_are_given_back() {
        let memory =
            GuestMemory::from_ranges(&[(GuestAddress(0), 0x4000), (GuestAddress(0x8000), 0x4000)]).unwrap();
        let fill = || {
            memory.write_slice(&[7; 0x4000], GuestAddress(0)).unwrap();
            memory.write_slice(&[7; 0x4000], GuestAddress(0x8000)).unwrap();
        };
        fill();
        assert_eq!(release(&memory, GuestAddress(0x1000), 0x1000), 0x1000);
        assert_eq!([0xfff, 0x1000, 0x1fff, 0x2000].map(|at| byte(&memory, at)), [7, 0, 0, 7]);
        // Less than a page, and not at its beginning.
        assert_eq!(release(&memory, GuestAddress(0x2000), 0xfff), 0);
        assert_eq!(release(&memory, GuestAddress(0x2001), 0x1fff), 0x1000);
        assert_eq!([0x2000, 0x2fff, 0x3000].map(|at| byte(&memory, at)), [7, 7, 0]);
        // Over the hole, and beyond the end.
        fill();
        assert_eq!(release(&memory, GuestAddress(0x3000), u64::MAX), 0x5000);
        assert_eq!([0x2fff, 0x3000, 0x8000, 0xbfff].map(|at| byte(&memory, at)), [7, 0, 0, 0]);
        assert_eq!(release(&memory, GuestAddress(u64::MAX), 0x1000), 0);
        assert_eq!(release(&memory, GuestAddress(u64::MAX - 0x1fff), u64::MAX), 0);
    }

    #[test]
    fn a_copy_over_a_file_is_dropped_and_the_file_s_content_is_back() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[3; 0x2000]).unwrap();
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let address = unsafe {
            libc::mmap(std::ptr::null_mut(), 0x2000, protection, libc::MAP_PRIVATE, file.as_raw_fd(), 0)
        };
        assert_ne!(address, libc::MAP_FAILED);
        // SAFETY: the mapping was just made with this size and protection, and is never unmapped.
        let region =
            unsafe { MmapRegion::build_raw(address.cast(), 0x2000, protection, libc::MAP_PRIVATE) }.unwrap();
        let region = GuestRegionMmap::new(region, GuestAddress(0)).unwrap();
        let memory = GuestMemory::from_regions(vec![region]).unwrap();
        memory.write_slice(&[9; 0x2000], GuestAddress(0)).unwrap();
        assert_eq!(release(&memory, GuestAddress(0), 0x1000), 0x1000);
        assert_eq!((byte(&memory, 0), byte(&memory, 0x1000)), (3, 9));
    }
}
