//! Who has which address. Pure: no host, no clock, no disk.
//!
//! ```text
//!   Pools: subnets of all networks ──choose──▶ a subnet that nobody has
//!   Allocator (one a network): subnet ⊇ range ⊇ free addresses ──take──▶ an endpoint's
//! ```

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv6Addr},
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

/// A block that subnets are cut from when a network asks for none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolSpec {
    /// All of it.
    pub base: IpNet,
    /// The prefix length of each subnet.
    pub size: u8,
}

impl PoolSpec {
    /// # Errors
    /// The size does not fit the block.
    pub fn new(base: IpNet, size: u8) -> Result<Self, String> {
        if size < base.prefix_len() || size >= base.max_prefix_len() - 1 {
            return Err(format!("invalid address pool: {base} cannot be cut into blocks of /{size}"));
        }
        Ok(Self { base: base.trunc(), size })
    }
}

/// Docker's own.
pub fn default_pools() -> Vec<PoolSpec> {
    let pool = |a: u8, b: u8, prefix: u8, size: u8| {
        let base = Ipv4Net::new([a, b, 0, 0].into(), prefix).ok()?;
        Some(PoolSpec { base: base.into(), size })
    };
    let sixteens = (17..=31).filter_map(|second| pool(172, second, 16, 16));
    sixteens.chain(pool(192, 168, 16, 20)).collect()
}

/// The blocks of IPv6, from the daemon's own 40 bits of the local range (RFC 4193).
pub fn local_pool(global_id: [u8; 5]) -> PoolSpec {
    let mut octets = [0; 16];
    octets[0] = 0xfd;
    octets[1..6].copy_from_slice(&global_id);
    let base = Ipv6Net::new_assert(Ipv6Addr::from(octets), 48);
    PoolSpec { base: base.into(), size: 64 }
}

/// Whether two networks share an address.
pub fn overlap(a: &IpNet, b: &IpNet) -> bool {
    a.contains(b) || b.contains(a)
}

/// The first subnet of the family that overlaps none of those in use.
pub fn choose_subnet(pools: &[PoolSpec], ipv6: bool, used: &[IpNet]) -> Option<IpNet> {
    pools.iter().filter(|pool| pool.base.addr().is_ipv6() == ipv6).find_map(|pool| {
        let mut candidate = IpNet::new(pool.base.network(), pool.size).ok()?;
        loop {
            match used.iter().find(|other| overlap(&candidate, other)) {
                None => return Some(candidate),
                // On, past what is in the way: a large block is stepped over at once.
                Some(other) => {
                    let behind = if other.prefix_len() < candidate.prefix_len() { other } else { &candidate };
                    candidate = IpNet::new(after(behind)?, pool.size).ok()?;
                }
            }
            if !pool.base.contains(&candidate) {
                return None;
            }
        }
    })
}

/// The address after a network's last.
fn after(net: &IpNet) -> Option<IpAddr> {
    offset(net.broadcast(), 1)
}

fn offset(address: IpAddr, by: u128) -> Option<IpAddr> {
    match address {
        IpAddr::V4(address) => {
            let sum = u32::from(address).checked_add(u32::try_from(by).ok()?)?;
            Some(std::net::Ipv4Addr::from(sum).into())
        }
        IpAddr::V6(address) => Some(Ipv6Addr::from(u128::from(address).checked_add(by)?).into()),
    }
}

/// Why an address cannot be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// Somebody has it.
    #[error("Address already in use")]
    InUse,
    /// In none of the network's subnets.
    #[error("requested address is out of range")]
    OutOfRange,
    /// None is left.
    #[error("no available addresses on this pool")]
    Exhausted,
}

/// A subnet of a network, and its addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allocator {
    subnet: IpNet,
    range: IpNet,
    taken: BTreeSet<IpAddr>,
    /// Where the next search begins.
    next: IpAddr,
}

impl Allocator {
    /// All of the subnet is free but its first and its last address, which mean something else. Addresses
    /// are given out of `range`, which lies in the subnet.
    pub fn new(subnet: IpNet, range: Option<IpNet>) -> Self {
        let mut taken = BTreeSet::new();
        // A subnet of two addresses, or of one, has none to spare (RFC 3021, RFC 6164).
        if subnet.prefix_len() < subnet.max_prefix_len() - 1 {
            taken.insert(subnet.network());
            if subnet.addr().is_ipv4() {
                taken.insert(subnet.broadcast());
            }
        }
        let range = range.unwrap_or(subnet);
        Self { subnet, range, taken, next: range.network() }
    }

