//! Networks, and who is in them.
//!
//! ```text
//!   create ─▶ record on disk ─▶ bridge ─▶ … ─▶ remove (nobody is in it)
//!
//!   a container's start:  join ─▶ addresses, ports bound, taps ─▶ (boot) ─▶ admit ─▶ it may speak
//!   its end:              leave ─▶ all of it is free
//! ```
//!
//! A network's record says what it is; who has which address is known from the records of containers that run.
//! The host's side is [`crate::hostnet`]'s.

pub(crate) mod attach;
pub mod create;
mod dns;
pub mod egress;
pub mod ipam;
mod members;
mod ops;
pub mod ports;
pub mod record;
mod render;
pub(crate) mod resolver;
mod store;

use std::{
    collections::BTreeMap,
    io,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
};

use ipnet::IpNet;
use jiff::Timestamp;
use sha2::{Digest as _, Sha256};

use super::{Error, Result, container::names, events::Events};
use crate::{
    config::Config,
    hostnet::{Bridge, HostNetwork},
};
use ipam::{Allocator, PoolSpec};
pub(crate) use members::Joined;
use members::Member;
pub use ops::{LIST_FILTERS, PRUNE_FILTERS};
use record::{Driver, Network, Settings, Subnet, VERSION};
pub(crate) use render::{endpoints, port_map};

/// All networks.
pub(crate) struct Networks {
    config: Arc<Config>,
    events: Arc<Events>,
    host: HostNetwork,
    pools: Vec<PoolSpec>,
    /// Held over a creation or a removal.
    changing: tokio::sync::Mutex<()>,
    inner: Mutex<BTreeMap<String, Entry>>,
    /// Running containers with an egress policy, by id.
    egress: Mutex<BTreeMap<String, Arc<egress::Egress>>>,
}

/// A network with its members.
struct Entry {
    network: Arc<Network>,
    allocators: Vec<Allocator>,
    /// By the container's id.
    members: BTreeMap<String, Member>,
    /// Why its bridge is not there.
    down: Option<String>,
}

impl Entry {
    fn new(network: Network) -> Self {
        let mut allocators = Vec::new();
        for subnet in &network.subnets {
            let mut allocator = Allocator::new(subnet.subnet, subnet.range);
            // Checked when the network was made.
            let _ = allocator.take(subnet.gateway);
            for address in subnet.auxiliary.values() {
                let _ = allocator.take(*address);
            }
            allocators.push(allocator);
        }
        Self { network: Arc::new(network), allocators, members: BTreeMap::new(), down: None }
    }
}

impl Networks {
    /// Loads what is on disk, makes the networks that are always there, and brings bridges up. A host on which
    /// that fails has containers without a network, and says so when they want one.
    ///
    /// # Errors
    /// The disk's.
    pub(crate) async fn open(config: Arc<Config>, events: Arc<Events>, daemon_id: &str) -> Result<Self> {
        let host = HostNetwork::new(daemon_id, &config.layout.exec_root);
        let pools = pools(&config, daemon_id);
        let records = store::load(&config.layout)?;
        let inner = records.into_iter().map(|network| (network.id.clone(), Entry::new(network))).collect();
        let networks = Self {
            config,
            events,
            host,
            pools,
            changing: tokio::sync::Mutex::default(),
            inner: Mutex::new(inner),
            egress: Mutex::default(),
        };
        networks.make_predefined().await?;
        for network in networks.all() {
            networks.bring_up(&network).await;
        }
        Ok(networks)
    }

    /// Removes what an earlier daemon has left on the host. To be called when every running container is
    /// known.
    pub(crate) async fn sweep(&self) {
        if let Err(error) = self.host.sweep().await {
            tracing::error!(%error, "the host's network is not as it should be");
        }
    }

