//! The daemon's calls.

use std::{
    rc::Rc,
    time::{Duration, Instant},
};

use bulkhead_agent_api::{AgentError, Answer, Call, Create, ProcessId, Stdio, ToAgent};
use oci_spec::runtime;
use rustix::time::{ClockId, Timespec};

use super::{Asked, Server, control::Epoch};
use crate::{
    child,
    container::{Container, Phase, Process},
    error::{Context, Result, conflict, invalid, not_found},
    network, processes, rootfs,
    spec::{self, Checked},
    sys,
};

/// How long a create waits for its disk.
const DISK_PATIENCE: Duration = Duration::from_secs(30);

/// Besides the kernel's news, and in case they were lost.
const DISK_PERIOD: Duration = Duration::from_millis(500);

/// The most containers of one machine, and the most execs of one container that are not yet deleted.
const MAX_CONTAINERS: usize = 256;
const MAX_EXECS: usize = 4096;

/// A create that waits for its disk.
pub(super) struct PendingCreate {
    epoch: Epoch,
    call: u64,
    create: Box<Create>,
    spec: Checked,
    deadline: Instant,
    next: Instant,
}

impl PendingCreate {
    pub(super) fn next_try(&self) -> Instant {
        self.next
    }

    pub(super) fn look_now(&mut self) {
        self.next = Instant::now();
    }
}

/// What a call comes to at once.
enum Outcome {
    Answer(Answer),
    /// The answer comes later.
    Later,
}

impl Server {
    /// Serves a call; one that asked for a shutdown is handed back.
    pub(super) fn call(&mut self, ToAgent { id, call }: ToAgent) -> Option<Asked> {
        let epoch = self.control.epoch();
        if let Err(error) = self.stillness.admit(epoch, &call) {
            self.control.answer(epoch, id, Err(error));
            return None;
        }
        let outcome = match call {
            Call::Shutdown => return Some((epoch, id)),
            Call::Create(create) => self.create(epoch, id, create),
            Call::Start { container, stdio } => self.start(epoch, id, container, stdio),
            Call::Exec { process, spec, stdio } => self.exec(epoch, id, process, &spec, stdio),
            Call::Pause { container } => self.pause(epoch, id, container).map(|done| match done {
                true => Outcome::Answer(Answer::Done),
                false => Outcome::Later,
            }),
            Call::AwaitMemory { plugged_mib } => {
                self.await_memory(epoch, id, plugged_mib).map(|done| match done {
                    true => Outcome::Answer(Answer::Done),
                    false => Outcome::Later,
                })
            }
            Call::Personalize(identity) => self.personalize(epoch, &identity).map(Outcome::Answer),
            Call::Quiesce => self.quiesce(epoch).map(Outcome::Answer),
            Call::Thaw => self.thaw().map(Outcome::Answer),
            call => self.simple(call).map(Outcome::Answer),
        };
        match outcome {
            Ok(Outcome::Answer(answer)) => self.control.answer(epoch, id, Ok(answer)),
            Ok(Outcome::Later) => {}
            Err(error) => self.control.answer(epoch, id, Err(error)),
        }
        None
    }

    fn simple(&mut self, call: Call) -> Result<Answer> {
        match call {
            Call::Signal { process, signal } => {
                let process = self.running(&process)?;
                sys::pidfd_send_signal(&process.pidfd, signal).map_err(|error| {
                    match error.raw_os_error() {
                        Some(libc::ESRCH) => ended(),
                        _ => invalid(format!("signal {signal}: {error}")),
                    }
                })?;
            }
            Call::Resize { process, rows, columns } => {
                let process = self.running(&process)?;
                let terminal =
                    process.terminal.as_ref().ok_or_else(|| conflict("the process has no terminal"))?;
                rustix::termios::tcsetwinsize(terminal, child::terminal_size(rows, columns))
                    .context("resize")?;
            }
            Call::CloseStdin { process } => {
                let process = self.find(&process).ok_or_else(no_process)?;
                if let Some(input) = &mut process.input {
                    input.close();
                }
            }
            Call::State => {
                let containers = self.containers.iter().map(|(id, container)| container.state(id)).collect();
                return Ok(Answer::State { containers });
            }
            Call::Processes { container } => {
                let container = self.containers.get(&container).ok_or_else(no_container)?;
                return Ok(Answer::Processes { processes: processes::list(&container.cgroup.pids()) });
            }
            Call::Resume { container } => self.resume(&container)?,
            Call::Update { container, resources } => {
                let container = self.containers.get(&container).ok_or_else(no_container)?;
                container.cgroup.update(&resources)?;
            }
            Call::NetworkConnect(interface) => network::connect(&interface)?,
            Call::NetworkDisconnect { mac } => network::disconnect(mac)?,
            Call::NetworkRoutes { gateways } => network::set_routes(&gateways)?,
            Call::NetworkFiles { container, files } => {
                self.containers.get(&container).ok_or_else(no_container)?.rewrite(&files)?;
            }
            Call::Stats { container } => {
                let container = self.containers.get(&container).ok_or_else(no_container)?;
                let init = container.init.as_ref().map(|init| init.pid);
                return Ok(Answer::Stats(Box::new(container.cgroup.stats(init))));
            }
            Call::Reclaim { container, percent } => {
                let container = self.containers.get(&container).ok_or_else(no_container)?;
                return Ok(Answer::Reclaimed { bytes: container.cgroup.reclaim(percent)? });
            }
            Call::Delete { process } => self.delete(&process)?,
            Call::SetClock { unix_ns } => set_clock(unix_ns)?,
            Call::AwaitMemory { .. }
            | Call::Create(_)
            | Call::Start { .. }
            | Call::Exec { .. }
            | Call::Pause { .. }
            | Call::Shutdown
            | Call::Personalize(_)
            | Call::Quiesce
            | Call::Thaw => {
                return Err(invalid("this call is not a simple one"));
            }
        }
        Ok(Answer::Done)
    }

