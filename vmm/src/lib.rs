//! The virtual machine monitor: one process a sandbox ([`process`]). A library, so that tests, benches and fuzz
//! targets can reach the parts.

pub mod arch;
pub mod bus;
pub mod config;
pub mod console;
pub mod devices;
pub mod entropy;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod jail;
pub mod machine;
pub mod process;
pub mod rate_limiter;
pub mod recorder;
pub mod seccomp;
pub mod shares;
pub mod window;
