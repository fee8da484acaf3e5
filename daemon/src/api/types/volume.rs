//! Volumes.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// `POST /volumes/create`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct CreateRequest {
    /// Empty: one is made up.
    pub name: String,
    /// Empty: `local`.
    pub driver: String,
    /// The driver's options.
    pub driver_opts: Option<BTreeMap<String, String>>,
    /// Labels.
    pub labels: Option<BTreeMap<String, String>>,
    /// Of swarm's clusters.
    pub cluster_volume_spec: Option<serde_json::Value>,
}

/// A volume.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Volume {
    /// RFC 3339.
    pub created_at: String,
    /// `local`.
    pub driver: String,
    /// Null: none.
    pub labels: Option<BTreeMap<String, String>>,
    /// On the host.
    pub mountpoint: String,
    /// Its name.
    pub name: String,
    /// The driver's options; null: none.
    pub options: Option<BTreeMap<String, String>>,
    /// `local`.
    pub scope: String,
    /// What it takes, where that was asked for.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub usage_data: Option<Usage>,
}

/// What a volume takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Usage {
    /// Bytes.
    pub size: i64,
    /// Containers that use it.
    pub ref_count: i64,
}

/// `GET /volumes`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct List {
    /// Volumes.
    pub volumes: Vec<Volume>,
    /// Never any.
    pub warnings: Option<Vec<String>>,
}

/// `POST /volumes/prune`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct PruneResponse {
    /// Names; null: none.
    pub volumes_deleted: Option<Vec<String>>,
    /// Bytes.
    pub space_reclaimed: u64,
}
