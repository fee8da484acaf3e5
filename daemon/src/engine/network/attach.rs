//! What a container asks of networks → its attachments. In Docker's words where it is refused.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use super::{
    Networks, egress,
    record::{Attachment, Driver, Network, Subnet},
};
use crate::{
    api::types::{
        container::{Config, HostConfig},
        network::{EndpointSettings, NetworkingConfig},
    },
    engine::{Error, Result},
};

/// More would not fit into anything that shows them.
const MAX_NAMES: usize = 256;

/// The attachments of a new container, by the networks' names.
///
/// # Errors
/// No such network; something that cannot be had in it.
pub(crate) fn attachments(
    networks: &Networks,
    daemon: &crate::config::Config,
    config: &Config,
    host: &HostConfig,
    asked: &NetworkingConfig,
) -> Result<BTreeMap<String, Attachment>> {
    egress::policy_of(config.labels.as_ref(), daemon).map_err(|error| Error::invalid(error.to_string()))?;
    let primary = match host.network_mode.as_str() {
        _ if config.network_disabled => "none",
        "" | "default" => "bridge",
        mode => mode,
    };
    let primary = networks.find(primary)?;
    let mut all = BTreeMap::new();
    for (name, settings) in asked.endpoints_config.iter().flatten() {
        let network = match name.as_str() {
            "" | "default" => Arc::clone(&primary),
            name => networks.find(name)?,
        };
        let attachment = attachment(&network, settings)?;
        if all.insert(network.name.clone(), attachment).is_some() {
            return Err(Error::invalid(format!("network {} is named twice", network.name)));
        }
    }
    if !all.contains_key(&primary.name) {
        all.insert(primary.name.clone(), attachment(&primary, &EndpointSettings::default())?);
    }
    let nowhere = |name: &String| networks.find(name).is_ok_and(|network| network.driver == Driver::Null);
    if all.len() > 1 && all.keys().any(nowhere) {
        return Err(Error::invalid(
            "container cannot be connected to multiple networks with one of the networks in private (none) mode",
        ));
    }
    if let Some(first) = all.get_mut(&primary.name)
        && !config.mac_address.is_empty()
    {
        let mac = mac(&config.mac_address)?;
        if first.mac.is_some_and(|own| own != mac) {
            return Err(Error::invalid(
                "the container-wide MAC address must match the endpoint-specific MAC address for the main network, or \
                 should be left empty",
            ));
        }
        if primary.driver == Driver::Null {
            return Err(Error::invalid("conflicting options: mac-address and the network mode"));
        }
        first.mac = Some(mac);
    }
    Ok(all)
}

/// What of the attachments has no effect.
pub(crate) fn warnings(networks: &Networks, attachments: &BTreeMap<String, Attachment>) -> Vec<String> {
    let mut warnings = Vec::new();
    for (name, attachment) in attachments {
        for option in attachment.options.keys() {
            warnings.push(format!("The option {option} means nothing to the network {name}: Discarded."));
        }
        for address in [attachment.ipv4, attachment.ipv6].into_iter().flatten() {
            if networks.find(&attachment.network).is_ok_and(|network| network.idly_contains(&address)) {
                let family = if address.is_ipv6() { "IPv6" } else { "IPv4" };
                warnings.push(format!("The network {name} has no {family}: {address} is not used."));
            }
        }
    }
    warnings
}

