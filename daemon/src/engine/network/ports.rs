//! Published ports: what a container asks for, and binding it on the host.

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use super::record::{Endpoint, Protocol, Published};
use crate::{
    api::types::container::{Config, HostConfig},
    engine::{Error, Result},
    hostnet::{BoundPort, Forward},
};

/// A port that a container wants published.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Wanted {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// The container's.
    pub port: u16,
    /// The host's address; None: every one, or the network's own.
    pub host_address: Option<IpAddr>,
    /// The host's ports to choose from, first to last; 0 is any.
    pub host_ports: (u16, u16),
}

/// How many ports one container may publish: each is a socket and a rule.
const MAX: usize = 4096;

/// A port as `80/tcp`; without a protocol it is TCP.
///
/// # Errors
/// In Docker's words.
pub fn parse_port(text: &str) -> Result<(u16, Protocol)> {
    let (number, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    let protocol = match protocol.to_ascii_lowercase().as_str() {
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        "sctp" => {
            return Err(Error::not_implemented(format!(
                "invalid port {text}: SCTP is not supported, neither by the packet filter's rules nor by the proxy"
            )));
        }
        other => return Err(Error::invalid(format!("invalid proto: {other}"))),
    };
    match number.parse::<u16>() {
        Ok(port) if port > 0 => Ok((port, protocol)),
        _ => Err(Error::invalid(format!("invalid port number: {number}"))),
    }
}

/// The ports that a container wants published, in order.
///
/// # Errors
/// In Docker's words.
pub fn wanted(config: &Config, host: &HostConfig) -> Result<Vec<Wanted>> {
    let mut all = BTreeSet::new();
    for (port, bindings) in host.port_bindings.iter().flatten() {
        let (port, protocol) = parse_port(port)?;
        for binding in bindings.iter().flatten() {
            let host_address = match binding.host_ip.trim_matches(['[', ']']) {
                "" => None,
                text => {
                    Some(text.parse().map_err(|_| Error::invalid(format!("invalid IP address: {text}")))?)
                }
            };
            let host_ports = host_ports(&binding.host_port)?;
            all.insert(Wanted { protocol, port, host_address, host_ports });
        }
    }
    if host.publish_all_ports {
        for text in config.exposed_ports.iter().flatten().map(|(port, _)| port) {
            let (port, protocol) = parse_port(text)?;
            if !all.iter().any(|wanted| (wanted.port, wanted.protocol) == (port, protocol)) {
                all.insert(Wanted { protocol, port, host_address: None, host_ports: (0, 0) });
            }
        }
    }
    if all.len() > MAX {
        return Err(Error::invalid(format!("a container can publish {MAX} ports, not {}", all.len())));
    }
    Ok(all.into_iter().collect())
}

fn host_ports(text: &str) -> Result<(u16, u16)> {
    let wrong = || Error::invalid(format!("invalid port specification: {text:?}"));
    let (first, last) = match text.split_once('-') {
        _ if text.is_empty() => return Ok((0, 0)),
        None => (text, text),
        Some(range) => range,
    };
    let (first, last) = (first.parse().map_err(|_| wrong())?, last.parse().map_err(|_| wrong())?);
    if first > last { Err(wrong()) } else { Ok((first, last)) }
}

/// A bound port, where it leads, and its record.
pub type Binding = (BoundPort, Forward, Published);

/// Binds all that is wanted to lead to an endpoint. On an error nothing stays bound.
///
/// # Errors
/// In Docker's words.
pub fn bind(wanted: &[Wanted], endpoint: &Endpoint, default: Option<IpAddr>) -> Result<Vec<Binding>> {
    let mut bindings = Vec::new();
    for port in wanted {
        bind_one(port, endpoint, default, &mut bindings)?;
    }
    Ok(bindings)
}

fn bind_one(
    wanted: &Wanted,
    endpoint: &Endpoint,
    default: Option<IpAddr>,
    bindings: &mut Vec<Binding>,
) -> Result<()> {
    let addresses = match wanted.host_address.or(default) {
        Some(address) => vec![address],
        None => vec![Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()],
    };
    let (first, last) = wanted.host_ports;
    let any = first == 0;
    // Of any free port, one that both families have is wanted; of a range, the first.
    let attempts: Vec<u16> = if any { vec![0; 16] } else { (first..=last).collect() };
    let mut refusal = None;
    for port in attempts {
        match bind_addresses(wanted, endpoint, &addresses, port) {
            Ok(bound) => {
                bindings.extend(bound);
                return Ok(());
            }
            Err((address, error)) => refusal = Some((address, error)),
        }
    }
    let Some((address, error)) = refusal else {
        return Err(Error::invalid("invalid port range"));
    };
    let name = wanted.protocol.name();
    Err(match error.kind() {
        io::ErrorKind::AddrInUse => {
            Error::internal(format!("Bind for {address} failed: port is already allocated"))
        }
        _ => Error::internal(format!(
            "failed to bind host port for {address}/{name}: {}",
            crate::engine::network::words(&error)
        )),
    })
}

fn bind_addresses(
    wanted: &Wanted,
    endpoint: &Endpoint,
    addresses: &[IpAddr],
    port: u16,
) -> std::result::Result<Vec<Binding>, (SocketAddr, io::Error)> {
    let mut bound: Vec<Binding> = Vec::new();
    for address in addresses {
        let port = bound.first().map_or(port, |(first, ..)| first.address().port());
        let Some(to) = endpoint.address(address.is_ipv6()).or_else(|| endpoint.address(!address.is_ipv6()))
        else {
            continue;
        };
        let host = SocketAddr::new(*address, port);
        match BoundPort::bind(wanted.protocol.name(), host) {
            Ok(socket) => {
                let host = SocketAddr::new(*address, socket.address().port());
                let to = SocketAddr::new(to.addr(), wanted.port);
                let forward = Forward { protocol: wanted.protocol.name(), host, to };
                let published = Published {
                    protocol: wanted.protocol,
                    port: wanted.port,
                    host_address: *address,
                    host_port: host.port(),
                };
                bound.push((socket, forward, published));
            }
            // A host without IPv6: nobody asked for it by name.
            Err(error) if addresses.len() > 1 && address.is_ipv6() && is_no_family(&error) => {}
            Err(error) => return Err((host, error)),
        }
    }
    Ok(bound)
}

fn is_no_family(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL))
}

