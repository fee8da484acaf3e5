//! The kernel's table of connections (ctnetlink): entries are forgotten by address.
//!
//! An entry outlives the rules that made it. What a removed endpoint's entries allowed, or where they led, must
//! not be what the next owner of its address gets.

use std::{io, net::IpAddr};

use rustix::net::netlink;

use super::{
    Netlink, family,
    message::{Message, constant as nl},
    octets,
};

/// `NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_DELETE`.
const DELETE: u16 = 1 << 8 | 2;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_FILTER: u16 = 25;
const CTA_TUPLE_IP: u16 = 1;
const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V6_SRC: u16 = 3;
/// Which fields of a tuple count: here its source address alone (`CTA_FILTER_F_CTA_IP_SRC`).
const SOURCE: u32 = 1;

/// Which way a connection was begun.
#[derive(Clone, Copy)]
enum Begun {
    /// By the address.
    Here,
    /// With the address, under whatever name: its answers come from there.
    Elsewhere,
}

/// Forgets every connection that an address began, and every one that was led to it.
///
/// # Errors
/// The kernel's; before Linux 5.8 there is no such request.
pub fn forget_connections(address: IpAddr) -> io::Result<()> {
    let mut netlink = Netlink::of(Some(netlink::NETFILTER))?;
    netlink.request(request(address, Begun::Here))?;
    netlink.request(request(address, Begun::Elsewhere))
}

fn request(address: IpAddr, begun: Begun) -> Message {
    let mut request = Message::new(DELETE, nl::NLM_F_ACK);
    // struct nfgenmsg: family, version, no resource.
    request.bytes(&[family(address), 0, 0, 0]);
    // A filter's flags are numbered as the tuples less one: 1 of the first packet's, 2 of its answer's.
    let (tuple, flags) = match begun {
        Begun::Here => (CTA_TUPLE_ORIG, 1),
        Begun::Elsewhere => (CTA_TUPLE_REPLY, 2),
    };
    let source = if address.is_ipv4() { CTA_IP_V4_SRC } else { CTA_IP_V6_SRC };
    request.nest(tuple | nl::NLA_F_NESTED, |tuple| {
        tuple.nest(CTA_TUPLE_IP | nl::NLA_F_NESTED, |addresses| {
            octets(address, |bytes| addresses.attribute(source, bytes));
        });
    });
    request.nest(CTA_FILTER | nl::NLA_F_NESTED, |filter| filter.attribute(flags, &SOURCE.to_ne_bytes()));
    request
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_names_the_address_and_what_of_it_counts() {
        let bytes = request("10.1.2.3".parse().unwrap(), Begun::Elsewhere).finish(7).unwrap();
        let body = bytes.get(16..).unwrap();
        let filter = SOURCE.to_ne_bytes();
        let nested = |kind: u16| (kind | nl::NLA_F_NESTED).to_ne_bytes();
        let [reply, ip, count] = [nested(CTA_TUPLE_REPLY), nested(CTA_TUPLE_IP), nested(CTA_FILTER)];
        let expected = [
            &[2, 0, 0, 0][..],
            &[16, 0],
            &reply,
            &[12, 0],
            &ip,
            &[8, 0, 1, 0, 10, 1, 2, 3],
            &[12, 0],
            &count,
            &[8, 0, 2, 0],
            &filter,
        ];
        assert_eq!(body, expected.concat());
    }
}
