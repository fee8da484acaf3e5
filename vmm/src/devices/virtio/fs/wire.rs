//! The FUSE protocol as Linux 6.12 speaks it (7.41; `include/uapi/linux/fuse.h`), byte by byte.
//!
//! ```text
//!  request: InHeader (40 bytes), the operation's fixed part, names or data
//!  reply:   OutHeader (16 bytes), the operation's fixed part, data            (none to FORGET, BATCH_FORGET)
//! ```
//!
//! All numbers are little-endian here, since the guest is. A structure is declared once, by [`wire!`], and
//! read and written field by field: nothing of a request is ever cast.

/// A piece of the protocol with a fixed length.
pub trait Wire: Sized {
    /// Its length in bytes.
    const SIZE: usize;

    /// Takes it off the front of `bytes`; None when they are too short.
    fn take(bytes: &mut &[u8]) -> Option<Self>;

    /// Adds it to `out`.
    fn put(&self, out: &mut Vec<u8>);
}

macro_rules! number {
    ($($type:ty)*) => {$(
        impl Wire for $type {
            const SIZE: usize = size_of::<$type>();

            fn take(bytes: &mut &[u8]) -> Option<Self> {
                let (head, tail) = bytes.split_first_chunk()?;
                *bytes = tail;
                Some(Self::from_le_bytes(*head))
            }

            fn put(&self, out: &mut Vec<u8>) {
                out.extend(self.to_le_bytes());
            }
        }
    )*};
}

number!(u16 u32 u64 i32 i64);

