//! `docker push`: from an image here to one in a registry.
//!
//! ```text
//!  for each tag:  for each layer, some at a time:
//!                   known compressed form there? ─▶ "Layer already exists"
//!                   … in another repository there? ─▶ "Mounted from"
//!                   else: its archive ─▶ gzip ─▶ pieces, sha256 ─▶ upload ─▶ "Pushed"
//!                 ─▶ configuration ─▶ manifest ─▶ "tag: digest: … size: …"
//! ```
//! The forms of a layer that are known are those of the manifests that its images came with or went with. A layer
//! is compressed while it is sent, and lies nowhere compressed.

use std::{collections::HashMap, io::Write as _, sync::Arc};

use bulkhead_rootfs::layers::DiffId;
use bytes::Bytes;
use flate2::{Compression, write::GzEncoder};
use futures_util::{StreamExt, stream};
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;

use super::{
    ImageStore,
    catalog::Image,
    config::MAX_CONFIG,
    digest::Digest,
    errors,
    files::Folder,
    progress::{Message, Messages, Progress, Throttle},
    pull::blocking,
    reference::Reference,
    registry::{
        Begun, Credentials, RegistryError, Session,
        manifest::{Descriptor, Manifest},
    },
    store::{MAX_MANIFEST, Pin},
};
use crate::engine::{Error, Result};

const MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const CONFIG: &str = "application/vnd.docker.container.image.v1+json";
const LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";

/// Layers that are sent at a time, as dockerd's `max-concurrent-uploads`.
const UPLOADS: usize = 5;

/// Bytes that are sent in one request, and kept until they have come.
const PIECE: usize = 8 << 20;

/// What to push.
#[derive(Debug, Clone)]
pub struct PushRequest {
    /// A tag, or (without one) every tag of the repository here.
    pub reference: Reference,
    /// The client's.
    pub credentials: Option<Credentials>,
}

/// Forms in which a layer lies in registries: where, and as what.
type Known = HashMap<DiffId, Vec<(Option<String>, Descriptor)>>;

/// What is known of an image before it is sent.
struct Prepared {
    image: Arc<Image>,
    /// Its configuration as it came.
    config: Vec<u8>,
    known: Known,
    /// Keeps its layers.
    pin: Pin,
}

impl ImageStore {
    /// Pushes; the messages are the progress and end with the push.
    pub fn push(self: &Arc<Self>, request: PushRequest) -> Messages {
        let (progress, messages) = Progress::channel();
        let store = Arc::clone(self);
        tokio::spawn(async move {
            let result = tokio::select! {
                result = store.push_all(&request, &progress) => result,
                () = progress.closed() => Err(Error::internal("context canceled")),
            };
            if let Err(error) = result {
                progress.fail(error).await;
            }
        });
        messages
    }

    async fn push_all(self: &Arc<Self>, request: &PushRequest, progress: &Progress) -> Result<()> {
        let reference = &request.reference;
        let repository = reference.repository();
        let shown = format!("{}/{}", repository.domain(), repository.path());
        progress.send(Message::status(format!("The push refers to repository [{shown}]"))).await;
        let tags: Vec<(Reference, Digest)> = {
            let catalog = self.store.catalog();
            let of_here = |name: &&Reference| name.repository() == repository && name.tag().is_some();
            let all = catalog.references().iter().filter(|(name, _)| of_here(name));
            all.filter(|(name, _)| reference.is_name_only() || name.tag() == reference.tag())
                .map(|(name, id)| (name.clone(), *id))
                .collect()
        };
        if tags.is_empty() {
            let name = repository.familiar();
            return Err(match reference.tag() {
                Some(tag) if self.has_repository(reference) => {
                    Error::not_found(format!("tag does not exist: {name}:{tag}"))
                }
                _ => Error::not_found(format!("An image does not exist locally with the tag: {name}")),
            });
        }
        let mut last = None;
        for endpoint in self.registries.endpoints(repository.domain()).await {
            if endpoint.mirror {
                continue;
            }
            let tls = endpoint.scheme == "https";
            let opened = Session::open_to_push(
                &self.registries,
                endpoint,
                repository.path(),
                request.credentials.as_ref(),
            );
            match opened.await {
                Ok(session) => {
                    for (name, id) in &tags {
                        self.push_one(&session, name, *id, progress)
                            .await
                            .map_err(|error| error.for_push(reference))?;
                    }
                    return Ok(());
                }
                Err(error) => {
                    let over = tls && error.is_answer();
                    last = Some(error);
                    if over {
                        break;
                    }
                }
            }
        }
        Err(last.map_or_else(
            || Error::internal(format!("no endpoints found for {}", reference.familiar())),
            |error| error.for_push(reference),
        ))
    }

