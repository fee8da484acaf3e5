//! The Docker contract: HTTP in, engine calls, HTTP out. Never mentions virtual machines.

pub mod types;
