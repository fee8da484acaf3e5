//! Open files: their data, locks and mappings.

use super::Wire;

wire!(
    /// `struct fuse_read_in`, of READ, READDIR and READDIRPLUS.
    ReadIn {
        /// File handle.
        fh: u64,
        /// In bytes, or a directory's cookie.
        offset: u64,
        /// How many bytes at most.
        size: u32,
        /// Whether `lock_owner` is set.
        read_flags: u32,
        /// Who reads.
        lock_owner: u64,
        /// `O_*` of the open file.
        flags: u32,
        /// Zero.
        padding: u32,
    }
);

wire!(
    /// `struct fuse_setupmapping_in`.
    SetupmappingIn {
        /// File handle; Linux sets none.
        fh: u64,
        /// In the file, in bytes.
        foffset: u64,
        /// In bytes; the file may end before.
        len: u64,
        /// [`super::SETUPMAPPING_WRITE`].
        flags: u64,
        /// In the window, in bytes.
        moffset: u64,
    }
);

wire!(
    /// `struct fuse_removemapping_in`, followed by that many [`RemovemappingOne`].
    RemovemappingIn {
        /// How many follow.
        count: u32,
    }
);

wire!(
    /// `struct fuse_removemapping_one`.
    RemovemappingOne {
        /// In the window, in bytes.
        moffset: u64,
        /// In bytes.
        len: u64,
    }
);

wire!(
    /// `struct fuse_lseek_in`.
    LseekIn {
        /// File handle.
        fh: u64,
        /// From where.
        offset: u64,
        /// `SEEK_DATA` or `SEEK_HOLE`.
        whence: u32,
        /// Zero.
        padding: u32,
    }
);

wire!(
    /// `struct fuse_lseek_out`.
    LseekOut {
        /// What was found.
        offset: u64,
    }
);

wire!(
    /// `struct fuse_open_in`.
    OpenIn {
        /// `O_*`.
        flags: u32,
        /// `FUSE_OPEN_*`.
        open_flags: u32,
    }
);

wire!(
    /// `struct fuse_create_in`, of CREATE and TMPFILE, followed by a name.
    CreateIn {
        /// `O_*`.
        flags: u32,
        /// Permissions.
        mode: u32,
        /// Applied by the kernel already.
        umask: u32,
        /// `FUSE_OPEN_*`.
        open_flags: u32,
    }
);

wire!(
    /// `struct fuse_open_out`.
    OpenOut {
        /// File handle.
        fh: u64,
        /// See [`super::fopen`].
        open_flags: u32,
        /// For passthrough: none.
        backing_id: u32,
    }
);

wire!(
    /// `struct fuse_release_in`.
    ReleaseIn {
        /// File handle.
        fh: u64,
        /// `O_*`.
        flags: u32,
        /// `FUSE_RELEASE_*`.
        release_flags: u32,
        /// Who closed it last.
        lock_owner: u64,
    }
);

wire!(
    /// `struct fuse_flush_in`.
    FlushIn {
        /// File handle.
        fh: u64,
        /// Nothing.
        unused: u32,
        /// Zero.
        padding: u32,
        /// Whose POSIX locks end.
        lock_owner: u64,
    }
);

wire!(
    /// `struct fuse_write_in`, followed by the data.
    WriteIn {
        /// File handle.
        fh: u64,
        /// In bytes.
        offset: u64,
        /// In bytes.
        size: u32,
        /// `FUSE_WRITE_*`.
        write_flags: u32,
        /// Who writes.
        lock_owner: u64,
        /// `O_*` of the open file.
        flags: u32,
        /// Zero.
        padding: u32,
    }
);

wire!(
    /// `struct fuse_write_out`, of WRITE and COPY_FILE_RANGE.
    WriteOut {
        /// How many bytes were written.
        size: u32,
        /// Zero.
        padding: u32,
    }
);

wire!(
    /// `struct fuse_fsync_in`.
    FsyncIn {
        /// File handle.
        fh: u64,
        /// Bit 0: the data alone.
        fsync_flags: u32,
        /// Zero.
        padding: u32,
    }
);

wire!(
    /// `struct fuse_file_lock`; the reply to GETLK.
    FileLock {
        /// The first byte.
        start: u64,
        /// The last; `i64::MAX` is the end of any file.
        end: u64,
        /// `F_RDLCK`, `F_WRLCK`, `F_UNLCK`.
        kind: u32,
        /// Of the holder; 0: not known here.
        pid: u32,
    }
);

wire!(
    /// `struct fuse_lk_in`.
    LkIn {
        /// File handle.
        fh: u64,
        /// Whose lock it is.
        owner: u64,
        /// The lock.
        lock: FileLock,
        /// Bit 0: it is of `flock`, not of `fcntl`.
        lk_flags: u32,
        /// Zero.
        padding: u32,
    }
);

wire!(
    /// `struct fuse_fallocate_in`.
    FallocateIn {
        /// File handle.
        fh: u64,
        /// In bytes.
        offset: u64,
        /// In bytes.
        length: u64,
        /// `FALLOC_FL_*`.
        mode: u32,
        /// Zero.
        padding: u32,
    }
);

wire!(
    /// `struct fuse_copy_file_range_in`.
    CopyFileRangeIn {
        /// File handle.
        fh_in: u64,
        /// In bytes.
        off_in: u64,
        /// Of the other file.
        nodeid_out: u64,
        /// Likewise.
        fh_out: u64,
        /// In bytes.
        off_out: u64,
        /// In bytes.
        len: u64,
        /// Zero.
        flags: u64,
    }
);
