//! Links, addresses and routes by rtnetlink (rtnetlink(7)), the table of connections by ctnetlink, and sets of the
//! packet filter by nf_tables: as much of it as the guest agent and the daemon need. Calls block for as long as the
//! kernel takes, which is not long; there is one socket and no state.
//!
//! ```text
//!   request  ──▶ kernel ──▶ ACK, or an error number
//!   dump     ──▶ kernel ──▶ one message an object … DONE
//! ```

mod conntrack;
mod elements;
mod message;

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::OwnedFd,
};

use message::{Attributes, Message, constant as nl};
use rustix::net::{
    AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType, netlink::SocketAddrNetlink,
};

pub use conntrack::forget_connections;
pub use elements::{MAX_ELEMENTS, SetChange, TableFamily, change_elements};

/// The longest interface name, in bytes.
pub const MAX_NAME: usize = 15;

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// The kernel's number of it.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its hardware address, where it has one of six bytes.
    pub mac: Option<[u8; 6]>,
    /// Whether it is set up.
    pub up: bool,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// What `ip link` shows as its alias; empty without one.
    pub alias: String,
    /// What it is, `bridge` for instance; empty for devices.
    pub kind: String,
    /// The bridge that it is a port of.
    pub master: Option<u32>,
}

/// What is to change of a link. None: it stays.
#[derive(Debug, Clone, Copy, Default)]
pub struct LinkChange<'a> {
    /// Its name; the link must be down.
    pub name: Option<&'a str>,
    /// Its hardware address.
    pub mac: Option<[u8; 6]>,
    /// Its MTU.
    pub mtu: Option<u32>,
    /// Its alias, at most 255 bytes.
    pub alias: Option<&'a str>,
    /// Its bridge; 0 for none.
    pub master: Option<u32>,
    /// Up or down.
    pub up: Option<bool>,
}

/// An address of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address {
    /// The link.
    pub index: u32,
    /// The address.
    pub address: IpAddr,
    /// The length of its network's prefix.
    pub prefix: u8,
}

/// A route of the main table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route {
    /// The network.
    pub destination: IpAddr,
    /// The length of its prefix.
    pub prefix: u8,
    /// The link that it leads to.
    pub index: Option<u32>,
}

/// A rtnetlink socket.
#[derive(Debug)]
pub struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

/// More than the kernel ever puts into one datagram of a dump.
const BUFFER: usize = 64 * 1024;

impl Netlink {
    /// A new socket, in the network namespace of the calling thread.
    ///
    /// # Errors
    /// Of the system calls.
    pub fn open() -> io::Result<Self> {
        // Protocol 0 of this family is routing.
        Self::of(None)
    }

