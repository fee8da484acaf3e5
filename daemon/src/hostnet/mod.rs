//! The host's side of networks: bridges, taps, the packet filter, published ports. Knows nothing of
//! containers; the engine tells it what there is to be.
//!
//! ```text
//!   bring_up(bridge) ─▶ open_tap ─▶ (the VMM gets it) ─▶ admit: rules first, then the link
//!                                                          │
//!   take_down(bridge) ◀── the tap goes with its VMM ◀── dismiss: rules, ports
//! ```
//!
//! What is here is found again: bridges carry the daemon's id as their alias, the tables of the packet filter
//! have it in their name, taps live no longer than their VMMs. So a daemon that was killed leaves nothing that
//! its successor does not take over ([`HostNetwork::bring_up`]) or remove ([`HostNetwork::sweep`]).

mod forwarding;
mod nft;
mod proxy;
mod rules;
mod tap;

use std::{
    collections::HashMap,
    fs, io,
    net::{IpAddr, SocketAddr},
    os::fd::OwnedFd,
    path::Path,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use bulkhead_netlink::{Address, LinkChange, Netlink};
use ipnet::IpNet;

use forwarding::Forwarding;
use proxy::{Bound, Served};
use rules::State;

/// A bridge as it is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bridge {
    /// In bytes.
    pub mtu: u16,
    /// Its own addresses, with their networks' prefixes.
    pub gateways: Vec<IpNet>,
    /// Its networks, at most one a family.
    pub subnets: Vec<IpNet>,
    /// Nothing goes out of it or comes in.
    pub internal: bool,
    /// What leaves the host from it has the host's address.
    pub masquerade: bool,
    /// Whether its ports reach each other.
    pub icc: bool,
    /// Whether the metadata service of clouds may be reached.
    pub metadata: bool,
}

/// A guest's tap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tap {
    /// The name of its bridge.
    pub bridge: String,
    /// The only MAC address that may send from it.
    pub mac: [u8; 6],
    /// In bytes.
    pub mtu: u16,
    /// The only addresses that may send from it.
    pub addresses: Vec<IpAddr>,
    /// Whether it reaches nothing but the bridge itself.
    pub isolated: bool,
}

/// A published port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forward {
    /// `tcp` or `udp`.
    pub protocol: &'static str,
    /// Where on the host; an unspecified address is all of its family.
    pub host: SocketAddr,
    /// Where in the container.
    pub to: SocketAddr,
}

/// A published port that is bound and does not yet lead anywhere. Dropped, it is free.
#[derive(Debug)]
pub struct BoundPort(Bound);

impl BoundPort {
    /// Binds a port on the host; number 0 is any that is free. To be called in a runtime.
    ///
    /// # Errors
    /// It is in use, or the address is not the host's.
    pub fn bind(protocol: &str, address: SocketAddr) -> io::Result<Self> {
        proxy::bind(protocol, address).map(Self)
    }

    /// What it is bound to.
    pub fn address(&self) -> SocketAddr {
        self.0.address()
    }
}

/// Why the host does not do it.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// An interface.
    #[error("{what}: {source}")]
    Link {
        /// What was tried.
        what: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// An interface of that name is somebody else's.
    #[error("the host has an interface named {0} already")]
    Taken(String),
    /// The packet filter.
    #[error("the packet filter's rules: {0}")]
    Rules(String),
}

impl HostError {
    fn link(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Link { what: what.into(), source }
    }
}

/// The host's network, as far as it is this daemon's.
#[derive(Debug)]
pub struct HostNetwork {
    /// The name of the tables.
    table: String,
    /// The alias of bridges.
    alias: String,
    /// In unit tests nothing of the machine is touched.
    dry: bool,
    forwarding: Forwarding,
    state: Mutex<(u64, State)>,
    /// Which state the packet filter has. Whoever waits for it finds the states of all who waited applied at
    /// once.
    applied: tokio::sync::Mutex<u64>,
    /// Whether all that runs is known. Until then the rules of an earlier daemon stay as they are: those of a
    /// part would leave the rest unguarded.
    complete: AtomicBool,
    served: Mutex<HashMap<String, Vec<Served>>>,
}

impl HostNetwork {
    /// Touches nothing yet. `id` is the daemon's own.
    pub fn new(id: &str, exec_root: &Path) -> Self {
        let id = id.trim();
        let digits: String = id.chars().filter(char::is_ascii_hexdigit).take(12).collect();
        Self {
            table: format!("bulkhead-{digits}"),
            alias: format!("bulkhead {id}"),
            dry: cfg!(test),
            forwarding: Forwarding::new(exec_root),
            state: Mutex::default(),
            applied: tokio::sync::Mutex::new(0),
            complete: AtomicBool::new(false),
            served: Mutex::default(),
        }
    }

