//! The memory that a VMM and its share server have in common: slots for requests and their replies.
//!
//! Either side may be in a stranger's hands: what lies in a slot is never looked at through a reference. Numbers
//! and names are copied out before they are checked; data goes by the kernel's hand from slot to file or back.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
};

use bulkhead_vmm_api::share::{AREA_SIZE, SLOT_SIZE};
use rustix::fs::{SealFlags, fcntl_get_seals};
use vm_memory::{FileOffset, GuestMemory as _, MmapRegion, Permissions, VolatileMemory, VolatileSlice};

use crate::devices::virtio::{device::GuestMemory, iovec::Buffer};

/// The mapped memory.
#[derive(Debug)]
pub struct Area(MmapRegion<()>);

/// One slot of it.
#[derive(Debug, Clone, Copy)]
pub struct Slot<'a>(VolatileSlice<'a>);

impl Area {
    /// Maps it.
    ///
    /// # Errors
    /// It is not sealed, so that it could vanish under its users, or not of its size.
    pub fn map(file: OwnedFd) -> io::Result<Self> {
        let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidInput, what.to_owned());
        let sealed = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        if !fcntl_get_seals(&file)?.contains(sealed) {
            return Err(invalid("the shared memory is not sealed"));
        }
        if rustix::fs::fstat(&file)?.st_size != AREA_SIZE as i64 {
            return Err(invalid("the shared memory has another size"));
        }
        let (protection, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_NORESERVE);
        MmapRegion::build(Some(FileOffset::new(File::from(file), 0)), AREA_SIZE, protection, flags)
            .map(Self)
            .map_err(io::Error::other)
    }

    /// A slot by its number; None where there is none.
    #[must_use]
    pub fn slot(&self, number: u32) -> Option<Slot<'_>> {
        let offset = (number as usize).checked_mul(SLOT_SIZE)?;
        self.0.get_slice(offset, SLOT_SIZE).ok().map(Slot)
    }
}

