//! virtio-net's worker.

use libc::*;

use super::call::{Call, call, call_if, request};

pub(super) const CALLS: &[Call] = &[
    call(SYS_epoll_wait, "waits for kicks and frames"),
    call(SYS_timerfd_settime, "a rate limit makes it wait"),
    call(SYS_epoll_ctl, "a tap is watched while there are buffers for its frames"),
    call(SYS_readv, "a frame to the guest"),
    call(SYS_writev, "a frame from it"),
    call(SYS_timerfd_settime, "when a frame over its rate limit is looked at again"),
    call_if(SYS_ioctl, &[&[request(TUNSETOFFLOAD as u32)]], "what the tap may leave to the guest"),
];
