//! A container's interfaces: what its sandbox and its agent are told of its networks, at a start and while it
//! runs.

use bulkhead_agent_api::{Call, Gateway, Interface, InterfaceAddress};

use super::record::Record;
use crate::{
    engine::{
        Result, Shared,
        network::{
            Joined,
            attach::gateway_network,
            record::{Endpoint, Network},
        },
    },
    sandbox::Nic,
};

/// The network slot of a place that was just got; None when it was taken before.
pub(super) fn nic(joined: &mut Joined) -> Option<Nic> {
    let Joined { network, endpoint, tap, .. } = joined;
    let tap = tap.take()?;
    Some(Nic { slot: endpoint.slot, tap, mac: endpoint.mac, mtu: network.settings.mtu })
}

/// Lets all of them speak.
///
/// # Errors
/// The host's.
pub(super) async fn admit(shared: &Shared, joined: &mut [Joined]) -> Result<()> {
    for one in joined {
        shared.networks.admit(one).await?;
    }
    Ok(())
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
