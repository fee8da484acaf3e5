//! What a container may use: CPUs, memory, processes, its disk's and network's rates. Pure, but for what the host
//! has.
//!
//! ```text
//!                 ┌─ check ──▶ refusals and warnings, in dockerd's words
//!  HostConfig ────┼─ cpu ────▶ vCPUs of the microVM · control group of its VMM
//!                 ├─ rates ──▶ token buckets of its devices
//!                 └─ update ─▶ the HostConfig after `docker update`
//! ```
//! A limit is kept in two places. In the guest the container's own cgroup keeps it, precisely and with the
//! figures that `docker stats` shows. On the host the control group of the VMM, and the VMM's devices, keep it
//! whatever becomes of the guest.

mod check;
mod cpu;
mod cpuset;
mod rates;
mod update;

pub(crate) use check::check;
pub(crate) use cpu::{host_limits, vcpus};
pub(crate) use rates::rates;
pub(crate) use update::{merge, vcpus_warning};
