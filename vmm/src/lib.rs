//! The virtual machine monitor: one process a sandbox. `main.rs` is the process; this library is what it
//! is made of, so that tests, benches and fuzz targets can reach the parts.

pub mod arch;
pub mod bus;
pub mod config;
pub mod console;
pub mod devices;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod machine;
pub mod rate_limiter;
pub mod recorder;
