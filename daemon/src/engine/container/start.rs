//! Starts a container: boots its sandbox, builds the container in it, starts the workload, connects its stdio.
//! And takes one over that an earlier daemon started.

use std::{
    fs::{File, OpenOptions},
    path::Path,
    sync::Arc,
    time::Duration,
};

use bulkhead_agent_api::{
    AgentError, Answer, Call, ContainerState, Create, Disk, ErrorKind, Event, Exit as AgentExit,
    ProcessState, Rootfs, Stdio, StreamKind,
};
use jiff::Timestamp;
use tokio::{sync::mpsc, task::JoinSet};

use super::{
    hub::Hub,
    joining::{self, Company},
    machine, memory, network, pump,
    record::Record,
    restrain,
    resume::{self, Resumption, Run},
    state::{Failure, Rest, Running, State},
    workload::{Watch, Workload},
};
use crate::{
    engine::{
        Error, Shared, limits,
        logs::{Durable, Log, Stream},
        mounts,
        network::{links, record::Endpoint, resolver::Resolver},
    },
    phases::{Stage, Timeline},
    sandbox::{
        self, AdoptError, BootError, CallError, HostLimits, Origin, Place, Sandbox, SandboxSpec, TAG,
        template::TemplateUse,
    },
};

/// The guest kernel's command line. One serial port for the console; a panic ends the machine; a sent frame is
/// forgotten when the next one is sent: an interrupt for each that has left would cost more than the frame.
const CMDLINE: &str = "console=ttyS0 quiet panic=-1 reboot=k 8250.nr_uarts=1 dummy.numdummies=0 \
                       virtio_net.napi_tx=0 rdinit=/init";

/// How long a running guest may take to tell a restarted daemon of its container and open the streams.
const ADOPT_WITHIN: Duration = Duration::from_secs(30);

/// A workload that runs, and what its watch needs.
pub(crate) struct Started {
    pub(crate) workload: Arc<Workload>,
    pub(crate) watch: Watch,
    pub(crate) log_start: u64,
    pub(crate) at: Timestamp,
    /// What it has in its networks.
    pub(crate) endpoints: Vec<(String, Endpoint)>,
    /// What it has of its machine.
    pub(crate) place: Place,
}

/// Starts it, or lets it go on from where it was saved. A failure, and a start that is given up, leaves
/// nothing but what the caller has to take away: what was booted, which is in `booted`, and then the
/// container's places in its networks.
pub(crate) async fn start(
    shared: &Arc<Shared>,
    record: &Record,
    hub: &Arc<Hub>,
    timeline: &Arc<Timeline>,
    resumption: Option<Resumption>,
    booted: &mut Option<Arc<Sandbox>>,
) -> Result<Started, Failure> {
    let internal = |error: Error| Failure { code: 128, error: error.message };
    tokio::task::spawn_blocking(crate::check::can_run_guests)
        .await
        .unwrap_or_else(|error| Err(Error::internal(error.to_string())))
        .map_err(internal)?;
    let no_log =
        |error: String| Failure { code: 128, error: format!("failed to initialize logging driver: {error}") };
    let settings = record.log_settings().map_err(|error| no_log(error.message))?;
    let (log, log_start) = Log::begin(&settings, &shared.layout().container_log(&record.id))
        .map_err(|error| no_log(error.to_string()))?;
    let mut joined = shared.networks.join(record).await.map_err(internal)?;
    let record = &network::with_endpoints(record, &joined);
    if let Some(resumption) = resumption {
        let run = Run { shared, record, hub, timeline, log, log_start, joined };
        return resume::resume(run, resumption, booted).await;
    }
    if joining::is_guest(&record.host_config) {
        let run = Run { shared, record, hub, timeline, log, log_start, joined };
        return joining::join(run, booted).await;
    }
    links::check(shared, record).map_err(internal)?;
    let first = matches!(record.life.state, State::Starting(Rest::Created(_)));
    let plan = mounts::plan(shared, &record.mounts, first, &Place::default()).await.map_err(internal)?;
    let place = Place { volumes: plan.disk_count(), ..Place::default() };
    let create = create_call(shared, record, &plan, &place, None).map_err(internal)?;
    let origin = origin(shared, record);
    let disk = shared.layout().container_disk(&record.id);
    // The machine that it tells of is no longer the last.
    let _ = std::fs::remove_file(shared.layout().container_last_end(&record.id));
    let spec = sandbox_spec(shared, record, &disk, origin, timeline).map_err(internal)?;
    let spec = plan.onto(spec);
    let memory = spec.memory;
    timeline.mark(Stage::Prepared);
    // Taps and rules, which take a while, are made while the guest boots.
    let (booting, admitted) = tokio::join!(Sandbox::boot(spec), network::admit(shared, record, &mut joined));
    let (sandbox, events) = match booting {
        Ok(booted) => booted,
        Err(error) => {
            if let BootError::Died(death) = &error {
                machine::remember(shared, record, death).await;
            }
            return Err(boot_failure(&error));
        }
    };
    sandbox.settle(&record.id, joining::tenant(shared, record, &record.id, place.clone()));
    let sandbox = Arc::clone(booted.insert(Arc::new(sandbox)));
    let nics = admitted.map_err(internal)?;

    let interfaces = async {
        network::plug(&sandbox, &nics).await?;
        for request in network::calls(shared, record, &joined) {
            call(&sandbox, request).await?;
        }
        if !joined.is_empty() {
            timeline.mark(Stage::Networked);
        }
        Ok(())
    };
    // The workload is to find all of its memory: it may size itself by it.
    let grown = async {
        if memory.plugged_mib > 0 {
            call(&sandbox, Call::AwaitMemory { plugged_mib: memory.plugged_mib }).await?;
        }
        Ok::<_, Failure>(())
    };
    let create = call(&sandbox, Call::Create(Box::new(create)));
    let ((), (), _, resolver) =
        tokio::try_join!(interfaces, grown, create, resolver(shared, record, &sandbox))?;
    let stages = Stages { shared, record, hub, timeline, log, log_start, place };
    begin(stages, &sandbox, events, resolver, network::endpoints(joined)).await
}

