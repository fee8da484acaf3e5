//! `docker commit`: a container's changes become a layer, and the layer an image on top of the container's own.

use std::sync::Arc;

use bulkhead_rootfs::layers::{DiffId, Limits};
use bytes::Bytes;
use futures_util::Stream;
use jiff::Timestamp;

use super::{
    ImageStore, changes,
    config::{History, ImageConfig, RootFs, RunConfig},
    digest::Digest,
    errors,
    feed::{Feed, Whole},
    pull::blocking,
    reference::Reference,
};
use crate::engine::{Error, Result};

/// The digest of a tar archive of nothing: two zero blocks, as Docker writes it.
const EMPTY_LAYER: &str = "5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef";

/// What `POST /commit` asks for.
#[derive(Debug, Clone, Default)]
pub struct CommitRequest {
    /// What to call it; `latest` without a tag.
    pub reference: Option<Reference>,
    /// Who.
    pub author: String,
    /// The commit message.
    pub comment: String,
    /// Dockerfile instructions: `CMD`, `ENV` and their like.
    pub changes: Vec<String>,
    /// Instead of the container's config, with which it is merged.
    pub config: Option<RunConfig>,
}

/// The container that is committed.
#[derive(Debug, Clone)]
pub struct Committed {
    /// Its image.
    pub image: Digest,
    /// Its layers, bottom first.
    pub layers: Vec<DiffId>,
    /// Its config.
    pub config: RunConfig,
}

impl ImageStore {
    /// Makes an image of a container and of its writable layer, which comes as an archive; the image's id.
    ///
    /// # Errors
    /// Bad changes; the container's image is gone; the archive broke off or cannot be a layer; a full disk.
    pub async fn commit<E: Send>(
        self: &Arc<Self>,
        request: CommitRequest,
        container: Committed,
        archive: impl Stream<Item = Result<Bytes, E>> + Send + 'static,
    ) -> Result<Digest> {
        if request.reference.as_ref().is_some_and(|name| name.digest().is_some()) {
            return Err(Error::invalid("cannot commit to digest reference"));
        }
        let run = run_config(&request, &container.config)?;
        let base = self.store.catalog().get(&container.image).map(|image| image.config.clone());
        let base = base.ok_or_else(|| {
            Error::not_found(format!("the container's image {} is no longer there", container.image))
        })?;
        let feed = Feed::of(archive);
        let (this, reference) = (Arc::clone(self), request.reference.clone());
        let id = blocking(move || {
            let _import = this.store.importing();
            // Of the container's layers the container itself takes care.
            let _pin = this.store.pin(&container.layers);
            let ended = feed.ended();
            let layer = this.layers().import(Whole { reader: feed, ended }, &Limits::default());
            let layer = layer.map_err(|error| errors::layer(&error))?;
            let empty = layer.diff_id.hex() == EMPTY_LAYER;
            let config = image_config(base, &request, &container, run, (!empty).then_some(layer.diff_id));
            let raw = serde_json::to_vec(&config).map_err(|error| Error::internal(error.to_string()))?;
            let pin = this.store.pin(&[layer.diff_id]);
            let image = this.store.add(&raw, config, None)?;
            this.store.update_record(&image.id, |record| record.parent = Some(container.image))?;
            drop(pin);
            Ok(image.id)
        })
        .await?;
        if let Some(reference) = reference {
            self.set_tag(id, reference.or_latest()).await?;
        }
        Ok(id)
    }
}

/// The new image's config: what was asked for, or the container's own, changed.
fn run_config(request: &CommitRequest, container: &RunConfig) -> Result<RunConfig> {
    let mut config = match &request.config {
        // Clients send an empty one and mean none.
        Some(config) if *config != RunConfig::default() => merged(config.clone(), container),
        _ => container.clone(),
    };
    config = changes::apply(config, &request.changes)?;
    Ok(config)
}

/// What a config leaves open is the container's.
fn merged(mut config: RunConfig, container: &RunConfig) -> RunConfig {
    if config.user.is_empty() {
        config.user.clone_from(&container.user);
    }
    if config.working_dir.is_empty() {
        config.working_dir.clone_from(&container.working_dir);
    }
    if config.stop_signal.is_empty() {
        config.stop_signal.clone_from(&container.stop_signal);
    }
    if config.entrypoint.is_none() {
        if config.cmd.as_ref().is_none_or(Vec::is_empty) {
            config.cmd.clone_from(&container.cmd);
        }
        config.entrypoint.clone_from(&container.entrypoint);
    }
    let name = |variable: &String| variable.split('=').next().unwrap_or_default().to_owned();
    let mut env = config.env.take().unwrap_or_default();
    for variable in container.env.iter().flatten() {
        if !env.iter().any(|have| name(have) == name(variable)) {
            env.push(variable.clone());
        }
    }
    config.env = Some(env);
    for (to, from) in
        [(&mut config.exposed_ports, &container.exposed_ports), (&mut config.volumes, &container.volumes)]
    {
        for (key, value) in from.iter().flatten() {
            to.get_or_insert_default().entry(key.clone()).or_insert(*value);
        }
    }
    for (key, value) in container.labels.iter().flatten() {
        config.labels.get_or_insert_default().entry(key.clone()).or_insert_with(|| value.clone());
    }
    if config.healthcheck.is_none() {
        config.healthcheck.clone_from(&container.healthcheck);
    }
    config
}

/// The base's configuration with one layer and one step of history more; a layer of nothing is none.
fn image_config(
    base: ImageConfig,
    request: &CommitRequest,
    container: &Committed,
    run: RunConfig,
    layer: Option<DiffId>,
) -> ImageConfig {
    let now = Timestamp::now();
    let mut layers = container.layers.clone();
    layers.extend(layer);
    let mut history = base.history;
    history.push(History {
        created: Some(now),
        author: request.author.clone(),
        created_by: container.config.cmd.iter().flatten().map(String::as_str).collect::<Vec<_>>().join(" "),
        comment: request.comment.clone(),
        empty_layer: layer.is_none(),
    });
    ImageConfig {
        created: Some(now),
        author: request.author.clone(),
        comment: request.comment.clone(),
        docker_version: String::new(),
        config: Some(run),
        rootfs: Some(RootFs { kind: "layers".to_owned(), diff_ids: layers }),
        history,
        ..base
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_of_nothing_has_the_digest_of_docker() {
        assert_eq!(Digest::of(&[0; 1024]).hex(), EMPTY_LAYER);
    }

    #[test]
    fn what_a_given_config_leaves_open_is_the_containers() {
        let container = RunConfig {
            user: "web".into(),
            cmd: Some(vec!["run".into()]),
            env: Some(vec!["A=1".into(), "B=2".into()]),
            ..RunConfig::default()
        };
        let given = RunConfig { env: Some(vec!["A=9".into()]), ..RunConfig::default() };
        let request = CommitRequest {
            config: Some(given),
            changes: vec!["ENV C=3".into(), "CMD [\"other\"]".into()],
            ..CommitRequest::default()
        };
        let config = run_config(&request, &container).unwrap();
        assert_eq!(config.env.unwrap(), ["A=9", "B=2", "C=3"]);
        assert_eq!((config.user.as_str(), config.cmd.unwrap()), ("web", vec!["other".to_owned()]));
        let request = CommitRequest { config: Some(RunConfig::default()), ..CommitRequest::default() };
        assert_eq!(run_config(&request, &container).unwrap(), container);
        let request = CommitRequest { changes: vec!["RUN x".into()], ..CommitRequest::default() };
        assert!(run_config(&request, &container).is_err());
    }
}
