//! virtio-balloon's worker. How it gives memory back, `madvise`, is among the common calls.

use libc::*;

use super::call::{Call, call};

pub(super) const CALLS: &[Call] = &[
    call(SYS_epoll_wait, "waits for kicks"),
    call(SYS_epoll_ctl, "a failed device's sources are no longer watched"),
];
