//! Containers in networks: addresses, taps and ports from a start to an end.

use std::{collections::BTreeMap, net::IpAddr, os::fd::OwnedFd, sync::Arc};

use ipnet::IpNet;

use super::{
    Entry, Networks, attach, mac_for,
    ports::{self, Binding},
    record::{Attachment, Driver, Endpoint, Network},
};
use crate::{
    engine::{
        Error, Result,
        container::{names, record::Record},
        spec::NetworkFacts,
    },
    hostnet::{HostError, Tap},
    sandbox::NICS,
};

/// A container in a network, as its neighbours know it.
#[derive(Debug, Clone)]
pub(super) struct Member {
    /// The container's name.
    pub(super) name: String,
    /// Its other names in the network.
    pub(super) aliases: Vec<String>,
    /// Its host name.
    pub(super) hostname: String,
    /// `container:alias`: what it calls others.
    pub(super) links: Vec<String>,
    /// Its interface.
    pub(super) endpoint: Endpoint,
}

impl Member {
    /// Whether a name, in lower case or not, is one of its own: its name, an alias, its short id, its host name.
    fn is_called(&self, id: &str, name: &str) -> bool {
        let short = id.get(..12).unwrap_or(id);
        let mut names = [self.name.as_str(), short, self.hostname.as_str()].into_iter();
        names.any(|own| own.eq_ignore_ascii_case(name))
            || self.aliases.iter().any(|alias| alias.eq_ignore_ascii_case(name))
    }
}

/// A place in a network that a container has just got.
pub(crate) struct Joined {
    pub(crate) network: Arc<Network>,
    pub(crate) endpoint: Endpoint,
    /// Bound, and not yet led anywhere.
    ports: Vec<Binding>,
}

impl Networks {
    /// Gives a container that is being started its places in all of its networks: addresses and ports. On an
    /// error nothing of it is left.
    ///
    /// # Errors
    /// In Docker's words.
    pub(crate) async fn join(&self, record: &Record) -> Result<Vec<Joined>> {
        let mut joined = Vec::new();
        let gateway = self.publishing(record);
        for (name, attachment) in &record.networks {
            let publishes = gateway.as_deref() == Some(name.as_str());
            let taken: Vec<&Endpoint> = joined.iter().map(|other: &Joined| &other.endpoint).collect();
            let one = self.join_one(record, name, attachment, &taken, publishes).await;
            match one {
                Ok(Some(one)) => joined.push(one),
                Ok(None) => {}
                Err(error) => {
                    drop(joined);
                    self.leave(&record.id).await;
                    let message = format!("failed to set up container networking: {}", error.message);
                    return Err(if error.kind == crate::engine::ErrorKind::NotFound {
                        error
                    } else {
                        Error { message, ..error }
                    });
                }
            }
        }
        Ok(joined)
    }

    /// The name of the network in which a container publishes its ports: that of its default route.
    fn publishing(&self, record: &Record) -> Option<String> {
        let of = |ipv6| attach::gateway_network(&record.networks, ipv6, |name| self.named(record, name));
        of(false).or_else(|| of(true))
    }

    /// Whether a running container that is put into a network publishes its ports there: it does so nowhere yet.
    pub(crate) fn publishes(&self, record: &Record, name: &str) -> bool {
        super::render::endpoints(record).all(|endpoint| endpoint.ports.is_empty())
            && self.publishing(record).as_deref() == Some(name)
    }

    /// The network of an attachment: by its id, else by the name that it had.
    pub(crate) fn named(&self, record: &Record, name: &str) -> Option<Arc<Network>> {
        let attachment = record.networks.get(name)?;
        self.find(&attachment.network).or_else(|_| self.find(name)).ok()
    }

    /// Gives a container a place in one network. None: there is nothing to be had in it.
    ///
    /// # Errors
    /// In Docker's words; nothing of it is left but what [`Networks::leave`] takes away.
    pub(crate) async fn join_one(
        &self,
        record: &Record,
        name: &str,
        attachment: &Attachment,
        taken: &[&Endpoint],
        publishes: bool,
    ) -> Result<Option<Joined>> {
        let network = self
            .find(&attachment.network)
            .or_else(|_| self.find(name))
            .map_err(|_| Error::not_found(format!("network {name} not found")))?;
        if network.driver != Driver::Bridge {
            return Ok(None);
        }
        let down = self.with(|inner| inner.get(&network.id).and_then(|entry| entry.down.clone()));
        if down.is_some()
            && let Some(reason) = self.bring_up(&network).await
        {
            return Err(Error::internal(format!("network {name} cannot be used: {reason}")));
        }
        let mut endpoint = self.reserve(&network, record, attachment, taken)?;
        let mut bindings = Vec::new();
        if publishes && !network.internal {
            bindings = self.bind(record, &network, &mut endpoint)?;
        }
        Ok(Some(Joined { network, endpoint, ports: bindings }))
    }

