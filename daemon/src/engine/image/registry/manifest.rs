//! Manifests: what an image consists of (OCI image manifest, Docker schema 2), and which image is for which
//! platform (OCI index, Docker manifest list).

use std::collections::BTreeMap;

use serde::Deserialize;

use super::RegistryError;
use crate::engine::image::{config::MAX_LAYERS, digest::Digest, platform::Platform};

/// The media types that are asked for.
pub const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, \
     application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json";

/// Entries of an index that are looked at.
const MAX_ENTRIES: usize = 10_000;

const SCHEMA1: &str = "Docker Image Format v1 and Docker Image manifest version 2, schema 1 support has been \
     removed. Suggest the author of the image to upgrade it to the OCI Format or Docker Image manifest v2, \
     schema 2. More information at https://docs.docker.com/go/deprecated-image-specs/";

/// A manifest of either kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Manifest {
    /// One image.
    Image(ImageManifest),
    /// Images to choose from.
    Index(Vec<Descriptor>),
}

/// One image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageManifest {
    /// The configuration.
    pub config: Descriptor,
    /// The layers, bottom first.
    pub layers: Vec<Descriptor>,
}

/// What is where, and how large.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What it is.
    #[serde(default)]
    pub media_type: String,
    /// Its address.
    pub digest: Digest,
    /// Bytes.
    pub size: u64,
    /// What it is for, in an index.
    #[serde(default)]
    pub platform: Option<Platform>,
    /// Notes on it.
    #[serde(default)]
    pub annotations: Option<BTreeMap<String, String>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    schema_version: Option<u64>,
    #[serde(default)]
    media_type: String,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
    manifests: Option<Vec<Descriptor>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Version {
    schema_version: Option<u64>,
}

impl Manifest {
    /// Reads a manifest. Its own fields say which kind it is, not the header that it came with: two readers
    /// must not take one digest for two things.
    ///
    /// # Errors
    /// [`RegistryError::Invalid`].
    pub fn parse(bytes: &[u8]) -> Result<Self, RegistryError> {
        let bad =
            |problem: &dyn std::fmt::Display| RegistryError::Invalid(format!("invalid manifest: {problem}"));
        let version: Version = serde_json::from_slice(bytes).map_err(|error| bad(&error))?;
        match version.schema_version {
            Some(2) => {}
            Some(1) => return Err(RegistryError::Invalid(SCHEMA1.to_owned())),
            _ => return Err(RegistryError::Invalid("unsupported manifest format".to_owned())),
        }
        let document: Document = serde_json::from_slice(bytes).map_err(|error| bad(&error))?;
        debug_assert_eq!(document.schema_version, Some(2));
        let says_index =
            document.media_type.contains("manifest.list") || document.media_type.contains("image.index");
        match (document.config, document.layers, document.manifests) {
            (None, None, Some(entries)) if says_index || document.media_type.is_empty() => {
                if entries.len() > MAX_ENTRIES {
                    return Err(bad(&format_args!("it lists {} images", entries.len())));
                }
                Ok(Self::Index(entries))
            }
            (Some(config), Some(layers), None) if !says_index => {
                if layers.len() > MAX_LAYERS {
                    return Err(bad(&format_args!("it has {} layers", layers.len())));
                }
                let manifest = ImageManifest { config, layers };
                manifest.check()?;
                Ok(Self::Image(manifest))
            }
            _ => Err(RegistryError::Invalid("unsupported manifest format".to_owned())),
        }
    }
}

impl ImageManifest {
    fn check(&self) -> Result<(), RegistryError> {
        let config = self.config.media_type.as_str();
        let known =
            ["application/vnd.docker.container.image.v1+json", "application/vnd.oci.image.config.v1+json"];
        if !known.contains(&config) && !["application/octet-stream", ""].contains(&config) {
            let class = match config {
                "application/vnd.docker.plugin.v1+json" => "plugin",
                _ => "unknown",
            };
            let text = format!("Encountered remote {config:?}({class}) when fetching");
            return Err(RegistryError::Invalid(text));
        }
        for layer in &self.layers {
            let kind = layer.media_type.to_ascii_lowercase();
            if kind.contains("foreign") {
                let text = format!("layer {} is not distributed by the registry ({kind})", layer.digest);
                return Err(RegistryError::Invalid(text));
            }
            if kind.contains("encrypted")
                || !(kind.contains("layer") || kind.contains("rootfs") || kind.is_empty())
            {
                return Err(RegistryError::Invalid(format!(
                    "unsupported media type {:.200}",
                    layer.media_type
                )));
            }
        }
        Ok(())
    }
}

