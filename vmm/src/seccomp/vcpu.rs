//! vCPU threads: guest code, and device registers, by which a driver activates and resets devices.

use libc::*;

use super::call::{Call, call, call_if, request};

/// `_IO(KVMIO, 0x80)`
const KVM_RUN: u32 = 0xae80;
/// `_IO(KVMIO, 0xad)`
const KVM_KVMCLOCK_CTRL: u32 = 0xaead;

pub(super) const CALLS: &[Call] = &[
    call_if(
        SYS_ioctl,
        &[
            &[request(KVM_RUN)],
            &[request(KVM_KVMCLOCK_CTRL)],
            &[request(TUNSETOFFLOAD as u32)],
        ],
        "guest code; it was paused; virtio-net is activated",
    ),
    call(SYS_poll, "whether the console's pipe has room"),
    call(SYS_epoll_ctl, "virtio-vsock is reset: its clients are no longer watched"),
    call(SYS_shutdown, "virtio-vsock is reset: its connections end"),
    call(SYS_sendto, "virtio-vsock is reset: what a client still gets"),
];
