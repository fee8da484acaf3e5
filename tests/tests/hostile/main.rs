//! Guests that attack their VMM, each in a machine of its own: the guest is `tests/hostile-guest`, which drives every
//! device raw. What must hold in every case (an orderly end with a reason, bounded memory and logs, nothing on the host
//! touched) is checked by [`Hostile::run`]; a test says what else came of it.

use bulkhead_tests::hostile::{Ask, Hostile, Outcome};
use bulkhead_vmm_api::ExitReason;

mod devices;
mod platform;
mod rings;
mod transport;

/// An error fails the test, with its whole story.
type Test = anyhow::Result<()>;

const RUNNER: &str = env!("CARGO_BIN_EXE_hostile-machine");

fn run(scenario: &str) -> anyhow::Result<Outcome> {
    Hostile::new(scenario)?.run(RUNNER)
}

/// Runs it and asserts that the guest came to its scenario's end: every device still served an honest driver.
fn completes(scenario: &str) -> Test {
    run(scenario)?.completed()
}

#[test]
fn an_honest_guest_is_served() -> Test {
    completes("works")
}
