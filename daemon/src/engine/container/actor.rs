//! The task that owns one container: commands and events in, [`Lifecycle::step`] in the middle, effects out.
//! It never waits for a guest: what takes time runs in a task that reports back.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use jiff::Timestamp;
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

mod networks;
mod refusals;
mod stopping;

use self::{networks::Wired, refusals::failed_start};
use super::{
    Command, Container, Reply, Stop, View,
    access::Files,
    health::{self, Check},
    hub::{Hub, Kind},
    machine,
    record::Record,
    restrain,
    resume::Resumption,
    start::{self, Found, Started},
    state::{Effect, Event, Exit, Failure, Lifecycle, Refusal, Rest, Running, State, Then},
    wiring,
    workload::{self, Watch, Workload},
};
use crate::{
    api::types::container::{HealthcheckResult, HostConfig, WaitError, WaitResponse},
    engine::{Error, Result, Shared, WaitCondition},
    phases::{Stage, Timeline, TimelineKind},
    sandbox::Sandbox,
};

/// How many commands may wait.
const COMMANDS: usize = 64;

/// How long a guest may take to power off.
const SHUT_DOWN_WITHIN: Duration = Duration::from_secs(10);

/// How long after a state could not be saved it is tried again.
const SAVE_AGAIN: Duration = Duration::from_secs(5);

/// What a container's own tasks report.
enum Report {
    /// The guard is dropped when the report was taken, and with it the sandbox that nobody wants any more:
    /// what waits for the boot's end must not find its disk in use.
    Booted(u64, Result<Started, Failure>, oneshot::Sender<()>),
    Over(u64, Exit),
    BackOffOver(u64),
    Deleted(std::io::Result<()>),
    /// The agent has frozen the workload (true), or let it run on.
    Paused(u64, bool, Result<()>, Reply<()>),
    /// A health check has ended that began at this time.
    Probed(u64, Timestamp, HealthcheckResult),
    /// A state that could not be saved may be tried again.
    Unsaved,
    /// A running container is in a network, or out of it, or as before.
    Wired(u64, Wired),
}

/// The owner of a container.
pub(crate) struct Actor {
    shared: Arc<Shared>,
    record: Record,
    view: watch::Sender<View>,
    hub: Arc<Hub>,
    commands: mpsc::Receiver<Command>,
    reports: mpsc::Receiver<Report>,
    reporter: mpsc::Sender<Report>,

    /// Counts boots and delays: a report of an earlier one is not of this one.
    turn: u64,
    workload: Option<Arc<Workload>>,
    /// Of the present run; None of one that an earlier daemon started.
    timeline: Option<Arc<Timeline>>,
    boot: Option<CancellationToken>,
    /// What the last boot was begun with.
    booted_with: Option<Box<HostConfig>>,
    /// What the next boot goes on from.
    resumption: Option<Resumption>,
    /// Those who want its files.
    files: Files,
    /// The end of the last sandbox, to be waited for before another boots or the disk goes.
    ending: Option<JoinHandle<()>>,

    starters: Vec<Reply<()>>,
    stoppers: Vec<Reply<()>>,
    killers: Vec<Reply<()>>,
    restarters: Vec<Reply<()>>,
    removers: Vec<Reply<()>>,
    exit_waiters: Vec<oneshot::Sender<WaitResponse>>,
    removal_waiters: Vec<oneshot::Sender<WaitResponse>>,
    /// Whether a change of networks is under way, and those that wait for it.
    wiring: bool,
    wires: VecDeque<Command>,
}