    /// The networks that the host uses, bridges of this daemon aside: addresses and routes.
    ///
    /// # Errors
    /// The kernel's.
    pub async fn used_networks(&self) -> Result<Vec<IpNet>, HostError> {
        if self.dry {
            return Ok(Vec::new());
        }
        let alias = self.alias.clone();
        blocking(move || {
            let look = || {
                let mut netlink = Netlink::open()?;
                let own: Vec<u32> = netlink
                    .links()?
                    .iter()
                    .filter(|link| link.alias == alias)
                    .map(|link| link.index)
                    .collect();
                let addresses =
                    netlink.addresses()?.into_iter().filter(|address| !own.contains(&address.index));
                let mut used: Vec<IpNet> = addresses
                    .filter_map(|address| IpNet::new(address.address, address.prefix).ok())
                    .map(|net| net.trunc())
                    .collect();
                let routes = netlink.routes()?.into_iter().filter(|route| {
                    route.prefix > 0 && route.index.is_none_or(|index| !own.contains(&index))
                });
                used.extend(routes.filter_map(|route| IpNet::new(route.destination, route.prefix).ok()));
                Ok(used)
            };
            look().map_err(HostError::link("cannot look at the host's addresses"))
        })
        .await
    }

    /// Makes a bridge, or takes over the one that an earlier daemon of this data root has made.
    ///
    /// # Errors
    /// [`HostError`]; nothing is left.
    pub async fn bring_up(&self, name: &str, bridge: Bridge) -> Result<(), HostError> {
        if !self.dry {
            let (alias, name, bridge) = (self.alias.clone(), name.to_owned(), bridge.clone());
            if !bridge.internal {
                self.enable_forwarding(&bridge).map_err(HostError::link("cannot let the host forward"))?;
            }
            blocking(move || make_bridge(&name, &bridge, &alias)).await?;
        }
        self.change(|state| state.bridges.insert(name.to_owned(), bridge));
        let applied = self.apply().await;
        if applied.is_err() {
            self.change(|state| state.bridges.remove(name));
            self.delete_bridge(name).await;
        }
        applied
    }

    /// Removes a bridge.
    ///
    /// # Errors
    /// [`HostError`].
    pub async fn take_down(&self, name: &str) -> Result<(), HostError> {
        self.change(|state| state.bridges.remove(name));
        self.delete_bridge(name).await;
        self.apply().await
    }

    /// Opens a new tap, a port of its bridge and down.
    ///
    /// # Errors
    /// [`HostError`].
    pub async fn open_tap(&self, name: &str, tap: &Tap) -> Result<OwnedFd, HostError> {
        let (name, tap, dry) = (name.to_owned(), tap.clone(), self.dry);
        blocking(move || {
            let failed = HostError::link(format!("cannot make the tap {name}"));
            if dry {
                return fs::File::open("/dev/null").map(OwnedFd::from).map_err(failed);
            }
            make_tap(&name, &tap).map_err(failed)
        })
        .await
    }

    /// Lets a tap speak, and its ports lead to it: all rules are in force before the first packet.
    ///
    /// # Errors
    /// [`HostError`]; to be followed by [`HostNetwork::dismiss`].
    pub async fn admit(
        &self,
        name: &str,
        tap: Tap,
        ports: Vec<(BoundPort, Forward)>,
    ) -> Result<(), HostError> {
        let isolated = tap.isolated;
        let forwards = ports.iter().map(|(_, forward)| forward.clone()).collect();
        self.change(|state| {
            state.taps.insert(name.to_owned(), tap);
            state.forwards.insert(name.to_owned(), forwards);
        });
        self.apply().await?;
        if !self.dry {
            let name = name.to_owned();
            blocking(move || {
                raise_tap(&name, isolated).map_err(HostError::link(format!("cannot raise the tap {name}")))
            })
            .await?;
        }
        let served = ports.into_iter().map(|(port, forward)| port.0.serve(&forward)).collect();
        self.served(|all| all.insert(name.to_owned(), served));
        Ok(())
    }

    /// Forgets taps: their rules go, their ports are free when this returns.
    pub async fn dismiss(&self, names: &[String]) {
        let served: Vec<Served> =
            self.served(|all| names.iter().filter_map(|name| all.remove(name)).flatten().collect());
        for served in served {
            served.end().await;
        }
        self.change(|state| {
            for name in names {
                state.taps.remove(name);
                state.forwards.remove(name);
            }
        });
        if let Err(error) = self.apply().await {
            tracing::error!(%error, "rules of taps that are gone stay behind for now");
        }
    }

