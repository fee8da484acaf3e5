//! Physical memory, and what lies where in it.
//!
//! ```text
//!  0 … 1 MiB   the VMM's tables; 0x8000: where other processors begin
//!  2 MiB       this image, its stacks and page tables
//!  8 MiB       rings, 64 KiB for each queue of each device
//!  16 MiB      buffers
//!  24 MiB      indirect tables
//! ```
//!
//! These functions are safe to call by decree: the machine runs nothing but this program, and whoever writes over
//! its own image only ends the machine that it attacks.

use core::ptr;

/// Where rings begin.
pub const RINGS: u64 = 8 << 20;
/// Address space for one ring.
pub const RING_SPACING: u64 = 0x1_0000;
/// Where buffers begin.
pub const BUFFERS: u64 = 16 << 20;
/// Where indirect tables lie.
pub const INDIRECT: u64 = 24 << 20;
/// Where the VMM's device windows begin, a page each.
pub const WINDOWS: u64 = 0xd000_0000;

/// Reads a value, from memory or from a device.
#[must_use]
pub fn read<T: Copy>(address: u64) -> T {
    // SAFETY: all physical addresses are mapped, and nothing else runs here (see the module's words). Unaligned
    // reads are what x86 allows; where the address is one, the instruction is the plain one all the same.
    unsafe { ptr::read_unaligned(address as *const T) }
}

/// Writes plain memory.
pub fn write<T: Copy>(address: u64, value: T) {
    // SAFETY: as for `read`.
    unsafe { ptr::write_unaligned(address as *mut T, value) }
}

/// Reads a 16-bit value that a device or another processor changes.
#[must_use]
pub fn volatile16(address: u64) -> u16 {
    // SAFETY: as for `read`; rings are aligned.
    unsafe { ptr::read_volatile(address as *const u16) }
}

/// Writes a 16-bit value that a device or another processor reads, after everything written before.
pub fn publish16(address: u64, value: u16) {
    core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
    // SAFETY: as for `read`; rings are aligned.
    unsafe { ptr::write_volatile(address as *mut u16, value) }
    core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
}

/// Writes bytes.
pub fn put(address: u64, bytes: &[u8]) {
    // SAFETY: as for `read`; the source is a slice of this program, the target is not.
    unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), address as *mut u8, bytes.len()) }
}

/// Fills memory.
pub fn fill(address: u64, length: u64, byte: u8) {
    // SAFETY: as for `read`.
    unsafe { ptr::write_bytes(address as *mut u8, byte, length as usize) }
}