    /// The subnet.
    pub fn subnet(&self) -> IpNet {
        self.subnet
    }

    /// Takes this address.
    ///
    /// # Errors
    /// It is somebody's, or of no use.
    pub fn take(&mut self, address: IpAddr) -> Result<(), AddressError> {
        if !self.subnet.contains(&address) {
            return Err(AddressError::OutOfRange);
        }
        if self.taken.insert(address) { Ok(()) } else { Err(AddressError::InUse) }
    }

    /// Takes the next free address of the range. One that was given back is given out again only after all others:
    /// whoever still remembers its last owner meets nobody for as long as possible.
    ///
    /// # Errors
    /// There is none.
    pub fn take_any(&mut self) -> Result<IpAddr, AddressError> {
        let (first, last) = (self.range.network(), self.range.broadcast());
        let free = self.free_from(self.next, last).or_else(|| self.free_from(first, last));
        let address = free.ok_or(AddressError::Exhausted)?;
        self.taken.insert(address);
        self.next = offset(address, 1).filter(|next| *next <= last).unwrap_or(first);
        Ok(address)
    }

    /// The lowest free address.
    fn free_from(&self, first: IpAddr, last: IpAddr) -> Option<IpAddr> {
        let mut candidate = first;
        for taken in self.taken.range(first..=last) {
            if *taken != candidate {
                break;
            }
            candidate = offset(candidate, 1)?;
        }
        (candidate <= last).then_some(candidate)
    }

