//! The first thread: requests with their descriptors, and the report at the end.

use libc::*;

use super::call::{Call, call, call_if, int, lacks, request, this_process};
use crate::arch::x86_64::ioctls::*;

/// The signal that takes a vCPU out of the guest: SIGRTMIN as the C library counts.
const KICK: i32 = 34;

pub(super) const CALLS: &[Call] = &[
    // ---- the socket
    call(SYS_poll, "waits for requests, signals and the machine's end"),
    call(SYS_ppoll, "the same, where rustix asks the kernel itself"),
    call(SYS_accept4, "a daemon connects"),
    call(SYS_recvmsg, "a request with its descriptors"),
    call(SYS_sendmsg, "its answer"),
    // ---- vCPUs
    call_if(SYS_tgkill, &[&[this_process(0), int(2, KICK)]], "a vCPU is to pause or stop"),
    // ---- what is attached is looked at, and made ready for its worker
    call(SYS_fstat, "what kind of file it is"),
    call(SYS_newfstatat, "the same, by the C library"),
    call(SYS_statx, "a disk's size"),
    call_if(
        SYS_fcntl,
        &[
            &[int(1, F_GETFL)],
            &[int(1, F_SETFL)],
            &[int(1, F_GETFD)],
            &[int(1, F_SETFD)],
            &[int(1, F_DUPFD_CLOEXEC)],
        ],
        "how it was opened; a tap becomes non-blocking",
    ),
    call_if(
        SYS_mmap,
        &[&[int(2, PROT_READ | PROT_WRITE), int(3, MAP_SHARED | MAP_NORESERVE)]],
        "the memory that is shared with a share server",
    ),
    call_if(
        SYS_mmap,
        &[&[lacks(2, PROT_EXEC | PROT_WRITE), int(3, MAP_SHARED | MAP_FIXED | MAP_POPULATE)]],
        "files that a restored guest had in the window",
    ),
    call_if(SYS_fcntl, &[&[int(1, F_GET_SEALS)]], "whether that can vanish"),
    call(SYS_openat2, "a share's own directory"),
    call(SYS_fgetxattr, "whether it is a layer"),
    call(SYS_lseek, "the size of a file"),
    call_if(
        SYS_ioctl,
        &[&[request(TUNGETIFF as u32)], &[request(TUNSETVNETHDRSZ as u32)], &[request(TUNSETOFFLOAD as u32)]],
        "a tap is made ready",
    ),
    call_if(
        SYS_ioctl,
        &[&[request(KVM_SET_USER_MEMORY_REGION)]],
        "more of the region in which memory is plugged becomes usable",
    ),
    // ---- a rate limit is set
    call(SYS_timerfd_create, "its timer"),
    call(SYS_timerfd_settime, "the same"),
    // ---- the machine is saved
    call_if(
        SYS_ioctl,
        &[&[request(KVM_GET_IRQCHIP)], &[request(KVM_GET_CLOCK)], &[request(KVM_GET_PIT2)]],
        "the chips",
    ),
    call(SYS_fdatasync, "the files are on disk before the answer"),
    call(SYS_epoll_ctl, "a tap is watched"),
    call(SYS_epoll_create1, "the same"),
    // ---- the end
    call(SYS_shutdown, "vsock connections end with the machine"),
    call(SYS_sendto, "what vsock clients still get"),
    call(SYS_ftruncate, "a report that found no room is cut"),
];
