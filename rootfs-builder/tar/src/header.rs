//! One 512-byte header block.
//!
//! ```text
//!    0 name 100 | 100 mode 8 | 108 uid 8 | 116 gid 8 | 124 size 12 | 136 mtime 12 | 148 checksum 8
//!  156 type 1 | 157 link name 100 | 257 magic 6, version 2 | 265 user 32 | 297 group 32
//!  329 major 8 | 337 minor 8 | 345 prefix 155 (ustar), 131 (star, "tar\0" at 508)
//! ```
//!
//! Numbers are octal text, or, with the top bit of the first byte set, big-endian two's complement
//! ("base-256", GNU and star).

use std::ops::Range;

pub(super) const BLOCK: usize = 512;

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A regular file; its data follow.
    File,
    /// A directory.
    Directory,
    /// A symbolic link and its target.
    Symlink(Vec<u8>),
    /// A hard link to another entry of the archive.
    HardLink(Vec<u8>),
    /// A character device.
    CharDevice(Device),
    /// A block device.
    BlockDevice(Device),
    /// A fifo.
    Fifo,
}

/// A device number, each part in the range that Linux has for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Device {
    /// At most 12 bits.
    pub major: u32,
    /// At most 20 bits.
    pub minor: u32,
}

impl Device {
    /// As Linux's 32-bit "new" encoding (`new_encode_dev` in its `kdev_t.h`).
    #[must_use]
    pub const fn encode(self) -> u32 {
        (self.minor & 0xff) | (self.major << 8) | ((self.minor & !0xff) << 12)
    }
}

/// A header whose checksum is right.
pub(super) struct Header([u8; BLOCK]);

impl Header {
    /// Checks a block's checksum.
    ///
    /// # Errors
    /// It is wrong, for people.
    pub(super) fn read(block: [u8; BLOCK]) -> Result<Self, String> {
        let header = Self(block);
        let stored = header.number(148..156, "checksum")?;
        let sum = |value: fn(u8) -> i64| -> i64 {
            let bytes = block.iter().enumerate();
            bytes.map(|(at, &byte)| value(if (148..156).contains(&at) { b' ' } else { byte })).sum()
        };
        // Some old writers summed signed bytes.
        if stored == sum(i64::from) || stored == sum(|byte| i64::from(byte.cast_signed())) {
            Ok(header)
        } else {
            Err("a header's checksum is wrong".into())
        }
    }

    pub(super) fn type_flag(&self) -> u8 {
        self.0[156]
    }

    /// The name: with ustar's prefix before it.
    pub(super) fn name(&self) -> Vec<u8> {
        let name = self.text(0..100);
        let prefix = if &self.0[257..263] != b"ustar\0" {
            Vec::new()
        } else if &self.0[508..512] == b"tar\0" {
            self.text(345..476)
        } else {
            self.text(345..500)
        };
        if prefix.is_empty() { name } else { [prefix.as_slice(), b"/", &name].concat() }
    }

    pub(super) fn link_name(&self) -> Vec<u8> {
        self.text(157..257)
    }

    /// What the entry of that (final) name is.
    pub(super) fn kind(&self, name: &[u8], link: Vec<u8>) -> Result<Kind, String> {
        Ok(match self.type_flag() {
            // Before POSIX a directory was a file whose name ends in a slash.
            0 if name.ends_with(b"/") => Kind::Directory,
            0 | b'0' | b'7' => Kind::File,
            b'1' => Kind::HardLink(link),
            b'2' => Kind::Symlink(link),
            b'3' => Kind::CharDevice(self.device()?),
            b'4' => Kind::BlockDevice(self.device()?),
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            b'S' => return Err("it is a sparse file in GNU form, which is not supported".into()),
            other => return Err(format!("its type {:?} is not known", char::from(other))),
        })
    }

    pub(super) fn size(&self) -> Result<u64, String> {
        self.unsigned(124..136, "size")
    }

    pub(super) fn mode(&self) -> Result<u32, String> {
        let mode = self.number(100..108, "mode")?;
        // The type's bits, which some writers put here, are masked away.
        Ok(u32::try_from(mode & 0o7777).unwrap_or(0))
    }

