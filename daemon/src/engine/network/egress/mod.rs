//! Containers that may reach only what their policy names ([`policy`]). The host refuses the rest; here is what
//! names lead to, who asks for what by them, and the telling of what was refused.
//!
//! ```text
//!   question for a name ─┬─ allowed ─▶ forwarded ─▶ its addresses are pinned ─▶ answered
//!                        └─ else ───▶ refused, counted
//!   connection to a pinned address ─▶ proxy: the server's name must be one that the address was pinned for
//! ```

pub mod policy;

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError, Weak},
    time::{Duration, Instant},
};

use super::{
    Networks,
    dns::{self, Query},
    record::{Endpoint, Network},
};
use crate::{
    config::Config,
    engine::{Error, Result, Shared, container::record::Record},
    hostnet::{Confinement, Judge, Pin},
};
use policy::{HTTPS, Policy, PolicyError};

/// How long an address stays pinned: as long as the answer may be kept, within bounds, and a little longer, since
/// clients take their time.
const LEAST: Duration = Duration::from_mins(1);
const MOST: Duration = Duration::from_hours(1);
const GRACE: Duration = Duration::from_secs(30);

/// How many addresses of a container can be pinned, and how many names of one address.
const MAX_PINNED: usize = 1024;
const MAX_NAMES: usize = 64;

/// How many refused destinations are told apart.
const MAX_DESTINATIONS: usize = 256;

/// How often what was refused is told.
const TELL_EVERY: Duration = Duration::from_secs(2);

/// The policy of a container: its label's, else the daemon's. None: it may reach everything.
///
/// # Errors
/// The label makes no sense.
pub(crate) fn policy_of(
    labels: Option<&BTreeMap<String, String>>,
    config: &Config,
) -> Result<Option<Policy>, PolicyError> {
    match labels.and_then(|labels| labels.get(policy::LABEL)) {
        Some(label) => label.parse().map(Some),
        None => Ok(config.egress.clone()),
    }
}

/// A running container with a policy.
pub(super) struct Egress {
    id: String,
    name: String,
    policy: Policy,
    /// The names that lead to an address, and until when.
    pins: Mutex<BTreeMap<IpAddr, BTreeMap<String, Instant>>>,
    /// What was refused so far and not told yet.
    refused: Mutex<BTreeMap<String, u64>>,
    /// What the host's rules have refused, as it was told last, by tap.
    told: tokio::sync::Mutex<BTreeMap<String, BTreeMap<String, u64>>>,
}

impl Egress {
    fn new(record: &Record, policy: Policy) -> Self {
        Self {
            id: record.id.clone(),
            name: record.name.clone(),
            policy,
            pins: Mutex::default(),
            refused: Mutex::default(),
            told: tokio::sync::Mutex::default(),
        }
    }

    /// Whether a question may be forwarded; else it is counted as refused. It is about a name that is allowed, and
    /// not of a kind whose answer would hide from the proxy what is asked for.
    pub(super) fn may_ask(&self, query: &Query) -> bool {
        let Some(name) = query.name.as_deref().filter(|_| query.is_internet) else { return false };
        let allowed = self.policy.names(name).next().is_some();
        if !allowed {
            self.count(format!("name {}", printable(name)));
        }
        allowed
    }

    /// The addresses in an answer that the name may lead to.
    fn learn(&self, query: &Query, answer: &[u8], now: Instant) -> Vec<Pin> {
        let Some(name) = query.name.as_deref() else { return Vec::new() };
        let mut pins = Vec::new();
        let mut pinned = self.pins.lock().unwrap_or_else(PoisonError::into_inner);
        for (address, ttl) in dns::addresses_in(answer) {
            let lasts = Duration::from_secs(ttl.into()).clamp(LEAST, MOST) + GRACE;
            let leading = self.policy.names(name).filter(|target| target.may_lead_to(address));
            let before = pins.len();
            pins.extend(leading.map(|target| Pin { address, port: target.port, lasts }));
            if pins.len() == before {
                self.count(format!("name {} leads to {address}, which is not public", printable(name)));
                continue;
            }
            if pinned.len() >= MAX_PINNED && !pinned.contains_key(&address) {
                pinned.retain(|_, names| {
                    names.retain(|_, until| *until > now);
                    !names.is_empty()
                });
                if pinned.len() >= MAX_PINNED {
                    pins.truncate(before);
                    continue;
                }
            }
            let names = pinned.entry(address).or_default();
            names.retain(|_, until| *until > now);
            if names.len() < MAX_NAMES || names.contains_key(name) {
                names.insert(name.to_owned(), now + lasts);
            }
        }
        pins
    }

