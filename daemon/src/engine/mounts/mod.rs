//! What a container gets of the host's files: volumes, bind mounts, forwarded sockets.
//!
//! ```text
//!   create   -v, --mount, --volumes-from, the image's VOLUME ── parse ─▶ Wanted ── resolve ─▶ Mount (in the record)
//!   start    Mount ── plan ─▶ shares for the share server, bind mounts of the spec, what is copied up,
//!                             sockets: served by `sockets` while it runs
//! ```

mod parse;
mod plan;
mod resolve;
pub(crate) mod sockets;

use serde::{Deserialize, Serialize};

pub(crate) use plan::{Plan, plan, plan_at_rest};
pub(crate) use resolve::{check, resolve};

use crate::api::types::container::MountPoint;

/// A mount of a container, as its record holds it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Mount {
    /// Absolute, in the container, without `.`, `..` and doubled slashes.
    pub destination: String,
    /// What is there.
    pub source: Source,
    /// Whether it cannot be changed.
    pub read_only: bool,
    /// As the user gave it, for inspect.
    pub mode: String,
    /// Whether the guest may keep what it has read for a second.
    #[serde(default)]
    pub cached: bool,
}

/// What is mounted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", tag = "type")]
pub enum Source {
    /// A volume.
    #[serde(rename_all = "camelCase")]
    Volume {
        /// Its name.
        name: String,
        /// On the host, as it is shown.
        mountpoint: String,
        /// Below its root; empty: its root.
        #[serde(default)]
        subpath: String,
        /// Whether it was made for this container and has no name of a user's.
        #[serde(default)]
        anonymous: bool,
        /// Whether the image's content is not to be copied to it.
        #[serde(default)]
        no_copy: bool,
    },
    /// A directory, file or socket of the host.
    #[serde(rename_all = "camelCase")]
    Bind {
        /// Absolute.
        path: String,
        /// Whether a directory is made where there is none, at each start.
        #[serde(default)]
        create: bool,
        /// Whether without what is mounted below it.
        #[serde(default)]
        non_recursive: bool,
        /// `rprivate` or `private`.
        propagation: String,
    },
}

impl Mount {
    /// The volume's name, if it is one.
    pub(crate) fn volume(&self) -> Option<&str> {
        match &self.source {
            Source::Volume { name, .. } => Some(name),
            Source::Bind { .. } => None,
        }
    }

    /// Whether it is a volume that was made for this container alone.
    pub(crate) fn is_anonymous(&self) -> bool {
        matches!(self.source, Source::Volume { anonymous: true, .. })
    }

    /// For inspect.
    pub(crate) fn point(&self) -> MountPoint {
        let (destination, mode, rw) = (self.destination.clone(), self.mode.clone(), !self.read_only);
        match &self.source {
            Source::Volume { name, mountpoint, .. } => MountPoint {
                kind: "volume".into(),
                name: name.clone(),
                source: mountpoint.clone(),
                destination,
                driver: super::volume::DRIVER.into(),
                mode,
                rw,
                propagation: String::new(),
            },
            Source::Bind { path, propagation, .. } => MountPoint {
                kind: "bind".into(),
                source: path.clone(),
                destination,
                mode,
                rw,
                propagation: propagation.clone(),
                ..MountPoint::default()
            },
        }
    }
}
