//! What is of one endpoint in the packet filter: elements of sets and maps that the rules look into. Pure.
//!
//! ```text
//!   State ──▶ elements ─┬─ as text, in the script that makes the tables
//!                       └─ what differs from before, as bytes for the kernel: a start or an end changes no rule
//! ```

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use bulkhead_netlink::{MAX_ELEMENTS, SetChange, TableFamily};

use super::{
    Forward, Tap,
    rules::{State, link_local},
};

/// A field of a key, or of what it maps to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Field {
    Interface(String),
    Mac([u8; 6]),
    /// A request or a reply.
    ArpOperation(u16),
    Address(IpAddr),
    /// An IPv6 address that stands in a message, where nft knows no type.
    Target(Ipv6Addr),
    /// `tcp` or `udp`.
    Protocol(&'static str),
    Port(u16),
}

impl Field {
    /// As nft reads it.
    fn text(&self) -> String {
        match self {
            Self::Interface(name) => format!("{name:?}"),
            Self::Mac(mac) => mac.map(|byte| format!("{byte:02x}")).join(":"),
            Self::ArpOperation(number) => number.to_string(),
            Self::Address(address) => address.to_string(),
            Self::Target(address) => format!("0x{:032x}", u128::from(*address)),
            Self::Protocol(name) => (*name).to_owned(),
            Self::Port(port) => port.to_string(),
        }
    }

    /// As the kernel has it: padded to its registers' four bytes.
    fn bytes(&self, to: &mut Vec<u8>) {
        match self {
            Self::Interface(name) => {
                let mut bytes = [0; 16];
                bytes.iter_mut().zip(name.bytes()).for_each(|(to, from)| *to = from);
                to.extend(bytes);
            }
            Self::Mac(mac) => to.extend(mac),
            Self::ArpOperation(number) | Self::Port(number) => to.extend(number.to_be_bytes()),
            Self::Address(IpAddr::V4(address)) => to.extend(address.octets()),
            Self::Address(IpAddr::V6(address)) | Self::Target(address) => to.extend(address.octets()),
            Self::Protocol(name) => to.push(if *name == "udp" { 17 } else { 6 }),
        }
        to.resize(to.len().next_multiple_of(4), 0);
    }
}

/// A set or a map that has elements of endpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Set {
    /// Endpoints' taps.
    Taps,
    /// From which tap which MAC address.
    Macs,
    /// From which tap ARP of whom.
    Arp,
    /// From which tap which IPv4 address.
    Sources4,
    /// From which tap which IPv6 address; the unspecified one for the discovery of neighbours.
    Sources6,
    /// From which tap which address may be advertised.
    Targets6,
    /// Where an address and port of the host lead.
    Published4,
    Published6,
    /// Where a port of every address of the host leads.
    Anywhere4,
    Anywhere6,
}

impl Set {
    pub(super) const ALL: [Self; 10] = [
        Self::Taps,
        Self::Macs,
        Self::Arp,
        Self::Sources4,
        Self::Sources6,
        Self::Targets6,
        Self::Published4,
        Self::Published6,
        Self::Anywhere4,
        Self::Anywhere6,
    ];

    pub(super) fn family(self) -> TableFamily {
        match self {
            Self::Taps | Self::Macs | Self::Arp | Self::Sources4 | Self::Sources6 | Self::Targets6 => {
                TableFamily::Bridge
            }
            Self::Published4 | Self::Published6 | Self::Anywhere4 | Self::Anywhere6 => TableFamily::Inet,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Taps => "taps",
            Self::Macs => "macs",
            Self::Arp => "arp_of",
            Self::Sources4 => "sources4",
            Self::Sources6 => "sources6",
            Self::Targets6 => "targets6",
            Self::Published4 => "published4",
            Self::Published6 => "published6",
            Self::Anywhere4 => "anywhere4",
            Self::Anywhere6 => "anywhere6",
        }
    }

    /// Its kind and what its elements are.
    fn declaration(self) -> &'static str {
        match self {
            Self::Taps => "type ifname",
            Self::Macs => "type ifname . ether_addr",
            Self::Arp => "typeof iifname . arp operation . arp saddr ether . arp saddr ip",
            Self::Sources4 => "type ifname . ipv4_addr",
            Self::Sources6 => "type ifname . ipv6_addr",
            Self::Targets6 => "typeof iifname . @th,64,128",
            Self::Published4 => "type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service",
            Self::Published6 => "type ipv6_addr . inet_proto . inet_service : ipv6_addr . inet_service",
            Self::Anywhere4 => "type inet_proto . inet_service : ipv4_addr . inet_service",
            Self::Anywhere6 => "type inet_proto . inet_service : ipv6_addr . inet_service",
        }
    }

    /// As a script declares it, with its elements.
    pub(super) fn script(self, elements: &Elements) -> String {
        let text = |fields: &[Field]| fields.iter().map(Field::text).collect::<Vec<_>>().join(" . ");
        let own = elements.iter().filter(|((set, _), _)| *set == self);
        let texts: Vec<String> = own
            .map(|((_, key), value)| match value.as_slice() {
                [] => text(key),
                value => format!("{} : {}", text(key), text(value)),
            })
            .collect();
        let declaration = self.declaration();
        let kind = if declaration.contains(" : ") { "map" } else { "set" };
        let mut script = format!("  {kind} {} {{\n    {declaration}\n", self.name());
        if !texts.is_empty() {
            script.push_str(&format!("    elements = {{ {} }}\n", texts.join(", ")));
        }
        script.push_str("  }\n");
        script
    }
}

