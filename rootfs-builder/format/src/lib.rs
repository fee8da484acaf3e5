//! How an unpacked image layer lies on disk.
//!
//! A layer's tree holds **only regular files and directories**, all owned by whoever unpacked it. What a
//! file *is* in the guest's eyes — a symbolic link, a device, a whiteout, its owner, its mode, its extended
//! attributes — stands in one extended attribute, [`XATTR`], written here and read by the VMM's file
//! server. So the unpacker needs no privilege, the host never holds a link, a device or a setuid file of
//! a stranger's making, and nothing that walks the store can be led out of it.
//!
//! | guest sees | on disk |
//! |---|---|
//! | regular file | regular file, same content and mtime |
//! | directory | directory, same mtime |
//! | symbolic link | regular file that holds the target |
//! | character, block device, fifo, socket | empty regular file, the kind in `mode`, `rdev` set |
//! | overlay whiteout (`.wh.name`) | empty regular file `name`, a character device 0:0 |
//! | opaque directory (`.wh..wh..opq`) | the directory has the attribute `trusted.overlay.opaque` = `y` |
//! | hard link | hard link |
//!
//! A file without the attribute is not part of a layer: the server answers EIO.

/// The extended attribute that holds an encoded [`Meta`].
pub const XATTR: &str = "user.bulkhead.meta";

/// The longest encoded [`Meta`]: what fits, with ext4's own overhead, into one 4 KiB attribute block.
pub const MAX_ENCODED: usize = 3840;

/// Overlayfs's own extended attributes.
pub const OVERLAY_PREFIX: &[u8] = b"trusted.overlay.";

/// The attribute that makes a directory opaque when its value is `y`.
pub const OPAQUE: &[u8] = b"trusted.overlay.opaque";

const VERSION: u8 = 1;

const S_IFMT: u32 = 0o170_000;
const S_IFCHR: u32 = 0o020_000;

/// An extended attribute: its name, namespace included, and its value.
pub type Xattr = (Vec<u8>, Vec<u8>);

/// A file as the guest sees it; size and modification time are the backing file's own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Meta {
    /// Kind and permissions, as `st_mode`.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device number of a character or block device, as the guest kernel's `makedev(major, minor)` in
    /// Linux's "new" 32-bit encoding; else 0.
    pub rdev: u32,
    /// Extended attributes, names with their namespace (`security.capability`), in the layer's order.
    pub xattrs: Vec<Xattr>,
}

/// Why a [`Meta`] could not be encoded or decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Encoded it would be over [`MAX_ENCODED`].
    #[error("a file's extended attributes need {0} bytes, over the limit of {MAX_ENCODED}")]
    TooLong(usize),
    /// The bytes are not an encoded [`Meta`] of this version.
    #[error("a layer file's metadata is damaged")]
    Damaged,
}

impl Meta {
    /// The metadata of an overlay whiteout: a character device 0:0.
    #[must_use]
    pub const fn whiteout() -> Self {
        Self { mode: S_IFCHR, uid: 0, gid: 0, rdev: 0, xattrs: Vec::new() }
    }

    /// Whether this is an overlay whiteout.
    #[must_use]
    pub const fn is_whiteout(&self) -> bool {
        self.mode & S_IFMT == S_IFCHR && self.rdev == 0
    }

    /// Whether this is an opaque directory.
    #[must_use]
    pub fn is_opaque(&self) -> bool {
        self.xattrs.iter().any(|(name, value)| name == OPAQUE && value == b"y")
    }

    /// As bytes: version, mode, uid, gid, rdev, then each attribute's name and value with their lengths, all
    /// numbers little-endian.
    ///
    /// # Errors
    /// [`FormatError::TooLong`].
    pub fn encode(&self) -> Result<Vec<u8>, FormatError> {
        let mut out = vec![VERSION];
        for number in [self.mode, self.uid, self.gid, self.rdev] {
            out.extend(number.to_le_bytes());
        }
        for bytes in self.xattrs.iter().flat_map(|(name, value)| [name, value]) {
            let length = u16::try_from(bytes.len()).map_err(|_| FormatError::TooLong(bytes.len()))?;
            out.extend(length.to_le_bytes());
            out.extend(bytes);
        }
        if out.len() > MAX_ENCODED { Err(FormatError::TooLong(out.len())) } else { Ok(out) }
    }

    /// The inverse of [`Meta::encode`].
    ///
    /// # Errors
    /// [`FormatError::Damaged`].
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut rest = bytes;
        let mut take = |count: usize| {
            let (head, tail) = rest.split_at_checked(count)?;
            rest = tail;
            Some(head)
        };
        let mut parse = || {
            if take(1)? != [VERSION] {
                return None;
            }
            let mut number = || Some(u32::from_le_bytes(take(4)?.try_into().ok()?));
            let (mode, uid, gid, rdev) = (number()?, number()?, number()?, number()?);
            let mut xattrs = Vec::new();
            let mut field = || {
                let length = u16::from_le_bytes(take(2)?.try_into().ok()?);
                Some(take(usize::from(length))?.to_vec())
            };
            let consumed: usize = 17;
            let mut left = bytes.len().checked_sub(consumed)?;
            while left > 0 {
                let (name, value) = (field()?, field()?);
                left = left.checked_sub(4 + name.len() + value.len())?;
                xattrs.push((name, value));
            }
            Some(Self { mode, uid, gid, rdev, xattrs })
        };
        parse().ok_or(FormatError::Damaged)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Meta {
        Meta {
            mode: 0o100_755,
            uid: 70_000,
            gid: 5,
            rdev: 0,
            xattrs: vec![(b"security.capability".to_vec(), vec![0, 1, 2]), (b"user.empty".to_vec(), vec![])],
        }
    }

    #[test]
    fn what_was_encoded_is_decoded() {
        assert_eq!(Meta::decode(&sample().encode().unwrap()), Ok(sample()));
    }

    #[test]
    fn every_cut_is_damage_or_fewer_attributes() {
        let bytes = sample().encode().unwrap();
        for cut in 0..bytes.len() {
            if let Ok(meta) = Meta::decode(&bytes[..cut]) {
                assert!(meta.xattrs.len() < sample().xattrs.len());
            }
        }
    }

    #[test]
    fn attributes_over_the_limit_are_refused() {
        let meta = Meta { xattrs: vec![(b"user.big".to_vec(), vec![0; MAX_ENCODED])], ..sample() };
        assert!(matches!(meta.encode(), Err(FormatError::TooLong(_))));
    }
}
