//! Checkpoints as Docker has them, and forks, which are our own.

use serde::{Deserialize, Serialize};

/// The body of `POST /containers/{id}/checkpoints`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct CheckpointRequest {
    /// Its name.
    #[serde(rename = "CheckpointID")]
    pub checkpoint_id: String,
    /// Where to put it; not honoured.
    pub checkpoint_dir: String,
    /// Whether the container ends there.
    pub exit: bool,
}

/// A checkpoint in a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct CheckpointSummary {
    /// Its name.
    pub name: String,
}

/// The body of `POST /containers/{id}/fork`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct ForkRequest {
    /// A clone for each name; one is made up for an empty name. None at all: one clone.
    pub names: Vec<String>,
}

/// A clone that runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct ForkedContainer {
    /// Its id, 64 digits.
    pub id: String,
    /// Its name, without a `/`.
    pub name: String,
}
