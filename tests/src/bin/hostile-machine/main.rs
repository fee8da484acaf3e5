//! Runs in the host: starts a VMM with the hostile guest as the plan says, and tells what came of it.
//!
//! `hostile-machine PLAN`: both the plan and what is printed are JSON, see `bulkhead_tests::hostile`.

mod machine;
mod world;

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bulkhead_tests::hostile::{Ask, Outcome, Plan};
use bulkhead_vmm_api::{Request, Response};

use machine::Machine;
use world::World;

/// Far above what any scenario takes on the slowest host.
const WITHIN: Duration = Duration::from_secs(150);
const POLL: Duration = Duration::from_millis(20);

fn main() -> Result<()> {
    let plan: Plan = serde_json::from_str(&std::env::args().nth(1).context("usage: hostile-machine PLAN")?)?;
    println!("{}", serde_json::to_string(&run(&plan)?)?);
    Ok(())
}

fn run(plan: &Plan) -> Result<Outcome> {
    let neighbour = if plan.neighbour { Some(Neighbour::start(plan)?) } else { None };
    let world = World::new()?;
    let mut machine = Machine::start(plan, &plan.scenario, plan.vcpus, &world)?;
    let before = neighbour.as_ref().map_or(Ok(0), Neighbour::beats)?;
    let mut outcome = Outcome::default();
    let begun = Instant::now();
    let mut asked = plan.when_ready.is_empty();
    let ended = loop {
        if let Some(ended) = machine.ended()? {
            break ended;
        }
        if !asked && machine.said()?.iter().any(|line| line == "ready") {
            asked = true;
            for ask in &plan.when_ready {
                if let Err(error) = make(&machine, *ask) {
                    outcome.refused.push(format!("{ask:?}: {error:#}"));
                }
            }
        }
        if begun.elapsed() > WITHIN && !outcome.timed_out {
            outcome.timed_out = true;
            machine.kill()?;
        }
        thread::sleep(POLL);
    };
    outcome.code = ended.code;
    outcome.most_kib = ended.most_kib;
    outcome.report = machine.report();
    outcome.words = machine.words()?;
    outcome.said = machine.said()?;
    outcome.console_bytes = machine.console_bytes()?;
    outcome.damage = world.damage()?;
    if let Some(neighbour) = neighbour {
        let during = neighbour.beats()?;
        outcome.neighbour_beats = (during - before, neighbour.one_more(during)? - during);
        neighbour.end(&mut outcome)?;
    }
    Ok(outcome)
}

fn make(machine: &Machine, ask: Ask) -> Result<()> {
    match ask {
        Ask::Status => match machine.ask(&Request::Status, None)? {
            Response::Status(_) => Ok(()),
            other => anyhow::bail!("{other:?}"),
        },
        Ask::Pause => {
            machine.done(&Request::Pause, None)?;
            machine.done(&Request::Resume, None)
        }
        Ask::Kill => machine.done(&Request::Kill, None),
        Ask::Terminate => machine.terminate(),
    }
}

/// An honest machine that uses its devices and says so, again and again.
struct Neighbour {
    machine: Machine,
    world: World,
}

impl Neighbour {
    fn start(plan: &Plan) -> Result<Self> {
        let world = World::new()?;
        let neighbour = Self { machine: Machine::start(plan, "beat", 1, &world)?, world };
        neighbour.one_more(0)?;
        Ok(neighbour)
    }

    fn beats(&self) -> Result<usize> {
        Ok(self.machine.said()?.iter().filter(|line| *line == "beat").count())
    }

    /// Waits until there are more than so many; gives how many there are.
    fn one_more(&self, than: usize) -> Result<usize> {
        let begun = Instant::now();
        loop {
            let beats = self.beats()?;
            if beats > than || begun.elapsed() > WITHIN {
                return Ok(beats);
            }
            thread::sleep(POLL);
        }
    }

    fn end(mut self, outcome: &mut Outcome) -> Result<()> {
        make(&self.machine, Ask::Status)?;
        make(&self.machine, Ask::Kill)?;
        while self.machine.ended()?.is_none() {
            thread::sleep(POLL);
        }
        outcome.damage.extend(self.world.damage()?);
        Ok(())
    }
}
