//! Forks: running clones of a running container.
//!
//! ```text
//!   parent: quiesce ▶ pause ▶ save, copy the disk ▶ resume ▶ thaw
//!   each clone: id, name, record, a clone of the copy ▶ restore ▶ personalize ▶ thaw
//! ```
//! The clones' memory is the parent's saved memory, copied on write; the file has no name, and its room is given
//! back when the last clone ends. All clones come up, or none is left.

use std::{collections::VecDeque, io, path::PathBuf, sync::Arc};

use bulkhead_agent_api::{ContainerIdentity, KnownOutput};
use bulkhead_rootfs::disk;
use jiff::Timestamp;
use tokio::task::JoinSet;

use super::{
    Engine, Error, Name, Result, Shared,
    container::{
        Actor, Command, names, network::check_order, record::Record, resume::Resumption, state::Lifecycle,
    },
    network::record::Attachment,
    store,
};
use crate::{
    api::types::container::ForkedContainer,
    sandbox::{self, Leave, OpenMachine, SaveOptions, Shape},
};

/// How many clones one call may make.
const MAX_CLONES: usize = 256;

/// How many come up at once.
const AT_ONCE: usize = 8;

/// A parent at the moment of the fork.
struct Parent {
    record: Arc<Record>,
    guest: String,
    machine: OpenMachine,
    shape: Shape,
    /// Its disk; the file goes with this.
    disk: Scratch,
}

/// A directory that goes with this.
struct Scratch(PathBuf);

impl Scratch {
    fn disk(&self) -> PathBuf {
        self.0.join("disk.img")
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            tracing::error!(path = %self.0.display(), %error, "a fork's copy of a disk stays behind");
        }
    }
}

impl Engine {
    /// Makes `names.len()` running clones of a running container; an empty name stands for one that is made up.
    /// Answers in the order of the names.
    ///
    /// # Errors
    /// The container does not run; a name is not valid or in use; a clone does not come up. Then there are none.
    pub async fn container_fork(&self, name: Name<'_>, names: &[String]) -> Result<Vec<ForkedContainer>> {
        if names.is_empty() || names.len() > MAX_CLONES {
            return Err(Error::invalid(format!("the number of clones must be between 1 and {MAX_CLONES}")));
        }
        let mut reserved = Reserved::new(&self.shared, names)?;
        let parent = self.save_parent(name).await?;
        let mut clones = Clones { shared: Arc::clone(&self.shared), made: Vec::new() };
        while let Some((id, name)) = reserved.names.pop_front() {
            clones.make(&parent, id, name).await?;
        }
        clones.start(&parent).await?;
        let made = std::mem::take(&mut clones.made);
        self.shared.publish(&parent.record, "fork", [("clones".into(), made.len().to_string())]);
        Ok(made.into_iter().map(|record| ForkedContainer { id: record.id, name: record.name }).collect())
    }

    async fn save_parent(&self, name: Name<'_>) -> Result<Parent> {
        let failed =
            |error: &dyn std::fmt::Display| Error::internal(format!("cannot fork container {name}: {error}"));
        let view = self.shared.registry.find(name)?.view();
        let workload = Arc::clone(view.awake("its fork")?);
        check_order(&view.record)?;
        let Ok(_saving) = workload.saving.try_lock() else {
            return Err(Error::conflict(format!("cannot fork container {name}: it is being saved already")));
        };
        let shape = self.shared.shape_of(&workload.sandbox, &view.record).await?;
        let layout = self.shared.layout();
        let forks = layout.forks();
        let scratch = Scratch(forks.join(sandbox::new_id()));
        std::fs::create_dir(&scratch.0)?;
        let (from, to) = (layout.container_disk(&view.record.id), scratch.disk());
        let options = SaveOptions { into: scratch.0.join("machine"), leave: Leave::Running };
        let saved = workload
            .sandbox
            .save(options, move || disk::clone(&from, &to).map(drop).map_err(io::Error::other))
            .await;
        let (writing, ()) = saved.map_err(|error| failed(&error))?;
        let machine = writing.unlink().map_err(|error| failed(&error))?;
        let guest = workload.guest().to_owned();
        Ok(Parent { record: view.record, guest, machine, shape, disk: scratch })
    }
}

/// Ids and names of clones to come; those that are not taken are given back.
struct Reserved<'a> {
    shared: &'a Shared,
    names: VecDeque<(String, String)>,
}

impl<'a> Reserved<'a> {
    fn new(shared: &'a Shared, names: &[String]) -> Result<Self> {
        let mut reserved = Self { shared, names: VecDeque::new() };
        for name in names {
            let id = names::new_id();
            let name = match name.as_str() {
                "" => shared.registry.reserve_any(&id)?,
                name => shared.registry.reserve(name, &id)?,
            };
            reserved.names.push_back((id, name));
        }
        Ok(reserved)
    }
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        for (id, _) in &self.names {
            self.shared.registry.remove(id);
        }
    }
}

/// Clones that are being made; dropped before all are up, they are removed.
struct Clones {
    shared: Arc<Shared>,
    made: Vec<Record>,
}

