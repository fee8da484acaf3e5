//! A create request → a network's record. Pure, and in Docker's words where it refuses.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;
use jiff::Timestamp;

use super::{
    ipam::{self, PoolSpec},
    record::{Driver, Network, Settings, Subnet, VERSION, is_predefined},
};
use crate::{
    api::types::network::{CreateRequest, Ipam, IpamConfig},
    engine::{Error, Result},
};

/// The names of options.
pub mod option {
    /// The bridge's name on the host.
    pub const BRIDGE: &str = "com.docker.network.bridge.name";
    /// Whether containers reach each other.
    pub const ICC: &str = "com.docker.network.bridge.enable_icc";
    /// Whether containers leave with the host's address.
    pub const MASQUERADE: &str = "com.docker.network.bridge.enable_ip_masquerade";
    /// Where ports are published that do not say.
    pub const BINDING: &str = "com.docker.network.bridge.host_binding_ipv4";
    /// The MTU.
    pub const MTU: &str = "com.docker.network.driver.mtu";
    /// That it is the default network: shown by Docker.
    pub const DEFAULT: &str = "com.docker.network.bridge.default_bridge";
    /// What interfaces in containers are called.
    pub const PREFIX: &str = "com.docker.network.container_iface_prefix";
    /// IPv4 by option.
    pub const IPV4: &str = "com.docker.network.enable_ipv4";
    /// IPv6 by option.
    pub const IPV6: &str = "com.docker.network.enable_ipv6";
    /// Ours: whether 169.254.169.254 is reached.
    pub const METADATA: &str = "bulkhead.network.metadata";
}

/// What a request is judged by.
pub struct Surroundings<'a> {
    /// Blocks to cut subnets from.
    pub pools: &'a [PoolSpec],
    /// Subnets of other networks.
    pub networks: &'a [IpNet],
    /// What else the host uses: only avoided, since a user who names a subnet may mean it.
    pub host: &'a [IpNet],
    /// Bridges of other networks.
    pub bridges: &'a [String],
    /// The MTU of networks that do not say.
    pub mtu: u16,
}

/// The record of a new network.
///
/// # Errors
/// In Docker's words.
pub fn record(
    request: CreateRequest,
    id: String,
    now: Timestamp,
    around: &Surroundings<'_>,
) -> Result<Network> {
    let CreateRequest { name, driver, enable_ipv4, enable_ipv6, ipam, internal, attachable, .. } = request;
    if is_predefined(&name) {
        return Err(Error::forbidden(format!("operation is not permitted on predefined {name} network ")));
    }
    check_name(&name)?;
    check_driver(&driver)?;
    if request.ingress {
        return Err(Error::invalid("ingress network can only be created in swarm mode"));
    }
    if request.config_only || request.config_from.is_some_and(|from| !from.network.is_empty()) {
        return Err(Error::not_implemented("configuration-only networks are not supported"));
    }
    if !matches!(request.scope.as_str(), "" | "local") {
        return Err(Error::invalid(format!("networks of scope {:?} need a swarm", request.scope)));
    }
    let mut options = request.options.unwrap_or_default();
    let ipv4 = family(enable_ipv4, &mut options, option::IPV4, true)?;
    let ipv6 = family(enable_ipv6, &mut options, option::IPV6, false)?;
    if !ipv4 && !ipv6 {
        return Err(Error::invalid("IPv4 or IPv6 must be enabled"));
    }
    let ipam = ipam.unwrap_or_default();
    check_ipam(&ipam, ipv6)?;
    let (mut subnets, mut idle) = (Vec::new(), Vec::new());
    for (enabled, is_ipv6) in [(ipv4, false), (ipv6, true)] {
        if enabled {
            subnets.push(subnet(&ipam, is_ipv6, around)?);
        } else {
            let of_family = |config: &&IpamConfig| {
                config.subnet.parse::<IpNet>().is_ok_and(|subnet| subnet.addr().is_ipv6() == is_ipv6)
            };
            idle.extend(ipam.config.iter().flatten().filter(of_family).cloned());
        }
    }
    let settings = settings(&options, &id, around)?;
    Ok(Network {
        version: VERSION,
        id,
        name,
        created: now,
        driver: Driver::Bridge,
        ipv4,
        ipv6,
        internal,
        attachable,
        subnets,
        idle,
        ipam_options: ipam.options,
        options,
        settings,
        labels: request.labels.unwrap_or_default(),
    })
}

