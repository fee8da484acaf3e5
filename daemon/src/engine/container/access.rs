//! Access to a container's files, for whoever copies some of them.
//!
//! ```text
//!   it runs ────────▶ its own sandbox
//!   it is starting ─▶ when it has started
//!   it rests ───────▶ a sandbox without a workload, on the container's disk:
//!
//!     boot ─▶ open ──(leases come and go)──▶ idle for a while ─┐
//!                └── a start: what goes on is finished, ───────┴─▶ shut down ─▶ the disk is free
//!                    unless it stands still; a removal: cut off
//! ```
//! A disk has one machine at a time: a sandbox of this kind is one more in the actor's chain of endings, so it boots
//! when the last one is gone, and the next boot, or the removal, waits until it is gone.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bulkhead_agent_api::Call;
use tokio::{sync::mpsc, task::JoinHandle};
use tokio_util::{
    sync::CancellationToken,
    task::{TaskTracker, task_tracker::TaskTrackerToken},
};

use super::{Reply, record::Record, start, state::State, workload::Workload};
use crate::{
    engine::{Error, Result, Shared, mounts},
    phases::{Timeline, TimelineKind},
    sandbox::{Memory, Sandbox},
};

/// How long a sandbox stays when nobody needs it: a copy is several requests.
const LINGER: Duration = Duration::from_secs(3);

/// How long a transfer may stand still while somebody waits for the disk.
const STALLED: Duration = Duration::from_secs(20);

/// How often that is looked at.
const LOOK: Duration = Duration::from_secs(1);

/// How long the guest may take to flush its disk.
const SHUT_DOWN_WITHIN: Duration = Duration::from_secs(10);

/// The right to transfer files of a container, while it is held.
pub(crate) struct Lease {
    /// Where.
    pub(crate) sandbox: Arc<Sandbox>,
    /// The container's name in its guest.
    pub(crate) guest: String,
    progress: Arc<AtomicU64>,
    cut: CancellationToken,
    _counted: Option<TaskTrackerToken>,
}

impl Lease {
    /// To a container that runs: its files are there as long as it runs.
    fn running(sandbox: Arc<Sandbox>, guest: &str) -> Self {
        let (progress, cut) = (Arc::default(), CancellationToken::new());
        Self { sandbox, guest: guest.to_owned(), progress, cut, _counted: None }
    }

    /// Does one step of a transfer, and counts it as progress.
    ///
    /// # Errors
    /// The step's; or the container is needed for something else.
    pub(crate) async fn step<T, E: From<Error>>(
        &self,
        step: impl Future<Output = std::result::Result<T, E>>,
    ) -> std::result::Result<T, E> {
        let result = tokio::select! {
            biased;
            () = self.cut.cancelled() => Err(Error::conflict("the container was started or removed meanwhile").into()),
            result = step => result,
        };
        self.progress.fetch_add(1, Ordering::Relaxed);
        result
    }
}

/// Those who want a container's files, seen from its actor.
#[derive(Default)]
pub(super) struct Files {
    at_rest: Option<AtRest>,
    waiters: Vec<Reply<Lease>>,
}

impl Files {
    /// Somebody wants them.
    pub(super) fn want(&mut self, reply: Reply<Lease>) {
        self.waiters.push(reply);
    }

    /// Gives leases, unless a start is under way: then when it is over. A sandbox that is booted for them becomes
    /// the disk's user that whoever comes next waits for.
    pub(super) fn serve(
        &mut self,
        shared: &Arc<Shared>,
        record: &Record,
        workload: Option<&Arc<Workload>>,
        ending: &mut Option<JoinHandle<()>>,
    ) {
        if matches!(record.life.state, State::Starting(_)) {
            return;
        }
        let id = &record.id;
        for reply in std::mem::take(&mut self.waiters) {
            let refused = match (&record.life.state, workload) {
                (State::Running(_), Some(workload)) => {
                    let _ = reply.send(Ok(Lease::running(Arc::clone(&workload.sandbox), workload.guest())));
                    continue;
                }
                (State::Running(_), None) => format!("container {id} is not running"),
                (State::Removing(_) | State::Dead(_), _) => format!("container {id} is marked for removal"),
                (State::Resting(_) | State::Restarting(_) | State::Starting(_), _) => {
                    self.at_rest(reply, shared, record, ending);
                    continue;
                }
            };
            let _ = reply.send(Err(Error::conflict(refused)));
        }
    }

    fn at_rest(
        &mut self,
        reply: Reply<Lease>,
        shared: &Arc<Shared>,
        record: &Record,
        ending: &mut Option<JoinHandle<()>>,
    ) {
        let refused = match &self.at_rest {
            Some(at_rest) => at_rest.lease(reply).err(),
            None => Some(reply),
        };
        if let Some(reply) = refused {
            let (at_rest, end) = AtRest::begin(Arc::clone(shared), record.clone(), ending.take());
            *ending = Some(end);
            if let Err(reply) = self.at_rest.insert(at_rest).lease(reply) {
                let _ = reply.send(Err(Error::internal("the container's files cannot be looked at")));
            }
        }
    }

    /// The disk is wanted for a start: what goes on comes to its end, and nothing begins.
    pub(super) fn close(&mut self) {
        if let Some(at_rest) = self.at_rest.take() {
            at_rest.closing.cancel();
        }
    }

    /// Ends everything now; whether there was anything.
    pub(super) fn cut(&mut self) -> bool {
        let at_rest = self.at_rest.take();
        at_rest.iter().for_each(|at_rest| {
            at_rest.closing.cancel();
            at_rest.cut.cancel();
        });
        at_rest.is_some()
    }
}