    /// Whether an address is pinned for a name that the port is allowed with.
    fn leads(&self, name: &str, to: SocketAddr, now: Instant) -> bool {
        let pinned = self.pins.lock().unwrap_or_else(PoisonError::into_inner);
        let until = pinned.get(&to.ip()).and_then(|names| names.get(name));
        until.is_some_and(|until| *until > now)
            && self
                .policy
                .names(name)
                .any(|target| target.port.is_none_or(|port| port == to.port()) && target.may_lead_to(to.ip()))
    }

    fn count(&self, what: String) {
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        let what = if refused.len() >= MAX_DESTINATIONS { "others".into() } else { what };
        *refused.entry(what).or_default() += 1;
    }
}

impl Judge for Egress {
    fn permits_server(&self, to: SocketAddr, server: Option<&str>) -> bool {
        let permitted = server.is_some_and(|server| self.leads(server, to, Instant::now()));
        if !permitted {
            self.count(format!("tls {} at {to}", printable(server.unwrap_or("without a name"))));
        }
        permitted
    }

    fn permits_plain(&self, to: SocketAddr) -> bool {
        let names: Vec<String> = {
            let pinned = self.pins.lock().unwrap_or_else(PoisonError::into_inner);
            pinned.get(&to.ip()).map(|names| names.keys().cloned().collect()).unwrap_or_default()
        };
        let now = Instant::now();
        let permitted = to.port() != HTTPS && names.iter().any(|name| self.leads(name, to, now));
        if !permitted {
            self.count(format!("tcp {to}"));
        }
        permitted
    }
}

/// What a guest has written, for people.
fn printable(text: &str) -> String {
    text.chars()
        .take(253)
        .map(|char| if char.is_ascii_graphic() || char == ' ' { char } else { '?' })
        .collect()
}

impl Networks {
    /// Confines a container's endpoint, if it has a policy.
    ///
    /// # Errors
    /// The policy makes no sense, or the host's; nothing of it is left but what [`Networks::leave`] takes away.
    pub(super) async fn confine(
        &self,
        record: &Record,
        network: &Network,
        endpoint: &Endpoint,
    ) -> Result<()> {
        let policy = policy_of(record.config.labels.as_ref(), &self.config);
        let Some(policy) = policy.map_err(|error| Error::invalid(error.to_string()))? else { return Ok(()) };
        let egress = self.with_egress(|all| {
            let egress = all.entry(record.id.clone());
            Arc::clone(egress.or_insert_with(|| Arc::new(Egress::new(record, policy))))
        });
        let gateways = if egress.policy.has_names() {
            network.subnets.iter().map(|subnet| subnet.gateway).collect()
        } else {
            Vec::new()
        };
        let confinement = Confinement {
            subnets: network.subnets.iter().map(|subnet| subnet.subnet).collect(),
            gateways,
            networks: egress.policy.networks().collect(),
        };
        let tap = super::members::tap(network, endpoint);
        let confined =
            self.host.confine(&endpoint.tap, &tap, confinement, Arc::<Egress>::clone(&egress)).await;
        confined.map_err(|error| Error::internal(format!("the container's egress policy: {error}")))?;
        egress.told.lock().await.insert(endpoint.tap.clone(), BTreeMap::new());
        Ok(())
    }

    /// The policy at work of a container.
    pub(super) fn egress(&self, container: &str) -> Option<Arc<Egress>> {
        self.with_egress(|all| all.get(container).cloned())
    }

    /// Pins what an answer says. It may be told when this returns.
    pub(super) async fn learn(&self, egress: &Egress, query: &Query, answer: &[u8]) {
        let pins = egress.learn(query, answer, Instant::now());
        let taps: Vec<String> = egress.told.lock().await.keys().cloned().collect();
        for tap in taps {
            if let Err(error) = self.host.pin(&tap, &pins).await {
                tracing::warn!(container = egress.id, %error, "addresses of an allowed name are not let through");
            }
        }
    }

    /// Tells what was refused of a container, and takes the rules of taps that are gone away.
    pub(super) async fn release(&self, container: &str, taps: &[String]) {
        let Some(egress) = self.egress(container) else { return };
        self.tell(&egress).await;
        let mut told = egress.told.lock().await;
        for tap in taps {
            self.host.release(tap).await;
            told.remove(tap);
        }
        if told.is_empty() {
            self.with_egress(|all| all.remove(container));
        }
    }

    async fn tell(&self, egress: &Egress) {
        let mut told = egress.told.lock().await;
        for (tap, before) in told.iter_mut() {
            match self.host.refused(tap).await {
                Ok(refused) => {
                    for refused in refused {
                        let known = before.entry(refused.destination.clone()).or_default();
                        // One that was forgotten for its age begins anew.
                        let new = refused.packets.checked_sub(*known).unwrap_or(refused.packets);
                        *known = refused.packets;
                        self.tell_refused(egress, &refused.destination, new);
                    }
                }
                Err(error) => tracing::debug!(tap, %error, "what was refused is not known"),
            }
        }
        drop(told);
        let refused = std::mem::take(&mut *egress.refused.lock().unwrap_or_else(PoisonError::into_inner));
        for (destination, count) in refused {
            self.tell_refused(egress, &destination, count);
        }
    }

