//! Images.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Empty, container, is_default, is_empty_list};

/// An image in `GET /images/json`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct Summary {
    /// How many containers there are of it; -1: not counted.
    pub containers: i64,
    /// Seconds since the Unix epoch.
    pub created: i64,
    /// `sha256:…`.
    pub id: String,
    /// The user's metadata.
    pub labels: Option<BTreeMap<String, String>>,
    /// The image it was built on, empty if none is known.
    pub parent_id: String,
    /// `name@sha256:…` of manifests.
    pub repo_digests: Vec<String>,
    /// `name:tag`.
    pub repo_tags: Vec<String>,
    /// Bytes of the layers that other images have too; -1: not counted.
    pub shared_size: i64,
    /// Bytes of all its layers.
    pub size: i64,
    /// The same, for API versions before 1.44.
    #[serde(skip_serializing_if = "is_default")]
    pub virtual_size: i64,
}

/// `GET /images/{name}/json`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct Inspect {
    /// `sha256:…`.
    pub id: String,
    /// `name:tag`.
    pub repo_tags: Vec<String>,
    /// `name@sha256:…` of manifests.
    pub repo_digests: Vec<String>,
    /// The image it was built on, empty if none is known.
    pub parent: String,
    /// A commit's or import's message.
    pub comment: String,
    /// RFC 3339; absent if the image does not say.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub created: String,
    /// The engine that built it.
    pub docker_version: String,
    /// Who made it.
    pub author: String,
    /// How containers of it run.
    pub config: Config,
    /// Go's name of the architecture.
    pub architecture: String,
    /// The architecture's variant.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub variant: String,
    /// `linux`.
    pub os: String,
    /// A Windows matter.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub os_version: String,
    /// Bytes of all its layers.
    pub size: i64,
    /// The same, for API versions before 1.44.
    #[serde(skip_serializing_if = "is_default")]
    pub virtual_size: i64,
    /// How the layers are kept.
    pub graph_driver: container::DriverData,
    /// The layers.
    #[serde(rename = "RootFS")]
    pub root_fs: RootFs,
    /// What only this engine knows.
    pub metadata: Metadata,
}

/// An image's config as inspect shows it: fields that Docker leaves out when they are empty are left out, and
/// those are kept that clients have always found there.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
#[allow(missing_docs, reason = "the fields of container::Config")]
pub struct Config {
    pub user: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exposed_ports: Option<BTreeMap<String, Empty>>,
    pub env: Option<Vec<String>>,
    pub entrypoint: Option<Vec<String>>,
    pub cmd: Option<Vec<String>>,
    pub volumes: Option<BTreeMap<String, Empty>>,
    pub working_dir: String,
    pub labels: Option<BTreeMap<String, String>>,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub stop_signal: String,
    #[serde(skip_serializing_if = "is_default")]
    pub args_escaped: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub healthcheck: Option<container::Healthcheck>,
    pub on_build: Option<Vec<String>>,
    #[serde(skip_serializing_if = "is_empty_list")]
    pub shell: Option<Vec<String>>,
}

impl From<container::Config> for Config {
    fn from(from: container::Config) -> Self {
        Self {
            user: from.user,
            exposed_ports: from.exposed_ports.filter(|ports| !ports.is_empty()),
            env: from.env,
            entrypoint: from.entrypoint,
            cmd: from.cmd,
            volumes: from.volumes,
            working_dir: from.working_dir,
            labels: from.labels,
            stop_signal: from.stop_signal,
            args_escaped: from.args_escaped,
            healthcheck: from.healthcheck,
            on_build: from.on_build,
            shell: from.shell,
        }
    }
}

/// The layers of an image.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct RootFs {
    /// `layers`.
    #[serde(rename = "Type", skip_serializing_if = "String::is_empty")]
    pub kind: String,
    /// Diff ids, bottom first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub layers: Vec<String>,
}

/// What only this engine knows of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct Metadata {
    /// When `docker tag` last named it; Go's zero time: never.
    pub last_tag_time: String,
}

impl Default for Metadata {
    fn default() -> Self {
        Self { last_tag_time: "0001-01-01T00:00:00Z".to_owned() }
    }
}

/// A step in `GET /images/{name}/history`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct HistoryItem {
    /// A message.
    pub comment: String,
    /// Seconds since the Unix epoch.
    pub created: i64,
    /// The instruction.
    pub created_by: String,
    /// The image that the step made, `<missing>` where it is not here.
    pub id: String,
    /// Bytes of its layer.
    pub size: i64,
    /// That image's tags.
    pub tags: Option<Vec<String>>,
}

/// What `DELETE /images/{name}` did: one of the two.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct DeleteItem {
    /// An image or a layer that is gone.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub deleted: String,
    /// A name that is gone.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub untagged: String,
}

impl DeleteItem {
    /// An image or a layer that is gone.
    pub fn deleted(id: &impl ToString) -> Self {
        Self { deleted: id.to_string(), untagged: String::new() }
    }

    /// A name that is gone.
    pub fn untagged(name: impl Into<String>) -> Self {
        Self { deleted: String::new(), untagged: name.into() }
    }
}

/// The answer to `POST /images/prune`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct PruneReport {
    /// What went; null if nothing did.
    pub images_deleted: Option<Vec<DeleteItem>>,
    /// Bytes.
    pub space_reclaimed: u64,
}

/// The answer to `GET /distribution/{name}/json`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Distribution {
    /// What the name stands for.
    pub descriptor: Descriptor,
    /// What it can be run on.
    pub platforms: Vec<OciPlatform>,
}

/// A descriptor of the OCI image specification.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What it is.
    pub media_type: String,
    /// `sha256:…`.
    pub digest: String,
    /// Bytes.
    pub size: i64,
}

/// A platform of the OCI image specification.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OciPlatform {
    /// `amd64`.
    pub architecture: String,
    /// `linux`.
    pub os: String,
    /// `v8` of `arm64`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub variant: Option<String>,
}

/// A result of `GET /images/search`, and of a registry's index.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SearchResult {
    /// Stars.
    pub star_count: i64,
    /// Whether it is one of Docker's own.
    pub is_official: bool,
    /// The repository.
    pub name: String,
    /// Always false by now.
    pub is_automated: bool,
    /// For people.
    pub description: String,
}