impl Actor {
    /// An actor for a container whose record is on disk, and its handle. It does nothing before [`Actor::run`].
    pub(crate) fn new(shared: Arc<Shared>, record: Record) -> (Self, Arc<Container>) {
        let config = &record.config;
        let kind = Kind { terminal: config.tty, stdin: config.open_stdin, stdin_once: config.stdin_once };
        let hub = Arc::new(Hub::new(kind));
        let (sender, commands) = mpsc::channel(COMMANDS);
        let (reporter, reports) = mpsc::channel(COMMANDS);
        let (view, receiver) = watch::channel(View { record: Arc::new(record.clone()), workload: None });
        let container = Container {
            id: record.id.clone(),
            commands: sender,
            view: receiver,
            hub: Arc::clone(&hub),
            updates: tokio::sync::Mutex::default(),
        };
        let actor = Self {
            shared,
            record,
            view,
            hub,
            commands,
            reports,
            reporter,
            turn: 0,
            workload: None,
            timeline: None,
            boot: None,
            booted_with: None,
            resumption: None,
            files: Files::default(),
            ending: None,
            starters: Vec::new(),
            stoppers: Vec::new(),
            killers: Vec::new(),
            restarters: Vec::new(),
            removers: Vec::new(),
            exit_waiters: Vec::new(),
            removal_waiters: Vec::new(),
            wiring: false,
            wires: VecDeque::new(),
        };
        (actor, Arc::new(container))
    }

    /// Takes over what an earlier daemon left of the container. Does not act on restart policies yet.
    pub(crate) async fn adopt(&mut self) {
        let State::Running(running) = self.record.life.state.clone() else { return };
        match start::adopt(&self.shared, &self.record, &running, &self.hub).await {
            Found::Alive { workload, watch, paused } => {
                tracing::info!(
                    container = self.record.id,
                    pid = workload.sandbox.pid(),
                    "a container is taken over"
                );
                self.watch(workload, watch);
                // The earlier daemon may have died between the deed and the record.
                if self.step(Event::Paused(paused)).await.is_err() {
                    self.publish();
                }
                self.watch_health();
            }
            Found::Gone(reason) => {
                tracing::warn!(container = self.record.id, reason, "a container did not outlive the daemon");
            }
        }
    }

    /// The sandbox that must not be swept away.
    pub(crate) fn sandbox(&self) -> Option<String> {
        self.workload.as_ref().map(|workload| workload.sandbox.id().to_owned())
    }

    /// Runs until the container is gone or [`Command::Close`] comes. `found` is whether the container is an
    /// earlier daemon's.
    pub(crate) async fn run(mut self, found: bool) {
        if found && self.workload.is_none() {
            self.step(Event::Found(Timestamp::now())).await.unwrap_or_default();
        }
        if let State::Running(running) = &self.record.life.state
            && running.then == Some(Then::Remove)
        {
            // An earlier daemon died between the promise and the deed.
            self.run_effect(&Effect::Kill);
        }
        loop {
            let go_on = tokio::select! {
                Some(report) = self.reports.recv() => self.report(report).await,
                command = self.commands.recv() => match command {
                    Some(command) => self.command(command).await,
                    None => false,
                },
            };
            if !go_on {
                return;
            }
            self.files.serve(&self.shared, &self.record, self.workload.as_ref(), &mut self.ending);
        }
    }

    async fn command(&mut self, command: Command) -> bool {
        match command {
            Command::Start(reply) => self.start(reply).await,
            Command::Resume(resumption, reply) => self.resume(*resumption, reply).await,
            Command::Stop(stop, reply) => self.stop(stop, reply).await,
            Command::Restart(stop, reply) => self.restart(stop, reply).await,
            Command::Kill(signal, reply) => self.kill(signal, reply).await,
            Command::Pause(pause, reply) => self.pause(pause, reply),
            Command::Update(host, reply) => answer(reply, self.update(*host).await),
            Command::Remove { force, reply } => match self.step(Event::Remove { force }).await {
                Ok(()) => self.removers.push(reply),
                Err(refusal) => answer(reply, Err(self.refused_removal(refusal))),
            },
            Command::Rename(name, reply) => answer(reply, self.rename(name).await),
            Command::Unlink(alias, reply) => answer(reply, self.unlink(&alias).await),
            command @ (Command::Connect(..) | Command::Disconnect { .. }) => self.wire(command).await,
            Command::Wait(condition, reply) => {
                let _ = reply.send(self.wait(condition));
            }
            Command::Files(reply) => self.files.want(reply),
            Command::Close(done) => {
                if self.files.cut()
                    && let Some(ending) = self.ending.take()
                {
                    let _ = ending.await;
                }
                let _ = done.send(());
                return false;
            }
        }
        true
    }

