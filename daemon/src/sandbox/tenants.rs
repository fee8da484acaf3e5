//! The containers of a sandbox: the one that its machine was booted for, and those that have joined it.
//!
//! ```text
//!   boot ─▶ settle(first) ─▶ enter(second) ─▶ furnish ─▶ … ─▶ leave(first) ─▶ leave(second): the machine ends
//!                              │ a late disk, a late share device               nobody enters any more
//!                              ╳ there is none left, or the machine is ending
//! ```
//! Whoever leaves gives its devices back and the memory that was plugged for it; the last one takes the machine
//! along. What others hold is none of its business: the first may leave before those that joined it.

use std::{
    collections::BTreeMap,
    fs::File,
    os::fd::AsFd,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bulkhead_agent_api::{Answer, Call, Create, ErrorKind, ProcessId};
use bulkhead_vmm_api::{Request, ShareKind};
use serde::{Deserialize, Serialize};

use super::{
    BootError, CallError, Confinement, DISK, HostLimits, NICS, SHARES, Sandbox, ShareSpec, TAG, extra_disk,
    memory::region_mib, plan, vmm::control::ANSWER_WITHIN,
};

/// How many disks a machine can get beside the one that it is booted for: volumes that are disks, and the writable
/// layers of containers that join it. Until then they are no devices at all.
pub const LATE_DISKS: u8 = 4;

/// How many share servers beside the first's, likewise.
pub(super) const LATE_SHARES: u8 = 3;

/// How often an agent is asked whether a container is ready to be forgotten.
const AGAIN: Duration = Duration::from_millis(20);

/// Which of a machine's devices a container has.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Place {
    /// The late disk of its writable layer; None: the machine was booted for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layer: Option<u8>,
    /// How many late disks, from the first on, are its volumes.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub volumes: u8,
    /// The late share device; None: the first one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shares: Option<u8>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "what serde calls")]
fn is_zero(number: &u8) -> bool {
    *number == 0
}

impl Place {
    /// Whether it has joined another's machine.
    #[must_use]
    pub fn is_joined(&self) -> bool {
        self.layer.is_some()
    }

    /// Whether this is the place of a container alone with its machine, without disks besides its own.
    #[must_use]
    pub fn is_usual(&self) -> bool {
        *self == Self::default()
    }

    /// The block slot of its writable layer.
    #[must_use]
    pub fn disk(&self) -> String {
        self.layer.map_or_else(|| DISK.to_owned(), |slot| extra_disk(slot.into()))
    }

    /// The tag of its shares.
    #[must_use]
    pub fn shares(&self) -> String {
        self.shares.map_or_else(|| SHARES.to_owned(), late_shares)
    }

    /// What a layer of its image is shared as: each container has its own view of one.
    #[must_use]
    pub fn layer(&self, layer: &str) -> String {
        self.layer.map_or_else(|| layer.to_owned(), |slot| format!("{slot}-{layer}"))
    }

    /// Every block slot that it has.
    fn disks(&self) -> impl Iterator<Item = String> + use<'_> {
        std::iter::once(self.disk()).chain((0..self.volumes).map(|slot| extra_disk(slot.into())))
    }

    fn has_late_disk(&self, slot: u8) -> bool {
        self.layer == Some(slot) || slot < self.volumes
    }
}

/// The tag of a late share device, from 0.
pub(super) fn late_shares(slot: u8) -> String {
    format!("{SHARES}{slot}")
}

/// A container of a sandbox.
#[derive(Debug, Clone)]
pub struct Tenant {
    /// Its name towards the agent.
    pub guest: String,
    /// What it has of the machine's devices.
    pub place: Place,
    /// What a machine of its own would have, in MiB.
    pub memory_mib: u32,
    /// Its image's layers, by the names that [`Place::layer`] takes.
    pub layers: Vec<String>,
}

