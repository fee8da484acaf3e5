//! `POST /containers/prune`: removes what does not run.

use std::sync::Arc;

use super::{Command, record::Record, state::State};
use crate::{
    api::types::{Filters, container::PruneResponse},
    engine::{Error, ErrorKind, Result, Shared, image},
};

/// The keys that a prune can be filtered by.
pub const PRUNE_FILTERS: [&str; 3] = ["label", "label!", "until"];

/// Removes every container that does not run and that the filters include.
pub(super) async fn prune(shared: &Arc<Shared>, filters: &Filters) -> Result<PruneResponse> {
    let until = image::until(filters)?;
    let mut response = PruneResponse::default();
    for container in shared.registry.all() {
        let record = container.view().record;
        let old_enough = until.is_none_or(|until| record.created <= until);
        if !old_enough || !matches!(record.life.state, State::Resting(_)) || !includes(&record, filters) {
            continue;
        }
        let size = shared.disk_usage(&record.id).await;
        match container.ask(|reply| Command::Remove { force: false, reply }).await.and_then(|done| done) {
            Ok(()) => {
                response.containers_deleted.get_or_insert_default().push(record.id.clone());
                response.space_reclaimed += size;
            }
            // It was started or removed in the meantime.
            Err(Error { kind: ErrorKind::Conflict | ErrorKind::NotFound, .. }) => {}
            Err(error) => tracing::warn!(container = record.id, %error, "a container could not be pruned"),
        }
    }
    shared.events.publish(
        "container",
        "prune",
        "",
        [("reclaimed".to_owned(), response.space_reclaimed.to_string())].into(),
    );
    Ok(response)
}

fn includes(record: &Record, filters: &Filters) -> bool {
    let labels = record.config.labels.clone().unwrap_or_default();
    filters.labels("label", &labels) && filters.no_labels("label!", &labels)
}
