//! The share server: the process that reads and writes volumes and bind mounts for one sandbox
//! ([ADR 8](../../../docs/adr/0008-share-server.md)).
//!
//! ```text
//!  guest ── virtio-fs ──▶ VMM (`devices::virtio::fs::forward`) ── slot ──▶ share server ──▶ the host's files
//!                         has no right to any file                        has rights to files, and nothing else
//! ```
//!
//! `bulkhead-vmm --share-config-fd N` reads its configuration from descriptor N, goes to jail, and serves until
//! its VMM has ended. It is a process of its own since it needs what no thread of a VMM has: to own, change and
//! give away files of whatever user. Of all rights it has those alone ([`RIGHTS`]), over nothing but the shares:
//! they are mounts without a parent, its root is empty, and its system calls are listed.
//!
//! * `area`: the memory that both sides share.
//! * `service`: the channel, the workers.
//! * `dispatch`: from a request to an operation and back.
//! * `server`: the operations; `nodes`, `handles`, `locks`: what the guest knows, has open, holds; `index`: one lock
//!   that is not as it seems.

pub mod area;
mod dispatch;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
mod handles;
mod index;
mod locks;
mod nodes;
mod process;
mod server;
mod service;
#[cfg(test)]
mod tests;

pub use process::{RIGHTS, main};

/// The guest sees this error number.
type Result<T> = std::result::Result<T, rustix::io::Errno>;