    async fn report(&mut self, report: Report) -> bool {
        match report {
            Report::Booted(turn, result, _taken) if turn == self.turn => match result {
                Ok(started) => self.started(started).await,
                Err(failure) => self.start_failed(failure).await,
            },
            // A boot that was given up at the moment of its success.
            Report::Booted(_, Ok(started), taken) => {
                // Not in the queue of endings: its head may wait for this very guard.
                let (shared, id) = (Arc::clone(&self.shared), self.record.id.clone());
                tokio::spawn(async move {
                    started.workload.sandbox.leave(&id, false, SHUT_DOWN_WITHIN).await;
                    shared.networks.leave(&id).await;
                    drop(taken);
                });
            }
            Report::Booted(_, Err(_), _) => {}
            Report::Over(turn, exit) if turn == self.turn => {
                if self.step(Event::Exited(exit)).await.is_ok() {
                    self.tell_stoppers();
                }
            }
            Report::BackOffOver(turn) if turn == self.turn => {
                let _ = self.step(Event::BackOffOver).await;
            }
            Report::Over(..) | Report::BackOffOver(..) => {}
            Report::Paused(turn, pause, result, reply) => {
                let result = match result {
                    Ok(()) if turn == self.turn => self.paused(pause).await,
                    Ok(()) => Err(self.not_running()),
                    Err(error) => Err(Error::internal(format!(
                        "cannot {} container {}: {error}",
                        if pause { "pause" } else { "unpause" },
                        self.record.id
                    ))),
                };
                answer(reply, result);
            }
            Report::Probed(turn, began, result) if turn == self.turn => self.probed(began, result).await,
            Report::Probed(..) => {}
            Report::Unsaved => {
                let passing = matches!(self.record.life.state, State::Starting(_) | State::Removing(_));
                if !passing && let Err(error) = self.save(&self.record).await {
                    self.save_later(&error);
                }
            }
            Report::Wired(turn, wired) => {
                self.wired(turn, wired).await;
                self.wiring = false;
                if let Some(next) = self.wires.pop_front() {
                    self.wire(next).await;
                }
            }
            Report::Deleted(Ok(())) => {
                self.gone();
                return false;
            }
            Report::Deleted(Err(error)) => {
                let message =
                    format!("container {}: driver failed to remove root filesystem: {error}", self.record.id);
                let _ = self.step(Event::RemoveFailed).await;
                // `docker run --rm` waits for the removal, which will not come by itself.
                let error = Some(WaitError { message: message.clone() });
                let response = WaitResponse { error, ..self.outcome() };
                for waiter in self.removal_waiters.drain(..).chain(self.exit_waiters.drain(..)) {
                    let _ = waiter.send(response.clone());
                }
                for reply in self.removers.drain(..) {
                    answer(reply, Err(Error::internal(message.clone())));
                }
            }
        }
        true
    }

    // ---- Commands

    async fn start(&mut self, reply: Reply<()>) {
        match self.step(Event::Start).await {
            Ok(()) => self.starters.push(reply),
            Err(Refusal::Already) if self.boot.is_some() => self.starters.push(reply),
            Err(refusal) => answer(reply, Err(self.refused_start(refusal))),
        }
    }

    async fn resume(&mut self, resumption: Resumption, reply: Reply<()>) {
        // For the boot that this step asks for, and for no other.
        self.resumption = Some(resumption);
        let stepped = self.step(Event::Start).await;
        self.resumption = None;
        match stepped {
            Ok(()) => self.starters.push(reply),
            Err(refusal) => answer(reply, Err(self.refused_start(refusal))),
        }
    }

    async fn stop(&mut self, stop: Stop, reply: Reply<()>) {
        match self.step(Event::Stop).await {
            Ok(()) if self.workload.is_some() => {
                self.stoppers.push(reply);
                self.begin_stop(stop).await;
            }
            Ok(()) => answer(reply, Ok(())),
            Err(_) => answer(reply, Err(Error::not_modified("the container is already stopped"))),
        }
    }

    async fn restart(&mut self, stop: Stop, reply: Reply<()>) {
        match self.step(Event::Restart).await {
            Ok(()) => {
                self.restarters.push(reply);
                self.begin_stop(stop).await;
            }
            Err(Refusal::Already) if self.boot.is_some() => self.restarters.push(reply),
            Err(refusal) => answer(reply, Err(self.refused_start(refusal))),
        }
    }

