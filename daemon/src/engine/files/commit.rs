//! `docker commit`.

use std::sync::Arc;

use bulkhead_agent_api::files::FilesRequest;

use super::pieces;
use crate::engine::{
    Engine, Error, Name, Result,
    container::state::{Running, State},
    image::{CommitRequest, Committed, Digest},
};

impl Engine {
    /// Makes an image of a container; the image's id. With `pause` what runs stands still meanwhile.
    ///
    /// # Errors
    /// No such container; bad changes; its files cannot be read; a full disk.
    pub async fn container_commit(
        &self,
        name: Name<'_>,
        pause: bool,
        request: CommitRequest,
    ) -> Result<Digest> {
        let container = self.shared.registry.find(name)?;
        let record = container.view().record;
        let id = &record.id;
        match record.life.state {
            State::Dead(_) => {
                return Err(Error::conflict(format!("You cannot commit container {id} which is Dead")));
            }
            State::Removing(_) => {
                return Err(Error::conflict(format!(
                    "You cannot commit container {id} which is being removed"
                )));
            }
            _ => {}
        }
        let runs = matches!(record.life.state, State::Running(Running { paused: false, .. }));
        let paused = pause && runs;
        if paused {
            self.container_pause(id, true).await?;
        }
        let committed =
            Committed { image: record.image, layers: record.layers.clone(), config: record.config.clone() };
        let reference = request.reference.clone().map(|name| name.or_latest().familiar());
        let comment = request.comment.clone();
        let made = async {
            let pieces =
                pieces(&container, FilesRequest::Diff, format!("committing container {name}")).await?;
            Arc::clone(self.images()).commit(request, committed, pieces.into_stream()).await
        }
        .await;
        if paused && let Err(error) = self.container_pause(id, false).await {
            // It may have ended meanwhile.
            tracing::warn!(container = id, %error, "a committed container does not run on");
        }
        let image = made?;
        let attributes = [
            ("comment".to_owned(), comment),
            ("imageID".to_owned(), image.to_string()),
            ("imageRef".to_owned(), reference.unwrap_or_default()),
        ];
        self.shared.publish(&record, "commit", attributes);
        Ok(image)
    }
}
