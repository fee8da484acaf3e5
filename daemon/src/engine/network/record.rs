//! A network as it is on disk: one JSON document, replaced as a whole.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::api::types::network::IpamConfig;

/// Version of the document. A later version's is not read.
pub const VERSION: u32 = 1;

/// What a network is to its containers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Driver {
    /// A Linux bridge.
    Bridge,
    /// The host's own network: listed, for clients that look for it, and of no use to a microVM.
    Host,
    /// Nothing but loopback.
    Null,
}

impl Driver {
    /// Docker's word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bridge => "bridge",
            Self::Host => "host",
            Self::Null => "null",
        }
    }
}

/// A network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Network {
    /// [`VERSION`].
    pub version: u32,
    /// 64 hexadecimal digits.
    pub id: String,
    /// The name, unique.
    pub name: String,
    /// When it was made.
    pub created: Timestamp,
    /// The driver.
    pub driver: Driver,
    /// Whether its containers get IPv4 addresses.
    pub ipv4: bool,
    /// Whether its containers get IPv6 addresses.
    pub ipv6: bool,
    /// Whether nothing leads out of it.
    pub internal: bool,
    /// As the user said; without a meaning outside of a swarm.
    pub attachable: bool,
    /// Its subnets, at most one a family.
    pub subnets: Vec<Subnet>,
    /// Subnets of a family that is off, as the user said: shown, and without effect.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub idle: Vec<IpamConfig>,
    /// Options of the address management, as the user said; None: not a word.
    #[serde(default)]
    pub ipam_options: Option<BTreeMap<String, String>>,
    /// Options of the driver, as the user said.
    pub options: BTreeMap<String, String>,
    /// What [`Network::options`] mean.
    pub settings: Settings,
    /// The user's metadata.
    pub labels: BTreeMap<String, String>,
}

/// A subnet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Subnet {
    /// All of it.
    pub subnet: IpNet,
    /// Whether the user chose it: only there may containers ask for addresses.
    pub chosen: bool,
    /// Where addresses come from; None: all of it.
    pub range: Option<IpNet>,
    /// The bridge's own address.
    pub gateway: IpAddr,
    /// Addresses that are not to be given out.
    pub auxiliary: BTreeMap<String, IpAddr>,
}

/// What a bridge's options come to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Settings {
    /// The bridge's name on the host.
    pub bridge: String,
    /// Its MTU and that of its containers.
    pub mtu: u16,
    /// Whether its containers reach each other.
    pub icc: bool,
    /// Whether its containers leave the host with the host's address.
    pub masquerade: bool,
    /// Where ports are published that do not say; None: everywhere.
    pub binding: Option<IpAddr>,
    /// What its containers' interfaces are called, before their numbers.
    pub interface_prefix: String,
    /// Whether the metadata service of clouds is reached.
    pub metadata: bool,
}

impl Network {
    /// The subnet of a family.
    pub fn subnet(&self, ipv6: bool) -> Option<&Subnet> {
        self.subnets.iter().find(|subnet| subnet.subnet.addr().is_ipv6() == ipv6)
    }

    /// Whether a subnet of a family that is off has the address.
    pub fn idly_contains(&self, address: &IpAddr) -> bool {
        let mut subnets = self.idle.iter().filter_map(|config| config.subnet.parse::<IpNet>().ok());
        subnets.any(|subnet| subnet.contains(address))
    }

    /// Whether it is one of the three that are always there.
    pub fn is_predefined(&self) -> bool {
        is_predefined(&self.name)
    }
}

/// Whether this is the name of one of the networks that are always there.
pub fn is_predefined(name: &str) -> bool {
    matches!(name, "bridge" | "host" | "none" | "default")
}

/// A container's place in a network: what it asked for, kept for each start.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Attachment {
    /// The network's id when it was attached.
    pub network: String,
    /// The IPv4 address that it asked for.
    pub ipv4: Option<IpAddr>,
    /// The IPv6 address that it asked for.
    pub ipv6: Option<IpAddr>,
    /// The MAC address that it asked for.
    pub mac: Option<[u8; 6]>,
    /// Further names in the network.
    pub aliases: Vec<String>,
    /// `container:alias`.
    pub links: Vec<String>,
    /// Options of the driver.
    pub options: BTreeMap<String, String>,
    /// Which network's gateway is the default route: the highest, then the first by name.
    pub gateway_priority: i64,
    /// While it runs.
    pub endpoint: Option<Endpoint>,
}

/// A running container's interface in a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Endpoint {
    /// 64 hexadecimal digits.
    pub id: String,
    /// The machine's network slot, from 0.
    pub slot: u8,
    /// Its name in the container.
    pub interface: String,
    /// Its tap on the host.
    pub tap: String,
    /// Its MAC address.
    pub mac: [u8; 6],
    /// Its addresses with their subnets' prefixes, at most one a family.
    pub addresses: Vec<IpNet>,
    /// The published ports, as they are bound.
    pub ports: Vec<Published>,
}

impl Endpoint {
    /// The address of a family.
    pub fn address(&self, ipv6: bool) -> Option<IpNet> {
        self.addresses.iter().copied().find(|net| net.addr().is_ipv6() == ipv6)
    }
}

/// TCP or UDP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Protocol {
    /// `tcp` or `udp`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

/// A published port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Published {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// The container's port.
    pub port: u16,
    /// The host's address; unspecified: all of its family.
    pub host_address: IpAddr,
    /// The host's port.
    pub host_port: u16,
}