/// Declares a structure whose fields follow each other with no padding but what is declared.
macro_rules! wire {
    ($(#[$meta:meta])* $name:ident { $($(#[$field_meta:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        pub struct $name { $($(#[$field_meta])* pub $field: $type,)* }

        impl Wire for $name {
            const SIZE: usize = 0 $(+ <$type as Wire>::SIZE)*;

            fn take(bytes: &mut &[u8]) -> Option<Self> {
                Some(Self { $($field: Wire::take(bytes)?,)* })
            }

            fn put(&self, out: &mut Vec<u8>) {
                $(self.$field.put(out);)*
            }
        }
    };
}

/// Major version of the protocol.
pub const MAJOR: u32 = 7;
/// Minor version that the server speaks.
pub const MINOR: u32 = 41;
/// The oldest minor version whose structures are those declared here (7.31, Linux 5.4).
pub const OLDEST_MINOR: u32 = 31;

/// The root's node id.
pub const ROOT_ID: u64 = 1;

/// The longest file name that Linux's FUSE takes, in bytes.
pub const MAX_NAME: usize = 255;

/// Operations (`enum fuse_opcode`).
#[allow(missing_docs, reason = "the protocol's own names")]
pub mod opcode {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const SETXATTR: u32 = 21;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const REMOVEXATTR: u32 = 24;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const GETLK: u32 = 31;
    pub const SETLK: u32 = 32;
    pub const SETLKW: u32 = 33;
    pub const ACCESS: u32 = 34;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
    pub const COPY_FILE_RANGE: u32 = 47;
    pub const SETUPMAPPING: u32 = 48;
    pub const REMOVEMAPPING: u32 = 49;
    pub const SYNCFS: u32 = 50;
    pub const TMPFILE: u32 = 51;
    pub const STATX: u32 = 52;
}

/// Flags of INIT.
#[allow(missing_docs, reason = "the protocol's own names")]
pub mod init {
    pub const ASYNC_READ: u64 = 1 << 0;
    pub const POSIX_LOCKS: u64 = 1 << 1;
    pub const ATOMIC_O_TRUNC: u64 = 1 << 3;
    pub const BIG_WRITES: u64 = 1 << 5;
    pub const FLOCK_LOCKS: u64 = 1 << 10;
    pub const AUTO_INVAL_DATA: u64 = 1 << 12;
    pub const DO_READDIRPLUS: u64 = 1 << 13;
    pub const READDIRPLUS_AUTO: u64 = 1 << 14;
    pub const ASYNC_DIO: u64 = 1 << 15;
    pub const NO_OPEN_SUPPORT: u64 = 1 << 17;
    pub const PARALLEL_DIROPS: u64 = 1 << 18;
    pub const MAX_PAGES: u64 = 1 << 22;
    pub const CACHE_SYMLINKS: u64 = 1 << 23;
    pub const NO_OPENDIR_SUPPORT: u64 = 1 << 24;
    pub const MAP_ALIGNMENT: u64 = 1 << 26;
    pub const INIT_EXT: u64 = 1 << 30;
    pub const HAS_INODE_DAX: u64 = 1 << 33;
    pub const DIRECT_IO_ALLOW_MMAP: u64 = 1 << 36;
    pub const NO_EXPORT_SUPPORT: u64 = 1 << 38;
}

/// Flag of a file's attributes: it is to be mapped (`FUSE_ATTR_DAX`).
pub const ATTR_DAX: u32 = 1 << 1;

/// Flag of SETUPMAPPING: what is mapped is to be written to.
pub const SETUPMAPPING_WRITE: u64 = 1 << 0;

/// Flags of the reply to OPEN.
#[allow(missing_docs, reason = "the protocol's own names")]
pub mod fopen {
    pub const DIRECT_IO: u32 = 1 << 0;
    pub const PARALLEL_DIRECT_WRITES: u32 = 1 << 6;
}

/// What SETATTR sets.
#[allow(missing_docs, reason = "the protocol's own names")]
pub mod fattr {
    pub const MODE: u32 = 1 << 0;
    pub const UID: u32 = 1 << 1;
    pub const GID: u32 = 1 << 2;
    pub const SIZE: u32 = 1 << 3;
    pub const ATIME: u32 = 1 << 4;
    pub const MTIME: u32 = 1 << 5;
    pub const FH: u32 = 1 << 6;
    pub const ATIME_NOW: u32 = 1 << 7;
    pub const MTIME_NOW: u32 = 1 << 8;
}

wire!(
    /// `struct fuse_in_header`.
    InHeader {
        /// Of the whole request, this header included.
        len: u32,
        /// See [`opcode`].
        opcode: u32,
        /// Names the request.
        unique: u64,
        /// What it is about.
        nodeid: u64,
        /// Of the process that caused it.
        uid: u32,
        /// Likewise.
        gid: u32,
        /// Likewise.
        pid: u32,
        /// Length of the extensions in 8-byte units.
        total_extlen: u16,
        /// Zero.
        padding: u16,
    }
);

wire!(
    /// `struct fuse_out_header`.
    OutHeader {
        /// Of the whole reply, this header included.
        len: u32,
        /// 0, or a negative error number.
        error: i32,
        /// Of the request.
        unique: u64,
    }
);

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
        /// [`ATTR_DAX`].
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
    /// `struct fuse_forget_in`.
    ForgetIn {
        /// By how much the look-up count falls.
        nlookup: u64,
    }
);

wire!(
    /// `struct fuse_forget_one`.
    ForgetOne {
        /// What is forgotten.
        nodeid: u64,
        /// By how much the look-up count falls.
        nlookup: u64,
    }
);

