//! virtio-fs's worker: the file server.

use libc::*;

use super::call::{Call, call, call_if, int, lacks};

pub(super) const CALLS: &[Call] = &[
    call(SYS_epoll_wait, "waits for kicks"),
    call(SYS_epoll_ctl, "a failed device's sources are no longer watched"),
    call(SYS_sendto, "a request is handed on to a share server"),
    call(SYS_recvfrom, "it is done"),
    // What it resolves is bounded by the share, which the daemon hands over as a mount of its own, read-only,
    // without a parent: the structure with the flags lies in memory, where no filter can see it.
    call(SYS_openat2, "a node of a share"),
    call(SYS_fstat, "size and times of a file"),
    call(SYS_newfstatat, "the same, by the C library"),
    call(SYS_fgetxattr, "what the guest sees of a file"),
    call(SYS_getdents64, "a directory's entries"),
    call(SYS_lseek, "a directory's position; holes"),
    call(SYS_pread64, "a symbolic link's target"),
    call(SYS_preadv, "reads into guest memory"),
    call_if(
        SYS_mmap,
        &[&[lacks(2, PROT_EXEC | PROT_WRITE), int(3, MAP_SHARED | MAP_FIXED | MAP_POPULATE)]],
        "a file comes into the window, to be read",
    ),
];
