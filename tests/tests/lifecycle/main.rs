//! Containers over time, and daemons that die, stop and run out of things. Most tests have a daemon of their own.

mod containers;
mod daemon_death;
mod failures;
mod machine;

/// An error fails the test, with its whole story.
type Test = anyhow::Result<()>;
