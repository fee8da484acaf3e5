//! The image configuration: the JSON document whose digest is the image's id.
//!
//! The OCI image specification's fields and Docker's own (`Healthcheck`, `OnBuild`, `Shell`, `ArgsEscaped`).
//! Only what is needed is read; the bytes are kept as they came, so nothing unknown is lost.

use std::collections::BTreeMap;

use bulkhead_rootfs::layers::DiffId;
use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize};

use super::{digest::Digest, platform::Platform};
use crate::api::types::json;

/// How containers of an image run unless told otherwise: of the same form as a container's own.
pub use crate::api::types::container::Config as RunConfig;

/// The largest configuration that is read, in bytes.
pub const MAX_CONFIG: usize = 8 << 20;

/// The most layers an image may have: overlayfs takes no more.
pub const MAX_LAYERS: usize = 500;

/// Why bytes are no usable image configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not JSON, or fields of wrong types.
    #[error("invalid image configuration: {0}")]
    Json(#[from] serde_json::Error),
    /// Docker's words for a configuration without layers' digests.
    #[error("invalid rootfs in image configuration")]
    Rootfs,
    /// Over [`MAX_LAYERS`].
    #[error("the image has {0} layers, more than the {MAX_LAYERS} that can be stacked")]
    Layers(usize),
    /// Over [`MAX_CONFIG`].
    #[error("the image configuration has {0} bytes, more than the {MAX_CONFIG} that are read")]
    Size(usize),
    /// Layers are for Linux guests.
    #[error("image operating system \"{0}\" cannot be used on this platform")]
    System(String),
}

/// An image configuration.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ImageConfig {
    /// When it was made.
    #[serde(deserialize_with = "lenient_time", skip_serializing_if = "Option::is_none")]
    pub created: Option<Timestamp>,
    /// Who made it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub author: String,
    /// Go's name of the architecture.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub architecture: String,
    /// The architecture's variant.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub variant: String,
    /// Go's name of the operating system.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub os: String,
    /// A Windows matter.
    #[serde(rename = "os.version", skip_serializing_if = "String::is_empty")]
    pub os_version: String,
    /// A commit message.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub comment: String,
    /// The engine that built it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub docker_version: String,
    /// How containers of it run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub config: Option<RunConfig>,
    /// What it consists of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rootfs: Option<RootFs>,
    /// How it came to be, oldest first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub history: Vec<History>,
}

/// What an image consists of.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RootFs {
    /// `layers`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The layers, bottom first.
    pub diff_ids: Vec<DiffId>,
}

/// A step of an image's making.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct History {
    /// When.
    #[serde(deserialize_with = "lenient_time", skip_serializing_if = "Option::is_none")]
    pub created: Option<Timestamp>,
    /// Who.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub author: String,
    /// The instruction.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub created_by: String,
    /// A message.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub comment: String,
    /// It made no layer.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub empty_layer: bool,
}

impl ImageConfig {
    /// Reads and checks a configuration.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn parse(bytes: &[u8]) -> Result<Self, ConfigError> {
        if bytes.len() > MAX_CONFIG {
            return Err(ConfigError::Size(bytes.len()));
        }
        let config: Self = json::from_slice(bytes)?;
        let layers = config.rootfs.as_ref().ok_or(ConfigError::Rootfs)?.diff_ids.len();
        if layers > MAX_LAYERS {
            return Err(ConfigError::Layers(layers));
        }
        match config.os.as_str() {
            "" | "linux" => Ok(config),
            other => Err(ConfigError::System(other.chars().take(50).collect())),
        }
    }

    /// The layers, bottom first.
    pub fn layers(&self) -> &[DiffId] {
        self.rootfs.as_ref().map_or(&[], |rootfs| &rootfs.diff_ids)
    }

    /// The labels, empty where there are none.
    pub fn labels(&self) -> BTreeMap<String, String> {
        self.config.as_ref().and_then(|config| config.labels.clone()).unwrap_or_default()
    }

    /// What it runs on; the host's where the configuration does not say.
    pub fn platform(&self) -> Platform {
        let host = Platform::host();
        let or =
            |text: &'_ str, default: &str| if text.is_empty() { default.to_owned() } else { text.to_owned() };
        Platform::normalised(
            &or(&self.os, &host.os),
            &or(&self.architecture, &host.architecture),
            Some(&self.variant),
        )
    }

    /// The digest that names a stack of layers up to and including each: Docker's chain ids.
    pub fn chain_ids(&self) -> Vec<Digest> {
        let mut chain: Vec<Digest> = Vec::with_capacity(self.layers().len());
        for diff_id in self.layers() {
            chain.push(match chain.last() {
                None => Digest::from_bytes(*diff_id.as_bytes()),
                Some(below) => Digest::of(format!("{below} {diff_id}").as_bytes()),
            });
        }
        chain
    }
}

/// A time that cannot be read is no reason to refuse an image.
fn lenient_time<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Timestamp>, D::Error> {
    Ok(Option::<String>::deserialize(deserializer)?.and_then(|text| text.parse().ok()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: &str = r#"{"architecture":"amd64","os":"linux","created":"2024-05-01T02:03:04.5Z",
        "config":{"Env":["A=b"],"Cmd":["sh"],"Labels":null,"ExposedPorts":{"80/tcp":{}},"User":null,
            "Healthcheck":{"Test":["CMD","true"],"Interval":5000000000},"OnBuild":[],"Unknown":1},
        "rootfs":{"type":"layers","diff_ids":["sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
            "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"]},
        "history":[{"created_by":"ADD x","created":"rubbish"},{"empty_layer":true}]}"#;

    #[test]
    fn a_configuration_is_read_with_dockers_fields() {
        let config = ImageConfig::parse(CONFIG.as_bytes()).unwrap();
        let run = config.config.as_ref().unwrap();
        assert_eq!(run.healthcheck.as_ref().unwrap().interval, 5_000_000_000);
        assert_eq!(run.on_build, Some(vec![]));
        assert_eq!((run.user.as_str(), run.labels.as_ref()), ("", None));
        assert_eq!(config.platform().to_string(), "linux/amd64");
        assert_eq!(config.created.unwrap().to_string(), "2024-05-01T02:03:04.5Z");
        assert_eq!(config.history.len(), 2);
        assert_eq!(config.history[0].created, None);
    }

    #[test]
    fn chain_ids_are_the_oci_specifications() {
        let config = ImageConfig::parse(CONFIG.as_bytes()).unwrap();
        let chain = config.chain_ids();
        assert_eq!(chain[0], Digest::of(b""));
        assert_eq!(chain[1], Digest::of(format!("{0} {0}", Digest::of(b"")).as_bytes()));
    }

    #[test]
    fn unusable_configurations_are_refused() {
        for (text, part) in [
            ("3", "invalid image configuration"),
            ("{", "invalid image configuration"),
            ("{}", "invalid rootfs in image configuration"),
            (r#"{"rootfs":{"type":"layers","diff_ids":["../../etc"]}}"#, "not a diff id"),
            (r#"{"os":"windows","rootfs":{"type":"layers","diff_ids":[]}}"#, "\"windows\""),
        ] {
            let error = ImageConfig::parse(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
        let layer = "\"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855\"";
        let many = vec![layer; MAX_LAYERS + 1].join(",");
        let text = format!(r#"{{"rootfs":{{"type":"layers","diff_ids":[{many}]}}}}"#);
        assert!(matches!(ImageConfig::parse(text.as_bytes()), Err(ConfigError::Layers(_))));
    }
}
