//! The packet filter as text, made of the whole state each time. Pure.
//!
//! ```text
//!   guest ──tap──▶ bridge family: who may send what from this tap ──┬─▶ another tap of the bridge
//!                                                                   └─▶ the bridge itself
//!   the bridge ──▶ inet family: metadata, published ports, forward between networks, masquerade
//! ```
//!
//! What comes from a tap is an endpoint's own, or nothing: its MAC address, its addresses, ARP and neighbour
//! discovery about itself alone; no routers, no DHCP servers, no VLANs, nothing that is not ARP or IP. Into a
//! bridge goes what was asked for from inside, and what is published; between networks goes nothing else.
//!
//! nft applies a script as one transaction: there is no moment with half of the rules. The rules speak of bridges;
//! what is an endpoint's they look up in sets and maps ([`super::elements`]), so that a container's start and end need
//! no script.

use std::{
    collections::BTreeMap,
    fmt::Write,
    net::{IpAddr, Ipv6Addr},
};

use bulkhead_netlink::TableFamily;

use super::{
    Bridge, Forward, Tap,
    elements::{Elements, Set, elements},
};

/// Everything that the rules are made of.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct State {
    pub(super) bridges: BTreeMap<String, Bridge>,
    /// By their names.
    pub(super) taps: BTreeMap<String, Tap>,
    /// By the endpoint's tap.
    pub(super) forwards: BTreeMap<String, Vec<Forward>>,
    /// Whether this daemon has made the host a router, and so must keep it from being one for others.
    pub(super) sole_router: bool,
}

/// The link-local address that a guest's kernel makes of its MAC address (RFC 4291, appendix A).
pub(super) fn link_local(mac: [u8; 6]) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac;
    let word = |high: u8, low: u8| u16::from_be_bytes([high, low]);
    Ipv6Addr::new(0xfe80, 0, 0, 0, word(a ^ 2, b), word(c, 0xff), word(0xfe, d), word(e, f))
}

/// A script that leaves no table of that name.
pub(super) fn remove(table: &str) -> String {
    // Declared first, since deleting what is not there is an error.
    let mut script = String::new();
    for family in ["inet", "bridge"] {
        let _ = writeln!(script, "table {family} {table}\ndelete table {family} {table}");
    }
    script
}

impl State {
    /// Whether the rules of another state are the same, elements aside.
    pub(super) fn has_rules_of(&self, other: &Self) -> bool {
        self.bridges == other.bridges && self.sole_router == other.sole_router
    }
}

/// A script that replaces the tables of that name.
pub(super) fn script(table: &str, state: &State) -> String {
    let mut script = remove(table);
    let elements = elements(state);
    routed(&mut script, table, state, &elements);
    bridged(&mut script, table, &elements);
    script
}

fn sets(script: &mut String, family: TableFamily, elements: &Elements) {
    Set::ALL
        .iter()
        .filter(|set| set.family() == family)
        .for_each(|set| script.push_str(&set.script(elements)));
}

/// A script line; never fails.
macro_rules! line {
    ($script:expr, $($format:tt)*) => {
        let _ = writeln!($script, $($format)*);
    };
}

fn names<'a>(names: impl Iterator<Item = &'a String>) -> String {
    names.map(|name| format!("{name:?}")).collect::<Vec<_>>().join(", ")
}

fn set_of_bridges(script: &mut String, name: &str, bridges: Vec<&String>) {
    line!(script, "  set {name} {{");
    line!(script, "    type ifname");
    if !bridges.is_empty() {
        line!(script, "    elements = {{ {} }}", names(bridges.into_iter()));
    }
    line!(script, "  }}");
}

fn routed(script: &mut String, table: &str, state: &State, elements: &Elements) {
    let bridges = &state.bridges;
    let those = |filter: fn(&Bridge) -> bool| {
        bridges.iter().filter(|(_, bridge)| filter(bridge)).map(|(name, _)| name).collect()
    };
    line!(script, "table inet {table} {{");
    set_of_bridges(script, "bridges", those(|_| true));
    set_of_bridges(script, "internal", those(|bridge| bridge.internal));
    set_of_bridges(script, "without_metadata", those(|bridge| !bridge.metadata));
    sets(script, TableFamily::Inet, elements);
    script.push_str(
        "  chain early {\n    type filter hook prerouting priority raw; policy accept;\n    \
         iifname @without_metadata ip daddr 169.254.169.254 drop\n    \
         iifname @without_metadata ip6 daddr fd00:ec2::254 drop\n  }\n",
    );
    script.push_str(
        "  chain publish_in {\n    type nat hook prerouting priority dstnat; policy accept;\n    \
         fib daddr type local jump published\n  }\n  \
         chain publish_out {\n    type nat hook output priority -100; policy accept;\n    \
         oifname \"lo\" ip daddr 127.0.0.0/8 return\n    oifname \"lo\" ip6 daddr ::1 return\n    \
         fib daddr type local jump published\n  }\n",
    );
    line!(script, "  chain published {{");
    for (ip, nfproto, version) in [("ip", "ipv4", 4), ("ip6", "ipv6", 6)] {
        line!(script, "    dnat {ip} to {ip} daddr . meta l4proto . th dport map @published{version}");
        line!(
            script,
            "    meta nfproto {nfproto} dnat {ip} to meta l4proto . th dport map @anywhere{version}"
        );
    }
    line!(script, "  }}");
    line!(script, "  chain leave {{");
    line!(script, "    type nat hook postrouting priority srcnat; policy accept;");
    for (name, bridge) in bridges {
        for subnet in &bridge.subnets {
            let family = family(subnet.addr());
            // A container that reaches a published port of its own network by way of the host.
            line!(script, "    oifname {name:?} {family} saddr {subnet} ct status dnat masquerade");
            if bridge.masquerade && !bridge.internal {
                line!(script, "    oifname != {name:?} {family} saddr {subnet} masquerade");
            }
        }
    }
    line!(script, "  }}");
    // A host that was no router before: other bridges (dockerd's, libvirt's) have seen to forwarding as this
    // daemon has, and nobody else has.
    line!(script, "  chain others {{");
    if state.sole_router {
        script.push_str("    meta iifkind \"bridge\" accept\n    meta oifkind \"bridge\" accept\n    drop\n");
    }
    line!(script, "  }}");
    line!(script, "  chain between {{");
    line!(script, "    type filter hook forward priority filter; policy accept;");
    line!(script, "    iifname != @bridges oifname != @bridges goto others");
    line!(script, "    ct state established,related accept");
    for (name, bridge) in bridges {
        // Ports that are kept apart in the bridge must not meet by way of the host either.
        let how = if bridge.icc { "" } else { "ct status dnat " };
        line!(script, "    iifname {name:?} oifname {name:?} {how}accept");
    }
    line!(script, "    iifname @internal drop");
    line!(script, "    oifname @internal drop");
    line!(script, "    oifname @bridges ct status dnat accept");
    line!(script, "    oifname @bridges drop");
    line!(script, "  }}");
    line!(script, "}}");
}

