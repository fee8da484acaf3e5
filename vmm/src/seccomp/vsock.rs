//! virtio-vsock's worker: Unix sockets.

use libc::*;

use super::call::{Call, call, call_if, int, request};

pub(super) const CALLS: &[Call] = &[
    call(SYS_epoll_wait, "waits for kicks and clients"),
    call(SYS_epoll_ctl, "clients come and go"),
    call(SYS_accept4, "a client connects"),
    call_if(SYS_ioctl, &[&[request(FIONBIO as u32)]], "its socket becomes non-blocking"),
    call_if(SYS_fcntl, &[&[int(1, F_GETFL)], &[int(1, F_SETFL)]], "the same"),
    call(SYS_recvfrom, "a client's first line"),
    call(SYS_recvmsg, "bytes to the guest"),
    call(SYS_readv, "bytes to the guest"),
    call(SYS_sendto, "bytes from the guest that had to wait"),
    call(SYS_sendmsg, "bytes from the guest"),
    call(SYS_shutdown, "one side is done"),
];
