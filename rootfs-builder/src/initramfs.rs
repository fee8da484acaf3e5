//! The initramfs: the guest agent as `/init`, and the few directories it mounts on.
//!
//! A cpio archive in the "newc" form (Linux `Documentation/driver-api/early-userspace/buffer-format.rst`):
//! for each entry a header of `070701` and thirteen 8-digit hexadecimal numbers, the name, the data, each
//! padded to 4 bytes; an entry named `TRAILER!!!` ends it. It is not compressed: the guest would pay for
//! decompressing at every boot. The bytes depend on the agent's bytes only.

use std::io::{self, Write};

/// The largest agent in bytes. The archive lies in guest memory twice while the kernel unpacks it.
pub const MAX_AGENT: usize = 32 << 20;

/// Why an initramfs could not be written.
#[derive(Debug, thiserror::Error)]
pub enum InitramfsError {
    /// Not something that the kernel could start with nothing else there.
    #[error("the agent is not a static x86-64 ELF executable: {0}")]
    NotStatic(&'static str),
    /// Over [`MAX_AGENT`].
    #[error("the agent has {0} bytes, over the limit of {MAX_AGENT}")]
    TooBig(usize),
    /// Writing failed.
    #[error("the initramfs cannot be written: {0}")]
    Io(#[from] io::Error),
}

const DIRECTORIES: [&str; 5] = ["dev", "proc", "root", "run", "sys"];

const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;
const S_IFCHR: u32 = 0o020_000;

/// Writes the archive for an agent's bytes.
///
/// # Errors
/// [`InitramfsError`].
pub fn write(agent: &[u8], out: &mut dyn Write) -> Result<(), InitramfsError> {
    if agent.len() > MAX_AGENT {
        return Err(InitramfsError::TooBig(agent.len()));
    }
    check_static(agent)?;
    let mut archive = Archive { out, inode: 0 };
    for name in DIRECTORIES {
        archive.entry(&Entry { name, mode: S_IFDIR | 0o755, links: 2, device: (0, 0), data: &[] })?;
    }
    // The kernel opens it as the first process's stdio before anything is mounted.
    let console = Entry { name: "dev/console", mode: S_IFCHR | 0o600, links: 1, device: (5, 1), data: &[] };
    archive.entry(&console)?;
    archive.entry(&Entry { name: "init", mode: S_IFREG | 0o755, links: 1, device: (0, 0), data: agent })?;
    archive.entry(&Entry { name: "TRAILER!!!", mode: 0, links: 1, device: (0, 0), data: &[] })?;
    Ok(())
}

struct Entry<'a> {
    name: &'a str,
    mode: u32,
    links: u32,
    device: (u32, u32),
    data: &'a [u8],
}

struct Archive<'a> {
    out: &'a mut dyn Write,
    inode: u32,
}

impl Archive<'_> {
    fn entry(&mut self, entry: &Entry<'_>) -> io::Result<()> {
        self.inode += 1;
        let size = u32::try_from(entry.data.len()).map_err(io::Error::other)?;
        let name_size = u32::try_from(entry.name.len() + 1).map_err(io::Error::other)?;
        let (major, minor) = entry.device;
        // inode, mode, uid, gid, links, mtime, size, device of the file system (two), rdev (two), name, sum
        let numbers = [self.inode, entry.mode, 0, 0, entry.links, 0, size, 0, 0, major, minor, name_size, 0];
        let mut header = String::from("070701");
        for number in numbers {
            header.push_str(&format!("{number:08X}"));
        }
        let mut head = header.into_bytes();
        head.extend(entry.name.as_bytes());
        head.push(0);
        pad(&mut head);
        self.out.write_all(&head)?;
        self.out.write_all(entry.data)?;
        self.out.write_all(&[0; 3][..padding(entry.data.len())])
    }
}

fn padding(length: usize) -> usize {
    length.wrapping_neg() % 4
}

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len() + padding(bytes.len()), 0);
}

/// An ELF of this machine without an interpreter: a dynamic agent would boot into "No working init found"
/// with no word of the cause.
fn check_static(elf: &[u8]) -> Result<(), InitramfsError> {
    let fault = InitramfsError::NotStatic;
    let field = |offset: usize, width: usize| -> Option<u64> {
        let bytes = elf.get(offset..offset.checked_add(width)?)?;
        Some(bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    };
    if elf.get(..6) != Some(b"\x7fELF\x02\x01") {
        return Err(fault("no 64-bit little-endian ELF header"));
    }
    if field(18, 2) != Some(62) {
        return Err(fault("it is for another machine"));
    }
    let (Some(table), Some(size), Some(count)) = (field(32, 8), field(54, 2), field(56, 2)) else {
        return Err(fault("the header is cut short"));
    };
    const PT_INTERP: u64 = 3;
    for index in 0..count {
        let offset = index.checked_mul(size).and_then(|relative| table.checked_add(relative));
        match offset.and_then(|offset| usize::try_from(offset).ok()).and_then(|offset| field(offset, 4)) {
            Some(PT_INTERP) => return Err(fault("it needs a dynamic loader")),
            Some(_) => {}
            None => return Err(fault("a program header lies outside of the file")),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ELF header with one program header of the given type.
    fn elf(program: u32) -> Vec<u8> {
        let mut bytes = vec![0; 64];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        bytes[18] = 62;
        bytes[32] = 64;
        bytes[54] = 56;
        bytes[56] = 1;
        bytes.extend(program.to_le_bytes());
        bytes.resize(64 + 56 + 1, 0);
        bytes
    }

    fn archive() -> Vec<u8> {
        let mut out = Vec::new();
        write(&elf(1), &mut out).unwrap();
        out
    }

    /// Names, modes and data, read back by the format's description.
    fn read(mut bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut entries = Vec::new();
        loop {
            assert_eq!(&bytes[..6], b"070701");
            let number = |index: usize| {
                let digits = std::str::from_utf8(&bytes[6 + 8 * index..14 + 8 * index]).unwrap();
                u32::from_str_radix(digits, 16).unwrap() as usize
            };
            let (mode, size, name_size) = (number(1), number(6), number(11));
            let name = String::from_utf8(bytes[110..110 + name_size - 1].to_vec()).unwrap();
            let data = (110 + name_size).next_multiple_of(4);
            if name == "TRAILER!!!" {
                assert_eq!(bytes.len(), data);
                return entries;
            }
            entries.push((name, mode as u32, bytes[data..data + size].to_vec()));
            bytes = &bytes[(data + size).next_multiple_of(4)..];
        }
    }

    #[test]
    fn the_archive_holds_the_agent_and_a_console() {
        let entries = read(&archive());
        assert!(entries.contains(&("init".into(), 0o100_755, elf(1))));
        assert!(entries.contains(&("dev/console".into(), 0o020_600, vec![])));
        assert!(
            entries.iter().position(|e| e.0 == "dev") < entries.iter().position(|e| e.0 == "dev/console")
        );
    }

    #[test]
    fn the_same_agent_gives_the_same_bytes() {
        assert_eq!(archive(), archive());
    }

    #[test]
    fn a_dynamic_or_foreign_agent_is_refused() {
        let mut foreign = elf(1);
        foreign[18] = 183;
        let mut outside = elf(1);
        outside[33] = 0xff;
        for bytes in [elf(3), foreign, outside, b"#!/bin/sh\n".to_vec(), elf(1)[..60].to_vec()] {
            assert!(matches!(write(&bytes, &mut io::sink()), Err(InitramfsError::NotStatic(_))));
        }
    }
}
