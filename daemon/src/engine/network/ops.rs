//! The engine's methods for networks.

use std::{collections::BTreeMap, sync::Arc};

use super::{
    Entry, Networks,
    record::{Driver, Network},
    render, store,
};
use crate::{
    api::types::{
        Filters,
        network::{CreateRequest, CreateResponse, Inspect, IpamConfig, PruneResponse},
    },
    engine::{Engine, Error, Name, Result, container::names},
};

/// The keys that a list can be filtered by.
pub const LIST_FILTERS: [&str; 7] = ["dangling", "driver", "id", "label", "name", "scope", "type"];

/// The keys that a prune can be filtered by.
pub const PRUNE_FILTERS: [&str; 3] = ["label", "label!", "until"];

impl Engine {
    /// Creates a network.
    ///
    /// # Errors
    /// The name or the subnet is in use; a request that is not valid or cannot be honoured; the host's.
    pub async fn network_create(&self, request: CreateRequest) -> Result<CreateResponse> {
        self.shared.networks.create(request).await
    }

    /// Everything about one.
    ///
    /// # Errors
    /// No such network.
    pub fn network_inspect(&self, name: Name<'_>) -> Result<Inspect> {
        let networks = &self.shared.networks;
        let network = networks.find(name)?;
        let containers = networks.with(|inner| {
            let members = inner.get(&network.id).map(|entry| &entry.members).into_iter().flatten();
            members
                .map(|(id, member)| (id.clone(), render::resource(&member.name, &member.endpoint)))
                .collect()
        });
        Ok(render::inspect(&network, containers))
    }

    /// Those that the filters select.
    ///
    /// # Errors
    /// A filter that is not valid.
    pub fn network_list(&self, filters: &Filters) -> Result<Vec<Inspect>> {
        let dangling =
            filters.contains("dangling").then(|| filters.boolean("dangling", false)).transpose()?;
        if let Some(wrong) = filters.get("type").find(|kind| !matches!(*kind, "builtin" | "custom")) {
            return Err(Error::invalid(format!("invalid filter: 'type'='{wrong}'")));
        }
        let in_use = self.networks_in_use();
        let mut found: Vec<Arc<Network>> = self.shared.networks.all();
        found.retain(|network| {
            dangling
                .is_none_or(|dangling| !network.is_predefined() && dangling != in_use.contains(&network.id))
                && filters.exact("driver", network.driver.name())
                && filters.prefix("id", &network.id)
                && filters.labels("label", &network.labels)
                && filters.any("name", |name| network.name.contains(name))
                && filters.exact("scope", "local")
                && filters.exact("type", if network.is_predefined() { "builtin" } else { "custom" })
        });
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found.iter().map(|network| render::inspect(network, BTreeMap::new())).collect())
    }

    /// Removes one.
    ///
    /// # Errors
    /// No such network; one that is always there; one that containers are in.
    pub async fn network_remove(&self, name: Name<'_>) -> Result<()> {
        let network = self.shared.networks.find(name)?;
        if network.is_predefined() {
            return Err(Error::forbidden(format!(
                "{} is a pre-defined network and cannot be removed",
                network.name
            )));
        }
        self.shared.networks.remove(&network).await
    }

    /// Removes those that no container is attached to.
    ///
    /// # Errors
    /// A filter that is not valid.
    pub async fn network_prune(&self, filters: &Filters) -> Result<PruneResponse> {
        let until = crate::engine::image::until(filters)?;
        let in_use = self.networks_in_use();
        let mut deleted = Vec::new();
        for network in self.shared.networks.all() {
            let chosen = !network.is_predefined()
                && !in_use.contains(&network.id)
                && until.is_none_or(|until| network.created <= until)
                && filters.labels("label", &network.labels)
                && filters.no_labels("label!", &network.labels);
            // One that a container has joined since is left.
            if chosen && self.shared.networks.remove(&network).await.is_ok() {
                deleted.push(network.name.clone());
            }
        }
        let reclaimed = [("reclaimed".to_owned(), "0".to_owned())].into();
        self.shared.networks.events.publish("network", "prune", "", reclaimed);
        Ok(PruneResponse { networks_deleted: (!deleted.is_empty()).then_some(deleted) })
    }

    /// The ids of networks that containers are attached to, running or not.
    fn networks_in_use(&self) -> Vec<String> {
        let all = self.shared.registry.all();
        let networks = all.iter().flat_map(|container| {
            let record = container.view().record;
            record.networks.values().map(|attachment| attachment.network.clone()).collect::<Vec<_>>()
        });
        networks.collect()
    }
}

impl Networks {
    async fn create(&self, request: CreateRequest) -> Result<CreateResponse> {
        let _changing = self.changing.lock().await;
        if self.all().iter().any(|network| network.name == request.name)
            && !super::record::is_predefined(&request.name)
        {
            return Err(Error::conflict(format!("network with name {} already exists", request.name)));
        }
        let network = self.record(request, names::new_id()).await?;
        // On disk first: a daemon that dies now finds the record, and makes the bridge at its next start.
        store::write(&self.config.layout, &network)?;
        let id = network.id.clone();
        let entry = Entry::new(network);
        let network = Arc::clone(&entry.network);
        self.with(|inner| inner.insert(id.clone(), entry));
        if let Some(reason) = self.bring_up(&network).await {
            self.with(|inner| inner.remove(&id));
            store::delete(&self.config.layout, &id)?;
            return Err(Error::internal(format!("failed to create network {}: {reason}", network.name)));
        }
        self.publish(&network, "create", None);
        let idle =
            |config: &IpamConfig| format!("{} is not used: its address family is not enabled", config.subnet);
        Ok(CreateResponse { id, warning: network.idle.iter().map(idle).collect::<Vec<_>>().join(", ") })
    }

    async fn remove(&self, network: &Arc<Network>) -> Result<()> {
        let _changing = self.changing.lock().await;
        // Taken out first, so that nobody can join.
        let entry = self.with(|inner| {
            let entry = inner
                .get(&network.id)
                .ok_or_else(|| Error::not_found(format!("network {} not found", network.name)))?;
            if !entry.members.is_empty() {
                let members: Vec<String> = entry
                    .members
                    .values()
                    .map(|member| {
                        let endpoint = &member.endpoint.id;
                        format!("name:{:?} id:{:?}", member.name, endpoint.get(..12).unwrap_or(endpoint))
                    })
                    .collect();
                return Err(Error::forbidden(format!(
                    "error while removing network: network {} has active endpoints ({})",
                    network.name,
                    members.join(", ")
                )));
            }
            Ok(inner.remove(&network.id))
        })?;
        if let Err(error) = store::delete(&self.config.layout, &network.id) {
            if let Some(entry) = entry {
                self.with(|inner| inner.insert(network.id.clone(), entry));
            }
            return Err(error.into());
        }
        if network.driver == Driver::Bridge
            && let Err(error) = self.host.take_down(&network.settings.bridge).await
        {
            tracing::error!(network = network.name, %error, "the host keeps something of a removed network");
        }
        self.publish(network, "destroy", None);
        Ok(())
    }
}