/// A start whose machine is there, and the container in it.
pub(super) struct Stages<'a> {
    pub(super) shared: &'a Arc<Shared>,
    pub(super) record: &'a Record,
    pub(super) hub: &'a Arc<Hub>,
    pub(super) timeline: &'a Arc<Timeline>,
    pub(super) log: Log,
    pub(super) log_start: u64,
    pub(super) place: Place,
}

/// Starts the workload of a container that was made, and connects its stdio.
pub(super) async fn begin(
    stages: Stages<'_>,
    sandbox: &Arc<Sandbox>,
    events: mpsc::Receiver<Event>,
    resolver: Option<Resolver>,
    endpoints: Vec<(String, Endpoint)>,
) -> Result<Started, Failure> {
    let Stages { shared, record, hub, timeline, log, log_start, place } = stages;
    timeline.mark(Stage::Created);
    shared.mount_events(record, "mount");
    let forwards = mounts::sockets::serve(sandbox, &record.mounts, &place);
    let stdio = stdio(record);
    let workload = Arc::new(Workload::new(Arc::clone(sandbox), Arc::new(log), &record.id));
    restrain::before_start(sandbox, record, &shared.layout().data_root)
        .await
        .map_err(|error| Failure { code: 128, error })?;
    call(sandbox, Call::Start { container: record.id.clone(), stdio }).await?;
    timeline.mark(Stage::Started);
    let at = Timestamp::now();
    let mut watch = connect(&workload, stdio, kept(record, Durable::default()), hub, events, None)
        .await
        .map(|watch| Watch { resolver, forwards, ..watch })
        .map_err(|error| Failure { code: 128, error: format!("the container's streams: {error}") })?;
    timeline.mark(Stage::Connected);
    watch.timeline = Some(Arc::clone(timeline));
    Ok(Started { workload, watch, log_start, at, endpoints, place })
}

/// The resolver of a container that is in a network.
pub(super) async fn resolver(
    shared: &Arc<Shared>,
    record: &Record,
    sandbox: &Arc<Sandbox>,
) -> Result<Option<Resolver>, Failure> {
    if !shared.networks.facts(record).connected {
        return Ok(None);
    }
    let started = Resolver::start(Arc::clone(shared), Arc::clone(sandbox), record.id.clone()).await;
    started
        .map(Some)
        .map_err(|error| Failure { code: 128, error: format!("the container's resolver: {error}") })
}

