//! Containers over time, and daemons that die, stop and run out of things. Most tests have a daemon of their own.

mod checkpoints;
mod containers;
mod daemon_death;
mod failures;
mod forks;
mod health;
mod machine;
mod memory;
mod random_death;
mod settings;
mod templates;

/// An error fails the test, with its whole story.
type Test = anyhow::Result<()>;