    async fn kill(&mut self, signal: i32, reply: Reply<()>) {
        let not_running = self.not_running();
        let Some(workload) = self.workload.clone() else {
            // A container that waits for its restart is told not to.
            let waiting = matches!(self.record.life.state, State::Restarting(_));
            let stopped = waiting && self.step(Event::Stop).await.is_ok();
            return answer(reply, if stopped { Ok(()) } else { Err(not_running) });
        };
        // Any other signal may be handled by the workload and leaves its restart policy in force.
        let final_ = signal == libc::SIGKILL || signal == self.stop_signal();
        if final_ {
            let _ = self.step(Event::Stop).await;
        }
        self.tell("kill", [("signal".into(), signal.to_string())]);
        let paused = final_ && self.wake().await;
        if signal == libc::SIGKILL {
            // Answered when it is over: the next request finds a container that does not run.
            self.killers.push(reply);
            tokio::spawn(async move { workload::kill(&workload).await });
        } else {
            tokio::spawn(async move {
                let delivered = workload.signal(signal).await;
                // As with a stop: what is to end must run to do so.
                let resumed = if paused { workload.set_paused(false).await } else { Ok(()) };
                answer(reply, delivered.and(resumed));
            });
        }
    }

    /// Has the workload frozen, or let go. The state changes when it is so.
    fn pause(&mut self, pause: bool, reply: Reply<()>) {
        let id = &self.record.id;
        let refused = match &self.record.life.state {
            State::Running(running) if running.paused == pause => Some(match pause {
                true => Error::conflict(format!("container {id} is already paused")),
                false => Error::internal(format!("Container {id} is not paused")),
            }),
            State::Running(_) => None,
            State::Restarting(_) if pause => Some(Error::conflict(format!(
                "Container {id} is restarting, wait until the container is running"
            ))),
            _ if pause => Some(self.not_running()),
            _ => Some(Error::internal(format!("Container {id} is not paused"))),
        };
        let (None, Some(workload)) = (&refused, self.workload.clone()) else {
            return answer(reply, Err(refused.unwrap_or_else(|| self.not_running())));
        };
        let (reporter, turn) = (self.reporter.clone(), self.turn);
        tokio::spawn(async move {
            let result = workload.set_paused(pause).await;
            let _ = reporter.send(Report::Paused(turn, pause, result, reply)).await;
        });
    }

    /// The workload stands still, or runs on.
    async fn paused(&mut self, pause: bool) -> Result<()> {
        if let State::Running(Running { then: Some(_), .. }) = self.record.life.state
            && pause
            && let Some(workload) = self.workload.clone()
        {
            // A stop has come in between, and must not wait for what cannot move.
            tokio::spawn(async move { workload.set_paused(false).await });
            return Err(Error::conflict(format!("container {} is being stopped", self.record.id)));
        }
        match self.step(Event::Paused(pause)).await {
            Ok(()) => {
                self.tell(if pause { "pause" } else { "unpause" }, []);
                Ok(())
            }
            Err(Refusal::Already) if pause => {
                Err(Error::conflict(format!("container {} is already paused", self.record.id)))
            }
            Err(Refusal::Already) => {
                Err(Error::internal(format!("Container {} is not paused", self.record.id)))
            }
            Err(_) => Err(self.not_running()),
        }
    }

    /// A workload that is to end is no longer paused; whether it was. The caller lets it run on.
    async fn wake(&mut self) -> bool {
        let woken = self.step(Event::Paused(false)).await.is_ok();
        if woken {
            self.tell("unpause", []);
        }
        woken
    }

    fn not_running(&self) -> Error {
        Error::conflict(format!("container {} is not running", self.record.id))
    }

