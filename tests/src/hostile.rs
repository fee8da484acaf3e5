//! Machines whose guest attacks them: what is to be run, and what came of it.
//!
//! ```text
//!  test, here ── Plan (JSON) ──▶ hostile-machine, in the host ── starts ──▶ bulkhead-vmm with the hostile guest
//!       ▲                              │ disk, share, tap, vsock clients, neighbour; watches
//!       └───────── Outcome (JSON) ─────┘
//! ```

use std::env;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use bulkhead_vmm_api::{ExitReason, Report};
use serde::{Deserialize, Serialize};

use crate::daemon::BUNDLE_VARIABLE;
use crate::host::Host;

/// Names the guest's image in the environment of tests.
pub const GUEST_VARIABLE: &str = "BULKHEAD_HOSTILE_GUEST";

/// Memory of a hostile machine: the least that a machine can have.
pub const MEMORY_MIB: u32 = 32;

/// What a VMM may need beside its guest's memory at any time, in KiB, whatever the guest does: its program text, its
/// threads, its buffers.
const MOST_OVERHEAD_KIB: u64 = 20 << 10;
/// What it may write on its standard error, in bytes.
const MOST_WORDS: usize = 4 << 10;

/// What is to be run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Plan {
    /// The VMM's program.
    pub vmm: PathBuf,
    /// The guest's image.
    pub guest: PathBuf,
    /// The scenario's name, with a number behind a colon where it has variants.
    pub scenario: String,
    /// vCPUs.
    pub vcpus: u8,
    /// What is asked of the VMM once the guest has said that it is ready.
    pub when_ready: Vec<Ask>,
    /// Whether another, honest machine runs beside it.
    pub neighbour: bool,
}

/// Something that is asked of a VMM from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ask {
    /// Status, which must be answered.
    Status,
    /// Pause and resume, which must succeed.
    Pause,
    /// Kill by request.
    Kill,
    /// SIGTERM.
    Terminate,
}

/// What came of it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Outcome {
    /// The VMM's exit code; None when a signal ended it.
    pub code: Option<i32>,
    /// It did not end within the time and was killed.
    pub timed_out: bool,
    /// Its report.
    pub report: Option<Report>,
    /// Its standard error.
    pub words: String,
    /// What the guest said: lines that begin with `hostile: `, without that.
    pub said: Vec<String>,
    /// Length of the console's file in bytes.
    pub console_bytes: u64,
    /// The most memory it had at a time, guest memory included, in KiB.
    pub most_kib: u64,
    /// What has changed on the host that must not: empty when all is well.
    pub damage: Vec<String>,
    /// How often the neighbour was heard while the hostile machine ran, and after.
    pub neighbour_beats: (usize, usize),
    /// What was asked and refused.
    pub refused: Vec<String>,
}

/// A run to be configured.
#[derive(Debug, Clone)]
pub struct Hostile(Plan);

impl Hostile {
    /// A machine with one vCPU that runs the scenario.
    ///
    /// # Errors
    /// When the tests were started in another way than by xtask.
    pub fn new(scenario: &str) -> Result<Self> {
        let variable = |name: &str| {
            env::var_os(name)
                .map(PathBuf::from)
                .with_context(|| format!("${name} is not set: `cargo xtask test e2e [FILTER]`"))
        };
        Ok(Self(Plan {
            vmm: variable(BUNDLE_VARIABLE)?.join("bulkhead-vmm"),
            guest: variable(GUEST_VARIABLE)?,
            scenario: scenario.to_owned(),
            vcpus: 1,
            when_ready: Vec::new(),
            neighbour: false,
        }))
    }

    /// With so many vCPUs.
    #[must_use]
    pub fn vcpus(mut self, vcpus: u8) -> Self {
        self.0.vcpus = vcpus;
        self
    }

    /// Asks this once the guest is ready.
    #[must_use]
    pub fn when_ready(mut self, asks: &[Ask]) -> Self {
        self.0.when_ready = asks.to_vec();
        self
    }

    /// Beside an honest neighbour.
    #[must_use]
    pub fn with_neighbour(mut self) -> Self {
        self.0.neighbour = true;
        self
    }