    fn of(protocol: Option<Protocol>) -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, protocol)?;
        rustix::net::bind(&socket, &SocketAddrNetlink::new(0, 0))?;
        Ok(Self { socket, sequence: 0 })
    }

    /// All links.
    ///
    /// # Errors
    /// The kernel's.
    pub fn links(&mut self) -> io::Result<Vec<Link>> {
        let mut request = Message::new(nl::RTM_GETLINK, nl::NLM_F_DUMP);
        request.bytes(&link_header(nl::AF_UNSPEC, 0, 0, 0));
        let mut links = Vec::new();
        self.dump(request, nl::RTM_NEWLINK, |body| links.extend(read_link(body)))?;
        Ok(links)
    }

    /// The link of this name, None where there is none.
    ///
    /// # Errors
    /// The kernel's.
    pub fn link(&mut self, name: &str) -> io::Result<Option<Link>> {
        let mut request = Message::new(nl::RTM_GETLINK, 0);
        request.bytes(&link_header(nl::AF_UNSPEC, 0, 0, 0));
        request.name(nl::IFLA_IFNAME, name)?;
        let mut link = None;
        match self.exchange(request, nl::RTM_NEWLINK, |body| link = read_link(body)) {
            Ok(()) => Ok(link),
            Err(error) if is_absent(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Makes a bridge, down and without addresses.
    ///
    /// # Errors
    /// The name is in use or not valid; the kernel's.
    pub fn add_bridge(&mut self, name: &str, change: &LinkChange<'_>) -> io::Result<()> {
        let mut request = Message::new(nl::RTM_NEWLINK, nl::NLM_F_ACK | nl::NLM_F_CREATE | nl::NLM_F_EXCL);
        request.bytes(&link_header(nl::AF_UNSPEC, 0, 0, 0));
        request.name(nl::IFLA_IFNAME, name)?;
        put_change(&mut request, &LinkChange { name: None, ..*change })?;
        request.nest(nl::IFLA_LINKINFO, |info| info.attribute(nl::IFLA_INFO_KIND, b"bridge"));
        self.request(request)
    }

    /// Changes a link. It goes down before all else and comes up after all else.
    ///
    /// # Errors
    /// The kernel's.
    pub fn change_link(&mut self, index: u32, change: &LinkChange<'_>) -> io::Result<()> {
        let mut request = Message::new(nl::RTM_NEWLINK, nl::NLM_F_ACK);
        let (flags, mask) = match change.up {
            Some(up) => (u32::from(up) * nl::IFF_UP, nl::IFF_UP),
            None => (0, 0),
        };
        request.bytes(&link_header(nl::AF_UNSPEC, index, flags, mask));
        put_change(&mut request, change)?;
        self.request(request)
    }

    /// What a port of a bridge reaches: `isolated`, only the bridge and ports that are not; `hairpin`, itself too.
    ///
    /// # Errors
    /// The kernel's; it is not a bridge's port.
    pub fn set_port(&mut self, index: u32, isolated: bool, hairpin: bool) -> io::Result<()> {
        let mut request = Message::new(nl::RTM_SETLINK, nl::NLM_F_ACK);
        request.bytes(&link_header(nl::AF_BRIDGE, index, 0, 0));
        request.nest(nl::IFLA_PROTINFO | nl::NLA_F_NESTED, |port| {
            port.attribute(nl::IFLA_BRPORT_MODE, &[u8::from(hairpin)]);
            port.attribute(nl::IFLA_BRPORT_ISOLATED, &[u8::from(isolated)]);
        });
        self.request(request)
    }

    /// Removes a link; that it is gone already is no error.
    ///
    /// # Errors
    /// The kernel's.
    pub fn delete_link(&mut self, index: u32) -> io::Result<()> {
        let mut request = Message::new(nl::RTM_DELLINK, nl::NLM_F_ACK);
        request.bytes(&link_header(nl::AF_UNSPEC, index, 0, 0));
        absent_is_fine(self.request(request))
    }

    /// All addresses of all links.
    ///
    /// # Errors
    /// The kernel's.
    pub fn addresses(&mut self) -> io::Result<Vec<Address>> {
        let mut request = Message::new(nl::RTM_GETADDR, nl::NLM_F_DUMP);
        request.bytes(&address_header(nl::AF_UNSPEC, 0, 0));
        let mut addresses = Vec::new();
        self.dump(request, nl::RTM_NEWADDR, |body| addresses.extend(read_address(body)))?;
        Ok(addresses)
    }

    /// Gives a link an address, without asking the link whether somebody has it; that it has it already is
    /// no error.
    ///
    /// # Errors
    /// The kernel's.
    pub fn add_address(&mut self, address: &Address) -> io::Result<()> {
        let flags = nl::NLM_F_ACK | nl::NLM_F_CREATE | nl::NLM_F_REPLACE;
        self.request(address_message(nl::RTM_NEWADDR, flags, address))
    }

    /// Takes an address from a link; that it has it no more is no error.
    ///
    /// # Errors
    /// The kernel's.
    pub fn delete_address(&mut self, address: &Address) -> io::Result<()> {
        absent_is_fine(self.request(address_message(nl::RTM_DELADDR, nl::NLM_F_ACK, address)))
    }

    /// The routes of the main table.
    ///
    /// # Errors
    /// The kernel's.
    pub fn routes(&mut self) -> io::Result<Vec<Route>> {
        let mut request = Message::new(nl::RTM_GETROUTE, nl::NLM_F_DUMP);
        request.bytes(&[0; 12]);
        let mut routes = Vec::new();
        self.dump(request, nl::RTM_NEWROUTE, |body| routes.extend(read_route(body)))?;
        Ok(routes)
    }

    /// Makes the default route of the gateway's family lead through it. It need not be in a network of the
    /// link's.
    ///
    /// # Errors
    /// The kernel's.
    pub fn add_default_route(&mut self, index: u32, gateway: IpAddr) -> io::Result<()> {
        let flags = nl::NLM_F_ACK | nl::NLM_F_CREATE | nl::NLM_F_REPLACE;
        let mut request = Message::new(nl::RTM_NEWROUTE, flags);
        request.bytes(&route_header(family(gateway), nl::RTNH_F_ONLINK));
        octets(gateway, |bytes| request.attribute(nl::RTA_GATEWAY, bytes));
        request.attribute(nl::RTA_OIF, &index.to_ne_bytes());
        self.request(request)
    }

    /// Removes every default route of both families.
    ///
    /// # Errors
    /// The kernel's.
    pub fn delete_default_routes(&mut self) -> io::Result<()> {
        for route in self.routes()?.iter().filter(|route| route.prefix == 0) {
            let mut request = Message::new(nl::RTM_DELROUTE, nl::NLM_F_ACK);
            let [first, second, third, fourth, table, _, _, _, rest @ ..] =
                route_header(family(route.destination), 0);
            // Whoever made it, and however.
            request.bytes(&[first, second, third, fourth, table, 0, nl::RT_SCOPE_NOWHERE, 0]);
            request.bytes(&rest);
            if let Some(index) = route.index {
                request.attribute(nl::RTA_OIF, &index.to_ne_bytes());
            }
            absent_is_fine(self.request(request))?;
        }
        Ok(())
    }

    fn request(&mut self, request: Message) -> io::Result<()> {
        self.exchange(request, 0, |_| {})
    }

    fn dump(&mut self, request: Message, kind: u16, object: impl FnMut(&[u8])) -> io::Result<()> {
        self.exchange(request, kind, object)
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        rustix::net::send(&self.socket, bytes, SendFlags::empty())?;
        Ok(())
    }

    /// The next datagram.
    fn receive<'a>(&self, buffer: &'a mut [u8]) -> io::Result<&'a [u8]> {
        let (received, whole) = rustix::net::recv(&self.socket, &mut *buffer, RecvFlags::TRUNC)?;
        if whole > received {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a netlink message is too long"));
        }
        Ok(buffer.get(..received).unwrap_or_default())
    }

    /// Sends a request and takes all of its answer; bodies of messages of type `kind` go to `object`.
    fn exchange(&mut self, request: Message, kind: u16, mut object: impl FnMut(&[u8])) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let bytes = request.finish(self.sequence)?;
        self.send(&bytes)?;
        let mut buffer = vec![0; BUFFER];
        loop {
            let mut datagram = self.receive(&mut buffer)?;
            while let Some(part) = message::next(&mut datagram) {
                if part.sequence != self.sequence {
                    continue;
                }
                match part.kind {
                    nl::NLMSG_DONE => return Ok(()),
                    nl::NLMSG_ERROR => return message::outcome(part.body),
                    found if found == kind => {
                        object(part.body);
                        if part.flags & nl::NLM_F_MULTI == 0 {
                            return Ok(());
                        }
                    }
                    _ => {}
                }
            }
        }
    }
}

