//! Volumes, as Docker's users know them: driver `local`, and its options to stand for a directory of the host, or
//! to be a disk.
//!
//! | operation | here |
//! |---|---|
//! | who uses which | the containers' records tell: nothing is counted |
//! | create, remove | [`store`], which pins a volume while a container is being made that will use it |
//! | mount | the container's sandbox serves it to the guest, see [`super::mounts`] |

pub(crate) mod disk;
pub(crate) mod store;

use std::{collections::BTreeMap, sync::Arc};

use jiff::Timestamp;

use super::{Engine, Error, ErrorKind, Result, Shared, container::record::Record};
use crate::api::types::{
    Filters,
    volume::{CreateRequest, List, PruneResponse, Usage, Volume as Described},
};
use store::{Pin, Volume, no_such};

/// The only driver.
pub(crate) const DRIVER: &str = "local";

/// The label by which Docker's clients and prunes know a volume that nobody has named.
pub(crate) const ANONYMOUS: &str = "com.docker.volume.anonymous";

/// The keys that a list can be filtered by.
pub const LIST_FILTERS: [&str; 4] = ["dangling", "driver", "label", "name"];

/// The keys that a prune can be filtered by.
pub const PRUNE_FILTERS: [&str; 3] = ["all", "label", "label!"];

impl Shared {
    /// Makes a volume, or finds the one of that name; it is not removed as long as the pin lives.
    pub(crate) fn volume(
        &self,
        name: Option<&str>,
        labels: Option<BTreeMap<String, String>>,
        options: Option<BTreeMap<String, String>>,
    ) -> Result<(Arc<Volume>, Pin)> {
        let options = check_options(options)?;
        let (name, labels) = match name {
            Some(name) => (name.to_owned(), labels),
            None => {
                let mut labels = labels.unwrap_or_default();
                labels.insert(ANONYMOUS.into(), String::new());
                (super::container::names::new_id(), Some(labels))
            }
        };
        let (volume, pin, new) =
            self.volumes.create(Volume { name, created: Timestamp::now(), labels, options })?;
        if new {
            self.volume_event(&volume.name, "create", []);
        }
        Ok((volume, pin))
    }

    pub(crate) fn volume_event<const N: usize>(&self, name: &str, action: &str, more: [(&str, String); N]) {
        let mut attributes = BTreeMap::from([("driver".to_owned(), DRIVER.to_owned())]);
        attributes.extend(more.map(|(key, value)| (key.to_owned(), value)));
        self.events.publish("volume", action, name, attributes);
    }

    /// Tells of a container's volumes that they are mounted, or not any more.
    pub(crate) fn mount_events(&self, record: &Record, action: &str) {
        for mount in &record.mounts {
            let Some(name) = mount.volume() else { continue };
            let container = ("container", record.id.clone());
            if action == "mount" {
                let read_write = ("read/write", (!mount.read_only).to_string());
                let more = [
                    container,
                    ("destination", mount.destination.clone()),
                    read_write,
                    ("propagation", String::new()),
                ];
                self.volume_event(name, action, more);
            } else {
                self.volume_event(name, action, [container]);
            }
        }
    }

    /// The ids of the containers that use it, but for one that is going.
    fn users(&self, volume: &str, going: &str) -> Vec<String> {
        let uses = |record: &Record| {
            record.id != going && record.mounts.iter().any(|mount| mount.volume() == Some(volume))
        };
        let containers = self.registry.all().into_iter();
        containers
            .map(|container| container.view().record)
            .filter(|r| uses(r))
            .map(|r| r.id.clone())
            .collect()
    }

    /// Removes a volume that nobody uses.
    async fn remove_volume(self: &Arc<Self>, name: &str, going: &str) -> Result<()> {
        if self.volumes.get(name).is_none() {
            return Err(no_such(name));
        }
        let shared = Arc::clone(self);
        let (owned, going) = (name.to_owned(), going.to_owned());
        let removed = tokio::task::spawn_blocking(move || {
            shared.volumes.remove(&owned, || shared.users(&owned, &going))
        });
        removed.await.unwrap_or_else(|error| Err(Error::internal(error.to_string())))?;
        self.volume_event(name, "destroy", []);
        Ok(())
    }