    /// Removes this daemon's bridges that [`HostNetwork::bring_up`] was not told of, and applies the rules for
    /// the first time: from here on every change is in force when it is answered.
    ///
    /// # Errors
    /// [`HostError`].
    pub async fn sweep(&self) -> Result<(), HostError> {
        if !self.dry {
            let alias = self.alias.clone();
            let known: Vec<String> = self.state(|(_, state)| state.bridges.keys().cloned().collect());
            blocking(move || {
                remove_bridges(&alias, |name| !known.iter().any(|known| known == name))
                    .map_err(HostError::link("cannot remove old bridges"))
            })
            .await?;
        }
        self.complete.store(true, Ordering::SeqCst);
        self.change(|_| {});
        self.apply().await
    }

    /// Removes every trace of this daemon's networks from the host. Its containers must be gone.
    ///
    /// # Errors
    /// [`HostError`].
    pub async fn purge(&self) -> Result<(), HostError> {
        nft::apply(&rules::remove(&self.table)).await?;
        let alias = self.alias.clone();
        blocking(move || {
            remove_bridges(&alias, |_| true).map_err(HostError::link("cannot remove the bridges"))
        })
        .await
    }

    async fn delete_bridge(&self, name: &str) {
        if self.dry {
            return;
        }
        let (alias, name) = (self.alias.clone(), name.to_owned());
        let removed = blocking(move || {
            remove_bridges(&alias, |found| found == name).map_err(HostError::link("cannot remove a bridge"))
        });
        if let Err(error) = removed.await {
            tracing::error!(%error, "a bridge stays behind");
        }
    }

    fn enable_forwarding(&self, bridge: &Bridge) -> io::Result<()> {
        bridge.subnets.iter().try_for_each(|subnet| self.forwarding.enable(subnet.addr().is_ipv6()))
    }

    fn state<R>(&self, f: impl FnOnce(&mut (u64, State)) -> R) -> R {
        f(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn served<R>(&self, f: impl FnOnce(&mut HashMap<String, Vec<Served>>) -> R) -> R {
        f(&mut self.served.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn change<R>(&self, f: impl FnOnce(&mut State) -> R) {
        let sole_router = self.forwarding.is_ours();
        self.state(|(generation, state)| {
            f(state);
            state.sole_router = sole_router;
            *generation += 1;
        });
    }

    /// Brings the packet filter to the present state, or to a later one.
    async fn apply(&self) -> Result<(), HostError> {
        if !self.complete.load(Ordering::SeqCst) {
            return Ok(());
        }
        let wanted = self.state(|(generation, _)| *generation);
        let mut applied = self.applied.lock().await;
        if *applied >= wanted {
            return Ok(());
        }
        let (generation, script) =
            self.state(|(generation, state)| (*generation, rules::script(&self.table, state)));
        if !self.dry {
            nft::apply(&script).await?;
        }
        *applied = generation;
        Ok(())
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, HostError> + Send + 'static,
) -> Result<T, HostError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
        Err(HostError::Link { what: "a task of the host's network".into(), source: io::Error::other(error) })
    })
}

fn make_bridge(name: &str, bridge: &Bridge, alias: &str) -> Result<(), HostError> {
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

fn make_tap(name: &str, tap: &Tap) -> io::Result<OwnedFd> {
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

fn raise_tap(name: &str, isolated: bool) -> io::Result<()> {
    let mut netlink = Netlink::open()?;
    let link = netlink.link(name)?.ok_or(io::ErrorKind::NotFound)?;
    if isolated {
        netlink.isolate_port(link.index, true)?;
    }
    netlink.change_link(link.index, &LinkChange { up: Some(true), ..LinkChange::default() })
}

/// Removes bridges of this alias whose names are `chosen`.
fn remove_bridges(alias: &str, chosen: impl Fn(&str) -> bool) -> io::Result<()> {
    let mut netlink = Netlink::open()?;
    for link in netlink.links()? {
        if link.kind == "bridge" && link.alias == alias && chosen(&link.name) {
            tracing::info!(bridge = link.name, "a bridge is removed");
            netlink.delete_link(link.index)?;
        }
    }
    Ok(())
}

/// A locally administered address.
fn random_mac() -> io::Result<[u8; 6]> {
    let mut mac = [0; 6];
    getrandom::fill(&mut mac).map_err(io::Error::other)?;
    mac[0] = 0x02;
    Ok(mac)
}
