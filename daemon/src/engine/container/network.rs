//! A container's interfaces: what its sandbox and its agent are told of its networks, at a start and while it
//! runs.

use bulkhead_agent_api::{Call, Gateway, Interface, InterfaceAddress};
use futures_util::future::try_join_all;

use super::{record::Record, state::Failure};
use crate::{
    engine::{
        Error, Result, Shared,
        network::{
            Joined,
            attach::gateway_network,
            record::{Endpoint, Network},
        },
    },
    sandbox::{Nic, Sandbox},
};

/// The record of a container with what it has just got.
pub(super) fn with_endpoints(record: &Record, joined: &[Joined]) -> Record {
    let mut record = record.clone();
    for one in joined {
        if let Some(attachment) = record.networks.get_mut(&one.network.name) {
            attachment.endpoint = Some(one.endpoint.clone());
        }
    }
    record
}

/// What a container has, by the networks' names.
pub(super) fn endpoints(joined: Vec<Joined>) -> Vec<(String, Endpoint)> {
    joined.into_iter().map(|one| (one.network.name.clone(), one.endpoint)).collect()
}

/// Refuses to save a machine whose interfaces a restored one would not get in the same slots: they come in the
/// order of the networks' names.
///
/// # Errors
/// Conflict.
pub(crate) fn check_order(record: &Record) -> Result<()> {
    let endpoints = record.networks.values().filter_map(|attachment| attachment.endpoint.as_ref());
    if endpoints.zip(0..).all(|(endpoint, slot)| endpoint.slot == slot) {
        return Ok(());
    }
    Err(Error::conflict(format!(
        "container {} cannot be saved: its networks were changed while it ran; start it anew first",
        record.name
    )))
}

/// Makes the taps of all places, guarded and up.
///
/// # Errors
/// The host's.
pub(super) async fn admit(shared: &Shared, record: &Record, joined: &mut [Joined]) -> Result<Vec<Nic>> {
    let all = joined.iter_mut().map(|one| async {
        let tap = shared.networks.admit(record, one).await?;
        Ok(Nic { slot: one.endpoint.slot, tap, mac: one.endpoint.mac, mtu: one.network.settings.mtu })
    });
    try_join_all(all).await
}

/// Gives a machine that has just come up its taps.
///
/// # Errors
/// The VMM's.
pub(super) async fn plug(sandbox: &Sandbox, nics: &[Nic]) -> std::result::Result<(), Failure> {
    let plugged = sandbox.plug(nics).await;
    plugged.map_err(|error| Failure {
        code: 128,
        error: format!("the microVM does not take its interfaces: {error}"),
    })
}

/// What the agent is told at a start.
pub(super) fn calls(shared: &Shared, record: &Record, joined: &[Joined]) -> Vec<Call> {
    let mut calls: Vec<Call> = joined.iter().map(|one| connect(&one.network, &one.endpoint)).collect();
    if !calls.is_empty() {
        calls.push(routes(shared, record));
    }
    calls
}

/// Makes an interface.
pub(super) fn connect(network: &Network, endpoint: &Endpoint) -> Call {
    let address = |net: &ipnet::IpNet| InterfaceAddress { address: net.addr(), prefix: net.prefix_len() };
    Call::NetworkConnect(Box::new(Interface {
        device: endpoint.mac,
        mac: endpoint.mac,
        name: endpoint.interface.clone(),
        mtu: network.settings.mtu,
        addresses: endpoint.addresses.iter().map(address).collect(),
    }))
}

/// The default routes of a container with these endpoints.
pub(super) fn routes(shared: &Shared, record: &Record) -> Call {
    let find = |name: &str| shared.networks.named(record, name);
    let gateway = |ipv6: bool| {
        let name = gateway_network(&record.networks, ipv6, find)?;
        let endpoint = record.networks.get(&name)?.endpoint.as_ref()?;
        let address = find(&name)?.subnet(ipv6)?.gateway;
        Some(Gateway { mac: endpoint.mac, address })
    };
    Call::NetworkRoutes { gateways: [gateway(false), gateway(true)].into_iter().flatten().collect() }
}