/// Where a container's machine comes from.
pub(super) fn origin(shared: &Shared, record: &Record) -> Origin {
    match &shared.templates {
        Some(store) => {
            Origin::Template(TemplateUse { store: Arc::clone(store), domain: domain(shared, record) })
        }
        None => Origin::Cold,
    }
}

/// Whose templates are good for a container.
fn domain(shared: &Shared, record: &Record) -> Option<String> {
    let label = shared.config.vm.template_domain_label.as_ref()?;
    Some(record.config.labels.as_ref().and_then(|labels| labels.get(label)).cloned().unwrap_or_default())
}

/// The exit of a container's first process, if it has ended.
pub(super) fn first_exit(state: &ContainerState) -> Result<Option<AgentExit>, Error> {
    match state.init {
        Some(ProcessState::Exited(exit)) => Ok(Some(exit)),
        Some(ProcessState::Running { .. }) => Ok(None),
        None => Err(Error::internal("its workload was never started")),
    }
}

/// How a container that an earlier daemon left running was found.
pub(crate) enum Found {
    /// It runs, or has ended in the meantime with its exit kept by the agent.
    Alive {
        /// What runs.
        workload: Arc<Workload>,
        /// For its watch.
        watch: Watch,
        /// Whether it stands still.
        paused: bool,
    },
    /// Its sandbox is gone; the text is why.
    Gone(String),
}

/// Takes over a running container.
pub(crate) async fn adopt(shared: &Arc<Shared>, record: &Record, running: &Running, hub: &Arc<Hub>) -> Found {
    let parent = shared.layout().sandboxes();
    let guest = running.guest.as_ref().unwrap_or(&record.id);
    let sandbox = match shared.adopted.adopt(&parent, &running.sandbox).await {
        Ok(sandbox) => sandbox,
        Err(AdoptError::Dead(death)) => return Found::Gone(format!("while no daemon ran: {death}")),
        Err(error @ AdoptError::Mute(_)) => return Found::Gone(error.to_string()),
    };
    sandbox.settle(&record.id, joining::tenant(shared, record, guest, running.place.clone()));
    // Before it is asked for its state: what happens from now on is not missed.
    let events = sandbox.events(guest);
    let path = shared.layout().container_log(&record.id);
    let (settings, run) = match record.log_settings() {
        Ok(settings) => (settings, running.log_start),
        Err(error) => return Found::Gone(format!("its log cannot be taken up again: {error}")),
    };
    // All of the run's log is read.
    let resumed = tokio::task::spawn_blocking(move || Log::resume(&settings, &path, run)).await;
    let (log, durable) = match resumed.unwrap_or_else(|error| Err(std::io::Error::other(error))) {
        Ok(resumed) => resumed,
        Err(error) => return Found::Gone(format!("its log cannot be taken up again: {error}")),
    };
    let adopted = async {
        let state = container_state(&sandbox, guest).await?;
        let exit = first_exit(&state)?;
        let workload = Arc::new(Workload::new(sandbox, Arc::new(log), guest));
        let watch = connect(&workload, stdio(record), kept(record, durable), hub, events, exit).await?;
        crate::engine::exec::take_over(&workload, state.execs);
        let forwards = mounts::sockets::serve(&workload.sandbox, &record.mounts, &running.place);
        shared.networks.adopt(record).await;
        let resolver = resolver(shared, record, &workload.sandbox).await;
        let resolver = resolver.unwrap_or_else(|failure| {
            tracing::error!(container = record.id, error = failure.error, "it has no resolver any more");
            None
        });
        let watch = Watch { resolver, forwards, ..watch };
        Ok::<_, Error>((workload, watch, state.paused))
    };
    // A guest that greets and then says no more must not hold up the daemon and everybody else's containers.
    match tokio::time::timeout(ADOPT_WITHIN, adopted).await {
        Ok(Ok((workload, watch, paused))) => Found::Alive { workload, watch, paused },
        Ok(Err(error)) => Found::Gone(format!("it could not be taken over: {error}")),
        Err(_) => Found::Gone("it could not be taken over: the guest agent does not answer".into()),
    }
}

