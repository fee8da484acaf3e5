//! Containers that run in another's microVM: `--network container:X`, and with it `--pid container:X` and
//! `--ipc container:X`.
//!
//! ```text
//!   create:  the names become ids ─▶ hostname as the other's, no network of its own
//!   start:   find X, which runs ─▶ enter its sandbox ─▶ disk, layers, shares ─▶ Create, Start
//!   end:     leave: forgotten by the agent, flushed, devices taken back; the last one takes the machine along
//! ```
//! The machine's network is X's, and so it goes with X: whoever has joined runs on without it, as in Docker.

use std::sync::Arc;

use bulkhead_agent_api::ProcessState;

use super::{
    inspect,
    record::Record,
    resume::Run,
    start::{Stages, Started, answered, begin, container_state, create_call, open_disk},
    state::{Failure, Rest, Running, State},
    workload::Workload,
};
use crate::{
    api::types::container::{CreateRequest, HostConfig},
    engine::{Error, Result, Shared, mounts, spec::IpcDonor},
    phases::Stage,
    sandbox::{Furniture, Place, Sandbox, Tenant, total_mib},
};

/// How a mode says that it is another container's.
const PREFIX: &str = "container:";

/// What a container gets of those whose machine it runs in.
#[derive(Debug, Clone)]
pub(crate) struct Company {
    /// Whose network it has: whose files say what it is called and whom it asks for names.
    pub(crate) network: Arc<Record>,
    /// In whose pid namespace it runs: the first process there, as the guest numbers it.
    pub(crate) pid: Option<i32>,
    /// Whose IPC namespace and `/dev/shm` it has.
    pub(crate) ipc: Option<IpcDonor>,
}

/// The container that a mode names.
fn named(mode: &str) -> Option<&str> {
    mode.strip_prefix(PREFIX)
}

/// Whether a container runs in another's machine.
pub(crate) fn is_guest(host: &HostConfig) -> bool {
    named(&host.network_mode).is_some()
}

/// Checks what is asked before the image has added to it, puts ids in the place of names, and takes over what goes
/// with another's network. In Docker's words where it refuses as Docker does.
///
/// # Errors
/// Invalid.
pub(super) fn resolve(shared: &Shared, request: &mut CreateRequest) -> Result<()> {
    let CreateRequest { config, host_config: host, networking_config } = request;
    if host.network_mode == "container" || named(&host.network_mode) == Some("") {
        return Err(Error::invalid("invalid network mode: invalid container format container:<name|id>"));
    }
    for (option, mode) in [("pid", &host.pid_mode), ("ipc", &host.ipc_mode)] {
        if named(mode).is_some() && !is_guest(host) {
            return Err(Error::invalid(format!(
                "--{option} container: needs --network container: too: processes and their memory are shared in one \
                 microVM, and a microVM has one network"
            )));
        }
    }
    let Some(donor) = named(&host.network_mode) else { return Ok(()) };
    let some = |list: &Option<Vec<String>>| list.as_ref().is_some_and(|list| !list.is_empty());
    let endpoints = networking_config.endpoints_config.iter().flatten();
    for (conflict, is_asked) in [
        ("hostname and the network mode", !config.hostname.is_empty()),
        (
            "container type network can't be used with links. This would result in undefined behavior",
            some(&host.links),
        ),
        ("dns and the network mode", some(&host.dns)),
        ("custom host-to-IP mapping and the network mode", some(&host.extra_hosts)),
        (
            "port publishing and the container type network mode",
            host.publish_all_ports || host.port_bindings.as_ref().is_some_and(|ports| !ports.is_empty()),
        ),
        (
            "port exposing and the container type network mode",
            config.exposed_ports.as_ref().is_some_and(|ports| !ports.is_empty()),
        ),
        ("mac-address and the network mode", !config.mac_address.is_empty()),
    ] {
        if is_asked {
            return Err(Error::invalid(format!("conflicting options: {conflict}")));
        }
    }
    if endpoints.into_iter().any(|(name, _)| *name != host.network_mode) {
        return Err(shared_network());
    }
    // Not "not found": clients would take it for the image, and pull that.
    let find = |name: &str| shared.registry.find(name).map_err(|error| Error::invalid(error.message));
    let donor = find(donor)?;
    let other = donor.view().record;
    config.hostname.clone_from(&other.config.hostname);
    config.domainname.clone_from(&other.config.domainname);
    for mode in [&mut host.pid_mode, &mut host.ipc_mode] {
        if let Some(name) = named(mode) {
            *mode = format!("{PREFIX}{}", find(name)?.id());
        }
    }
    host.network_mode = format!("{PREFIX}{}", donor.id());
    Ok(())
}

/// Docker's words.
pub(crate) fn shared_network() -> Error {
    Error::invalid(
        "container sharing network namespace with another container or host cannot be connected to any other network",
    )
}

