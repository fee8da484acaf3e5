//! A running container: its sandbox, and the task that watches over it until it is over.
//!
//! ```text
//!   agent ── Exited{init} ─────────────┐
//!   output streams ── both ended ──────┴─▶ over: Exit
//!   the VMM's pidfd ── dead ──▶ (137 and the reason, unless the exit was told before)
//!   agent ── Exited{exec} ──▶ whoever waits for that exec
//! ```
//! An exit is told only when all output was taken, so nobody who waits for it can miss any.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::Duration,
};

use bulkhead_agent_api::{Answer, Call, Event, Exit as AgentExit, ProcessId};
use jiff::Timestamp;
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinSet,
};

use super::{hub::Hub, state::Exit};
use crate::{
    engine::{Error, Result, logs::Log, mounts::sockets::Forwards, network::resolver::Resolver},
    phases::{Stage, Timeline},
    sandbox::{CallError, Death, Sandbox},
};

/// How long a sandbox whose agent has hung up may take to end, before it is killed.
const DIE_WITHIN: Duration = Duration::from_secs(10);

/// How long the events of a dead sandbox may take to come to their end.
const LAST_WORDS_WITHIN: Duration = Duration::from_secs(2);

/// How long the agent may take to freeze a container; longer than it gives itself.
const PAUSE_WITHIN: Duration = Duration::from_secs(15);

/// How long the agent may take to deliver a signal.
const SIGNAL_WITHIN: Duration = Duration::from_secs(10);

/// A running container's sandbox.
pub(crate) struct Workload {
    pub(crate) sandbox: Arc<Sandbox>,
    pub(crate) log: Arc<Log>,
    /// The container's name in its guest: its id, unless it is a clone.
    container: String,
    /// Held while its machine is being saved.
    pub(crate) saving: tokio::sync::Mutex<()>,
    /// Who waits for which exec's end. None when the workload is over.
    execs: Mutex<Option<HashMap<String, oneshot::Sender<AgentExit>>>>,
    /// Whether the first process has ended, output or not.
    exited: watch::Sender<bool>,
    /// How the sandbox ended before the first process did.
    death: OnceLock<Death>,
}

/// What belongs to a workload's watch and is not shared.
pub(crate) struct Watch {
    /// The agent's events.
    pub(crate) events: mpsc::Receiver<Event>,
    /// The output streams' pumps.
    pub(crate) outputs: JoinSet<()>,
    /// The input stream's.
    pub(crate) inputs: JoinSet<()>,
    /// An exit that is known already, of a container that was adopted.
    pub(crate) exit: Option<AgentExit>,
    /// Answers its name queries.
    pub(crate) resolver: Option<Resolver>,
    /// The sockets of the host that it reaches.
    pub(crate) forwards: Forwards,
    /// Where the stages of the end are marked.
    pub(crate) timeline: Option<Arc<Timeline>>,
}

impl Workload {
    /// `guest` is the container's name in its guest.
    pub(crate) fn new(sandbox: Arc<Sandbox>, log: Arc<Log>, guest: &str) -> Self {
        Self {
            sandbox,
            log,
            container: guest.to_owned(),
            saving: tokio::sync::Mutex::default(),
            execs: Mutex::new(Some(HashMap::new())),
            exited: watch::Sender::new(false),
            death: OnceLock::new(),
        }
    }

    /// How the sandbox ended, if that was the container's end and not in order.
    pub(crate) fn death(&self) -> Option<&Death> {
        self.death.get().filter(|death| !death.in_order())
    }