fn bridged(script: &mut String, table: &str, elements: &Elements) {
    line!(script, "table bridge {table} {{");
    sets(script, TableFamily::Bridge, elements);
    line!(script, "  chain from_guest {{");
    line!(script, "    iifname . ether saddr != @macs drop");
    // A tag would be taken off before the protocol is looked at.
    line!(script, "    ether type {{ 0x8100, 0x88a8 }} drop");
    line!(
        script,
        "    ether type arp iifname . arp operation . arp saddr ether . arp saddr ip @arp_of accept"
    );
    line!(script, "    ether type ip udp sport 67 drop");
    line!(script, "    ether type ip iifname . ip saddr @sources4 accept");
    line!(script, "    ether type != ip6 drop");
    line!(script, "    icmpv6 type {{ nd-router-advert, nd-redirect }} drop");
    // Neighbour discovery in fragments is nothing that an honest sender makes (RFC 6980).
    line!(script, "    ip6 daddr ff00::/8 exthdr frag exists drop");
    line!(script, "    udp sport 547 drop");
    // Without an address of its own only to find out which it can have.
    let nameless = "icmpv6 type { nd-neighbor-solicit, mld2-listener-report }";
    line!(script, "    ip6 saddr :: {nameless} iifname . ip6 saddr @sources6 accept");
    line!(script, "    ip6 saddr :: drop");
    line!(script, "    iifname . ip6 saddr != @sources6 drop");
    line!(script, "    icmpv6 type nd-neighbor-advert iifname . @th,64,128 @targets6 accept");
    line!(script, "    icmpv6 type nd-neighbor-advert drop");
    line!(script, "    accept");
    line!(script, "  }}");
    line!(script, "  chain from_guests {{");
    line!(script, "    type filter hook prerouting priority -300; policy accept;");
    line!(script, "    iifname @taps jump from_guest");
    line!(script, "  }}");
    line!(script, "}}");
}

fn family(address: IpAddr) -> &'static str {
    if address.is_ipv4() { "ip" } else { "ip6" }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> State {
        let bridge = |subnets: &[&str], internal: bool| Bridge {
            mtu: 1500,
            gateways: vec![],
            subnets: subnets.iter().map(|text| text.parse().unwrap()).collect(),
            internal,
            masquerade: true,
            icc: !internal,
            metadata: false,
        };
        let tap = |addresses: &[&str]| Tap {
            bridge: "bh-1".into(),
            mac: [2, 0x42, 172, 17, 0, 2],
            mtu: 1500,
            addresses: addresses.iter().map(|text| text.parse().unwrap()).collect(),
            isolated: false,
        };
        let forward = |protocol, host: &str, to: &str| Forward {
            protocol,
            host: host.parse().unwrap(),
            to: to.parse().unwrap(),
        };
        State {
            bridges: [
                ("bh-1".to_owned(), bridge(&["172.17.0.0/16", "fd00::/64"], false)),
                ("bh-2".to_owned(), bridge(&["172.18.0.0/16"], true)),
            ]
            .into(),
            taps: [
                ("bht-1".to_owned(), tap(&["172.17.0.2", "fd00::2"])),
                ("bht-2".to_owned(), tap(&["172.18.0.2"])),
            ]
            .into(),
            forwards: [(
                "bht-1".to_owned(),
                vec![
                    forward("tcp", "0.0.0.0:8080", "172.17.0.2:80"),
                    forward("tcp", "[::]:8080", "[fd00::2]:80"),
                    forward("udp", "10.0.0.1:53", "172.17.0.2:53"),
                    forward("tcp", "127.0.0.1:9000", "172.17.0.2:90"),
                    forward("tcp", "[::]:8081", "172.17.0.2:81"),
                ],
            )]
            .into(),
            sole_router: true,
        }
    }

    #[test]
    fn the_rules_of_two_networks() {
        insta::assert_snapshot!(script("bulkhead-test", &state()));
    }

    #[test]
    fn without_networks_there_are_hooks_and_nothing_in_them() {
        insta::assert_snapshot!(script("bulkhead-test", &State::default()));
    }

    #[test]
    fn the_link_local_address_is_the_kernels() {
        assert_eq!(link_local([2, 0x42, 0xac, 0x11, 0, 2]).to_string(), "fe80::42:acff:fe11:2");
    }
}
