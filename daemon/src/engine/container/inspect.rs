//! Renders a container as Docker's clients know it. Docker's status words and booleans are derived here.

use std::collections::BTreeMap;

use jiff::Timestamp;

use super::{
    View,
    record::Record,
    state::{Lifecycle, Rest, State},
};
use crate::{
    api::types::{
        container::{self, DriverData, Inspect, MountPoint},
        network::{EndpointSettings, NetworkSettings, PortMap},
    },
    engine::{mounts::Mount, network::port_map, spec},
};

/// What Docker writes for "never".
const NEVER: &str = "0001-01-01T00:00:00Z";

/// The storage driver's name.
pub(crate) const DRIVER: &str = "bulkhead";

/// Docker's word for a state.
pub(super) fn status(state: &State) -> &'static str {
    match state {
        State::Resting(Rest::Created(_)) | State::Starting(Rest::Created(_)) => "created",
        State::Resting(Rest::Exited(_)) | State::Starting(Rest::Exited(_)) => "exited",
        State::Running(running) if running.paused => "paused",
        State::Running(_) => "running",
        State::Restarting(_) => "restarting",
        State::Removing(_) => "removing",
        State::Dead(_) => "dead",
    }
}

fn state(life: &Lifecycle) -> container::State {
    let mut out = container::State {
        status: status(&life.state).into(),
        started_at: NEVER.into(),
        finished_at: NEVER.into(),
        ..container::State::default()
    };
    let ended = match &life.state {
        State::Running(running) => {
            (out.running, out.paused) = (true, running.paused);
            out.pid = running.pid.into();
            out.started_at = running.started_at.to_string();
            None
        }
        State::Restarting(ended) => {
            (out.running, out.restarting) = (true, true);
            Some(ended)
        }
        State::Resting(rest) | State::Starting(rest) | State::Removing(rest) | State::Dead(rest) => {
            out.dead = matches!(life.state, State::Dead(_));
            match rest {
                Rest::Created(failure) => {
                    if let Some(failure) = failure {
                        out.exit_code = failure.code.into();
                        out.error.clone_from(&failure.error);
                    }
                    None
                }
                Rest::Exited(ended) => Some(ended),
            }
        }
    };
    if let Some(ended) = ended {
        out.exit_code = ended.code.into();
        out.oom_killed = ended.oom_killed;
        out.error.clone_from(&ended.error);
        out.started_at = ended.started_at.to_string();
        out.finished_at = ended.finished_at.to_string();
    }
    out
}

/// Path and arguments of the workload.
pub(super) fn command(record: &Record) -> (String, Vec<String>) {
    spec::command(&record.config).unwrap_or_default()
}

/// Its mounts: volumes, binds, and of tmpfs those that were asked for as mounts.
pub(super) fn mounts(record: &Record) -> Vec<MountPoint> {
    // As in Docker, `--tmpfs` is not among them.
    let mounts = record.host_config.mounts.iter().flatten().filter(|mount| mount.kind == "tmpfs");
    let tmpfs = mounts.map(|mount| MountPoint {
        kind: "tmpfs".into(),
        destination: mount.target.clone(),
        rw: !mount.read_only,
        ..MountPoint::default()
    });
    record.mounts.iter().map(Mount::point).chain(tmpfs).collect()
}

/// `GET /containers/{id}/json`.
pub(super) fn inspect(
    view: &View,
    log_path: String,
    exec_ids: Vec<String>,
    networks: BTreeMap<String, EndpointSettings>,
) -> Inspect {
    let record = &view.record;
    let (path, args) = command(record);
    let running = matches!(record.life.state, State::Running(_));
    let sandbox_id = match &record.life.state {
        State::Running(running) => running.sandbox.clone(),
        _ => String::new(),
    };
    Inspect {
        id: record.id.clone(),
        created: record.created.to_string(),
        path,
        args,
        state: container::State { health: record.health.clone(), ..state(&record.life) },
        image: record.image.to_string(),
        // These files are the guest's: they have no path on the host.
        resolv_conf_path: String::new(),
        hostname_path: String::new(),
        hosts_path: String::new(),
        log_path,
        name: format!("/{}", record.name),
        restart_count: record.life.restart_count.into(),
        driver: DRIVER.into(),
        platform: "linux".into(),
        exec_ids: (!exec_ids.is_empty()).then_some(exec_ids),
        host_config: record.host_config.clone(),
        graph_driver: DriverData { data: None, name: DRIVER.into() },
        mounts: mounts(record),
        config: record.config.clone(),
        network_settings: network_settings(sandbox_id, port_map(record, running), networks),
        ..Inspect::default()
    }
}

/// The default bridge's endpoint stands at the top once more, for clients of before there were networks.
fn network_settings(
    sandbox_id: String,
    ports: PortMap,
    networks: BTreeMap<String, EndpointSettings>,
) -> NetworkSettings {
    let default = networks.get("bridge").cloned().unwrap_or_default();
    NetworkSettings {
        sandbox_id,
        ports,
        endpoint_id: default.endpoint_id,
        gateway: default.gateway,
        global_ipv6_address: default.global_ipv6_address,
        global_ipv6_prefix_len: default.global_ipv6_prefix_len,
        ip_address: default.ip_address,
        ip_prefix_len: default.ip_prefix_len,
        ipv6_gateway: default.ipv6_gateway,
        mac_address: default.mac_address,
        networks,
        ..NetworkSettings::default()
    }
}