fn is_absent(error: &io::Error) -> bool {
    // ENODEV, EADDRNOTAVAIL, ESRCH
    matches!(error.raw_os_error(), Some(19 | 99 | 3))
}

fn absent_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if is_absent(&error) => Ok(()),
        other => other,
    }
}

fn put_change(request: &mut Message, change: &LinkChange<'_>) -> io::Result<()> {
    if let Some(name) = change.name {
        request.name(nl::IFLA_IFNAME, name)?;
    }
    if let Some(mac) = change.mac {
        request.attribute(nl::IFLA_ADDRESS, &mac);
    }
    if let Some(mtu) = change.mtu {
        request.attribute(nl::IFLA_MTU, &mtu.to_ne_bytes());
    }
    if let Some(alias) = change.alias {
        request.attribute(nl::IFLA_IFALIAS, alias.as_bytes());
    }
    if let Some(master) = change.master {
        request.attribute(nl::IFLA_MASTER, &master.to_ne_bytes());
    }
    Ok(())
}

/// `struct ifinfomsg`.
fn link_header(family: u8, index: u32, flags: u32, mask: u32) -> [u8; 16] {
    let mut header = [0; 16];
    header[0] = family;
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..12].copy_from_slice(&flags.to_ne_bytes());
    header[12..16].copy_from_slice(&mask.to_ne_bytes());
    header
}

/// `struct ifaddrmsg`.
fn address_header(family: u8, prefix: u8, index: u32) -> [u8; 8] {
    let [a, b, c, d] = index.to_ne_bytes();
    [family, prefix, 0, 0, a, b, c, d]
}

/// `struct rtmsg` of a default route in the main table.
fn route_header(family: u8, flags: u32) -> [u8; 12] {
    let [a, b, c, d] = flags.to_ne_bytes();
    [family, 0, 0, 0, nl::RT_TABLE_MAIN, nl::RTPROT_BOOT, nl::RT_SCOPE_UNIVERSE, nl::RTN_UNICAST, a, b, c, d]
}

