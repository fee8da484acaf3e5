//! Containers and their processes, as the agent keeps them.
//!
//! ```text
//!   process:  Starting ──execve──▶ Running ──waitpid──▶ Exited(code)
//!                │ failed
//!                └──▶ forgotten; the start's answer tells why
//! ```

use std::{
    collections::BTreeMap,
    os::fd::{AsFd, OwnedFd},
    rc::Rc,
};

use bulkhead_agent_api::{
    ContainerIdentity, ContainerState, Create, Exit, InjectedFile, ProcessId, ProcessState, Stdio, StreamKind,
};
use oci_spec::runtime::{LinuxNamespaceType, Process as ProcessSpec};
use rustix::{
    fs::{Mode, OFlags},
    pipe::{PipeFlags, pipe_with},
};

use crate::{
    cgroup::Cgroup,
    child::{self, Place, Plan, status},
    error::{Context, Result, internal},
    poll::{Poller, Watched},
    rootfs::{Devices, Mounted},
    server::Key,
    spawn,
    spec::Checked,
    stdio::{input::Input, output::Output},
    sys,
};

/// A created container.
pub struct Container {
    /// What it is.
    pub spec: Checked,
    /// Its first process, from `Start` on.
    pub init: Option<Process>,
    /// Additional processes by their ids.
    pub execs: BTreeMap<String, Process>,
    /// Where all of them are.
    pub cgroup: Cgroup,
    /// News of the OOM killer.
    pub memory: Watched<Key>,
    /// How often it struck, as far as was told.
    pub oom_kills: u64,
    /// Whether it is frozen, or about to be.
    pub paused: bool,
    root: Mounted,
}

/// A process from its start to when it is forgotten.
pub struct Process {
    /// In the guest's root pid namespace.
    pub pid: i32,
    /// For signals: never another process's.
    pub pidfd: OwnedFd,
    /// How far it is.
    pub phase: Phase,
    /// Its stdin, if it is a stream.
    pub input: Option<Input<Key>>,
    /// Its stdout, if it is kept.
    pub output: Option<Output<Key>>,
    /// Its stderr, if it is kept.
    pub errors: Option<Output<Key>>,
    /// The master side of its terminal.
    pub terminal: Option<OwnedFd>,
    stdio: Stdio,
    id: Rc<ProcessId>,
}

/// How far a process is.
pub enum Phase {
    /// Between `clone3` and `execve`.
    Starting(Starting),
    /// It runs.
    Running,
    /// It was reaped.
    Exited(Exit),
}

/// What exists of a process only while it is being started.
pub struct Starting {
    /// Where it reports.
    pub status: Watched<Key>,
    /// Whether it has said that `execve` is next.
    pub executing: bool,
}

impl Container {
    /// Mounts the root and makes the cgroup.
    pub fn create(
        poller: &Rc<Poller<Key>>,
        create: &Create,
        spec: Checked,
        devices: &Devices,
    ) -> Result<Self> {
        let resources = spec.spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
        let cgroup = Cgroup::create(&create.container, resources)?;
        let mounted = Mounted::new(create, devices);
        let made = mounted.and_then(|root| {
            let memory = poller.watch(cgroup.memory_events()?, Key::Memory(create.container.as_str().into()));
            memory.want_changes().context("watch memory.events")?;
            Ok((root, memory))
        });
        match made {
            Ok((root, memory)) => {
                let (init, execs) = (None, BTreeMap::new());
                Ok(Self { spec, init, execs, cgroup, memory, oom_kills: 0, paused: false, root })
            }
            Err(error) => {
                let _ = cgroup.remove();
                Err(error)
            }
        }
    }

    /// Its root file system.
    pub fn mounted(&self) -> &Mounted {
        &self.root
    }

    /// Starts the first process.
    pub fn start(&mut self, poller: &Rc<Poller<Key>>, id: &Rc<ProcessId>, stdio: Stdio) -> Result<i32> {
        let root = self.root.root();
        let process = self.spawn(poller, id, self.spec.process()?, stdio, &Place::New(&root))?;
        Ok(self.init.insert(process).pid)
    }

    /// Starts an additional process beside the first, which runs.
    pub fn exec(
        &mut self,
        poller: &Rc<Poller<Key>>,
        id: &Rc<ProcessId>,
        spec: &ProcessSpec,
        stdio: Stdio,
    ) -> Result<i32> {
        let (Some(init), Some(exec)) = (&self.init, &id.exec) else {
            return Err(internal("no first process"));
        };
        let process = self.spawn(poller, id, spec, stdio, &Place::Existing(&init.pidfd))?;
        let pid = process.pid;
        self.execs.insert(exec.clone(), process);
        Ok(pid)
    }

