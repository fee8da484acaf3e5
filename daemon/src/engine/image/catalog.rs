//! What images there are and what they are called: the store's memory, without files.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{
    config::ImageConfig,
    digest::Digest,
    reference::{AnyReference, Reference},
};
use crate::engine::{Error, Result};

/// An image.
#[derive(Debug)]
pub(super) struct Image {
    /// The digest of its configuration.
    pub id: Digest,
    /// The configuration.
    pub config: ImageConfig,
    /// Bytes of each layer, bottom first.
    pub layer_sizes: Vec<u64>,
    /// What this engine knows of it.
    pub record: Record,
}

impl Image {
    /// Bytes of all its layers.
    pub(super) fn size(&self) -> u64 {
        self.layer_sizes.iter().sum()
    }
}

/// What this engine knows of an image beyond its configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Record {
    /// The image it was built on here.
    pub parent: Option<Digest>,
    /// When `docker tag` last named it.
    pub last_tagged: Option<Timestamp>,
    /// Manifests that came with it.
    pub manifests: BTreeSet<Digest>,
}

/// The images and their names.
#[derive(Debug, Default)]
pub(super) struct Catalog {
    images: BTreeMap<Digest, Arc<Image>>,
    references: BTreeMap<Reference, Digest>,
}

impl Catalog {
    /// From what was on disk.
    pub(super) fn new(
        images: impl IntoIterator<Item = Image>,
        references: BTreeMap<Reference, Digest>,
    ) -> Self {
        let images: BTreeMap<_, _> = images.into_iter().map(|image| (image.id, Arc::new(image))).collect();
        let references = references.into_iter().filter(|(_, id)| images.contains_key(id)).collect();
        Self { images, references }
    }

    /// Every image, in the order of their ids.
    pub(super) fn images(&self) -> impl Iterator<Item = &Arc<Image>> {
        self.images.values()
    }

    /// An image by its whole id.
    pub(super) fn get(&self, id: &Digest) -> Option<&Arc<Image>> {
        self.images.get(id)
    }

    /// Adds or replaces an image.
    pub(super) fn insert(&mut self, image: Image) -> Arc<Image> {
        let image = Arc::new(image);
        self.images.insert(image.id, Arc::clone(&image));
        image
    }

    /// Takes an image out. Its names are the caller's matter.
    pub(super) fn remove(&mut self, id: &Digest) {
        self.images.remove(id);
    }

    /// The table of names.
    pub(super) fn references(&self) -> &BTreeMap<Reference, Digest> {
        &self.references
    }

    /// Names an image; the image that had the name until now.
    pub(super) fn set_reference(&mut self, reference: &Reference, id: Digest) -> Option<Digest> {
        self.references.insert(key(reference), id)
    }

    /// Takes a name away.
    pub(super) fn remove_reference(&mut self, reference: &Reference) -> Option<Digest> {
        self.references.remove(&key(reference))
    }

    /// What a name stands for.
    pub(super) fn named(&self, reference: &Reference) -> Option<Digest> {
        self.references.get(&key(reference)).copied()
    }

    /// Every name of an image, sorted.
    pub(super) fn names_of(&self, id: &Digest) -> Vec<&Reference> {
        self.references.iter().filter(|(_, target)| *target == id).map(|(name, _)| name).collect()
    }

    /// The images that were built on this one.
    pub(super) fn children(&self, id: &Digest) -> impl Iterator<Item = &Arc<Image>> {
        let id = *id;
        self.images.values().filter(move |image| image.record.parent == Some(id))
    }

    /// The image that a user means: by name, by id, or by the beginning of an id that only one has.
    ///
    /// # Errors
    /// Not found, or `text` is neither a name nor an id.
    pub(super) fn resolve(&self, text: &str) -> Result<&Arc<Image>> {
        let named = match AnyReference::parse(text)? {
            AnyReference::Id(id) => {
                return self.get(&id).ok_or_else(|| Error::not_found(format!("No such image: {id}")));
            }
            AnyReference::Named(named) => named,
        };
        self.named(&named)
            .and_then(|id| self.get(&id))
            .or_else(|| self.by_prefix(text))
            .ok_or_else(|| Error::not_found(format!("No such image: {}", named.or_latest().familiar())))
    }

    fn by_prefix(&self, text: &str) -> Option<&Arc<Image>> {
        let digits = text.strip_prefix("sha256:").unwrap_or(text);
        if digits.is_empty() || !digits.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
            return None;
        }
        let mut found = self.images.values().filter(|image| image.id.hex().starts_with(digits));
        let first = found.next()?;
        found.next().is_none().then_some(first)
    }
}

/// A digest says exactly what is meant: a tag beside it says nothing more.
fn key(reference: &Reference) -> Reference {
    match reference.digest() {
        Some(digest) => reference.with_digest(digest),
        None => reference.clone().or_latest(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::ErrorKind;

    fn image(seed: &str) -> Image {
        Image {
            id: Digest::of(seed.as_bytes()),
            config: ImageConfig::default(),
            layer_sizes: vec![],
            record: Record::default(),
        }
    }

    #[test]
    fn images_are_found_by_what_users_call_them() {
        let (one, two) = (image("1"), image("2"));
        let (one_id, two_id) = (one.id, two.id);
        let digest = Digest::of(b"manifest");
        let parse = |text: &str| Reference::parse(text).unwrap();
        let names = BTreeMap::from([
            (parse("busybox:latest"), one_id),
            (parse(&format!("busybox@{digest}")), one_id),
            (parse("gone:latest"), Digest::of(b"gone")),
        ]);
        let catalog = Catalog::new([one, two], names);
        let hex = one_id.hex();
        for text in ["busybox", "busybox:latest", "docker.io/library/busybox", &hex, &hex[..12], &hex[..3]] {
            assert_eq!(catalog.resolve(text).unwrap().id, one_id, "{text}");
        }
        for text in
            [format!("busybox@{digest}"), format!("busybox:other@{digest}"), format!("sha256:{}", &hex[..9])]
        {
            assert_eq!(catalog.resolve(&text).unwrap().id, one_id, "{text}");
        }
        assert_eq!(catalog.resolve(&two_id.to_string()).unwrap().id, two_id);
        for (text, shown) in [("nosuch", "nosuch:latest"), ("gone", "gone:latest"), ("a/b:c", "a/b:c")] {
            let error = catalog.resolve(text).unwrap_err();
            assert_eq!((error.kind, error.message), (ErrorKind::NotFound, format!("No such image: {shown}")));
        }
        assert_eq!(catalog.resolve("Bad").unwrap_err().kind, ErrorKind::Invalid);
        assert_eq!(catalog.names_of(&one_id).len(), 2);
    }

    #[test]
    fn a_prefix_of_two_ids_means_neither() {
        let images: Vec<_> = (0..17).map(|n: i32| image(&n.to_string())).collect();
        // Of seventeen ids two begin with the same digit.
        let mut first: Vec<String> = images.iter().map(|image| image.id.hex()[..1].to_owned()).collect();
        first.sort();
        let shared = first.windows(2).find(|pair| pair[0] == pair[1]).unwrap()[0].clone();
        let catalog = Catalog::new(images, BTreeMap::new());
        assert_eq!(catalog.resolve(&shared).unwrap_err().kind, ErrorKind::NotFound);
    }
}