wire!(
    /// `struct fuse_batch_forget_in`, followed by that many [`ForgetOne`].
    BatchForgetIn {
        /// How many follow.
        count: u32,
        /// Nothing.
        dummy: u32,
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
    /// `struct fuse_kstatfs`, the reply to STATFS but for its six spare numbers of 32 bits and padding.
    StatfsOut {
        /// Blocks.
        blocks: u64,
        /// Free blocks.
        bfree: u64,
        /// Free blocks for users.
        bavail: u64,
        /// Inodes.
        files: u64,
        /// Free inodes.
        ffree: u64,
        /// Block size.
        bsize: u32,
        /// The longest name.
        namelen: u32,
        /// Fragment size.
        frsize: u32,
        /// Zero.
        padding: u32,
        /// Zero.
        spare0: u64,
        /// Zero.
        spare1: u64,
        /// Zero.
        spare2: u64,
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
    /// `struct fuse_init_in` up to where version 7.36 lengthens it.
    InitIn {
        /// Of the kernel.
        major: u32,
        /// Of the kernel.
        minor: u32,
        /// In bytes.
        max_readahead: u32,
        /// The lower half, see [`init`].
        flags: u32,
    }
);

wire!(
    /// `struct fuse_init_out`.
    InitOut {
        /// [`MAJOR`].
        major: u32,
        /// [`MINOR`].
        minor: u32,
        /// In bytes, at most what was offered.
        max_readahead: u32,
        /// The lower half, see [`init`].
        flags: u32,
        /// Requests that may be under way in the background.
        max_background: u16,
        /// From which number on the kernel holds back.
        congestion_threshold: u16,
        /// In bytes.
        max_write: u32,
        /// Granularity of times in nanoseconds.
        time_gran: u32,
        /// Pages that one request may carry.
        max_pages: u16,
        /// For DAX: the alignment of mappings as a power of two.
        map_alignment: u16,
        /// The upper half of the flags.
        flags2: u32,
        /// For passthrough: none.
        max_stack_depth: u32,
        /// Zero.
        unused0: u64,
        /// Zero.
        unused1: u64,
        /// Zero.
        unused2: u64,
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
        /// [`SETUPMAPPING_WRITE`].
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
        /// See [`fattr`].
        valid: u32,
        /// Zero.
        padding: u32,
        /// File handle, where [`fattr::FH`] is set.
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
        /// See [`fopen`].
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

/// `FUSE_WRITE_CACHE`: the page cache writes, not a process.
pub const WRITE_CACHE: u32 = 1;

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
    /// `struct fuse_setxattr_in` as it is without `FUSE_SETXATTR_EXT`, followed by a name and the value.
    SetxattrIn {
        /// Of the value, in bytes.
        size: u32,
        /// `XATTR_*`.
        flags: u32,
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

wire!(
    /// `struct fuse_interrupt_in`.
    InterruptIn {
        /// Of the request that is not to wait any longer.
        unique: u64,
    }
);

/// The bytes of a structure.
pub fn encode<T: Wire>(value: &T) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(T::SIZE);
    value.put(&mut bytes);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_the_kernels_lengths() {
        assert_eq!(InHeader::SIZE, 40);
        assert_eq!(OutHeader::SIZE, 16);
        assert_eq!(Attr::SIZE, 88);
        assert_eq!(EntryOut::SIZE, 128);
        assert_eq!(AttrOut::SIZE, 104);
        assert_eq!(StatxIn::SIZE, 24);
        assert_eq!(StatxOut::SIZE + 14 * 8, STATX_OUT_SIZE);
        assert_eq!(ReadIn::SIZE, 40);
        assert_eq!(StatfsOut::SIZE, 80);
        assert_eq!(InitOut::SIZE, 64);
        assert_eq!(LseekIn::SIZE, 24);
        assert_eq!((SetupmappingIn::SIZE, RemovemappingIn::SIZE, RemovemappingOne::SIZE), (40, 4, 16));
        assert_eq!(Dirent::SIZE, 24);
        assert_eq!((SetattrIn::SIZE, CreateIn::SIZE, OpenOut::SIZE), (88, 16, 16));
        assert_eq!((WriteIn::SIZE, LkIn::SIZE, FallocateIn::SIZE), (40, 48, 32));
        assert_eq!((CopyFileRangeIn::SIZE, ReleaseIn::SIZE, FlushIn::SIZE), (56, 24, 24));
        assert_eq!((ForgetOne::SIZE, BatchForgetIn::SIZE, GetattrIn::SIZE), (16, 8, 16));
    }

    #[test]
    fn a_structure_is_read_as_it_was_written_and_not_from_less() {
        let header = InHeader { len: 40, opcode: 1, unique: 2, nodeid: 3, ..InHeader::default() };
        let bytes = encode(&header);
        assert_eq!(bytes[..16], [40, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
        let mut rest = &bytes[..];
        assert_eq!((InHeader::take(&mut rest), rest.len()), (Some(header), 0));
        for cut in 0..bytes.len() {
            assert_eq!(InHeader::take(&mut &bytes[..cut]), None);
        }
    }
}