/// Keys, and what they map to; nothing in a set.
pub(super) type Elements = BTreeMap<(Set, Vec<Field>), Vec<Field>>;

/// Everything that a state has in sets and maps.
pub(super) fn elements(state: &State) -> Elements {
    let mut elements = Elements::new();
    for (name, tap) in &state.taps {
        endpoint(&mut elements, name, tap);
    }
    for forward in state.forwards.values().flatten() {
        publish(&mut elements, forward);
    }
    elements
}

fn endpoint(elements: &mut Elements, name: &str, tap: &Tap) {
    let tap_field = || Field::Interface(name.to_owned());
    let mut add = |set: Set, fields: Vec<Field>| {
        let key = std::iter::once(tap_field()).chain(fields).collect();
        elements.insert((set, key), Vec::new());
    };
    add(Set::Taps, vec![]);
    add(Set::Macs, vec![Field::Mac(tap.mac)]);
    let mut ipv6 = Vec::new();
    for address in &tap.addresses {
        match address {
            IpAddr::V4(_) => {
                // Whoever asks whether an address is somebody's does so without one.
                let probe = IpAddr::from(Ipv4Addr::UNSPECIFIED);
                for (operation, sender) in [(1, probe), (1, *address), (2, *address)] {
                    let operation = Field::ArpOperation(operation);
                    add(Set::Arp, vec![operation, Field::Mac(tap.mac), Field::Address(sender)]);
                }
                add(Set::Sources4, vec![Field::Address(*address)]);
            }
            IpAddr::V6(address) => ipv6.push(*address),
        }
    }
    if ipv6.is_empty() {
        return;
    }
    ipv6.push(link_local(tap.mac));
    for address in ipv6 {
        add(Set::Sources6, vec![Field::Address(address.into())]);
        add(Set::Targets6, vec![Field::Target(address)]);
    }
    add(Set::Sources6, vec![Field::Address(Ipv6Addr::UNSPECIFIED.into())]);
}

fn publish(elements: &mut Elements, forward: &Forward) {
    let Forward { protocol, host, to } = forward;
    // The other family's, and the loopback's, are the proxy's.
    if host.is_ipv6() != to.is_ipv6() || host.ip().is_loopback() {
        return;
    }
    let target = |to: &SocketAddr| vec![Field::Address(to.ip()), Field::Port(to.port())];
    let port = [Field::Protocol(protocol), Field::Port(host.port())];
    let (set, key) = match (host.ip(), host.is_ipv6()) {
        (address, ipv6) if address.is_unspecified() => {
            (if ipv6 { Set::Anywhere6 } else { Set::Anywhere4 }, port.to_vec())
        }
        (address, ipv6) => {
            let set = if ipv6 { Set::Published6 } else { Set::Published4 };
            (set, std::iter::once(Field::Address(address)).chain(port).collect())
        }
    };
    elements.insert((set, key), target(to));
}

