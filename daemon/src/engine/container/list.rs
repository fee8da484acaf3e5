//! `GET /containers/json`: which containers, and a summary of each.

use std::{collections::HashSet, sync::Arc};

use jiff::Timestamp;
use regex::Regex;

use super::{
    Container, View, inspect,
    record::Record,
    registry::Registry,
    state::{Rest, State},
};
use crate::{
    api::types::{
        FilterError, Filters,
        container::{Summary, SummaryHostConfig, SummaryNetworkSettings},
        network::PortSummary,
    },
    engine::{Result, Shared, image::ImageStore, network},
};

/// The keys that a list can be filtered by.
pub const LIST_FILTERS: [&str; 15] = [
    "ancestor",
    "before",
    "exited",
    "expose",
    "health",
    "id",
    "isolation",
    "is-task",
    "label",
    "name",
    "network",
    "publish",
    "since",
    "status",
    "volume",
];

/// What to list.
#[derive(Debug, Clone, Default)]
pub struct ListOptions {
    /// Also what does not run.
    pub all: bool,
    /// So many of the latest, running or not; None or 0: no limit.
    pub limit: Option<usize>,
    /// With sizes.
    pub size: bool,
    /// Keys out of [`LIST_FILTERS`].
    pub filters: Filters,
}

/// The views of the containers that `options` select, the latest first.
pub(super) fn select(shared: &Shared, options: &ListOptions) -> Result<Vec<View>> {
    let registry = &shared.registry;
    let criteria = Criteria::new(registry, &shared.images, &options.filters)?;
    let mut views: Vec<View> =
        registry.all().iter().map(|container: &Arc<Container>| container.view()).collect();
    views.sort_by(|a, b| key(&b.record).cmp(&key(&a.record)));
    let limit = options.limit.filter(|&limit| limit > 0);
    let all = options.all || limit.is_some() || options.filters.contains("status");
    views.retain(|view| {
        (all || matches!(view.record.life.state, State::Running(_) | State::Restarting(_)))
            && criteria.includes(&view.record)
    });
    views.truncate(limit.unwrap_or(usize::MAX));
    Ok(views)
}

/// The order of containers: by age, and by id where two are of the same moment.
fn key(record: &Record) -> (Timestamp, &str) {
    (record.created, &record.id)
}

/// Filters, resolved once.
struct Criteria<'a> {
    filters: &'a Filters,
    names: Vec<Regex>,
    exited: Option<HashSet<i32>>,
    before: Option<(Timestamp, String)>,
    since: Option<(Timestamp, String)>,
    ancestors: Option<HashSet<String>>,
}

impl<'a> Criteria<'a> {
    fn new(registry: &Registry, images: &ImageStore, filters: &'a Filters) -> Result<Self> {
        let invalid =
            |key: &str, value: &str| FilterError::InvalidValue { key: key.into(), value: value.into() };
        const STATUSES: [&str; 7] =
            ["created", "restarting", "running", "removing", "paused", "exited", "dead"];
        if let Some(value) = filters.get("status").find(|value| !STATUSES.contains(value)) {
            return Err(invalid("status", value).into());
        }
        const HEALTH: [&str; 4] = ["starting", "healthy", "unhealthy", "none"];
        if let Some(value) = filters.get("health").find(|value| !HEALTH.contains(value)) {
            return Err(invalid("health", value).into());
        }
        let names = filters
            .get("name")
            .map(|pattern| Regex::new(pattern).map_err(|_| invalid("name", pattern)))
            .collect::<Result<_, _>>()?;
        let exited = filters
            .get("exited")
            .map(|code| code.parse().map_err(|_| invalid("exited", code)))
            .collect::<Result<_, _>>()?;
        let reference = |key: &str| -> Result<Option<(Timestamp, String)>> {
            let Some(name) = filters.get(key).next() else { return Ok(None) };
            let record = registry.find(name)?.view().record;
            Ok(Some((record.created, record.id.clone())))
        };
        // An image that is not there has no containers.
        let ancestors =
            filters.get("ancestor").filter_map(|name| Some(images.inspect(name, None).ok()?.id)).collect();
        Ok(Self {
            filters,
            names,
            exited: filters.contains("exited").then_some(exited),
            before: reference("before")?,
            since: reference("since")?,
            ancestors: filters.contains("ancestor").then_some(ancestors),
        })
    }

    fn includes(&self, record: &Record) -> bool {
        let (filters, life) = (self.filters, &record.life);
        let (created, id) = key(record);
        let is_name =
            |regex: &Regex| regex.is_match(&record.name) || regex.is_match(&format!("/{}", record.name));
        let labels = record.config.labels.clone().unwrap_or_default();
        filters.prefix("id", &record.id)
            && (self.names.is_empty() || self.names.iter().any(is_name))
            && filters.exact("status", inspect::status(&life.state))
            && filters.labels("label", &labels)
            && self.exited.as_ref().is_none_or(|codes| exit_code(&life.state).is_some_and(|c| codes.contains(&c)))
            && self.before.as_ref().is_none_or(|(at, other)| (created, id) < (*at, other))
            && self.since.as_ref().is_none_or(|(at, other)| (created, id) > (*at, other))
            && self.ancestors.as_ref().is_none_or(|images| images.contains(&record.image.to_string()))
            && filters.any("network", |wanted| is_in_network(record, wanted))
            && filters.exact("health", record.health.as_ref().map_or("none", |health| health.status.as_str()))
            && filters.exact("isolation", "default")
            && filters.any("is-task", |value| matches!(value, "false" | "0"))
            && filters.any("expose", |port| exposes(record, port))
            && filters.any("publish", |port| publishes(record, port))
            // There are no volumes yet.
            && filters.any("volume", |_| false)
    }
}