/// What a container that joins brings along.
#[derive(Debug)]
pub struct Furniture {
    /// Its writable layer, open for reading and writing.
    pub disk: File,
    /// Its image's layers: names as in [`Tenant::layers`], and where they are.
    pub layers: Vec<(String, PathBuf)>,
    /// What it gets of the host to read and write.
    pub shares: Vec<ShareSpec>,
    /// The VMM's executable, which serves the shares too.
    pub program: PathBuf,
    /// How VMMs are confined here.
    pub confinement: Confinement,
}

/// Why a container cannot join.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EnterError {
    /// Its last container is leaving.
    #[error("the microVM is ending")]
    Ending,
    /// No disk is left.
    #[error(
        "the microVM has no disk left for another container: {LATE_DISKS} can join one, fewer where volumes are disks"
    )]
    Full,
    /// No share device is left.
    #[error(
        "the microVM has no share device left: {LATE_SHARES} containers with volumes or bind mounts can join one"
    )]
    NoShares,
}

/// Who is in a sandbox.
#[derive(Debug, Default)]
pub(super) struct Tenants {
    inner: Mutex<Inner>,
    /// Held while the machine's size is made to follow.
    sizing: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct Inner {
    /// The last one has left, or is about to.
    closed: bool,
    all: BTreeMap<String, Held>,
}

#[derive(Debug)]
struct Held {
    tenant: Tenant,
    cpus: HostLimits,
    /// Its devices are still being taken back.
    leaving: bool,
    /// Held while the agent makes it: devices that vanish under a guest which is just looking for them end its machine.
    making: Arc<tokio::sync::Mutex<()>>,
}

impl Held {
    fn new(tenant: Tenant) -> Self {
        Self { tenant, cpus: HostLimits::default(), leaving: false, making: Arc::default() }
    }
}

/// What a leave comes to.
enum Leave {
    /// Nobody else is there.
    Last,
    /// Others stay.
    One(Box<Tenant>),
    /// It was not in.
    Nobody,
}

impl Tenants {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn settle(&self, container: &str, tenant: Tenant) {
        self.inner().all.insert(container.to_owned(), Held::new(tenant));
    }

    fn enter(&self, container: &str, mut tenant: Tenant, with_shares: bool) -> Result<Place, EnterError> {
        let mut inner = self.inner();
        if inner.closed || inner.all.is_empty() {
            return Err(EnterError::Ending);
        }
        let places = || inner.all.values().map(|held| &held.tenant.place);
        let disk = (0..LATE_DISKS).find(|slot| !places().any(|place| place.has_late_disk(*slot)));
        let shares = (0..LATE_SHARES).find(|slot| !places().any(|place| place.shares == Some(*slot)));
        let layer = Some(disk.ok_or(EnterError::Full)?);
        let shares = if with_shares { Some(shares.ok_or(EnterError::NoShares)?) } else { None };
        let place = Place { layer, volumes: 0, shares };
        tenant.place = place.clone();
        inner.all.insert(container.to_owned(), Held::new(tenant));
        Ok(place)
    }

    fn leave(&self, container: &str) -> Leave {
        let mut inner = self.inner();
        let others = inner.all.iter().any(|(id, held)| id != container && !held.leaving);
        if !others {
            inner.closed = true;
            return Leave::Last;
        }
        match inner.all.get_mut(container) {
            Some(held) if !held.leaving => {
                held.leaving = true;
                Leave::One(Box::new(held.tenant.clone()))
            }
            _ => Leave::Nobody,
        }
    }

    fn making(&self, container: &str) -> Arc<tokio::sync::Mutex<()>> {
        self.inner().all.get(container).map(|held| Arc::clone(&held.making)).unwrap_or_default()
    }

    /// Its devices are free; whether the machine goes on.
    fn gone(&self, container: &str) -> bool {
        let mut inner = self.inner();
        inner.all.remove(container);
        !inner.closed
    }