fn check_name(name: &str) -> Result<()> {
    if name.trim().is_empty() {
        return Err(Error::invalid("invalid name: name is empty"));
    }
    if name.len() > 255 || name.chars().any(|c| c.is_control() || c == '/') {
        return Err(Error::invalid(format!("invalid name: {name:?}")));
    }
    Ok(())
}

fn check_driver(driver: &str) -> Result<()> {
    match driver {
        "" | "bridge" => Ok(()),
        "host" | "null" => {
            Err(Error::forbidden(format!("only one instance of \"{driver}\" network is allowed")))
        }
        "overlay" => Err(Error::forbidden(
            "This node is not a swarm manager. Use \"docker swarm init\" or \"docker swarm join\" to connect this \
             node to swarm and try again.",
        )),
        "macvlan" | "ipvlan" => Err(Error::not_implemented(format!(
            "networks of driver {driver} are not supported: a microVM's interface is a port of a bridge"
        ))),
        other => Err(Error::not_found(format!(
            "could not find plugin {other} in v1 plugin registry: plugin not found"
        ))),
    }
}

/// Whether a family is on: by the field, else by an option, else by default.
fn family(
    field: Option<bool>,
    options: &mut BTreeMap<String, String>,
    name: &str,
    default: bool,
) -> Result<bool> {
    match field {
        Some(enabled) => {
            options.remove(name);
            Ok(enabled)
        }
        None => match options.get(name) {
            None => Ok(default),
            Some(text) => boolean(text)
                .ok_or_else(|| Error::invalid(format!("driver-opt {name:?} is not a valid bool"))),
        },
    }
}