    async fn rename(&mut self, name: String) -> Result<()> {
        // Its record is being deleted: it must not be written anew.
        if matches!(self.record.life.state, State::Removing(_) | State::Dead(_)) {
            return Err(Error::conflict("container is marked for removal and cannot be renamed"));
        }
        let mut next = self.record.clone();
        let old = std::mem::replace(&mut next.name, name);
        self.save(&next)
            .await
            .map_err(|error| Error::internal(format!("the new name was not saved: {error}")))?;
        self.record = next;
        self.publish();
        self.shared.registry.release(&old, &self.record.id);
        self.shared.networks.rename(&self.record.id, &self.record.name);
        self.tell("rename", [("oldName".into(), format!("/{old}"))]);
        Ok(())
    }

    /// Makes a record the container's: on disk, then for all to see.
    async fn keep(&mut self, next: Record) -> Result<()> {
        self.save(&next)
            .await
            .map_err(|error| Error::internal(format!("the change was not saved: {error}")))?;
        self.record = next;
        self.publish();
        Ok(())
    }

    async fn update(&mut self, host: HostConfig) -> Result<()> {
        // Its record is being deleted: it must not be written anew.
        if matches!(self.record.life.state, State::Removing(_) | State::Dead(_)) {
            return Err(Error::conflict("container is marked for removal and cannot be \"update\""));
        }
        let next = Record { host_config: host, ..self.record.clone() };
        self.save(&next)
            .await
            .map_err(|error| Error::internal(format!("the new limits were not saved: {error}")))?;
        self.record = next;
        self.publish();
        self.tell("update", []);
        Ok(())
    }

    fn wait(&mut self, condition: WaitCondition) -> oneshot::Receiver<WaitResponse> {
        let (sender, receiver) = oneshot::channel();
        let active = matches!(self.record.life.state, State::Running(_) | State::Restarting(_));
        match condition {
            WaitCondition::NotRunning if !active => {
                let _ = sender.send(self.outcome());
            }
            WaitCondition::NotRunning | WaitCondition::NextExit => self.exit_waiters.push(sender),
            WaitCondition::Removed => self.removal_waiters.push(sender),
        }
        // Those who hung up are forgotten here, so that they do not heap up.
        self.exit_waiters.retain(|waiter| !waiter.is_closed());
        self.removal_waiters.retain(|waiter| !waiter.is_closed());
        receiver
    }

    fn outcome(&self) -> WaitResponse {
        let status_code = match &self.record.life.state {
            State::Resting(rest) | State::Removing(rest) | State::Dead(rest) | State::Starting(rest) => {
                match rest {
                    Rest::Created(failure) => failure.as_ref().map_or(0, |failure| failure.code),
                    Rest::Exited(ended) => ended.code,
                }
            }
            State::Restarting(ended) => ended.code,
            State::Running(_) => 0,
        };
        WaitResponse { error: None, status_code: status_code.into() }
    }

    // ---- Events

    async fn started(&mut self, started: Started) {
        self.boot = None;
        let Started { workload, watch, log_start, at, endpoints, place } = started;
        let event = Event::Started {
            sandbox: workload.sandbox.id().to_owned(),
            pid: workload.sandbox.pid(),
            log_start,
            at,
            guest: Some(workload.guest().to_owned()).filter(|guest| *guest != self.record.id),
            place,
        };
        let before = self.record.clone();
        match self.record.life.step(self.record.rules(), event) {
            Ok((life, _)) => {
                self.record.life = life;
                for (name, endpoint) in endpoints {
                    if let Some(attachment) = self.record.networks.get_mut(&name) {
                        attachment.endpoint = Some(endpoint);
                    }
                }
                let check = Check::of(&self.record.config);
                self.record.health = health::begin(check.as_ref(), self.record.health.take());
            }
            Err(refusal) => {
                tracing::error!(container = self.record.id, ?refusal, "a start came too late");
                self.end(workload.sandbox.clone(), false);
                return;
            }
        }
        if let Err(error) = self.save(&self.record).await {
            // What is not on disk would be lost by a restart of the daemon: rather not begun.
            self.record = before;
            self.end(workload.sandbox.clone(), false);
            let failure =
                Failure { code: 128, error: format!("the container's state was not saved: {error}") };
            return self.start_failed(failure).await;
        }
        if self.booted_with.take().is_some_and(|then| *then != self.record.host_config) {
            let (workload, shared, record) =
                (Arc::clone(&workload), Arc::clone(&self.shared), self.record.clone());
            tokio::spawn(async move {
                restrain::catch_up(&shared, &workload, &record).await;
            });
        }
        self.reached(Stage::Running);
        if let Some(timeline) = &self.timeline {
            tracing::debug!(container = self.record.id, %timeline, "started");
        }
        self.watch(workload, watch);
        self.publish();
        for (name, attachment) in &self.record.networks {
            if attachment.endpoint.is_some()
                && let Some(network) = self.shared.networks.named(&self.record, name)
            {
                self.shared.networks.tell_connected(&network, &self.record.id);
            }
        }
        wiring::tell_parents(&self.shared, &self.record);
        self.watch_health();
        self.tell("start", []);
        for reply in self.starters.drain(..) {
            answer(reply, Ok(()));
        }
        let restarters = std::mem::take(&mut self.restarters);
        if !restarters.is_empty() {
            self.tell("restart", []);
        }
        for reply in restarters {
            answer(reply, Ok(()));
        }
    }

