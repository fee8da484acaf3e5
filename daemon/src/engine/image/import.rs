//! `docker import`: a root filesystem's tar becomes an image of one layer.

use std::sync::Arc;

use bulkhead_rootfs::layers::{LayerError, Limits, decompress};
use bytes::Bytes;
use futures_util::Stream;
use jiff::Timestamp;

use super::{
    ImageStore, changes,
    config::{History, ImageConfig, RootFs},
    digest::Digest,
    errors,
    feed::{Feed, Whole},
    platform::Platform,
    pull::blocking,
    reference::Reference,
};
use crate::engine::{Error, Result};

/// What `POST /images/create?fromSrc=-` asks for.
#[derive(Debug, Clone, Default)]
pub struct ImportRequest {
    /// What to call it; `latest` without a tag.
    pub reference: Option<Reference>,
    /// Instead of the host's.
    pub platform: Option<Platform>,
    /// The commit message.
    pub message: String,
    /// Dockerfile instructions: `CMD`, `ENV` and their like.
    pub changes: Vec<String>,
}

impl ImageStore {
    /// Imports `body`, a tar archive that may be compressed; the new image's id.
    ///
    /// # Errors
    /// Bad changes, a bad archive, a full disk; the body broke off.
    pub async fn import<E: Send>(
        self: &Arc<Self>,
        request: ImportRequest,
        body: impl Stream<Item = Result<Bytes, E>> + Send + 'static,
    ) -> Result<Digest> {
        let platform = request.platform.clone().unwrap_or_else(Platform::host);
        if platform.os != "linux" {
            return Err(Error::invalid(format!("operating system \"{}\" is not supported", platform.os)));
        }
        if request.reference.as_ref().is_some_and(|name| name.digest().is_some()) {
            return Err(Error::invalid("cannot import digest reference"));
        }
        let run = changes::apply(Default::default(), &request.changes)?;
        let feed = Feed::of(body);
        let this = Arc::clone(self);
        let id = blocking(move || {
            let _import = this.store.importing();
            let ended = feed.ended();
            let layer = decompress(feed)
                .map_err(LayerError::Source)
                .and_then(|reader| this.layers().import(Whole { reader, ended }, &Limits::default()))
                .map_err(|error| errors::layer(&error))?;
            let pin = this.store.pin(&[layer.diff_id]);
            let now = Timestamp::now();
            let config = ImageConfig {
                created: Some(now),
                architecture: platform.architecture,
                variant: platform.variant.unwrap_or_default(),
                os: platform.os,
                comment: request.message.clone(),
                config: Some(run),
                rootfs: Some(RootFs { kind: "layers".to_owned(), diff_ids: vec![layer.diff_id] }),
                history: vec![History { created: Some(now), comment: request.message, ..History::default() }],
                ..ImageConfig::default()
            };
            let raw = serde_json::to_vec(&config).map_err(|error| Error::internal(error.to_string()))?;
            let image = this.store.add(&raw, config, None)?;
            drop(pin);
            Ok(image.id)
        })
        .await?;
        if let Some(reference) = request.reference {
            self.set_tag(id, reference.or_latest()).await?;
        }
        self.announce_id("import", &id);
        Ok(id)
    }
}
