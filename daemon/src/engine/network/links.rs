//! Links in the default bridge (`--link`), from before there were networks with names: a linked container's address
//! stands in `/etc/hosts`, and what it exposes in the environment.
//!
//! ```text
//!   create: NAME:ALIAS ─▶ ID:ALIAS, kept in the host config
//!   start:  the linked one runs? ─▶ hosts, environment
//!   the linked one starts anew, at another address ─▶ the files of all that link to it
//! ```
//! In networks of the user's own a link is an alias, which the resolver knows.

use std::{net::IpAddr, sync::Arc};

use super::{ports::parse_port, record::Protocol};
use crate::{
    api::types::container::{Config, HostConfig},
    engine::{
        Error, Result, Shared,
        container::{Container, record::Record, state::State},
        spec::NetworkFacts,
    },
};

/// The network that links of this kind are for.
const DEFAULT: &str = "bridge";

/// More would not fit into anything that shows them.
const MAX: usize = 256;

/// Puts ids in the place of names, so that a name that is given to another does not lead there.
///
/// # Errors
/// In Docker's words: no such container; not a link.
pub(crate) fn resolve(shared: &Shared, host: &mut HostConfig) -> Result<()> {
    if host.network_mode != DEFAULT {
        return Ok(());
    }
    let Some(links) = &mut host.links else { return Ok(()) };
    if links.len() > MAX {
        return Err(Error::invalid(format!("more than {MAX} links")));
    }
    for link in links {
        let (name, alias) = parse(link)?;
        // Not "not found": clients would take it for the image, and pull that.
        let found = shared.registry.find(name).map_err(|error| {
            Error::invalid(format!("could not get container for {name}: {}", error.message))
        })?;
        *link = format!("{}:{alias}", found.id());
    }
    Ok(())
}

/// `NAME`, `NAME:ALIAS`, or as it is inspected: `/NAME:/PARENT/ALIAS`.
fn parse(link: &str) -> Result<(&str, &str)> {
    let wrong = || Error::invalid(format!("bad format for links: {link}"));
    if link.is_empty() {
        return Err(Error::invalid("empty string specified for links"));
    }
    let (name, alias) = link.split_once(':').unwrap_or((link, link));
    let (name, alias) = match name.strip_prefix('/') {
        Some(bare) => (bare, alias.rsplit('/').next().unwrap_or_default()),
        None => (name, alias),
    };
    let is_name = |text: &str| {
        (1..=255).contains(&text.len())
            && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-'))
    };
    if is_name(name) && is_name(alias) { Ok((name, alias)) } else { Err(wrong()) }
}

/// The links of a container in the default bridge: who, and what it calls them. Those that are gone are no more.
fn all<'a>(shared: &'a Shared, record: &'a Record) -> impl Iterator<Item = (Arc<Container>, &'a str)> {
    let legacy = record.host_config.network_mode == DEFAULT;
    record.host_config.links.iter().flatten().filter(move |_| legacy).filter_map(|link| {
        let (id, alias) = link.split_once(':')?;
        Some((shared.registry.find(id).ok()?, alias))
    })
}

/// A container's host config without the link that it calls `alias`; None when it has none of that name.
pub(crate) fn without(record: &Record, alias: &str) -> Option<HostConfig> {
    let mut host = record.host_config.clone();
    let links = host.links.as_mut().filter(|_| record.host_config.network_mode == DEFAULT)?;
    let before = links.len();
    links.retain(|link| link.split_once(':').is_none_or(|(_, other)| other != alias));
    (links.len() < before).then_some(host)
}

/// The addresses that a running container has in the default bridge.
fn addresses(record: &Record) -> Option<Vec<IpAddr>> {
    let running = matches!(record.life.state, State::Running(_));
    let endpoint = record.networks.get(DEFAULT)?.endpoint.as_ref().filter(|_| running)?;
    Some(endpoint.addresses.iter().map(ipnet::IpNet::addr).collect())
}

/// Whether a container can be started as far as its links go.
///
/// # Errors
/// In Docker's words: a linked one does not run, or is not in the default bridge.
pub(crate) fn check(shared: &Shared, record: &Record) -> Result<()> {
    for (child, alias) in all(shared, record) {
        let child = &child.view().record;
        if !matches!(child.life.state, State::Running(_)) {
            return Err(Error::invalid(format!(
                "Cannot link to a non running container: /{} AS /{}/{alias}",
                child.name, record.name
            )));
        }
        if addresses(child).is_none() {
            return Err(Error::invalid(format!(
                "Cannot link to /{}, as it does not belong to the default network",
                child.name
            )));
        }
    }
    Ok(())
}

/// What a container's links put into its hosts and its environment. One that does not run now adds nothing.
pub(crate) fn add(shared: &Shared, record: &Record, facts: &mut NetworkFacts) {
    for (child, alias) in all(shared, record) {
        let child = &child.view().record;
        let Some(addresses) = addresses(child) else { continue };
        let mut names = format!("{alias} {}", child.config.hostname);
        if alias != child.name {
            names = format!("{names} {}", child.name);
        }
        facts.linked.extend(addresses.iter().map(|address| (*address, names.clone())));
        if let Some(address) = addresses.iter().find(|address| address.is_ipv4()) {
            facts.environment.extend(environment(&record.name, alias, &address.to_string(), &child.config));
        }
    }
}

