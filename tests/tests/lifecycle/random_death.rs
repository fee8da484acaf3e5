//! `kill -9` at random points under load, again and again: what was acknowledged is there, what was not is whole or
//! not there at all, and nothing leaks.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::Context;
use bulkhead_tests::http::Client;
use bulkhead_tests::{Daemon, Suite, size, with_daemon};
use serde_json::{Value, json};

use crate::Test;

/// How many clients there are.
const CLIENTS: u32 = 3;

/// What is known of a container by the answers that came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Known {
    /// Its create was answered.
    Created,
    /// Its start was answered.
    Started,
    /// Its removal was asked for: it may be there or not.
    Leaving,
}

#[test]
fn kill_9_at_random_loses_nothing_acknowledged_and_leaves_nothing_half_made() -> Test {
    let options = Suite::from_env()?.daemon_options();
    with_daemon(options, |daemon| {
        daemon.docker().ok(&["pull", "-q", "busybox"])?;
        let mut seed = u64::from(std::process::id());
        println!("seed {seed}");
        let known = Mutex::new(BTreeMap::new());
        let number = AtomicU32::new(0);
        for _ in 0..size(6, 200) {
            one_life(daemon, &known, &number, &mut seed)?;
            daemon.start_again()?;
            everything_known_is_there(&daemon.api(), &known)?;
        }
        let api = daemon.api();
        let left = api.request("GET", "/containers/json?all=1", &[], b"")?.success()?.json()?;
        for container in left.as_array().context("no list")? {
            let id = container["Id"].as_str().context("no Id")?;
            api.request("DELETE", &format!("/containers/{id}?force=1"), &[], b"")?.success()?;
        }
        assert_eq!(daemon.settled_leftovers()?, "");
        Ok(())
    })
}

/// Lets clients work until the daemon is killed in the middle of it.
fn one_life(
    daemon: &mut Daemon,
    known: &Mutex<BTreeMap<String, Known>>,
    number: &AtomicU32,
    seed: &mut u64,
) -> Test {
    let over = AtomicBool::new(false);
    let api = daemon.api();
    thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    // It fails when the daemon dies: that is what it is for.
                    let _ = one_container(&api, known, number.fetch_add(1, Ordering::Relaxed));
                }
            });
        }
        // Xorshift: any moment of some seconds.
        *seed ^= *seed << 13;
        *seed ^= *seed >> 7;
        *seed ^= *seed << 17;
        thread::sleep(Duration::from_millis(200 + *seed % 5000));
        let killed = daemon.kill();
        over.store(true, Ordering::Relaxed);
        killed
    })
}

fn one_container(api: &Client, known: &Mutex<BTreeMap<String, Known>>, number: u32) -> Test {
    let note = |id: &str, what| {
        if let Ok(mut known) = known.lock() {
            known.insert(id.to_owned(), what);
        }
    };
    let create = json!({
        "Image": "busybox",
        "Cmd": ["sh", "-c", "echo begun; sleep 1000"],
        "HostConfig": {"NetworkMode": "none"},
    });
    let created =
        api.json("POST", &format!("/containers/create?name=r{number}"), &create)?.success()?.json()?;
    let id = created["Id"].as_str().context("no Id")?.to_owned();
    note(&id, Known::Created);
    let post = |what: &str| api.request("POST", &format!("/containers/{id}/{what}"), &[], b"");
    post("start")?.success()?;
    note(&id, Known::Started);
    let exec = json!({"Cmd": ["true"], "AttachStdout": true});
    let exec = api.json("POST", &format!("/containers/{id}/exec"), &exec)?.success()?.json()?;
    let start = format!("/exec/{}/start", exec["Id"].as_str().context("no exec")?);
    api.json("POST", &start, &json!({"Detach": true}))?.success()?;
    api.request("GET", &format!("/containers/{id}/logs?stdout=1"), &[], b"")?.success()?;
    note(&id, Known::Leaving);
    let removed = api.request("DELETE", &format!("/containers/{id}?force=1"), &[], b"")?;
    if removed.head.status == 204
        && let Ok(mut known) = known.lock()
    {
        known.remove(&id);
    }
    Ok(())
}

fn everything_known_is_there(api: &Client, known: &Mutex<BTreeMap<String, Known>>) -> Test {
    let known = known.lock().map_err(|_| anyhow::anyhow!("a client panicked"))?.clone();
    let list = api.request("GET", "/containers/json?all=1", &[], b"")?.success()?.json()?;
    let listed: BTreeMap<&str, &Value> = list
        .as_array()
        .context("no list")?
        .iter()
        .filter_map(|container| Some((container["Id"].as_str()?, container)))
        .collect();
    for (id, what) in &known {
        let container = listed.get(id.as_str());
        match (what, container) {
            (Known::Leaving, _) => {}
            (_, None) => panic!("{id} was {what:?}, and is gone"),
            (Known::Started, Some(container)) => {
                assert_eq!(container["State"], "running", "{id} was started");
                let inspect =
                    api.request("GET", &format!("/containers/{id}/json"), &[], b"")?.success()?.json()?;
                assert!(inspect["State"]["Pid"].as_i64().is_some_and(|pid| pid > 0), "{inspect}");
            }
            (Known::Created, Some(container)) => {
                // Its start may have gone through unanswered, or have been cut short.
                let state = container["State"].as_str().unwrap_or_default();
                assert!(["created", "running", "exited"].contains(&state), "{id} is {state}");
            }
        }
    }
    // What nobody was told of is a container all the same, or is not there: each that is listed can be looked at.
    for id in listed.keys() {
        api.request("GET", &format!("/containers/{id}/json"), &[], b"")?.success()?;
    }
    Ok(())
}
