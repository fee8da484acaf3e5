//! Rings and chains.

use crate::*;

#[test]
fn queues_of_impossible_sizes() -> Test {
    for size in 0..8 {
        run(&format!("queue_size:{size}"))?.queue_was_corrupt()?;
    }
    Ok(())
}

#[test]
fn rings_outside_memory_over_devices_and_around_the_end_of_addresses() -> Test {
    // Every place for the descriptors, then some for the two rings.
    for place in (0..9).chain([9, 11, 14, 18, 20, 26]) {
        run(&format!("ring_address:{place}"))?.queue_was_corrupt()?;
    }
    Ok(())
}

#[test]
fn rings_that_end_with_memory_are_good() -> Test {
    completes("rings_at_the_end")
}

#[test]
fn an_available_index_that_runs() -> Test {
    for device in 0..5 {
        run(&format!("index_runs:{device}"))?.queue_was_corrupt()?;
    }
    run("index_runs:5")?.queue_was_corrupt()?;
    run("index_runs:10")?.queue_was_corrupt()
}

#[test]
fn heads_outside_the_table() -> Test {
    for device in 0..5 {
        run(&format!("head_outside:{device}"))?.queue_was_corrupt()?;
    }
    run("head_outside:5")?.queue_was_corrupt()
}

#[test]
fn rings_on_top_of_each_other() -> Test {
    for way in 0..4 {
        run(&format!("rings_overlap:{way}"))?.completed_or_corrupt()?;
    }
    Ok(())
}

#[test]
fn a_device_told_to_write_into_its_own_rings() -> Test {
    for device in 0..3 {
        run(&format!("rings_as_buffers:{device}"))?.completed_or_corrupt()?;
    }
    Ok(())
}

#[test]
fn rings_that_another_processor_changes_all_the_time() -> Test {
    for device in 0..5 {
        Hostile::new(&format!("rings_change:{device}"))?.vcpus(2).run(RUNNER)?.completed_or_corrupt()?;
    }
    Ok(())
}

#[test]
fn malformed_chains_are_completed_and_the_next_is_served() -> Test {
    completes("chains")
}
