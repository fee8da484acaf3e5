//! The MMIO transport.

use crate::*;

#[test]
fn registers_of_every_width_at_every_offset() -> Test {
    completes("registers")
}

#[test]
fn status_in_every_order() -> Test {
    completes("status_orders:1")
}

#[test]
fn features_that_were_never_offered() -> Test {
    completes("features")
}

#[test]
fn configuration_space_written_everywhere() -> Test {
    completes("config_writes")
}

#[test]
fn queues_that_do_not_exist() -> Test {
    completes("queue_selector")
}

/// CVE-2026-5747.
#[test]
fn rings_moved_while_the_device_runs_stay_where_they_were() -> Test {
    completes("moved_rings")
}

#[test]
fn doorbell_storms_do_not_reach_the_neighbour() -> Test {
    Hostile::new("doorbells:3")?.with_neighbour().run(RUNNER)?.completed()
}

#[test]
fn resets_in_the_middle_of_requests() -> Test {
    completes("resets")
}

#[test]
fn anything_at_all() -> Test {
    for seed in [1, 2] {
        completes(&format!("anything:{seed}"))?;
    }
    Ok(())
}

#[test]
fn two_processors_race_resets_and_kicks() -> Test {
    for device in 0..5 {
        Hostile::new(&format!("race:{device}"))?.vcpus(2).run(RUNNER)?.completed_or_corrupt()?;
    }
    Ok(())
}
