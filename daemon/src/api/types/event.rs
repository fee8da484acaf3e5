//! One event, as `GET /events` streams it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// An event message. `status`, `id` and `from` repeat `Action`, `Actor.ID` and the attribute `image` for
/// container and image events; Docker drops them with API 1.52.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// The legacy action.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub status: String,
    /// The legacy id.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub id: String,
    /// The legacy image name.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub from: String,
    /// `container`, `image`, `network`, `volume`, `daemon`…
    #[serde(rename = "Type")]
    pub kind: String,
    /// `create`, `start`, `die`…
    #[serde(rename = "Action")]
    pub action: String,
    /// To whom it happened.
    #[serde(rename = "Actor")]
    pub actor: Actor,
    /// Always `local`: there is no swarm.
    pub scope: String,
    /// Seconds since the Unix epoch.
    pub time: i64,
    /// Nanoseconds since the Unix epoch.
    #[serde(rename = "timeNano")]
    pub time_nano: i64,
}

/// The object of an event.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Actor {
    /// Its full id (a container's: 64 digits), or its name where it has no id.
    #[serde(rename = "ID")]
    pub id: String,
    /// Its labels, and what belongs to the action (`name`, `image`, `exitCode`, `signal`…).
    #[serde(rename = "Attributes")]
    pub attributes: BTreeMap<String, String>,
}
