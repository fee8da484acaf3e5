//! The files that Docker puts into every container.

use std::{fmt::Write, net::IpAddr};

use bulkhead_agent_api::InjectedFile;

use crate::{
    api::types::container::HostConfig,
    config::Config as DaemonConfig,
    engine::{Error, Result},
};

/// `/etc/hosts`, `/etc/hostname`, `/etc/resolv.conf`.
pub(super) fn files(
    hostname: &str,
    domainname: &str,
    host: &HostConfig,
    daemon: &DaemonConfig,
    addresses: &[IpAddr],
    host_resolv_conf: &str,
) -> Result<Vec<InjectedFile>> {
    let file = |path: &str, content| InjectedFile { path: path.to_owned(), content, mode: 0o644 };
    Ok(vec![
        file("/etc/hostname", format!("{hostname}\n")),
        file("/etc/hosts", hosts(hostname, domainname, host, addresses)?),
        file("/etc/resolv.conf", resolv_conf(host, daemon, host_resolv_conf)),
    ])
}

/// `/etc/machine-id`: what an image brings is every container's of it, so none of its own may count.
pub(super) fn machine_id(id: &str) -> InjectedFile {
    let content = format!("{}\n", id.get(..32).unwrap_or(id));
    InjectedFile { path: "/etc/machine-id".into(), content, mode: 0o444 }
}

fn hosts(hostname: &str, domainname: &str, host: &HostConfig, addresses: &[IpAddr]) -> Result<String> {
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
        let _ = writeln!(text, "{address}\t{name}");
    }
    let names = match domainname {
        "" => hostname.to_owned(),
        domain => format!("{hostname}.{domain} {hostname}"),
    };
    for address in addresses {
        let _ = writeln!(text, "{address}\t{names}");
    }
    Ok(text)
}

/// `--add-host NAME:ADDRESS`.
pub(super) fn extra_host(text: &str) -> Result<(&str, IpAddr)> {
    let wrong = || Error::invalid(format!("bad format for add-host: {text:?}"));
    let (name, address) = text.split_once(':').ok_or_else(wrong)?;
    if name.is_empty() || name.contains(char::is_whitespace) {
        return Err(wrong());
    }
    if address == "host-gateway" {
        return Err(Error::not_implemented("add-host: host-gateway needs a network, which is not there yet"));
    }
    let bare = address.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(address);
    match bare.parse() {
        Ok(address) => Ok((name, address)),
        Err(_) => Err(Error::invalid(format!("invalid IP address in add-host: {address:?}"))),
    }
}

/// The host's `resolv.conf`, with what the container or else the daemon wants in its place.
fn resolv_conf(host: &HostConfig, daemon: &DaemonConfig, host_text: &str) -> String {
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
    let servers = or_inherited(chosen(&host.dns, &daemon.dns), "nameserver ");
    // A single dot means: no search domain at all.
    let search = or_inherited(chosen(&host.dns_search, &daemon.dns_search), "search ");
    let options = or_inherited(chosen(&host.dns_options, &daemon.dns_opts), "options ");
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
