//! vCPU threads: guest code, and device registers, by which a driver activates and resets devices.

use libc::*;

use super::call::{Call, call, call_if, int, request};
use crate::arch::x86_64::ioctls::*;

pub(super) const CALLS: &[Call] = &[
    call_if(SYS_ioctl, &[&[request(KVM_RUN)], &[request(KVM_KVMCLOCK_CTRL)]], "guest code; it was paused"),
    call_if(
        SYS_ioctl,
        &[
            &[request(KVM_GET_REGS)],
            &[request(KVM_GET_SREGS)],
            &[request(KVM_GET_MSRS)],
            &[request(KVM_GET_LAPIC)],
            &[request(KVM_GET_MP_STATE)],
            &[request(KVM_GET_VCPU_EVENTS)],
            &[request(KVM_GET_DEBUGREGS)],
            &[request(KVM_GET_TSC_KHZ)],
            &[request(KVM_GET_XSAVE)],
            &[request(KVM_GET_XSAVE2)],
            &[request(KVM_GET_XCRS)],
        ],
        "a parked vCPU is saved",
    ),
    call_if(SYS_ioctl, &[&[request(TUNSETOFFLOAD as u32)]], "virtio-net is activated"),
    call_if(SYS_madvise, &[&[int(2, 22)]], "MADV_POPULATE_READ: which pages of the window are gone"),
    call(SYS_poll, "whether the console's pipe has room"),
    call(SYS_ppoll, "the same, where rustix asks the kernel itself"),
    call(SYS_timerfd_settime, "a device with a rate limit is reset"),
    call(SYS_epoll_ctl, "virtio-vsock is reset: its clients are no longer watched"),
    call(SYS_shutdown, "virtio-vsock is reset: its connections end"),
    call(SYS_recvfrom, "virtio-vsock is reset: what its clients had sent is thrown away"),
    call(SYS_sendto, "virtio-vsock is reset: what a client still gets"),
];
