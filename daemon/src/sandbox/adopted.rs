//! Sandboxes that an earlier daemon left, each taken over once for all of its containers: an agent serves one
//! control connection, the latest.

use std::{
    collections::HashMap,
    path::Path,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use super::{AdoptError, Sandbox};

/// What has been taken over, or is being.
#[derive(Debug, Default)]
pub(crate) struct Adopted(Mutex<HashMap<String, Arc<Slot>>>);

type Slot = tokio::sync::Mutex<Weak<Sandbox>>;

impl Adopted {
    /// Takes a sandbox over, or gives the one that was. Its events are had with [`Sandbox::events`].
    ///
    /// # Errors
    /// [`AdoptError`].
    pub(crate) async fn adopt(&self, parent: &Path, id: &str) -> Result<Arc<Sandbox>, AdoptError> {
        let slot = {
            let mut slots = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(slots.entry(id.to_owned()).or_default())
        };
        let mut known = slot.lock().await;
        if let Some(sandbox) = known.upgrade() {
            return Ok(sandbox);
        }
        let (sandbox, _others) = Sandbox::adopt(parent, id).await?;
        let sandbox = Arc::new(sandbox);
        *known = Arc::downgrade(&sandbox);
        Ok(sandbox)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::fake::FakeMachine;

    #[tokio::test]
    async fn two_containers_of_a_sandbox_get_the_same() {
        let base = tempfile::tempdir().unwrap();
        let machine = FakeMachine::start(base.path(), "s1");
        let adopted = Adopted::default();
        let (first, second, _agent) =
            tokio::join!(adopted.adopt(base.path(), "s1"), adopted.adopt(base.path(), "s1"), machine.agent());
        let (first, second) = (first.unwrap(), second.unwrap());
        assert!(Arc::ptr_eq(&first, &second));
        assert!(matches!(adopted.adopt(base.path(), "nosuch").await, Err(AdoptError::Dead(_))));
    }
}