    fn has_repository(&self, reference: &Reference) -> bool {
        let catalog = self.store.catalog();
        catalog.references().keys().any(|name| name.repository() == reference.repository())
    }

    async fn push_one(
        self: &Arc<Self>,
        session: &Session<'_>,
        name: &Reference,
        id: Digest,
        progress: &Progress,
    ) -> Result<(), RegistryError> {
        let Prepared { image, config, known, pin } = {
            let (store, name) = (Arc::clone(self), name.clone());
            blocking(move || store.prepare(id, &name)).await.map_err(RegistryError::Local)?
        };
        let mut layers: Vec<DiffId> = Vec::new();
        for layer in image.config.layers().iter().rev().copied() {
            if !layers.contains(&layer) {
                progress.send(Message::step(short(&layer), "Preparing")).await;
                layers.push(layer);
            }
        }
        let sent = layers.into_iter().map(|layer| {
            let known = known.get(&layer).cloned().unwrap_or_default();
            async move { Ok((layer, self.push_layer(session, layer, known, progress).await?)) }
        });
        let sent: Vec<Result<(DiffId, Descriptor), RegistryError>> =
            stream::iter(sent).buffer_unordered(UPLOADS).collect().await;
        drop(pin);
        let sent: HashMap<DiffId, Descriptor> = sent.into_iter().collect::<Result<_, _>>()?;
        let size = config.len();
        push_bytes(session, id, Bytes::from(config)).await?;
        let layers = image.config.layers().iter().filter_map(|layer| sent.get(layer)).map(|layer| {
            json!({"mediaType": layer_type(&layer.media_type), "size": layer.size, "digest": layer.digest.to_string()})
        });
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": {"mediaType": CONFIG, "size": size, "digest": id.to_string()},
            "layers": layers.collect::<Vec<_>>(),
        });
        let local = |error: serde_json::Error| RegistryError::Local(Error::internal(error.to_string()));
        let manifest = Bytes::from(serde_json::to_vec_pretty(&manifest).map_err(local)?);
        let digest = Digest::of(&manifest);
        let tag = name.tag().unwrap_or("latest").to_owned();
        session.put_manifest(&tag, MANIFEST, manifest.clone()).await?;
        let size = manifest.len();
        progress.send(Message::status(format!("{tag}: digest: {digest} size: {size}"))).await;
        progress.send(Message::aux(json!({"Tag": tag, "Digest": digest.to_string(), "Size": size}))).await;
        let (store, name) = (Arc::clone(&self.store), name.clone());
        // From now on the image is known by this digest, too, and its layers by what they are there.
        let note = move || {
            let raw = store.files().read(Folder::Configs, &id.hex(), MAX_CONFIG);
            if let Ok(Some(raw)) = raw {
                store.add(&raw, image.config.clone(), Some(&manifest))?;
                store.name(&[name.with_digest(digest)], id)?;
            }
            Ok(())
        };
        blocking(note).await.map_err(RegistryError::Local)?;
        self.announce("push", &name_of(&tag, session), Some(&name_of(&tag, session)));
        Ok(())
    }

    /// What is to be known of an image before it is sent.
    fn prepare(&self, id: Digest, name: &Reference) -> Result<Prepared> {
        let missing = || Error::not_found(format!("No such image: {id}"));
        let image = self.store.catalog().get(&id).cloned().ok_or_else(missing)?;
        let pin = self.store.pin(image.config.layers());
        let config = self.store.files().read(Folder::Configs, &id.hex(), MAX_CONFIG);
        let config = config.map_err(|error| errors::storage(&error))?.ok_or_else(missing)?;
        let catalog = self.store.catalog();
        let mut known = Known::new();
        for other in catalog.images() {
            if !other.config.layers().iter().any(|layer| image.config.layers().contains(layer)) {
                continue;
            }
            // Where in this registry the image has a name, its layers may be.
            let places: Vec<Option<String>> = catalog
                .names_of(&other.id)
                .into_iter()
                .map(Reference::repository)
                .filter(|place| place.domain() == name.repository().domain())
                .map(|place| Some(place.path().to_owned()))
                .chain([None])
                .collect();
            for manifest in &other.record.manifests {
                let raw = self.store.files().read(Folder::Manifests, &manifest.hex(), MAX_MANIFEST);
                let Ok(Some(raw)) = raw else { continue };
                let Ok(Manifest::Image(manifest)) = Manifest::parse(&raw) else { continue };
                if manifest.layers.len() != other.config.layers().len() {
                    continue;
                }
                for (layer, descriptor) in other.config.layers().iter().zip(&manifest.layers) {
                    let forms = known.entry(*layer).or_default();
                    for place in &places {
                        let form = (place.clone(), descriptor.clone());
                        if forms.len() < 32 && !forms.contains(&form) {
                            forms.push(form);
                        }
                    }
                }
            }
        }
        drop(catalog);
        Ok(Prepared { image, config, known, pin })
    }

    async fn push_layer(
        &self,
        session: &Session<'_>,
        layer: DiffId,
        known: Vec<(Option<String>, Descriptor)>,
        progress: &Progress,
    ) -> Result<Descriptor, RegistryError> {
        for (_, form) in &known {
            if let Some(size) = session.blob_size(&form.digest).await? {
                progress.send(Message::step(short(&layer), "Layer already exists")).await;
                return Ok(Descriptor { size, ..form.clone() });
            }
        }
        for (place, form) in &known {
            let Some(place) = place.as_deref().filter(|place| *place != session.path()) else { continue };
            match session.begin_upload(Some((&form.digest, place))).await {
                Ok(Begun::Mounted) => {
                    progress.send(Message::step(short(&layer), &format!("Mounted from {place}"))).await;
                    return Ok(form.clone());
                }
                // Not there, or not ours to see: it is sent.
                Ok(Begun::Upload(_)) | Err(RegistryError::Answer { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        let Begun::Upload(mut upload) = session.begin_upload(None).await? else {
            return Err(RegistryError::Invalid("the registry takes no upload".to_owned()));
        };
        let total = self.layers().info(&layer).map_or(0, |info| info.stream_bytes);
        let mut pieces = self.compressed(layer);
        let (mut hasher, mut size, mut throttle) = (Sha256::new(), 0, Throttle::default());
        while let Some(piece) = pieces.recv().await {
            let (piece, read) = piece.map_err(RegistryError::Local)?;
            hasher.update(&piece);
            size += piece.len() as u64;
            upload.send(piece).await?;
            if throttle.ready() {
                progress.send(Message::counts(short(&layer), "Pushing", read, total)).await;
            }
        }
        let digest = Digest::finish(hasher);
        upload.finish(&digest).await?;
        progress.send(Message::step(short(&layer), "Pushed")).await;
        Ok(Descriptor { media_type: LAYER.to_owned(), digest, size, platform: None, annotations: None })
    }

    /// A layer's archive, compressed, in pieces; with how much of it was read.
    fn compressed(&self, layer: DiffId) -> mpsc::Receiver<Result<(Bytes, u64)>> {
        let (sender, receiver) = mpsc::channel(1);
        let layers = Arc::clone(self.layers());
        tokio::task::spawn_blocking(move || {
            let failed = |error: &dyn std::fmt::Display| Error::internal(error.to_string());
            let run = || -> Result<()> {
                let mut archive = layers.archive(&layer).map_err(|error| failed(&error))?;
                let mut encoder = GzEncoder::new(Vec::with_capacity(PIECE), Compression::default());
                let (mut buffer, mut read) = (vec![0; 128 << 10], 0);
                loop {
                    let count =
                        std::io::Read::read(&mut archive, &mut buffer).map_err(|error| failed(&error))?;
                    if count == 0 {
                        break;
                    }
                    read += count as u64;
                    encoder.write_all(&buffer[..count]).map_err(|error| failed(&error))?;
                    if encoder.get_ref().len() >= PIECE {
                        let piece = std::mem::replace(encoder.get_mut(), Vec::with_capacity(PIECE));
                        if sender.blocking_send(Ok((piece.into(), read))).is_err() {
                            return Ok(());
                        }
                    }
                }
                let rest = encoder.finish().map_err(|error| failed(&error))?;
                let _ = sender.blocking_send(Ok((rest.into(), read)));
                Ok(())
            };
            if let Err(error) = run() {
                let _ = sender.blocking_send(Err(error));
            }
        });
        receiver
    }
}

/// Sends a small blob, unless it is there.
async fn push_bytes(session: &Session<'_>, digest: Digest, bytes: Bytes) -> Result<(), RegistryError> {
    if session.blob_size(&digest).await?.is_some() {
        return Ok(());
    }
    match session.begin_upload(None).await? {
        Begun::Mounted => Ok(()),
        Begun::Upload(mut upload) => {
            upload.send(bytes).await?;
            upload.finish(&digest).await
        }
    }
}

/// A layer keeps its compression; the name of its kind is Docker's in a manifest of Docker's.
fn layer_type(kind: &str) -> &str {
    match kind {
        "application/vnd.oci.image.layer.v1.tar+gzip" | "" => LAYER,
        other => other,
    }
}

fn short(layer: &DiffId) -> String {
    Digest::from_bytes(*layer.as_bytes()).short()
}

fn name_of(tag: &str, session: &Session<'_>) -> String {
    format!("{}/{}:{tag}", session.endpoint().authority, session.path())
}