/// A sandbox without a workload.
struct AtRest {
    requests: mpsc::UnboundedSender<Reply<Lease>>,
    closing: CancellationToken,
    cut: CancellationToken,
}

impl AtRest {
    /// Boots one once `before` is over; the handle is its end.
    fn begin(shared: Arc<Shared>, record: Record, before: Option<JoinHandle<()>>) -> (Self, JoinHandle<()>) {
        let (requests, queue) = mpsc::unbounded_channel();
        let (closing, cut) = (CancellationToken::new(), CancellationToken::new());
        let this = Self { requests, closing: closing.clone(), cut: cut.clone() };
        let serving = Serving { shared, record, queue, closing, cut };
        let end = tokio::spawn(async move {
            if let Some(before) = before {
                let _ = before.await;
            }
            serving.run().await;
        });
        (this, end)
    }

    /// Asks for a lease; given back when the sandbox is going.
    fn lease(&self, reply: Reply<Lease>) -> std::result::Result<(), Reply<Lease>> {
        if self.closing.is_cancelled() {
            return Err(reply);
        }
        self.requests.send(reply).map_err(|refused| refused.0)
    }
}

/// The sandbox's own task.
struct Serving {
    shared: Arc<Shared>,
    record: Record,
    queue: mpsc::UnboundedReceiver<Reply<Lease>>,
    closing: CancellationToken,
    cut: CancellationToken,
}

impl Serving {
    async fn run(mut self) {
        if self.closing.is_cancelled() {
            return self.refuse(&too_late());
        }
        // Not given up half-way: whoever waits for the disk would find it in use.
        match boot(&self.shared, &self.record).await {
            Ok(sandbox) => {
                self.serve(&sandbox).await;
                sandbox.shut_down(SHUT_DOWN_WITHIN).await;
            }
            Err(error) => self.refuse(&error),
        }
    }

    /// Takes no more requests.
    fn refuse(&mut self, error: &Error) {
        self.queue.close();
        while let Ok(reply) = self.queue.try_recv() {
            let _ = reply.send(Err(error.clone()));
        }
    }

    async fn serve(&mut self, sandbox: &Arc<Sandbox>) {
        let (leases, progress) = (TaskTracker::new(), Arc::new(AtomicU64::new(0)));
        leases.close();
        loop {
            let idle = async {
                leases.wait().await;
                tokio::time::sleep(LINGER).await;
            };
            tokio::select! {
                biased;
                () = self.closing.cancelled() => break,
                _ = sandbox.ended() => break,
                request = self.queue.recv() => {
                    let Some(reply) = request else { break };
                    let _ = reply.send(Ok(self.lease(sandbox, &leases, &progress)));
                }
                () = idle => {
                    // Whoever asks from now on asks for another; who has asked is still served.
                    self.queue.close();
                    let Ok(reply) = self.queue.try_recv() else { break };
                    let _ = reply.send(Ok(self.lease(sandbox, &leases, &progress)));
                }
            }
        }
        self.refuse(&too_late());
        tokio::select! {
            biased;
            () = self.cut.cancelled() => {}
            () = leases.wait() => {}
            _ = sandbox.ended() => {}
            () = stalled(&progress) => {}
        }
        // Not awaited: a client that reads nothing would hold its lease for ever. The sandbox ends nonetheless.
        self.cut.cancel();
    }

    fn lease(&self, sandbox: &Arc<Sandbox>, leases: &TaskTracker, progress: &Arc<AtomicU64>) -> Lease {
        Lease {
            sandbox: Arc::clone(sandbox),
            guest: self.record.id.clone(),
            progress: Arc::clone(progress),
            cut: self.cut.clone(),
            _counted: Some(leases.token()),
        }
    }
}

/// Resolves when no transfer has moved for a while.
async fn stalled(progress: &AtomicU64) {
    let (mut last, mut still) = (progress.load(Ordering::Relaxed), Duration::ZERO);
    while still < STALLED {
        tokio::time::sleep(LOOK).await;
        let now = progress.load(Ordering::Relaxed);
        still = if now == last { still + LOOK } else { Duration::ZERO };
        last = now;
    }
}

fn too_late() -> Error {
    Error::conflict("the container is being started or removed")
}

/// Boots a sandbox in which the container is made and not started.
async fn boot(shared: &Shared, record: &Record) -> Result<Arc<Sandbox>> {
    let failed = |error: &dyn std::fmt::Display| {
        Error::internal(format!("cannot look into container {}: {error}", record.id))
    };
    tokio::task::spawn_blocking(crate::check::can_run_guests).await.map_err(|error| failed(&error))??;
    let plan = mounts::plan_at_rest(shared, &record.mounts);
    let create = start::create_call(shared, record, &plan)?;
    let disk = shared.layout().container_disk(&record.id);
    let timeline = Timeline::begin(&record.id, TimelineKind::Run);
    let spec = start::sandbox_spec(shared, record, &disk, start::origin(shared, record), &timeline)?;
    let mut spec = plan.onto(spec);
    // What a workload needs beyond the machine's own.
    spec.memory = Memory { plugged_mib: 0, ..spec.memory };
    spec.limits.memory_bytes = Some(spec.memory.host_bytes());
    let (sandbox, mut events) = Sandbox::boot(spec).await.map_err(|error| failed(&error))?;
    // Nothing happens in it; but who does not listen is hung up on.
    tokio::spawn(async move { while events.recv().await.is_some() {} });
    let sandbox = Arc::new(sandbox);
    match sandbox.call(Call::Create(Box::new(create))).await {
        Ok(_) => Ok(sandbox),
        Err(error) => {
            sandbox.destroy().await;
            Err(failed(&error))
        }
    }
}
