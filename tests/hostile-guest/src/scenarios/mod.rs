//! The attacks, by name.

use crate::virtio::{Desc, Device, Driver, Kind, Machine, Ring, buffer};

mod block;
mod chains;
mod elastic;
mod fs;
mod net;
mod platform;
mod rings;
mod rng;
mod transport;
mod vsock;

/// An attack; the number chooses a variant where there are several.
pub type Scenario = fn(&Machine, u64);

/// Finds a scenario by its name.
#[must_use]
pub fn find(name: &str) -> Option<Scenario> {
    SCENARIOS.iter().find(|(other, _)| *other == name).map(|(_, scenario)| *scenario)
}

const SCENARIOS: &[(&str, Scenario)] = &[
    ("works", works),
    ("registers", transport::registers),
    ("status_orders", transport::status_orders),
    ("features", transport::features),
    ("config_writes", transport::config_writes),
    ("queue_selector", transport::queue_selector),
    ("moved_rings", transport::moved_rings),
    ("doorbells", transport::doorbells),
    ("resets", transport::resets),
    ("anything", transport::anything),
    ("race", transport::race),
    ("queue_size", rings::queue_size),
    ("ring_address", rings::ring_address),
    ("rings_at_the_end", rings::rings_at_the_end),
    ("index_runs", rings::index_runs),
    ("head_outside", rings::head_outside),
    ("rings_overlap", rings::rings_overlap),
    ("rings_as_buffers", rings::rings_as_buffers),
    ("rings_change", rings::rings_change),
    ("chains", chains::malformed),
    ("block_requests", block::requests),
    ("block_floods", block::floods),
    ("fuse_opcodes", fs::opcodes),
    ("fuse_names", fs::names),
    ("fuse_changes", fs::changes),
    ("fuse_lookups", fs::lookups),
    ("fuse_forgets", fs::forgets),
    ("fuse_listings", fs::listings),
    ("vsock_nonsense", vsock::nonsense),
    ("vsock_floods", vsock::floods),
    ("vsock_credit", vsock::credit),
    ("vsock_agent", vsock::agent),
    ("net_headers", net::headers),
    ("rng_greed", rng::greed),
    ("balloon_lies", elastic::balloon_lies),
    ("mem_lies", elastic::mem_lies),
    ("ports", platform::ports),
    ("holes", platform::holes),
    ("console_flood", platform::console_flood),
    ("false_panic", platform::false_panic),
    ("registers_of_the_cpu", platform::model_specific),
    ("all_memory", platform::all_memory),
    ("triple_fault", platform::triple_fault),
    ("run_into_a_device", platform::run_into_a_device),
    ("run_into_a_hole", platform::run_into_a_hole),
    ("halt", platform::halt),
    ("spin", platform::spin),
    ("interrupt_storm", platform::interrupt_storm),
    ("beat", platform::beat),
];

/// No attack at all: every device does its work.
fn works(machine: &Machine, _: u64) {
    for device in machine.devices() {
        use_it(device);
    }
}

/// Resets a device and uses it as an honest driver does; panics where that does not work.
fn use_it(device: Device) {
    match device.kind {
        Kind::Block => block::works(&mut device.up()),
        Kind::Fs => fs::works(&mut device.up()),
        Kind::Vsock => vsock::works(&mut device.up()),
        Kind::Net => net::works(&mut device.up()),
        Kind::Rng => rng::works(&mut device.up()),
        Kind::Balloon => elastic::balloon_works(&mut device.up()),
        Kind::Mem => elastic::mem_works(&mut device.up()),
        Kind::Other => drop(device.up()),
    }
}

/// The queue on which a device takes requests from its driver.
fn request_queue(kind: Kind) -> u32 {
    match kind {
        // A balloon's first takes pages away: nonsense there would hit this program's own.
        Kind::Fs | Kind::Vsock | Kind::Net | Kind::Balloon => 1,
        _ => 0,
    }
}

/// Offers many chains before the first is looked at: entry `n` of `chains` begins at descriptor `n` times `each`.
fn offer_many(driver: &mut Driver, queue: u32, each: u64, chains: &[[Desc; 3]]) {
    let ring: Ring = *driver.ring(queue);
    for (number, chain) in (0..).zip(chains) {
        for (index, desc) in (0..).zip(chain) {
            let first = (number * each) as u16;
            let next = if desc.flags & 1 != 0 { first + desc.next } else { 0 };
            Desc { next, ..*desc }.put(ring.desc, number * each + index);
        }
        ring.offer((number * each) as u16);
    }
    driver.device.kick(queue);
}

/// Where a scenario's own buffers begin, behind those of [`use_it`].
fn scratch() -> u64 {
    buffer(16)
}
