//! What end-to-end tests, the demo and the benchmark stand on: real clients, a real daemon, a real registry.
//!
//! ```text
//!  here                                   in the host (this machine, or the test host)
//!   Docker (the real CLI) ─ unix socket ─▶ Daemon: bulkheadd and its microVMs
//!   http::Client ─────────  forwarded   ─▶ Registry: docker-registry on loopback
//! ```
//!
//! [`Host`] hides which of the two the host is. Clients run here either way, so that only what is tested is
//! emulated. Everything that is started is stopped when dropped.

pub mod bulkhead;
pub mod daemon;
pub mod docker;
pub mod host;
pub mod hostile;
pub mod http;
pub mod image;
pub mod posix;
pub mod registry;
pub mod size;
pub mod suite;
pub mod terminal;

pub use bulkhead::bulkhead;
pub use daemon::{Daemon, DaemonOptions, with_daemon};
pub use docker::{Container, Docker, Output};
pub use host::Host;
pub use registry::Registry;
pub use size::size;
pub use suite::Suite;