pub(super) async fn container_state(sandbox: &Sandbox, id: &str) -> Result<ContainerState, Error> {
    match sandbox.call(Call::State).await {
        Ok(Answer::State { containers }) => containers
            .into_iter()
            .find(|state| state.container == id)
            .ok_or_else(|| Error::internal("its sandbox does not know it")),
        Ok(_) => Err(Error::internal(CallError::Unexpected.to_string())),
        Err(error) => Err(Error::internal(error.to_string())),
    }
}

pub(super) fn create_call(
    shared: &Shared,
    record: &Record,
    plan: &mounts::Plan,
    place: &Place,
    company: Option<&Company>,
) -> Result<Create, Error> {
    let built = shared.spec_among(record, &plan.binds, company)?;
    let size = std::fs::metadata(shared.layout().container_disk(&record.id))?.len();
    Ok(Create {
        container: record.id.clone(),
        rootfs: Rootfs {
            tag: TAG.into(),
            layers: record.layers.iter().rev().map(|layer| place.layer(&layer.hex())).collect(),
            disk: Disk { id: place.disk(), size },
        },
        spec: Box::new(built.spec),
        files: built.files,
        shares: (!plan.shares.is_empty()).then(|| place.shares()),
        copy_up: plan.copy_up.clone(),
        sockets: plan.sockets.clone(),
        disks: plan.volume_disks()?,
        shared_memory: built.shared_memory,
    })
}

/// A container's writable layer.
pub(super) fn open_disk(disk: &Path) -> Result<File, Error> {
    let opened = OpenOptions::new().read(true).write(true).open(disk);
    opened.map_err(|error| Error::internal(format!("the container's disk cannot be opened: {error}")))
}

pub(super) fn sandbox_spec(
    shared: &Shared,
    record: &Record,
    disk: &Path,
    origin: Origin,
    timeline: &Arc<Timeline>,
) -> Result<SandboxSpec, Error> {
    let vm = &shared.config.vm;
    let disk = open_disk(disk)?;
    let layers = shared.layers();
    let memory = memory::of(&record.host_config, vm);
    Ok(SandboxSpec {
        id: sandbox::new_id(),
        parent: shared.layout().sandboxes(),
        program: vm.vmm.clone(),
        vcpus: limits::vcpus(&record.host_config, vm.vcpus),
        memory,
        kernel: vm.kernel.clone(),
        initramfs: vm.initramfs.clone(),
        cmdline: CMDLINE.into(),
        disk: Some(disk),
        disks: Vec::new(),
        layers: record.layers.iter().map(|id| (id.hex(), layers.path(id))).collect(),
        window_mib: vm.window_mib,
        shares: Vec::new(),
        timeline: Arc::clone(timeline),
        kvm: vm.kvm.clone(),
        // The CPUs' come when it is up: a boot is to be quick.
        limits: HostLimits { memory_bytes: Some(memory.host_bytes()), ..HostLimits::default() },
        origin,
        confinement: vm.confinement.clone(),
    })
}

pub(super) fn stdio(record: &Record) -> Stdio {
    let config = &record.config;
    let [rows, columns] = record.host_config.console_size;
    let size = u16::try_from(rows).ok().zip(u16::try_from(columns).ok()).filter(|size| *size != (0, 0));
    Stdio {
        terminal: config.tty,
        size: size.filter(|_| config.tty),
        stdin: config.open_stdin,
        stdout: true,
        stderr: !config.tty,
    }
}

/// What the log has; None when the log keeps nothing.
pub(super) fn kept(record: &Record, durable: Durable) -> Option<Durable> {
    (record.host_config.log_config.kind != "none").then_some(durable)
}