fn exit_code(state: &State) -> Option<i32> {
    match state {
        State::Resting(Rest::Exited(ended))
        | State::Dead(Rest::Exited(ended))
        | State::Removing(Rest::Exited(ended))
        | State::Starting(Rest::Exited(ended)) => Some(ended.code),
        _ => None,
    }
}

/// By the network's name or its id's beginning.
fn is_in_network(record: &Record, wanted: &str) -> bool {
    record.networks.iter().any(|(name, attachment)| name == wanted || attachment.network.starts_with(wanted))
}

/// Whether a port, or a range of them, `80[-90][/tcp]`, has an exposed one in it.
fn exposes(record: &Record, wanted: &str) -> bool {
    in_range(ports(record), wanted)
}

/// Whether it has a published one in it.
fn publishes(record: &Record, wanted: &str) -> bool {
    let published = network::endpoints(record).flat_map(|endpoint| &endpoint.ports);
    in_range(published.map(|published| (published.port, published.protocol.name())), wanted)
}

fn in_range<'a>(mut ports: impl Iterator<Item = (u16, &'a str)>, wanted: &str) -> bool {
    let (range, protocol) = wanted.split_once('/').unwrap_or((wanted, "tcp"));
    let (first, last) = range.split_once('-').unwrap_or((range, range));
    let (Ok(first), Ok(last)) = (first.parse::<u16>(), last.parse::<u16>()) else { return false };
    ports.any(|(port, kind)| kind == protocol && (first..=last).contains(&port))
}

fn ports(record: &Record) -> impl Iterator<Item = (u16, &str)> {
    record.config.exposed_ports.iter().flatten().filter_map(|(port, _)| {
        let (number, kind) = port.split_once('/').unwrap_or((port, "tcp"));
        Some((number.parse().ok()?, kind))
    })
}

/// A container's line in the list.
pub(super) fn summary(view: &View, shared: &Shared, now: Timestamp) -> Summary {
    let record = &view.record;
    let (path, args) = inspect::command(record);
    let command = std::iter::once(path).chain(args).collect::<Vec<_>>().join(" ");
    let running = matches!(record.life.state, State::Running(_));
    Summary {
        id: record.id.clone(),
        names: vec![format!("/{}", record.name)],
        image: shared.images.name_for_list(&record.config.image, &record.image),
        image_id: record.image.to_string(),
        command,
        created: record.created.as_second(),
        ports: if running { port_summaries(record) } else { Vec::new() },
        labels: record.config.labels.clone().unwrap_or_default(),
        state: inspect::status(&record.life.state).into(),
        status: inspect::status_line(record, now),
        host_config: SummaryHostConfig {
            network_mode: record.host_config.network_mode.clone(),
            annotations: record.host_config.annotations.clone().unwrap_or_default(),
        },
        network_settings: SummaryNetworkSettings { networks: shared.networks.settings(record, running) },
        mounts: inspect::mounts(record),
        ..Summary::default()
    }
}

/// A line for each published port's address, and one for each port that is only exposed.
fn port_summaries(record: &Record) -> Vec<PortSummary> {
    let published: Vec<_> = network::endpoints(record).flat_map(|endpoint| &endpoint.ports).collect();
    let is_published = |port: u16, kind: &str| {
        published.iter().any(|published| (published.port, published.protocol.name()) == (port, kind))
    };
    let exposed = ports(record).filter(|(port, kind)| !is_published(*port, kind));
    let exposed = exposed.map(|(private_port, kind)| PortSummary {
        private_port,
        kind: kind.into(),
        ..PortSummary::default()
    });
    let bound = published.iter().map(|published| PortSummary {
        ip: published.host_address.to_string(),
        private_port: published.port,
        public_port: published.host_port,
        kind: published.protocol.name().into(),
    });
    bound.chain(exposed).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::container::record::sample;

    #[test]
    fn exposed_ports_are_found_by_number_range_and_protocol() {
        let mut record = sample("ab");
        let empty = crate::api::types::Empty {};
        record.config.exposed_ports =
            Some([("80/tcp".to_owned(), empty), ("53/udp".to_owned(), empty)].into());
        for (wanted, found) in [
            ("80", true),
            ("80/tcp", true),
            ("80/udp", false),
            ("50-60/udp", true),
            ("81-90", false),
            ("x", false),
        ] {
            assert_eq!(exposes(&record, wanted), found, "{wanted}");
        }
    }

    #[test]
    fn names_match_as_expressions_with_and_without_the_slash() {
        let record = sample("ab");
        for (pattern, found) in
            [("otter", true), ("^quiet_otter$", true), ("^/quiet_otter$", true), ("^otter", false)]
        {
            let mut filters = Filters::default();
            filters.insert("name", pattern);
            let criteria = Criteria {
                filters: &filters,
                names: vec![Regex::new(pattern).unwrap()],
                exited: None,
                before: None,
                since: None,
                ancestors: None,
            };
            assert_eq!(criteria.includes(&record), found, "{pattern}");
        }
    }
}
