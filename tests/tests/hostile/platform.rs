//! Ports, holes, processors, the console, and the ends that a machine can come to.

use anyhow::{Context, bail};
use bulkhead_vmm_api::CONSOLE_TAIL;

use crate::*;

#[test]
fn every_port() -> Test {
    completes("ports")
}

#[test]
fn addresses_where_nothing_is() -> Test {
    completes("holes")
}

#[test]
fn model_specific_registers_and_hypercalls() -> Test {
    completes("registers_of_the_cpu")
}

#[test]
fn interrupts_to_everybody_and_nobody() -> Test {
    completes("interrupt_storm")
}

#[test]
fn all_of_the_guests_memory() -> Test {
    completes("all_memory")
}

#[test]
fn a_flood_on_the_console_is_bounded() -> Test {
    let outcome = run("console_flood")?;
    outcome.completed()?;
    // Of what came, the report has the end.
    let report = outcome.report.context("a report")?;
    assert!(outcome.console_bytes > 0x1_0000 && report.console.len() <= 3 * CONSOLE_TAIL);
    Ok(())
}

#[test]
fn a_false_panic_is_told_in_bounds() -> Test {
    match run("false_panic")?.reason()? {
        ExitReason::GuestPanic { message } if message.len() < 2048 => {
            assert!(!message.chars().any(char::is_control), "{message:?}");
            Ok(())
        }
        other => bail!("{other:?}"),
    }
}

#[test]
fn a_triple_fault_ends_the_machine() -> Test {
    assert_eq!(*run("triple_fault")?.reason()?, ExitReason::TripleFault);
    Ok(())
}

#[test]
fn instructions_from_devices_and_from_nowhere() -> Test {
    for place in ["run_into_a_device", "run_into_a_hole"] {
        match run(place)?.reason()? {
            ExitReason::Kvm { message } if !message.is_empty() => {}
            ExitReason::TripleFault => {}
            other => bail!("{place}: {other:?}"),
        }
    }
    Ok(())
}

#[test]
fn a_guest_that_halts_for_ever_can_be_asked_and_killed() -> Test {
    let asks = [Ask::Status, Ask::Pause, Ask::Status, Ask::Kill];
    let outcome = Hostile::new("halt")?.when_ready(&asks).run(RUNNER)?;
    assert_eq!(*outcome.reason()?, ExitReason::Killed);
    Ok(())
}

#[test]
fn a_guest_that_never_leaves_can_be_asked_and_terminated() -> Test {
    let asks = [Ask::Status, Ask::Pause, Ask::Pause, Ask::Status, Ask::Terminate];
    let outcome = Hostile::new("spin")?.when_ready(&asks).run(RUNNER)?;
    assert_eq!(*outcome.reason()?, ExitReason::Killed);
    Ok(())
}