impl Clones {
    /// Lays a clone down: its record, its disk, its actor.
    async fn make(&mut self, parent: &Parent, id: String, name: String) -> Result<()> {
        let record = clone_of(&parent.record, id, name);
        let (layout, source, laid) = (self.shared.layout().clone(), parent.disk.disk(), record.clone());
        let made = tokio::task::spawn_blocking(move || {
            let made = store::create(&layout, &laid.id)
                .and_then(|()| {
                    let target = layout.container_disk(&laid.id);
                    disk::clone(&source, &target).map(drop).map_err(io::Error::other)
                })
                .and_then(|()| laid.write(&layout.container_record(&laid.id)));
            if made.is_err()
                && let Err(error) = store::delete(&layout, &laid.id)
            {
                tracing::error!(container = laid.id, %error, "what is left of a clone could not be removed");
            }
            made
        });
        if let Err(error) = made.await.unwrap_or_else(|error| Err(io::Error::other(error))) {
            self.shared.registry.remove(&record.id);
            return Err(Error::internal(format!("the clone {} could not be made: {error}", record.name)));
        }
        let (actor, container) = Actor::new(Arc::clone(&self.shared), record.clone());
        self.shared.registry.insert(container);
        self.shared.publish(&record, "create", [("forkedFrom".into(), parent.record.id.clone())]);
        tokio::spawn(actor.run(false));
        self.made.push(record);
        Ok(())
    }

    /// Lets all come up, a few at a time.
    async fn start(&self, parent: &Parent) -> Result<()> {
        let mut waiting = self.made.iter();
        let mut coming_up = JoinSet::new();
        loop {
            while coming_up.len() < AT_ONCE
                && let Some(record) = waiting.next()
            {
                let resumption = self.resumption(parent, record)?;
                let container = self.shared.registry.find(&record.id)?;
                coming_up.spawn(async move {
                    container.ask(|reply| Command::Resume(Box::new(resumption), reply)).await?
                });
            }
            match coming_up.join_next().await {
                None => return Ok(()),
                Some(started) => {
                    started.unwrap_or_else(|error| Err(Error::internal(error.to_string())))?;
                }
            }
        }
    }

    fn resumption(&self, parent: &Parent, record: &Record) -> Result<Resumption> {
        let identity = ContainerIdentity {
            container: parent.guest.clone(),
            hostname: record.config.hostname.clone(),
            files: self.shared.spec(record, &[])?.files,
            end_execs: true,
            known: Some(KnownOutput { stdout: u64::MAX, stderr: u64::MAX }),
        };
        Ok(Resumption {
            machine: parent.machine.try_clone()?,
            shape: parent.shape.clone(),
            guest: parent.guest.clone(),
            identity,
            disk: None,
        })
    }
}

impl Drop for Clones {
    fn drop(&mut self) {
        for record in std::mem::take(&mut self.made) {
            let Ok(container) = self.shared.registry.find(&record.id) else { continue };
            tokio::spawn(async move {
                let removed = container.ask(|reply| Command::Remove { force: true, reply }).await;
                if let Err(error) = removed.and_then(|removed| removed) {
                    tracing::error!(container = container.id(), %error, "a clone stays behind");
                }
            });
        }
    }
}

/// The record of a clone: what the parent is, under its own id and name.
fn clone_of(parent: &Record, id: String, name: String) -> Record {
    let mut config = parent.config.clone();
    if parent.id.get(..12) == Some(&*config.hostname) {
        config.hostname = id.get(..12).unwrap_or(&id).to_owned();
    }
    let mut host_config = parent.host_config.clone();
    // The parent has its host ports and its addresses; a clone gets others.
    for binding in
        host_config.port_bindings.iter_mut().flat_map(|ports| ports.values_mut()).flatten().flatten()
    {
        binding.host_port.clear();
    }
    let mut networks = parent.networks.clone();
    for attachment in networks.values_mut() {
        *attachment = Attachment { ipv4: None, ipv6: None, mac: None, endpoint: None, ..attachment.clone() };
    }
    let created = Timestamp::now();
    Record { id, name, created, config, host_config, networks, life: Lifecycle::default(), ..parent.clone() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::container::record::sample;

    #[test]
    fn a_clone_has_its_own_id_and_name_and_the_hostname_that_follows_from_them() {
        let mut parent = sample("ab");
        parent.config.hostname = parent.id[..12].into();
        parent.config.cmd = Some(vec!["sleep".into()]);
        let clone = clone_of(&parent, "cd".repeat(32), "clone".into());
        assert_eq!((clone.config.hostname.as_str(), clone.name.as_str()), ("cdcdcdcdcdcd", "clone"));
        assert_eq!((&clone.config.cmd, &clone.image), (&parent.config.cmd, &parent.image));
        assert_eq!(clone.life, Lifecycle::default());
        parent.config.hostname = "chosen".into();
        assert_eq!(clone_of(&parent, "cd".repeat(32), "clone".into()).config.hostname, "chosen");
    }
}
