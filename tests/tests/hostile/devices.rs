//! What each device is asked for.

use crate::*;

#[test]
fn block_requests_out_of_range_and_out_of_order() -> Test {
    completes("block_requests")
}

#[test]
fn block_queues_full_of_what_is_dear() -> Test {
    Hostile::new("block_floods")?.with_neighbour().run(RUNNER)?.completed()
}

#[test]
fn fuse_operations_with_headers_that_lie() -> Test {
    completes("fuse_opcodes:1")?;
    completes("fuse_opcodes:2")
}

#[test]
fn fuse_names_do_not_leave_the_share() -> Test {
    completes("fuse_names")
}

/// CVE-2026-47243: a raw FUSE_SYMLINK with an absolute path; and whatever else would change a layer.
#[test]
fn fuse_changes_nothing_whoever_asks() -> Test {
    completes("fuse_changes")
}

#[test]
fn fuse_lookups_that_are_never_forgotten() -> Test {
    completes("fuse_lookups")
}

#[test]
fn fuse_forgets_what_was_never_known() -> Test {
    completes("fuse_forgets")
}

#[test]
fn fuse_listings_from_anywhere() -> Test {
    completes("fuse_listings:1")
}

#[test]
fn vsock_packets_that_make_no_sense() -> Test {
    completes("vsock_nonsense:1")
}

#[test]
fn vsock_connections_by_the_thousand() -> Test {
    completes("vsock_floods")
}

#[test]
fn vsock_credit_that_is_a_lie() -> Test {
    completes("vsock_credit")
}

#[test]
fn net_headers_that_lie_about_segments() -> Test {
    completes("net_headers:1")
}

#[test]
fn greed_for_entropy_does_not_reach_the_neighbour() -> Test {
    Hostile::new("rng_greed")?.with_neighbour().run(RUNNER)?.completed()
}

#[test]
fn pages_for_the_balloon_that_are_nowhere() -> Test {
    completes("balloon_lies:1")
}

#[test]
fn memory_that_was_never_offered_is_not_had() -> Test {
    completes("mem_lies:1")
}