    /// Removes the volumes that were made for a container which is gone or going, as far as nobody else uses them.
    pub(crate) async fn remove_anonymous(self: &Arc<Self>, record: &Record) {
        for mount in record.mounts.iter().filter(|mount| mount.is_anonymous()) {
            let Some(name) = mount.volume() else { continue };
            match self.remove_volume(name, &record.id).await {
                Ok(()) | Err(Error { kind: ErrorKind::NotFound | ErrorKind::Conflict, .. }) => {}
                Err(error) => tracing::warn!(volume = name, %error, "an anonymous volume stays behind"),
            }
        }
    }

    fn describe(&self, volume: &Volume) -> Described {
        Described {
            created_at: volume.created.strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
            driver: DRIVER.into(),
            labels: volume.labels.clone(),
            mountpoint: self.volumes.mountpoint(volume).display().to_string(),
            name: volume.name.clone(),
            options: volume.options.clone(),
            scope: "local".into(),
            usage_data: None,
        }
    }
}

impl Engine {
    /// Makes a volume, or finds the one of that name.
    ///
    /// # Errors
    /// A name, driver or option that is not valid here.
    pub async fn volume_create(&self, request: CreateRequest) -> Result<Described> {
        let CreateRequest { name, driver, driver_opts, labels, cluster_volume_spec } = request;
        if cluster_volume_spec.is_some() {
            return Err(Error::unavailable(
                "This node is not a swarm manager: there are no cluster volumes.",
            ));
        }
        check_driver(&driver)?;
        let shared = Arc::clone(&self.shared);
        let made = tokio::task::spawn_blocking(move || {
            let name = (!name.is_empty()).then_some(name);
            shared.volume(name.as_deref(), labels, driver_opts).map(|(volume, _)| shared.describe(&volume))
        });
        made.await.unwrap_or_else(|error| Err(Error::internal(error.to_string())))
    }

    /// One volume.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn volume_inspect(&self, name: &str) -> Result<Described> {
        let volume = self.shared.volumes.get(name).ok_or_else(|| no_such(name))?;
        Ok(self.shared.describe(&volume))
    }

    /// Those that the filters select.
    ///
    /// # Errors
    /// A filter that is not valid.
    pub fn volume_list(&self, filters: &Filters) -> Result<List> {
        let dangling =
            filters.contains("dangling").then(|| filters.boolean("dangling", false)).transpose()?;
        let volumes = self.shared.volumes.all().into_iter().filter(|volume| {
            filters.any("name", |name| volume.name.contains(name))
                && filters.exact("driver", DRIVER)
                && filters.labels("label", volume.labels.as_ref().unwrap_or(&BTreeMap::new()))
                && dangling.is_none_or(|wanted| self.shared.users(&volume.name, "").is_empty() == wanted)
        });
        Ok(List { volumes: volumes.map(|volume| self.shared.describe(&volume)).collect(), warnings: None })
    }

    /// Removes one.
    ///
    /// # Errors
    /// There is none (unless `force` is set), or it is in use.
    pub async fn volume_remove(&self, name: &str, force: bool) -> Result<()> {
        match self.shared.remove_volume(name, "").await {
            Err(Error { kind: ErrorKind::NotFound, .. }) if force => Ok(()),
            removed => removed,
        }
    }

    /// Removes those that nobody uses: without `all` only what nobody has named.
    ///
    /// # Errors
    /// A filter that is not valid.
    pub async fn volume_prune(&self, filters: &Filters, all: bool) -> Result<PruneResponse> {
        let all = filters.boolean("all", all)?;
        let mut response = PruneResponse::default();
        let none = BTreeMap::new();
        for volume in self.shared.volumes.all() {
            let labels = volume.labels.as_ref().unwrap_or(&none);
            let included = (all || labels.contains_key(ANONYMOUS))
                && filters.labels("label", labels)
                && filters.no_labels("label!", labels);
            if !included || !self.shared.users(&volume.name, "").is_empty() {
                continue;
            }
            let size = self.shared.volume_size(&volume.name).await;
            match self.shared.remove_volume(&volume.name, "").await {
                Ok(()) => {
                    response.volumes_deleted.get_or_insert_default().push(volume.name.clone());
                    response.space_reclaimed += size;
                }
                // It found a user, or was removed, in the meantime.
                Err(Error { kind: ErrorKind::Conflict | ErrorKind::NotFound, .. }) => {}
                Err(error) => tracing::warn!(volume = volume.name, %error, "a volume could not be pruned"),
            }
        }
        let reclaimed = [("reclaimed".to_owned(), response.space_reclaimed.to_string())];
        self.shared.events.publish("volume", "prune", "", reclaimed.into());
        Ok(response)
    }

    /// All volumes with what they take, for `docker system df`.
    pub async fn volume_usage(&self) -> Vec<Described> {
        let mut volumes = Vec::new();
        for volume in self.shared.volumes.all() {
            let size = i64::try_from(self.shared.volume_size(&volume.name).await).unwrap_or(i64::MAX);
            let ref_count = i64::try_from(self.shared.users(&volume.name, "").len()).unwrap_or(i64::MAX);
            let usage_data = Some(Usage { size, ref_count });
            volumes.push(Described { usage_data, ..self.shared.describe(&volume) });
        }
        volumes
    }
}

