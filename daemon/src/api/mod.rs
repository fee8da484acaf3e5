//! The Docker contract: HTTP in, one engine call, HTTP out. Never mentions virtual machines.
//!
//! ```text
//!  socket ─▶ server ─▶ router ─▶ handlers/…  ─▶ engine
//!               ▲        version, path → route      │
//!               └── Reply: a response, or a hijack ◀┘   error.rs: one map from kinds to statuses
//!                          (stream/: stdcopy, raw stdio)
//! ```

pub mod authorization;
pub mod error;
pub mod handlers;
pub mod request;
pub mod response;
pub mod router;
pub mod server;
pub mod stream;
pub mod types;
pub mod version;
