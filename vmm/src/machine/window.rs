//! The window of a machine's file system device, as KVM and the devices have it.
//!
//! ```text
//!   … │ region of virtio-mem │ window: slot 8192, read-only
//! ```
//!
//! Devices reach it as they reach memory: a guest may write a file to its disk out of the window, or send it. It is no
//! part of what is saved.

use std::{ops::Range, sync::Arc};

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vm_memory::{GuestAddress, GuestRegionMmap, MmapRegion};

use super::{KvmError, builder::BuildError, memory::MemoryError};
use crate::{devices::virtio::device::GuestMemory, window::Window};

/// Above those of RAM, and of what is plugged.
const SLOT: u32 = 8192;

/// Reserves the window and gives it to KVM.
///
/// # Errors
/// There are no such addresses, or KVM refuses the slot.
pub fn build(vm: &VmFd, range: Range<u64>) -> Result<Arc<Window>, BuildError> {
    let size = range.end - range.start;
    let window = Window::reserve(range.start, size).map_err(|source| MemoryError::Map { size, source })?;
    let slot = kvm_userspace_memory_region {
        slot: SLOT,
        flags: KVM_MEM_READONLY,
        guest_phys_addr: window.guest(),
        memory_size: window.size(),
        userspace_addr: window.host() as u64,
    };
    // SAFETY: the window's addresses stay mapped for as long as the process lives, and no other slot has them.
    unsafe { vm.set_user_memory_region(slot) }.map_err(KvmError::of("KVM_SET_USER_MEMORY_REGION"))?;
    Ok(Arc::new(window))
}

/// Memory with the window: what devices reach.
///
/// # Errors
/// The window lies where memory is.
pub fn join(memory: &GuestMemory, window: &Window) -> Result<GuestMemory, MemoryError> {
    let layout = |error: &dyn std::fmt::Display| MemoryError::Layout(error.to_string());
    let size = usize::try_from(window.size()).map_err(|error| layout(&error))?;
    // SAFETY: the window's addresses stay mapped until the process ends. What devices write there goes to a page of this
    // process's own (`crate::window`).
    let mapping = unsafe {
        MmapRegion::build_raw(window.host(), size, libc::PROT_READ, libc::MAP_PRIVATE | libc::MAP_NORESERVE)
    }
    .map_err(|error| layout(&error))?;
    let region = GuestRegionMmap::new(mapping, GuestAddress(window.guest()))
        .ok_or_else(|| MemoryError::Layout("the address space is too small".to_owned()))?;
    memory.insert_region(Arc::new(region)).map_err(|error| layout(&error))
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::fd::AsFd, os::unix::fs::FileExt};

    use super::*;
    use crate::{
        devices::virtio::iovec::{IoVec, copy_in, copy_out},
        machine::memory,
        window::GRANULE,
    };

    #[test]
    fn buffers_in_the_window_are_read_and_never_written_to_a_file() {
        let memory = memory::map(std::slice::from_ref(&(0..2 << 20))).unwrap();
        let guest = 1 << 30;
        let window = Window::reserve(guest, 2 * GRANULE).unwrap();
        let reachable = join(&memory, &window).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 8192]).unwrap();
        window.map(0, file.as_fd(), 0, 8192).unwrap();

        // To a disk or a socket, by the kernel; and by a device that looks at it.
        let buffers = [(GuestAddress(guest), 8192)];
        let disk = tempfile::tempfile().unwrap();
        IoVec::new(&reachable, &buffers, 0, 8192).unwrap().write_all_at(disk.as_fd(), 0).unwrap();
        let mut bytes = [0; 8192];
        disk.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes, [7; 8192]);
        let mut bytes = [0; 100];
        assert!(copy_out(&reachable, &buffers, 4000, &mut bytes));
        assert_eq!(bytes, [7; 100]);

        // The kernel does not write there; a device writes to a page of its own.
        assert!(IoVec::new(&reachable, &buffers, 0, 16).unwrap().read_exact_at(disk.as_fd(), 0).is_err());
        assert!(copy_in(&reachable, &buffers, 4000, &[9; 200]));
        let mut bytes = [0; 8192];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes, [7; 8192]);
        // It is no part of what a kernel is loaded to, and lies nowhere else.
        assert!(join(&memory, &Window::reserve(0, GRANULE).unwrap()).is_err());
    }
}
