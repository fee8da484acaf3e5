//! All containers by id and by name.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, PoisonError, RwLock},
};

use super::{Container, names};
use crate::engine::{Error, Result};

/// Ids and names, each name owned by one id. A name is reserved before its container is made, so that two
/// creates cannot both have it.
#[derive(Default)]
pub(crate) struct Registry(RwLock<Inner>);

#[derive(Default)]
struct Inner {
    by_id: BTreeMap<String, Arc<Container>>,
    names: HashMap<String, String>,
}

impl Registry {
    fn read<R>(&self, f: impl FnOnce(&Inner) -> R) -> R {
        f(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn write<R>(&self, f: impl FnOnce(&mut Inner) -> R) -> R {
        f(&mut self.0.write().unwrap_or_else(PoisonError::into_inner))
    }

    /// Reserves a name that a user gave for the container of this id.
    pub(crate) fn reserve(&self, name: &str, id: &str) -> Result<String> {
        let bare = names::check(name)?.to_owned();
        self.write(|inner| inner.reserve(&bare, id))?;
        Ok(bare)
    }

    /// Reserves a made-up name.
    pub(crate) fn reserve_any(&self, id: &str) -> Result<String> {
        for attempt in 0..100 {
            let name = names::random(attempt);
            if self.write(|inner| inner.reserve(&name, id)).is_ok() {
                return Ok(name);
            }
        }
        let name = id.get(..12).unwrap_or(id).to_owned();
        self.write(|inner| inner.reserve(&name, id))?;
        Ok(name)
    }

    /// Gives up one name.
    pub(crate) fn release(&self, name: &str, id: &str) {
        self.write(|inner| {
            if inner.names.get(name).is_some_and(|owner| owner == id) {
                inner.names.remove(name);
            }
        });
    }

    /// Adds a container whose name is reserved.
    pub(crate) fn insert(&self, container: Arc<Container>) {
        self.write(|inner| inner.by_id.insert(container.id().to_owned(), container));
    }

    /// Forgets a container and its names.
    pub(crate) fn remove(&self, id: &str) {
        self.write(|inner| {
            inner.by_id.remove(id);
            inner.names.retain(|_, owner| owner != id);
        });
    }

    /// All, by id.
    pub(crate) fn all(&self) -> Vec<Arc<Container>> {
        self.read(|inner| inner.by_id.values().cloned().collect())
    }

    /// The container that a user means: a full id, a name with or without `/`, or the beginning of one id.
    pub(crate) fn find(&self, name: &str) -> Result<Arc<Container>> {
        self.read(|inner| {
            if let Some(container) = inner.by_id.get(name) {
                return Ok(Arc::clone(container));
            }
            let bare = name.strip_prefix('/').unwrap_or(name);
            if let Some(container) = inner.names.get(bare).and_then(|id| inner.by_id.get(id)) {
                return Ok(Arc::clone(container));
            }
            let is_prefix = !name.is_empty() && name.bytes().all(|b| b.is_ascii_hexdigit());
            let from = inner.by_id.range(name.to_owned()..);
            let mut matches = from.map(|(_, container)| container).take_while(|c| c.id().starts_with(name));
            match (is_prefix.then(|| matches.next()).flatten(), matches.next()) {
                (None, _) => Err(Error::not_found(format!("No such container: {name}"))),
                (Some(container), None) => Ok(Arc::clone(container)),
                (Some(_), Some(_)) => {
                    Err(Error::invalid(format!("multiple IDs found with provided prefix: {name}")))
                }
            }
        })
    }
}

impl Inner {
    fn reserve(&mut self, name: &str, id: &str) -> Result<()> {
        match self.names.get(name) {
            Some(owner) => Err(Error::conflict(format!(
                "Conflict. The container name \"/{name}\" is already in use by container \"{owner}\". You have to remove \
                 (or rename) that container to be able to reuse that name."
            ))),
            None => {
                self.names.insert(name.to_owned(), id.to_owned());
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registry(entries: &[(&str, &str)]) -> Registry {
        let registry = Registry::default();
        for (id, name) in entries {
            registry.reserve(name, id).unwrap();
            registry.insert(Arc::new(Container::detached(id)));
        }
        registry
    }

    #[test]
    fn a_name_in_use_is_refused_in_dockers_words_until_it_is_free() {
        let registry = registry(&[("aa11", "web")]);
        let error = registry.reserve("/web", "bb22").unwrap_err();
        assert_eq!(
            error.message,
            "Conflict. The container name \"/web\" is already in use by container \"aa11\". You have to remove (or \
             rename) that container to be able to reuse that name."
        );
        registry.release("web", "bb22");
        registry.reserve("web", "bb22").unwrap_err();
        registry.remove("aa11");
        registry.reserve("web", "bb22").unwrap();
    }

    #[test]
    fn a_container_is_found_by_id_name_and_unambiguous_prefix() {
        let registry = registry(&[("aa11", "web"), ("aa22", "db"), ("bb33", "aa2")]);
        let id = |name: &str| registry.find(name).map(|c| c.id().to_owned()).map_err(|e| e.message);
        assert_eq!(id("aa11").unwrap(), "aa11");
        assert_eq!(id("/db").unwrap(), "aa22");
        assert_eq!(id("bb").unwrap(), "bb33");
        assert_eq!(id("aa2").unwrap(), "bb33", "a name goes before a prefix");
        assert_eq!(id("aa").unwrap_err(), "multiple IDs found with provided prefix: aa");
        for name in ["", "zz", "/", "aa111", "cc"] {
            assert_eq!(id(name).unwrap_err(), format!("No such container: {name}"));
        }
    }
}
