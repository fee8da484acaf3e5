//! `docker pull`: from a reference to an image whose layers are unpacked.
//!
//! ```text
//!  for each endpoint:  ping ─▶ manifest ─▶ [index ─▶ manifest] ─▶ "Pulling from …"
//!                        ─▶ configuration ─▶ pin its layers ─▶ layers, some at a time (`fetch`)
//!                        ─▶ manifest, configuration, names ─▶ "Status: …"
//!      └ failed: the next endpoint, if this was a mirror or never spoke
//! ```
//!
//! The configuration comes first: it names the diff ids, so layers that are here are known before anything
//! large is fetched, and every layer is checked against it while it is unpacked. A pull that fails, or whose
//! client goes away, ends its transfers, waits for their unpacking to end, and removes what it alone brought.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::{StreamExt, stream::FuturesUnordered};
use tokio_util::task::TaskTracker;

use super::{
    ImageStore,
    config::{ImageConfig, MAX_CONFIG},
    digest::Digest,
    fetch::{LayerRequest, fetch_layer},
    platform::Platform,
    progress::{Message, Messages, Progress},
    reference::Reference,
    registry::{
        Credentials, RegistryError, Session, Wanted,
        manifest::{Descriptor, ImageManifest, Manifest, choose},
    },
    store::Pin,
    view,
};
use crate::engine::{Error, Result};

/// Indexes that may lie within each other.
const MAX_NESTING: usize = 3;

/// What to pull.
#[derive(Debug, Clone)]
pub struct PullRequest {
    /// A tag, a digest, or (with neither) every tag of the repository.
    pub reference: Reference,
    /// Instead of the host's.
    pub platform: Option<Platform>,
    /// The client's.
    pub credentials: Option<Credentials>,
}

/// What an endpoint has for a reference.
struct Resolved {
    /// Of what the reference names: an index, if it is one.
    digest: Digest,
    /// The image's manifest, as it came.
    raw: Bytes,
    manifest: ImageManifest,
}

impl ImageStore {
    /// Pulls; the messages are the progress and end with the pull. An error that is the *first* message came
    /// before anything was promised to the client: it is the answer's status.
    pub fn pull(self: &Arc<Self>, request: PullRequest) -> Messages {
        let (progress, messages) = Progress::channel();
        let store = Arc::clone(self);
        tokio::spawn(async move {
            let unpacking = TaskTracker::new();
            let result = tokio::select! {
                result = store.pull_from_any(&request, &progress, &unpacking) => result,
                () = progress.closed() => Err(Error::internal("context canceled")),
            };
            // Unpacking ends by itself once nobody feeds it. Only then is it known what is left.
            unpacking.close();
            unpacking.wait().await;
            if let Err(error) = result {
                store.collect_layers_soon().await;
                progress.fail(error).await;
            }
        });
        messages
    }

    async fn pull_from_any(
        self: &Arc<Self>,
        request: &PullRequest,
        progress: &Progress,
        unpacking: &TaskTracker,
    ) -> Result<()> {
        let reference = &request.reference;
        let repository = reference.repository();
        if repository.familiar() == "scratch" {
            return Err(Error::forbidden("'scratch' is a reserved name"));
        }
        let mut told: Option<RegistryError> = None;
        for endpoint in self.registries.endpoints(repository.domain()).await {
            let (mirror, tls) = (endpoint.mirror, endpoint.scheme == "https");
            let session =
                Session::open(&self.registries, endpoint, repository.path(), request.credentials.as_ref())
                    .await;
            let (error, spoke) = match session {
                Ok(session) => match self.pull_from(&session, request, progress, unpacking).await {
                    Ok(()) => {
                        self.announce("pull", &reference.familiar(), Some(&repository.familiar()));
                        return Ok(());
                    }
                    Err(error) => (error, true),
                },
                Err(error) => (error, false),
            };
            tracing::info!(reference = %reference.familiar(), %error, "an endpoint did not give the image");
            let local = matches!(error, RegistryError::Local(_));
            let over = local || (!mirror && (spoke || error.is_answer()));
            // What a registry said about the image is worth more than that another could not be reached.
            if told.as_ref().is_none_or(|before| !before.is_answer() || error.is_answer()) {
                told = Some(error);
            }
            // It speaks TLS: it must not be asked in the clear what it refused.
            if over && (local || spoke || tls) {
                break;
            }
        }
        Err(told.map_or_else(
            || Error::internal(format!("no endpoints found for {}", reference.familiar())),
            |error| error.for_pull(reference),
        ))
    }