    fn running(&mut self, id: &ProcessId) -> Result<&mut Process> {
        let process = self.find(id).ok_or_else(no_process)?;
        if matches!(process.phase, Phase::Exited(_)) { Err(ended()) } else { Ok(process) }
    }

    fn create(&mut self, epoch: Epoch, call: u64, create: Box<Create>) -> Result<Outcome> {
        rootfs::validate(&create)?;
        let id = &create.container;
        if self.containers.contains_key(id)
            || self.pending.iter().any(|pending| pending.create.container == *id)
        {
            return Err(conflict(format!("the container {id} exists already")));
        }
        if self.containers.len() + self.pending.len() >= MAX_CONTAINERS {
            return Err(conflict("too many containers"));
        }
        let spec = Checked::new(runtime::Spec::clone(&create.spec))?;
        let now = Instant::now();
        self.pending.push(PendingCreate {
            epoch,
            call,
            create,
            spec,
            deadline: now + DISK_PATIENCE,
            next: now,
        });
        self.retry_creates();
        Ok(Outcome::Later)
    }

    /// Looks for the disks of creates whose time it is.
    pub(super) fn retry_creates(&mut self) {
        let now = Instant::now();
        for mut pending in std::mem::take(&mut self.pending) {
            if pending.next > now {
                self.pending.push(pending);
                continue;
            }
            match rootfs::find_disks(&pending.create) {
                Err(why) if now >= pending.deadline => {
                    self.control.answer(pending.epoch, pending.call, Err(not_found(why)));
                }
                Err(_) => {
                    pending.next = now + DISK_PERIOD;
                    self.pending.push(pending);
                }
                Ok(devices) => {
                    let PendingCreate { epoch, call, create, spec, .. } = pending;
                    let made = Container::create(&self.poller, &create, spec, &devices);
                    let result = made.map(|container| {
                        self.containers.insert(create.container, container);
                        Answer::Done
                    });
                    self.control.answer(epoch, call, result);
                }
            }
        }
    }

    fn start(&mut self, epoch: Epoch, call: u64, id: String, stdio: Stdio) -> Result<Outcome> {
        let container = self.containers.get_mut(&id).ok_or_else(no_container)?;
        if container.init.is_some() {
            return Err(conflict("the container was started already"));
        }
        let id = Rc::new(ProcessId { container: id, exec: None });
        let pid = container.start(&self.poller, &id, stdio)?;
        self.started(epoch, call, pid, id)
    }

    fn exec(
        &mut self,
        epoch: Epoch,
        call: u64,
        id: ProcessId,
        process: &runtime::Process,
        stdio: Stdio,
    ) -> Result<Outcome> {
        let container = self.containers.get_mut(&id.container).ok_or_else(no_container)?;
        let exec = id.exec.as_ref().ok_or_else(|| invalid("an exec needs an id"))?;
        if !container.init.as_ref().is_some_and(|init| matches!(init.phase, Phase::Running)) {
            return Err(conflict("the container is not running"));
        }
        if container.paused {
            // It would be born frozen, and its start never answered.
            return Err(conflict("the container is paused"));
        }
        if container.execs.contains_key(exec) {
            return Err(conflict(format!("the exec {exec} exists already")));
        }
        if container.execs.len() >= MAX_EXECS {
            return Err(conflict("too many execs"));
        }
        spec::check_process(process)?;
        let id = Rc::new(id);
        let pid = container.exec(&self.poller, &id, process, stdio)?;
        self.started(epoch, call, pid, id)
    }

    fn started(&mut self, epoch: Epoch, call: u64, pid: i32, id: Rc<ProcessId>) -> Result<Outcome> {
        self.pids.insert(pid, id);
        self.starts.insert(pid, (epoch, call));
        Ok(Outcome::Later)
    }

    fn delete(&mut self, id: &ProcessId) -> Result<()> {
        let container = self.containers.get_mut(&id.container).ok_or_else(no_container)?;
        let gone = |process: &Process| matches!(process.phase, Phase::Exited(_));
        match &id.exec {
            Some(exec) => {
                let process = container.execs.get(exec).ok_or_else(no_process)?;
                if !gone(process) {
                    return Err(conflict("the exec is still running"));
                }
                container.execs.remove(exec);
                Ok(())
            }
            None => {
                if container.init.as_ref().is_some_and(|init| !gone(init)) {
                    return Err(conflict("the container is still running"));
                }
                self.empty(&id.container);
                let Some(container) = self.containers.remove(&id.container) else { return Ok(()) };
                self.pids.retain(|_, process| process.container != id.container);
                container.destroy()
            }
        }
    }
}

pub(super) fn set_clock(unix_ns: u64) -> Result<()> {
    let seconds = i64::try_from(unix_ns / 1_000_000_000).map_err(|_| invalid("the time is too late"))?;
    let nanoseconds = (unix_ns % 1_000_000_000) as i64;
    let time = Timespec { tv_sec: seconds, tv_nsec: nanoseconds };
    rustix::time::clock_settime(ClockId::Realtime, time).context("set the clock")
}

pub(super) fn no_container() -> AgentError {
    not_found("there is no such container")
}

fn no_process() -> AgentError {
    not_found("there is no such process")
}

fn ended() -> AgentError {
    not_found("the process has ended")
}
