//! The guest agent: PID 1 of every microVM. It mounts what a container's root is made of, starts the
//! container's processes as its OCI spec says, holds their output until the daemon has it, and tells how
//! they end.
//!
//! ```text
//!   main ──▶ init (mounts, limits) ──▶ server (one loop, one thread)
//!                                        ├── container ── rootfs, cgroup (devices), spawn ── child
//!                                        ├── stdio (input, output, window)
//!                                        └── files: a child for each transfer
//! ```
//!
//! Invariants:
//! * One thread: a fork is a whole copy, and nothing races.
//! * [`server`] alone waits for children.
//! * What runs in a container is hostile: nothing of it is followed, parsed unbounded or waited for.
//! * No error ends the agent: its end is the machine's.

pub mod arch;
pub mod cgroup;
pub mod child;
pub mod container;
pub mod copy_up;
pub mod devices;
pub mod error;
pub mod files;
pub mod forward;
pub mod init;
pub mod log;
pub mod mount_options;
pub mod names;
pub mod network;
pub mod poll;
pub mod processes;
pub mod rootfs;
pub mod seccomp;
pub mod server;
pub mod slots;
pub mod spawn;
pub mod spec;
pub mod stdio;
pub mod sys;
pub mod tiny_init;
pub mod transport;
pub mod users;