impl Shared {
    async fn volume_size(self: &Arc<Self>, name: &str) -> u64 {
        let (shared, name) = (Arc::clone(self), name.to_owned());
        tokio::task::spawn_blocking(move || shared.volumes.size(&name)).await.unwrap_or_default()
    }
}

/// Checks a driver's name.
pub(crate) fn check_driver(driver: &str) -> Result<()> {
    match driver {
        "" | DRIVER => Ok(()),
        other => Err(Error::not_found(format!(
            "error looking up volume plugin {other}: plugin \"{other}\" not found"
        ))),
    }
}

/// Checks the options of `local`: none, those of a directory of the host, or those of a [`disk`]. File systems that the host would
/// have to mount are refused, and so is a size that nothing would hold to.
fn check_options(options: Option<BTreeMap<String, String>>) -> Result<Option<BTreeMap<String, String>>> {
    let Some(options) = options.filter(|options| !options.is_empty()) else { return Ok(None) };
    if let Some(unknown) =
        options.keys().find(|key| !matches!(key.as_str(), "type" | "o" | "device" | "size"))
    {
        return Err(Error::invalid(format!("invalid option: {unknown:?}")));
    }
    if options.get("type").is_some_and(|kind| kind == disk::TYPE) {
        return disk::check(&options).map(|()| Some(options));
    }
    if options.contains_key("size") {
        return Err(Error::invalid("quota size requested but no quota support"));
    }
    let option = |key: &str| options.get(key).map_or("", String::as_str);
    let is_bind = option("o").split(',').any(|word| matches!(word, "bind" | "rbind"));
    let plain = option("o").split(',').all(|word| matches!(word, "bind" | "rbind" | "rw" | ""));
    if !matches!(option("type"), "" | "none" | "bind") || !is_bind || !plain {
        return Err(Error::invalid(format!(
            "a volume of type {:?} with options {:?} is not supported: directories of the host are \
             (type=none, o=bind, device=/path), and disks (type=disk, size=10g)",
            option("type"),
            option("o")
        )));
    }
    if !option("device").starts_with('/') {
        return Err(Error::invalid("missing device in volume options"));
    }
    Ok(Some(options))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_a_directory_of_the_host_or_refused() {
        let check = |pairs: &[(&str, &str)]| {
            let options = pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
            check_options(Some(options)).map_err(|error| error.message)
        };
        assert_eq!(check(&[]), Ok(None));
        assert!(check(&[("type", "none"), ("o", "bind"), ("device", "/srv")]).unwrap().is_some());
        assert!(check(&[("o", "rw,rbind"), ("device", "/srv")]).is_ok());
        assert_eq!(check(&[("size", "1g")]), Err("quota size requested but no quota support".into()));
        assert_eq!(check(&[("foo", "1")]), Err("invalid option: \"foo\"".into()));
        assert_eq!(check(&[("o", "bind")]), Err("missing device in volume options".into()));
        for refused in [
            &[("type", "nfs"), ("o", "addr=1.2.3.4"), ("device", ":/x")][..],
            &[("type", "tmpfs"), ("device", "tmpfs")],
            &[("o", "bind,uid=1"), ("device", "/srv")],
        ] {
            assert!(check(refused).unwrap_err().contains("not supported"), "{refused:?}");
        }
    }
}