    async fn start_failed(&mut self, failure: Failure) {
        self.boot = None;
        let error = failed_start(&failure);
        tracing::warn!(container = self.record.id, error = failure.error, "a container did not start");
        self.hub.end_run();
        let _ = self.step(Event::StartFailed(failure)).await;
        for reply in self.starters.drain(..).chain(self.restarters.drain(..)) {
            answer(reply, Err(error.clone()));
        }
    }

    fn watch(&mut self, workload: Arc<Workload>, watch: Watch) {
        self.workload = Some(Arc::clone(&workload));
        let (reporter, turn, hub) = (self.reporter.clone(), self.turn, Arc::clone(&self.hub));
        let (shared, record) = (Arc::clone(&self.shared), self.record.clone());
        tokio::spawn(async move {
            let oom = || shared.publish(&record, "oom", []);
            let exit = workload.watch(watch, &hub, oom).await;
            if let Some(death) = workload.death() {
                machine::remember(&shared, &record, death).await;
            }
            let _ = reporter.send(Report::Over(turn, exit)).await;
        });
    }

    // ---- Health

    /// Has the workload's health checked, if its container says how.
    fn watch_health(&self) {
        let (Some(check), Some(workload)) = (Check::of(&self.record.config), self.workload.clone()) else {
            return;
        };
        let (reporter, turn) = (self.reporter.clone(), self.turn);
        let tell = move |began, result| {
            let reporter = reporter.clone();
            // The actor's end is the container's.
            async move { drop(reporter.send(Report::Probed(turn, began, result)).await) }
        };
        tokio::spawn(health::monitor(Arc::clone(&self.shared), workload, self.view.subscribe(), check, tell));
    }

    async fn probed(&mut self, began: Timestamp, result: HealthcheckResult) {
        let State::Running(running) = &self.record.life.state else { return };
        let (Some(check), Some(health)) = (Check::of(&self.record.config), &mut self.record.health) else {
            return;
        };
        let changed = health::judge(&check, health, result, began, running.started_at);
        let status = health.status.clone();
        self.publish();
        if changed {
            self.tell(&format!("health_status: {status}"), []);
            if let Err(error) = self.save(&self.record).await {
                self.save_later(&error);
            }
        }
    }

    // ---- One step of the life

    async fn step(&mut self, event: Event) -> Result<(), Refusal> {
        let (life, effects) = self.record.life.step(self.record.rules(), event)?;
        let kept = must_be_kept(&self.record.life, &life);
        let was_under_way = matches!(self.record.life.state, State::Starting(_) | State::Restarting(_));
        self.record.life = life;
        if !matches!(self.record.life.state, State::Running(_)) {
            for attachment in self.record.networks.values_mut() {
                attachment.endpoint = None;
            }
        }
        if kept && let Err(error) = self.save(&self.record).await {
            self.save_later(&error);
        }
        for effect in effects {
            self.run_effect(&effect);
        }
        self.publish();
        if was_under_way && matches!(self.record.life.state, State::Resting(_)) {
            // The run that they wait for will not come.
            let outcome = self.outcome();
            for waiter in self.exit_waiters.drain(..) {
                let _ = waiter.send(outcome.clone());
            }
        }
        Ok(())
    }

