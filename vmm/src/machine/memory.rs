//! Guest memory: private, anonymous, in huge pages where the host has them; or what a snapshot holds, mapped
//! from its memory file.
//!
//! A boot touches most of its memory once, and each 4 KiB page touched is an exit and a fault on the host;
//! with 2 MiB pages that is a quarter of the boot gone. For that a mapping must begin at a 2 MiB boundary,
//! which mmap does not promise.
//!
//! A restored machine reads the pages of the file that the host has cached, as do all others that were
//! restored from it, and gets a page of its own where it writes. It gets no huge pages: each would be 2 MiB
//! of its own for a few bytes written.

use std::{fs::File, io, ops::Range};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress, MmapRegion,
    mmap::MmapRegionError,
};

use super::{KvmError, snapshot::image::Image};
use crate::devices::virtio::device::GuestMemory;

const HUGE_PAGE: usize = 2 << 20;

type GuestRegionMmap = vm_memory::GuestRegionMmap<()>;

/// Why there is no guest memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// It cannot be mapped.
    #[error("cannot map {size} bytes: {source}")]
    Map {
        /// Bytes wanted.
        size: u64,
        /// The cause.
        source: io::Error,
    },
    /// The regions do not fit together.
    #[error("guest memory layout: {0}")]
    Layout(String),
}

/// Maps guest memory at the given guest addresses.
///
/// # Errors
/// See [`MemoryError`].
pub fn map(ranges: &[Range<u64>]) -> Result<GuestMemory, MemoryError> {
    let regions =
        ranges.iter().map(|range| region(range, Advice::LinuxHugepage)).collect::<Result<_, _>>()?;
    GuestMemory::from_regions(regions).map_err(|error| MemoryError::Layout(error.to_string()))
}

/// Maps guest memory as a snapshot has it. `plugged` is the region in which memory is plugged: the snapshot has
/// as much of it as was usable.
///
/// # Errors
/// See [`MemoryError`].
pub fn restore(image: &Image<'_>, plugged: Option<&Range<u64>>) -> Result<GuestMemory, MemoryError> {
    let is_plugged = |range: &Range<u64>| plugged.is_some_and(|plugged| plugged.start == range.start);
    let mut regions = Vec::new();
    let mut base = 0;
    for saved in image.regions {
        let (range, huge) = match plugged {
            Some(plugged) if is_plugged(&saved.addresses) => (plugged, Advice::LinuxHugepage),
            _ => (&saved.addresses, Advice::LinuxNoHugepage),
        };
        let region = region(range, huge)?;
        for run in &saved.runs {
            let size = run.end - run.start;
            let error = |source| MemoryError::Map { size, source };
            let offset = MemoryRegionAddress(run.start);
            let bytes = usize::try_from(size).map_err(|error| MemoryError::Layout(error.to_string()))?;
            let target =
                region.get_host_address(offset).map_err(|_| error(io::ErrorKind::InvalidInput.into()))?;
            if run.end > region.len() {
                return Err(error(io::ErrorKind::InvalidInput.into()));
            }
            map_file(target, bytes, image.file, base + run.start).map_err(error)?;
        }
        base += saved.size();
        regions.push(region);
    }
    if let Some(plugged) = plugged
        && !image.regions.iter().any(|saved| is_plugged(&saved.addresses))
    {
        regions.push(region(plugged, Advice::LinuxHugepage)?);
    }
    GuestMemory::from_regions(regions).map_err(|error| MemoryError::Layout(error.to_string()))
}

/// The memory without the region in which more is plugged: what a guest boots with.
///
/// # Errors
/// There is no such region.
pub fn without(memory: &GuestMemory, plugged: Option<&Range<u64>>) -> Result<GuestMemory, MemoryError> {
    let Some(Range { start, end }) = plugged else { return Ok(memory.clone()) };
    memory
        .remove_region(GuestAddress(*start), end - start)
        .map(|(rest, _)| rest)
        .map_err(|error| MemoryError::Layout(error.to_string()))
}

