//! One layer from a registry into the store, in one go: what arrives is decompressed and unpacked while the
//! rest is still coming, and lies nowhere twice.
//!
//! ```text
//!  Blob ─ chunks, sha256 ─▶ channel ─▶ thread: Feed ─▶ decompress ─▶ LayerStore::unpack (diff id)
//! ```
//! The layer appears in its store only after the reader's end, and the reader ends only after the compressed
//! digest was right. A channel that closes before (the pull failed, the client left) is an error to the
//! unpacker, which then removes what it made.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, Weak, atomic::Ordering},
    time::Duration,
};

use bulkhead_rootfs::layers::{DiffId, LayerError, Limits, decompress};
use sha2::{Digest as _, Sha256};
use tokio::sync::{Semaphore, oneshot};
use tokio_util::task::TaskTracker;

use super::{
    ImageStore,
    digest::Digest,
    errors,
    feed::{Feed, Whole},
    progress::{Message, Progress, Throttle},
    registry::{RegistryError, Session, manifest::Descriptor},
};

/// A layer to bring.
#[derive(Debug, Clone)]
pub(super) struct LayerRequest {
    /// Where it is, compressed.
    pub descriptor: Descriptor,
    /// What it must be, uncompressed.
    pub diff_id: DiffId,
}

impl LayerRequest {
    /// As progress calls it.
    pub(super) fn id(&self) -> String {
        self.descriptor.digest.short()
    }
}

/// Who brings which layer, and how many at a time.
#[derive(Debug)]
pub(super) struct Transfers {
    places: Semaphore,
    layers: Mutex<HashMap<DiffId, Weak<tokio::sync::Mutex<()>>>>,
}

impl Transfers {
    /// At most `places` at a time, whoever asks.
    pub(super) fn new(places: usize) -> Self {
        Self { places: Semaphore::new(places.max(1)), layers: Mutex::default() }
    }

    /// The lock of one layer: who holds it brings the layer, the others then find it.
    fn of(&self, layer: DiffId) -> Arc<tokio::sync::Mutex<()>> {
        let mut layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(lock) = layers.get(&layer).and_then(Weak::upgrade) {
            return lock;
        }
        layers.retain(|_, lock| lock.strong_count() > 0);
        let lock = Arc::default();
        layers.insert(layer, Arc::downgrade(&lock));
        lock
    }
}

/// Brings one layer, unless someone else does meanwhile.
///
/// # Errors
/// The registry's, or the layer cannot be unpacked.
pub(super) async fn fetch_layer(
    store: &ImageStore,
    session: &Session<'_>,
    layer: LayerRequest,
    progress: &Progress,
    unpacking: &TaskTracker,
) -> Result<(), RegistryError> {
    let id = layer.id();
    let lock = store.transfers.of(layer.diff_id);
    let _turn = match lock.try_lock() {
        Ok(turn) => turn,
        Err(_) => {
            progress.send(Message::step(&id, "Waiting")).await;
            lock.lock().await
        }
    };
    if !store.store.layers().contains(&layer.diff_id) {
        let place = store.transfers.places.try_acquire();
        let _place = match place {
            Ok(place) => place,
            Err(_) => {
                progress.send(Message::step(&id, "Waiting")).await;
                let closed = |_| RegistryError::Invalid("transfers have ended".to_owned());
                store.transfers.places.acquire().await.map_err(closed)?
            }
        };
        transfer(store, session, &layer, progress, unpacking).await?;
    }
    progress.send(Message::step(&id, "Pull complete")).await;
    Ok(())
}

async fn transfer(
    store: &ImageStore,
    session: &Session<'_>,
    layer: &LayerRequest,
    progress: &Progress,
    unpacking: &TaskTracker,
) -> Result<(), RegistryError> {
    let (id, total) = (layer.id(), layer.descriptor.size);
    let mut blob = session.blob(&layer.descriptor).await?;
    let (chunks, feed) = Feed::channel();
    let consumed = feed.consumed();
    let (layers, diff_id) = (Arc::clone(store.store.layers()), layer.diff_id);
    let (done, mut unpacked) = oneshot::channel();
    unpacking.spawn_blocking(move || {
        let ended = feed.ended();
        let result = decompress(feed)
            .map_err(LayerError::Source)
            .and_then(|reader| layers.unpack(&diff_id, Whole { reader, ended }, &Limits::default()));
        let _ = done.send(result.map(drop).map_err(|error| errors::layer(&error)));
    });
    // Whichever ends first: all bytes were handed over, or the unpacker wants no more.
    let mut hasher = Sha256::new();
    let mut throttle = Throttle::default();
    let mut stopped = None;
    while let Some(chunk) = blob.next().await? {
        hasher.update(&chunk);
        if chunks.send(Some(chunk)).await.is_err() {
            stopped = Some((&mut unpacked).await);
            break;
        }
        if throttle.ready() {
            progress.send(Message::counts(&id, "Downloading", blob.offset(), total)).await;
        }
    }
    let result = match stopped {
        Some(result) => result,
        None => {
            progress.send(Message::step(&id, "Verifying Checksum")).await;
            if Digest::finish(hasher) != layer.descriptor.digest {
                return Err(RegistryError::Digest {
                    what: "filesystem layer",
                    digest: layer.descriptor.digest,
                });
            }
            progress.send(Message::step(&id, "Download complete")).await;
            let _ = chunks.send(None).await;
            loop {
                tokio::select! {
                    result = &mut unpacked => break result,
                    () = tokio::time::sleep(Duration::from_millis(100)) => {
                        let count = consumed.load(Ordering::Relaxed);
                        progress.send(Message::counts(&id, "Extracting", count, total)).await;
                    }
                }
            }
        }
    };
    match result {
        Ok(Ok(())) => {
            progress.send(Message::counts(&id, "Extracting", total, total)).await;
            Ok(())
        }
        Ok(Err(error)) => Err(RegistryError::Local(error)),
        Err(_) => Err(RegistryError::Invalid("unpacking the layer ended early".to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_layer_has_one_lock() {
        let transfers = Transfers::new(0);
        let layer = DiffId::from_bytes([1; 32]);
        let first = transfers.of(layer);
        assert!(Arc::ptr_eq(&first, &transfers.of(layer)));
        drop(first);
        transfers.of(DiffId::from_bytes([2; 32]));
        assert_eq!(transfers.layers.lock().unwrap().len(), 1);
    }
}
