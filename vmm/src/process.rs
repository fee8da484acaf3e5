//! The process: from its arguments to its exit code.
//!
//! `bulkhead-vmm --config-fd N` reads its configuration from descriptor N, goes to jail, builds the machine,
//! runs it, and writes one report when it has ended, for whatever reason. It exits with 0 when the machine ended in order
//! (the guest powered off, or it was killed on request), with 1 when it did not, and with 2 when there is
//! not even a report to write to.
//!
//! `bulkhead-vmm --share-config-fd N` is another process altogether: see [`crate::shares`].

use std::{
    fs::File,
    io::Write,
    os::{fd::AsFd, unix::fs::FileExt},
    panic::{AssertUnwindSafe, catch_unwind},
    process::ExitCode,
    sync::Arc,
    time::Instant,
};

use bulkhead_vmm_api::{ExitReason, FdNumber, Report};

use crate::{
    config::{self, Config, Inherited, StartFiles},
    console::Console,
    jail,
    machine::{builder, control, end::End, signals::Signals},
    seccomp, shares,
};

const USAGE: &str = "usage: bulkhead-vmm --config-fd N | --share-config-fd N";

/// Runs the machine that the arguments name.
pub fn main() -> ExitCode {
    let started = Instant::now();
    one_arena();
    let config = match config_number() {
        Ok((Mode::Machine, number)) => number,
        Ok((Mode::Shares, number)) => return shares::main(number),
        Err(message) => {
            eprintln!("bulkhead-vmm: {message}");
            return ExitCode::from(2);
        }
    };
    // Executed by a descriptor, it would be named after that.
    let _ = rustix::thread::set_name(c"bulkhead-vmm");
    match begin(config) {
        Ok((report, config)) => run(report, config, started),
        Err(message) => {
            eprintln!("bulkhead-vmm: {message}");
            ExitCode::from(2)
        }
    }
}

/// Makes all threads allocate from one arena. With one each they would reserve 64 MiB of addresses apiece, keep
/// what they free to themselves, and ask the kernel by a path when to give it back.
fn one_arena() {
    // SAFETY: takes plain numbers; there is one thread. A C library that refuses goes on as it was.
    let _ = unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// The report's file, and the configuration or why it is refused.
fn begin(number: FdNumber) -> Result<(File, Result<Config, String>), String> {
    let mut inherited = Inherited::default();
    let config = config::read(number, &mut inherited).map_err(|error| error.to_string())?;
    let report = config::take_report(&config, &mut inherited).map_err(|error| error.to_string())?;
    let config = config::check(config, &mut inherited).map_err(|error| error.to_string());
    Ok((report, config.and_then(|config| confine(config, &inherited))))
}

/// Goes to jail, with the descriptors that the configuration names.
fn confine(config: Config, inherited: &Inherited) -> Result<Config, String> {
    jail::enter(config.jail, inherited.numbers()).map_err(|error| error.to_string())?;
    Ok(config)
}

/// What the process is to be.
enum Mode {
    Machine,
    Shares,
}

fn config_number() -> Result<(Mode, FdNumber), String> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let (mode, number) = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--config-fd", number] => (Mode::Machine, number),
        ["--share-config-fd", number] => (Mode::Shares, number),
        _ => return Err(USAGE.to_owned()),
    };
    number.parse().map(|number| (mode, number)).map_err(|_| USAGE.to_owned())
}

fn run(report: File, config: Result<Config, String>, started: Instant) -> ExitCode {
    let mut witness = None;
    let watched = seccomp::watch(report.as_fd()).map_err(|error| format!("SIGSYS: {error}"));
    let config = watched.and(config);
    let outcome =
        catch_unwind(AssertUnwindSafe(|| config.and_then(|config| machine(config, started, &mut witness))));
    let reason = match outcome {
        Ok(Ok(reason)) => reason,
        Ok(Err(message)) => ExitReason::Setup { message },
        Err(_) => ExitReason::Kvm { message: "the VMM panicked".to_owned() },
    };
    let orderly = matches!(reason, ExitReason::PoweredOff | ExitReason::Killed);
    let (console, recent) =
        witness.map(|Witness { console, end }| (console.tail(), end.recorder().recent())).unwrap_or_default();
    let uptime_us = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
    if let Err(error) = write_report(report, &Report { reason, console, uptime_us, recent }) {
        eprintln!("bulkhead-vmm: report: {error}");
        return ExitCode::from(2);
    }
    ExitCode::from(u8::from(!orderly))
}

/// What tells of a machine when it is gone.
struct Witness {
    console: Arc<Console>,
    end: Arc<End>,
}

/// Builds and runs the machine. An error is one of building it.
fn machine(config: Config, started: Instant, witness: &mut Option<Witness>) -> Result<ExitReason, String> {
    let signals = Signals::block().map_err(|error| format!("signals: {error}"))?;
    let control = config.control.try_clone().map_err(|error| format!("control: {error}"))?;
    let restored = matches!(config.start, StartFiles::Restore { .. });
    let jail = config.jail;
    let machine = builder::build(config, started).map_err(|error| error.to_string())?;
    *witness = Some(Witness { console: Arc::clone(machine.console()), end: Arc::clone(machine.end()) });
    jail::close(jail, machine.threads()).map_err(|error| error.to_string())?;
    jail::gate::confine(seccomp::Kind::Control).map_err(|error| error.to_string())?;
    // One that is restored is to be given its disks and shares first.
    if !restored {
        machine.resume();
    }
    let reason = control::serve(&machine, &control, &signals)
        .unwrap_or_else(|error| ExitReason::Kvm { message: format!("control socket: {error}") });
    machine.stop();
    Ok(reason)
}

/// One write, so that a reader sees a whole report or none. Where there is no room for all of it, the reason
/// is told without console and events, in the room that was found.
fn write_report(mut file: File, report: &Report) -> std::io::Result<()> {
    let bytes = serde_json::to_vec(report)?;
    file.write_all(&bytes).or_else(|error| {
        let short = Report { console: String::new(), recent: Vec::new(), ..report.clone() };
        let short = serde_json::to_vec(&short)?;
        file.write_all_at(&short, 0).and_then(|()| file.set_len(short.len() as u64)).map_err(|_| error)
    })
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek};

    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

    use super::*;

    fn report() -> Report {
        Report {
            reason: ExitReason::TripleFault,
            console: "x".repeat(5000),
            uptime_us: 7,
            recent: Vec::new(),
        }
    }

    #[test]
    fn a_full_disk_still_gets_the_reason() {
        let mut file = File::from(memfd_create("report", MemfdFlags::ALLOW_SEALING).unwrap());
        file.set_len(4096).unwrap();
        fcntl_add_seals(&file, SealFlags::GROW).unwrap();
        write_report(file.try_clone().unwrap(), &report()).unwrap();
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        let found: Report = serde_json::from_str(&text).unwrap();
        assert_eq!(found, Report { console: String::new(), ..report() });
    }

    #[test]
    fn a_report_that_nobody_reads_is_an_error() {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let file = File::from(std::os::fd::OwnedFd::from(writer));
        assert!(write_report(file, &report()).is_err());
    }
}