/// Go's reading of a boolean.
fn boolean(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

/// Every fault of the address management at once, each a line, as Docker tells them.
fn check_ipam(ipam: &Ipam, ipv6: bool) -> Result<()> {
    if !matches!(ipam.driver.as_str(), "" | "default") {
        return Err(Error::not_found(format!("failed to find ipam driver {:?}", ipam.driver)));
    }
    let mut faults = Vec::new();
    for config in ipam.config.iter().flatten() {
        match config.subnet.parse::<IpNet>() {
            Err(_) => {
                faults.push(format!("invalid subnet {}: invalid CIDR block notation", config.subnet));
            }
            Ok(subnet) if subnet.addr().is_ipv6() && !ipv6 => {}
            Ok(subnet) => check_config(config, subnet, &mut faults),
        }
    }
    if !faults.is_empty() {
        return Err(Error::invalid(format!("invalid network config:\n{}", faults.join("\n"))));
    }
    for family in [false, true] {
        let of = |config: &&IpamConfig| {
            config.subnet.parse::<IpNet>().is_ok_and(|subnet| subnet.addr().is_ipv6() == family)
        };
        if ipam.config.iter().flatten().filter(of).count() > 1 {
            let name = if family { "IPv6" } else { "IPv4" };
            return Err(Error::forbidden(format!("bridge driver doesn't support multiple {name} subnets")));
        }
    }
    Ok(())
}

fn check_config(config: &IpamConfig, subnet: IpNet, faults: &mut Vec<String>) {
    let family = if subnet.addr().is_ipv6() { "IPv6" } else { "IPv4" };
    if subnet != subnet.trunc() {
        faults.push(format!("invalid subnet {subnet}: it should be {}", subnet.trunc()));
    }
    let text = &config.ip_range;
    match text.parse::<IpNet>() {
        _ if text.is_empty() => {}
        Err(_) => faults.push(format!("invalid ip-range {text}: invalid CIDR block notation")),
        Ok(range) if range.addr().is_ipv6() != subnet.addr().is_ipv6() => {
            faults.push(format!("invalid ip-range {text}: parent subnet is an {family} block"));
        }
        Ok(range) => {
            if range.prefix_len() < subnet.prefix_len() {
                faults.push(format!(
                    "invalid ip-range {text}: CIDR block is bigger than its parent subnet {subnet}"
                ));
            }
            if range != range.trunc() {
                faults.push(format!("invalid ip-range {range}: it should be {}", range.trunc()));
            }
            if !ipam::overlap(&subnet.trunc(), &range.trunc()) {
                faults.push(format!(
                    "invalid ip-range {text}: parent subnet {subnet} doesn't contain ip-range"
                ));
            }
        }
    }
    let address = |text: &str| match text.parse::<IpAddr>() {
        Err(_) => Some("invalid address".to_owned()),
        Ok(address) if address.is_ipv6() != subnet.addr().is_ipv6() => {
            Some(format!("parent subnet is an {family} block"))
        }
        Ok(address) if !subnet.contains(&address) => {
            Some(format!("parent subnet {subnet} doesn't contain this address"))
        }
        Ok(_) => None,
    };
    if !config.gateway.is_empty()
        && let Some(why) = address(&config.gateway)
    {
        faults.push(format!("invalid gateway {}: {why}", config.gateway));
    }
    for (name, text) in config.auxiliary_addresses.iter().flatten() {
        if let Some(why) = address(text) {
            faults.push(format!("invalid auxiliary address {name}: {why}"));
        }
    }
}

/// The subnet of a family: the user's, or a free one.
fn subnet(ipam: &Ipam, ipv6: bool, around: &Surroundings<'_>) -> Result<Subnet> {
    let parsed = |config: &IpamConfig| config.subnet.parse::<IpNet>().ok();
    let config = ipam
        .config
        .iter()
        .flatten()
        .find(|config| parsed(config).is_some_and(|subnet| subnet.addr().is_ipv6() == ipv6));
    let chosen = config.and_then(parsed);
    let subnet = match chosen {
        Some(subnet) if around.networks.iter().any(|other| ipam::overlap(&subnet, other)) => {
            return Err(Error::forbidden(
                "invalid pool request: Pool overlaps with other one on this address space",
            ));
        }
        Some(subnet) => subnet,
        None => {
            let used = [around.networks, around.host].concat();
            ipam::choose_subnet(around.pools, ipv6, &used)
                .ok_or_else(|| Error::invalid("all predefined address pools have been fully subnetted"))?
        }
    };
    if subnet.prefix_len() > subnet.max_prefix_len() - 1 {
        return Err(Error::invalid(format!(
            "invalid subnet {subnet}: no room for a gateway and a container"
        )));
    }
    let text = |field: fn(&IpamConfig) -> &str| config.map(field).filter(|text| !text.is_empty());
    let range = text(|config| &config.ip_range).and_then(|text| text.parse().ok());
    let mut auxiliary = BTreeMap::new();
    for (name, text) in config.iter().flat_map(|config| config.auxiliary_addresses.iter().flatten()) {
        if let Ok(address) = text.parse() {
            auxiliary.insert(name.clone(), address);
        }
    }
    let mut allocator = ipam::Allocator::new(subnet, None);
    for address in auxiliary.values() {
        let taken = allocator.take(*address);
        taken.map_err(|error| {
            Error::forbidden(format!("failed to allocate secondary ip address ({address}): {error}"))
        })?;
    }
    let gateway = match text(|config| &config.gateway).and_then(|text| text.parse().ok()) {
        Some(gateway) => {
            let taken = allocator.take(gateway);
            taken.map_err(|error| {
                Error::forbidden(format!("failed to allocate gateway ({gateway}): {error}"))
            })?;
            gateway
        }
        None => allocator
            .take_any()
            .map_err(|error| Error::invalid(format!("failed to allocate gateway (): {error}")))?,
    };
    Ok(Subnet { subnet, chosen: chosen.is_some(), range, gateway, auxiliary })
}

/// What options come to. One that is not known is refused: it would be without effect.
pub fn settings(options: &BTreeMap<String, String>, id: &str, around: &Surroundings<'_>) -> Result<Settings> {
    let mut settings = Settings {
        bridge: bridge_name(id),
        mtu: around.mtu,
        icc: true,
        masquerade: true,
        binding: None,
        interface_prefix: "eth".into(),
        metadata: false,
    };
    for (name, value) in options {
        let flag = || {
            boolean(value)
                .ok_or_else(|| Error::invalid(format!("invalid value for {name}: {value:?} is not a bool")))
        };
        match name.as_str() {
            option::BRIDGE => {
                check_interface(value, 15)?;
                if around.bridges.contains(value) {
                    return Err(Error::forbidden(format!("network with bridge name {value} already exists")));
                }
                settings.bridge.clone_from(value);
            }
            option::ICC => settings.icc = flag()?,
            option::MASQUERADE => settings.masquerade = flag()?,
            option::METADATA => settings.metadata = flag()?,
            option::BINDING => {
                let address = value.parse().map_err(|_| {
                    Error::invalid(format!("invalid value for {name}: {value:?} is not an address"))
                })?;
                settings.binding = Some(address);
            }
            option::MTU => {
                let mtu = value.parse::<u16>().ok().filter(|mtu| *mtu == 0 || *mtu >= 68);
                let mtu = mtu.ok_or_else(|| Error::invalid(format!("invalid MTU: {value}")))?;
                settings.mtu = if mtu == 0 { around.mtu } else { mtu };
            }
            option::PREFIX => {
                check_interface(value, 13)?;
                settings.interface_prefix.clone_from(value);
            }
            option::DEFAULT | option::IPV4 | option::IPV6 => {}
            other => {
                return Err(Error::not_implemented(format!(
                    "the option {other} of the bridge driver is not supported"
                )));
            }
        }
    }
    Ok(settings)
}

fn check_interface(name: &str, limit: usize) -> Result<()> {
    let fits = (1..=limit).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'))
        && !name.starts_with(['-', '.'])
        && !matches!(name, "lo" | "all" | "default");
    if fits { Ok(()) } else { Err(Error::invalid(format!("invalid interface name {name:?}"))) }
}

/// A bridge's name on the host when the user gives none.
pub fn bridge_name(id: &str) -> String {
    format!("bh-{}", id.get(..12).unwrap_or(id))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::ErrorKind;

    fn around<'a>(pools: &'a [PoolSpec], networks: &'a [IpNet]) -> Surroundings<'a> {
        Surroundings { pools, networks, host: &[], bridges: &[], mtu: 1500 }
    }

    fn request(text: &str) -> CreateRequest {
        crate::api::types::json::from_slice(text.as_bytes()).unwrap()
    }

    fn created(text: &str) -> Result<Network> {
        let pools = [ipam::default_pools(), vec![ipam::local_pool([1; 5])]].concat();
        let used = ["172.17.0.0/16".parse().unwrap()];
        record(request(text), "ab".repeat(32), Timestamp::UNIX_EPOCH, &around(&pools, &used))
    }

    #[test]
    fn without_a_word_a_network_gets_the_next_pool() {
        let network = created(r#"{"Name":"web"}"#).unwrap();
        let [subnet] = network.subnets.as_slice() else { panic!() };
        assert_eq!(subnet.subnet.to_string(), "172.18.0.0/16");
        assert_eq!(subnet.gateway.to_string(), "172.18.0.1");
        assert!(!subnet.chosen);
        assert_eq!(network.settings.bridge, "bh-abababababab");
        let dual = created(r#"{"Name":"web","EnableIPv6":true}"#).unwrap();
        assert_eq!(dual.subnets[1].gateway.to_string(), "fd01:101:101::1");
    }

    #[test]
    fn the_users_subnet_range_gateway_and_addresses_are_taken() {
        let network = created(
            r#"{"Name":"n","IPAM":{"Config":[{"Subnet":"10.9.0.0/24","IPRange":"10.9.0.128/25","Gateway":"10.9.0.254","AuxiliaryAddresses":{"a":"10.9.0.130"}}]},"Options":{"com.docker.network.bridge.name":"br-mine","com.docker.network.driver.mtu":"9000","com.docker.network.bridge.enable_icc":"false"}}"#,
        )
        .unwrap();
        let subnet = &network.subnets[0];
        assert!(subnet.chosen);
        assert_eq!((subnet.gateway.to_string().as_str(), subnet.auxiliary.len()), ("10.9.0.254", 1));
        let Settings { bridge, mtu, icc, .. } = &network.settings;
        assert_eq!((bridge.as_str(), *mtu, *icc), ("br-mine", 9000, false));
    }

    #[test]
    fn refusals_have_dockers_words_and_kinds() {
        let config = |config: &str| format!(r#"{{"Name":"n","IPAM":{{"Config":[{config}]}}}}"#);
        for (text, kind, message) in [
            (
                r#"{"Name":"bridge"}"#.to_owned(),
                ErrorKind::Forbidden,
                "operation is not permitted on predefined bridge network ",
            ),
            (r#"{"Name":" "}"#.into(), ErrorKind::Invalid, "invalid name: name is empty"),
            (
                r#"{"Name":"n","Driver":"nosuch"}"#.into(),
                ErrorKind::NotFound,
                "could not find plugin nosuch in v1 plugin registry: plugin not found",
            ),
            (
                r#"{"Name":"n","Driver":"host"}"#.into(),
                ErrorKind::Forbidden,
                "only one instance of \"host\" network is allowed",
            ),
            (
                config(r#"{"Subnet":"10.0.0.0"}"#),
                ErrorKind::Invalid,
                "invalid network config:\ninvalid subnet 10.0.0.0: invalid CIDR block notation",
            ),
            (
                config(r#"{"Subnet":"10.0.0.1/24"}"#),
                ErrorKind::Invalid,
                "invalid network config:\ninvalid subnet 10.0.0.1/24: it should be 10.0.0.0/24",
            ),
            (
                config(r#"{"Subnet":"10.0.0.0/24","Gateway":"10.0.1.1"}"#),
                ErrorKind::Invalid,
                "invalid network config:\ninvalid gateway 10.0.1.1: parent subnet 10.0.0.0/24 doesn't contain this address",
            ),
            (
                config(r#"{"Subnet":"10.0.0.0/24","IPRange":"10.0.0.0/16"}"#),
                ErrorKind::Invalid,
                "invalid network config:\ninvalid ip-range 10.0.0.0/16: CIDR block is bigger than its parent subnet 10.0.0.0/24",
            ),
            (
                config(r#"{"Subnet":"172.17.4.0/24"}"#),
                ErrorKind::Forbidden,
                "invalid pool request: Pool overlaps with other one on this address space",
            ),
            (
                config(r#"{"Subnet":"10.0.0.0/24"},{"Subnet":"10.0.1.0/24"}"#),
                ErrorKind::Forbidden,
                "bridge driver doesn't support multiple IPv4 subnets",
            ),
            (
                r#"{"Name":"n","Options":{"com.docker.network.bridge.enable_icc":"maybe"}}"#.into(),
                ErrorKind::Invalid,
                "invalid value for com.docker.network.bridge.enable_icc: \"maybe\" is not a bool",
            ),
            (
                r#"{"Name":"n","Options":{"com.docker.network.bridge.name":"../x"}}"#.into(),
                ErrorKind::Invalid,
                "invalid interface name \"../x\"",
            ),
        ] {
            let error = created(&text).unwrap_err();
            assert_eq!((error.kind, error.message.as_str()), (kind, message), "{text}");
        }
    }

    #[test]
    fn exhausted_pools_are_told() {
        let error =
            record(request(r#"{"Name":"n"}"#), "ab".repeat(32), Timestamp::UNIX_EPOCH, &around(&[], &[]))
                .unwrap_err();
        assert_eq!(error.message, "all predefined address pools have been fully subnetted");
    }
}
