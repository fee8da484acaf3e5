//! Names, attributes and directories.

use super::Wire;

wire!(
    /// `struct fuse_attr`.
    Attr {
        /// `st_ino`.
        ino: u64,
        /// In bytes.
        size: u64,
        /// In 512-byte units.
        blocks: u64,
        /// Seconds since the epoch; the kernel reads it as signed.
        atime: u64,
        /// Likewise.
        mtime: u64,
        /// Likewise.
        ctime: u64,
        /// Nanoseconds.
        atimensec: u32,
        /// Likewise.
        mtimensec: u32,
        /// Likewise.
        ctimensec: u32,
        /// Kind and permissions.
        mode: u32,
        /// Hard links.
        nlink: u32,
        /// Owner.
        uid: u32,
        /// Group.
        gid: u32,
        /// In Linux's 32-bit encoding.
        rdev: u32,
        /// For `st_blksize`.
        blksize: u32,
        /// [`super::ATTR_DAX`].
        flags: u32,
    }
);

wire!(
    /// `struct fuse_entry_out`: the reply to LOOKUP. Node id 0 says that the name is not there.
    EntryOut {
        /// Names the file from now on, until it is forgotten.
        nodeid: u64,
        /// Node ids are never used again, so always 0.
        generation: u64,
        /// How long the name may be cached, in seconds.
        entry_valid: u64,
        /// How long the attributes may be cached, in seconds.
        attr_valid: u64,
        /// And nanoseconds.
        entry_valid_nsec: u32,
        /// And nanoseconds.
        attr_valid_nsec: u32,
        /// The attributes.
        attr: Attr,
    }
);

wire!(
    /// `struct fuse_getattr_in`.
    GetattrIn {
        /// Whether `fh` is set.
        getattr_flags: u32,
        /// Nothing.
        dummy: u32,
        /// File handle.
        fh: u64,
    }
);

wire!(
    /// `struct fuse_attr_out`.
    AttrOut {
        /// How long they may be cached, in seconds.
        attr_valid: u64,
        /// And nanoseconds.
        attr_valid_nsec: u32,
        /// Nothing.
        dummy: u32,
        /// The attributes.
        attr: Attr,
    }
);

wire!(
    /// `struct fuse_statx_in`.
    StatxIn {
        /// Whether `fh` is set.
        getattr_flags: u32,
        /// Zero.
        reserved: u32,
        /// File handle.
        fh: u64,
        /// `AT_STATX_*`.
        sx_flags: u32,
        /// `STATX_*` that are asked for.
        sx_mask: u32,
    }
);

wire!(
    /// `struct fuse_sx_time`.
    SxTime {
        /// Seconds since the epoch.
        tv_sec: i64,
        /// Nanoseconds.
        tv_nsec: u32,
        /// Zero.
        reserved: i32,
    }
);

/// `STATX_BASIC_STATS`: what [`Attr`] holds too.
pub const STATX_BASIC_STATS: u32 = 0x7ff;

/// Length of `struct fuse_statx_out`: what [`StatxOut`] holds, then fourteen spare numbers of 64 bits.
pub const STATX_OUT_SIZE: usize = 288;

wire!(
    /// `struct fuse_statx_out` up to `struct fuse_statx`'s spare end.
    StatxOut {
        /// How long they may be cached, in seconds.
        attr_valid: u64,
        /// And nanoseconds.
        attr_valid_nsec: u32,
        /// None is used.
        flags: u32,
        /// Zero.
        spare0: u64,
        /// Zero.
        spare1: u64,
        /// Which fields are set.
        mask: u32,
        /// For `st_blksize`.
        blksize: u32,
        /// None is used.
        attributes: u64,
        /// Hard links.
        nlink: u32,
        /// Owner.
        uid: u32,
        /// Group.
        gid: u32,
        /// Kind and permissions.
        mode: u16,
        /// Zero.
        spare2: u16,
        /// `st_ino`.
        ino: u64,
        /// In bytes.
        size: u64,
        /// In 512-byte units.
        blocks: u64,
        /// None is known.
        attributes_mask: u64,
        /// Last access.
        atime: SxTime,
        /// Birth: not known.
        btime: SxTime,
        /// Last change.
        ctime: SxTime,
        /// Last modification.
        mtime: SxTime,
        /// Of a device.
        rdev_major: u32,
        /// Of a device.
        rdev_minor: u32,
        /// The kernel puts its own.
        dev_major: u32,
        /// The kernel puts its own.
        dev_minor: u32,
    }
);

wire!(
    /// `struct fuse_getxattr_in`, of GETXATTR (a name follows) and LISTXATTR.
    GetxattrIn {
        /// Room for the value; 0 asks for its length.
        size: u32,
        /// Zero.
        padding: u32,
    }
);

wire!(
    /// `struct fuse_getxattr_out`: a length.
    GetxattrOut {
        /// In bytes.
        size: u32,
        /// Zero.
        padding: u32,
    }
);

wire!(
    /// `struct fuse_access_in`.
    AccessIn {
        /// `R_OK`, `W_OK`, `X_OK`.
        mask: u32,
        /// Zero.
        padding: u32,
    }
);

wire!(
    /// `struct fuse_dirent` before its name; an entry is padded to 8 bytes.
    Dirent {
        /// As in [`Attr`].
        ino: u64,
        /// The cookie that leads to the next entry.
        off: u64,
        /// In bytes.
        namelen: u32,
        /// `DT_*`.
        kind: u32,
    }
);

wire!(
    /// `struct fuse_setattr_in`.
    SetattrIn {
        /// See [`super::fattr`].
        valid: u32,
        /// Zero.
        padding: u32,
        /// File handle, where [`super::fattr::FH`] is set.
        fh: u64,
        /// In bytes.
        size: u64,
        /// Not used.
        lock_owner: u64,
        /// Seconds since the epoch; signed.
        atime: u64,
        /// Likewise.
        mtime: u64,
        /// Likewise.
        ctime: u64,
        /// Nanoseconds.
        atimensec: u32,
        /// Likewise.
        mtimensec: u32,
        /// Likewise.
        ctimensec: u32,
        /// Permissions.
        mode: u32,
        /// Nothing.
        unused4: u32,
        /// Owner.
        uid: u32,
        /// Group.
        gid: u32,
        /// Nothing.
        unused5: u32,
    }
);

wire!(
    /// `struct fuse_mknod_in`, followed by a name.
    MknodIn {
        /// Kind and permissions.
        mode: u32,
        /// Of a device.
        rdev: u32,
        /// Applied by the kernel already.
        umask: u32,
        /// Zero.
        padding: u32,
    }
);

wire!(
    /// `struct fuse_mkdir_in`, followed by a name.
    MkdirIn {
        /// Permissions.
        mode: u32,
        /// Applied by the kernel already.
        umask: u32,
    }
);

wire!(
    /// `struct fuse_rename2_in`, followed by the old name and the new.
    Rename2In {
        /// The new directory.
        newdir: u64,
        /// `RENAME_*`.
        flags: u32,
        /// Zero.
        padding: u32,
    }
);

wire!(
    /// `struct fuse_link_in`, followed by the new name.
    LinkIn {
        /// The file.
        oldnodeid: u64,
    }
);

wire!(
    /// `struct fuse_setxattr_in` as it is without `FUSE_SETXATTR_EXT`, followed by a name and the value.
    SetxattrIn {
        /// Of the value, in bytes.
        size: u32,
        /// `XATTR_*`.
        flags: u32,
    }
);
