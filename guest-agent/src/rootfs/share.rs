//! virtio-fs tags, mounted where bind mounts come from.
//!
//! ```text
//!   layers' tag:      mounted by the first container, and stays
//!   a container's own: mounted anew for each container, since each time it may have another server
//! ```
//!
//! The kernel has one file system for a device, which begins with a greeting of the server (`FUSE_INIT`) and lives
//! as long as anybody uses it. A mount meanwhile would be of that one, which knows nothing of a new server: it is
//! refused.

use std::{
    collections::BTreeSet,
    ffi::{OsStr, OsString},
    fs, io,
    path::{Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, CWD, StatxFlags},
    io::Errno,
    mount::{MountFlags, UnmountFlags},
};

use super::{SHARES, live::Live, open_directory};
use crate::{
    error::{Context, Result, conflict},
    slots,
};

/// The kernel has an entry here for every file system that may have something to write back, by its device number.
const WRITTEN_BACK: &str = "/sys/class/bdi";

/// How much of a layer's file is read at once: each request leaves the guest, and finds what it asks for in the host's
/// cache. Linux's own is 128.
const READ_AHEAD_KIB: u32 = 512;

/// Mounts the tag of the layers, if it is not: where.
pub(super) fn mount_layers(tag: &str) -> Result<PathBuf> {
    let path = Path::new(SHARES).join(tag);
    if !path.exists() {
        fs::create_dir_all(&path).context(format_args!("mkdir {}", path.display()))?;
        mount(tag, &path, MountFlags::RDONLY | MountFlags::NOATIME)?;
        read_ahead(&path);
    }
    Ok(path)
}

/// Has Linux read [`READ_AHEAD_KIB`] ahead in a share's files. Where it does not take that, it reads as it did.
fn read_ahead(mounted: &Path) {
    if let Ok(number) = device_number(mounted) {
        let _ =
            fs::write(Path::new(WRITTEN_BACK).join(number).join("read_ahead_kb"), READ_AHEAD_KIB.to_string());
    }
}

/// Mounts the tag of a container's own shares: where, and what is there of it until its end.
pub(super) fn mount_own(tag: &str) -> Result<(PathBuf, Live)> {
    let path = Path::new(SHARES).join(tag);
    fs::create_dir_all(SHARES).context(format_args!("mkdir {SHARES}"))?;
    // One that is left over and empty goes; where something is mounted, it stays.
    let _ = fs::remove_dir(&path);
    match fs::create_dir(&path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            return Err(conflict(format!("the file share {tag:?} is another container's")));
        }
        made => made.context(format_args!("mkdir {}", path.display()))?,
    }
    let before = written_back();
    mount(tag, &path, MountFlags::NOATIME)?;
    match device_number(&path) {
        Ok(number) if !before.contains(OsStr::new(&number)) => {
            Ok((path, Live::Share(Path::new(WRITTEN_BACK).join(number))))
        }
        other => {
            unmount_own(&path)?;
            other?;
            Err(conflict(format!("the file share {tag:?} is still in use")))
        }
    }
}

/// Unmounts a container's own shares, which writes what was changed in memory maps.
pub(super) fn unmount_own(path: &Path) -> Result<()> {
    let unmounted = match rustix::mount::unmount(path, UnmountFlags::NOFOLLOW) {
        Err(Errno::BUSY) => {
            let written = open_directory(CWD, path)
                .and_then(|shares| rustix::fs::syncfs(shares).context("write what was changed in shares"));
            super::unmount(path, UnmountFlags::DETACH).and(written)
        }
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => Ok(()),
        Err(error) => Err(error).context(format_args!("unmount {}", path.display())),
    };
    let _ = fs::remove_dir(path);
    unmounted
}

/// Mounts a tag at a directory, which is removed where that fails.
fn mount(tag: &str, path: &Path, flags: MountFlags) -> Result<()> {
    let mount = || rustix::mount::mount(tag, path, "virtiofs", flags, None);
    let mounted = match mount() {
        // No device has the tag, or has had it yet.
        Err(Errno::INVAL) => {
            slots::look_into();
            mount()
        }
        other => other,
    };
    mounted.inspect_err(|_| drop(fs::remove_dir(path))).context(format_args!("mount the file share {tag:?}"))
}

fn written_back() -> BTreeSet<OsString> {
    let entries = fs::read_dir(WRITTEN_BACK).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name()).collect()
}

/// The device number of a mounted file system, as its name in [`WRITTEN_BACK`]. Its server is not asked.
fn device_number(path: &Path) -> Result<String> {
    let found = rustix::fs::statx(CWD, path, AtFlags::STATX_DONT_SYNC, StatxFlags::TYPE)
        .context(format_args!("stat {}", path.display()))?;
    Ok(format!("{}:{}", found.stx_dev_major, found.stx_dev_minor))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_have_the_kernels_form() {
        use std::os::unix::fs::MetadataExt;
        let device = fs::metadata("/proc").unwrap().dev();
        let expected = format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
        assert_eq!(device_number(Path::new("/proc")).unwrap(), expected);
    }
}
