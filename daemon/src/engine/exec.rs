//! Execs: additional processes in running containers.
//!
//! ```text
//!   create ──▶ Created ── start ──▶ Starting ──▶ Running ── exit, output taken ──▶ Exited
//!                                      └── failed ──────────────────────────────────▲
//! ```
//! They live in memory alone, as Docker's do; an exec that ran when the daemon died runs on, and nobody is
//! connected to it any more.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use bulkhead_agent_api::{Answer, Call, Exit, ProcessState, Stdio, StreamKind};
use oci_spec::runtime::Process;
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinSet,
};

use super::{
    AttachOptions, Attachment, Engine, Error, Name, Output, Result, Shared,
    container::{
        hub::{Hub, Kind},
        names, pump,
        record::Record,
        start::exec_failure_code,
        workload::Workload,
    },
    logs::Stream,
    spec,
};
use crate::{
    api::types::exec::{CreateRequest, Inspect, ProcessConfig, StartRequest},
    sandbox::CallError,
};

/// How long an ended exec can be inspected.
const KEPT: Duration = Duration::from_secs(300);

/// How many execs there may be in one container, ended ones that are still kept included.
const MAX_IN_CONTAINER: usize = 10_000;

struct Exec {
    id: String,
    container: String,
    request: CreateRequest,
    /// Made when it was created, so that what is not valid is told then.
    process: Process,
    hub: Arc<Hub>,
    state: Mutex<State>,
    /// Its exit code, once it has ended and its output was taken.
    ended: watch::Sender<Option<i32>>,
}

#[derive(Debug, Clone, Copy)]
enum State {
    Created,
    Starting,
    Running { pid: i32 },
    Exited { code: i32, at: Instant },
}

impl Exec {
    fn state(&self) -> State {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, state: State) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = state;
        if let State::Exited { code, .. } = state {
            self.ended.send_replace(Some(code));
        }
    }

    /// Claims the one start that an exec has.
    fn claim(&self) -> Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match *state {
            State::Created => {
                *state = State::Starting;
                Ok(())
            }
            State::Starting | State::Running { .. } => {
                Err(Error::conflict(format!("Error: Exec command {} is already running", self.id)))
            }
            State::Exited { .. } => {
                Err(Error::conflict(format!("Error: Exec command {} has already run", self.id)))
            }
        }
    }

    fn command_line(&self) -> String {
        self.request.cmd.iter().flatten().cloned().collect::<Vec<_>>().join(" ")
    }
}

/// All execs.
#[derive(Default)]
pub(crate) struct Execs(Mutex<HashMap<String, Arc<Exec>>>);

impl Execs {
    fn with<R>(&self, f: impl FnOnce(&mut HashMap<String, Arc<Exec>>) -> R) -> R {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn insert(&self, exec: &Arc<Exec>) -> Result<()> {
        self.with(|execs| {
            execs.retain(|_, exec| !matches!(exec.state(), State::Exited { at, .. } if at.elapsed() > KEPT));
            if execs.values().filter(|other| other.container == exec.container).count() >= MAX_IN_CONTAINER {
                return Err(Error::conflict("the container has too many execs"));
            }
            execs.insert(exec.id.clone(), Arc::clone(exec));
            Ok(())
        })
    }

    fn find(&self, id: &str) -> Result<Arc<Exec>> {
        self.with(|execs| execs.get(id).cloned())
            .ok_or_else(|| Error::not_found(format!("No such exec instance: {id}")))
    }

    /// Those that run in a container.
    pub(crate) fn running_in(&self, container: &str) -> Vec<String> {
        self.with(|execs| {
            let running = |exec: &&Arc<Exec>| {
                exec.container == container && matches!(exec.state(), State::Running { .. } | State::Starting)
            };
            execs.values().filter(running).map(|exec| exec.id.clone()).collect()
        })
    }

    /// Forgets all of a container that is removed.
    pub(crate) fn forget(&self, container: &str) {
        self.with(|execs| execs.retain(|_, exec| exec.container != container));
    }
}

impl Engine {
    /// Prepares a process in a running container. Answers its id.
    ///
    /// # Errors
    /// The container does not run; a command that is not valid.
    pub async fn exec_create(&self, container: Name<'_>, request: CreateRequest) -> Result<String> {
        let view = self.shared.registry.find(container)?.view();
        view.awake("exec")?;
        create(&self.shared, &view.record, request).map(|exec| exec.id.clone())
    }

