//! The root directory: an empty, read-only file system, and no other mount left.
//!
//! The new file system is a descriptor from its making on; it is laid over `/`, entered by the descriptor,
//! made the root, and the old root, then stacked on top of it, is let go with all that is mounted in it. The
//! only path that is ever named is `/` itself, which is no link.

use rustix::{
    fs::CWD,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, UnmountFlags, fsconfig_create,
        fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, unmount,
    },
    process::{chdir, fchdir, pivot_root},
};

use super::JailError;

pub(super) fn make_empty() -> Result<(), JailError> {
    let filesystem = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(JailError::at("fsopen"))?;
    for (key, value) in [("size", "4k"), ("nr_inodes", "1"), ("mode", "555")] {
        fsconfig_set_string(&filesystem, key, value).map_err(JailError::at("fsconfig"))?;
    }
    fsconfig_set_flag(&filesystem, "ro").map_err(JailError::at("fsconfig"))?;
    fsconfig_create(&filesystem).map_err(JailError::at("fsconfig"))?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC
        | MountAttrFlags::MOUNT_ATTR_NOSYMFOLLOW;
    let root =
        fsmount(&filesystem, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(JailError::at("fsmount"))?;
    move_mount(&root, "", CWD, "/", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(JailError::at("move_mount"))?;
    fchdir(&root).map_err(JailError::at("fchdir"))?;
    pivot_root(".", ".").map_err(JailError::at("pivot_root"))?;
    unmount(".", UnmountFlags::DETACH).map_err(JailError::at("umount"))?;
    chdir("/").map_err(JailError::at("chdir"))
}
