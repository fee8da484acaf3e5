//! Docker's vocabulary as data: what requests and responses of API 1.50 look like.
//!
//! The structs are the server's own, so that every field renders as dockerd renders it: absent, `null`,
//! `[]` and `{}` are four different things to clients. Requests are read with [`json`], by Go's rules.
//! Field names are Docker's; what they mean stands in the API's reference.

pub mod container;
pub mod event;
pub mod exec;
pub mod filters;
pub mod image;
pub mod json;
pub mod machine;
pub mod network;
pub mod system;
pub mod volume;

pub use filters::{FilterError, Filters};
use serde::{Deserialize, Serialize};

/// `{}`: a value that is only there or not, in Docker's sets.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Empty {}

/// For `skip_serializing_if`: Go's `omitempty`.
pub(crate) fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// For `skip_serializing_if`: Go's `omitempty` of lists that may be null.
pub(crate) fn is_empty_list<T>(list: &Option<Vec<T>>) -> bool {
    list.as_ref().is_none_or(Vec::is_empty)
}
