//! The agent's one loop: everything happens here, one thing after the other.
//!
//! ```text
//!   epoll ─┬─ SIGCHLD ───────▶ reap: the only place that waits for children
//!          ├─ later daemons ─▶ control
//!          ├─ control ───────▶ calls ──▶ answers, at once or when a start or a disk has come
//!          ├─ listeners ─────▶ openings ──▶ a stream of a process, or a transfer of files: a child
//!          ├─ start channels ▶ Started or an error
//!          ├─ stdio, streams ▶ bytes
//!          ├─ memory.events ─▶ Oom
//!          ├─ names ─────────▶ questions and answers of the resolver
//!          └─ uevents ───────▶ a disk may have come
//! ```
//!
//! With one thread and one loop there is no moment in which a child has ended and nobody knows it: a
//! process is in the table before the loop can see its end.

mod calls;
mod control;
mod growth;
mod openings;
mod pause;
mod saving;
mod shutdown;
mod transfers;

pub use shutdown::power_off;

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd, OwnedFd},
    rc::Rc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use bulkhead_agent_api::{Answer, Event, Exit, Hello, ProcessId, StreamKind, VERSION};
use nix::sys::{
    signal::{SigSet, SigmaskHow, Signal, sigprocmask},
    signalfd::{SfdFlags, SignalFd},
};
use rustix::{
    net::{AddressFamily, SocketFlags, SocketType, netlink},
    process::{WaitOptions, WaitStatus},
};

use self::{
    calls::PendingCreate,
    control::{Control, Epoch},
    growth::Growth,
    openings::{Openings, Port},
    pause::Freeze,
    saving::Stillness,
    transfers::Transfers,
};
use crate::{
    child::status::{self, Message},
    container::{Container, Phase, Process},
    error::internal,
    log,
    names::Names,
    poll::{Poller, Ready, Watched},
    stdio::{TURN, input::Input},
    transport::Transport,
};

/// How soon a container whose last processes are being killed is looked at again.
const DYING: Duration = Duration::from_millis(2);

/// Children that are waited for in one round: a container without a pid namespace of its own can orphan them
/// to us as fast as we reap.
const REAPED: usize = 512;

/// Whom an event of epoll is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Key {
    /// The signal descriptor.
    Signals,
    /// The listening socket for streams.
    Listener,
    /// The listening socket for transfers of files.
    FilesListener,
    /// The control connection.
    Control,
    /// The listening socket for later daemons.
    Daemons,
    /// The kernel's news of devices.
    Uevents,
    /// A stream connection whose first frame has not yet come.
    Opening(u64),
    /// The channel of a process that is being started.
    Start(Rc<ProcessId>),
    /// A process's side of a stream.
    Source(Rc<ProcessId>, StreamKind),
    /// The daemon's side of a stream.
    Stream(Rc<ProcessId>, StreamKind),
    /// A container's memory.events.
    Memory(Rc<str>),
    /// The listening socket for the daemon's name queries.
    NamesListener,
    /// The daemon's connection for them.
    NamesLink,
    /// The resolver's socket for datagrams.
    NamesUdp,
    /// The resolver's listening socket.
    NamesTcp,
    /// A program's connection to the resolver.
    NamesClient(u64),
}

/// A call that is to be answered later: on which connection, and its number.
type Asked = (Epoch, u64);

