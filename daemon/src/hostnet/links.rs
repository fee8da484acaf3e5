//! Bridges and taps by netlink. Every call blocks.

use std::{fs, io, net::IpAddr, os::fd::OwnedFd, path::Path};

use bulkhead_netlink::{Address, Link, LinkChange, Netlink};
use ipnet::IpNet;

use super::{Bridge, HostError, Tap, tap};

/// What the names of taps begin with.
const TAP_PREFIX: &str = "bht-";

/// The networks that the host uses: addresses and routes, those of bridges with this alias aside.
pub(super) fn used(alias: &str) -> io::Result<Vec<IpNet>> {
    let mut netlink = Netlink::open()?;
    let own: Vec<u32> =
        netlink.links()?.iter().filter(|link| link.alias == alias).map(|link| link.index).collect();
    let addresses = netlink.addresses()?.into_iter().filter(|address| !own.contains(&address.index));
    let mut used: Vec<IpNet> = addresses
        .filter_map(|address| IpNet::new(address.address, address.prefix).ok())
        .map(|net| net.trunc())
        .collect();
    let routes = netlink
        .routes()?
        .into_iter()
        .filter(|route| route.prefix > 0 && route.index.is_none_or(|index| !own.contains(&index)));
    used.extend(routes.filter_map(|route| IpNet::new(route.destination, route.prefix).ok()));
    Ok(used)
}

/// Makes a bridge, or takes over the one of this alias.
pub(super) fn make_bridge(name: &str, bridge: &Bridge, alias: &str) -> Result<(), HostError> {
    let failed = || HostError::link(format!("cannot make the bridge {name}"));
    let mut netlink = Netlink::open().map_err(failed())?;
    let change = LinkChange { mtu: Some(bridge.mtu.into()), ..LinkChange::default() };
    let mut ours = false;
    let index = match netlink.link(name).map_err(failed())? {
        // One without an alias has our network's name, and a daemon that died before it could sign it.
        Some(link)
            if link.kind == "bridge"
                && (link.alias == alias || (link.alias.is_empty() && name.starts_with("bh-"))) =>
        {
            netlink.change_link(link.index, &change).map_err(failed())?;
            link.index
        }
        Some(_) => return Err(HostError::Taken(name.to_owned())),
        None => {
            // An address of its own, lest it take that of whichever port is the least.
            let mac = Some(random_mac().map_err(failed())?);
            netlink.add_bridge(name, &LinkChange { mac, ..change }).map_err(failed())?;
            ours = true;
            let link = netlink.link(name).map_err(failed())?;
            link.ok_or_else(|| failed()(io::ErrorKind::NotFound.into()))?.index
        }
    };
    let made = set_up_bridge(&mut netlink, index, name, bridge);
    // The kernel takes no alias for a link that is yet to be made.
    let signed = LinkChange { alias: Some(alias), ..LinkChange::default() };
    let made = made.and_then(|()| netlink.change_link(index, &signed));
    // One that was there has containers, maybe.
    if made.is_err() && ours {
        let _ = netlink.delete_link(index);
    }
    made.map_err(failed())
}

fn set_up_bridge(netlink: &mut Netlink, index: u32, name: &str, bridge: &Bridge) -> io::Result<()> {
    let ipv6 = bridge.gateways.iter().any(|gateway| gateway.addr().is_ipv6());
    set_ipv6(name, ipv6)?;
    for old in netlink.addresses()? {
        let wanted = |gateway: &IpNet| gateway.addr() == old.address && gateway.prefix_len() == old.prefix;
        let link_local = matches!(old.address, IpAddr::V6(address) if address.is_unicast_link_local());
        if old.index == index && !link_local && !bridge.gateways.iter().any(wanted) {
            netlink.delete_address(&old)?;
        }
    }
    for gateway in &bridge.gateways {
        netlink.add_address(&Address { index, address: gateway.addr(), prefix: gateway.prefix_len() })?;
    }
    netlink.change_link(index, &LinkChange { up: Some(true), ..LinkChange::default() })
}

