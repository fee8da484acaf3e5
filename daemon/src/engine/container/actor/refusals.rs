//! What a container is not fit for, in Docker's words.

use super::{
    super::{
        record::Record,
        state::{Failure, Refusal},
    },
    Actor,
};
use crate::engine::Error;

impl Actor {
    pub(super) fn refused_start(&self, refusal: Refusal) -> Error {
        match refusal {
            Refusal::BeingRemoved | Refusal::Dead => {
                Error::conflict("container is marked for removal and cannot be started")
            }
            Refusal::Paused => Error::conflict("cannot start a paused container, try unpause instead"),
            _ => Error::not_modified("the container is already started"),
        }
    }

    pub(super) fn refused_removal(&self, refusal: Refusal) -> Error {
        let Record { name, .. } = &self.record;
        match refusal {
            Refusal::Paused => Error::conflict(format!(
                "cannot remove container \"/{name}\": container is paused and must be unpaused first"
            )),
            Refusal::Runs(status) => Error::conflict(format!(
                "cannot remove container \"/{name}\": container is {status}: stop the container before removing or force \
                 remove"
            )),
            _ => Error::conflict(format!("removal of container {name} is already in progress")),
        }
    }
}

/// How the reasons begin for which a container cannot run in another's machine now; it may later.
const CANNOT_JOIN: &str = "cannot join ";

/// A failed start as its caller is told of it: what the user can mend is 400, as in Docker, or 409 where it
/// depends on others.
pub(super) fn failed_start(failure: &Failure) -> Error {
    match failure.code {
        126 | 127 => Error::invalid(failure.error.clone()),
        _ if failure.error.starts_with(CANNOT_JOIN) => Error::conflict(failure.error.clone()),
        _ => Error::internal(failure.error.clone()),
    }
}