    fn run_effect(&mut self, effect: &Effect) {
        match *effect {
            Effect::Boot => self.boot(),
            Effect::AbortBoot => {
                if let Some(boot) = self.boot.take() {
                    boot.cancel();
                }
                self.turn += 1;
                self.hub.end_run();
                let error =
                    Error::conflict("the start was given up, since the container was stopped or removed");
                for reply in self.starters.drain(..).chain(self.restarters.drain(..)) {
                    answer(reply, Err(error.clone()));
                }
            }
            Effect::Kill => {
                if let Some(workload) = self.workload.clone() {
                    self.tell("kill", [("signal".into(), libc::SIGKILL.to_string())]);
                    tokio::spawn(async move { workload::kill(&workload).await });
                }
            }
            Effect::Ended(code) => {
                // Who attaches while the view says that it runs is of the run that is over, and goes with it;
                // who attaches after the exit was told is of the next.
                self.reached(Stage::Ended);
                if let Some(health) = &mut self.record.health {
                    // Docker's: what does not run is not well.
                    health.status = health::UNHEALTHY.into();
                }
                self.publish();
                self.hub.end_run();
                let ran = self.ran_for().as_secs().to_string();
                self.tell("die", [("exitCode".into(), code.to_string()), ("execDuration".into(), ran)]);
                self.shared.mount_events(&self.record, "unmount");
                for waiter in self.exit_waiters.drain(..) {
                    let _ = waiter.send(WaitResponse { error: None, status_code: code.into() });
                }
            }
            Effect::ShutDown => self.end_workload(true),
            Effect::Destroy => self.end_workload(false),
            Effect::BackOff(delay) => {
                self.turn += 1;
                let (reporter, turn) = (self.reporter.clone(), self.turn);
                tokio::spawn(async move {
                    tokio::time::sleep(delay).await;
                    let _ = reporter.send(Report::BackOffOver(turn)).await;
                });
            }
            Effect::Delete => self.delete(),
        }
    }

    fn boot(&mut self) {
        self.files.close();
        self.turn += 1;
        let cancel = CancellationToken::new();
        self.boot = Some(cancel.clone());
        self.booted_with = Some(Box::new(self.record.host_config.clone()));
        let (shared, record, hub) = (Arc::clone(&self.shared), self.record.clone(), Arc::clone(&self.hub));
        let (reporter, turn, before) = (self.reporter.clone(), self.turn, self.ending.take());
        let resumption = self.resumption.take();
        let timeline = self.shared.timelines.begin(&self.record.id, TimelineKind::Run);
        self.timeline = Some(Arc::clone(&timeline));
        self.ending = Some(tokio::spawn(async move {
            if let Some(before) = before {
                let _ = before.await;
            }
            let mut booted = None;
            let result = tokio::select! {
                biased;
                () = cancel.cancelled() => None,
                result = start::start(&shared, &record, &hub, &timeline, resumption, &mut booted) => Some(result),
            };
            if !matches!(result, Some(Ok(_))) {
                if let Some(sandbox) = booted {
                    if let Ok(death) = tokio::time::timeout(Duration::ZERO, sandbox.ended()).await
                        && !death.in_order()
                    {
                        machine::remember(&shared, &record, &death).await;
                    }
                    sandbox.leave(&record.id, false, SHUT_DOWN_WITHIN).await;
                }
                shared.networks.leave(&record.id).await;
            }
            let Some(result) = result else { return };
            let (guard, taken) = oneshot::channel();
            match reporter.send(Report::Booted(turn, result, guard)).await {
                // Its end without a word is the word.
                Ok(()) => drop(taken.await),
                Err(mpsc::error::SendError(Report::Booted(_, Ok(started), _))) => {
                    started.workload.sandbox.leave(&record.id, false, SHUT_DOWN_WITHIN).await;
                    shared.networks.leave(&record.id).await;
                }
                Err(_) => {}
            }
        }));
    }

    fn end_workload(&mut self, flush: bool) {
        if let Some(workload) = self.workload.take() {
            self.end(Arc::clone(&workload.sandbox), flush);
        }
    }