/// Binds again what an earlier daemon had bound. What somebody else has taken in the meantime is told and left.
pub fn bind_again(endpoint: &Endpoint) -> Vec<Binding> {
    let mut bindings = Vec::new();
    for published in &endpoint.ports {
        let host = SocketAddr::new(published.host_address, published.host_port);
        let ipv6 = published.host_address.is_ipv6();
        let Some(to) = endpoint.address(ipv6).or_else(|| endpoint.address(!ipv6)) else { continue };
        match BoundPort::bind(published.protocol.name(), host) {
            Ok(socket) => {
                let to = SocketAddr::new(to.addr(), published.port);
                let forward = Forward { protocol: published.protocol.name(), host, to };
                bindings.push((socket, forward, published.clone()));
            }
            Err(error) => {
                tracing::error!(%host, protocol = published.protocol.name(), %error, "a published port is lost");
            }
        }
    }
    bindings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::types::{Empty, network::PortBinding};

    fn host(ports: &[(&str, &str, &str)]) -> HostConfig {
        let mut map = crate::api::types::network::PortMap::new();
        for (port, host_ip, host_port) in ports {
            let binding = PortBinding { host_ip: (*host_ip).into(), host_port: (*host_port).into() };
            map.entry((*port).to_owned()).or_default().get_or_insert_default().push(binding);
        }
        HostConfig { port_bindings: Some(map), ..HostConfig::default() }
    }

    #[test]
    fn what_is_wanted_is_read() {
        let host = host(&[("80/tcp", "", "8080"), ("53/udp", "[::1]", ""), ("90", "127.0.0.1", "9000-9010")]);
        let wanted = wanted(&Config::default(), &host).unwrap();
        let text = |wanted: &Wanted| {
            format!("{:?} {} {:?} {:?}", wanted.protocol, wanted.port, wanted.host_address, wanted.host_ports)
        };
        assert_eq!(
            wanted.iter().map(text).collect::<Vec<_>>(),
            ["Tcp 80 None (8080, 8080)", "Tcp 90 Some(127.0.0.1) (9000, 9010)", "Udp 53 Some(::1) (0, 0)"]
        );
    }

    #[test]
    fn all_exposed_ports_are_published_once() {
        let config = Config {
            exposed_ports: Some([("80/tcp".to_owned(), Empty {}), ("81/tcp".to_owned(), Empty {})].into()),
            ..Config::default()
        };
        let host = HostConfig { publish_all_ports: true, ..host(&[("80/tcp", "", "8080")]) };
        let wanted = wanted(&config, &host).unwrap();
        assert_eq!(
            wanted.iter().map(|port| (port.port, port.host_ports.0)).collect::<Vec<_>>(),
            [(80, 8080), (81, 0)]
        );
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for (port, host_ip, host_port, message) in [
            ("0/tcp", "", "", "invalid port number: 0"),
            ("80/ip", "", "", "invalid proto: ip"),
            ("80/sctp", "", "", "invalid port 80/sctp: SCTP is not supported"),
            ("80/tcp", "here", "", "invalid IP address: here"),
            ("80/tcp", "", "9-8", "invalid port specification: \"9-8\""),
            ("80/tcp", "", "x", "invalid port specification: \"x\""),
            ("80/tcp", "", "70000", "invalid port specification"),
        ] {
            let error = wanted(&Config::default(), &host(&[(port, host_ip, host_port)])).unwrap_err();
            assert!(error.message.starts_with(message), "{}", error.message);
        }
    }

    fn endpoint() -> Endpoint {
        Endpoint {
            id: "e".into(),
            slot: 0,
            interface: "eth0".into(),
            tap: "bht-e".into(),
            mac: [2; 6],
            addresses: vec!["172.17.0.2/16".parse().unwrap()],
            ports: vec![],
        }
    }

    #[tokio::test]
    async fn a_port_in_use_is_refused_in_dockers_words_and_a_range_steps_over_it() {
        let local = Some("127.0.0.1".parse().unwrap());
        let want = |first, last| Wanted {
            protocol: Protocol::Tcp,
            port: 80,
            host_address: local,
            host_ports: (first, last),
        };
        let first = bind(&[want(0, 0)], &endpoint(), None).unwrap();
        let port = first[0].2.host_port;
        assert_eq!(first[0].1.to.to_string(), "172.17.0.2:80");
        let error = bind(&[want(port, port)], &endpoint(), None).err().unwrap();
        assert_eq!(error.message, format!("Bind for 127.0.0.1:{port} failed: port is already allocated"));
        if port < u16::MAX - 50 {
            let second = bind(&[want(port, port + 50)], &endpoint(), None).unwrap();
            assert!(second[0].2.host_port > port);
        }
        drop(first);
        bind(&[want(port, port)], &endpoint(), None).unwrap();
    }

    #[tokio::test]
    async fn without_a_host_address_both_families_have_the_same_port() {
        let want = Wanted { protocol: Protocol::Udp, port: 53, host_address: None, host_ports: (0, 0) };
        let bound = bind(&[want], &endpoint(), None).unwrap();
        let ports: BTreeSet<u16> = bound.iter().map(|(_, _, published)| published.host_port).collect();
        assert_eq!(ports.len(), 1);
        assert!(bound.iter().all(|(_, forward, _)| forward.to.is_ipv4()));
    }
}
