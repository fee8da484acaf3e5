//! Networks and endpoints as Docker's clients know them.

use std::{collections::BTreeMap, sync::Arc};

use super::{
    Networks, attach,
    record::{Attachment, Driver, Endpoint, Network, Subnet},
};
use crate::{
    api::types::network::{
        ConfigReference, EndpointIpamConfig, EndpointResource, EndpointSettings, Inspect, Ipam, IpamConfig,
        PortBinding, PortMap,
    },
    engine::container::record::Record,
};

/// `GET /networks/{id}`, and with no members an entry of the list.
pub(super) fn inspect(network: &Network, containers: BTreeMap<String, EndpointResource>) -> Inspect {
    let bridge = network.driver == Driver::Bridge;
    Inspect {
        name: network.name.clone(),
        id: network.id.clone(),
        created: network.created.to_string(),
        scope: "local".into(),
        driver: network.driver.name().into(),
        enable_ipv4: network.ipv4,
        enable_ipv6: network.ipv6,
        ipam: Ipam {
            driver: "default".into(),
            options: (bridge && !network.is_predefined()).then(|| network.ipam_options.clone()).flatten(),
            config: bridge
                .then(|| network.subnets.iter().map(subnet).chain(network.idle.iter().cloned()).collect()),
        },
        internal: network.internal,
        attachable: network.attachable,
        ingress: false,
        config_from: ConfigReference::default(),
        config_only: false,
        containers,
        options: network.options.clone(),
        labels: network.labels.clone(),
    }
}

fn subnet(subnet: &Subnet) -> IpamConfig {
    let text = |(name, address): (&String, &std::net::IpAddr)| (name.clone(), address.to_string());
    IpamConfig {
        subnet: subnet.subnet.to_string(),
        ip_range: subnet.range.map(|range| range.to_string()).unwrap_or_default(),
        gateway: subnet.gateway.to_string(),
        auxiliary_addresses: Some(subnet.auxiliary.iter().map(text).collect()),
    }
}

/// A member in a network's inspect.
pub(super) fn resource(name: &str, endpoint: &Endpoint) -> EndpointResource {
    let address = |ipv6| endpoint.address(ipv6).map(|net| net.to_string()).unwrap_or_default();
    EndpointResource {
        name: name.to_owned(),
        endpoint_id: endpoint.id.clone(),
        mac_address: attach::mac_text(endpoint.mac),
        ipv4_address: address(false),
        ipv6_address: address(true),
    }
}

impl Networks {
    /// The networks of a container, by name. `running`: whether what it has now is of this run.
    pub(crate) fn settings(&self, record: &Record, running: bool) -> BTreeMap<String, EndpointSettings> {
        let all = record.networks.iter();
        all.map(|(name, attachment)| {
            let network = self.named(record, name);
            (name.clone(), settings(record, attachment, network.as_ref(), running))
        })
        .collect()
    }
}

fn settings(
    record: &Record,
    attachment: &Attachment,
    network: Option<&Arc<Network>>,
    running: bool,
) -> EndpointSettings {
    let user_defined = network.is_some_and(|network| !network.is_predefined());
    let ipam = EndpointIpamConfig {
        ipv4_address: attachment.ipv4.map(|address| address.to_string()).unwrap_or_default(),
        ipv6_address: attachment.ipv6.map(|address| address.to_string()).unwrap_or_default(),
        link_local_ips: None,
    };
    let list = |list: &Vec<String>| (!list.is_empty()).then(|| list.clone());
    let mut settings = EndpointSettings {
        ipam_config: (ipam != EndpointIpamConfig::default()).then_some(ipam),
        links: list(&attachment.links),
        aliases: list(&attachment.aliases),
        mac_address: attachment.mac.map(attach::mac_text).unwrap_or_default(),
        gw_priority: attachment.gateway_priority,
        driver_opts: (!attachment.options.is_empty()).then(|| attachment.options.clone()),
        network_id: attachment.network.clone(),
        dns_names: user_defined.then(|| dns_names(record, attachment)),
        ..EndpointSettings::default()
    };
    let (Some(endpoint), true) = (&attachment.endpoint, running) else { return settings };
    settings.endpoint_id.clone_from(&endpoint.id);
    settings.mac_address = attach::mac_text(endpoint.mac);
    let gateway = |ipv6| {
        let network = network.filter(|network| !network.internal)?;
        Some(network.subnet(ipv6)?.gateway.to_string())
    };
    if let Some(address) = endpoint.address(false) {
        settings.ip_address = address.addr().to_string();
        settings.ip_prefix_len = address.prefix_len().into();
        settings.gateway = gateway(false).unwrap_or_default();
    }
    if let Some(address) = endpoint.address(true) {
        settings.global_ipv6_address = address.addr().to_string();
        settings.global_ipv6_prefix_len = address.prefix_len().into();
        settings.ipv6_gateway = gateway(true).unwrap_or_default();
    }
    settings
}

/// The names by which neighbours find a container: its own, its aliases, its short id, its host name.
fn dns_names(record: &Record, attachment: &Attachment) -> Vec<String> {
    let short = record.id.get(..12).unwrap_or(&record.id).to_owned();
    let all = std::iter::once(record.name.clone())
        .chain(attachment.aliases.iter().cloned())
        .chain([short, record.config.hostname.clone()]);
    let mut names = Vec::new();
    for name in all.filter(|name| !name.is_empty()) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

/// `NetworkSettings.Ports`: what is published, and null for what is only exposed. Of a container that does not
/// run, nothing.
pub(crate) fn port_map(record: &Record, running: bool) -> PortMap {
    let mut ports = PortMap::new();
    if !running {
        return ports;
    }
    for port in record.config.exposed_ports.iter().flatten().map(|(port, _)| port) {
        let port = if port.contains('/') { port.clone() } else { format!("{port}/tcp") };
        ports.insert(port, None);
    }
    for published in endpoints(record).flat_map(|endpoint| &endpoint.ports) {
        let key = format!("{}/{}", published.port, published.protocol.name());
        ports.entry(key).or_default().get_or_insert_default().push(PortBinding {
            host_ip: published.host_address.to_string(),
            host_port: published.host_port.to_string(),
        });
    }
    ports
}

/// What a container has in its networks.
pub(crate) fn endpoints(record: &Record) -> impl Iterator<Item = &Endpoint> {
    record.networks.values().filter_map(|attachment| attachment.endpoint.as_ref())
}
