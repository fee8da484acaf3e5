//! Containers, by the API of the daemons that are compared: one after the other, many at once, idle ones, and as
//! many as there is room for.

use std::io::Read;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use bulkhead_tests::http::{Client, Stream};
use serde_json::{Value, json};

use super::memory;
use crate::bench::figures::Samples;

/// How many containers are started or removed at once where it is not their number that is measured.
const AT_ONCE: usize = 4;

/// A daemon: its name in the samples, and its API's socket.
#[derive(Debug, Clone)]
pub(super) struct Daemon {
    pub(super) name: String,
    api: Client,
}

impl std::str::FromStr for Daemon {
    type Err = anyhow::Error;

    /// `NAME=SOCKET`.
    fn from_str(text: &str) -> Result<Daemon> {
        let (name, socket) = text.split_once('=').context("NAME=SOCKET")?;
        Ok(Daemon { name: name.to_owned(), api: Client::new(socket) })
    }
}

impl Daemon {
    /// What the CLI sends for `docker run --rm --network none busybox true`, and nothing else.
    fn run(&self) -> Result<()> {
        let create = json!({
            "Image": "busybox",
            "Cmd": ["true"],
            "AttachStdout": true,
            "AttachStderr": true,
            "HostConfig": {"AutoRemove": true, "NetworkMode": "none"},
        });
        let created = self.api.json("POST", "/v1.41/containers/create", &create)?.success()?.json()?;
        let id = created["Id"].as_str().context("no Id")?;
        let upgrade = [("Connection", "Upgrade"), ("Upgrade", "tcp")];
        let attach = format!("/v1.41/containers/{id}/attach?stream=1&stdout=1&stderr=1");
        let (head, mut output) = self.api.open("POST", &attach, &upgrade, b"")?;
        if head.status != 101 {
            bail!("attach: status {}", head.status);
        }
        let wait = format!("/v1.41/containers/{id}/wait?condition=removed");
        let (head, mut wait) = self.api.open("POST", &wait, &[], b"")?;
        self.start(id)?;
        output.read_to_end(&mut Vec::new())?;
        let ended: Value = serde_json::from_slice(&wait.read_body(&head)?)?;
        if ended["StatusCode"] != 0 {
            bail!("the container ended with {ended}");
        }
        Ok(())
    }

    pub(super) fn create_idle(&self) -> Result<String> {
        let create = json!({
            "Image": "busybox",
            "Cmd": ["sleep", "100000"],
            "HostConfig": {"NetworkMode": "none"},
        });
        let created = self.api.json("POST", "/v1.41/containers/create", &create)?.success()?.json()?;
        Ok(created["Id"].as_str().context("no Id")?.to_owned())
    }

    /// Lists all containers, of which there are so many at least.
    pub(super) fn list_all(&self, least: usize) -> Result<()> {
        let list = self.api.request("GET", "/v1.41/containers/json?all=1", &[], b"")?.success()?.json()?;
        let found = list.as_array().map_or(0, Vec::len);
        if found < least { bail!("{found} containers are listed of {least}") } else { Ok(()) }
    }

    pub(super) fn inspect(&self, id: &str) -> Result<()> {
        self.api.request("GET", &format!("/v1.41/containers/{id}/json"), &[], b"")?.success().map(drop)
    }

    /// Listens to tags' events.
    pub(super) fn listen(&self) -> Result<Stream> {
        let path = "/v1.41/events?filters=%7B%22event%22%3A%5B%22tag%22%5D%7D";
        let (head, stream) = self.api.open("GET", path, &[], b"")?;
        if head.status == 200 { Ok(stream) } else { bail!("events: status {}", head.status) }
    }

    /// Tags the image anew, which is an event.
    pub(super) fn cause_event(&self) -> Result<()> {
        self.api
            .request("POST", "/v1.41/images/busybox/tag?repo=bench&tag=event", &[], b"")?
            .success()
            .map(drop)
    }

    fn start(&self, id: &str) -> Result<()> {
        self.api.request("POST", &format!("/v1.41/containers/{id}/start"), &[], b"")?.success()?;
        Ok(())
    }

    /// Private bytes of what the daemon keeps for a running container: our VMM, or the workload and its shim.
    fn memory(&self, id: &str) -> Result<memory::Private> {
        let path = format!("/v1.41/containers/{id}/json");
        let state = self.api.request("GET", &path, &[], b"")?.success()?.json()?;
        let pid = state["State"]["Pid"].as_u64().and_then(|pid| u32::try_from(pid).ok()).context("no pid")?;
        let mut sum = memory::private(pid)?;
        if let Some(shim) = memory::parent(pid).filter(|shim| memory::command(*shim).contains("shim")) {
            sum.own += memory::private(shim)?.own;
        }
        Ok(sum)
    }

    /// What our daemon recorded of its recent creates and runs, oldest first.
    fn timelines(&self) -> Result<Vec<Value>> {
        let answer = self.api.request("GET", "/bulkhead/phases", &[], b"")?.success()?.json()?;
        Ok(answer.as_array().cloned().unwrap_or_default())
    }

    pub(super) fn remove(&self, ids: &[String]) -> Result<()> {
        at_once(AT_ONCE, ids, |id| {
            let path = format!("/v1.41/containers/{id}?force=1");
            self.api.request("DELETE", &path, &[], b"")?.success()?;
            Ok(())
        })
    }
}