    async fn pull_from(
        self: &Arc<Self>,
        session: &Session<'_>,
        request: &PullRequest,
        progress: &Progress,
        unpacking: &TaskTracker,
    ) -> Result<(), RegistryError> {
        let reference = &request.reference;
        let mut newer = false;
        if reference.is_name_only() {
            let tags = session.tags().await?;
            for tag in tags {
                let tagged = reference.with_tag(&tag).map_err(|e| RegistryError::Invalid(e.to_string()))?;
                newer |= self.pull_one(session, &tagged, request, progress, unpacking).await?;
            }
        } else {
            newer = self.pull_one(session, reference, request, progress, unpacking).await?;
        }
        let name = reference.familiar();
        let status = if newer { "Downloaded newer image" } else { "Image is up to date" };
        progress.send(Message::status(format!("Status: {status} for {name}"))).await;
        if let Some(platform) = &request.platform {
            // An image of one platform is taken as it is, with a word about it.
            let warning =
                view::for_platform(&self.store.catalog(), &reference.to_string(), Some(platform)).err();
            if let Some(warning) = warning.filter(|_| !reference.is_name_only()) {
                progress.send(Message::status(format!("WARNING: {warning}"))).await;
            }
        }
        Ok(())
    }

    /// Whether the name stands for another image than before.
    async fn pull_one(
        self: &Arc<Self>,
        session: &Session<'_>,
        reference: &Reference,
        request: &PullRequest,
        progress: &Progress,
        unpacking: &TaskTracker,
    ) -> Result<bool, RegistryError> {
        let platform = request.platform.clone().unwrap_or_else(Platform::host);
        let resolved = resolve(session, reference, &platform).await?;
        let shown = match (reference.digest(), reference.tag()) {
            (Some(digest), _) => digest.to_string(),
            (None, tag) => tag.unwrap_or_default().to_owned(),
        };
        // Here, and here only, Docker names the path at the registry.
        let from = format!("Pulling from {}", reference.repository().path());
        progress.send(Message::status_of(shown, from)).await;
        let (raw, config, pin) = self.pull_image(session, &resolved.manifest, progress, unpacking).await?;
        progress.send(Message::status(format!("Digest: {}", resolved.digest))).await;
        let store = Arc::clone(&self.store);
        let reference = reference.clone();
        let commit = move || {
            let image = store.add(&raw, config, Some(&resolved.raw))?;
            let mut names = vec![reference.with_digest(resolved.digest)];
            if reference.digest().is_none() {
                names.push(reference);
            }
            let before = store.name(&names, image.id)?;
            drop(pin);
            Ok(before.last().copied().flatten() != Some(image.id))
        };
        blocking(commit).await.map_err(RegistryError::Local)
    }

    /// Brings the layers of an image here; its configuration, and what keeps the layers.
    async fn pull_image(
        self: &Arc<Self>,
        session: &Session<'_>,
        manifest: &ImageManifest,
        progress: &Progress,
        unpacking: &TaskTracker,
    ) -> Result<(Bytes, ImageConfig, Pin), RegistryError> {
        let raw = session.small_blob(&manifest.config, MAX_CONFIG, "image config").await?;
        let config = ImageConfig::parse(&raw).map_err(|error| RegistryError::Invalid(error.to_string()))?;
        if config.layers().len() != manifest.layers.len() {
            let text = "layers from manifest don't match image configuration";
            return Err(RegistryError::Invalid(text.to_owned()));
        }
        let (store, layers) = (Arc::clone(&self.store), config.layers().to_vec());
        let pin = blocking(move || Ok(store.pin(&layers))).await.map_err(RegistryError::Local)?;
        if self.store.catalog().get(&manifest.config.digest).is_some() {
            return Ok((raw, config, pin));
        }
        let mut missing: Vec<LayerRequest> = Vec::new();
        for (descriptor, diff_id) in manifest.layers.iter().zip(config.layers()) {
            if missing.iter().any(|layer| layer.diff_id == *diff_id) {
                continue;
            }
            let request = LayerRequest { descriptor: descriptor.clone(), diff_id: *diff_id };
            if self.store.layers().contains(diff_id) {
                progress.send(Message::step(request.id(), "Already exists")).await;
            } else {
                progress.send(Message::step(request.id(), "Pulling fs layer")).await;
                missing.push(request);
            }
        }
        let mut transfers: FuturesUnordered<_> =
            missing.into_iter().map(|layer| fetch_layer(self, session, layer, progress, unpacking)).collect();
        while let Some(result) = transfers.next().await {
            result?;
        }
        drop(transfers);
        Ok((raw, config, pin))
    }
}

/// From a reference to the manifest of one image.
async fn resolve(
    session: &Session<'_>,
    reference: &Reference,
    platform: &Platform,
) -> Result<Resolved, RegistryError> {
    let wanted = match reference.digest() {
        Some(digest) => Wanted::Digest(digest),
        None => Wanted::Tag(reference.tag().unwrap_or("latest")),
    };
    let (digest, mut raw) = session.manifest(wanted).await?;
    for _ in 0..MAX_NESTING {
        match Manifest::parse(&raw)? {
            Manifest::Image(manifest) => return Ok(Resolved { digest, raw, manifest }),
            Manifest::Index(entries) => {
                let entry: &Descriptor = choose(&entries, platform)?;
                raw = session.manifest(Wanted::Digest(entry.digest)).await?.1;
            }
        }
    }
    Err(RegistryError::Invalid("indexes lie too deep within each other".to_owned()))
}

/// Runs what blocks on the disk where it may.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(Error::internal(format!("a task of the image store ended early: {error}"))),
    }
}
