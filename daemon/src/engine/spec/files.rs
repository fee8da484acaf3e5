//! The files that Docker puts into every container.

use std::{
    fmt::Write,
    net::{IpAddr, Ipv4Addr},
};

use bulkhead_agent_api::InjectedFile;

use super::NetworkFacts;
use crate::{
    api::types::container::HostConfig,
    config::Config as DaemonConfig,
    engine::{Error, Result},
};

/// Where the agent answers name queries.
const RESOLVER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 11);

/// `/etc/hosts`, `/etc/hostname`, `/etc/resolv.conf`.
pub(super) fn files(
    hostname: &str,
    domainname: &str,
    host: &HostConfig,
    daemon: &DaemonConfig,
    network: &NetworkFacts,
    host_resolv_conf: &str,
) -> Result<Vec<InjectedFile>> {
    let file = |path: &str, content| InjectedFile { path: path.to_owned(), content, mode: 0o644 };
    Ok(vec![
        file("/etc/hostname", format!("{hostname}\n")),
        file("/etc/hosts", hosts(hostname, domainname, host, network)?),
        file("/etc/resolv.conf", resolv_conf(host, daemon, network, host_resolv_conf)),
    ])
}

/// `/etc/machine-id`: what an image brings is every container's of it, so none of its own may count.
pub(super) fn machine_id(id: &str) -> InjectedFile {
    let content = format!("{}\n", id.get(..32).unwrap_or(id));
    InjectedFile { path: "/etc/machine-id".into(), content, mode: 0o444 }
}

fn hosts(hostname: &str, domainname: &str, host: &HostConfig, network: &NetworkFacts) -> Result<String> {
    let mut text = String::from(
        "127.0.0.1\tlocalhost\n\
         ::1\tlocalhost ip6-localhost ip6-loopback\n\
         fe00::\tip6-localnet\n\
         ff00::\tip6-mcastprefix\n\
         ff02::1\tip6-allnodes\n\
         ff02::2\tip6-allrouters\n",
    );
    for extra in host.extra_hosts.iter().flatten() {
        let (name, address) = extra_host(extra)?;
        let addresses = match address {
            Some(address) => vec![address],
            None if network.host_gateway.is_empty() => {
                return Err(Error::invalid("unable to derive the IP value for host-gateway"));
            }
            None => network.host_gateway.clone(),
        };
        for address in addresses {
            let _ = writeln!(text, "{address}\t{name}");
        }
    }
    for (address, names) in &network.linked {
        let _ = writeln!(text, "{address}\t{names}");
    }
    let names = match domainname {
        "" => hostname.to_owned(),
        domain => format!("{hostname}.{domain} {hostname}"),
    };
    for address in &network.addresses {
        let _ = writeln!(text, "{address}\t{names}");
    }
    Ok(text)
}

/// `--add-host NAME:ADDRESS`; None: the host's own address, as the container sees it.
pub(super) fn extra_host(text: &str) -> Result<(&str, Option<IpAddr>)> {
    let wrong = || Error::invalid(format!("bad format for add-host: {text:?}"));
    let (name, address) = text.split_once(':').ok_or_else(wrong)?;
    if name.is_empty() || name.contains(char::is_whitespace) {
        return Err(wrong());
    }
    if address == "host-gateway" {
        return Ok((name, None));
    }
    let bare = address.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(address);
    match bare.parse() {
        Ok(address) => Ok((name, Some(address))),
        Err(_) => Err(Error::invalid(format!("invalid IP address in add-host: {address:?}"))),
    }
}

/// The host's `resolv.conf`, with what the container or else the daemon wants in its place. A name server on
/// the host's loopback is out of a container's reach: then the resolver asks it instead.
fn resolv_conf(host: &HostConfig, daemon: &DaemonConfig, network: &NetworkFacts, host_text: &str) -> String {
    let chosen = |own: &Option<Vec<String>>, daemons: &[String]| match own {
        Some(own) if !own.is_empty() => own.clone(),
        _ => daemons.to_vec(),
    };
    let inherited = |keyword: &str| {
        let lines = host_text.lines().map(str::trim);
        lines
            .filter_map(|line| line.strip_prefix(keyword))
            .map(|rest| rest.trim().to_owned())
            .collect::<Vec<_>>()
    };
    let or_inherited =
        |chosen: Vec<String>, keyword| if chosen.is_empty() { inherited(keyword) } else { chosen };
    let mut servers = or_inherited(chosen(&host.dns, &daemon.dns), "nameserver ");
    if network.connected {
        servers.retain(|server| !server.parse::<IpAddr>().is_ok_and(|address| address.is_loopback()));
    }
    let resolver = network.resolver || (network.connected && servers.is_empty());
    if resolver {
        servers = vec![RESOLVER.to_string()];
    }
    // A single dot means: no search domain at all.
    let search = or_inherited(chosen(&host.dns_search, &daemon.dns_search), "search ");
    let mut options = or_inherited(chosen(&host.dns_options, &daemon.dns_opts), "options ");
    let has_ndots =
        options.iter().flat_map(|words| words.split_whitespace()).any(|word| word.starts_with("ndots:"));
    if resolver && !has_ndots {
        // A neighbour's name has no dot.
        options.push("ndots:0".into());
    }
    let mut text = String::new();
    for server in servers {
        let _ = writeln!(text, "nameserver {server}");
    }
    for (keyword, words) in [("search", search), ("options", options)] {
        let words = words.join(" ");
        if !words.is_empty() && words != "." {
            let _ = writeln!(text, "{keyword} {words}");
        }
    }
    text
}