/// The container that a mode names, once it runs.
async fn runs(shared: &Shared, mode: &str) -> Result<(Arc<Workload>, Arc<Record>)> {
    let id = named(mode).unwrap_or_default();
    let donor = shared.registry.find(id).map_err(|error| {
        Error::conflict(format!("cannot join namespaces of container: {}", error.message))
    })?;
    // One that is just being started, by Compose or by its restart policy, will be there.
    let mut views = donor.watch();
    let view = views
        .wait_for(|view| !matches!(view.record.life.state, State::Starting(_)))
        .await
        .map_err(|_| Error::conflict(format!("cannot join namespaces of container: it is gone: {id}")))?
        .clone();
    match (&view.record.life.state, view.workload) {
        (State::Running(Running { paused: true, .. }), Some(_)) => Err(Error::conflict(format!(
            "cannot join namespaces of container {}, which is paused: unpause it first",
            view.record.name
        ))),
        (State::Running(_), Some(workload)) => Ok((workload, view.record)),
        (state, _) => Err(Error::conflict(format!(
            "cannot join network namespace of a non running container: container {} is {}",
            view.record.name,
            inspect::status(state)
        ))),
    }
}

/// What a container has of its machine, as [`Sandbox::settle`] takes it.
pub(super) fn tenant(shared: &Shared, record: &Record, guest: &str, place: Place) -> Tenant {
    let vm = &shared.config.vm;
    Tenant {
        guest: guest.to_owned(),
        place,
        memory_mib: total_mib(super::memory::limit(&record.host_config), vm.memory_mib),
        layers: record.layers.iter().map(bulkhead_rootfs::layers::DiffId::hex).collect(),
    }
}

/// Starts a container in the machine of another. What was made of it in `joined` is for the caller to take away
/// after an error: it leaves.
pub(super) async fn join(run: Run<'_>, joined: &mut Option<Arc<Sandbox>>) -> Result<Started, Failure> {
    let Run { shared, record, hub, timeline, log, log_start, .. } = run;
    let internal = |error: Error| Failure { code: 128, error: error.message };
    let host = &record.host_config;
    let (workload, network) = runs(shared, &host.network_mode).await.map_err(internal)?;
    let sandbox = Arc::clone(&workload.sandbox);
    let pid = match named(&host.pid_mode) {
        None => None,
        Some(_) => Some(companion(shared, &host.pid_mode, &sandbox).await.map_err(internal)?.process),
    };
    let ipc = match named(&host.ipc_mode) {
        None => None,
        Some(_) => Some(ipc_donor(shared, &host.ipc_mode, &sandbox).await.map_err(internal)?),
    };
    let company = Company { network, pid, ipc };
    let newcomer = tenant(shared, record, &record.id, Place::default());
    let place = sandbox
        .enter(&record.id, newcomer, !record.mounts.is_empty())
        .map_err(|error| internal(Error::conflict(format!("cannot join container: {error}"))))?;
    *joined = Some(Arc::clone(&sandbox));
    let first = matches!(record.life.state, State::Starting(Rest::Created(_)));
    let plan = mounts::plan(shared, &record.mounts, first, &place).await.map_err(internal)?;
    let create = create_call(shared, record, &plan, &place, Some(&company)).map_err(internal)?;
    let furniture = furniture(shared, record, plan).map_err(internal)?;
    timeline.mark(Stage::Prepared);
    let furnished = sandbox.furnish(&record.id, furniture).await;
    furnished.map_err(|error| super::start::boot_failure(&error))?;
    timeline.mark(Stage::Attached);
    let events = sandbox.events(&record.id);
    answered(&sandbox, sandbox.make(&record.id, create)).await?;
    let stages = Stages { shared, record, hub, timeline, log, log_start, place };
    begin(stages, &sandbox, events, None, Vec::new()).await
}

/// A container in the microVM that is joined.
struct Companion {
    record: Arc<Record>,
    /// What the agent calls it.
    guest: String,
    /// Its first process, as the guest numbers it.
    process: i32,
}

/// The container that a mode names, whose processes or memory are to be seen.
async fn companion(shared: &Shared, mode: &str, sandbox: &Sandbox) -> Result<Companion> {
    let (other, record) = runs(shared, mode).await?;
    if other.sandbox.id() != sandbox.id() {
        return Err(Error::conflict(format!(
            "cannot join namespaces of container {}: it runs in another microVM than the one whose network is to be shared",
            record.name
        )));
    }
    match container_state(sandbox, other.guest()).await?.init {
        Some(ProcessState::Running { pid }) => {
            Ok(Companion { record, guest: other.guest().to_owned(), process: pid })
        }
        _ => Err(Error::conflict(format!(
            "cannot join namespaces of container {}: it has just ended",
            record.name
        ))),
    }
}

/// The container whose IPC is to be shared, if it shares it. In Docker's words where it does not.
async fn ipc_donor(shared: &Shared, mode: &str, sandbox: &Sandbox) -> Result<IpcDonor> {
    let Companion { record, guest, process } = companion(shared, mode, sandbox).await?;
    let offered = &record.host_config.ipc_mode;
    if offered != "shareable" && named(offered).is_none() {
        return Err(Error::invalid(format!(
            "can't join IPC of container {}: non-shareable IPC (hint: use IpcMode:shareable for the donor container)",
            record.id
        )));
    }
    Ok(IpcDonor { process, guest })
}

fn furniture(shared: &Shared, record: &Record, plan: mounts::Plan) -> Result<Furniture> {
    let disk = open_disk(&shared.layout().container_disk(&record.id))?;
    let layers = shared.layers();
    let vm = &shared.config.vm;
    Ok(Furniture {
        disk,
        layers: record.layers.iter().map(|id| (id.hex(), layers.path(id))).collect(),
        shares: plan.shares,
        program: vm.vmm.clone(),
        confinement: vm.confinement.clone(),
    })
}
