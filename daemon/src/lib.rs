//! `bulkheadd`: the Docker Engine API over microVMs. `api` → `engine` → `sandbox` and
//! `hostnet`; `main.rs` is the process.

pub mod api;
pub mod check;
pub mod config;
pub mod data_root;
pub mod engine;
pub mod hostnet;
pub mod layout;
pub mod metrics;
pub mod phases;
pub mod sandbox;
pub mod units;
