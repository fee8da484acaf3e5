//! Containers. Each is owned by one task, its actor; everybody else has a [`Container`]: a queue of commands
//! to it and a view of its record that is always there, however busy the actor is.
//!
//! ```text
//!   engine's methods ──commands──▶ actor ──▶ state::Lifecycle::step ──▶ effects: boot, watch, stop, delete
//!          ▲                         │ record on disk, then
//!          └────────── view ◀────────┘
//! ```

pub(crate) mod access;
mod actor;
mod create;
pub(crate) mod health;
pub(crate) mod hub;
mod inspect;
pub(crate) mod joining;
mod list;
mod machine;
pub(crate) mod memory;
pub(crate) mod names;
pub(crate) mod network;
mod ops;
mod prune;
pub(crate) mod pump;
pub mod record;
pub(crate) mod registry;
mod restrain;
pub(crate) mod resume;
pub(crate) mod signal;
pub(crate) mod start;
pub mod state;
mod stats;
mod top;
mod wiring;
pub(crate) mod workload;

use std::{sync::Arc, time::Duration};

use tokio::sync::{Mutex, mpsc, oneshot, watch};

use access::Lease;
pub(crate) use actor::Actor;
pub use list::{LIST_FILTERS, ListOptions};
pub use prune::PRUNE_FILTERS;
pub use stats::StatsMode;

use crate::{
    api::types::container::{HostConfig, WaitResponse},
    engine::{
        Error, Result, WaitCondition,
        network::record::{Attachment, Network},
    },
};
use hub::Hub;
use record::Record;
use resume::Resumption;
use state::State;
use workload::Workload;

/// An answer to come.
pub(crate) type Reply<T> = oneshot::Sender<Result<T>>;

/// What a container's actor is asked to do.
pub(crate) enum Command {
    /// Answered when the workload runs.
    Start(Reply<()>),
    /// Answered when the workload runs on from where it was saved.
    Resume(Box<Resumption>, Reply<()>),
    /// Answered when it has ended.
    Stop(Stop, Reply<()>),
    /// Answered when it runs again.
    Restart(Stop, Reply<()>),
    /// Answered when the signal is delivered.
    Kill(i32, Reply<()>),
    /// Answered when the new host config is on disk. What runs is held to it already.
    Update(Box<HostConfig>, Reply<()>),
    /// Answered when its processes stand still (true), or run on.
    Pause(bool, Reply<()>),
    /// Answered when nothing is left.
    Remove {
        /// Even if it runs.
        force: bool,
        /// For the answer.
        reply: Reply<()>,
    },
    /// To a name that is reserved.
    Rename(String, Reply<()>),
    /// Without the link that it calls so.
    Unlink(String, Reply<()>),
    /// Into a network; answered when it is in.
    Connect(Arc<Network>, Box<Attachment>, Reply<()>),
    /// Out of a network; answered when it is out.
    Disconnect {
        /// The network, which may be gone: then its name.
        network: String,
        /// Even if the guest does not answer.
        force: bool,
        /// For the answer.
        reply: Reply<()>,
    },
    /// Answered at once with what will resolve.
    Wait(WaitCondition, oneshot::Sender<oneshot::Receiver<WaitResponse>>),
    /// Access to its files: answered when there is a sandbox for it.
    Files(Reply<Lease>),
    /// Ends the actor and leaves the container as it is.
    Close(oneshot::Sender<()>),
}

/// How to stop.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stop {
    /// First. None: the container's own.
    pub(crate) signal: Option<i32>,
    /// Before SIGKILL. None: the container's own.
    pub(crate) grace: Option<Grace>,
}

/// How long to wait before SIGKILL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Grace {
    /// So long.
    For(Duration),
    /// No SIGKILL.
    Forever,
}

impl Grace {
    /// From Docker's seconds, where a negative number is for ever.
    pub(crate) fn from_seconds(seconds: i64) -> Self {
        u64::try_from(seconds).map_or(Self::Forever, |seconds| Self::For(Duration::from_secs(seconds)))
    }
}

/// What everybody may see of a container.
#[derive(Clone)]
pub(crate) struct View {
    /// Its record.
    pub(crate) record: Arc<Record>,
    /// What runs, while it does.
    pub(crate) workload: Option<Arc<Workload>>,
}

impl View {
    /// The workload of a running container.
    ///
    /// # Errors
    /// 409 in Docker's words.
    pub(crate) fn running(&self) -> Result<&Arc<Workload>> {
        let id = &self.record.id;
        match (&self.record.life.state, &self.workload) {
            (State::Running(_), Some(workload)) => Ok(workload),
            (State::Restarting(_), _) => Err(Error::conflict(format!(
                "Container {id} is restarting, wait until the container is running"
            ))),
            _ => Err(Error::conflict(format!("container {id} is not running"))),
        }
    }
}

impl View {
    /// The workload of a container that runs and is not paused; `what` could not be done while it is.
    ///
    /// # Errors
    /// 409 in Docker's words.
    pub(crate) fn awake(&self, what: &str) -> Result<&Arc<Workload>> {
        let workload = self.running()?;
        match &self.record.life.state {
            State::Running(running) if running.paused => Err(Error::conflict(format!(
                "Container {} is paused, unpause the container before {what}",
                self.record.id
            ))),
            _ => Ok(workload),
        }
    }
}

/// A container.
pub(crate) struct Container {
    id: String,
    commands: mpsc::Sender<Command>,
    view: watch::Receiver<View>,
    hub: Arc<Hub>,
    updates: Mutex<()>,
}

impl Container {
    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    pub(crate) fn hub(&self) -> &Arc<Hub> {
        &self.hub
    }

    /// Held by whoever changes its limits.
    pub(crate) fn updates(&self) -> &Mutex<()> {
        &self.updates
    }

    /// How it is from now on.
    pub(crate) fn watch(&self) -> watch::Receiver<View> {
        self.view.clone()
    }

    /// How it is at this moment.
    pub(crate) fn view(&self) -> View {
        self.view.borrow().clone()
    }

    /// Asks the actor and waits for its answer.
    pub(crate) async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        let gone = |_| Error::not_found(format!("No such container: {}", self.id));
        self.commands.send(command(reply)).await.map_err(|_| ()).map_err(gone)?;
        answer.await.map_err(|_| ()).map_err(gone)
    }

    /// Tells the actor; whether there still is one.
    pub(crate) async fn tell(&self, command: Command) -> bool {
        self.commands.send(command).await.is_ok()
    }

    /// A container without an actor.
    #[cfg(test)]
    pub(crate) fn detached(id: &str) -> Self {
        let record = Arc::new(Record { id: id.into(), ..record::sample("ab") });
        let (_, view) = watch::channel(View { record, workload: None });
        let kind = hub::Kind { terminal: false, stdin: false, stdin_once: false };
        let (commands, updates) = (mpsc::channel(1).0, Mutex::new(()));
        Self { id: id.into(), commands, view, hub: Arc::new(Hub::new(kind)), updates }
    }
}
