//! `/images`.

use crate::api::router::{Route, table};

pub(super) const ROUTES: &[Route] = table! {};
