//! What others build on Docker: their own programs, unchanged, against the daemon.

mod devcontainers;
mod testcontainers;

/// An error fails the test, with its whole story.
type Test = anyhow::Result<()>;