    /// Those of all who are in, or the first's where nobody was noted.
    pub(super) fn places(&self) -> Vec<Place> {
        let places: Vec<Place> = self.inner().all.values().map(|held| held.tenant.place.clone()).collect();
        if places.is_empty() { vec![Place::default()] } else { places }
    }

    fn staying(inner: &Inner) -> impl Iterator<Item = &Held> {
        inner.all.values().filter(|held| !held.leaving)
    }

    /// What all of them need, in MiB, and the limits of the one that is alone.
    fn needs(&self) -> (u32, HostLimits) {
        let inner = self.inner();
        let total = Self::staying(&inner).fold(0u32, |sum, held| sum.saturating_add(held.tenant.memory_mib));
        let mut staying = Self::staying(&inner);
        let cpus = match (staying.next(), staying.next()) {
            (Some(only), None) => only.cpus.clone(),
            // Each is held to its own by the guest's control groups.
            _ => HostLimits::default(),
        };
        (total, cpus)
    }
}

impl Sandbox {
    /// Notes the container that it was booted for, or one that an earlier daemon has put into it.
    pub fn settle(&self, container: &str, tenant: Tenant) {
        self.tenants.settle(container, tenant);
    }

    /// Gives a container a place in it; [`Sandbox::leave`] gives it back.
    ///
    /// # Errors
    /// [`EnterError`].
    pub fn enter(&self, container: &str, tenant: Tenant, with_shares: bool) -> Result<Place, EnterError> {
        self.tenants.enter(container, tenant, with_shares)
    }

    /// Whether more than one container is in it.
    pub fn is_shared(&self) -> bool {
        self.tenants.inner().all.len() > 1
    }

    /// What the others in it need, in MiB.
    pub fn others_mib(&self, container: &str) -> u32 {
        let inner = self.tenants.inner();
        let others = inner.all.iter().filter(|(id, held)| *id != container && !held.leaving);
        others.fold(0u32, |sum, (_, held)| sum.saturating_add(held.tenant.memory_mib))
    }

    /// Notes what a container needs by now, in MiB.
    pub fn note_memory(&self, container: &str, memory_mib: u32) {
        if let Some(held) = self.tenants.inner().all.get_mut(container) {
            held.tenant.memory_mib = memory_mib;
        }
    }

    /// Notes what a container may use of the host's CPUs; gives what all of them may: a VMM with more than one
    /// container is not held back itself, since one's limit must not be another's.
    pub(super) fn note_cpus(&self, container: &str, limits: &HostLimits) -> HostLimits {
        if let Some(held) = self.tenants.inner().all.get_mut(container) {
            held.cpus = limits.clone();
        }
        self.tenants.needs().1
    }

    /// Where a container is in it.
    pub(super) fn place(&self, container: &str) -> Place {
        let inner = self.tenants.inner();
        inner.all.get(container).map(|held| held.tenant.place.clone()).unwrap_or_default()
    }

    /// Gives the machine what a container that has entered brings along.
    ///
    /// # Errors
    /// [`BootError`]; what was given goes when it leaves.
    pub async fn furnish(&self, container: &str, furniture: Furniture) -> Result<(), BootError> {
        let place = self.place(container);
        self.fit().await.map_err(|error| {
            BootError::io("cannot make room in the machine", std::io::Error::other(error))
        })?;
        if !furniture.shares.is_empty() {
            let cell = self.cell();
            let (total, _) = self.tenants.needs();
            let served = plan::Served {
                tag: place.shares(),
                log: place.shares.map_or_else(|| "shares.log".to_owned(), |slot| format!("shares{slot}.log")),
                memory_mib: total,
                shares: &furniture.shares,
            };
            plan::attach_shares(&self.dir, &self.control, &cell, &furniture.program, &served).await?;
        }
        let mut layers = Vec::with_capacity(furniture.layers.len());
        for (name, path) in &furniture.layers {
            layers.push((place.layer(name), plan::open_layer(path, &furniture.confinement)?));
        }
        let layers = layers.iter().map(|(name, layer)| {
            let name = name.clone();
            (Request::AttachShare { tag: TAG.into(), name, kind: ShareKind::Layer }, Some(layer.as_fd()))
        });
        let disk = Request::AttachDisk { id: place.disk(), read_only: false };
        let requests: Vec<_> = layers.chain([(disk, Some(furniture.disk.as_fd()))]).collect();
        self.control.call_all(&self.dir, &requests).await?;
        Ok(())
    }

