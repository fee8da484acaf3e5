//! `bulkhead-vmm`: one microVM.
//!
//! `bulkhead-vmm --config-fd N` reads its configuration from descriptor N, builds the machine, runs it, and
//! writes one report when it has ended, for whatever reason. It exits with 0 when the machine ended in order
//! (the guest powered off, or it was killed on request), with 1 when it did not, and with 2 when there is
//! not even a report to write to.

use std::{
    fs::File,
    io::Write,
    panic::{AssertUnwindSafe, catch_unwind},
    process::ExitCode,
    sync::Arc,
    time::Instant,
};

use bulkhead_vmm::{
    config::{self, Config, Inherited},
    console::Console,
    machine::{builder, control, signals::Signals},
};
use bulkhead_vmm_api::{ExitReason, FdNumber, Report};

const USAGE: &str = "usage: bulkhead-vmm --config-fd N";

fn main() -> ExitCode {
    let started = Instant::now();
    match begin() {
        Ok((report, config)) => run(report, config, started),
        Err(message) => {
            eprintln!("bulkhead-vmm: {message}");
            ExitCode::from(2)
        }
    }
}

/// The report's file, and the configuration or why it is refused.
fn begin() -> Result<(File, Result<Config, String>), String> {
    let mut inherited = Inherited::default();
    let config = config::read(config_number()?, &mut inherited).map_err(|error| error.to_string())?;
    let report = config::take_report(&config, &mut inherited).map_err(|error| error.to_string())?;
    Ok((report, config::check(config, &mut inherited).map_err(|error| error.to_string())))
}

fn config_number() -> Result<FdNumber, String> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--config-fd", number] => number.parse().map_err(|_| USAGE.to_owned()),
        _ => Err(USAGE.to_owned()),
    }
}

fn run(report: File, config: Result<Config, String>, started: Instant) -> ExitCode {
    let mut console = None;
    let outcome =
        catch_unwind(AssertUnwindSafe(|| config.and_then(|config| machine(config, started, &mut console))));
    let reason = match outcome {
        Ok(Ok(reason)) => reason,
        Ok(Err(message)) => ExitReason::Setup { message },
        Err(_) => ExitReason::Kvm { message: "the VMM panicked".to_owned() },
    };
    let orderly = matches!(reason, ExitReason::PoweredOff | ExitReason::Killed);
    let console = console.map_or_else(String::new, |console| console.tail());
    let uptime_us = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
    if let Err(error) = write_report(report, &Report { reason, console, uptime_us }) {
        eprintln!("bulkhead-vmm: report: {error}");
        return ExitCode::from(2);
    }
    ExitCode::from(u8::from(!orderly))
}

/// Builds and runs the machine. An error is one of building it.
fn machine(
    config: Config,
    started: Instant,
    console: &mut Option<Arc<Console>>,
) -> Result<ExitReason, String> {
    let signals = Signals::block().map_err(|error| format!("signals: {error}"))?;
    let control = config.control.try_clone().map_err(|error| format!("control: {error}"))?;
    let machine = builder::build(config, started).map_err(|error| error.to_string())?;
    *console = Some(Arc::clone(machine.console()));
    machine.resume();
    let reason = control::serve(&machine, &control, &signals)
        .unwrap_or_else(|error| ExitReason::Kvm { message: format!("control socket: {error}") });
    machine.stop();
    Ok(reason)
}

/// One write, so that a reader sees a whole report or none.
fn write_report(mut file: File, report: &Report) -> std::io::Result<()> {
    let bytes = serde_json::to_vec(report)?;
    file.write_all(&bytes)
}
