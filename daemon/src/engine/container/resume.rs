//! Starts a container from a saved machine: a checkpoint of its own, or its parent's at a fork.
//!
//! ```text
//!   disk: a clone of the checkpoint's, beside the container's own ──────────────────┐
//!   same shape? ─▶ restore, personalize ─▶ limits ─▶ streams, execs taken over ─▶ it becomes the container's
//! ```
//! When any of it fails, the container is as it was.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use bulkhead_agent_api::ContainerIdentity;
use jiff::Timestamp;

use super::{
    hub::Hub,
    joining, network,
    record::Record,
    restrain,
    start::{
        Started, boot_failure, call, connect, container_state, first_exit, kept, resolver, sandbox_spec,
        stdio,
    },
    state::Failure,
    wiring,
    workload::Workload,
};
use crate::{
    engine::{
        Error, Shared,
        logs::{Durable, Log},
        network::Joined,
    },
    phases::{Stage, Timeline, TimelineKind},
    sandbox::{MachineSpec, Memory, OpenMachine, Origin, Place, Sandbox, Shape},
};

/// A saved machine that a container goes on from.
pub(crate) struct Resumption {
    pub(crate) machine: OpenMachine,
    /// What the machine is made of.
    pub(crate) shape: Shape,
    /// The container's name in it.
    pub(crate) guest: String,
    /// What becomes of the container.
    pub(crate) identity: ContainerIdentity,
    /// The disk that belongs to it, of which the container gets a clone; None: the container's own is that.
    pub(crate) disk: Option<PathBuf>,
}

/// A run that is beginning.
pub(super) struct Run<'a> {
    pub(super) shared: &'a Arc<Shared>,
    pub(super) record: &'a Record,
    pub(super) hub: &'a Arc<Hub>,
    pub(super) timeline: &'a Arc<Timeline>,
    pub(super) log: Log,
    pub(super) log_start: u64,
    /// Its places in its networks.
    pub(super) joined: Vec<Joined>,
}

/// Lets a container go on from a saved machine.
pub(super) async fn resume(
    run: Run<'_>,
    resumption: Resumption,
    booted: &mut Option<Arc<Sandbox>>,
) -> Result<Started, Failure> {
    let Run { shared, record, hub, timeline, log, log_start, mut joined } = run;
    let internal = |error: Error| Failure { code: 128, error: error.message };
    let of_checkpoint = resumption.disk.is_some();
    let Resumption { machine, shape, guest, identity, disk } = resumption;
    let disk = RestoredDisk::prepare(shared, record, disk).await.map_err(internal)?;
    let origin = Origin::Saved { machine, containers: vec![identity] };
    let mut spec = sandbox_spec(shared, record, disk.path(), origin, timeline).map_err(internal)?;
    // What the container's settings have become since changes the next machine, not this one.
    spec.vcpus = shape.vcpus();
    // What was plugged is in what was saved.
    spec.memory = Memory { base_mib: shape.memory_mib(), plugged_mib: 0 };
    // So the host's limit is known when it is there.
    spec.limits.memory_bytes = None;
    let here = shared.shape(spec.machine()).await.map_err(internal)?;
    if let Some(what) = shape.difference(&here) {
        let error = format!("the saved machine cannot go on here: {what} is another");
        return Err(Failure { code: 128, error });
    }
    timeline.mark(Stage::Prepared);
    let (booting, admitted) = tokio::join!(Sandbox::boot(spec), network::admit(shared, record, &mut joined));
    let (sandbox, events) = booting.map_err(|error| boot_failure(&error))?;
    sandbox.settle(&record.id, joining::tenant(shared, record, &guest, Place::default()));
    let sandbox = Arc::clone(booted.insert(Arc::new(sandbox)));
    // Its interfaces are those of its former life until now, and what they send goes nowhere.
    network::plug(&sandbox, &admitted.map_err(internal)?).await?;
    for request in network::calls(shared, record, &joined) {
        call(&sandbox, request).await?;
    }
    if !joined.is_empty() {
        call(&sandbox, wiring::files(shared, record, &guest).map_err(internal)?).await?;
    }
    let resolver = resolver(shared, record, &sandbox).await?;
    let data_root = &shared.layout().data_root;
    let memory = |error| Failure { code: 128, error: format!("the saved machine's memory: {error}") };
    sandbox.limit_memory().await.map_err(memory)?;
    restrain::before_start(&sandbox, record, data_root)
        .await
        .map_err(|error| Failure { code: 128, error })?;
    let state = container_state(&sandbox, &guest).await.map_err(internal)?;
    let exit = first_exit(&state).map_err(internal)?;
    let at = Timestamp::now();
    let workload = Arc::new(Workload::new(sandbox, Arc::new(log), &guest));
    if of_checkpoint {
        // Its limits may have changed since.
        restrain::catch_up(shared, &workload, record).await;
    }
    let mut watch = connect(&workload, stdio(record), kept(record, Durable::default()), hub, events, exit)
        .await
        .map_err(|error| Failure { code: 128, error: format!("the container's streams: {error}") })?;
    (watch.timeline, watch.resolver) = (Some(Arc::clone(timeline)), resolver);
    timeline.mark(Stage::Connected);
    crate::engine::exec::take_over(&workload, state.execs);
    if state.paused {
        // It was saved while it stood still; whoever starts it wants it to run.
        workload.set_paused(false).await.map_err(internal)?;
    }
    disk.keep().map_err(|error| internal(error.into()))?;
    let (endpoints, place) = (network::endpoints(joined), Place::default());
    Ok(Started { workload, watch, log_start, at, endpoints, place })
}