/// The entry for `platform`: of several that fit, one that names the variant asked for, else the first. An
/// index of a single entry that names no platform is for every one.
///
/// # Errors
/// [`RegistryError::NoPlatform`].
pub fn choose<'a>(entries: &'a [Descriptor], platform: &Platform) -> Result<&'a Descriptor, RegistryError> {
    let have = |entry: &Descriptor| {
        (entry.platform.as_ref()).map(|p| Platform::normalised(&p.os, &p.architecture, p.variant.as_deref()))
    };
    let fitting = || entries.iter().filter(|e| have(e).is_some_and(|have| platform.accepts(&have)));
    fitting()
        .find(|entry| have(entry).is_some_and(|have| have == *platform))
        .or_else(|| fitting().next())
        .or_else(|| entries.first().filter(|only| entries.len() == 1 && only.platform.is_none()))
        .ok_or_else(|| RegistryError::NoPlatform(platform.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const D: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn descriptor(kind: &str, more: &str) -> String {
        format!(r#"{{"mediaType":"{kind}","digest":"{D}","size":1{more}}}"#)
    }

    fn image(config: &str, layer: &str) -> String {
        format!(
            r#"{{"schemaVersion":2,"config":{},"layers":[{}]}}"#,
            descriptor(config, ""),
            descriptor(layer, "")
        )
    }

    #[test]
    fn both_kinds_are_told_apart() {
        let docker = image(
            "application/vnd.docker.container.image.v1+json",
            "application/vnd.docker.image.rootfs.diff.tar.gzip",
        );
        let oci =
            image("application/vnd.oci.image.config.v1+json", "application/vnd.oci.image.layer.v1.tar+zstd");
        for text in [docker, oci] {
            assert!(
                matches!(Manifest::parse(text.as_bytes()), Ok(Manifest::Image(m)) if m.layers.len() == 1)
            );
        }
        let index = format!(
            r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[{}]}}"#,
            descriptor(
                "application/vnd.oci.image.manifest.v1+json",
                r#","platform":{"os":"linux","architecture":"amd64"}"#
            )
        );
        assert!(
            matches!(Manifest::parse(index.as_bytes()), Ok(Manifest::Index(entries)) if entries.len() == 1)
        );
    }

    #[test]
    fn what_cannot_be_used_is_refused() {
        let oci = "application/vnd.oci.image.config.v1+json";
        let layer = "application/vnd.oci.image.layer.v1.tar";
        let both = format!(
            r#"{{"schemaVersion":2,"config":{c},"layers":[],"manifests":[{c}]}}"#,
            c = descriptor(oci, "")
        );
        let many = vec![descriptor(layer, ""); MAX_LAYERS + 1].join(",");
        for (text, part) in [
            ("{".to_owned(), "invalid manifest"),
            ("{}".to_owned(), "unsupported manifest format"),
            (
                r#"{"schemaVersion":1,"fsLayers":[],"config":3}"#.to_owned(),
                "schema 1 support has been removed",
            ),
            (both, "unsupported manifest format"),
            (image("application/vnd.docker.plugin.v1+json", layer), "(plugin) when fetching"),
            (image("text/x", layer), "Encountered remote \"text/x\"(unknown) when fetching"),
            (image(oci, "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"), "not distributed"),
            (image(oci, "application/vnd.oci.image.layer.v1.tar+encrypted"), "unsupported media type"),
            (image(oci, "application/x-model"), "unsupported media type application/x-model"),
            (image(oci, layer).replace(D, "sha512:00"), "invalid manifest"),
            (
                format!(r#"{{"schemaVersion":2,"config":{},"layers":[{many}]}}"#, descriptor(oci, "")),
                "501 layers",
            ),
        ] {
            let error = Manifest::parse(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(part), "{error} lacks {part}");
        }
    }

    #[test]
    fn the_platforms_entry_is_chosen() {
        let entry = |platform: &str| -> Descriptor {
            let platform = Platform::parse(platform).unwrap();
            Descriptor {
                media_type: String::new(),
                digest: Digest::of(platform.to_string().as_bytes()),
                size: 1,
                platform: Some(platform),
                annotations: None,
            }
        };
        let amd = Platform::parse("linux/amd64").unwrap();
        let list =
            [entry("linux/arm64"), entry("linux/amd64/v3"), entry("linux/amd64"), entry("unknown/unknown")];
        assert_eq!(choose(&list, &amd).unwrap(), &list[2]);
        assert_eq!(choose(&list, &Platform::parse("linux/amd64/v3").unwrap()).unwrap(), &list[1]);
        let error = choose(&list[..2], &amd).unwrap_err().to_string();
        assert_eq!(error, "no matching manifest for linux/amd64 in the manifest list entries");
        let anonymous = [Descriptor { platform: None, ..entry("linux/arm64") }];
        assert_eq!(choose(&anonymous, &amd).unwrap(), &anonymous[0]);
    }
}
