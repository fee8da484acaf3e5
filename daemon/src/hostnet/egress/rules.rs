//! The rules of one endpoint with an egress policy, in a table of its own: it comes and goes with the endpoint, and
//! what it learns (addresses of names, what was refused) is not lost when other rules change. Pure.
//!
//! ```text
//!   from the endpoint ─┬─ an answer, a neighbour, neighbour discovery ──▶ passes
//!                      ├─ an allowed network ───────────────────────────▶ passes
//!                      ├─ TCP to a pinned address ──▶ dnat to the proxy, which looks at what is asked for
//!                      └─ else ──▶ counted by destination, refused
//! ```
//!
//! Before destinations are changed (priority mangle), so what counts is what the guest has written.

use std::{
    fmt::Write,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use ipnet::IpNet;
use serde::Deserialize;

/// What an endpoint may reach by itself, and where the rest is looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct EgressRules {
    /// The name of the bridge that it is at.
    pub bridge: String,
    /// Its own addresses, the link-local one included.
    pub addresses: Vec<IpAddr>,
    /// Where its neighbours are.
    pub subnets: Vec<IpNet>,
    /// What it may reach by whatever protocol, or by TCP and UDP at a port.
    pub networks: Vec<(IpNet, Option<u16>)>,
    /// Where connections to pinned addresses go, at most one a family.
    pub proxies: Vec<SocketAddr>,
}

/// An address that an allowed name leads to, for some time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pin {
    /// The address.
    pub address: IpAddr,
    /// None: every port.
    pub port: Option<u16>,
    /// How long.
    pub lasts: Duration,
}

/// What was refused, and how often so far.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Refused {
    /// `tcp 192.0.2.1:443` for instance.
    pub destination: String,
    /// Packets.
    pub packets: u64,
}

/// How many pinned addresses there can be, and how many refused destinations are told apart. Beyond, pins are not
/// made, and refusals are counted as others.
const PINS: usize = 4096;
const DESTINATIONS: usize = 256;

/// A script line; never fails.
macro_rules! line {
    ($script:expr, $($format:tt)*) => {
        let _ = writeln!($script, $($format)*);
    };
}

/// A script that leaves no table of that name.
pub(super) fn remove(table: &str) -> String {
    format!("table inet {table}\ndelete table inet {table}\n")
}

/// A script that makes the table anew.
pub(super) fn script(table: &str, rules: &EgressRules) -> String {
    let mut script = remove(table);
    line!(script, "table inet {table} {{");
    for (version, kind) in [(4, "ipv4_addr"), (6, "ipv6_addr")] {
        line!(script, "  set pins{version} {{ type {kind} . inet_service; flags timeout; size {PINS}; }}");
        line!(script, "  set hosts{version} {{ type {kind}; flags timeout; size {PINS}; }}");
        line!(script, "  set refused{version} {{");
        line!(script, "    type {kind} . inet_proto . inet_service; flags dynamic,timeout; timeout 1h;");
        line!(script, "    size {DESTINATIONS}; counter;");
        line!(script, "  }}");
    }
    line!(script, "  counter others {{ }}");
    line!(script, "  chain judge {{");
    line!(script, "    ct direction reply accept");
    line!(
        script,
        "    icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert, nd-router-solicit, mld2-listener-report }} accept"
    );
    // Seen here only on a host that lets bridges ask the packet filter (br_netfilter).
    for subnet in &rules.subnets {
        line!(script, "    {} daddr {subnet} fib daddr type != local accept", family(subnet.addr()));
    }
    for (network, port) in &rules.networks {
        line!(script, "    {} accept", destination(network, *port));
    }
    for (version, ip) in [(4, "ip"), (6, "ip6")] {
        line!(script, "    {ip} daddr . tcp dport @pins{version} accept");
        line!(script, "    {ip} daddr @hosts{version} meta l4proto tcp accept");
    }
    for (version, ip) in [(4, "ip"), (6, "ip6")] {
        line!(
            script,
            "    meta l4proto {{ tcp, udp }} update @refused{version} {{ {ip} daddr . meta l4proto . th dport }}"
        );
    }
    line!(script, "    meta l4proto != {{ tcp, udp }} counter name others");
    line!(script, "    meta l4proto tcp reject with tcp reset");
    line!(script, "    reject with icmpx admin-prohibited");
    line!(script, "  }}");
    line!(script, "  chain egress {{");
    line!(script, "    type filter hook prerouting priority mangle; policy accept;");
    for address in &rules.addresses {
        line!(script, "    iifname {:?} {} saddr {address} jump judge", rules.bridge, family(*address));
    }
    line!(script, "  }}");
    line!(script, "  chain lead {{");
    for (network, port) in &rules.networks {
        line!(script, "    {} return", destination(network, *port));
    }
    for proxy in &rules.proxies {
        let (version, ip) = if proxy.is_ipv4() { (4, "ip") } else { (6, "ip6") };
        line!(script, "    {ip} daddr . tcp dport @pins{version} dnat {ip} to {proxy}");
        line!(script, "    {ip} daddr @hosts{version} meta l4proto tcp dnat {ip} to {proxy}");
    }
    line!(script, "  }}");
    line!(script, "  chain led {{");
    line!(script, "    type nat hook prerouting priority dstnat - 1; policy accept;");
    for address in &rules.addresses {
        line!(script, "    iifname {:?} {} saddr {address} jump lead", rules.bridge, family(*address));
    }
    line!(script, "  }}");
    line!(script, "}}");
    script
}