    fn with<R>(&self, f: impl FnOnce(&mut BTreeMap<String, Entry>) -> R) -> R {
        f(&mut self.inner.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// All, by id.
    pub(crate) fn all(&self) -> Vec<Arc<Network>> {
        self.with(|inner| inner.values().map(|entry| Arc::clone(&entry.network)).collect())
    }

    /// The network that a user means: a full id, a name, or the beginning of one id.
    ///
    /// # Errors
    /// In Docker's words.
    pub(crate) fn find(&self, term: &str) -> Result<Arc<Network>> {
        let all = self.all();
        let by = |f: &dyn Fn(&Network) -> bool| -> Vec<Arc<Network>> {
            all.iter().filter(|network| f(network)).cloned().collect()
        };
        let exact = by(&|network| network.id == term || network.name == term);
        let found = if exact.is_empty() && !term.is_empty() {
            by(&|network| network.id.starts_with(term))
        } else {
            exact
        };
        match found.as_slice() {
            [one] => Ok(Arc::clone(one)),
            [] => Err(Error::not_found(format!("network {term} not found"))),
            many => Err(Error::invalid(format!(
                "network {term} is ambiguous ({} matches found based on ID prefix)",
                many.len()
            ))),
        }
    }

    async fn make_predefined(&self) -> Result<()> {
        let have: Vec<String> = self.all().iter().map(|network| network.name.clone()).collect();
        let missing = |name: &str| !have.iter().any(|have| have == name);
        for (name, driver) in [("host", Driver::Host), ("none", Driver::Null)] {
            if missing(name) {
                self.insert(bare(name, driver))?;
            }
        }
        if missing("bridge") && self.config.bridge {
            let network = self.default_bridge().await?;
            self.insert(network)?;
        }
        Ok(())
    }

    async fn default_bridge(&self) -> Result<Network> {
        let id = names::new_id();
        let request = crate::api::types::network::CreateRequest {
            name: "default bridge".into(),
            ipam: self.config.bip.map(|bip| crate::api::types::network::Ipam {
                config: Some(vec![crate::api::types::network::IpamConfig {
                    subnet: bip.trunc().to_string(),
                    gateway: bip.addr().to_string(),
                    ..Default::default()
                }]),
                ..Default::default()
            }),
            ..Default::default()
        };
        let mut network = self.record(request, id).await?;
        let Settings { bridge, mtu, .. } = &network.settings;
        let shown = [
            (create::option::DEFAULT, "true".to_owned()),
            (create::option::ICC, "true".to_owned()),
            (create::option::MASQUERADE, "true".to_owned()),
            (create::option::BINDING, "0.0.0.0".to_owned()),
            (create::option::BRIDGE, bridge.clone()),
            (create::option::MTU, mtu.to_string()),
        ];
        network.options = shown.map(|(name, value)| (name.to_owned(), value)).into();
        network.name = "bridge".into();
        // What the user chose for the daemon is not what a container may ask an address of.
        network.subnets.iter_mut().for_each(|subnet| subnet.chosen = false);
        Ok(network)
    }

    /// A record that fits what there is.
    async fn record(
        &self,
        request: crate::api::types::network::CreateRequest,
        id: String,
    ) -> Result<Network> {
        let host = self.host.used_networks().await.unwrap_or_else(|error| {
            tracing::warn!(%error, "the host's own networks are not known and may be met");
            Vec::new()
        });
        let all = self.all();
        let networks: Vec<IpNet> =
            all.iter().flat_map(|network| &network.subnets).map(|subnet| subnet.subnet).collect();
        let bridges: Vec<String> = all.iter().map(|network| network.settings.bridge.clone()).collect();
        let around = create::Surroundings {
            pools: &self.pools,
            networks: &networks,
            host: &host,
            bridges: &bridges,
            mtu: self.config.mtu,
        };
        create::record(request, id, Timestamp::now(), &around)
    }

    /// On disk, then known.
    fn insert(&self, network: Network) -> Result<()> {
        store::write(&self.config.layout, &network)?;
        self.with(|inner| inner.insert(network.id.clone(), Entry::new(network)));
        Ok(())
    }

    /// Makes the network's bridge; whether it is there is noted.
    async fn bring_up(&self, network: &Network) -> Option<String> {
        if network.driver != Driver::Bridge {
            return None;
        }
        let down = self.host.bring_up(&network.settings.bridge, bridge(network)).await.err();
        if let Some(error) = &down {
            tracing::warn!(network = network.name, %error, "a network's bridge cannot be made");
        }
        let down = down.map(|error| error.to_string());
        self.with(|inner| {
            if let Some(entry) = inner.get_mut(&network.id) {
                entry.down.clone_from(&down);
            }
        });
        down
    }

    fn publish(&self, network: &Network, action: &str, container: Option<&str>) {
        let mut attributes = BTreeMap::from([
            ("name".to_owned(), network.name.clone()),
            ("type".to_owned(), network.driver.name().to_owned()),
        ]);
        if let Some(container) = container {
            attributes.insert("container".into(), container.to_owned());
        }
        self.events.publish("network", action, &network.id, attributes);
    }
}

/// A network without a bridge.
fn bare(name: &str, driver: Driver) -> Network {
    Network {
        version: VERSION,
        id: names::new_id(),
        name: name.into(),
        created: Timestamp::now(),
        driver,
        ipv4: true,
        ipv6: false,
        internal: false,
        attachable: false,
        subnets: Vec::new(),
        idle: Vec::new(),
        ipam_options: None,
        options: BTreeMap::new(),
        settings: Settings {
            bridge: String::new(),
            mtu: 1500,
            icc: true,
            masquerade: false,
            binding: None,
            interface_prefix: "eth".into(),
            metadata: false,
        },
        labels: BTreeMap::new(),
    }
}

fn bridge(network: &Network) -> Bridge {
    let net = |subnet: &Subnet| IpNet::new(subnet.gateway, subnet.subnet.prefix_len()).ok();
    Bridge {
        mtu: network.settings.mtu,
        gateways: network.subnets.iter().filter_map(net).collect(),
        subnets: network.subnets.iter().map(|subnet| subnet.subnet).collect(),
        internal: network.internal,
        masquerade: network.settings.masquerade,
        icc: network.settings.icc,
        metadata: network.settings.metadata,
    }
}

fn pools(config: &Config, daemon_id: &str) -> Vec<PoolSpec> {
    let mut pools = match config.address_pools.as_slice() {
        [] => ipam::default_pools(),
        chosen => chosen.to_vec(),
    };
    if !pools.iter().any(|pool| pool.base.addr().is_ipv6()) {
        let digest = Sha256::digest(daemon_id.trim());
        let global_id = digest.first_chunk::<5>().copied().unwrap_or_default();
        pools.push(ipam::local_pool(global_id));
    }
    pools
}

/// A MAC address for an address: the same for the same one, so that neighbours who remember it are not led
/// astray.
fn mac_for(addresses: &[IpNet]) -> [u8; 6] {
    match addresses.first().map(IpNet::addr) {
        Some(IpAddr::V4(address)) => {
            let [a, b, c, d] = address.octets();
            [0x02, 0x42, a, b, c, d]
        }
        other => {
            let digest = Sha256::digest(format!("{other:?}"));
            let [a, b, c, d, ..] = digest.first_chunk::<4>().copied().unwrap_or_default();
            [0x02, 0x43, a, b, c, d]
        }
    }
}

/// A host's error in Go's words, as Docker's users know them.
pub(crate) fn words(error: &io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or_default().to_lowercase()
}
