//! A share server: everything that can be done with files below directories that it was given.

use libc::*;

use super::call::{Call, call, call_if, int};

pub(super) const CALLS: &[Call] = &[
    // ---- the channel
    call(SYS_recvfrom, "a call"),
    call(SYS_sendto, "its return"),
    // ---- what it resolves is bounded by the shares, which are mounts of their own without a parent
    call(SYS_openat2, "a name of a share"),
    call(SYS_openat, "an open file once more, by its number"),
    call(SYS_statx, "attributes"),
    call(SYS_fstat, "the same, by the standard library"),
    call(SYS_newfstatat, "the same"),
    call(SYS_fstatfs, "how full a file system is"),
    call(SYS_readlinkat, "a symbolic link's target"),
    call(SYS_getdents64, "a directory's entries"),
    call(SYS_lseek, "a directory's position; holes"),
    // ---- content
    call(SYS_pread64, "READ"),
    call(SYS_pwritev2, "WRITE"),
    call(SYS_fsync, "FSYNC"),
    call(SYS_fdatasync, "FSYNC"),
    call(SYS_syncfs, "SYNCFS"),
    call(SYS_ftruncate, "SETATTR"),
    call(SYS_fallocate, "FALLOCATE"),
    call(SYS_copy_file_range, "COPY_FILE_RANGE"),
    // ---- names
    call(SYS_mknodat, "MKNOD"),
    call(SYS_mkdirat, "MKDIR"),
    call(SYS_symlinkat, "SYMLINK"),
    call(SYS_linkat, "LINK"),
    call(SYS_unlinkat, "UNLINK, RMDIR"),
    call(SYS_renameat, "RENAME"),
    call(SYS_renameat2, "RENAME"),
    // ---- attributes
    call(SYS_fchownat, "SETATTR; the owner of what is made"),
    call(SYS_fchmodat, "SETATTR"),
    call(SYS_fchmod, "the rights of what is made"),
    call(SYS_utimensat, "SETATTR"),
    call(SYS_fgetxattr, "GETXATTR"),
    call(SYS_fsetxattr, "SETXATTR"),
    call(SYS_flistxattr, "LISTXATTR"),
    call(SYS_fremovexattr, "REMOVEXATTR"),
    // ---- locks
    call(SYS_flock, "SETLK of flock"),
    call_if(
        SYS_fcntl,
        &[&[int(1, F_OFD_SETLK)], &[int(1, F_OFD_GETLK)], &[int(1, F_GETFD)]],
        "SETLK and GETLK of fcntl",
    ),
];