    fn spawn(
        &self,
        poller: &Rc<Poller<Key>>,
        id: &Rc<ProcessId>,
        spec: &ProcessSpec,
        stdio: Stdio,
        place: &Place<'_>,
    ) -> Result<Process> {
        let (status, theirs) = status::channel()?;
        let mut ours = Ends::default();
        let pipes = if stdio.terminal { None } else { Some(ours.make_pipes(stdio)?) };
        let first = matches!(place, Place::New(_));
        let init = if first && self.spec.init { Some(spawn::own_executable()?) } else { None };
        let plan = Plan { container: &self.spec, process: spec, stdio, pipes, status: theirs, init };
        let child = match place {
            Place::New(_) => {
                let pid_namespace =
                    self.spec.namespace(LinuxNamespaceType::Pid).and_then(|own| own.path().clone());
                let pid_namespace = pid_namespace.map(|path| child::open_namespace(&path)).transpose()?;
                let flags = child::clone_flags(&self.spec);
                let namespace = pid_namespace.as_ref().map(AsFd::as_fd);
                spawn::spawn(flags, &self.cgroup, namespace, None, || child::run(&plan, place))?
            }
            Place::Existing(pidfd) => {
                let beside = self.init.as_ref().map(|init| init.pid);
                spawn::spawn(0, &self.cgroup, Some(pidfd.as_fd()), beside, || child::run(&plan, place))?
            }
        };
        let sys::Child { pid, pidfd } = child;
        let status = poller.watch(status, Key::Start(Rc::clone(id)));
        status.want(true, false).context("watch a start")?;
        let source = |kind| Key::Source(Rc::clone(id), kind);
        Ok(Process {
            pid,
            pidfd,
            phase: Phase::Starting(Starting { status, executing: false }),
            input: ours.stdin.map(|fd| Input::new(poller.watch(fd, source(StreamKind::Stdin)), false)),
            output: ours.stdout.map(|fd| Output::new(poller.watch(fd, source(StreamKind::Stdout)))),
            errors: ours.stderr.map(|fd| Output::new(poller.watch(fd, source(StreamKind::Stderr)))),
            terminal: None,
            stdio,
            id: Rc::clone(id),
        })
    }

    /// Becomes the container of a copied machine; its processes are frozen.
    pub fn assume(&mut self, identity: &ContainerIdentity, scratch: &mut [u8]) -> Result<()> {
        for file in &identity.files {
            self.root.rewrite(file)?;
        }
        let own_name = self.spec.namespace(LinuxNamespaceType::Uts).is_some_and(|uts| uts.path().is_none());
        if let Some(init) = &mut self.init {
            if own_name && !identity.hostname.is_empty() && matches!(init.phase, Phase::Running) {
                spawn::set_hostname_of(&init.pidfd, &identity.hostname)?;
            }
            if let Some(known) = identity.known {
                let outputs = [(&mut init.output, known.stdout), (&mut init.errors, known.stderr)];
                for (output, known) in outputs {
                    if let Some(output) = output {
                        output.renumber(known, scratch);
                    }
                }
            }
        }
        if identity.end_execs {
            for exec in self.execs.values().filter(|exec| !matches!(exec.phase, Phase::Exited(_))) {
                // A frozen process dies of it at once; one that has ended in between is no error.
                let _ = sys::pidfd_send_signal(&exec.pidfd, libc::SIGKILL);
            }
        }
        Ok(())
    }

    /// Whether a process is between its fork and its `execve`.
    pub fn is_starting(&self) -> bool {
        self.init.iter().chain(self.execs.values()).any(|process| matches!(process.phase, Phase::Starting(_)))
    }

    /// Writes files that were injected at its creation anew.
    pub fn rewrite(&self, files: &[InjectedFile]) -> Result<()> {
        files.iter().try_for_each(|file| self.root.rewrite(file))
    }

    /// Whether the end of the first process ends all others by itself.
    pub fn has_pid_namespace(&self) -> bool {
        self.spec.namespace(LinuxNamespaceType::Pid).is_some_and(|namespace| namespace.path().is_none())
    }