    /// Has the agent make a container that was furnished. Given up, it is made nonetheless, for [`Sandbox::leave`] to
    /// wait for.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn make(self: &Arc<Self>, container: &str, create: Create) -> Result<Answer, CallError> {
        let (sandbox, making) = (Arc::clone(self), self.tenants.making(container));
        let made = tokio::spawn(async move {
            let _making = making.lock().await;
            sandbox.call(Call::Create(Box::new(create))).await
        });
        made.await.unwrap_or(Err(CallError::Gone))
    }

    /// A container has ended, or will not begin: what it had is given back when this returns, its writable layer
    /// flushed unless `flush` is false. The last one takes the machine along.
    pub async fn leave(&self, container: &str, flush: bool, within: Duration) {
        match self.tenants.leave(container) {
            Leave::Last if flush => self.shut_down(within).await,
            Leave::Last => self.destroy().await,
            Leave::Nobody => {}
            Leave::One(tenant) => {
                let making = self.tenants.making(container);
                let forgotten = async {
                    drop(making.lock().await);
                    self.forget(&tenant.guest).await;
                };
                if tokio::time::timeout(within, forgotten).await.is_err() {
                    tracing::warn!(sandbox = self.id, container, "a guest does not let go of a container");
                }
                self.strip(&tenant).await;
                if !self.tenants.gone(container) {
                    // The last one has left meanwhile: its disk is free when the machine is gone.
                    self.ended().await;
                } else if let Err(error) = self.fit().await {
                    tracing::warn!(sandbox = self.id, %error, "a machine keeps the size that it had");
                }
            }
        }
    }

    /// Has the agent end what is left of a container, unmount and flush.
    async fn forget(&self, guest: &str) {
        let process = ProcessId { container: guest.to_owned(), exec: None };
        // Of one that has ended, or never began, this is no more than a question.
        let _ = self.call(Call::Signal { process: process.clone(), signal: libc::SIGKILL }).await;
        loop {
            match self.call(Call::Delete { process: process.clone() }).await {
                Err(CallError::Agent(error)) if error.kind == ErrorKind::Conflict => {
                    tokio::time::sleep(AGAIN).await;
                }
                Err(CallError::Agent(error)) if error.kind != ErrorKind::NotFound => {
                    return tracing::warn!(sandbox = self.id, %error, "a container is not all gone from its guest");
                }
                _ => return,
            }
        }
    }

    /// Takes back a container's devices, whether the guest has let go of them or not.
    async fn strip(&self, tenant: &Tenant) {
        let place = &tenant.place;
        let mut requests: Vec<Request> = place.disks().map(|id| Request::DetachDisk { id }).collect();
        requests.push(Request::DetachServer { tag: place.shares() });
        let layers = tenant.layers.iter().map(|layer| place.layer(layer));
        requests.extend(layers.map(|name| Request::DetachShare { tag: TAG.into(), name }));
        if !place.is_joined() {
            requests.extend((0..NICS).map(|slot| Request::DetachTap { id: super::nic(slot) }));
        }
        for request in requests {
            if let Err(error) = self.control.call(&self.dir, &request, &[], ANSWER_WITHIN).await {
                // Some it never had.
                tracing::debug!(sandbox = self.id, ?request, %error, "nothing to take back");
            }
        }
    }