/// What is asked of one network.
///
/// # Errors
/// It cannot be had there.
pub(crate) fn attachment(network: &Network, settings: &EndpointSettings) -> Result<Attachment> {
    let list = |list: &Option<Vec<String>>| list.clone().unwrap_or_default();
    let (aliases, links) = (list(&settings.aliases), list(&settings.links));
    let default = network.is_predefined();
    if default && !aliases.is_empty() {
        return Err(Error::invalid(
            "network-scoped alias is supported only for containers in user defined networks",
        ));
    }
    if aliases.len() + links.len() > MAX_NAMES {
        return Err(Error::invalid(format!("more than {MAX_NAMES} aliases and links")));
    }
    if let Some(wrong) = aliases.iter().find(|alias| !is_name(alias)) {
        return Err(Error::invalid(format!("invalid network alias: {wrong:?}")));
    }
    if default && !links.is_empty() {
        return Err(Error::not_implemented("links are supported in user-defined networks only"));
    }
    for link in &links {
        let (name, alias) = link.split_once(':').unwrap_or((link, link));
        if !is_name(name.trim_start_matches('/')) || !is_name(alias) {
            return Err(Error::invalid(format!("bad format for links: {link}")));
        }
    }
    let ipam = settings.ipam_config.clone().unwrap_or_default();
    if ipam.link_local_ips.is_some_and(|list| !list.is_empty()) {
        return Err(Error::not_implemented("link-local addresses (--link-local-ip) are not supported"));
    }
    let options = settings.driver_opts.clone().unwrap_or_default();
    // Those of other drivers are kept for whoever knows them, as Docker keeps them.
    if let Some(option) = options.keys().find(|name| name.starts_with("com.docker.network.")) {
        return Err(Error::not_implemented(format!("the option {option} of an endpoint is not supported")));
    }
    let mac = match settings.mac_address.as_str() {
        "" => None,
        _ if network.driver == Driver::Null => {
            return Err(Error::invalid("conflicting options: mac-address and the network mode"));
        }
        text => Some(mac(text)?),
    };
    Ok(Attachment {
        network: network.id.clone(),
        ipv4: address(network, &ipam.ipv4_address, false)?,
        ipv6: address(network, &ipam.ipv6_address, true)?,
        mac,
        aliases,
        links,
        options,
        gateway_priority: settings.gw_priority,
        endpoint: None,
    })
}

fn address(network: &Network, text: &str, ipv6: bool) -> Result<Option<IpAddr>> {
    if text.is_empty() {
        return Ok(None);
    }
    let address = text.parse::<IpAddr>().ok().filter(|address| address.is_ipv6() == ipv6);
    let family = if ipv6 { "IPv6" } else { "IPv4" };
    let address = address.ok_or_else(|| Error::invalid(format!("invalid {family} address: {text}")))?;
    if network.is_predefined() {
        return Err(Error::invalid("user specified IP address is supported on user defined networks only"));
    }
    if network.idly_contains(&address) {
        return Ok(Some(address));
    }
    match network.subnet(ipv6) {
        Some(Subnet { chosen: false, .. }) | None => Err(Error::invalid(
            "invalid endpoint settings:\nuser specified IP address is supported only when connecting to networks with \
             user configured subnets",
        )),
        Some(Subnet { subnet, .. }) if !subnet.contains(&address) => Err(Error::invalid(format!(
            "invalid endpoint settings:\nno configured subnet contains IP address {address}"
        ))),
        Some(_) => Ok(Some(address)),
    }
}

/// A name that can be asked for.
fn is_name(text: &str) -> bool {
    (1..=255).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'/' | b':' | b'"' | b'\\'))
}

/// A unicast MAC address.
///
/// # Errors
/// In Docker's words.
pub(crate) fn mac(text: &str) -> Result<[u8; 6]> {
    let wrong = || Error::invalid(format!("{text} is not a valid mac address"));
    let mut mac = [0; 6];
    let mut parts = text.split([':', '-']);
    for byte in &mut mac {
        let part = parts.next().filter(|part| part.len() == 2).ok_or_else(wrong)?;
        *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
    }
    if parts.next().is_some() || mac[0] & 1 != 0 || mac == [0; 6] { Err(wrong()) } else { Ok(mac) }
}

