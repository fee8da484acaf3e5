//! The guest agent's executable: PID 1 of the machine, or on request PID 1 of a container.

use std::process::ExitCode;

use bulkhead_agent::{init, log, server, sys, tiny_init, transport::Vsock};
use rustix::time::{ClockId, clock_gettime};

fn main() -> ExitCode {
    let uptime = clock_gettime(ClockId::Boottime);
    let started_us = uptime.tv_sec.unsigned_abs() * 1_000_000 + uptime.tv_nsec.unsigned_abs() / 1000;
    if let Some(workload) = tiny_init::requested(std::env::args_os()) {
        return tiny_init::run(&workload);
    }
    if std::process::id() != 1 {
        eprintln!("bulkhead-agent is the init of a microVM and does nothing elsewhere");
        return ExitCode::FAILURE;
    }
    if let Err(error) = sys::hide() {
        log::warn(format_args!("hide: {error}"));
    }
    if let Err(error) = init::boot() {
        log::warn(format_args!("boot: {error}"));
    }
    let served = server::Server::new(Box::new(Vsock), started_us).and_then(server::Server::run);
    if let Err(error) = served {
        log::warn(format_args!("the agent cannot go on: {error}"));
    }
    server::power_off();
    ExitCode::FAILURE
}