    /// Leaves a sandbox in a task of its own, and so ends it where nobody else is in it; whatever comes next waits for
    /// that.
    fn end(&mut self, sandbox: Arc<Sandbox>, flush: bool) {
        let before = self.ending.take();
        let (shared, timeline, id) =
            (Arc::clone(&self.shared), self.timeline.clone(), self.record.id.clone());
        self.ending = Some(tokio::spawn(async move {
            if let Some(before) = before {
                let _ = before.await;
            }
            sandbox.leave(&id, flush, SHUT_DOWN_WITHIN).await;
            shared.networks.leave(&id).await;
            if let Some(timeline) = timeline {
                timeline.mark(Stage::Gone);
                tracing::debug!(container = id, %timeline, "ended");
            }
        }));
    }

    fn delete(&mut self) {
        self.files.cut();
        let before = self.ending.take();
        let (layout, id, reporter) =
            (self.shared.layout().clone(), self.record.id.clone(), self.reporter.clone());
        // What was made for it goes with it, as `--rm` says.
        let made_for_it =
            self.record.host_config.auto_remove.then(|| (Arc::clone(&self.shared), self.record.clone()));
        tokio::spawn(async move {
            if let Some(before) = before {
                let _ = before.await;
            }
            let deleted =
                tokio::task::spawn_blocking(move || crate::engine::store::delete(&layout, &id)).await;
            if let Some((shared, record)) = made_for_it {
                shared.remove_anonymous(&record).await;
            }
            let _ = reporter
                .send(Report::Deleted(deleted.unwrap_or_else(|e| Err(std::io::Error::other(e)))))
                .await;
        });
    }

    fn gone(&mut self) {
        self.reached(Stage::Removed);
        self.shared.forget(&self.record.id);
        self.tell("destroy", []);
        let outcome = self.outcome();
        for waiter in self.removal_waiters.drain(..) {
            let _ = waiter.send(outcome.clone());
        }
        let error = WaitError { message: "the container was removed".into() };
        for waiter in self.exit_waiters.drain(..) {
            let _ = waiter.send(WaitResponse { error: Some(error.clone()), ..outcome.clone() });
        }
        let stopped = self.stoppers.drain(..).chain(self.killers.drain(..));
        for reply in self.removers.drain(..).chain(stopped) {
            answer(reply, Ok(()));
        }
        for reply in self.starters.drain(..).chain(self.restarters.drain(..)) {
            answer(reply, Err(Error::not_found(format!("No such container: {}", self.record.id))));
        }
    }

    // ---- Record, view, events

    /// A full disk may have room again: until then the state is known to this daemon alone.
    fn save_later(&self, error: &std::io::Error) {
        tracing::error!(container = self.record.id, %error, "a container's state was not saved; it is tried again");
        let reporter = self.reporter.clone();
        tokio::spawn(async move {
            tokio::time::sleep(SAVE_AGAIN).await;
            let _ = reporter.send(Report::Unsaved).await;
        });
    }

    async fn save(&self, record: &Record) -> std::io::Result<()> {
        let (record, path) = (record.clone(), self.shared.layout().container_record(&record.id));
        tokio::task::spawn_blocking(move || record.write(&path))
            .await
            .unwrap_or_else(|e| Err(std::io::Error::other(e)))
    }

    fn reached(&self, stage: Stage) {
        if let Some(timeline) = &self.timeline {
            timeline.mark(stage);
        }
    }

    fn publish(&self) {
        self.view
            .send_replace(View { record: Arc::new(self.record.clone()), workload: self.workload.clone() });
    }

    fn tell<const N: usize>(&self, action: &str, attributes: [(String, String); N]) {
        self.shared.publish(&self.record, action, attributes);
    }
}

/// Whether the step from one life to the next must be on disk: not what a restarted daemon finds out or does
/// again by itself.
fn must_be_kept(old: &Lifecycle, new: &Lifecycle) -> bool {
    match (&old.state, &new.state) {
        (_, State::Starting(_) | State::Removing(_)) => false,
        _ => old != new,
    }
}

/// Answers; a caller who has hung up does not want to know.
fn answer<T>(reply: Reply<T>, result: Result<T>) {
    let _ = reply.send(result);
}