/// As `02:42:ac:11:00:02`.
pub(crate) fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// The name of the network whose gateway is the default route of a family: that of the highest priority, of
/// those the first by name.
pub(crate) fn gateway_network(
    attachments: &BTreeMap<String, Attachment>,
    ipv6: bool,
    network: impl Fn(&str) -> Option<Arc<Network>>,
) -> Option<String> {
    let leads_out =
        |name: &str| network(name).is_some_and(|network| !network.internal && network.subnet(ipv6).is_some());
    let out = attachments.iter().filter(|(name, _)| leads_out(name));
    let best = out.max_by(|(a, first), (b, second)| {
        first.gateway_priority.cmp(&second.gateway_priority).then_with(|| b.cmp(a))
    });
    best.map(|(name, _)| name.clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        api::types::network::IpamConfig,
        engine::network::{bare, record::Driver},
    };

    fn network(name: &str, chosen: bool) -> Network {
        let subnet = Subnet {
            subnet: "10.0.0.0/24".parse().unwrap(),
            chosen,
            range: None,
            gateway: "10.0.0.1".parse().unwrap(),
            auxiliary: BTreeMap::new(),
        };
        Network { subnets: vec![subnet], ..bare(name, Driver::Bridge) }
    }

    #[test]
    fn what_belongs_to_a_family_that_is_off_or_to_another_driver_is_kept() {
        let idle = vec![IpamConfig { subnet: "2001:db8::/64".into(), ..IpamConfig::default() }];
        let network = Network { idle, ..network("net", true) };
        let mut settings = with_address("10.0.0.9");
        settings.ipam_config.get_or_insert_default().ipv6_address = "2001:db8::9".into();
        settings.driver_opts = Some([("org.example.colour".to_owned(), "red".to_owned())].into());
        let attached = attachment(&network, &settings).unwrap();
        assert_eq!(attached.ipv6, Some("2001:db8::9".parse().unwrap()));
        assert_eq!(attached.options, settings.driver_opts.clone().unwrap());
        settings.driver_opts =
            Some([("com.docker.network.endpoint.sysctls".to_owned(), String::new())].into());
        assert!(attachment(&network, &settings).is_err(), "one of ours, without an effect");
        let mut elsewhere = with_address("10.0.0.9");
        elsewhere.ipam_config.get_or_insert_default().ipv6_address = "2001:db9::9".into();
        assert!(attachment(&network, &elsewhere).is_err());
    }

    fn with_address(address: &str) -> EndpointSettings {
        let mut settings = EndpointSettings::default();
        settings.ipam_config.get_or_insert_default().ipv4_address = address.into();
        settings
    }

    #[test]
    fn addresses_are_taken_where_the_user_chose_the_subnet() {
        let own = attachment(&network("n", true), &with_address("10.0.0.9")).unwrap();
        assert_eq!(own.ipv4, Some("10.0.0.9".parse().unwrap()));
        for (network, address, message) in [
            (network("n", false), "10.0.0.9", "user configured subnets"),
            (network("n", true), "10.0.1.9", "no configured subnet contains IP address 10.0.1.9"),
            (network("bridge", false), "10.0.0.9", "supported on user defined networks only"),
            (network("n", true), "fd00::1", "invalid IPv4 address: fd00::1"),
        ] {
            let error = attachment(&network, &with_address(address)).unwrap_err();
            assert!(error.message.contains(message), "{}", error.message);
        }
    }

    #[test]
    fn names_and_mac_addresses_are_checked() {
        let aliases = |aliases: &[&str]| EndpointSettings {
            aliases: Some(aliases.iter().map(|alias| (*alias).to_owned()).collect()),
            ..EndpointSettings::default()
        };
        assert!(attachment(&network("n", true), &aliases(&["db", "my_db.local"])).is_ok());
        assert!(attachment(&network("n", true), &aliases(&["a b"])).is_err());
        assert!(attachment(&network("bridge", true), &aliases(&["db"])).is_err());
        assert_eq!(mac("02:42:AC-11-00-02").unwrap(), [2, 0x42, 0xac, 0x11, 0, 2]);
        for wrong in [
            "",
            "02:42",
            "02:42:ac:11:00:02:03",
            "01:00:00:00:00:00",
            "00:00:00:00:00:00",
            "2:42:ac:11:00:02",
        ] {
            assert!(mac(wrong).is_err(), "{wrong}");
        }
        assert_eq!(mac_text([2, 0x42, 0xac, 0x11, 0, 2]), "02:42:ac:11:00:02");
    }

    #[test]
    fn the_default_route_is_the_priority_s_then_the_first_name_s() {
        let attached = |entries: &[(&str, i64)]| {
            let entry = |(name, gateway_priority): &(&str, i64)| {
                (
                    (*name).to_owned(),
                    Attachment { gateway_priority: *gateway_priority, ..Attachment::default() },
                )
            };
            entries.iter().map(entry).collect::<BTreeMap<_, _>>()
        };
        let lookup = |name: &str| {
            let network = network(name, true);
            Some(Arc::new(Network { internal: name.starts_with("in"), ..network }))
        };
        let of = |entries: &[(&str, i64)]| gateway_network(&attached(entries), false, lookup);
        assert_eq!(of(&[("b", 0), ("a", 0)]).as_deref(), Some("a"));
        assert_eq!(of(&[("b", 1), ("a", 0)]).as_deref(), Some("b"));
        assert_eq!(of(&[("inside", 9), ("z", 0)]).as_deref(), Some("z"));
        assert_eq!(of(&[("inside", 9)]), None);
        assert_eq!(gateway_network(&attached(&[("a", 0)]), true, lookup), None);
    }
}