/// The disk of a container that goes on from a checkpoint: beside the container's own until it runs on.
struct RestoredDisk {
    own: PathBuf,
    /// A clone of the checkpoint's; None: the container's own is used.
    clone: Option<PathBuf>,
}

impl RestoredDisk {
    async fn prepare(shared: &Shared, record: &Record, source: Option<PathBuf>) -> Result<Self, Error> {
        let own = shared.layout().container_disk(&record.id);
        let Some(source) = source else { return Ok(Self { own, clone: None }) };
        let clone = own.with_extension("restored");
        let target = clone.clone();
        let cloned = tokio::task::spawn_blocking(move || {
            match std::fs::remove_file(&target) {
                // Of a start that a daemon did not live to end.
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            bulkhead_rootfs::disk::clone(&source, &target).map(drop).map_err(std::io::Error::other)
        });
        cloned
            .await
            .unwrap_or_else(|error| Err(std::io::Error::other(error)))
            .map_err(|error| Error::internal(format!("the checkpoint's disk cannot be cloned: {error}")))?;
        Ok(Self { own, clone: Some(clone) })
    }

    fn path(&self) -> &Path {
        self.clone.as_ref().unwrap_or(&self.own)
    }

    /// It is the container's from now on.
    fn keep(mut self) -> std::io::Result<()> {
        match self.clone.take() {
            Some(clone) => std::fs::rename(clone, &self.own),
            None => Ok(()),
        }
    }
}

impl Drop for RestoredDisk {
    fn drop(&mut self) {
        if let Some(clone) = &self.clone
            && let Err(error) = std::fs::remove_file(clone)
        {
            tracing::error!(path = %clone.display(), %error, "a disk that is not needed stays behind");
        }
    }
}

impl Shared {
    /// What a machine is made of, by the contents of its files.
    pub(crate) async fn shape(&self, machine: MachineSpec) -> Result<Shape, Error> {
        let digests = Arc::clone(&self.digests);
        let read = tokio::task::spawn_blocking(move || Shape::read(&machine, &digests)).await;
        read.unwrap_or_else(|error| Err(std::io::Error::other(error)))
            .map_err(|error| Error::internal(format!("the machine's files cannot be read: {error}")))
    }

    /// What a running sandbox's machine is made of. Its VMM may be of an older daemon's.
    pub(crate) async fn shape_of(&self, sandbox: &Sandbox, record: &Record) -> Result<Shape, Error> {
        if !record.mounts.is_empty() {
            return Err(Error::conflict(format!(
                "container {} has volumes or bind mounts, with which it cannot be saved: what it has open of them is \
                 outside of its machine",
                record.id
            )));
        }
        if sandbox.is_shared() || joining::is_guest(&record.host_config) {
            return Err(Error::conflict(format!(
                "container {} shares its microVM with others, which would be saved with it: it cannot be saved",
                record.id
            )));
        }
        let disk = self.layout().container_disk(&record.id);
        let nobody = Timeline::begin(&record.id, TimelineKind::Run);
        let mut machine = sandbox_spec(self, record, &disk, Origin::Cold, &nobody)?.machine();
        machine.program = sandbox.program(machine.program);
        self.shape(machine).await
    }
}