/// A script that pins addresses, or pins them anew.
pub(super) fn pin(table: &str, pins: &[Pin]) -> String {
    let mut script = String::new();
    for pin in pins {
        let version = if pin.address.is_ipv4() { 4 } else { 6 };
        let (set, element) = match pin.port {
            Some(port) => (format!("pins{version}"), format!("{} . {port}", pin.address)),
            None => (format!("hosts{version}"), pin.address.to_string()),
        };
        let lasts = pin.lasts.as_secs().max(1);
        // An element that is there keeps its time, and one that is not cannot be deleted.
        line!(script, "add element inet {table} {set} {{ {element} }}");
        line!(script, "delete element inet {table} {set} {{ {element} }}");
        line!(script, "add element inet {table} {set} {{ {element} timeout {lasts}s }}");
    }
    script
}

fn destination(network: &IpNet, port: Option<u16>) -> String {
    let family = family(network.addr());
    match port {
        None => format!("{family} daddr {network}"),
        Some(port) => format!("{family} daddr {network} meta l4proto {{ tcp, udp }} th dport {port}"),
    }
}

fn family(address: IpAddr) -> &'static str {
    if address.is_ipv4() { "ip" } else { "ip6" }
}

/// What `nft -j list table` tells of what was refused.
///
/// # Errors
/// The text is not what nft prints.
pub(super) fn read_refused(json: &str) -> serde_json::Result<Vec<Refused>> {
    let listed: Listed = serde_json::from_str(json)?;
    let mut refused = Vec::new();
    for item in listed.nftables {
        if let Some(set) = item.set.filter(|set| set.name.starts_with("refused")) {
            // Other sets have elements of other forms.
            let elements = set.elem.into_iter().filter_map(|element| serde_json::from_value(element).ok());
            for Element { elem: Counted { val: Value { concat: (address, protocol, port) }, counter } } in
                elements
            {
                let address = match address.parse() {
                    Ok(address) => SocketAddr::new(address, port).to_string(),
                    Err(_) => continue,
                };
                let packets = counter.packets;
                refused.push(Refused { destination: format!("{protocol} {address}"), packets });
            }
        } else if let Some(counter) = item.counter.filter(|counter| counter.packets > 0) {
            refused.push(Refused { destination: "others".into(), packets: counter.packets });
        }
    }
    refused.sort();
    Ok(refused)
}

#[derive(Deserialize)]
struct Listed {
    nftables: Vec<Item>,
}

#[derive(Deserialize)]
struct Item {
    #[serde(default)]
    set: Option<Set>,
    #[serde(default)]
    counter: Option<Counter>,
}

#[derive(Deserialize)]
struct Set {
    name: String,
    #[serde(default)]
    elem: Vec<serde_json::Value>,
}

#[derive(Deserialize)]
struct Element {
    elem: Counted,
}

#[derive(Deserialize)]
struct Counted {
    val: Value,
    #[serde(default)]
    counter: Counter,
}

#[derive(Deserialize)]
struct Value {
    concat: (String, String, u16),
}