/// Opens the streams and starts their pumps.
pub(super) async fn connect(
    workload: &Arc<Workload>,
    stdio: Stdio,
    kept: Option<Durable>,
    hub: &Arc<Hub>,
    events: mpsc::Receiver<Event>,
    exit: Option<AgentExit>,
) -> std::io::Result<Watch> {
    let sandbox = &workload.sandbox;
    let streams = [
        (stdio.stdout, StreamKind::Stdout, Stream::Stdout, kept.map(|kept| kept.stdout)),
        (stdio.stderr, StreamKind::Stderr, Stream::Stderr, kept.map(|kept| kept.stderr)),
    ];
    // All at once: each is a way to the guest and back.
    let opened =
        streams.into_iter().filter(|(wanted, ..)| *wanted).map(|(_, kind, stream, from)| async move {
            sandbox.output(workload.init(), kind, from).await.map(|output| (stream, output))
        });
    let mut outputs = JoinSet::new();
    for (stream, output) in futures_util::future::try_join_all(opened).await? {
        let log = kept.map(|_| Arc::clone(&workload.log));
        outputs.spawn(pump::output(output, stream, log, Arc::clone(hub)));
    }
    let mut inputs = JoinSet::new();
    if stdio.stdin
        && exit.is_none()
        && let Some(queue) = hub.take_input()
    {
        let input = sandbox.input(workload.init()).await?;
        let (sandbox, process) = (Arc::clone(sandbox), workload.init());
        inputs.spawn(pump::input(input, queue, move || async move {
            if let Err(error) = sandbox.call(Call::CloseStdin { process }).await {
                tracing::debug!(%error, "the end of an input was not taken");
            }
        }));
    }
    let forwards = mounts::sockets::Forwards::default();
    Ok(Watch { events, outputs, inputs, exit, timeline: None, resolver: None, forwards })
}

pub(super) async fn call(sandbox: &Sandbox, call: Call) -> Result<Answer, Failure> {
    answered(sandbox, sandbox.call(call)).await
}

/// The agent's answer, or why there is none.
pub(super) async fn answered(
    sandbox: &Sandbox,
    answer: impl Future<Output = Result<Answer, CallError>>,
) -> Result<Answer, Failure> {
    let answered = tokio::select! {
        biased;
        answer = answer => answer,
        death = sandbox.ended() => {
            return Err(Failure { code: 128, error: format!("the microVM ended during the start: {death}") });
        }
    };
    match answered {
        Ok(answer) => Ok(answer),
        Err(CallError::Agent(error)) => Err(agent_failure(&error)),
        Err(CallError::Gone) => {
            // The VMM's own reason is worth a moment.
            let reason = match tokio::time::timeout(Duration::from_secs(2), sandbox.ended()).await {
                Ok(death) => death.to_string(),
                Err(_) => CallError::Gone.to_string(),
            };
            Err(Failure { code: 128, error: format!("the microVM ended during the start: {reason}") })
        }
        Err(error) => Err(Failure { code: 128, error: error.to_string() }),
    }
}

pub(super) fn boot_failure(error: &BootError) -> Failure {
    Failure { code: 128, error: format!("failed to create task for container: {error}") }
}

/// The error of a workload that could not be executed, in the words that the docker CLI searches for its exit
/// code, and the code it then has.
fn agent_failure(error: &AgentError) -> Failure {
    let error_text = format!(
        "failed to create task for container: OCI runtime create failed: unable to start container process: error \
         during container init: {}",
        error.message
    );
    Failure { code: exec_failure_code(error), error: error_text }
}

/// 127 for what is not there, 126 for what cannot be executed, else 128: by the words, as Docker has it, since
/// clients go by them.
pub(crate) fn exec_failure_code(error: &AgentError) -> i32 {
    let has = |words: &[&str]| words.iter().any(|word| error.message.contains(word));
    if has(&["executable file not found", "no such file or directory"]) {
        127
    } else if has(&["permission denied", "is a directory"]) || error.kind == ErrorKind::NotExecutable {
        126
    } else {
        128
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_have_the_codes_that_clients_derive_from_their_words() {
        for (kind, message, code) in [
            (ErrorKind::NotFound, "exec: \"nosuch\": executable file not found in $PATH", 127),
            (ErrorKind::NotFound, "exec: \"/nosuch\": stat /nosuch: no such file or directory", 127),
            (ErrorKind::NotExecutable, "exec: \"/etc/passwd\": permission denied", 126),
            (ErrorKind::NotExecutable, "exec: \"/x\": exec format error", 126),
            (ErrorKind::Invalid, "unable to find user nosuch: no matching entries in passwd file", 128),
        ] {
            let failure = agent_failure(&AgentError { kind, message: message.into() });
            assert_eq!(failure.code, code, "{message}");
            assert!(failure.error.ends_with(message));
        }
    }
}