impl Slot<'_> {
    /// Copies bytes out, from `at` on. False where they are not all in the slot.
    pub fn read(&self, at: usize, bytes: &mut [u8]) -> bool {
        let part = self.0.subslice(at, bytes.len());
        part.is_ok_and(|part| part.copy_to(bytes) == bytes.len())
    }

    /// Copies bytes in, from `at` on. False where they do not fit.
    #[must_use]
    pub fn write(&self, at: usize, bytes: &[u8]) -> bool {
        self.0.subslice(at, bytes.len()).map(|part| part.copy_from(bytes)).is_ok()
    }

    /// Copies the beginning of guest buffers to the slot's beginning.
    #[must_use]
    pub fn copy_from_guest(&self, memory: &GuestMemory, buffers: &[Buffer], length: usize) -> bool {
        self.each_part(memory, buffers, length, |slot, guest| guest.copy_to_volatile_slice(slot))
    }

    /// Copies the slot's beginning to the beginning of guest buffers.
    #[must_use]
    pub fn copy_to_guest(&self, memory: &GuestMemory, buffers: &[Buffer], length: usize) -> bool {
        self.each_part(memory, buffers, length, |slot, guest| slot.copy_to_volatile_slice(guest))
    }

    /// Calls `copy` with each part of the slot and the guest memory that belongs to it. False where either is too
    /// short.
    fn each_part(
        &self,
        memory: &GuestMemory,
        buffers: &[Buffer],
        length: usize,
        copy: impl Fn(VolatileSlice<'_>, VolatileSlice<'_>),
    ) -> bool {
        let mut done = 0;
        for (address, count) in buffers {
            let wanted = (*count as usize).min(length - done);
            if wanted == 0 {
                break;
            }
            let Ok(parts) = memory.get_slices(*address, wanted, Permissions::ReadWrite) else { return false };
            for guest in parts {
                let Ok(guest) = guest else { return false };
                let Ok(slot) = self.0.subslice(done, guest.len()) else { return false };
                copy(slot, guest);
                done += guest.len();
            }
        }
        done == length
    }

    /// Fills it from `at` on with up to `length` bytes of a file: how many there were.
    ///
    /// # Errors
    /// The read failed, or `length` is more than the slot has.
    pub fn fill(&self, at: usize, length: usize, file: BorrowedFd<'_>, offset: u64) -> io::Result<usize> {
        self.transfer(at, length, offset, |part, length, offset| {
            // SAFETY: the range lies in the mapping, which `self` borrows; only the kernel writes to it.
            unsafe { libc::pread(file.as_raw_fd(), part.cast(), length, offset) }
        })
    }

    /// Writes `length` bytes of it, from `at` on, to a file at `offset`, or with `append` at its end: how many
    /// were taken.
    ///
    /// # Errors
    /// Not even the first was; or `length` is more than the slot has.
    pub fn store(
        &self,
        at: usize,
        length: usize,
        file: BorrowedFd<'_>,
        offset: u64,
        append: bool,
    ) -> io::Result<usize> {
        self.transfer(at, length, offset, |part, length, offset| {
            let part = libc::iovec { iov_base: part.cast(), iov_len: length };
            let flags = if append { libc::RWF_APPEND } else { 0 };
            // SAFETY: as in `fill`; the kernel only reads. On x86-64 all of the offset is in the fourth argument.
            let done = unsafe {
                libc::syscall(libc::SYS_pwritev2, file.as_raw_fd(), &raw const part, 1, offset, 0, flags)
            };
            isize::try_from(done).unwrap_or(-1)
        })
    }

    /// Repeats a call until all is done or it does nothing more.
    fn transfer(
        &self,
        at: usize,
        length: usize,
        offset: u64,
        call: impl Fn(*mut u8, usize, i64) -> isize,
    ) -> io::Result<usize> {
        let part = self.0.subslice(at, length).map_err(|_| io::ErrorKind::InvalidInput)?;
        let start = i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        let guard = part.ptr_guard_mut();
        let mut done = 0;
        while done < length {
            let offset = start.checked_add(done as i64).ok_or(io::ErrorKind::InvalidInput)?;
            match usize::try_from(call(guard.as_ptr().wrapping_add(done), length - done, offset)) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(_) => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    _ if done > 0 => break,
                    error => return Err(error),
                },
            }
        }
        Ok(done)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsFd;

    use bulkhead_vmm_api::share::SLOTS;
    use rustix::fs::{MemfdFlags, fcntl_add_seals, ftruncate, memfd_create};
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    /// As the daemon makes it.
    pub(crate) fn memory_file(size: usize) -> OwnedFd {
        let file = memfd_create("area", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&file, size as u64).unwrap();
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).unwrap();
        file
    }

    #[test]
    fn what_is_not_as_agreed_is_not_mapped() {
        assert!(Area::map(memory_file(AREA_SIZE)).is_ok());
        assert!(Area::map(memory_file(AREA_SIZE - 4096)).is_err());
        let open = memfd_create("area", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&open, AREA_SIZE as u64).unwrap();
        assert!(Area::map(open).is_err());
    }

    #[test]
    fn slots_end_where_they_end() {
        let area = Area::map(memory_file(AREA_SIZE)).unwrap();
        assert!(area.slot(SLOTS).is_none() && area.slot(u32::MAX).is_none());
        let slot = area.slot(SLOTS - 1).unwrap();
        assert!(slot.write(SLOT_SIZE - 3, b"abc") && !slot.write(SLOT_SIZE - 2, b"abc"));
        let mut bytes = [0; 3];
        assert!(slot.read(SLOT_SIZE - 3, &mut bytes) && !slot.read(usize::MAX, &mut bytes));
        assert_eq!(&bytes, b"abc");
        let mut zero = [9; 2];
        assert!(area.slot(SLOTS - 2).unwrap().read(SLOT_SIZE - 2, &mut zero));
        assert_eq!(zero, [0; 2]);
        let file = tempfile::tempfile().unwrap();
        assert!(slot.fill(SLOT_SIZE - 1, 2, file.as_fd(), 0).is_err());
        assert!(slot.store(0, SLOT_SIZE + 1, file.as_fd(), 0, false).is_err());
        assert!(slot.store(0, 1, file.as_fd(), u64::MAX, false).is_err());
    }

    #[test]
    fn data_goes_from_guest_to_file_and_back() {
        let area = Area::map(memory_file(AREA_SIZE)).unwrap();
        let slot = area.slot(2).unwrap();
        let memory = crate::devices::virtio::testing::memory();
        memory.write_slice(b"hello world", GuestAddress(0x1000)).unwrap();
        let buffers = [(GuestAddress(0x1000), 5), (GuestAddress(0x1006), 5)];
        assert!(slot.copy_from_guest(&memory, &buffers, 8));
        assert!(!slot.copy_from_guest(&memory, &buffers, 11));
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"> ").unwrap();
        assert_eq!(slot.store(0, 8, file.as_fd(), 0, true).unwrap(), 8);
        assert_eq!(slot.store(0, 1, file.as_fd(), 1, false).unwrap(), 1);
        let mut text = String::new();
        std::io::Seek::rewind(&mut file).unwrap();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, ">hhellowor");
        assert_eq!(slot.fill(100, 50, file.as_fd(), 3).unwrap(), 7);
        assert!(slot.write(0, b"HE"));
        assert!(slot.copy_to_guest(&memory, &buffers[..1], 2));
        let mut back = [0; 5];
        memory.read_slice(&mut back, GuestAddress(0x1000)).unwrap();
        assert_eq!(&back, b"HEllo");
    }
}