/// The agent.
pub struct Server {
    poller: Rc<Poller<Key>>,
    transport: Box<dyn Transport>,
    signals: Watched<Key>,
    listener: Watched<Key>,
    files_listener: Watched<Key>,
    daemons: Watched<Key>,
    uevents: Option<Watched<Key>>,
    control: Control,
    openings: Openings,
    names: Names,
    transfers: Transfers,
    stillness: Stillness,
    /// From before the first container on, in a template; see [`cgroup::prepare_programs`].
    programs: Option<OwnedFd>,
    containers: BTreeMap<String, Container>,
    /// Creates that wait for their disk.
    pending: Vec<PendingCreate>,
    growth: Growth,
    starts: BTreeMap<i32, Asked>,
    /// Every process that has not been reaped.
    pids: BTreeMap<i32, Rc<ProcessId>>,
    /// Children may be left to be waited for: the last round has ended with its turn.
    unreaped: bool,
    /// First processes that have ended before all others of their container.
    dying: Vec<(Rc<ProcessId>, i32)>,
    /// Pauses whose containers do not yet stand still.
    freezing: Vec<Freeze>,
    scratch: Vec<u8>,
}

impl Server {
    /// Takes over signals and begins to listen. `started_us` is the uptime when `main` began.
    ///
    /// # Errors
    /// When the kernel lacks something that is needed.
    pub fn new(transport: Box<dyn Transport>, started_us: u64) -> io::Result<Self> {
        let poller = Poller::new()?;
        let mut set = SigSet::empty();
        set.add(Signal::SIGCHLD);
        sigprocmask(SigmaskHow::SIG_BLOCK, Some(&set), None)?;
        let signals = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        let signals = poller.watch(signals.as_fd().try_clone_to_owned()?, Key::Signals);
        signals.want(true, false)?;
        let listener = poller.watch(transport.listen()?, Key::Listener);
        listener.want(true, false)?;
        let files_listener = poller.watch(transport.listen_for_files()?, Key::FilesListener);
        files_listener.want(true, false)?;
        let daemons = poller.watch(transport.listen_for_control()?, Key::Daemons);
        daemons.want(true, false)?;
        let uevents = watch_uevents(&poller)
            .inspect_err(|error| log::warn(format_args!("no news of devices: {error}")))
            .ok();
        let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
        let hello = Hello { version: VERSION, kernel, started_us };
        Ok(Self {
            control: Control::new(Rc::clone(&poller), hello),
            openings: Openings::new(Rc::clone(&poller)),
            names: Names::new(Rc::clone(&poller), transport.listen_for_names()?)?,
            transfers: Transfers::default(),
            stillness: Stillness::default(),
            programs: None,
            poller,
            transport,
            signals,
            listener,
            files_listener,
            daemons,
            uevents,
            containers: BTreeMap::new(),
            pending: Vec::new(),
            growth: Growth::new(),
            starts: BTreeMap::new(),
            pids: BTreeMap::new(),
            unreaped: false,
            dying: Vec::new(),
            freezing: Vec::new(),
            scratch: vec![0; TURN],
        })
    }

    /// Serves until the machine is told to shut down.
    ///
    /// # Errors
    /// When epoll fails.
    pub fn run(mut self) -> io::Result<()> {
        loop {
            self.control.tick(self.transport.as_ref());
            self.retry_creates();
            self.look_at_memory();
            if self.unreaped {
                self.wait_for_children();
            }
            self.bury();
            self.look_at_frozen();
            for ready in self.poller.wait(self.timeout())? {
                if let Some(asked) = self.handle(ready) {
                    self.shut_down(asked);
                    return Ok(());
                }
            }
        }
    }

    fn timeout(&self) -> Option<Duration> {
        if self.unreaped {
            return Some(Duration::ZERO);
        }
        let now = Instant::now();
        let dying = (!self.dying.is_empty()).then(|| now + DYING);
        let freezing = (!self.freezing.is_empty()).then(|| now + pause::STEP);
        let growing = self.growth.awaited().then(|| now + growth::STEP);
        let pending = self.pending.iter().map(PendingCreate::next_try).min();
        let next =
            [self.control.deadline(), dying, freezing, growing, pending].into_iter().flatten().min()?;
        Some(next.saturating_duration_since(now))
    }