fn address_message(kind: u16, flags: u16, address: &Address) -> Message {
    let mut request = Message::new(kind, flags);
    request.bytes(&address_header(family(address.address), address.prefix, address.index));
    octets(address.address, |bytes| {
        request.attribute(nl::IFA_LOCAL, bytes);
        request.attribute(nl::IFA_ADDRESS, bytes);
    });
    if address.address.is_ipv6() {
        request.attribute(nl::IFA_FLAGS, &nl::IFA_F_NODAD.to_ne_bytes());
    }
    request
}

fn family(address: IpAddr) -> u8 {
    if address.is_ipv4() { nl::AF_INET } else { nl::AF_INET6 }
}

fn octets<R>(address: IpAddr, f: impl FnOnce(&[u8]) -> R) -> R {
    match address {
        IpAddr::V4(address) => f(&address.octets()),
        IpAddr::V6(address) => f(&address.octets()),
    }
}

fn address_of(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(octets) = <[u8; 4]>::try_from(bytes) {
        return Some(Ipv4Addr::from(octets).into());
    }
    <[u8; 16]>::try_from(bytes).ok().map(|octets| Ipv6Addr::from(octets).into())
}

fn number(bytes: &[u8]) -> Option<u32> {
    bytes.try_into().ok().map(u32::from_ne_bytes)
}

fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

fn read_link(body: &[u8]) -> Option<Link> {
    let (header, rest) = body.split_first_chunk::<16>()?;
    let mut link = Link {
        index: number(&header[4..8])?,
        name: String::new(),
        mac: None,
        up: number(&header[8..12])? & nl::IFF_UP != 0,
        mtu: 0,
        alias: String::new(),
        kind: String::new(),
        master: None,
    };
    for (kind, value) in Attributes::of(rest) {
        match kind {
            nl::IFLA_IFNAME => link.name = text(value),
            nl::IFLA_ADDRESS => link.mac = value.try_into().ok(),
            nl::IFLA_MTU => link.mtu = number(value).unwrap_or(0),
            nl::IFLA_IFALIAS => link.alias = text(value),
            nl::IFLA_MASTER => link.master = number(value),
            nl::IFLA_LINKINFO => {
                let kind = Attributes::of(value).find(|(kind, _)| *kind == nl::IFLA_INFO_KIND);
                link.kind = kind.map(|(_, value)| text(value)).unwrap_or_default();
            }
            _ => {}
        }
    }
    Some(link)
}

fn read_address(body: &[u8]) -> Option<Address> {
    let (header, rest) = body.split_first_chunk::<8>()?;
    // On a link between two, the local address is the link's own.
    let find = |wanted| Attributes::of(rest).find(|(kind, _)| *kind == wanted).map(|(_, value)| value);
    let address = find(nl::IFA_LOCAL).or_else(|| find(nl::IFA_ADDRESS))?;
    Some(Address { index: number(&header[4..8])?, address: address_of(address)?, prefix: header[1] })
}

fn read_route(body: &[u8]) -> Option<Route> {
    let (header, rest) = body.split_first_chunk::<12>()?;
    let [family, prefix, _, _, table, _, _, kind, ..] = *header;
    if table != nl::RT_TABLE_MAIN || kind != nl::RTN_UNICAST {
        return None;
    }
    let mut route = Route {
        destination: if family == nl::AF_INET {
            Ipv4Addr::UNSPECIFIED.into()
        } else {
            Ipv6Addr::UNSPECIFIED.into()
        },
        prefix,
        index: None,
    };
    for (kind, value) in Attributes::of(rest) {
        match kind {
            nl::RTA_DST => route.destination = address_of(value)?,
            nl::RTA_OIF => route.index = number(value),
            _ => {}
        }
    }
    Some(route)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_interface_is_found_with_its_address() {
        let mut netlink = Netlink::open().unwrap();
        let loopback = netlink.link("lo").unwrap().unwrap();
        assert_eq!(loopback.name, "lo");
        assert!(netlink.links().unwrap().contains(&loopback));
        assert_eq!(netlink.link("nosuchlink").unwrap(), None);
        netlink.addresses().unwrap();
        netlink.routes().unwrap();
    }

    #[test]
    fn a_name_that_is_too_long_is_refused_before_it_is_sent() {
        let mut netlink = Netlink::open().unwrap();
        for name in ["", "sixteen-letters!", "a\0b"] {
            assert_eq!(netlink.link(name).unwrap_err().kind(), io::ErrorKind::InvalidInput, "{name:?}");
        }
    }
}
