//! Linux's 64-bit boot protocol (Documentation/arch/x86/boot.rst, "64-bit boot protocol"): the kernel is
//! entered in long mode with RSI at `boot_params`, which say where command line, initramfs and memory are.

use std::{
    fs::File,
    io::{Seek, SeekFrom},
    ops::Range,
};

use linux_loader::loader::{
    KernelLoader,
    bootparam::{boot_e820_entry, boot_params},
    elf::Elf,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, ReadVolatile};

use super::layout;
use crate::devices::virtio::device::GuestMemory;

const E820_RAM: u32 = 1;
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;
const LOADER_TYPE_UNDEFINED: u8 = 0xff;
const KERNEL_ALIGNMENT: u32 = 0x100_0000;
const PAGE: u64 = 0x1000;

/// Why a kernel cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// It is no uncompressed ELF for x86-64, or does not fit into memory.
    #[error("kernel: {0}")]
    Kernel(String),
    /// The initramfs does not fit between kernel and end of low memory, or cannot be read.
    #[error("initramfs: {0}")]
    Initramfs(String),
    /// The command line is too long or not plain text.
    #[error("command line: {0}")]
    Cmdline(String),
    /// A table could not be written to guest memory.
    #[error("guest memory: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// Loads kernel, initramfs and command line, and writes the boot parameters.
///
/// # Errors
/// See [`BootError`].
pub fn load(
    memory: &GuestMemory,
    kernel: &mut File,
    initramfs: Option<&mut File>,
    cmdline: &str,
) -> Result<GuestAddress, BootError> {
    let loaded = Elf::load(memory, None, kernel, Some(GuestAddress(layout::HIGH_RAM)))
        .map_err(|error| BootError::Kernel(error.to_string()))?;
    let ranges: Vec<_> = memory.iter().map(region_range).collect();
    let low_end = ranges.first().map_or(0, |range| range.end);
    let initramfs = match initramfs {
        Some(file) => load_initramfs(memory, file, loaded.kernel_end..low_end)?,
        None => 0..0,
    };
    write_cmdline(memory, cmdline)?;
    write_boot_params(memory, &ranges, cmdline.len(), &initramfs)?;
    Ok(loaded.kernel_load)
}

fn region_range(region: &impl vm_memory::GuestMemoryRegion) -> Range<u64> {
    let start = region.start_addr().0;
    start..start + region.len()
}

/// Puts the initramfs at the end of `free`.
fn load_initramfs(memory: &GuestMemory, file: &mut File, free: Range<u64>) -> Result<Range<u64>, BootError> {
    let io_error = |error: std::io::Error| BootError::Initramfs(error.to_string());
    let size = file.seek(SeekFrom::End(0)).map_err(io_error)?;
    file.rewind().map_err(io_error)?;
    let start = free
        .end
        .checked_sub(size)
        .map(|start| start & !(PAGE - 1))
        .filter(|start| *start >= free.start.next_multiple_of(PAGE))
        .ok_or_else(|| BootError::Initramfs(format!("{size} bytes do not fit into guest memory")))?;
    let mut at = start;
    while at < start + size {
        let chunk = usize::try_from(start + size - at).unwrap_or(usize::MAX);
        let mut slice = memory.get_slice(GuestAddress(at), chunk)?;
        let read = file.read_volatile(&mut slice).map_err(|error| BootError::Initramfs(error.to_string()))?;
        if read == 0 {
            return Err(BootError::Initramfs("the file became shorter".to_owned()));
        }
        at += read as u64;
    }
    Ok(start..start + size)
}

fn write_cmdline(memory: &GuestMemory, cmdline: &str) -> Result<(), BootError> {
    if cmdline.len() >= layout::CMDLINE_SIZE {
        return Err(BootError::Cmdline(format!(
            "{} bytes, the kernel takes {}",
            cmdline.len(),
            layout::CMDLINE_SIZE - 1
        )));
    }
    if !cmdline.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic()) {
        return Err(BootError::Cmdline("not printable ASCII".to_owned()));
    }
    memory.write_slice(cmdline.as_bytes(), GuestAddress(layout::CMDLINE))?;
    memory.write_obj(0u8, GuestAddress(layout::CMDLINE + cmdline.len() as u64))?;
    Ok(())
}