    /// Serves one event; a call in it that asked for a shutdown is handed back.
    fn handle(&mut self, ready: Ready<Key>) -> Option<Asked> {
        match ready.key {
            Key::Signals => self.reap(),
            Key::Listener => {
                self.openings.accept(&self.listener, Port::Streams, self.transport.as_ref());
            }
            Key::FilesListener => {
                self.openings.accept(&self.files_listener, Port::Files, self.transport.as_ref());
            }
            Key::Control => {
                let calls = self.control.ready(ready.readable, &mut self.scratch);
                return calls.into_iter().find_map(|call| self.call(call));
            }
            Key::Daemons => self.control.accept(&self.daemons, self.transport.as_ref()),
            Key::Uevents => self.drain_uevents(),
            Key::Opening(number) => self.opening_ready(number),
            Key::Start(id) => self.start_news(&id),
            Key::Source(id, kind) => self.source_ready(&id, kind),
            Key::Stream(id, kind) => self.stream_ready(&id, kind, ready.readable),
            Key::Memory(container) => self.memory_news(&container),
            Key::NamesListener => self.names.accept_daemon(self.transport.as_ref()),
            Key::NamesLink => self.names.link_ready(&mut self.scratch),
            Key::NamesUdp => self.names.udp_ready(&mut self.scratch),
            Key::NamesTcp => self.names.tcp_ready(),
            Key::NamesClient(number) => self.names.client_ready(number, &mut self.scratch),
        }
        None
    }

    fn find(&mut self, id: &ProcessId) -> Option<&mut Process> {
        self.containers.get_mut(&id.container)?.process(id.exec.as_deref())
    }

    fn source_ready(&mut self, id: &ProcessId, kind: StreamKind) {
        let mut scratch = std::mem::take(&mut self.scratch);
        if let Some(process) = self.find(id) {
            match kind {
                StreamKind::Stdin => process.input.as_mut().map(Input::sink_ready),
                StreamKind::Stdout => process.output.as_mut().map(|output| output.source_ready(&mut scratch)),
                StreamKind::Stderr => process.errors.as_mut().map(|output| output.source_ready(&mut scratch)),
            };
        }
        self.scratch = scratch;
    }

    fn stream_ready(&mut self, id: &ProcessId, kind: StreamKind, readable: bool) {
        let mut scratch = std::mem::take(&mut self.scratch);
        if let Some(process) = self.find(id) {
            match kind {
                StreamKind::Stdin => process.input.as_mut().map(|input| input.connection_ready(&mut scratch)),
                _ => process.kept_output(kind).map(|output| output.connection_ready(readable, &mut scratch)),
            };
        }
        self.scratch = scratch;
    }

    /// Takes everything that a starting process has to say.
    fn start_news(&mut self, id: &Rc<ProcessId>) {
        loop {
            let poller = Rc::clone(&self.poller);
            let Some(process) = self.find(id) else { return };
            let Phase::Starting(starting) = &mut process.phase else { return };
            match status::receive(&starting.status) {
                Message::Nothing => return,
                Message::Executing => starting.executing = true,
                Message::Terminal(master) => {
                    if let Err(error) = process.take_terminal(&poller, master) {
                        log::warn(format_args!("a terminal is lost: {error}"));
                    }
                }
                Message::Failed(error) => return self.start_failed(id, error),
                Message::Closed if !starting.executing => {
                    return self.start_failed(id, internal("the process ended while it was being started"));
                }
                Message::Closed => {
                    let pid = process.pid;
                    process.phase = Phase::Running;
                    return self.answer_start(pid, Ok(Answer::Started { pid }));
                }
            }
        }
    }

    /// Forgets the process; its end will be that of a stranger.
    fn start_failed(&mut self, id: &ProcessId, error: bulkhead_agent_api::AgentError) {
        let Some(container) = self.containers.get_mut(&id.container) else { return };
        let failed = match &id.exec {
            Some(exec) => container.execs.remove(exec),
            None => container.init.take(),
        };
        if let Some(process) = failed {
            self.pids.remove(&process.pid);
            self.answer_start(process.pid, Err(error));
        }
    }