    /// Gives an address back.
    pub fn release(&mut self, address: IpAddr) {
        self.taken.remove(&address);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    #[test]
    fn the_default_pools_are_dockers_in_order() {
        let pools = default_pools();
        let mut used = Vec::new();
        while let Some(subnet) = choose_subnet(&pools, false, &used) {
            used.push(subnet);
        }
        let texts: Vec<String> = used.iter().map(ToString::to_string).collect();
        assert_eq!(texts.len(), 15 + 16);
        assert_eq!(texts[0], "172.17.0.0/16");
        assert_eq!(texts[14], "172.31.0.0/16");
        assert_eq!(texts[15], "192.168.0.0/20");
        assert_eq!(texts[30], "192.168.240.0/20");
    }

    #[test]
    fn what_the_host_uses_is_stepped_over() {
        let pools = default_pools();
        let chosen = |used: &[&str]| {
            let used: Vec<IpNet> = used.iter().map(|text| net(text)).collect();
            choose_subnet(&pools, false, &used).map(|subnet| subnet.to_string())
        };
        assert_eq!(chosen(&["172.17.200.0/24"]).as_deref(), Some("172.18.0.0/16"));
        assert_eq!(chosen(&["172.16.0.0/12"]).as_deref(), Some("192.168.0.0/20"));
        assert_eq!(chosen(&["172.16.0.0/12", "192.168.1.0/24"]).as_deref(), Some("192.168.16.0/20"));
        assert_eq!(chosen(&["172.16.0.0/12", "192.168.0.0/16"]), None);
        let local = [local_pool([1, 2, 3, 4, 5])];
        assert_eq!(choose_subnet(&local, true, &[]), Some(net("fd01:203:405::/64")));
        assert_eq!(
            choose_subnet(&local, true, &[net("fd01:203:405::/64")]),
            Some(net("fd01:203:405:1::/64"))
        );
        assert_eq!(choose_subnet(&local, false, &[]), None);
    }

    #[test]
    fn addresses_are_taken_in_order_and_ends_are_not() {
        let mut small = Allocator::new(net("10.0.0.0/29"), None);
        small.take("10.0.0.1".parse().unwrap()).unwrap();
        let mut got = Vec::new();
        while let Ok(address) = small.take_any() {
            got.push(address.to_string());
        }
        assert_eq!(got, ["10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5", "10.0.0.6"]);
        small.release("10.0.0.4".parse().unwrap());
        assert_eq!(small.take("10.0.0.4".parse().unwrap()), Ok(()));
        assert_eq!(small.take("10.0.0.4".parse().unwrap()), Err(AddressError::InUse));
        assert_eq!(small.take("10.0.1.4".parse().unwrap()), Err(AddressError::OutOfRange));
        assert_eq!(small.take("10.0.0.7".parse().unwrap()), Err(AddressError::InUse));
    }

    #[test]
    fn an_address_that_was_given_back_comes_last() {
        let mut small = Allocator::new(net("10.0.0.0/29"), None);
        let mut next = || small.take_any().map(|address| address.to_string());
        assert_eq!((next(), next()), (Ok("10.0.0.1".into()), Ok("10.0.0.2".into())));
        small.release("10.0.0.1".parse().unwrap());
        let mut rest: Vec<String> = std::iter::from_fn(|| Some(small.take_any().ok()?.to_string())).collect();
        assert_eq!(rest.pop().as_deref(), Some("10.0.0.1"));
        assert_eq!(rest, ["10.0.0.3", "10.0.0.4", "10.0.0.5", "10.0.0.6"]);
    }

    #[test]
    fn a_range_bounds_what_is_given_and_not_what_is_asked_for() {
        let mut some = Allocator::new(net("10.0.0.0/24"), Some(net("10.0.0.64/30")));
        assert_eq!(some.take_any(), Ok("10.0.0.64".parse().unwrap()));
        some.take("10.0.0.200".parse().unwrap()).unwrap();
        for _ in 0..3 {
            some.take_any().unwrap();
        }
        assert_eq!(some.take_any(), Err(AddressError::Exhausted));
    }

    #[test]
    fn the_ends_of_the_address_space_are_no_panic() {
        let mut top = Allocator::new(net("255.255.255.252/30"), None);
        assert_eq!(top.take_any(), Ok("255.255.255.253".parse().unwrap()));
        let mut host = Allocator::new(net("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff/128"), None);
        host.take_any().unwrap();
        assert_eq!(host.take_any(), Err(AddressError::Exhausted));
        assert!(
            choose_subnet(
                &[PoolSpec { base: net("255.255.0.0/16"), size: 24 }],
                false,
                &[net("255.255.0.0/16")]
            )
            .is_none()
        );
        assert!(PoolSpec::new(net("10.0.0.0/8"), 7).is_err());
        assert!(PoolSpec::new(net("10.0.0.0/8"), 31).is_err());
    }

    proptest! {
        #[test]
        fn nobody_gets_an_address_twice_and_each_is_in_the_range(
            prefix in 20u8..=30,
            requests in proptest::collection::vec(prop_oneof![Just(None), (0u32..4096).prop_map(Some)], 1..200),
        ) {
            let subnet = net(&format!("10.1.0.0/{prefix}"));
            let mut allocator = Allocator::new(subnet, None);
            let mut held: Vec<IpAddr> = Vec::new();
            for request in requests {
                match request {
                    None => {
                        if let Ok(address) = allocator.take_any() {
                            prop_assert!(subnet.contains(&address));
                            prop_assert!(!held.contains(&address));
                            prop_assert!(address != subnet.network() && address != subnet.broadcast());
                            held.push(address);
                        } else {
                            prop_assert_eq!(held.len(), (1usize << (32 - prefix)) - 2);
                        }
                    }
                    Some(index) if !held.is_empty() => {
                        let address = held.swap_remove(index as usize % held.len());
                        allocator.release(address);
                        prop_assert_eq!(allocator.take(address), Ok(()));
                        allocator.release(address);
                    }
                    Some(_) => {}
                }
            }
        }

        #[test]
        fn a_chosen_subnet_overlaps_nothing(
            used in proptest::collection::vec((0u8..=255, 0u8..=255, 8u8..=30), 0..20),
        ) {
            let used: Vec<IpNet> = used
                .into_iter()
                .map(|(b, c, prefix)| IpNet::from(Ipv4Net::new([172, b, c, 0].into(), prefix).unwrap()).trunc())
                .collect();
            if let Some(subnet) = choose_subnet(&default_pools(), false, &used) {
                prop_assert!(used.iter().all(|other| !overlap(&subnet, other)));
            }
        }
    }
}