/// Does something with each, so many at a time; the first error.
fn at_once<T: Sync>(threads: usize, items: &[T], work: impl Fn(&T) -> Result<()> + Sync) -> Result<()> {
    let share = items.len().div_ceil(threads.max(1)).max(1);
    thread::scope(|scope| {
        let work = &work;
        let running: Vec<_> =
            items.chunks(share).map(|items| scope.spawn(move || items.iter().try_for_each(work))).collect();
        running.into_iter().try_for_each(|thread| thread.join().map_err(|_| anyhow!("a thread panicked"))?)
    })
}

/// How long a daemon may take to make its template.
const WARM_WITHIN: Duration = Duration::from_secs(180);

/// Runs containers until one was a clone: then the daemon has its template.
pub(super) fn warm(daemon: &Daemon) -> Result<()> {
    let deadline = Instant::now() + WARM_WITHIN;
    loop {
        daemon.run()?;
        let timelines = daemon.timelines()?;
        let last = timelines.iter().rev().find(|timeline| timeline["Kind"] == "run");
        let steps = last.and_then(|timeline| timeline["Steps"].as_array());
        if steps.into_iter().flatten().any(|step| step["Stage"] == "restored") {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("{}: no container was a clone within {} s", daemon.name, WARM_WITHIN.as_secs());
        }
        thread::sleep(Duration::from_millis(500));
    }
}

/// One after the other: `NAME`.
pub(super) fn run(daemons: &[Daemon], rounds: u32) -> Result<Samples> {
    let mut samples = Samples::default();
    for round in 0..=rounds {
        for daemon in daemons {
            let start = Instant::now();
            daemon.run().with_context(|| daemon.name.clone())?;
            // The first round warms caches.
            if round > 0 {
                samples.add_time(&daemon.name, start.elapsed());
            }
        }
    }
    Ok(samples)
}

/// So many at once, until the last has started: `NAME COUNT`. And, while they are idle, what memory there is for
/// each: `NAME COUNT memory`, `NAME COUNT own` (without the guest's), and of the host altogether `NAME COUNT host`.
pub(super) fn burst(daemons: &[Daemon], rounds: u32, counts: &[usize]) -> Result<Samples> {
    let mut samples = Samples::default();
    for &count in counts {
        // Many containers are samples enough.
        let rounds = rounds.min(if count > 5 { 2 } else { 5 });
        for _ in 0..rounds {
            for daemon in daemons {
                one_burst(daemon, count, &mut samples)
                    .with_context(|| format!("{}: {count} at once", daemon.name))?;
            }
        }
    }
    Ok(samples)
}

fn one_burst(daemon: &Daemon, count: usize, samples: &mut Samples) -> Result<()> {
    let what = format!("{} {count}", daemon.name);
    let (_, before) = memory::of_host()?;
    let ids = (0..count).map(|_| daemon.create_idle()).collect::<Result<Vec<_>>>()?;
    let start = Instant::now();
    at_once(count, &ids, |id| daemon.start(id))?;
    samples.add_time(&what, start.elapsed());
    // What a start leaves to be done in the background is done.
    thread::sleep(Duration::from_secs(2));
    for id in &ids {
        let memory::Private { guest, own } = daemon.memory(id)?;
        samples.add(&format!("{what} memory"), guest + own);
        samples.add(&format!("{what} own"), own);
    }
    let (_, after) = memory::of_host()?;
    samples.add(&format!("{what} host"), before.saturating_sub(after) / count as u64);
    daemon.remove(&ids)
}

/// Starts containers until the host has but a tenth of its memory left, or until `within` is over: `NAME held`,
/// and 1 as `NAME full` when it was the memory that ended it.
pub(super) fn fill(daemon: &Daemon, within: Duration) -> Result<Samples> {
    let deadline = Instant::now() + within;
    let mut ids = Vec::new();
    let mut samples = Samples::default();
    let full = loop {
        let (total, available) = memory::of_host()?;
        if available < total / 10 {
            break true;
        }
        if Instant::now() > deadline {
            break false;
        }
        let batch = (0..AT_ONCE).map(|_| daemon.create_idle()).collect::<Result<Vec<_>>>()?;
        ids.extend_from_slice(&batch);
        at_once(AT_ONCE, &batch, |id| daemon.start(id))
            .with_context(|| format!("with {} running", ids.len()))?;
    };
    samples.add(&format!("{} held", daemon.name), ids.len() as u64);
    samples.add(&format!("{} full", daemon.name), u64::from(full));
    daemon.remove(&ids)?;
    Ok(samples)
}

/// Where the time of the daemon's recent creates and runs went, by its own record: `create STAGE`, `run STAGE`, in
/// nanoseconds, and the stages' order.
pub(super) fn phases(daemon: &Daemon) -> Result<(Samples, Vec<String>)> {
    let (mut samples, mut order) = (Samples::default(), Vec::new());
    for timeline in daemon.timelines()? {
        let kind = timeline["Kind"].as_str().unwrap_or_default();
        for step in timeline["Steps"].as_array().into_iter().flatten() {
            let what = format!("{kind} {}", step["Stage"].as_str().unwrap_or_default());
            samples.add(&what, step["TookUs"].as_u64().unwrap_or_default().saturating_mul(1000));
            if !order.contains(&what) {
                order.push(what);
            }
        }
    }
    Ok((samples, order))
}