    /// Claims its one start, which the answer then does: the caller may first say that it goes well so far.
    ///
    /// # Errors
    /// It was started before; the container does not run.
    pub fn exec_start(&self, id: &str, request: StartRequest) -> Result<Starting> {
        let exec = self.shared.execs.find(id)?;
        let view = self.shared.registry.find(&exec.container)?.view();
        let workload = Arc::clone(view.awake("exec")?);
        exec.claim()?;
        Ok(Starting { shared: Arc::clone(&self.shared), record: view.record, exec, workload, request })
    }

    /// A user left its terminal with the keys for it.
    pub fn exec_detached(&self, id: &str) {
        let Ok(exec) = self.shared.execs.find(id) else { return };
        if let Ok(container) = self.shared.registry.find(&exec.container) {
            let attributes = [("execID".into(), exec.id.clone())];
            self.shared.publish(&container.view().record, "exec_detach", attributes);
        }
    }

    /// Sets its terminal's size.
    ///
    /// # Errors
    /// It does not run; the agent's.
    pub async fn exec_resize(&self, id: &str, rows: u16, columns: u16) -> Result<()> {
        let exec = self.shared.execs.find(id)?;
        if !matches!(exec.state(), State::Running { .. }) {
            return Err(Error::conflict(format!("exec {id} is not running")));
        }
        let view = self.shared.registry.find(&exec.container)?.view();
        let workload = view.running()?;
        let call = Call::Resize { process: workload.exec(&exec.id), rows, columns };
        let done = workload.sandbox.call(call).await;
        done.map(drop).map_err(|error| Error::internal(error.to_string()))
    }