/// The line of `docker ps` about a state: `Up 2 minutes`, `Exited (0) 3 hours ago`.
pub(super) fn status_line(record: &Record, now: Timestamp) -> String {
    let (state, health) = (&record.life.state, record.health.as_ref().map(|health| health.status.as_str()));
    let ago = |since: Timestamp| human_duration(now.duration_since(since).as_secs());
    let of_rest = |rest: &Rest| match rest {
        Rest::Created(_) => "Created".to_owned(),
        Rest::Exited(ended) => format!("Exited ({}) {} ago", ended.code, ago(ended.finished_at)),
    };
    match state {
        State::Resting(rest) | State::Starting(rest) => of_rest(rest),
        State::Running(running) => {
            let note = match health {
                _ if running.paused => " (Paused)".to_owned(),
                Some(super::health::STARTING) => " (health: starting)".to_owned(),
                Some(status) => format!(" ({status})"),
                None => String::new(),
            };
            // `ago` without the word.
            format!("Up {}{note}", ago(running.started_at))
        }
        State::Restarting(ended) => format!("Restarting ({}) {} ago", ended.code, ago(ended.finished_at)),
        State::Removing(_) => "Removal In Progress".into(),
        State::Dead(_) => "Dead".into(),
    }
}

/// A duration as Docker's clients print it.
fn human_duration(seconds: i64) -> String {
    let seconds = seconds.max(0);
    let minutes = seconds / 60;
    let hours = (seconds + 1800) / 3600;
    match (seconds, minutes, hours) {
        (0, ..) => "Less than a second".into(),
        (1, ..) => "1 second".into(),
        (..60, ..) => format!("{seconds} seconds"),
        (_, 1, _) => "About a minute".into(),
        (_, ..60, _) => format!("{minutes} minutes"),
        (.., 1) => "About an hour".into(),
        (.., ..48) => format!("{hours} hours"),
        (.., ..336) => format!("{} days", hours / 24),
        (.., ..1440) => format!("{} weeks", hours / 24 / 7),
        (.., ..17520) => format!("{} months", hours / 24 / 30),
        _ => format!("{} years", hours / 24 / 365),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::container::{
        record::sample,
        state::{Ended, Failure, Running},
    };

    fn view(state: State) -> View {
        let mut record = sample("ab");
        record.life.state = state;
        record.config.cmd = Some(vec!["sleep".into(), "9".into()]);
        record.config.exposed_ports = Some([("80/tcp".to_owned(), crate::api::types::Empty {})].into());
        record.host_config.network_mode = "none".into();
        View { record: record.into(), workload: None }
    }

    fn ended(code: i32) -> Ended {
        let at = |second| Timestamp::from_second(second).unwrap();
        Ended { code, oom_killed: false, error: String::new(), started_at: at(10), finished_at: at(20) }
    }

    #[test]
    fn booleans_follow_from_the_state() {
        let running = Running {
            guest: None,
            place: crate::sandbox::Place::default(),
            sandbox: "s".into(),
            pid: 42,
            log_start: 0,
            started_at: Timestamp::UNIX_EPOCH,
            then: None,
            paused: false,
        };
        let failure = Failure { code: 127, error: "no".into() };
        for (state, status, [running, restarting, dead], code, pid) in [
            (State::Resting(Rest::Created(None)), "created", [false; 3], 0, 0),
            (State::Resting(Rest::Created(Some(failure))), "created", [false; 3], 127, 0),
            (State::Starting(Rest::Created(None)), "created", [false; 3], 0, 0),
            (State::Running(running), "running", [true, false, false], 0, 42),
            (State::Restarting(ended(3)), "restarting", [true, true, false], 3, 0),
            (State::Resting(Rest::Exited(ended(3))), "exited", [false; 3], 3, 0),
            (State::Removing(Rest::Exited(ended(3))), "removing", [false; 3], 3, 0),
            (State::Dead(Rest::Exited(ended(3))), "dead", [false, false, true], 3, 0),
        ] {
            let inspect = inspect(&view(state), String::new(), vec![], BTreeMap::new()).state;
            assert_eq!(inspect.status, status);
            assert_eq!(
                [inspect.running, inspect.restarting, inspect.dead],
                [running, restarting, dead],
                "{status}"
            );
            assert_eq!((inspect.exit_code, inspect.pid), (code, pid), "{status}");
        }
    }

    #[test]
    fn times_that_never_were_are_year_one() {
        let never =
            inspect(&view(State::Resting(Rest::Created(None))), String::new(), vec![], BTreeMap::new());
        assert_eq!((never.state.started_at.as_str(), never.state.finished_at.as_str()), (NEVER, NEVER));
        let once =
            inspect(&view(State::Resting(Rest::Exited(ended(0)))), String::new(), vec![], BTreeMap::new());
        assert_eq!(once.state.finished_at, "1970-01-01T00:00:20Z");
        assert_eq!((once.path.as_str(), once.args.as_slice()), ("sleep", &["9".to_owned()][..]));
        assert_eq!(once.network_settings.ports, PortMap::new(), "it does not run");
        assert_eq!(once.exec_ids, None);
    }

    #[test]
    fn durations_are_dockers() {
        for (seconds, text) in [
            (-5, "Less than a second"),
            (0, "Less than a second"),
            (1, "1 second"),
            (59, "59 seconds"),
            (60, "About a minute"),
            (120, "2 minutes"),
            (3599, "59 minutes"),
            (3600, "About an hour"),
            (2 * 3600, "2 hours"),
            (47 * 3600, "47 hours"),
            (48 * 3600, "2 days"),
            (14 * 86400, "2 weeks"),
            (60 * 86400, "2 months"),
            (730 * 86400, "2 years"),
        ] {
            assert_eq!(human_duration(seconds), text);
        }
    }
}