    /// Binds a container's published ports, to lead to this endpoint.
    fn bind(&self, record: &Record, network: &Network, endpoint: &mut Endpoint) -> Result<Vec<Binding>> {
        let wanted = ports::wanted(&record.config, &record.host_config)?;
        let bindings = ports::bind(&wanted, endpoint, network.settings.binding).map_err(|error| Error {
            message: format!(
                "driver failed programming external connectivity on endpoint {} ({}): {}",
                record.name, endpoint.id, error.message
            ),
            ..error
        })?;
        endpoint.ports = bindings.iter().map(|(_, _, published)| published.clone()).collect();
        self.with(|inner| {
            let member = inner.get_mut(&network.id).and_then(|entry| entry.members.get_mut(&record.id));
            if let Some(member) = member {
                member.endpoint.ports.clone_from(&endpoint.ports);
            }
        });
        Ok(bindings)
    }

    /// Publishes the ports of a running container that has left the network where they were in another of its own.
    ///
    /// # Errors
    /// Somebody has taken a port in between; the host's.
    pub(crate) async fn publish_elsewhere(&self, record: &Record) -> Result<Option<(String, Endpoint)>> {
        let Some(name) = self.publishing(record).filter(|name| self.publishes(record, name)) else {
            return Ok(None);
        };
        let endpoint = record.networks.get(&name).and_then(|attachment| attachment.endpoint.clone());
        let (Some(mut endpoint), Some(network)) = (endpoint, self.named(record, &name)) else {
            return Ok(None);
        };
        let ports = self.bind(record, &network, &mut endpoint)?;
        let (id, mut joined) = (network.id.clone(), Joined { network, endpoint, ports });
        let published = async {
            self.guard(record, &joined).await?;
            self.raise(&mut joined).await
        };
        let published = published.await;
        let is_member = |inner: &mut BTreeMap<String, Entry>| {
            inner.get(&id).is_some_and(|entry| entry.members.contains_key(&record.id))
        };
        if !self.with(is_member) {
            // It has ended in between: what was taken away then must not stay now.
            self.host.dismiss(&[joined.endpoint.tap]).await;
            return Ok(None);
        }
        published.map(|()| Some((name, joined.endpoint)))
    }

    /// Takes addresses and makes the container a member.
    fn reserve(
        &self,
        network: &Arc<Network>,
        record: &Record,
        attachment: &Attachment,
        taken: &[&Endpoint],
    ) -> Result<Endpoint> {
        let slot =
            (0..NICS).find(|slot| !taken.iter().any(|endpoint| endpoint.slot == *slot)).ok_or_else(|| {
                Error::invalid(format!(
                    "a container can be in {NICS} networks at a time: its microVM has no more slots"
                ))
            })?;
        let prefix = &network.settings.interface_prefix;
        let interface = (0..=u32::from(NICS))
            .map(|number| format!("{prefix}{number}"))
            .find(|name| !taken.iter().any(|endpoint| endpoint.interface == *name))
            .unwrap_or_else(|| format!("{prefix}{slot}"));
        let id = names::new_id();
        let tap = format!("bht-{}", id.get(..11).unwrap_or(&id));
        self.with(|inner| {
            let entry = inner
                .get_mut(&network.id)
                .ok_or_else(|| Error::not_found(format!("network {} not found", network.name)))?;
            if entry.members.contains_key(&record.id) {
                return Err(Error::forbidden(format!(
                    "endpoint with name {} already exists in network {}",
                    record.name, network.name
                )));
            }
            let addresses = take_addresses(entry, attachment)?;
            let mac = attachment.mac.unwrap_or_else(|| mac_for(&addresses));
            if entry.members.values().any(|member| member.endpoint.mac == mac) {
                release(entry, &addresses);
                return Err(Error::invalid(format!(
                    "the MAC address {} is in use in network {}",
                    attach::mac_text(mac),
                    network.name
                )));
            }
            let endpoint = Endpoint { id, slot, interface, tap, mac, addresses, ports: Vec::new() };
            entry.members.insert(record.id.clone(), member(record, attachment, &endpoint));
            Ok(endpoint)
        })
    }

    /// Makes the tap of a place, lets it speak, and its ports lead to it.
    ///
    /// # Errors
    /// The host's; nothing of it is left but what [`Networks::leave`] takes away.
    pub(crate) async fn admit(&self, record: &Record, joined: &mut Joined) -> Result<OwnedFd> {
        let tap = tap(&joined.network, &joined.endpoint);
        let opened = async {
            let opened = self.host.open_tap(&joined.endpoint.tap, &tap).await;
            opened.map_err(|error| unreachable_network(&error))
        };
        // It is down until its rules are in force.
        let (opened, ()) = tokio::try_join!(opened, self.guard(record, joined))?;
        self.raise(joined).await?;
        Ok(opened)
    }