    /// Everything about it.
    ///
    /// # Errors
    /// No such exec.
    pub async fn exec_inspect(&self, id: &str) -> Result<Inspect> {
        let exec = self.shared.execs.find(id)?;
        let request = &exec.request;
        let mut command = request.cmd.iter().flatten().cloned();
        let (running, exit_code, pid) = match exec.state() {
            State::Created => (false, None, 0),
            State::Starting => (true, None, 0),
            State::Running { pid } => (true, None, pid),
            State::Exited { code, .. } => (false, Some(code.into()), 0),
        };
        Ok(Inspect {
            id: exec.id.clone(),
            running,
            exit_code,
            process_config: ProcessConfig {
                tty: request.tty,
                entrypoint: command.next().unwrap_or_default(),
                arguments: command.collect(),
                privileged: Some(request.privileged),
                user: request.user.clone(),
            },
            open_stdin: request.attach_stdin,
            open_stderr: request.attach_stderr,
            open_stdout: request.attach_stdout,
            can_remove: false,
            container_id: exec.container.clone(),
            detach_keys: request.detach_keys.clone(),
            pid: pid.into(),
        })
    }
}

fn create(shared: &Shared, record: &Record, request: CreateRequest) -> Result<Arc<Exec>> {
    let spec = shared.spec(record, &[])?.spec;
    let process = spec::exec(&spec, &request)?;
    let kind = Kind { terminal: request.tty, stdin: request.attach_stdin, stdin_once: true };
    let exec = Arc::new(Exec {
        id: names::new_id(),
        container: record.id.clone(),
        request,
        process,
        hub: Arc::new(Hub::new(kind)),
        state: Mutex::new(State::Created),
        ended: watch::Sender::new(None),
    });
    let action = format!("exec_create: {}", exec.command_line());
    shared.execs.insert(&exec)?;
    // A container that was removed in the meantime has already forgotten its execs.
    if let Err(error) = shared.registry.find(&record.id) {
        shared.execs.forget(&record.id);
        return Err(error);
    }
    shared.publish(record, &action, [("execID".into(), exec.id.clone())]);
    Ok(exec)
}

/// A start that was claimed and has to be done, whatever becomes of the client.
pub struct Starting {
    shared: Arc<Shared>,
    record: Arc<Record>,
    exec: Arc<Exec>,
    workload: Arc<Workload>,
    request: StartRequest,
}

impl Starting {
    /// Starts the process; None when detached.
    ///
    /// # Errors
    /// The command cannot be executed; the container has ended.
    pub async fn start(self) -> Result<Option<Attachment>> {
        let Self { shared, record, exec, workload, request } = self;
        let action = format!("exec_start: {}", exec.command_line());
        shared.publish(&record, &action, [("execID".into(), exec.id.clone())]);
        let attachment = (!request.detach).then(|| {
            exec.hub.attach(AttachOptions {
                logs: false,
                stream: true,
                stdin: exec.request.attach_stdin,
                stdout: exec.request.attach_stdout,
                stderr: exec.request.attach_stderr,
            })
        });
        let size = request.console_size.or(exec.request.console_size);
        // In a task of its own: a client that hangs up must not leave it half started.
        let started = tokio::spawn(async move {
            let stdio = stdio(&exec, request.detach, size);
            start(shared, record, exec, workload, stdio).await
        });
        started.await.unwrap_or_else(|error| Err(Error::internal(error.to_string())))?;
        Ok(attachment)
    }
}

/// A process that the daemon itself runs in a container.
pub(crate) struct Spawned {
    exec: Arc<Exec>,
    workload: Arc<Workload>,
    /// What it writes, to the end.
    pub(crate) output: mpsc::Receiver<Output>,
}

impl Spawned {
    /// Waits for its end: its exit code.
    pub(crate) async fn exit(&self) -> i32 {
        let mut ended = self.exec.ended.subscribe();
        // The sender is in `self`: it cannot be gone.
        ended.wait_for(Option::is_some).await.ok().and_then(|code| *code).unwrap_or(137)
    }

