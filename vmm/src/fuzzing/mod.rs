//! What a fuzzer runs: one function a target, from any bytes to what a guest, a disk or a client could do.
//!
//! A target may refuse what it gets in any orderly way. It must not panic, read or write outside of guest memory, or
//! need more and more memory. The unit tests run every target on its stored corpus and on random changes of it, for a
//! bounded time; `cargo xtask fuzz` runs one with a fuzzer that sees which code is reached, for as long as is wanted.
//!
//! | target | attacker | input |
//! |---|---|---|
//! | `balloon` `block` `fs` `mem` `net` `rng` `vsock` | guest | descriptors, buffers, kicks and configuration accesses of a running device |
//! | `mmio` | guest | accesses to the registers of a device, from its reset on |
//! | `ports` | guest | port I/O to the legacy devices |
//! | `fuse` | guest | one FUSE request after the other, in sound chains |
//! | `shares` | guest | one FUSE request after the other to a share server, which must leave alone what is beside the shares |
//! | `packets` | guest | one vsock packet after the other, in sound chains |
//! | `device_state` | a disk that the state came back from | a device's saved state, then its use |
//! | `machine_state` | likewise | a state file with a right checksum |
//! | `config` `control` | whoever speaks for the daemon | the configuration, and requests |

mod devices;
pub(crate) mod input;
mod state;
mod text;
mod transport;

/// A target's function.
pub type Target = fn(&[u8]);

/// All targets by name.
pub const TARGETS: &[(&str, Target)] = &[
    ("balloon", devices::balloon),
    ("block", devices::block),
    ("fs", devices::fs),
    ("mem", devices::mem),
    ("net", devices::net),
    ("rng", devices::rng),
    ("vsock", devices::vsock),
    ("fuse", devices::fuse),
    ("shares", crate::shares::fuzzing::shares),
    ("packets", devices::packets),
    ("mmio", transport::mmio),
    ("ports", transport::ports),
    ("device_state", state::device),
    ("machine_state", state::machine),
    ("config", text::config),
    ("control", text::control),
];
