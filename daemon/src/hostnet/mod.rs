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

mod egress;
mod elements;
mod forwarding;
mod links;
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

use ipnet::IpNet;

use egress::Proxies;
pub use egress::{Confinement, Judge, Pin, Refused};
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

/// What was last done to the packet filter.
#[derive(Debug, Default)]
struct Applied {
    /// Which state it is.
    generation: u64,
    /// The state, where the tables are known to have it.
    state: Option<State>,
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
    /// What the packet filter has. Whoever waits for it finds the states of all who waited applied at once.
    applied: tokio::sync::Mutex<Applied>,
    /// Whether all that runs is known. Until then the rules of an earlier daemon stay as they are: those of a
    /// part would leave the rest unguarded.
    complete: AtomicBool,
    served: Mutex<HashMap<String, Vec<Served>>>,
    /// Of confined endpoints.
    proxies: Mutex<HashMap<String, Proxies>>,
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
            applied: tokio::sync::Mutex::default(),
            complete: AtomicBool::new(false),
            served: Mutex::default(),
            proxies: Mutex::default(),
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
        let look =
            move || links::used(&alias).map_err(HostError::link("cannot look at the host's addresses"));
        blocking(look).await
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
            blocking(move || links::make_bridge(&name, &bridge, &alias)).await?;
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
            links::make_tap(&name, &tap).map_err(failed)
        })
        .await
    }

    /// Makes the rules for a tap and its ports. They are in force when this returns.
    ///
    /// # Errors
    /// [`HostError`]; to be followed by [`HostNetwork::dismiss`].
    pub async fn guard(&self, name: &str, tap: Tap, forwards: Vec<Forward>) -> Result<(), HostError> {
        self.change(|state| {
            state.taps.insert(name.to_owned(), tap);
            state.forwards.insert(name.to_owned(), forwards);
        });
        self.apply().await
    }

    /// Lets a tap that is guarded speak, and its ports lead to it.
    ///
    /// # Errors
    /// [`HostError`]; to be followed by [`HostNetwork::dismiss`].
    pub async fn raise(
        &self,
        name: &str,
        isolated: bool,
        ports: Vec<(BoundPort, Forward)>,
    ) -> Result<(), HostError> {
        if !self.dry {
            let (name, published) = (name.to_owned(), !ports.is_empty());
            blocking(move || {
                let failed = HostError::link(format!("cannot raise the tap {name}"));
                links::raise_tap(&name, isolated, published).map_err(failed)
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
        // Before their rules: nothing may be left that could speak without them. (A VMM that was taken over
        // may have kept a tap open.)
        self.delete_taps(names.to_vec()).await;
        let mut addresses = Vec::new();
        self.change(|state| {
            for name in names {
                addresses.extend(state.taps.remove(name).map(|tap| tap.addresses).unwrap_or_default());
                state.forwards.remove(name);
            }
        });
        if let Err(error) = self.apply().await {
            tracing::error!(%error, "rules of taps that are gone stay behind for now");
        }
        self.forget_connections(addresses).await;
    }

    async fn delete_taps(&self, names: Vec<String>) {
        if self.dry {
            return;
        }
        let deleted =
            blocking(move || links::remove_taps(&names).map_err(HostError::link("cannot remove a tap")));
        if let Err(error) = deleted.await {
            tracing::error!(%error, "a tap stays behind");
        }
    }

    /// What was under way with these addresses is not for whoever gets them next: a datagram's sender who goes
    /// on sending would be led to where they were for ever.
    async fn forget_connections(&self, addresses: Vec<IpAddr>) {
        if self.dry {
            return;
        }
        let forgotten = blocking(move || {
            let mut addresses = addresses.into_iter();
            addresses
                .try_for_each(bulkhead_netlink::forget_connections)
                .map_err(HostError::link("cannot forget connections"))
        });
        if let Err(error) = forgotten.await {
            tracing::warn!(%error, "connections of an endpoint that is gone are remembered until they time out");
        }
    }

    /// Removes this daemon's bridges that [`HostNetwork::bring_up`] was not told of, taps of its bridges that
    /// [`HostNetwork::guard`] was not told of, and applies the rules for
    /// the first time: from here on every change is in force when it is answered.
    ///
    /// # Errors
    /// [`HostError`].
    pub async fn sweep(&self) -> Result<(), HostError> {
        if !self.dry {
            let alias = self.alias.clone();
            let (bridges, taps): (Vec<String>, Vec<String>) = self.state(|(_, state)| {
                (state.bridges.keys().cloned().collect(), state.taps.keys().cloned().collect())
            });
            blocking(move || {
                links::remove_bridges(&alias, |name| !bridges.iter().any(|known| known == name))
                    .and_then(|()| links::remove_other_taps(&alias, &taps))
                    .map_err(HostError::link("cannot remove old bridges and taps"))
            })
            .await?;
        }
        self.complete.store(true, Ordering::SeqCst);
        self.change(|_| {});
        self.apply().await?;
        if self.dry { Ok(()) } else { self.release_others(false).await }
    }

    /// Removes every trace of this daemon's networks from the host. Its containers must be gone.
    ///
    /// # Errors
    /// [`HostError`].
    pub async fn purge(&self) -> Result<(), HostError> {
        nft::apply(&rules::remove(&self.table)).await?;
        self.release_others(true).await?;
        let alias = self.alias.clone();
        blocking(move || {
            links::remove_bridges(&alias, |_| true).map_err(HostError::link("cannot remove the bridges"))
        })
        .await
    }

    async fn delete_bridge(&self, name: &str) {
        if self.dry {
            return;
        }
        let (alias, name) = (self.alias.clone(), name.to_owned());
        let removed = blocking(move || {
            links::remove_bridges(&alias, |found| found == name)
                .map_err(HostError::link("cannot remove a bridge"))
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

    fn proxies<R>(&self, f: impl FnOnce(&mut HashMap<String, Proxies>) -> R) -> R {
        f(&mut self.proxies.lock().unwrap_or_else(PoisonError::into_inner))
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
        if applied.generation >= wanted {
            return Ok(());
        }
        let (generation, state) = self.state(|(generation, state)| (*generation, state.clone()));
        // Whoever gives up in between leaves tables of which nothing is known.
        let before = applied.state.take();
        if !self.dry && !self.change_elements(before, &state) {
            nft::apply(&rules::script(&self.table, &state)).await?;
        }
        *applied = Applied { generation, state: Some(state) };
        Ok(())
    }

    /// Changes elements alone, where that is enough; whether the tables have the new state now. Tables that somebody
    /// has flushed refuse it, and are then made anew.
    fn change_elements(&self, before: Option<State>, state: &State) -> bool {
        let Some(before) = before.filter(|before| before.has_rules_of(state)) else { return false };
        let (before, after) = (elements::elements(&before), elements::elements(state));
        let Some(changes) = elements::difference(&self.table, &before, &after) else { return false };
        // In place: it is a call of a millisecond, and one that is given up half-way could otherwise meet its
        // successor.
        match tokio::task::block_in_place(|| bulkhead_netlink::change_elements(&changes)) {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(%error, "the packet filter's tables are made anew");
                false
            }
        }
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, HostError> + Send + 'static,
) -> Result<T, HostError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
        Err(HostError::Link { what: "a task of the host's network".into(), source: io::Error::other(error) })
    })
}