#[derive(Default, Deserialize)]
struct Counter {
    packets: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules() -> EgressRules {
        EgressRules {
            bridge: "bh-1".into(),
            addresses: ["172.17.0.2", "fd00::2"].map(|text| text.parse().unwrap()).into(),
            subnets: ["172.17.0.0/16", "fd00::/64"].map(|text| text.parse().unwrap()).into(),
            networks: vec![
                ("10.0.0.0/8".parse().unwrap(), Some(5432)),
                ("192.0.2.0/24".parse().unwrap(), None),
            ],
            proxies: ["172.17.0.1:4000", "[fd00::1]:4001"].map(|text| text.parse().unwrap()).into(),
        }
    }

    #[test]
    fn the_rules_of_an_endpoint() {
        let script = script("bulkhead-test-bht-1", &rules());
        let at = |line: &str| script.lines().position(|found| found.trim() == line);
        // What is allowed comes before what is counted, and that before what refuses.
        let order = [
            "ct direction reply accept",
            "ip daddr 172.17.0.0/16 fib daddr type != local accept",
            "ip daddr 10.0.0.0/8 meta l4proto { tcp, udp } th dport 5432 accept",
            "ip daddr 192.0.2.0/24 accept",
            "ip daddr . tcp dport @pins4 accept",
            "meta l4proto { tcp, udp } update @refused4 { ip daddr . meta l4proto . th dport }",
            "meta l4proto tcp reject with tcp reset",
            "reject with icmpx admin-prohibited",
            "iifname \"bh-1\" ip saddr 172.17.0.2 jump judge",
            "iifname \"bh-1\" ip6 saddr fd00::2 jump judge",
            "ip daddr 192.0.2.0/24 return",
            "ip daddr . tcp dport @pins4 dnat ip to 172.17.0.1:4000",
            "ip6 daddr . tcp dport @pins6 dnat ip6 to [fd00::1]:4001",
            "iifname \"bh-1\" ip saddr 172.17.0.2 jump lead",
        ];
        let places: Vec<_> = order.iter().map(|line| at(line).ok_or(line)).collect::<Result<_, _>>().unwrap();
        assert!(places.is_sorted(), "{script}");
    }

    #[test]
    fn pins_replace_what_they_were() {
        let pin = |address: &str, port| Pin {
            address: address.parse().unwrap(),
            port,
            lasts: Duration::from_secs(90),
        };
        let script = super::pin("t", &[pin("192.0.2.1", Some(443)), pin("fd00::1", None)]);
        let lines: Vec<&str> = script.lines().collect();
        assert_eq!(
            lines,
            [
                "add element inet t pins4 { 192.0.2.1 . 443 }",
                "delete element inet t pins4 { 192.0.2.1 . 443 }",
                "add element inet t pins4 { 192.0.2.1 . 443 timeout 90s }",
                "add element inet t hosts6 { fd00::1 }",
                "delete element inet t hosts6 { fd00::1 }",
                "add element inet t hosts6 { fd00::1 timeout 90s }",
            ]
        );
    }

    #[test]
    fn what_was_refused_is_read_as_nft_prints_it() {
        let json = r#"{"nftables": [
            {"metainfo": {"version": "1.0.6"}},
            {"counter": {"family": "inet", "name": "others", "table": "t", "handle": 5, "packets": 2, "bytes": 0}},
            {"set": {"name": "pins4", "type": ["ipv4_addr", "inet_service"], "elem": [{"elem": {"val": {"concat": ["192.0.2.1", 443]}, "timeout": 60}}]}},
            {"set": {"name": "refused4", "size": 256, "elem": [
                {"elem": {"val": {"concat": ["192.0.2.1", "udp", 53]}, "expires": 3599, "counter": {"packets": 3, "bytes": 4}}}]}},
            {"set": {"name": "refused6", "elem": [
                {"elem": {"val": {"concat": ["fd00::1", "tcp", 443]}, "expires": 3599, "counter": {"packets": 5, "bytes": 5}}}]}}
        ]}"#;
        let refused = read_refused(json).unwrap();
        let texts: Vec<String> =
            refused.iter().map(|refused| format!("{} {}", refused.destination, refused.packets)).collect();
        assert_eq!(texts, ["others 2", "tcp [fd00::1]:443 5", "udp 192.0.2.1:53 3"]);
        assert!(read_refused("nonsense").is_err());
    }
}