/// The variables that tell of a linked container.
fn environment(parent: &str, alias: &str, address: &str, child: &Config) -> Vec<String> {
    let prefix = alias.to_uppercase().replace('-', "_");
    let exposed = child.exposed_ports.iter().flatten().filter_map(|(port, _)| parse_port(port).ok());
    let mut ports: Vec<(Protocol, u16)> = exposed.map(|(port, protocol)| (protocol, port)).collect();
    ports.sort_unstable();
    let url = |(protocol, port): (Protocol, u16)| format!("{}://{address}:{port}", protocol.name());
    let name = |(protocol, port): (Protocol, u16)| {
        format!("{prefix}_PORT_{port}_{}", protocol.name().to_uppercase())
    };
    let mut all: Vec<String> =
        ports.first().map(|first| format!("{prefix}_PORT={}", url(*first))).into_iter().collect();
    for port in &ports {
        let (one, (protocol, number)) = (name(*port), *port);
        all.push(format!("{one}={}", url(*port)));
        all.push(format!("{one}_ADDR={address}"));
        all.push(format!("{one}_PORT={number}"));
        all.push(format!("{one}_PROTO={}", protocol.name()));
    }
    // Ports in a row are told of as a range, too.
    for range in
        ports.chunk_by(|a, b| a.0 == b.0 && a.1.checked_add(1) == Some(b.1)).filter(|range| range.len() > 1)
    {
        let ([first, ..], [.., last]) = (range, range) else { continue };
        let one = name(*first);
        all.push(format!("{one}_START={}", url(*first)));
        all.push(format!("{one}_PORT_START={}", first.1));
        all.push(format!("{one}_END={}", url(*last)));
        all.push(format!("{one}_PORT_END={}", last.1));
    }
    all.push(format!("{prefix}_NAME=/{parent}/{alias}"));
    for (name, value) in child.env.iter().flatten().filter_map(|variable| variable.split_once('=')) {
        if !matches!(name, "HOME" | "PATH") {
            all.push(format!("{prefix}_ENV_{name}={value}"));
        }
    }
    all
}

/// The links as they are inspected.
pub(crate) fn shown(shared: &Shared, record: &Record) -> Option<Vec<String>> {
    if record.host_config.network_mode != DEFAULT {
        return record.host_config.links.clone();
    }
    let shown = all(shared, record)
        .map(|(child, alias)| format!("/{}:/{}/{alias}", child.view().record.name, record.name));
    let shown: Vec<String> = shown.collect();
    (!shown.is_empty()).then_some(shown)
}

/// The running containers that have a link to this one.
pub(crate) fn parents(shared: &Shared, id: &str) -> Vec<Arc<Container>> {
    let mut parents = shared.registry.all();
    parents.retain(|parent| {
        let record = parent.view().record;
        matches!(record.life.state, State::Running(_))
            && all(shared, &record).any(|(child, _)| child.id() == id)
    });
    parents
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::types::Empty;

    #[test]
    fn links_are_read_as_they_are_given_and_as_they_are_shown() {
        for (link, expected) in [
            ("db", ("db", "db")),
            ("db:sql", ("db", "sql")),
            ("/db:/web/sql", ("db", "sql")),
            ("a-b.c:d", ("a-b.c", "d")),
        ] {
            assert_eq!(parse(link).unwrap(), expected);
        }
        for wrong in ["", ":", "db:", ":sql", "a:b:c", "a b", "db:s/q", "/db:/web/"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_environment_is_dockers() {
        let port = |text: &str| (text.to_owned(), Empty {});
        let child = Config {
            exposed_ports: Some(["6380/tcp", "53/udp", "6379/tcp"].map(port).into()),
            env: Some(["PATH=/bin", "SECRET=x=y", "BARE"].map(str::to_owned).into()),
            ..Config::default()
        };
        assert_eq!(
            environment("web", "my-db", "172.17.0.2", &child),
            [
                "MY_DB_PORT=tcp://172.17.0.2:6379",
                "MY_DB_PORT_6379_TCP=tcp://172.17.0.2:6379",
                "MY_DB_PORT_6379_TCP_ADDR=172.17.0.2",
                "MY_DB_PORT_6379_TCP_PORT=6379",
                "MY_DB_PORT_6379_TCP_PROTO=tcp",
                "MY_DB_PORT_6380_TCP=tcp://172.17.0.2:6380",
                "MY_DB_PORT_6380_TCP_ADDR=172.17.0.2",
                "MY_DB_PORT_6380_TCP_PORT=6380",
                "MY_DB_PORT_6380_TCP_PROTO=tcp",
                "MY_DB_PORT_53_UDP=udp://172.17.0.2:53",
                "MY_DB_PORT_53_UDP_ADDR=172.17.0.2",
                "MY_DB_PORT_53_UDP_PORT=53",
                "MY_DB_PORT_53_UDP_PROTO=udp",
                "MY_DB_PORT_6379_TCP_START=tcp://172.17.0.2:6379",
                "MY_DB_PORT_6379_TCP_PORT_START=6379",
                "MY_DB_PORT_6379_TCP_END=tcp://172.17.0.2:6380",
                "MY_DB_PORT_6379_TCP_PORT_END=6380",
                "MY_DB_NAME=/web/my-db",
                "MY_DB_ENV_SECRET=x=y",
            ]
        );
        assert_eq!(environment("web", "db", "172.17.0.2", &Config::default()), ["DB_NAME=/web/db"]);
    }
}
