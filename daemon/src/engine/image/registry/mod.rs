//! Speaking to registries: the OCI distribution specification and Docker's registry API v2, as a client.
//!
//! ```text
//!  endpoints(domain) ─▶ Session::open      GET /v2/                      is anyone there, does it want to know us?
//!                         │  manifest(tag)   GET /v2/<name>/manifests/…    capped, digest checked
//!                         │  blob(digest)    GET /v2/<name>/blobs/…        streamed, resumed where it was cut
//!                         │  begin_upload    POST, PATCH, PUT              in pieces, resumed where it was cut
//!                         └─ 401 ─▶ auth      GET <realm>?scope=…          token, kept for the session
//! ```
//!
//! A registry is hostile: what it sends is capped, and counts only once it has the digest that was asked for.
//! Credentials go to the registry and to the token server it names over TLS, never to mirrors, never along a
//! redirect to another host.

mod auth;
mod blob;
mod client;
mod dial;
mod endpoint;
mod error;
mod login;
pub mod manifest;
mod session;
#[cfg(test)]
pub(crate) mod testing;
mod tls;
mod upload;

use std::{
    path::PathBuf,
    sync::{Arc, PoisonError, RwLock},
};

pub use auth::Credentials;
pub use blob::Blob;
pub use client::Patience;
pub use endpoint::{Endpoint, SettingError};
pub use error::RegistryError;
pub use session::{Session, Wanted};
pub use upload::{Begun, Upload};

use client::Client;
use endpoint::Insecure;

/// The daemon's settings for registries.
#[derive(Debug, Clone)]
pub struct RegistrySettings {
    /// `registry-mirrors`: URLs, for Docker Hub.
    pub mirrors: Vec<String>,
    /// `insecure-registries`: hosts and subnets.
    pub insecure: Vec<String>,
    /// Docker's `certs.d`: below `<host:port>/`, `*.crt` are authorities for that host.
    pub certificates: Option<PathBuf>,
    /// How patient to be.
    pub patience: Patience,
}

impl Default for RegistrySettings {
    fn default() -> Self {
        let certificates = Some(PathBuf::from("/etc/docker/certs.d"));
        Self { mirrors: Vec::new(), insecure: Vec::new(), certificates, patience: Patience::default() }
    }
}

impl RegistrySettings {
    /// Says what is wrong with the settings, for `--validate`.
    ///
    /// # Errors
    /// A mirror or an insecure registry is malformed.
    pub fn validate(&self) -> Result<(), SettingError> {
        endpoint::parse_mirrors(&self.mirrors)?;
        Insecure::parse(&self.insecure).map(drop)
    }
}

/// All registries, as one place to ask. The settings may change while it is used: what is under way goes on with those
/// it began with.
pub struct Registries(RwLock<Known>);

#[derive(Clone)]
struct Known {
    client: Arc<Client>,
    mirrors: Arc<[Endpoint]>,
}

impl Known {
    fn new(settings: RegistrySettings) -> Result<Self, SettingError> {
        let mirrors = endpoint::parse_mirrors(&settings.mirrors)?.into();
        let insecure = Insecure::parse(&settings.insecure)?;
        Ok(Self {
            client: Arc::new(Client::new(insecure, settings.certificates, settings.patience)),
            mirrors,
        })
    }
}

impl Registries {
    /// Checks and takes the settings.
    ///
    /// # Errors
    /// See [`RegistrySettings::validate`].
    pub fn new(settings: RegistrySettings) -> Result<Self, SettingError> {
        Known::new(settings).map(|known| Self(RwLock::new(known)))
    }

    /// Takes other settings.
    ///
    /// # Errors
    /// As [`Registries::new`]; then those of before stay.
    pub fn reload(&self, settings: RegistrySettings) -> Result<(), SettingError> {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Known::new(settings)?;
        Ok(())
    }

    /// The servers to ask for images of `domain`, in order.
    pub async fn endpoints(&self, domain: &str) -> Vec<Endpoint> {
        let Known { client, mirrors } = self.known();
        endpoint::endpoints(domain, &mirrors, client.insecure()).await
    }

    pub(super) fn client(&self) -> Arc<Client> {
        self.known().client
    }

    fn known(&self) -> Known {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
