//! `/images`.

use crate::api::router::{Route, routes};

pub(super) const ROUTES: &[Route] = routes! {};