fn write_boot_params(
    memory: &GuestMemory,
    ranges: &[Range<u64>],
    cmdline_size: usize,
    initramfs: &Range<u64>,
) -> Result<(), BootError> {
    let mut params = boot_params::default();
    params.hdr.type_of_loader = LOADER_TYPE_UNDEFINED;
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER_MAGIC;
    params.hdr.kernel_alignment = KERNEL_ALIGNMENT;
    params.hdr.cmd_line_ptr = layout::CMDLINE as u32;
    params.hdr.cmdline_size = cmdline_size as u32;
    // Below the device gap, so these fit 32 bits.
    params.hdr.ramdisk_image = initramfs.start as u32;
    params.hdr.ramdisk_size = (initramfs.end - initramfs.start) as u32;
    for (entry, range) in params.e820_table.iter_mut().zip(e820(ranges)) {
        *entry = boot_e820_entry { addr: range.start, size: range.end - range.start, r#type: E820_RAM };
        params.e820_entries += 1;
    }
    // SAFETY: `boot_params` is plain data of the boot protocol's layout, without padding that matters: it was
    // zeroed whole by `default`. The slice lives no longer than `params`.
    let bytes = unsafe {
        std::slice::from_raw_parts((&raw const params).cast::<u8>(), std::mem::size_of::<boot_params>())
    };
    memory.write_slice(bytes, GuestAddress(layout::ZERO_PAGE))?;
    Ok(())
}

/// What the kernel may use as memory: all but the area of the MP table and the ROMs.
fn e820(ranges: &[Range<u64>]) -> Vec<Range<u64>> {
    let above = ranges.iter().map(|range| range.start.max(layout::HIGH_RAM)..range.end);
    std::iter::once(0..layout::MPTABLE).chain(above).collect()
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn memory(mib: u64) -> GuestMemory {
        let ranges: Vec<_> = layout::memory_ranges(mib << 20)
            .into_iter()
            .map(|range| (GuestAddress(range.start), (range.end - range.start) as usize))
            .collect();
        GuestMemory::from_ranges(&ranges).unwrap()
    }

    /// An ELF of one segment at 16 MiB.
    fn kernel(size: u64) -> File {
        let mut elf = Vec::new();
        elf.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
        elf.extend([2u16, 62].iter().flat_map(|half| half.to_le_bytes()));
        elf.extend(1u32.to_le_bytes());
        elf.extend([0x100_0000u64, 64, 0].iter().flat_map(|word| word.to_le_bytes()));
        elf.extend(0u32.to_le_bytes());
        elf.extend([64u16, 56, 1, 0, 0, 0].iter().flat_map(|half| half.to_le_bytes()));
        elf.extend([1u32, 5].iter().flat_map(|word| word.to_le_bytes()));
        elf.extend(
            [120u64, 0x100_0000, 0x100_0000, 4, size, 4096].iter().flat_map(|word| word.to_le_bytes()),
        );
        elf.extend(b"\xf4\xf4\xf4\xf4");
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&elf).unwrap();
        file
    }

    #[test]
    fn kernel_initramfs_and_command_line_are_found_again() {
        let memory = memory(64);
        let mut initramfs = tempfile::tempfile().unwrap();
        initramfs.write_all(&[7; 5000]).unwrap();
        let entry = load(&memory, &mut kernel(4), Some(&mut initramfs), "quiet").unwrap();
        assert_eq!(entry, GuestAddress(0x100_0000));
        let mut code = [0; 4];
        memory.read_slice(&mut code, entry).unwrap();
        assert_eq!(code, [0xf4; 4]);
        let word = |offset: u64| memory.read_obj::<u32>(GuestAddress(layout::ZERO_PAGE + offset)).unwrap();
        assert_eq!((word(0x218), word(0x21c)), ((64 << 20) - 8192, 5000));
        assert_eq!(memory.read_obj::<u8>(GuestAddress(u64::from(word(0x218)) + 4999)).unwrap(), 7);
        let mut cmdline = [0xff; 6];
        memory.read_slice(&mut cmdline, GuestAddress(u64::from(word(0x228)))).unwrap();
        assert_eq!(&cmdline, b"quiet\0");
        assert_eq!(memory.read_obj::<u8>(GuestAddress(layout::ZERO_PAGE + 0x1e8)).unwrap(), 2);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let memory = memory(32);
        let mut initramfs = tempfile::tempfile().unwrap();
        initramfs.write_all(&vec![0; 8192]).unwrap();
        let result = load(&memory, &mut kernel((16 << 20) - 4096), Some(&mut initramfs), "");
        assert!(matches!(result, Err(BootError::Initramfs(_))), "{result:?}");
        let long = "x".repeat(layout::CMDLINE_SIZE);
        assert!(matches!(load(&memory, &mut kernel(4), None, &long), Err(BootError::Cmdline(_))));
        assert!(matches!(load(&memory, &mut kernel(4), None, "a\nb"), Err(BootError::Cmdline(_))));
        assert!(matches!(load(&memory, &mut initramfs, None, ""), Err(BootError::Kernel(_))));
    }

    #[test]
    fn memory_above_the_gap_is_told() {
        let usable = e820(&layout::memory_ranges(5 << 30));
        assert_eq!(usable.len(), 3);
        assert_eq!(usable[1], layout::HIGH_RAM..layout::MMIO_GAP.start);
        assert_eq!(usable[2].start, layout::MMIO_GAP.end);
    }
}
