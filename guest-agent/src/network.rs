//! The machine's network interfaces, made as the daemon says.
//!
//! ```text
//!   slot (virtio-mmio window) ──bind──▶ link ──name, addresses, up──▶ interface
//!       device id 0 while empty          ◀──────unbind──────
//! ```
//!
//! How a slot gets its driver is in [`slots`]. There is no network namespace: the machine's network is the
//! container's.

use std::{
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
};

use bulkhead_agent_api::{Gateway, Interface};
use bulkhead_netlink::{Address, Link, LinkChange, MAX_NAME, Netlink};

use crate::{
    error::{Context, Result, invalid, not_found},
    log, slots,
};

const LINKS: &str = "/sys/class/net";

/// Makes an interface of the device.
pub fn connect(interface: &Interface) -> Result<()> {
    check_name(&interface.name)?;
    let mut netlink = Netlink::open().context("netlink")?;
    let link = match find(&mut netlink, interface)? {
        Some(link) => link,
        None => {
            slots::look_into();
            find(&mut netlink, interface)?.ok_or_else(|| not_found("the network device is not there"))?
        }
    };
    set_up(&mut netlink, &link, interface).context(format_args!("set up the interface {}", interface.name))
}

/// Takes an interface away with its device.
pub fn disconnect(mac: [u8; 6]) -> Result<()> {
    let mut netlink = Netlink::open().context("netlink")?;
    let link = by_mac(&mut netlink, mac)?.ok_or_else(|| not_found("there is no such interface"))?;
    let device = slot_of(&link.name).context(format_args!("find the device of {}", link.name))?;
    slots::let_go(&device).context(format_args!("remove {}", link.name))
}

/// Makes these the default routes, and no others.
pub fn set_routes(gateways: &[Gateway]) -> Result<()> {
    let mut netlink = Netlink::open().context("netlink")?;
    netlink.delete_default_routes().context("remove the default routes")?;
    for gateway in gateways {
        let link = by_mac(&mut netlink, gateway.mac)?
            .ok_or_else(|| not_found("there is no interface for the default route"))?;
        netlink
            .add_default_route(link.index, gateway.address)
            .context(format_args!("set the default route to {}", gateway.address))?;
    }
    Ok(())
}

fn find(netlink: &mut Netlink, interface: &Interface) -> Result<Option<Link>> {
    for mac in [interface.device, interface.mac] {
        if let Some(link) = by_mac(netlink, mac)? {
            return Ok(Some(link));
        }
    }
    // In a copied machine the driver knows the address of before, and the name is the same.
    let named = netlink.link(&interface.name).context("look for the interface")?;
    Ok(named.filter(|link| slot_of(&link.name).is_ok()))
}

/// A device's link: an address of a link that the workload made is of no concern.
fn by_mac(netlink: &mut Netlink, mac: [u8; 6]) -> Result<Option<Link>> {
    let links = netlink.links().context("list the network interfaces")?;
    Ok(links.into_iter().find(|link| link.mac == Some(mac) && slot_of(&link.name).is_ok()))
}

/// The slot that a link's device is in.
fn slot_of(link: &str) -> io::Result<String> {
    let device: PathBuf = fs::canonicalize(Path::new(LINKS).join(link).join("device"))?;
    let slot = device.parent().and_then(Path::file_name).and_then(|name| name.to_str());
    slot.filter(|slot| slots::is_slot(slot))
        .map(str::to_owned)
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "not a virtio device"))
}

fn set_up(netlink: &mut Netlink, link: &Link, interface: &Interface) -> io::Result<()> {
    let index = link.index;
    if link.up {
        netlink.change_link(index, &LinkChange { up: Some(false), ..LinkChange::default() })?;
    }
    if link.name != interface.name {
        make_way(netlink, &interface.name)?;
    }
    let change = LinkChange {
        name: (link.name != interface.name).then_some(interface.name.as_str()),
        mac: (link.mac != Some(interface.mac)).then_some(interface.mac),
        mtu: Some(u32::from(interface.mtu)),
        ..LinkChange::default()
    };
    netlink.change_link(index, &change)?;
    let ipv6 = interface.addresses.iter().any(|address| address.address.is_ipv6());
    for (name, value) in [("disable_ipv6", !ipv6), ("accept_ra", false), ("autoconf", false)] {
        let path = format!("/proc/sys/net/ipv6/conf/{}/{name}", interface.name);
        if let Err(error) = fs::write(&path, if value { "1" } else { "0" })
            && ipv6
        {
            log::warn(format_args!("{path}: {error}"));
        }
    }
    let wanted = |address: &Address| {
        interface
            .addresses
            .iter()
            .any(|wanted| (wanted.address, wanted.prefix) == (address.address, address.prefix))
    };
    for old in netlink.addresses()? {
        if old.index == index && !wanted(&old) && !is_link_local(old.address) {
            netlink.delete_address(&old)?;
        }
    }
    for address in &interface.addresses {
        netlink.add_address(&Address { index, address: address.address, prefix: address.prefix })?;
    }
    netlink.change_link(index, &LinkChange { up: Some(true), ..LinkChange::default() })
}

/// Gives another link that has the name a name of its own.
fn make_way(netlink: &mut Netlink, name: &str) -> io::Result<()> {
    let Some(other) = netlink.link(name)? else { return Ok(()) };
    let name = format!("link{}", other.index);
    let down = LinkChange { up: Some(false), ..LinkChange::default() };
    netlink.change_link(other.index, &down)?;
    netlink.change_link(other.index, &LinkChange { name: Some(&name), ..LinkChange::default() })
}

fn is_link_local(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(address) if address.is_unicast_link_local())
}

fn check_name(name: &str) -> Result<()> {
    let fits = (1..=MAX_NAME).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'))
        && !matches!(name, "." | ".." | "lo" | "all" | "default");
    if fits { Ok(()) } else { Err(invalid(format!("not an interface's name: {name:?}"))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_paths_or_somebody_elses_are_refused() {
        for name in ["", "lo", "..", "a/b", "all", "sixteen-letters!", "a b"] {
            assert!(check_name(name).is_err(), "{name:?}");
        }
        for name in ["eth0", "eth1.2", "my-net_0"] {
            assert!(check_name(name).is_ok(), "{name:?}");
        }
    }

    #[test]
    fn loopback_is_no_device() {
        assert!(slot_of("lo").is_err());
    }
}