/// Switches IPv6 of an interface on or off, and its ear for router advertisements off in any case. A host
/// without IPv6 has nothing to switch off.
fn set_ipv6(name: &str, enabled: bool) -> io::Result<()> {
    let directory = Path::new("/proc/sys/net/ipv6/conf").join(name);
    if !enabled && !directory.exists() {
        return Ok(());
    }
    fs::write(directory.join("accept_ra"), "0")?;
    fs::write(directory.join("disable_ipv6"), if enabled { "0" } else { "1" })
}

/// A new tap, a port of its bridge and down.
pub(super) fn make_tap(name: &str, tap: &Tap) -> io::Result<OwnedFd> {
    let mut netlink = Netlink::open()?;
    let bridge = netlink.link(&tap.bridge)?.ok_or_else(|| {
        io::Error::new(io::ErrorKind::NotFound, format!("the bridge {} is not there", tap.bridge))
    })?;
    let fd = tap::open(name)?;
    let link = netlink.link(name)?.ok_or(io::ErrorKind::NotFound)?;
    // The host itself has nothing to say there.
    set_ipv6(name, false)?;
    let change =
        LinkChange { mtu: Some(tap.mtu.into()), master: Some(bridge.index), ..LinkChange::default() };
    netlink.change_link(link.index, &change)?;
    Ok(fd)
}

/// Lets a tap speak. One with published ports is sent back what it sends to itself by way of the host: on a host
/// where bridges ask the packet filter (br_netfilter), such a frame is turned around in the bridge.
pub(super) fn raise_tap(name: &str, isolated: bool, published: bool) -> io::Result<()> {
    let mut netlink = Netlink::open()?;
    let link = netlink.link(name)?.ok_or(io::ErrorKind::NotFound)?;
    if isolated || published {
        netlink.set_port(link.index, isolated, published)?;
    }
    netlink.change_link(link.index, &LinkChange { up: Some(true), ..LinkChange::default() })
}

/// Removes bridges of this alias whose names are `chosen`.
pub(super) fn remove_bridges(alias: &str, chosen: impl Fn(&str) -> bool) -> io::Result<()> {
    let mut netlink = Netlink::open()?;
    for link in netlink.links()? {
        if link.kind == "bridge" && link.alias == alias && chosen(&link.name) {
            tracing::info!(bridge = link.name, "a bridge is removed");
            netlink.delete_link(link.index)?;
        }
    }
    Ok(())
}

/// Removes taps of these names, as far as they are there.
pub(super) fn remove_taps(names: &[String]) -> io::Result<()> {
    let mut netlink = Netlink::open()?;
    for name in names {
        if let Some(link) = netlink.link(name)? {
            tracing::info!(tap = name, "a tap is removed that somebody still has");
            netlink.delete_link(link.index)?;
        }
    }
    Ok(())
}

/// Removes the taps in bridges of this alias that are not `known`.
pub(super) fn remove_other_taps(alias: &str, known: &[String]) -> io::Result<()> {
    let links = Netlink::open()?.links()?;
    let is_ours = |link: &&Link| link.kind == "bridge" && link.alias == alias;
    let bridges: Vec<u32> = links.iter().filter(is_ours).map(|bridge| bridge.index).collect();
    let others = links.iter().filter(|link| {
        link.master.is_some_and(|master| bridges.contains(&master))
            && link.name.starts_with(TAP_PREFIX)
            && !known.contains(&link.name)
    });
    remove_taps(&others.map(|link| link.name.clone()).collect::<Vec<_>>())
}

/// A locally administered address.
fn random_mac() -> io::Result<[u8; 6]> {
    let mut mac = [0; 6];
    getrandom::fill(&mut mac).map_err(io::Error::other)?;
    mac[0] = 0x02;
    Ok(mac)
}