    /// A process by the exec's id, or the first.
    pub fn process(&mut self, exec: Option<&str>) -> Option<&mut Process> {
        match exec {
            Some(exec) => self.execs.get_mut(exec),
            None => self.init.as_mut(),
        }
    }

    /// For the wire.
    pub fn state(&self, id: &str) -> ContainerState {
        ContainerState {
            container: id.to_owned(),
            init: self.init.as_ref().map(Process::state),
            execs: self.execs.iter().map(|(id, process)| (id.clone(), process.state())).collect(),
            paused: self.paused,
        }
    }

    /// Unmounts and removes what `create` made; its processes are dead.
    pub fn destroy(self) -> Result<()> {
        let Self { cgroup, memory, root, .. } = self;
        drop(memory);
        let unmounted = root.unmount();
        // A namespace that is being torn down keeps a cgroup busy for a moment; an empty one does no harm.
        let _ = cgroup.remove();
        unmounted
    }
}

impl Process {
    /// For the wire.
    pub fn state(&self) -> ProcessState {
        match &self.phase {
            Phase::Exited(exit) => ProcessState::Exited(*exit),
            Phase::Starting(_) | Phase::Running => ProcessState::Running { pid: self.pid },
        }
    }

    /// Takes its terminal's master side into use.
    pub fn take_terminal(&mut self, poller: &Rc<Poller<Key>>, master: OwnedFd) -> Result<()> {
        let copy = || master.try_clone().context("dup");
        let source = |kind| Key::Source(Rc::clone(&self.id), kind);
        let reading = poller.watch(copy()?, source(StreamKind::Stdout));
        self.output =
            Some(if self.stdio.stdout { Output::new(reading) } else { Output::discarding(reading) });
        if self.stdio.stdin {
            self.input = Some(Input::new(poller.watch(copy()?, source(StreamKind::Stdin)), true));
        }
        self.terminal = Some(master);
        Ok(())
    }

    /// Its end: input is dropped, output is read to where it stands now.
    pub fn exited(&mut self, exit: Exit, scratch: &mut [u8]) {
        self.phase = Phase::Exited(exit);
        if let Some(input) = &mut self.input {
            input.process_exited();
        }
        for output in [&mut self.output, &mut self.errors].into_iter().flatten() {
            output.process_exited();
            output.source_ready(scratch);
        }
    }

    /// An output stream that is kept for the daemon.
    pub fn kept_output(&mut self, kind: StreamKind) -> Option<&mut Output<Key>> {
        match kind {
            StreamKind::Stdin => None,
            StreamKind::Stdout => self.output.as_mut().filter(|_| self.stdio.stdout),
            StreamKind::Stderr => self.errors.as_mut(),
        }
    }
}

/// The agent's ends of a process's pipes.
#[derive(Default)]
struct Ends {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
}

/// How much a pipe holds, in bytes: fewer wake-ups than with the kernel's 64 KiB.
const PIPE: usize = 256 << 10;

impl Ends {
    /// The process's ends; ours do not block.
    fn make_pipes(&mut self, stdio: Stdio) -> Result<[OwnedFd; 3]> {
        let pipe = || pipe_with(PipeFlags::CLOEXEC).context("pipe");
        let stdin = if stdio.stdin {
            let (theirs, ours) = pipe()?;
            self.stdin = Some(unblocked(ours)?);
            theirs
        } else {
            null(OFlags::RDONLY)?
        };
        let mut output = |kept: bool, slot: fn(&mut Self) -> &mut Option<OwnedFd>| -> Result<OwnedFd> {
            if !kept {
                return null(OFlags::WRONLY);
            }
            let (ours, theirs) = pipe()?;
            // A smaller pipe is slower, not wrong.
            let _ = rustix::pipe::fcntl_setpipe_size(&ours, PIPE);
            *slot(self) = Some(unblocked(ours)?);
            Ok(theirs)
        };
        let stdout = output(stdio.stdout, |ends| &mut ends.stdout)?;
        let stderr = output(stdio.stderr, |ends| &mut ends.stderr)?;
        Ok([stdin, stdout, stderr])
    }
}

fn unblocked(fd: OwnedFd) -> Result<OwnedFd> {
    rustix::io::ioctl_fionbio(&fd, true).context("fionbio")?;
    Ok(fd)
}

fn null(flags: OFlags) -> Result<OwnedFd> {
    rustix::fs::open("/dev/null", flags | OFlags::CLOEXEC, Mode::empty()).context("open /dev/null")
}
