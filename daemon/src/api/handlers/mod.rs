//! The operations, a file a resource. Each handler: parse → one engine call → render.

pub mod containers;
pub mod exec;
pub mod images;
pub mod later;
pub mod logs;
pub mod networks;
pub mod system;

use super::router::Route;

/// Every resource's routes.
pub(super) const TABLES: &[&[Route]] = &[
    system::ROUTES,
    containers::ROUTES,
    logs::ROUTES,
    exec::ROUTES,
    images::ROUTES,
    networks::ROUTES,
    later::ROUTES,
];
