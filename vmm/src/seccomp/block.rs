//! virtio-blk's worker.

use libc::*;

use super::call::{Call, call};

pub(super) const CALLS: &[Call] = &[
    call(SYS_epoll_wait, "waits for kicks"),
    call(SYS_timerfd_settime, "a rate limit makes it wait"),
    call(SYS_epoll_ctl, "a failed device's sources are no longer watched"),
    call(SYS_preadv, "reads into guest memory"),
    call(SYS_pwritev, "writes from guest memory"),
    call(SYS_fdatasync, "flush"),
    call(SYS_fallocate, "discard, write zeroes"),
    call(SYS_timerfd_settime, "when a request over its rate limit is looked at again"),
];
