//! Volumes that are disks: `type=disk`, a sparse image with a file system of its own, for what wants a disk's
//! semantics and speed: databases, and overlays inside (a Docker daemon in a container).
//!
//! ```text
//!   volumes/NAME/disk.img   ext4, made by mkfs once, never read by the host again
//!     lock (flock)          exclusive: a container that may write; shared: those that only read
//! ```
//! The lock belongs to the open file, which the container's VMM holds: it ends with the VMM, whatever becomes of
//! the daemon.

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io,
    path::Path,
};

use bulkhead_rootfs::disk;
use rustix::fs::FlockOperation;

use super::store::Volume;
use crate::{
    engine::{Error, Result},
    units,
};

/// The option `type` of such a volume.
pub(super) const TYPE: &str = "disk";

/// The size of one without the option `size`, in bytes.
const DEFAULT_SIZE: u64 = 10 << 30;

impl Volume {
    /// How large it is, in bytes, if it is a disk.
    pub(crate) fn disk_size(&self) -> Option<u64> {
        let options = self.options.as_ref()?;
        (options.get("type")? == TYPE).then(|| size(options)).flatten()
    }
}

/// Checks the options of a disk.
///
/// # Errors
/// One that it does not have; a size out of bounds.
pub(super) fn check(options: &BTreeMap<String, String>) -> Result<()> {
    if let Some(other) = options.keys().find(|key| !matches!(key.as_str(), "type" | "size")) {
        return Err(Error::invalid(format!(
            "invalid option: {other:?}: a volume of type disk has a size alone"
        )));
    }
    size(options).map(drop).ok_or_else(|| {
        let text = options.get("size").map_or("", String::as_str);
        Error::invalid(format!("invalid size: '{text}': a size from 32m to 8t is expected"))
    })
}

/// Rounded up to whole blocks.
fn size(options: &BTreeMap<String, String>) -> Option<u64> {
    let wanted = options.get("size").map_or(Some(DEFAULT_SIZE), |text| units::size(text))?;
    let size = wanted.checked_next_multiple_of(disk::BLOCK)?;
    (disk::MIN_SIZE..=disk::MAX_SIZE).contains(&size).then_some(size)
}

/// Makes the image of a volume.
///
/// # Errors
/// mkfs's; nothing is left then.
pub(super) fn make(image: &Path, size: u64) -> io::Result<()> {
    disk::template(image, size, disk::Purpose::Volume).map_err(io::Error::other)
}

/// Opens an image for a container.
///
/// # Errors
/// Another container has it.
pub(crate) fn open(volume: &str, image: &Path, read_only: bool) -> Result<File> {
    let failed = |error: io::Error| Error::internal(format!("volume {volume}: {error}"));
    let file = OpenOptions::new().read(true).write(!read_only).open(image).map_err(failed)?;
    let lock = if read_only {
        FlockOperation::NonBlockingLockShared
    } else {
        FlockOperation::NonBlockingLockExclusive
    };
    match rustix::fs::flock(&file, lock) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(Error::conflict(format!(
            "volume {volume} is a disk that another running container has mounted: one at a time may write to it, or \
             several read it"
        ))),
        Err(error) => Err(failed(error.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn a_disk_has_a_size_and_nothing_else() {
        assert_eq!(size(&options(&[("type", "disk")])), Some(DEFAULT_SIZE));
        assert_eq!(size(&options(&[("type", "disk"), ("size", "33554433")])), Some((32 << 20) + disk::BLOCK));
        assert!(check(&options(&[("type", "disk"), ("size", "1.5g")])).is_ok());
        for refused in [
            &[("size", "1m")][..],
            &[("size", "9t")],
            &[("size", "x")],
            &[("o", "bind")],
            &[("device", "/x")],
        ] {
            let all: Vec<_> = refused.iter().copied().chain([("type", "disk")]).collect();
            assert!(check(&options(&all)).is_err(), "{refused:?}");
        }
    }

    #[test]
    fn one_writes_or_several_read() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("disk.img");
        std::fs::write(&image, "x").unwrap();
        let writer = open("v1", &image, false).unwrap();
        // What a VMM has got is the same open file.
        let vmm = writer.try_clone().unwrap();
        drop(writer);
        for read_only in [false, true] {
            assert!(open("v1", &image, read_only).unwrap_err().message.contains("one at a time"));
        }
        drop(vmm);
        let readers = [open("v1", &image, true).unwrap(), open("v1", &image, true).unwrap()];
        assert!(open("v1", &image, false).is_err());
        drop(readers);
        assert!(open("v1", &image, false).is_ok());
    }
}