    /// Kills it.
    pub(crate) async fn kill(&self) {
        let kill = Call::Signal { process: self.workload.exec(&self.exec.id), signal: libc::SIGKILL };
        if let Err(error) = self.workload.sandbox.call(kill).await {
            tracing::debug!(exec = self.exec.id, %error, "an exec was not killed");
        }
    }
}

/// Runs a process in a container, with the events of every exec.
///
/// # Errors
/// It cannot be executed.
pub(crate) async fn spawn(
    shared: &Arc<Shared>,
    record: &Arc<Record>,
    workload: &Arc<Workload>,
    request: CreateRequest,
) -> Result<Spawned> {
    let exec = create(shared, record, request)?;
    exec.claim()?;
    let starting = Starting {
        shared: Arc::clone(shared),
        record: Arc::clone(record),
        exec: Arc::clone(&exec),
        workload: Arc::clone(workload),
        request: StartRequest::default(),
    };
    let attachment = starting.start().await?.ok_or_else(|| Error::internal("an exec has no output"))?;
    Ok(Spawned { exec, workload: Arc::clone(workload), output: attachment.output })
}

fn stdio(exec: &Exec, detach: bool, size: Option<[u32; 2]>) -> Stdio {
    let request = &exec.request;
    let size = size.filter(|_| request.tty).and_then(|[rows, columns]| {
        u16::try_from(rows).ok().zip(u16::try_from(columns).ok()).filter(|size| *size != (0, 0))
    });
    Stdio {
        terminal: request.tty,
        size,
        stdin: request.attach_stdin && !detach,
        // A terminal has but one output, and it is stdout's.
        stdout: (request.attach_stdout || (request.tty && request.attach_stderr)) && !detach,
        stderr: request.attach_stderr && !request.tty && !detach,
    }
}

async fn start(
    shared: Arc<Shared>,
    record: Arc<Record>,
    exec: Arc<Exec>,
    workload: Arc<Workload>,
    stdio: Stdio,
) -> Result<()> {
    let started = begin(&exec, &workload, stdio).await;
    let (exit, outputs, inputs) = match started {
        Ok(started) => started,
        Err((code, error)) => {
            exec.set(State::Exited { code, at: Instant::now() });
            exec.hub.end_run();
            return Err(error);
        }
    };
    tokio::spawn(async move {
        let code = finish(&exec, exit, outputs, inputs).await;
        let attributes = [("execID".into(), exec.id.clone()), ("exitCode".into(), code.to_string())];
        shared.publish(&record, "exec_die", attributes);
        if let Err(error) = workload.sandbox.call(Call::Delete { process: workload.exec(&exec.id) }).await {
            tracing::debug!(exec = exec.id, %error, "an ended exec was not forgotten by the agent");
        }
    });
    Ok(())
}

type Begun = (oneshot::Receiver<Exit>, JoinSet<()>, JoinSet<()>);

async fn begin(exec: &Arc<Exec>, workload: &Arc<Workload>, stdio: Stdio) -> Result<Begun, (i32, Error)> {
    let not_running = || (137, Error::conflict(format!("container {} is not running", exec.container)));
    let exit = workload.expect_exec(&exec.id).ok_or_else(not_running)?;
    let process = workload.exec(&exec.id);
    let call = Call::Exec { process: process.clone(), spec: Box::new(exec.process.clone()), stdio };
    let pid = match workload.sandbox.call(call).await {
        Ok(Answer::Started { pid }) => pid,
        Ok(_) => {
            workload.forget_exec(&exec.id);
            return Err((128, Error::internal(CallError::Unexpected.to_string())));
        }
        Err(error) => {
            workload.forget_exec(&exec.id);
            return Err(match error {
                CallError::Agent(error) => (
                    exec_failure_code(&error),
                    Error::invalid(format!(
                        "OCI runtime exec failed: exec failed: unable to start container process: {}",
                        error.message
                    )),
                ),
                CallError::Gone => not_running(),
                other => (128, Error::internal(other.to_string())),
            });
        }
    };
    exec.set(State::Running { pid });
    let (mut outputs, mut inputs) = (JoinSet::new(), JoinSet::new());
    let connected: std::io::Result<()> = async {
        let streams = [
            (stdio.stdout, StreamKind::Stdout, Stream::Stdout),
            (stdio.stderr, StreamKind::Stderr, Stream::Stderr),
        ];
        for (wanted, kind, stream) in streams {
            if wanted {
                let output = workload.sandbox.output(process.clone(), kind, Some(0)).await?;
                outputs.spawn(pump::output(output, stream, None, Arc::clone(&exec.hub)));
            }
        }
        if stdio.stdin
            && let Some(queue) = exec.hub.take_input()
        {
            let input = workload.sandbox.input(process.clone()).await?;
            let sandbox = Arc::clone(&workload.sandbox);
            inputs.spawn(pump::input(input, queue, move || async move {
                if let Err(error) = sandbox.call(Call::CloseStdin { process }).await {
                    tracing::debug!(%error, "the end of an input was not taken");
                }
            }));
        }
        Ok(())
    }
    .await;
    // A process that is not connected must not run on unseen.
    if let Err(error) = connected {
        let kill = Call::Signal { process: workload.exec(&exec.id), signal: libc::SIGKILL };
        let _ = workload.sandbox.call(kill).await;
        workload.forget_exec(&exec.id);
        return Err((128, Error::internal(format!("the exec's streams: {error}"))));
    }
    Ok((exit, outputs, inputs))
}

/// Waits for the exit and for all output; only then is the exit told and everybody's connection ended.
async fn finish(
    exec: &Exec,
    exit: oneshot::Receiver<Exit>,
    mut outputs: JoinSet<()>,
    mut inputs: JoinSet<()>,
) -> i32 {
    // Without an exit of its own it died with its container.
    let code = exit.await.map_or(137, |exit| exit.code.clamp(0, 255));
    exec.hub.process_ended();
    while outputs.join_next().await.is_some() {}
    inputs.shutdown().await;
    exec.set(State::Exited { code, at: Instant::now() });
    exec.hub.end_run();
    code
}

/// Takes charge of execs that an earlier daemon started: nobody is connected to them any more, so their output
/// is thrown away (lest they stand still), and when they have ended the agent is told to forget them.
pub(crate) fn take_over(workload: &Arc<Workload>, execs: Vec<(String, ProcessState)>) {
    for (id, state) in execs {
        let process = workload.exec(&id);
        let exit = match state {
            ProcessState::Running { .. } => workload.expect_exec(&id),
            ProcessState::Exited(_) => None,
        };
        let workload = Arc::clone(workload);
        tokio::spawn(async move {
            if let Some(exit) = exit {
                let hub = Arc::new(Hub::new(Kind { terminal: false, stdin: false, stdin_once: false }));
                let mut outputs = JoinSet::new();
                for (kind, stream) in
                    [(StreamKind::Stdout, Stream::Stdout), (StreamKind::Stderr, Stream::Stderr)]
                {
                    // It may not have this stream.
                    if let Ok(output) = workload.sandbox.output(process.clone(), kind, None).await {
                        outputs.spawn(pump::output(output, stream, None, Arc::clone(&hub)));
                    }
                }
                let _ = exit.await;
                hub.process_ended();
                while outputs.join_next().await.is_some() {}
            }
            let _ = workload.sandbox.call(Call::Delete { process }).await;
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exec(container: &str, state: State) -> Exec {
        let kind = Kind { terminal: false, stdin: false, stdin_once: true };
        Exec {
            id: names::new_id(),
            container: container.into(),
            request: CreateRequest::default(),
            process: Process::default(),
            hub: Arc::new(Hub::new(kind)),
            state: Mutex::new(state),
            ended: watch::Sender::new(None),
        }
    }

    #[test]
    fn an_exec_starts_once() {
        let exec = exec("c", State::Created);
        exec.claim().unwrap();
        assert!(exec.claim().unwrap_err().message.ends_with("is already running"));
        exec.set(State::Exited { code: 0, at: Instant::now() });
        let error = exec.claim().unwrap_err();
        assert_eq!(error.message, format!("Error: Exec command {} has already run", exec.id));
    }

    #[test]
    fn execs_go_with_their_container() {
        let execs = Execs::default();
        let one = exec("c1", State::Running { pid: 5 });
        let two = exec("c2", State::Exited { code: 3, at: Instant::now() });
        let (one_id, two_id) = (one.id.clone(), two.id.clone());
        execs.insert(&Arc::new(one)).unwrap();
        execs.insert(&Arc::new(two)).unwrap();
        assert_eq!(execs.running_in("c1"), std::slice::from_ref(&one_id));
        assert!(execs.running_in("c2").is_empty());
        execs.forget("c1");
        assert_eq!(execs.find(&one_id).err().unwrap().message, format!("No such exec instance: {one_id}"));
        execs.find(&two_id).unwrap();
    }

    #[test]
    fn a_detached_exec_has_no_streams_and_a_terminal_has_one_output() {
        let mut exec = exec("c", State::Created);
        exec.request = CreateRequest {
            tty: true,
            attach_stdin: true,
            attach_stdout: true,
            attach_stderr: true,
            ..exec.request
        };
        let attached = stdio(&exec, false, Some([24, 80]));
        assert_eq!(
            (attached.stdin, attached.stdout, attached.stderr, attached.size),
            (true, true, false, Some((24, 80)))
        );
        let detached = stdio(&exec, true, None);
        assert_eq!((detached.stdin, detached.stdout, detached.stderr), (false, false, false));
    }
}
