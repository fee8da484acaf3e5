//! A daemon that knows many containers: how long creates, lists and inspects take, and how fast news reach many who
//! listen.

use std::sync::Barrier;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};

use super::containers::Daemon;
use crate::bench::figures::Samples;

/// Who listens to events.
const LISTENERS: usize = 100;

/// Creates so many containers one after the other in each daemon, and asks with all of them there: `NAME create`,
/// `NAME ps`, `NAME inspect`, `NAME events`.
pub(super) fn known(daemons: &[Daemon], rounds: u32, count: usize) -> Result<Samples> {
    let mut samples = Samples::default();
    let mut all: Vec<Vec<String>> = daemons.iter().map(|_| Vec::new()).collect();
    // In turns, so that both grow alike.
    for _ in 0..count {
        for (daemon, ids) in daemons.iter().zip(&mut all) {
            let start = Instant::now();
            ids.push(daemon.create_idle()?);
            samples.add_time(&format!("{} create", daemon.name), start.elapsed());
        }
    }
    let asked = daemons.iter().zip(&all).try_for_each(|(daemon, ids)| -> Result<()> {
        daemon.list_all(count).with_context(|| daemon.name.clone())?;
        for round in 0..rounds as usize {
            let start = Instant::now();
            daemon.list_all(count)?;
            samples.add_time(&format!("{} ps", daemon.name), start.elapsed());
            let id = ids.get(round * 37 % count).context("no container")?;
            let start = Instant::now();
            daemon.inspect(id)?;
            samples.add_time(&format!("{} inspect", daemon.name), start.elapsed());
            samples.add_time(&format!("{} events", daemon.name), fan_out(daemon)?);
        }
        Ok(())
    });
    daemons.iter().zip(&all).try_for_each(|(daemon, ids)| daemon.remove(ids))?;
    asked.map(|()| samples)
}

/// From an event's cause to the last listener that has it.
fn fan_out(daemon: &Daemon) -> Result<std::time::Duration> {
    let ready = Barrier::new(LISTENERS + 1);
    thread::scope(|scope| {
        let ready = &ready;
        let listeners: Vec<_> = (0..LISTENERS)
            .map(|_| {
                scope.spawn(move || -> Result<Instant> {
                    let opened = daemon.listen();
                    ready.wait();
                    let mut events = opened?;
                    match events.read_chunk()? {
                        Some(_) => Ok(Instant::now()),
                        None => bail!("a listener's connection ended"),
                    }
                })
            })
            .collect();
        ready.wait();
        let start = Instant::now();
        if let Err(error) = daemon.cause_event() {
            // Nobody will hear of it, and only the process's end ends those who listen.
            eprintln!("{}: {error:#}", daemon.name);
            std::process::exit(1);
        }
        let heard =
            listeners.into_iter().map(|thread| thread.join().map_err(|_| anyhow!("a thread panicked"))?);
        let heard: Vec<Instant> = heard.collect::<Result<_>>()?;
        let last = heard.into_iter().max().context("nobody listened")?;
        Ok(last.saturating_duration_since(start))
    })
}