    /// Makes the machine's memory and the VMM's limits follow who is in it.
    async fn fit(&self) -> Result<(), super::ResizeError> {
        let _sizing = self.tenants.sizing.lock().await;
        let (total_mib, cpus) = self.tenants.needs();
        if let Some(group) = &self.cgroup {
            group.update_cpus(&cpus)?;
        }
        let before = self.memory().await?;
        let after = before.of_total(total_mib, region_mib());
        if after == before { Ok(()) } else { self.set_memory(after).await }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tenant(guest: &str, place: Place, memory_mib: u32) -> Tenant {
        Tenant { guest: guest.into(), place, memory_mib, layers: Vec::new() }
    }

    fn usual() -> Tenants {
        let tenants = Tenants::default();
        tenants.settle("first", tenant("first", Place { volumes: 1, ..Place::default() }, 512));
        tenants
    }

    fn enter(tenants: &Tenants, name: &str, shares: bool) -> Result<Place, EnterError> {
        tenants.enter(name, tenant(name, Place::default(), 100), shares)
    }

    #[test]
    fn places_are_what_nobody_has() {
        let tenants = usual();
        let second = enter(&tenants, "b", true).unwrap();
        assert_eq!(second, Place { layer: Some(1), volumes: 0, shares: Some(0) });
        assert_eq!(
            (second.disk(), second.shares(), second.layer("ab")),
            ("disk1".into(), "shares0".into(), "1-ab".into())
        );
        let third = enter(&tenants, "c", false).unwrap();
        assert_eq!((third.layer, third.shares), (Some(2), None));
        assert_eq!(enter(&tenants, "d", true).unwrap().shares, Some(1));
        assert_eq!(enter(&tenants, "e", true), Err(EnterError::Full));
        assert!(matches!(tenants.leave("c"), Leave::One(_)));
        assert_eq!(enter(&tenants, "e", true), Err(EnterError::Full), "its disk is still there");
        assert!(tenants.gone("c"));
        assert_eq!(enter(&tenants, "e", true).unwrap().layer, Some(2));
        assert_eq!(tenants.needs().0, 512 + 300);
    }

    #[test]
    fn the_first_is_where_it_was_before_there_were_others() {
        let place = Place::default();
        assert!(place.is_usual() && !place.is_joined());
        assert_eq!(
            (place.disk(), place.shares(), place.layer("ab")),
            ("root".into(), "shares".into(), "ab".into())
        );
        assert_eq!(serde_json::to_string(&place).unwrap(), "{}");
        assert_eq!(serde_json::from_str::<Place>("{}").unwrap(), place);
    }

    #[test]
    fn the_last_one_closes_the_door() {
        let tenants = usual();
        enter(&tenants, "b", false).unwrap();
        assert!(matches!(tenants.leave("first"), Leave::One(_)));
        assert!(matches!(tenants.leave("stranger"), Leave::Nobody));
        // The first is still on its way out.
        assert!(matches!(tenants.leave("b"), Leave::Last));
        assert!(!tenants.gone("first"), "it waits for the machine's end");
        assert_eq!(enter(&tenants, "c", false), Err(EnterError::Ending));
    }

    #[test]
    fn a_boot_that_nobody_has_moved_into_ends_with_whoever_leaves() {
        assert!(matches!(Tenants::default().leave("first"), Leave::Last));
        assert_eq!(enter(&Tenants::default(), "b", false), Err(EnterError::Ending));
    }

    #[test]
    fn one_s_limits_of_the_host_s_cpus_are_not_another_s() {
        let tenants = usual();
        let limits = HostLimits { cpu_weight: Some(7), ..HostLimits::default() };
        tenants.inner().all.get_mut("first").unwrap().cpus = limits.clone();
        assert_eq!(tenants.needs(), (512, limits.clone()));
        enter(&tenants, "b", false).unwrap();
        assert_eq!(tenants.needs(), (612, HostLimits::default()));
        tenants.leave("b");
        assert_eq!(tenants.needs(), (512, limits));
    }
}
