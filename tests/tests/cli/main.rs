//! What people type: the real docker CLI on the shared daemon.

mod exec;
mod exit_codes;
mod flags;
mod images;
mod limits;
mod logs;
mod pause;
mod soak;
mod streams;
mod table;
mod writes;

/// An error fails the test, with its whole story.
type Test = anyhow::Result<()>;

fn docker() -> anyhow::Result<bulkhead_tests::Docker> {
    Ok(bulkhead_tests::Suite::from_env()?.docker())
}