    async fn guard(&self, record: &Record, joined: &Joined) -> Result<()> {
        self.confine(record, &joined.network, &joined.endpoint).await?;
        let tap = tap(&joined.network, &joined.endpoint);
        let forwards = joined.ports.iter().map(|(_, forward, _)| forward.clone()).collect();
        let guarded = self.host.guard(&joined.endpoint.tap, tap, forwards).await;
        guarded.map_err(|error| unreachable_network(&error))
    }

    async fn raise(&self, joined: &mut Joined) -> Result<()> {
        let ports = std::mem::take(&mut joined.ports);
        let ports = ports.into_iter().map(|(port, forward, _)| (port, forward)).collect();
        let isolated = !joined.network.settings.icc;
        let raised = self.host.raise(&joined.endpoint.tap, isolated, ports).await;
        raised.map_err(|error| unreachable_network(&error))
    }

    /// Takes a container that an earlier daemon has left running back into its networks.
    pub(crate) async fn adopt(&self, record: &Record) {
        for (name, attachment) in &record.networks {
            let (Some(endpoint), Some(network)) = (&attachment.endpoint, self.named(record, name)) else {
                continue;
            };
            self.with(|inner| {
                if let Some(entry) = inner.get_mut(&network.id) {
                    for address in &endpoint.addresses {
                        for allocator in &mut entry.allocators {
                            // In one of them, where nobody else can have it.
                            let _ = allocator.take(address.addr());
                        }
                    }
                    entry.members.insert(record.id.clone(), member(record, attachment, endpoint));
                }
            });
            let bindings = ports::bind_again(endpoint);
            let mut joined = Joined { network, endpoint: endpoint.clone(), ports: bindings };
            let taken_over = async {
                self.guard(record, &joined).await?;
                self.raise(&mut joined).await
            };
            if let Err(error) = taken_over.await {
                tracing::error!(
                    container = record.id,
                    network = name,
                    error = error.message,
                    "a container's network is not taken over whole"
                );
            }
        }
    }

    /// Takes a container out of all networks. What it had is free when this returns.
    pub(crate) async fn leave(&self, container: &str) {
        let left = self.with(|inner| {
            let left = inner.values_mut().filter_map(|entry| leave_one(entry, container));
            left.collect::<Vec<_>>()
        });
        self.dismiss(container, left).await;
    }

    /// Takes a container out of one network.
    pub(crate) async fn leave_network(&self, container: &str, network: &str) {
        let left = self.with(|inner| inner.get_mut(network).and_then(|entry| leave_one(entry, container)));
        self.dismiss(container, left.into_iter().collect()).await;
    }

    async fn dismiss(&self, container: &str, left: Vec<(Arc<Network>, Endpoint)>) {
        if left.is_empty() {
            return;
        }
        let taps: Vec<String> = left.iter().map(|(_, endpoint)| endpoint.tap.clone()).collect();
        self.host.dismiss(&taps).await;
        self.release(container, &taps).await;
        // Only now: nobody may have an address while rules speak of its last owner.
        self.with(|inner| {
            for (network, endpoint) in &left {
                if let Some(entry) = inner.get_mut(&network.id) {
                    release(entry, &endpoint.addresses);
                }
            }
        });
        for (network, _) in &left {
            self.publish(network, "disconnect", Some(container));
        }
    }

    /// What a container's files say of its networks.
    pub(crate) fn facts(&self, record: &Record) -> NetworkFacts {
        let networks: Vec<Arc<Network>> =
            record.networks.keys().filter_map(|name| self.named(record, name)).collect();
        let bridges: Vec<&Arc<Network>> =
            networks.iter().filter(|network| network.driver == Driver::Bridge).collect();
        let default = self.find("bridge").ok();
        let gateways = default.iter().chain(bridges.iter().copied());
        let gateway = |ipv6: bool| {
            gateways.clone().find_map(|network| network.subnet(ipv6)).map(|subnet| subnet.gateway)
        };
        NetworkFacts {
            addresses: super::render::endpoints(record)
                .flat_map(|endpoint| endpoint.addresses.iter().map(IpNet::addr))
                .collect(),
            resolver: bridges.iter().any(|network| !network.is_predefined()),
            connected: !bridges.is_empty(),
            host_gateway: [gateway(false), gateway(true)].into_iter().flatten().collect(),
            ..NetworkFacts::default()
        }
    }

