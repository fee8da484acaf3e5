//! The operations, a file a resource. Each handler: parse → one engine call → render.

pub mod archive;
pub mod checkpoints;
pub mod containers;
pub mod exec;
pub mod images;
pub mod later;
pub mod logs;
pub mod machine;
pub mod metrics;
pub mod networks;
pub mod registry;
pub mod stats;
pub mod system;
pub mod volumes;

use super::router::Route;

/// Every resource's routes.
pub(super) const TABLES: &[&[Route]] = &[
    system::ROUTES,
    archive::ROUTES,
    checkpoints::ROUTES,
    containers::ROUTES,
    logs::ROUTES,
    machine::ROUTES,
    metrics::ROUTES,
    registry::ROUTES,
    stats::ROUTES,
    exec::ROUTES,
    images::ROUTES,
    volumes::ROUTES,
    networks::ROUTES,
    later::ROUTES,
];