    /// Runs it in the host. What must hold whatever a guest does is checked here: the VMM ends by itself with a
    /// report, without a panic, in bounds, and nothing on the host is touched.
    ///
    /// # Errors
    /// When it could not be run, or something of that does not hold.
    pub fn run(&self, program: &str) -> Result<Outcome> {
        let plan = serde_json::to_string(&self.0)?;
        let output = Host::from_env()?.command(program).arg(&plan).stdin(Stdio::null()).output()?;
        if !output.status.success() {
            bail!("{}: {}{}", self.0.scenario, output.status, String::from_utf8_lossy(&output.stderr));
        }
        let outcome: Outcome = serde_json::from_slice(&output.stdout)?;
        // Seen with `--no-capture`: how far from its bounds a run stayed.
        println!(
            "{}: {} KiB at most, {:?}",
            self.0.scenario,
            outcome.most_kib,
            outcome.report.as_ref().map(|report| &report.reason)
        );
        self.check(&outcome).with_context(|| format!("{}: {outcome:#?}", self.0.scenario))?;
        Ok(outcome)
    }

    fn check(&self, outcome: &Outcome) -> Result<()> {
        if outcome.timed_out {
            bail!("the VMM did not end");
        }
        let report = outcome.report.as_ref().context("the VMM wrote no report")?;
        let orderly = matches!(report.reason, ExitReason::PoweredOff | ExitReason::Killed);
        if outcome.code != Some(i32::from(!orderly)) {
            bail!("the VMM ended with {:?}", outcome.code);
        }
        // A guest's kernel may panic, and say so.
        let ours = !matches!(report.reason, ExitReason::GuestPanic { .. });
        if ours && report.reason.to_string().contains("panicked") || outcome.words.contains("panicked") {
            bail!("the VMM panicked");
        }
        let most = u64::from(MEMORY_MIB) * 1024 + MOST_OVERHEAD_KIB;
        if outcome.most_kib > most {
            bail!("the VMM took {} KiB, more than {most}", outcome.most_kib);
        }
        if outcome.words.len() > MOST_WORDS || outcome.console_bytes > 1 << 20 {
            bail!("the VMM wrote too much");
        }
        if let Some(failed) = outcome.said.iter().find(|line| line.starts_with("FAILED")) {
            bail!("the guest says: {failed}");
        }
        if !outcome.damage.is_empty() || !outcome.refused.is_empty() {
            bail!("{:?} {:?}", outcome.damage, outcome.refused);
        }
        if self.0.neighbour && (outcome.neighbour_beats.0 == 0 || outcome.neighbour_beats.1 == 0) {
            bail!("the neighbour was heard {:?} times during and after", outcome.neighbour_beats);
        }
        Ok(())
    }
}

impl Outcome {
    /// Why the machine ended.
    ///
    /// # Errors
    /// When there is no report.
    pub fn reason(&self) -> Result<&ExitReason> {
        Ok(&self.report.as_ref().context("no report")?.reason)
    }

    /// The guest came to its scenario's end, and powered off.
    ///
    /// # Errors
    /// When it did not.
    pub fn completed(&self) -> Result<()> {
        if *self.reason()? != ExitReason::PoweredOff || self.said.last().map(String::as_str) != Some("done") {
            bail!("not completed: {:?}, {:?}", self.reason()?, self.said);
        }
        Ok(())
    }

    /// The machine ended because a device called a queue corrupt.
    ///
    /// # Errors
    /// When it did not.
    pub fn queue_was_corrupt(&self) -> Result<()> {
        match self.reason()? {
            ExitReason::Device { device, message } if !device.is_empty() && message.contains("queue") => {
                Ok(())
            }
            other => bail!("ended by {other:?}, not by a device; the guest said {:?}", self.said),
        }
    }

    /// One of the two.
    ///
    /// # Errors
    /// When neither.
    pub fn completed_or_corrupt(&self) -> Result<()> {
        self.completed().or_else(|_| self.queue_was_corrupt())
    }
}

/// A copy of the guest's image that runs a scenario by itself, without a command line.
///
/// # Errors
/// When the image is not there or is not one.
pub fn image_of(scenario: &str, at: &Path) -> Result<()> {
    const MARK: &[u8] = b"hostile-scenario0=";
    let image = env::var_os(GUEST_VARIABLE).context("no hostile guest: `cargo xtask test e2e`")?;
    let mut bytes = std::fs::read(&image)?;
    let at_mark =
        bytes.windows(MARK.len()).position(|window| window == MARK).context("no mark in the image")?;
    let room = bytes.get_mut(at_mark + MARK.len()..at_mark + 64).context("the image is cut")?;
    let text = room.get_mut(..scenario.len()).context("the scenario's name is too long")?;
    text.copy_from_slice(scenario.as_bytes());
    std::fs::write(at, bytes)?;
    Ok(())
}
