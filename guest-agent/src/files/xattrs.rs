//! Extended attributes of an open file.

use std::os::fd::OwnedFd;

use rustix::{fs::XattrFlags, io::Errno};

/// Overlayfs's own bookkeeping: no part of a file.
pub(super) const OVERLAY: &[u8] = b"trusted.overlay.";

/// The most bytes of names and of one value, as Linux has it.
const MAX: usize = 64 << 10;

type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

/// All but overlayfs's. A file system without them has none.
pub(super) fn read(file: &OwnedFd) -> rustix::io::Result<Xattrs> {
    let mut names = vec![0; 1024];
    let count = loop {
        match rustix::fs::flistxattr(file, &mut names[..]) {
            Ok(count) => break count,
            Err(Errno::RANGE) if names.len() < MAX => names.resize(MAX, 0),
            Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
            Err(error) => return Err(error),
        }
    };
    names.truncate(count);
    let mut found = Vec::new();
    for name in names.split(|&byte| byte == 0) {
        if name.is_empty() || name.starts_with(OVERLAY) {
            continue;
        }
        // It may have been removed meanwhile.
        if let Some(value) = value(file, name)? {
            found.push((name.to_vec(), value));
        }
    }
    found.sort();
    Ok(found)
}

/// One, if it is there.
pub(super) fn value(file: &OwnedFd, name: &[u8]) -> rustix::io::Result<Option<Vec<u8>>> {
    let mut value = vec![0; 256];
    loop {
        match rustix::fs::fgetxattr(file, name, &mut value[..]) {
            Ok(count) => {
                value.truncate(count);
                return Ok(Some(value));
            }
            Err(Errno::RANGE) if value.len() < MAX => value.resize(MAX, 0),
            Err(Errno::NODATA | Errno::OPNOTSUPP) => return Ok(None),
            Err(error) => return Err(error),
        }
    }
}

/// Sets them. What the file system does not know is left out, as Docker leaves it out.
pub(super) fn write(file: &OwnedFd, xattrs: &[(Vec<u8>, Vec<u8>)]) -> rustix::io::Result<()> {
    for (name, value) in xattrs {
        if name.starts_with(OVERLAY) {
            continue;
        }
        match rustix::fs::fsetxattr(file, &name[..], value, XattrFlags::empty()) {
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::PERM) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
