//! Networks of a container that runs: an interface appears in the guest, or goes.
//!
//! ```text
//!   connect:     address ─▶ tap, rules, link up ─▶ VMM's slot ─▶ agent: interface, routes, files
//!   disconnect:  agent: interface gone ─▶ VMM's slot empty ─▶ rules, address free ─▶ agent: routes, files
//! ```
//! What fails half-way is taken back as far as the guest lets it; what the guest does not give back goes with it.

use std::{sync::Arc, time::Duration};

use bulkhead_agent_api::{Answer, Call};

use super::{Container, network, record::Record, workload::Workload};
use crate::engine::{
    Error, Result, Shared,
    network::{
        links,
        record::{Attachment, Endpoint, Network},
    },
};

/// How long the agent may take for one call.
const WITHIN: Duration = Duration::from_secs(30);

/// Puts a running container into a network. `record` is the container's, with the attachment in it.
///
/// # Errors
/// In Docker's words; then it is not in.
pub(super) async fn connect(
    shared: &Arc<Shared>,
    record: &Record,
    workload: &Workload,
    wanted: &Arc<Network>,
) -> Result<Option<Endpoint>> {
    let name = &wanted.name;
    let attachment = record.networks.get(name).cloned().unwrap_or_default();
    let connected = wire(shared, record, workload, name, &attachment).await;
    if connected.is_err() {
        shared.networks.leave_network(&record.id, &wanted.id).await;
    }
    connected
}

async fn wire(
    shared: &Arc<Shared>,
    record: &Record,
    workload: &Workload,
    name: &str,
    attachment: &Attachment,
) -> Result<Option<Endpoint>> {
    let taken: Vec<&Endpoint> = crate::engine::network::endpoints(record).collect();
    let publishes = shared.networks.publishes(record, name);
    let Some(mut joined) = shared.networks.join_one(record, name, attachment, &taken, publishes).await?
    else {
        return Ok(None);
    };
    let endpoint = joined.endpoint.clone();
    let nics = network::admit(shared, record, std::slice::from_mut(&mut joined)).await?;
    let plugged = workload.sandbox.plug(&nics).await;
    plugged.map_err(|error| Error::internal(format!("the microVM does not take the interface: {error}")))?;
    let made = async {
        call(workload, network::connect(&joined.network, &endpoint)).await?;
        let mut record = record.clone();
        if let Some(attachment) = record.networks.get_mut(name) {
            attachment.endpoint = Some(endpoint.clone());
        }
        rewrite(shared, &record, workload).await
    };
    if let Err(error) = made.await {
        let _ = call(workload, Call::NetworkDisconnect { mac: endpoint.mac }).await;
        let _ = workload.sandbox.unplug(endpoint.slot).await;
        return Err(error);
    }
    Ok(Some(endpoint))
}

/// Takes a running container out of a network. `record` is the container's, without the attachment. Where its ports
/// are published in another one now, that one's name and the endpoint as it has become.
///
/// # Errors
/// The guest's; with `force` they are only told.
pub(super) async fn disconnect(
    shared: &Arc<Shared>,
    record: &Record,
    workload: &Workload,
    (network, endpoint): (&str, &Endpoint),
    force: bool,
) -> Result<Option<(String, Endpoint)>> {
    let gone = async {
        call(workload, Call::NetworkDisconnect { mac: endpoint.mac }).await?;
        workload.sandbox.unplug(endpoint.slot).await.map_err(|error| Error::internal(error.to_string()))
    };
    match gone.await {
        Err(error) if !force => return Err(error),
        Err(error) => {
            tracing::warn!(container = record.id, error = error.message, "a guest keeps its interface");
            // Its tap goes in any case, if the VMM still answers.
            let _ = workload.sandbox.unplug(endpoint.slot).await;
        }
        Ok(()) => {}
    }
    shared.networks.leave_network(&record.id, network).await;
    if let Err(error) = rewrite(shared, record, workload).await {
        tracing::warn!(
            container = record.id,
            error = error.message,
            "a container's routes or files are of before"
        );
    }
    if endpoint.ports.is_empty() {
        return Ok(None);
    }
    // It has left, whatever becomes of them.
    Ok(shared.networks.publish_elsewhere(record).await.unwrap_or_else(|error| {
        tracing::warn!(container = record.id, error = error.message, "its ports are published no more");
        None
    }))
}

/// Default routes, `/etc/hosts` and `/etc/resolv.conf` as they are by now.
async fn rewrite(shared: &Arc<Shared>, record: &Record, workload: &Workload) -> Result<()> {
    call(workload, network::routes(shared, record)).await?;
    call(workload, files(shared, record, workload.guest())?).await
}

/// A container that others link to has begun to run, maybe at another address: their hosts are to know it.
pub(super) fn tell_parents(shared: &Arc<Shared>, record: &Record) {
    for parent in links::parents(shared, &record.id) {
        let shared = Arc::clone(shared);
        tokio::spawn(async move { tell_links(&shared, &parent).await });
    }
}

/// Has the files of a container, where it runs, tell of its links as they are by now.
pub(super) async fn tell_links(shared: &Arc<Shared>, parent: &Container) {
    let view = parent.view();
    let Some(workload) = &view.workload else { return };
    let told = async { call(workload, files(shared, &view.record, workload.guest())?).await };
    if let Err(error) = told.await {
        tracing::warn!(container = parent.id(), error = error.message, "its links are of before");
    }
}

/// The files of a container, `guest` in its machine, that tell of its networks.
pub(super) fn files(shared: &Shared, record: &Record, guest: &str) -> Result<Call> {
    let mut files = shared.spec(record, &[])?.files;
    files.retain(|file| matches!(file.path.as_str(), "/etc/hosts" | "/etc/resolv.conf"));
    Ok(Call::NetworkFiles { container: guest.to_owned(), files })
}

async fn call(workload: &Workload, call: Call) -> Result<()> {
    match tokio::time::timeout(WITHIN, workload.sandbox.call(call)).await {
        Ok(Ok(Answer::Done)) => Ok(()),
        Ok(Ok(_)) => Err(Error::internal("the guest agent's answer does not fit the call")),
        Ok(Err(error)) => Err(Error::internal(error.to_string())),
        Err(_) => Err(Error::internal("the guest does not answer")),
    }
}