    pub(super) fn uid(&self) -> Result<u64, String> {
        self.unsigned(108..116, "owner")
    }

    pub(super) fn gid(&self) -> Result<u64, String> {
        self.unsigned(116..124, "group")
    }

    pub(super) fn mtime(&self) -> Result<(i64, u32), String> {
        Ok((self.number(136..148, "modification time")?, 0))
    }

    fn device(&self) -> Result<Device, String> {
        let part = |field: Range<usize>, max: u32| {
            let number = self.unsigned(field, "device number")?;
            let number = u32::try_from(number).ok().filter(|&number| number <= max);
            number.ok_or_else(|| "its device number is out of Linux's range".to_owned())
        };
        Ok(Device { major: part(329..337, 0xfff)?, minor: part(337..345, 0xf_ffff)? })
    }

    fn text(&self, field: Range<usize>) -> Vec<u8> {
        super::reader::c_string(self.0[field].to_vec())
    }

    fn unsigned(&self, field: Range<usize>, what: &str) -> Result<u64, String> {
        u64::try_from(self.number(field, what)?).map_err(|_| format!("its {what} is negative"))
    }

    fn number(&self, field: Range<usize>, what: &str) -> Result<i64, String> {
        let bytes = &self.0[field];
        let number = if bytes[0] & 0x80 != 0 { base256(bytes) } else { octal(bytes) };
        number.ok_or_else(|| format!("its {what} is not a number"))
    }
}

/// Octal digits with spaces and NULs around them; nothing at all is 0.
fn octal(bytes: &[u8]) -> Option<i64> {
    let blank = |byte: &&u8| matches!(byte, b' ' | 0);
    let start = bytes.iter().take_while(blank).count();
    let digits = &bytes[start..];
    let end = digits.iter().position(|byte| blank(&byte)).unwrap_or(digits.len());
    digits[..end].iter().try_fold(0_i64, |number, byte| match byte {
        b'0'..=b'7' => number.checked_mul(8)?.checked_add(i64::from(byte - b'0')),
        _ => None,
    })
}

/// Two's complement, its sign in bit 6 of the first byte, as bit 7 marks the form.
fn base256(bytes: &[u8]) -> Option<i64> {
    let (first, rest) = bytes.split_first()?;
    let first = i128::from(first & 0x7f) - if first & 0x40 != 0 { 0x80 } else { 0 };
    // At most twelve bytes.
    i64::try_from(rest.iter().fold(first, |number, &byte| number << 8 | i128::from(byte))).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn octal_numbers() {
        assert_eq!(octal(b"0000644\0"), Some(0o644));
        assert_eq!(octal(b"  644 \0 "), Some(0o644));
        assert_eq!(octal(b"\0\0\0\0\0\0\0\0"), Some(0));
        assert_eq!(octal(b"77777777"), Some(0o77_777_777));
        assert_eq!(octal(b"8"), None);
        assert_eq!(octal(b"-1"), None);
    }

    #[test]
    fn base_256_numbers() {
        assert_eq!(base256(&[0x80, 0, 0, 0, 0, 0, 0, 5]), Some(5));
        assert_eq!(base256(&[0xff; 8]), Some(-1));
        assert_eq!(base256(&[0xff; 12]), Some(-1));
        assert_eq!(base256(&[0x80, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0]), Some(2 << 32));
        assert_eq!(base256(&[0x80, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]), None);
        assert_eq!(base256(&[0x80, 0, 0, 0, 0x80, 0, 0, 0, 0, 0, 0, 0]), None);
        assert_eq!(
            base256(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0]),
            Some(-256)
        );
    }

    #[test]
    fn devices_are_encoded_as_linux_does() {
        assert_eq!(Device { major: 1, minor: 3 }.encode(), 0x103);
        assert_eq!(Device { major: 0xfff, minor: 0xf_ffff }.encode(), u32::MAX);
        assert_eq!(Device { major: 8, minor: 0x100 }.encode(), 0x10_0800);
    }
}