    fn tell_refused(&self, egress: &Egress, destination: &str, count: u64) {
        if count == 0 {
            return;
        }
        let attributes = BTreeMap::from([
            ("name".to_owned(), egress.name.clone()),
            ("destination".to_owned(), destination.to_owned()),
            ("count".to_owned(), count.to_string()),
        ]);
        self.events.publish("container", "egress-refused", &egress.id, attributes);
    }

    fn with_egress<R>(&self, f: impl FnOnce(&mut BTreeMap<String, Arc<Egress>>) -> R) -> R {
        f(&mut self.egress.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Tells what was refused, for ever.
pub(crate) async fn watch(shared: Weak<Shared>) {
    loop {
        tokio::time::sleep(TELL_EVERY).await;
        let Some(shared) = shared.upgrade() else { return };
        let all: Vec<Arc<Egress>> = shared.networks.with_egress(|all| all.values().cloned().collect());
        for egress in all {
            shared.networks.tell(&egress).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn egress(policy: &str) -> Egress {
        Egress {
            id: "c".into(),
            name: "web".into(),
            policy: policy.parse().unwrap(),
            pins: Mutex::default(),
            refused: Mutex::default(),
            told: tokio::sync::Mutex::default(),
        }
    }

    fn question(name: &str) -> Query {
        Query::parse(&dns::query(1, name, dns::kind::A)).unwrap()
    }

    fn learn(egress: &Egress, name: &str, addresses: &[&str]) -> Vec<Pin> {
        let query = question(name);
        let addresses: Vec<IpAddr> = addresses.iter().map(|text| text.parse().unwrap()).collect();
        egress.learn(&query, &query.addresses(&addresses, 4096), Instant::now())
    }

    fn refused(egress: &Egress) -> Vec<String> {
        egress.refused.lock().unwrap().keys().cloned().collect()
    }

    #[test]
    fn a_server_is_reached_by_the_name_that_its_address_was_asked_for() {
        let egress = egress("allow:a.example,b.example,*.c.example:8443");
        let to = |text: &str| text.parse::<SocketAddr>().unwrap();
        assert!(!egress.permits_server(to("9.9.9.9:443"), Some("a.example")), "before it was asked");
        let pins = learn(&egress, "a.example", &["9.9.9.9"]);
        let expected = Pin { address: "9.9.9.9".parse().unwrap(), port: Some(443), lasts: LEAST + GRACE };
        assert_eq!(pins, [expected]);
        assert!(egress.permits_server(to("9.9.9.9:443"), Some("a.example")));
        assert!(!egress.permits_server(to("9.9.9.9:443"), Some("b.example")), "another's address");
        assert!(!egress.permits_server(to("9.9.9.9:8443"), Some("a.example")), "another port");
        assert!(!egress.permits_server(to("9.9.9.9:443"), None));
        assert!(!egress.permits_plain(to("9.9.9.9:443")));
        learn(&egress, "www.c.example", &["9.9.9.9"]);
        assert!(egress.permits_plain(to("9.9.9.9:8443")));
        assert!(!egress.permits_plain(to("9.9.9.10:8443")));
        assert!(refused(&egress).contains(&"tls b.example at 9.9.9.9:443".to_owned()));
    }

    #[test]
    fn a_name_is_no_way_inside_unless_it_is_said_to_be() {
        let egress = egress("allow:a.example,internal:git.example");
        assert_eq!(learn(&egress, "a.example", &["10.0.0.1", "127.0.0.1"]), []);
        assert_eq!(learn(&egress, "git.example", &["10.0.0.1"]).len(), 1);
        assert!(!egress.permits_server("10.0.0.1:443".parse().unwrap(), Some("a.example")));
        assert!(egress.permits_server("10.0.0.1:443".parse().unwrap(), Some("git.example")));
        assert!(!egress.may_ask(&question("other.example")));
        assert!(egress.may_ask(&question("a.example")));
    }

    #[test]
    fn a_guest_cannot_fill_the_memory() {
        let egress = egress("allow:*.example:*");
        for number in 0..2 * MAX_PINNED {
            let address = format!("9.9.{}.{}", number >> 8, number & 255);
            learn(&egress, &format!("n{number}.example"), &[&address]);
            learn(&egress, &format!("n{number}.example"), &["8.8.8.8"]);
            egress.count(format!("tcp {address}"));
        }
        assert_eq!(egress.pins.lock().unwrap().len(), MAX_PINNED);
        assert!(egress.pins.lock().unwrap().values().all(|names| names.len() <= MAX_NAMES));
        assert!(refused(&egress).len() <= MAX_DESTINATIONS + 1);
    }
}
