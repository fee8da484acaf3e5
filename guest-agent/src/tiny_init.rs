//! The init that a container gets on request (Docker's `--init`): the agent's executable, started as PID 1
//! of the container's pid namespace.
//!
//! It starts the workload as its only child of its own, in a process group of its own and in the
//! terminal's foreground, passes every signal on, reaps whatever is orphaned, and ends with the workload's
//! code: 128 + n after signal n.

use std::{ffi::CString, io, process::ExitCode};

use nix::{
    errno::Errno,
    sys::{
        signal::{SigSet, Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{ForkResult, Pid, fork, getpid, setpgid, tcsetpgrp},
};

use crate::{
    error::{Result, errno_text, invalid},
    sys,
};

/// What it is called in a process list, and by what the agent's executable knows its part. The name is the
/// one that Docker's users see.
pub const NAME: &str = "/sbin/docker-init";

/// The argument vector for a workload's.
///
/// # Errors
/// Of kind `Invalid` for a NUL.
pub fn arguments(workload: &[String]) -> Result<Vec<CString>> {
    let all = [NAME, "--"].into_iter().chain(workload.iter().map(String::as_str));
    all.map(CString::new).collect::<Result<_, _>>().map_err(|_| invalid("an argument contains a NUL"))
}

/// Whether this process was started by [`arguments`]; then the workload's arguments.
pub fn requested(args: impl IntoIterator<Item = std::ffi::OsString>) -> Option<Vec<CString>> {
    let mut args = args.into_iter();
    if args.next()? != NAME || args.next()? != "--" {
        return None;
    }
    use std::os::unix::ffi::OsStringExt;
    args.map(|arg| CString::new(arg.into_vec()).ok()).collect()
}

/// Runs the workload to its end.
pub fn run(workload: &[CString]) -> ExitCode {
    let Some(program) = workload.first() else { return ExitCode::from(127) };
    match supervise(program, workload) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("docker-init: {}", errno_text(&error.into()));
            ExitCode::from(125)
        }
    }
}

fn supervise(program: &CString, workload: &[CString]) -> nix::Result<u8> {
    // Every signal has been blocked since before this program was executed, and is kept for sigwait.
    // SAFETY: this process has one thread.
    let child = match unsafe { fork() }? {
        ForkResult::Child => become_workload(program, workload),
        ForkResult::Parent { child } => child,
    };
    loop {
        match SigSet::all().wait()? {
            Signal::SIGCHLD => {
                if let Some(code) = reap(child) {
                    return Ok(code);
                }
            }
            // Stopping for terminal access is for the workload's group, which gets these itself.
            Signal::SIGTTIN | Signal::SIGTTOU => {}
            signal => {
                // It may just have ended; SIGCHLD is on its way.
                let _ = kill(child, signal);
            }
        }
    }
}

fn become_workload(program: &CString, workload: &[CString]) -> ! {
    let own = getpid();
    if setpgid(own, own).is_ok() {
        // Without a terminal there is no foreground; SIGTTOU is still blocked.
        let _ = tcsetpgrp(rustix::stdio::stdin(), own);
    }
    let error = match sys::reset_signals().map(|()| nix::unistd::execvp(program, workload)) {
        Ok(Ok(never)) => match never {},
        Ok(Err(error)) => io::Error::from(error),
        Err(error) => error,
    };
    let name = program.to_string_lossy();
    eprintln!("exec {name}: {}", errno_text(&error));
    std::process::exit(if error.raw_os_error() == Some(Errno::ENOENT as i32) { 127 } else { 126 })
}

/// Reaps everything that has ended; the workload's code when it is among them.
fn reap(workload: Pid) -> Option<u8> {
    let mut code = None;
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, status)) if pid == workload => code = Some(status as u8),
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == workload => code = Some(128 + signal as u8),
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return code,
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => return code,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt;

    use super::*;

    #[test]
    fn the_workloads_arguments_survive_the_way_there() {
        let workload = ["sh".to_owned(), "-c".to_owned(), "--".to_owned()];
        let args = arguments(&workload).unwrap();
        let passed = args.iter().map(|arg| std::ffi::OsString::from_vec(arg.as_bytes().to_vec()));
        let found = requested(passed).unwrap();
        assert_eq!(found, workload.map(|arg| CString::new(arg).unwrap()));
    }

    #[test]
    fn nobody_else_is_taken_for_it() {
        for args in [vec!["/init"], vec![NAME], vec![NAME, "-v"], vec![]] {
            assert!(requested(args.into_iter().map(Into::into)).is_none());
        }
    }
}
