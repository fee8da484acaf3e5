//! What the engine tells of itself for `GET /metrics`.

use std::sync::atomic::Ordering;

use super::{Engine, container::state::State};
use crate::{
    metrics::Text,
    phases::{Stage, TimelineKind},
};

impl Engine {
    /// Adds the engine's metrics, and those of the process.
    pub fn metrics(&self, text: &mut Text) {
        let shared = &self.shared;
        let (mut running, mut paused, mut stopped, mut sandboxes) = (0, 0, 0, 0);
        let mut health = [("starting", 0), ("healthy", 0), ("unhealthy", 0)];
        for container in shared.registry.all() {
            let view = container.view();
            sandboxes += i32::from(view.workload.is_some());
            match &view.record.life.state {
                State::Running(now) if now.paused => paused += 1,
                State::Running(_) | State::Restarting(_) => running += 1,
                _ => stopped += 1,
            }
            let status = view.record.health.as_ref().map(|health| health.status.as_str());
            health.iter_mut().filter(|(name, _)| status == Some(name)).for_each(|(_, count)| *count += 1);
        }
        text.gauge(
            "bulkhead_info",
            "The daemon's version.",
            &[(&[("version", env!("CARGO_PKG_VERSION"))], 1.0)],
        );
        text.gauge(
            "engine_daemon_container_states_containers",
            "The count of containers in various states.",
            &[
                (&[("state", "paused")], f64::from(paused)),
                (&[("state", "running")], f64::from(running)),
                (&[("state", "stopped")], f64::from(stopped)),
            ],
        );
        let health = health.map(|(name, count)| ([("status", name)], f64::from(count)));
        let health: Vec<(&[(&str, &str)], f64)> =
            health.iter().map(|(labels, n)| (&labels[..], *n)).collect();
        text.gauge(
            "bulkhead_container_health_containers",
            "Containers with a health check, by health.",
            &health,
        );
        text.gauge("bulkhead_sandboxes", "MicroVMs that run containers.", &[(&[], f64::from(sandboxes))]);
        text.gauge("bulkhead_images", "Images.", &[(&[], shared.images.count() as f64)]);
        let checks = &shared.health_checks;
        let load = |count: &std::sync::atomic::AtomicU64| count.load(Ordering::Relaxed) as f64;
        text.counter(
            "engine_daemon_health_checks_total",
            "The total number of health checks.",
            &[(&[], load(&checks.run))],
        );
        text.counter(
            "engine_daemon_health_checks_failed_total",
            "The total number of failed health checks.",
            &[(&[], load(&checks.failed))],
        );
        text.counter(
            "engine_daemon_events_total",
            "The number of events logged.",
            &[(&[], shared.events.published() as f64)],
        );
        text.gauge(
            "engine_daemon_events_subscribers_total",
            "The number of current subscribers to events.",
            &[(&[], shared.events.subscribers() as f64)],
        );
        phases(shared, text);
        process(text);
    }
}

/// Where the time of creates and starts goes.
fn phases(shared: &super::Shared, text: &mut Text) {
    let histograms = shared.timelines.histograms();
    let stages = Stage::ALL.iter().filter(|stage| stage.is_of_a_start());
    let labels: Vec<_> = stages.map(|stage| ([("stage", stage.name())], histograms.of(*stage))).collect();
    let samples: Vec<(&[(&str, &str)], _)> = labels.iter().map(|(labels, it)| (&labels[..], *it)).collect();
    text.histograms(
        "bulkhead_phase_seconds",
        "How long after the stage before it each stage of a create or start was reached.",
        &samples,
    );
    let actions = [("create", TimelineKind::Create), ("start", TimelineKind::Run)];
    let labels = actions.map(|(name, kind)| ([("action", name)], histograms.whole(kind)));
    let samples: Vec<(&[(&str, &str)], _)> = labels.iter().map(|(labels, it)| (&labels[..], *it)).collect();
    text.histograms(
        "engine_daemon_container_actions_seconds",
        "The number of seconds it takes to process each container action.",
        &samples,
    );
}

/// What Prometheus' clients tell of every process.
fn process(text: &mut Text) {
    let ticks = |fields: &[&str], index: usize| fields.get(index).and_then(|field| field.parse::<f64>().ok());
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace().collect();
    // utime, stime and rss of proc(5); hundredths of a second, and pages.
    if let (Some(user), Some(system), Some(pages)) =
        (ticks(&fields, 11), ticks(&fields, 12), ticks(&fields, 21))
    {
        let help = "Total user and system CPU time spent in seconds.";
        text.counter("process_cpu_seconds_total", help, &[(&[], (user + system) / 100.0)]);
        text.gauge(
            "process_resident_memory_bytes",
            "Resident memory size in bytes.",
            &[(&[], pages * 4096.0)],
        );
    }
    if let Ok(descriptors) = std::fs::read_dir("/proc/self/fd") {
        text.gauge(
            "process_open_fds",
            "Number of open file descriptors.",
            &[(&[], descriptors.count() as f64)],
        );
    }
}
