//! Endpoints that may not reach everything: rules in a table of each one's own, and a proxy for what is allowed by
//! name.
//!
//! ```text
//!   confine ─▶ (the endpoint's tap is raised) ─▶ pin, refused … ─▶ release
//! ```
//!
//! A daemon that dies leaves the rules in force and the proxies closed: what is allowed by name waits for the next
//! daemon, which confines the endpoint anew.

pub(super) mod hello;
mod proxy;
mod rules;

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use ipnet::IpNet;
use tokio::{net::TcpListener, task::JoinHandle};

pub use proxy::Judge;
pub use rules::{Pin, Refused};

use super::{HostError, HostNetwork, Tap, nft, rules::link_local};
use rules::EgressRules;

/// What an endpoint may reach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Confinement {
    /// Where its neighbours are.
    pub subnets: Vec<IpNet>,
    /// The bridge's own addresses, at which its proxies listen; none where nothing is allowed by name.
    pub gateways: Vec<IpAddr>,
    /// What it may reach by whatever protocol, or by TCP and UDP at a port.
    pub networks: Vec<(IpNet, Option<u16>)>,
}

/// The proxies of an endpoint. Dropped, they end.
#[derive(Debug)]
pub(super) struct Proxies(Vec<JoinHandle<()>>);

impl Drop for Proxies {
    fn drop(&mut self) {
        self.0.iter().for_each(JoinHandle::abort);
    }
}

impl HostNetwork {
    /// Confines an endpoint that is not up yet, or one that is confined already.
    ///
    /// # Errors
    /// [`HostError`]; to be followed by [`HostNetwork::release`].
    pub async fn confine(
        &self,
        name: &str,
        tap: &Tap,
        confinement: Confinement,
        judge: Arc<dyn Judge>,
    ) -> Result<(), HostError> {
        if self.dry {
            return Ok(());
        }
        let Confinement { subnets, gateways, networks } = confinement;
        let (mut proxies, mut tasks) = (Vec::new(), Vec::new());
        for gateway in gateways {
            let listening = async {
                let listener = TcpListener::bind(SocketAddr::new(gateway, 0)).await?;
                Ok((listener.local_addr()?, listener))
            };
            let (address, listener) =
                listening.await.map_err(HostError::link(format!("cannot listen at {gateway}")))?;
            proxies.push(address);
            tasks.push(tokio::spawn(proxy::serve(listener, tap.addresses.clone(), Arc::clone(&judge))));
        }
        let proxied = Proxies(tasks);
        let mut addresses = tap.addresses.clone();
        if addresses.iter().any(IpAddr::is_ipv6) {
            addresses.push(link_local(tap.mac).into());
        }
        let rules = EgressRules { bridge: tap.bridge.clone(), addresses, subnets, networks, proxies };
        nft::apply(&rules::script(&self.egress_table(name), &rules)).await?;
        self.proxies(|all| all.insert(name.to_owned(), proxied));
        Ok(())
    }

    /// Lets a confined endpoint reach these addresses by its proxies.
    ///
    /// # Errors
    /// [`HostError`].
    pub async fn pin(&self, name: &str, pins: &[Pin]) -> Result<(), HostError> {
        if self.dry || pins.is_empty() {
            return Ok(());
        }
        nft::apply(&rules::pin(&self.egress_table(name), pins)).await
    }

    /// What of an endpoint's was refused so far.
    ///
    /// # Errors
    /// [`HostError`].
    pub async fn refused(&self, name: &str) -> Result<Vec<Refused>, HostError> {
        if self.dry {
            return Ok(Vec::new());
        }
        let text = nft::list_table("inet", &self.egress_table(name)).await?;
        rules::read_refused(&text).map_err(|error| HostError::Rules(format!("what nft prints: {error}")))
    }

    /// Takes a confined endpoint's rules and proxies away. It is gone.
    pub async fn release(&self, name: &str) {
        if self.proxies(|all| all.remove(name)).is_none() {
            return;
        }
        if let Err(error) = nft::apply(&rules::remove(&self.egress_table(name))).await {
            tracing::error!(%error, "the egress rules of an endpoint that is gone stay behind");
        }
    }

    /// Removes the rules of endpoints that are not known, and with `all` those of every one.
    pub(super) async fn release_others(&self, all: bool) -> Result<(), HostError> {
        let prefix = self.egress_table("");
        let tables = nft::tables("inet").await?;
        let known = |name: &str| !all && self.proxies(|known| known.contains_key(name));
        let others: String = tables
            .iter()
            .filter(|table| table.strip_prefix(&prefix).is_some_and(|name| !known(name)))
            .map(|table| rules::remove(table))
            .collect();
        if others.is_empty() { Ok(()) } else { nft::apply(&others).await }
    }

    fn egress_table(&self, tap: &str) -> String {
        format!("{}-{tap}", self.table)
    }
}