    fn execs<R>(&self, f: impl FnOnce(&mut Option<HashMap<String, oneshot::Sender<AgentExit>>>) -> R) -> R {
        f(&mut self.execs.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Registers for an exec's end; to be called before the exec is started. It resolves to an error when the
    /// container ends first. None when it has ended already.
    pub(crate) fn expect_exec(&self, id: &str) -> Option<oneshot::Receiver<AgentExit>> {
        let (sender, receiver) = oneshot::channel();
        self.execs(|execs| execs.as_mut()?.insert(id.to_owned(), sender).is_none().then_some(receiver))
    }

    /// Takes a registration back.
    pub(crate) fn forget_exec(&self, id: &str) {
        self.execs(|execs| execs.as_mut().and_then(|execs| execs.remove(id)));
    }

    /// The container's name in its guest.
    pub(crate) fn guest(&self) -> &str {
        &self.container
    }

    /// An exec.
    pub(crate) fn exec(&self, id: &str) -> ProcessId {
        ProcessId { container: self.container.clone(), exec: Some(id.to_owned()) }
    }

    /// The first process.
    pub(crate) fn init(&self) -> ProcessId {
        ProcessId { container: self.container.clone(), exec: None }
    }

    /// Sends the first process a signal. One that has ended already is no error.
    ///
    /// # Errors
    /// The agent refuses or does not answer.
    pub(crate) async fn signal(&self, signal: i32) -> Result<()> {
        let call = self.sandbox.call(Call::Signal { process: self.init(), signal });
        match tokio::time::timeout(SIGNAL_WITHIN, call).await {
            Ok(Ok(_)) | Ok(Err(CallError::Gone)) => Ok(()),
            Ok(Err(CallError::Agent(error))) if error.kind == bulkhead_agent_api::ErrorKind::NotFound => {
                Ok(())
            }
            Ok(Err(error)) => Err(Error::internal(format!("the signal was not delivered: {error}"))),
            Err(_) => Err(Error::internal("the guest does not answer")),
        }
    }

    /// Freezes every process, or lets them run on; returns when it is so.
    ///
    /// # Errors
    /// The agent refuses or does not answer.
    pub(crate) async fn set_paused(&self, paused: bool) -> Result<()> {
        let container = self.container.clone();
        let call = if paused { Call::Pause { container } } else { Call::Resume { container } };
        match tokio::time::timeout(PAUSE_WITHIN, self.sandbox.call(call)).await {
            Ok(answer) => answer.map(drop).map_err(|error| Error::internal(error.to_string())),
            Err(_) => Err(Error::internal("the guest does not answer")),
        }
    }

    /// Resolves when the first process has ended.
    pub(crate) async fn exited(&self) {
        // The sender is in `self`: it cannot be gone.
        let _ = self.exited.subscribe().wait_for(|exited| *exited).await;
    }

    /// Watches until it is over, and answers how it ended. All output is delivered then; whoever records the
    /// end calls [`Hub::end_run`].
    pub(crate) async fn watch(&self, mut watch: Watch, hub: &Hub, mut oom: impl FnMut()) -> Exit {
        // It ends with the run.
        let (_resolver, _forwards) = (watch.resolver.take(), std::mem::take(&mut watch.forwards));
        let mut exit = watch.exit;
        let reached = |stage| watch.timeline.iter().for_each(|timeline| timeline.mark(stage));
        if exit.is_some() {
            self.process_ended(hub);
        }
        let death = loop {
            tokio::select! {
                event = watch.events.recv() => match event {
                    Some(event) => {
                        self.take(event, &mut exit, hub, &mut oom);
                        if exit.is_some() {
                            reached(Stage::Exited);
                        }
                    }
                    None => break Some(self.die().await),
                },
                _ = watch.outputs.join_next(), if exit.is_some() && !watch.outputs.is_empty() => {}
                death = self.sandbox.ended() => break Some(death),
                () = std::future::ready(()), if exit.is_some() && watch.outputs.is_empty() => break None,
            }
        };
        if death.is_some() {
            // What the agent said before the end counts: the last of it may lie behind the news of the death.
            let rest = async {
                while let Some(event) = watch.events.recv().await {
                    self.take(event, &mut exit, hub, &mut oom);
                }
            };
            let _ = tokio::time::timeout(LAST_WORDS_WITHIN, rest).await;
        }
        self.process_ended(hub);
        // Of a dead sandbox the streams end at once; what they still hold is taken.
        while watch.outputs.join_next().await.is_some() {}
        if let Err(error) = self.log.finish(Timestamp::now()) {
            tracing::error!(container = self.container, %error, "the end of a log could not be written");
        }
        reached(Stage::Drained);
        watch.inputs.shutdown().await;
        self.execs(Option::take);
        if let (None, Some(death)) = (&exit, &death) {
            let _ = self.death.set(death.clone());
        }
        conclude(exit, death)
    }

    /// Takes one of the agent's events.
    fn take(&self, event: Event, exit: &mut Option<AgentExit>, hub: &Hub, oom: &mut impl FnMut()) {
        match event {
            Event::Exited { process, exit: how } if process.container == self.container => {
                match process.exec {
                    None => {
                        exit.get_or_insert(how);
                        self.process_ended(hub);
                    }
                    Some(exec) => {
                        let waiter = self.execs(|execs| execs.as_mut()?.remove(&exec));
                        if let Some(waiter) = waiter {
                            let _ = waiter.send(how);
                        }
                    }
                }
            }
            Event::Oom { container } if container == self.container => oom(),
            // Of a container that is not ours: a guest may say what it likes.
            _ => {}
        }
    }

    fn process_ended(&self, hub: &Hub) {
        hub.process_ended();
        self.exited.send_replace(true);
    }

    /// The agent has hung up, which it does when the guest goes down: the VMM follows or is made to.
    async fn die(&self) -> Death {
        match tokio::time::timeout(DIE_WITHIN, self.sandbox.ended()).await {
            Ok(death) => death,
            Err(_) => {
                self.sandbox.kill();
                self.sandbox.ended().await
            }
        }
    }

    /// The container's processes, as the agent sees them.
    ///
    /// # Errors
    /// The agent refuses or is gone.
    pub(crate) async fn processes(&self) -> Result<Vec<bulkhead_agent_api::ProcessInfo>> {
        match self.sandbox.call(Call::Processes { container: self.container.clone() }).await {
            Ok(Answer::Processes { processes }) => Ok(processes),
            Ok(_) => Err(Error::internal(CallError::Unexpected.to_string())),
            Err(error) => Err(Error::internal(error.to_string())),
        }
    }
}

fn conclude(exit: Option<AgentExit>, death: Option<Death>) -> Exit {
    let now = Timestamp::now();
    match (exit, death) {
        (Some(exit), _) => Exit {
            code: exit.code.clamp(0, 255),
            oom_killed: exit.oom_killed,
            error: String::new(),
            // The guest's clock is the guest's: a time in the future is not believed.
            at: Timestamp::from_nanosecond(exit.unix_ns.into()).map_or(now, |at| at.min(now)),
        },
        (None, death) => {
            let error = death.map_or_else(|| "the microVM ended".to_owned(), |death| death.to_string());
            Exit { code: 137, oom_killed: false, error, at: now }
        }
    }
}

/// Stops a workload: the signal, its grace, then SIGKILL. Returns when its first process has ended, or when
/// its whole sandbox was killed because even SIGKILL brought no end. One that was paused runs on once the signal
/// waits for it.
pub(crate) async fn stop(workload: &Workload, signal: i32, grace: Option<Duration>, paused: bool) {
    if let Err(error) = workload.signal(signal).await {
        tracing::warn!(container = workload.container, %error, "a stop signal was not delivered");
    }
    if paused && let Err(error) = workload.set_paused(false).await {
        tracing::warn!(container = workload.container, %error, "a paused container was not resumed");
    }
    match grace {
        None => workload.exited().await,
        Some(grace) => {
            if tokio::time::timeout(grace, workload.exited()).await.is_err() {
                kill(workload).await;
            }
        }
    }
}

/// Kills a workload.
pub(crate) async fn kill(workload: &Workload) {
    let delivered = workload.signal(libc::SIGKILL).await;
    if delivered.is_err() || tokio::time::timeout(DIE_WITHIN, workload.exited()).await.is_err() {
        tracing::warn!(container = workload.container, "SIGKILL brought no end: the sandbox is killed");
        workload.sandbox.kill();
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_agent_api::{FromAgent, StreamKind};
    use tokio::io::AsyncWriteExt;

    use super::*;
    use crate::{
        engine::{
            AttachOptions,
            container::{hub::Kind, pump},
            logs::Stream,
        },
        sandbox::fake::{FakeAgent, FakeMachine},
    };

    struct Bench {
        base: tempfile::TempDir,
        machine: FakeMachine,
        agent: FakeAgent,
        workload: Arc<Workload>,
        hub: Arc<Hub>,
        watch: Watch,
        /// The guest's end of stdout.
        stdout: tokio::net::UnixStream,
    }

    /// A container `c` with a stdout.
    async fn bench() -> Bench {
        let base = tempfile::tempdir().unwrap();
        let machine = FakeMachine::start(base.path(), "s1");
        let (sandbox, events, agent) = machine.adopted(base.path(), "s1").await;
        let (log, _) =
            Log::begin(&crate::engine::logs::Settings::plain("json-file"), &base.path().join("log")).unwrap();
        let workload = Arc::new(Workload::new(Arc::new(sandbox), Arc::new(log), "c"));
        let hub = Arc::new(Hub::new(Kind { terminal: false, stdin: false, stdin_once: false }));
        let opened = workload.sandbox.output(workload.init(), StreamKind::Stdout, Some(0));
        let (output, (_, stdout)) = tokio::join!(opened, machine.stream());
        let mut outputs = JoinSet::new();
        let log = Some(Arc::clone(&workload.log));
        outputs.spawn(pump::output(output.unwrap(), Stream::Stdout, log, Arc::clone(&hub)));
        let (inputs, forwards) = (JoinSet::new(), Forwards::default());
        let watch = Watch { events, outputs, inputs, exit: None, timeline: None, resolver: None, forwards };
        Bench { base, machine, agent, workload, hub, watch, stdout }
    }

    fn exited(exec: Option<&str>, code: i32) -> FromAgent {
        let process = ProcessId { container: "c".into(), exec: exec.map(str::to_owned) };
        FromAgent::Event(Event::Exited { process, exit: AgentExit { code, oom_killed: false, unix_ns: 7 } })
    }

    #[tokio::test]
    async fn an_exit_is_told_only_when_its_output_was_taken() {
        let Bench { mut agent, workload, hub, watch, mut stdout, machine: _machine, base: _base } =
            bench().await;
        let both = AttachOptions { stream: true, stdout: true, stderr: true, ..AttachOptions::default() };
        let mut client = hub.attach(both);
        let mut over = Box::pin(workload.watch(watch, &hub, || {}));
        agent.send(&exited(None, 7)).await;
        tokio::select! {
            biased;
            _ = &mut over => panic!("there is output still to come"),
            () = workload.exited() => {}
        }
        stdout.write_all(b"last words").await.unwrap();
        drop(stdout);
        let exit = over.await;
        assert_eq!((exit.code, exit.error.as_str(), exit.at.as_nanosecond()), (7, "", 7));
        assert_eq!(client.output.recv().await.unwrap().bytes, "last words");
        hub.end_run();
        assert!(client.output.recv().await.is_none());
    }

    #[tokio::test]
    async fn a_dead_vmm_is_137_with_its_reason() {
        let Bench { base, mut machine, agent, workload, hub, watch, stdout } = bench().await;
        let report =
            r#"{"reason":{"kind":"guest_panic","message":"Kernel panic"},"console":"","uptime_us":1}"#;
        std::fs::write(base.path().join("s1/report.json"), report).unwrap();
        let exec = workload.expect_exec("e1").unwrap();
        machine.process.kill().unwrap();
        drop((agent, stdout));
        let exit = workload.watch(watch, &hub, || {}).await;
        assert_eq!(exit.code, 137);
        assert!(exit.error.contains("Kernel panic"), "{}", exit.error);
        assert!(exec.await.is_err(), "an exec goes with its container");
        assert!(workload.expect_exec("e2").is_none());
    }

    #[tokio::test]
    async fn an_exit_that_was_told_before_the_vmm_died_is_not_lost() {
        let Bench { agent: _agent, mut machine, workload, hub, mut watch, stdout, base: _base } =
            bench().await;
        // It is still on its way when the death is seen.
        let (late, events) = mpsc::channel(1);
        watch.events = events;
        machine.process.kill().unwrap();
        workload.sandbox.ended().await;
        drop(stdout);
        let mut over = Box::pin(workload.watch(watch, &hub, || {}));
        assert!(futures_util::poll!(&mut over).is_pending());
        let process = workload.init();
        let exit = AgentExit { code: 7, oom_killed: false, unix_ns: 7 };
        late.send(Event::Exited { process, exit }).await.unwrap();
        drop(late);
        assert_eq!(over.await.code, 7);
    }

    #[tokio::test]
    async fn events_reach_execs_and_those_of_strangers_nobody() {
        let Bench { mut agent, workload, hub, watch, stdout, machine: _machine, base: _base } = bench().await;
        let exec = workload.expect_exec("e1").unwrap();
        let stranger = ProcessId { container: "other".into(), exec: None };
        let exit = AgentExit { code: 1, oom_killed: false, unix_ns: 0 };
        agent.send(&FromAgent::Event(Event::Exited { process: stranger, exit })).await;
        agent.send(&exited(Some("nosuch"), 2)).await;
        agent.send(&exited(Some("e1"), 3)).await;
        agent.send(&FromAgent::Event(Event::Oom { container: "c".into() })).await;
        agent.send(&exited(None, 4)).await;
        drop(stdout);
        let mut ooms = 0;
        let exit = workload.watch(watch, &hub, || ooms += 1).await;
        assert_eq!((exit.code, exec.await.unwrap().code, ooms), (4, 3, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn an_agent_that_hangs_up_takes_its_vmm_along() {
        let Bench { agent, workload, hub, watch, stdout, machine: _machine, base: _base } = bench().await;
        drop((agent, stdout));
        let exit = workload.watch(watch, &hub, || {}).await;
        assert_eq!(exit.code, 137);
    }

    #[tokio::test]
    async fn stop_signals_waits_and_then_kills() {
        let Bench { mut agent, workload, hub, watch, stdout, machine: _machine, base: _base } = bench().await;
        let over = tokio::spawn({
            let workload = Arc::clone(&workload);
            async move { workload.watch(watch, &hub, || {}).await }
        });
        let stopping = tokio::spawn({
            let workload = Arc::clone(&workload);
            async move { stop(&workload, 15, Some(Duration::from_millis(1)), false).await }
        });
        for expected in [15, 9] {
            let call = agent.next_call().await.unwrap();
            assert_eq!(call.call, Call::Signal { process: workload.init(), signal: expected });
            agent.answer(call.id, Ok(Answer::Done)).await;
        }
        agent.send(&exited(None, 137)).await;
        stopping.await.unwrap();
        drop(stdout);
        assert_eq!(over.await.unwrap().code, 137);
    }
}