fn region(range: &Range<u64>, huge: Advice) -> Result<GuestRegionMmap, MemoryError> {
    let size = range.end - range.start;
    let bytes = usize::try_from(size).map_err(|error| MemoryError::Layout(error.to_string()))?;
    let mapping = map_region(bytes, huge).map_err(|source| MemoryError::Map { size, source })?;
    GuestRegionMmap::new(mapping, GuestAddress(range.start))
        .ok_or_else(|| MemoryError::Layout("the address space is too small".to_owned()))
}

/// Puts a part of a file, copied where it is written to, in place of guest memory that nobody uses yet.
fn map_file(target: *mut u8, size: usize, file: &File, offset: u64) -> io::Result<()> {
    let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::NORESERVE);
    // SAFETY: [target, target + size) lies in a region of guest memory, as the callers checked, which is
    // mapped for the process's life and to which nothing refers but as guest memory, through raw pointers:
    // whatever is mapped there is only bytes.
    unsafe { mmap(target.cast(), size, protection, flags | MapFlags::FIXED, file, offset) }?;
    Ok(())
}

/// Gives the memory to KVM: slot numbers are the regions' indices.
///
/// # Errors
/// KVM refuses a slot.
pub fn register(vm: &VmFd, memory: &GuestMemory) -> Result<(), KvmError> {
    for (slot, region) in (0..).zip(memory.iter()) {
        let slot = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the region is mapped for as long as the process lives (see `map_region`), and slots do not
        // overlap since regions do not.
        unsafe { vm.set_user_memory_region(slot) }.map_err(KvmError::of("KVM_SET_USER_MEMORY_REGION"))?;
    }
    Ok(())
}

/// Maps `size` bytes at a huge page's boundary. The mapping is never unmapped: devices and KVM use it until
/// the process, which is one machine, ends.
fn map_region(size: usize, huge: Advice) -> io::Result<MmapRegion> {
    let reserved = size.checked_add(HUGE_PAGE).ok_or(io::ErrorKind::InvalidInput)?;
    let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::NORESERVE);
    // SAFETY: a new mapping at an address of the kernel's choice touches no memory that is in use.
    let base = unsafe { mmap_anonymous(std::ptr::null_mut(), reserved, protection, flags) }?;
    let before = base.cast::<u8>().align_offset(HUGE_PAGE);
    let start = base.wrapping_byte_add(before);
    let after = reserved - before - size;
    // SAFETY: both parts lie in the mapping just made, outside of [start, start + size), and nothing points
    // into them. `size` is a multiple of the page size, as is `before`.
    unsafe {
        if before > 0 {
            munmap(base, before)?;
        }
        if after > 0 {
            munmap(start.wrapping_byte_add(size), after)?;
        }
    }
    // SAFETY: the range is the mapping just made; advice does not change its content. A kernel without huge
    // pages refuses it, and then there are none.
    let _ = unsafe { madvise(start, size, huge) };
    // SAFETY: the range is mapped readable and writable, and stays so until the process ends.
    unsafe {
        MmapRegion::build_raw(
            start.cast(),
            size,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
        )
    }
    .map_err(|error| match error {
        MmapRegionError::Mmap(error) => error,
        other => io::Error::other(other.to_string()),
    })
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn regions_are_aligned_and_usable() {
        let memory = map(&[0..(3 << 20), (1 << 32)..(1 << 32) + (5 << 20)]).unwrap();
        for region in memory.iter() {
            assert!((region.as_ptr() as usize).is_multiple_of(HUGE_PAGE));
        }
        for address in [0, (3 << 20) - 8, 1 << 32, (1 << 32) + (5 << 20) - 8] {
            memory.write_obj(0x1234u64, GuestAddress(address)).unwrap();
            assert_eq!(memory.read_obj::<u64>(GuestAddress(address)).unwrap(), 0x1234);
        }
        assert!(memory.write_obj(0u64, GuestAddress(3 << 20)).is_err());
    }

    #[test]
    fn more_than_an_address_space_is_refused() {
        assert!(matches!(map(std::slice::from_ref(&(0..u64::MAX - 4095))), Err(MemoryError::Map { .. })));
    }
}
