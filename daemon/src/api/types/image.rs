//! Images. (The rest of this module comes with the image store.)

use serde::{Deserialize, Serialize};

/// An image in `GET /images/json`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Summary {
    /// `sha256:…`.
    pub id: String,
}