    /// The addresses behind a name as a container sees it; None: it is nobody's. A name may be followed by its
    /// network's.
    pub(super) fn addresses_of(&self, container: &str, name: &str) -> Option<Vec<IpAddr>> {
        self.with(|inner| {
            let mut found: Option<Vec<IpAddr>> = None;
            for entry in inner.values().filter(|entry| !entry.network.is_predefined()) {
                let Some(asking) = entry.members.get(container) else { continue };
                let network = entry.network.name.to_ascii_lowercase();
                let bare = name.strip_suffix(&network).and_then(|rest| rest.strip_suffix('.'));
                let links =
                    asking.links.iter().filter_map(|link| link.split_once(':').or(Some((link, link))));
                let linked: Vec<&str> = links
                    .filter(|(_, alias)| alias.eq_ignore_ascii_case(name))
                    .map(|(target, _)| target.trim_start_matches('/'))
                    .collect();
                for (id, member) in &entry.members {
                    let is_meant =
                        [Some(name), bare].into_iter().flatten().any(|name| member.is_called(id, name))
                            || linked.iter().any(|target| member.is_called(id, target));
                    if is_meant {
                        found
                            .get_or_insert_default()
                            .extend(member.endpoint.addresses.iter().map(IpNet::addr));
                    }
                }
            }
            found
        })
    }

    /// The name of a neighbour's address, with its network's.
    pub(super) fn name_of(&self, container: &str, address: IpAddr) -> Option<String> {
        self.with(|inner| {
            let mut entries = inner.values();
            entries.find_map(|entry| {
                entry.members.get(container)?;
                let has =
                    |member: &&Member| member.endpoint.addresses.iter().any(|net| net.addr() == address);
                let member = entry.members.values().find(has)?;
                Some(format!("{}.{}", member.name, entry.network.name))
            })
        })
    }

    /// Whether anything leads out of one of a container's networks.
    pub(super) fn leads_out(&self, record: &Record) -> bool {
        let networks = record.networks.keys().filter_map(|name| self.named(record, name));
        networks.into_iter().any(|network| network.driver == Driver::Bridge && !network.internal)
    }

    /// Tells that a container is in a network.
    pub(crate) fn tell_connected(&self, network: &Network, container: &str) {
        self.publish(network, "connect", Some(container));
    }

    /// A container has another name.
    pub(crate) fn rename(&self, container: &str, name: &str) {
        self.with(|inner| {
            for member in inner.values_mut().filter_map(|entry| entry.members.get_mut(container)) {
                name.clone_into(&mut member.name);
            }
        });
    }
}

fn unreachable_network(error: &HostError) -> Error {
    Error::internal(format!("failed to set up container networking: {error}"))
}

fn member(record: &Record, attachment: &Attachment, endpoint: &Endpoint) -> Member {
    Member {
        name: record.name.clone(),
        aliases: attachment.aliases.clone(),
        hostname: record.config.hostname.clone(),
        links: attachment.links.clone(),
        endpoint: endpoint.clone(),
    }
}

fn leave_one(entry: &mut Entry, container: &str) -> Option<(Arc<Network>, Endpoint)> {
    let member = entry.members.remove(container)?;
    Some((Arc::clone(&entry.network), member.endpoint))
}

fn release(entry: &mut Entry, addresses: &[IpNet]) {
    for allocator in &mut entry.allocators {
        for address in addresses {
            allocator.release(address.addr());
        }
    }
}

/// An address of each of the network's families: what was asked for, else the next.
fn take_addresses(entry: &mut Entry, attachment: &Attachment) -> Result<Vec<IpNet>> {
    let mut addresses: Vec<IpNet> = Vec::new();
    for index in 0..entry.allocators.len() {
        let Some(allocator) = entry.allocators.get_mut(index) else { continue };
        let subnet = allocator.subnet();
        let wanted = if subnet.addr().is_ipv6() { attachment.ipv6 } else { attachment.ipv4 };
        let taken: std::result::Result<IpAddr, _> = match wanted {
            Some(address) => allocator.take(address).map(|()| address),
            None => allocator.take_any(),
        };
        match taken {
            Ok(address) => addresses.extend(IpNet::new(address, subnet.prefix_len())),
            Err(error) => {
                release(entry, &addresses);
                let family = if subnet.addr().is_ipv6() { "IPv6" } else { "IPv4" };
                return Err(match error {
                    super::ipam::AddressError::InUse => Error::forbidden(error.to_string()),
                    super::ipam::AddressError::OutOfRange => Error::invalid(error.to_string()),
                    super::ipam::AddressError::Exhausted => Error::unavailable(format!(
                        "no available {family} addresses on this network's address pools: {} ({})",
                        entry.network.name, entry.network.id
                    )),
                });
            }
        }
    }
    Ok(addresses)
}

/// An endpoint's tap as the host is to make and guard it.
pub(super) fn tap(network: &Network, endpoint: &Endpoint) -> Tap {
    Tap {
        bridge: network.settings.bridge.clone(),
        mac: endpoint.mac,
        mtu: network.settings.mtu,
        addresses: endpoint.addresses.iter().map(IpNet::addr).collect(),
        isolated: !network.settings.icc,
    }
}