/// What leads from one to the other, without any rule changed. None: too much.
pub(super) fn difference<'a>(table: &'a str, old: &Elements, new: &Elements) -> Option<Vec<SetChange<'a>>> {
    let lacks = |other: &Elements, key: &(Set, Vec<Field>), value: &Vec<Field>| other.get(key) != Some(value);
    let leaving = old.iter().filter(|(key, value)| lacks(new, key, value)).map(|element| (false, element));
    let coming = new.iter().filter(|(key, value)| lacks(old, key, value)).map(|element| (true, element));
    let mut changes: Vec<SetChange<'a>> = Vec::new();
    let mut count = 0;
    // What leaves goes first, since a key that now leads elsewhere is among both; in the order of sets.
    for (adds, ((set, key), value)) in leaving.chain(coming) {
        count += 1;
        let bytes = |fields: &[Field]| {
            let mut bytes = Vec::new();
            fields.iter().for_each(|field| field.bytes(&mut bytes));
            bytes
        };
        let element = (bytes(key), (!value.is_empty()).then(|| bytes(value)));
        match changes.last_mut() {
            Some(last) if (last.adds, last.set, last.family) == (adds, set.name(), set.family()) => {
                last.elements.push(element);
            }
            _ => changes.push(SetChange {
                family: set.family(),
                table,
                set: set.name(),
                adds,
                elements: vec![element],
            }),
        }
    }
    (count <= MAX_ELEMENTS).then_some(changes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tap(addresses: &[&str]) -> Tap {
        Tap {
            bridge: "bh-1".into(),
            mac: [2, 0x42, 172, 17, 0, 2],
            mtu: 1500,
            addresses: addresses.iter().map(|text| text.parse().unwrap()).collect(),
            isolated: false,
        }
    }

    fn state(taps: &[(&str, &[&str])], ports: &[(&str, &str)]) -> State {
        let forward = |(host, to): &(&str, &str)| Forward {
            protocol: "udp",
            host: host.parse().unwrap(),
            to: to.parse().unwrap(),
        };
        State {
            taps: taps.iter().map(|(name, addresses)| ((*name).to_owned(), tap(addresses))).collect(),
            forwards: [("bht-1".to_owned(), ports.iter().map(forward).collect())].into(),
            ..State::default()
        }
    }

    #[test]
    fn a_new_endpoint_is_elements_alone_and_its_end_takes_them_away() {
        let none = elements(&State::default());
        let one = elements(&state(&[("bht-1", &["10.0.0.2"])], &[("0.0.0.0:53", "10.0.0.2:5353")]));
        let come = difference("t", &none, &one).unwrap();
        let sets: Vec<_> =
            come.iter().map(|change| (change.set, change.adds, change.elements.len())).collect();
        assert_eq!(
            sets,
            [
                ("taps", true, 1),
                ("macs", true, 1),
                ("arp_of", true, 3),
                ("sources4", true, 1),
                ("anywhere4", true, 1)
            ]
        );
        let (key, value) = &come[4].elements[0];
        assert_eq!(key, &[17, 0, 0, 0, 0, 53, 0, 0]);
        assert_eq!(value.as_deref(), Some(&[10, 0, 0, 2, 0x14, 0xe9, 0, 0][..]));
        let (arp, _) = &come[2].elements[1];
        let name = [b'b', b'h', b't', b'-', b'1', 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(arp, &[&name[..], &[0, 1, 0, 0, 2, 0x42, 172, 17, 0, 2, 0, 0, 10, 0, 0, 2]].concat());
        let gone = difference("t", &one, &none).unwrap();
        assert!(gone.iter().all(|change| !change.adds));
        assert_eq!(gone.iter().map(|change| change.elements.len()).sum::<usize>(), 7);
        assert_eq!(difference("t", &one, &one), Some(vec![]));
    }

    #[test]
    fn a_port_that_now_leads_elsewhere_leaves_before_it_comes() {
        let to = |to: &str| elements(&state(&[], &[("192.0.2.1:53", to)]));
        let changes = difference("t", &to("10.0.0.2:53"), &to("10.0.0.3:53")).unwrap();
        let order: Vec<_> = changes.iter().map(|change| (change.set, change.adds)).collect();
        assert_eq!(order, [("published4", false), ("published4", true)]);
    }

    #[test]
    fn a_great_many_are_not_changed_one_by_one() {
        let taps: Vec<String> = (0..300).map(|n| format!("bht-{n}")).collect();
        let taps: Vec<(&str, &[&str])> = taps.iter().map(|name| (name.as_str(), &["10.0.0.2"][..])).collect();
        assert_eq!(difference("t", &Elements::new(), &elements(&state(&taps, &[]))), None);
    }

    proptest! {
        #[test]
        fn applied_to_the_old_the_difference_gives_the_new(
            old in proptest::collection::btree_map(0u16..40, 0u16..3, 0..30),
            new in proptest::collection::btree_map(0u16..40, 0u16..3, 0..30),
        ) {
            let made = |ports: &BTreeMap<u16, u16>| -> Elements {
                let element = |(port, to): (&u16, &u16)| ((Set::Anywhere4, vec![Field::Port(*port)]), vec![Field::Port(*to)]);
                ports.iter().map(element).collect()
            };
            let bytes = |ports: &BTreeMap<u16, u16>| -> BTreeMap<Vec<u8>, Option<Vec<u8>>> {
                let changes = difference("t", &Elements::new(), &made(ports)).unwrap();
                changes.into_iter().flat_map(|change| change.elements).collect()
            };
            let mut kernel = bytes(&old);
            for change in difference("t", &made(&old), &made(&new)).unwrap() {
                for (key, value) in change.elements {
                    let before = if change.adds { kernel.insert(key, value) } else { kernel.remove(&key) };
                    // The kernel refuses what is there already, and what is not.
                    prop_assert_eq!(before.is_some(), !change.adds);
                }
            }
            prop_assert_eq!(kernel, bytes(&new));
        }
    }
}
