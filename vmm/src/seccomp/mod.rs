//! What each kind of thread may ask of the kernel.
//!
//! ```text
//!   call of the thread's tables ──▶ allowed, its arguments within bounds
//!   anything else ──▶ SIGSYS ──▶ the handler writes the report, which names thread and call ──▶ killed
//! ```
//!
//! A file a kind: [`common`] for all, and one for each. The reason of each call stands beside it. Threads share
//! memory, so whoever owns one owns all in the end; yet each call still has to be made by a thread that may.
//!
//! A call that is not allowed is never made, whatever becomes of the handler. That it is trapped, and the
//! process killed by the handler's hand, is for the report: the kernel itself would tell only its audit log
//! which call it was.

mod balloon;
mod block;
mod call;
mod common;
mod control;
mod fs;
mod mem;
mod net;
mod rng;
mod shares;
mod vcpu;
mod violation;
mod vsock;

use std::{collections::BTreeMap, io};

use bulkhead_bpf::{Instruction, Ranges, Verdict};

use crate::{devices::virtio::device::DeviceType, jail::Files};
use call::Call;

pub use violation::watch;

/// `AUDIT_ARCH_X86_64`.
const ARCHITECTURE: u32 = 0xc000_003e;

/// A kind of thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The first thread: the control socket, and the end.
    Control,
    /// Guest code, and what a driver asks of devices by their registers.
    Vcpu,
    /// virtio-blk's worker.
    Block,
    /// virtio-fs's.
    Fs,
    /// virtio-net's.
    Net,
    /// virtio-vsock's.
    Vsock,
    /// virtio-rng's.
    Rng,
    /// virtio-balloon's.
    Balloon,
    /// virtio-mem's.
    Mem,
    /// All threads of a share server, which is another process.
    Shares,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Control,
        Self::Vcpu,
        Self::Block,
        Self::Fs,
        Self::Net,
        Self::Vsock,
        Self::Rng,
        Self::Balloon,
        Self::Mem,
        Self::Shares,
    ];

    /// The worker of a device.
    #[must_use]
    pub fn worker(device: DeviceType) -> Self {
        match device {
            DeviceType::Block => Self::Block,
            DeviceType::Fs => Self::Fs,
            DeviceType::Net => Self::Net,
            DeviceType::Vsock => Self::Vsock,
            DeviceType::Rng => Self::Rng,
            DeviceType::Balloon => Self::Balloon,
            DeviceType::Mem => Self::Mem,
        }
    }

    /// What it may still do with file names: shares are attached by the first thread and served by their worker.
    #[must_use]
    pub fn files(self) -> Files {
        match self {
            Self::Control | Self::Fs => Files::ReadBeneath,
            _ => Files::None,
        }
    }

    /// Its name in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Control => "control",
            Self::Vcpu => "vcpu",
            Self::Block => "block",
            Self::Fs => "fs",
            Self::Net => "net",
            Self::Vsock => "vsock",
            Self::Rng => "rng",
            Self::Balloon => "balloon",
            Self::Mem => "mem",
            Self::Shares => "shares",
        }
    }

    fn tables(self) -> [&'static [Call]; 2] {
        let own = match self {
            Self::Control => control::CALLS,
            Self::Vcpu => vcpu::CALLS,
            Self::Block => block::CALLS,
            Self::Fs => fs::CALLS,
            Self::Net => net::CALLS,
            Self::Vsock => vsock::CALLS,
            Self::Rng => rng::CALLS,
            Self::Balloon => balloon::CALLS,
            Self::Mem => mem::CALLS,
            Self::Shares => shares::CALLS,
        };
        [common::CALLS, own]
    }
}

/// Puts the calling thread under its kind's filter, for ever. It has no new privileges.
///
/// # Errors
/// The kernel refuses.
pub fn install(kind: Kind) -> io::Result<()> {
    let process = u64::from(std::process::id());
    violation::prepare(kind)?;
    bulkhead_bpf::install(&program(kind, process), 0)
}

fn program(kind: Kind, process: u64) -> Vec<Instruction> {
    let mut calls: BTreeMap<u32, Verdict> = BTreeMap::new();
    for call in kind.tables().into_iter().flatten() {
        let verdict = calls.entry(call.number()).or_insert_with(|| Verdict::always(libc::SECCOMP_RET_TRAP));
        match call.alternatives(process) {
            None => verdict.otherwise = libc::SECCOMP_RET_ALLOW,
            Some(alternatives) => {
                verdict.rules.extend(alternatives.map(|conditions| (conditions, libc::SECCOMP_RET_ALLOW)));
            }
        }
    }
    calls.insert(violation::LAST_CALL, Verdict::always(libc::SECCOMP_RET_KILL_PROCESS));
    let ranges = Ranges::new(calls, libc::SECCOMP_RET_TRAP);
    bulkhead_bpf::program(&[(ARCHITECTURE, ranges)], libc::SECCOMP_RET_KILL_PROCESS)
}

#[cfg(test)]
mod tests;
