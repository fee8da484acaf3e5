//! What changes while the daemon runs: some settings are read anew on SIGHUP, all others on the next start.

use std::{
    collections::BTreeMap,
    sync::{Arc, PoisonError, RwLock},
};

use super::{Engine, Error, Result, open};
use crate::config::Config;

/// The settings that a reload may change, as they are now.
#[derive(Debug)]
pub(crate) struct Live(RwLock<Arc<Config>>);

impl Live {
    pub(super) fn new(config: &Arc<Config>) -> Self {
        Self(RwLock::new(Arc::clone(config)))
    }

    /// The configuration, of which only debug mode, labels, authorization plugins and what concerns registries may differ from
    /// what the daemon was started with.
    pub(crate) fn now(&self) -> Arc<Config> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Engine {
    /// Takes over what may change of a configuration that was read anew: debug mode, labels, authorization
    /// plugins, mirrors, insecure registries and the attempts at a download. What else is different is for the next start.
    ///
    /// # Errors
    /// It is not valid; then nothing has changed.
    pub fn reload(&self, new: &Config) -> Result<()> {
        Self::validate(new)?;
        let shared = &self.shared;
        shared
            .images
            .reload(open::registry_settings(new))
            .map_err(|error| Error::invalid(error.to_string()))?;
        let config = Config {
            debug: new.debug,
            log_level: new.log_level,
            labels: new.labels.clone(),
            registry_mirrors: new.registry_mirrors.clone(),
            insecure_registries: new.insecure_registries.clone(),
            max_download_attempts: new.max_download_attempts,
            authorization_plugins: new.authorization_plugins.clone(),
            ..(*shared.config).clone()
        };
        let list = |items: &[String]| serde_json::to_string(items).unwrap_or_default();
        let attributes = BTreeMap::from([
            ("name".to_owned(), rustix::system::uname().nodename().to_string_lossy().into_owned()),
            ("debug".to_owned(), config.debug.to_string()),
            ("labels".to_owned(), list(&config.labels)),
            ("registry-mirrors".to_owned(), list(&config.registry_mirrors)),
            ("insecure-registries".to_owned(), list(&config.insecure_registries)),
            ("authorization-plugins".to_owned(), list(&config.authorization_plugins)),
            ("max-download-attempts".to_owned(), config.max_download_attempts.to_string()),
        ]);
        *shared.live.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(config);
        let id = std::fs::read_to_string(shared.layout().daemon_id()).unwrap_or_default();
        shared.events.publish("daemon", "reload", id.trim(), attributes);
        Ok(())
    }
}