    fn answer_start(&mut self, pid: i32, result: Result<Answer, bulkhead_agent_api::AgentError>) {
        if let Some((epoch, call)) = self.starts.remove(&pid) {
            self.control.answer(epoch, call, result);
        }
    }

    /// Waits for every child that has ended, ours or orphaned to us.
    fn reap(&mut self) {
        let mut buffer = [0; 1024];
        while rustix::io::read(&self.signals, &mut buffer).is_ok() {}
        self.wait_for_children();
    }

    fn wait_for_children(&mut self) {
        self.unreaped = true;
        for _ in 0..REAPED {
            let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) else {
                self.unreaped = false;
                return;
            };
            let pid = pid.as_raw_nonzero().get();
            self.transfers.ended(pid);
            let Some(id) = self.pids.remove(&pid) else { continue };
            // It may have begun to run, or said why it cannot, since epoll was asked.
            self.start_news(&id);
            if self.find(&id).is_some_and(|process| process.pid == pid) {
                self.ended(&id, exit_code(status));
            }
        }
    }

    fn ended(&mut self, id: &Rc<ProcessId>, code: i32) {
        let Some(container) = self.containers.get_mut(&id.container) else { return };
        if id.exec.is_none() && !container.has_pid_namespace() {
            if let Err(error) = container.cgroup.kill() {
                log::warn(error);
            }
            self.dying.push((Rc::clone(id), code));
        } else {
            self.exited(id, code);
        }
    }

    /// Ends first processes whose containers are empty by now.
    fn bury(&mut self) {
        let containers = &self.containers;
        let alive = |id: &ProcessId| {
            containers.get(&id.container).is_some_and(|container| container.cgroup.is_populated())
        };
        let (dying, dead): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.dying).into_iter().partition(|(id, _)| alive(id));
        self.dying = dying;
        for (id, code) in dead {
            self.exited(&id, code);
        }
    }

    fn exited(&mut self, id: &Rc<ProcessId>, code: i32) {
        self.memory_news(&id.container);
        let Some(container) = self.containers.get_mut(&id.container) else { return };
        let oom_killed = container.oom_kills > 0;
        let exit = Exit { code, oom_killed, unix_ns: unix_ns() };
        let Some(process) = container.process(id.exec.as_deref()) else { return };
        process.exited(exit, &mut self.scratch);
        self.control.event(Event::Exited { process: ProcessId::clone(id), exit });
    }

    fn memory_news(&mut self, id: &str) {
        let Some(container) = self.containers.get_mut(id) else { return };
        let kills = container.cgroup.oom_kills();
        if kills > container.oom_kills {
            container.oom_kills = kills;
            self.control.event(Event::Oom { container: id.to_owned() });
        }
        // Reading through the watched descriptor is what ends its event.
        let mut buffer = [0; 512];
        let _ = rustix::io::pread(&container.memory, &mut buffer, 0);
    }

    fn drain_uevents(&mut self) {
        let Some(uevents) = &self.uevents else { return };
        while rustix::io::read(uevents, self.scratch.as_mut_slice()).is_ok() {}
        for pending in &mut self.pending {
            pending.look_now();
        }
        self.growth.look();
    }
}

fn watch_uevents(poller: &Rc<Poller<Key>>) -> io::Result<Watched<Key>> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let protocol = Some(netlink::KOBJECT_UEVENT);
    let socket: OwnedFd = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, protocol)?;
    rustix::net::bind(&socket, &netlink::SocketAddrNetlink::new(0, 1))?;
    let watched = poller.watch(socket, Key::Uevents);
    watched.want(true, false)?;
    Ok(watched)
}

fn unix_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// As shells count: a signal's number after 128.
fn exit_code(status: WaitStatus) -> i32 {
    let signal = status.terminating_signal().map(|signal| 128 + signal);
    status.exit_status().or(signal).unwrap_or(255)
}
