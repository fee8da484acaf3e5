//! A VMM that somebody else owns: the real one, with one more signal handler, which runs an attack in whichever
//! thread the signal is sent to. A handler can interrupt a thread at any instruction, as an exploit does; what it
//! may then do is decided by the thread's confinement alone.
//!
//! ```text
//!   compromised-vmm --config-fd N                    is the VMM
//!   compromised-vmm attack PID THREAD ATTACK         sends PID's thread the signal
//!   compromised-vmm list                             the attacks' names
//! ```
//!
//! What an attack that did not end the process has come to stands on the VMM's standard error: `NAME: refused`,
//! or what was got.

mod attacks;

use std::{fs, io, process::ExitCode, ptr};

use attacks::ATTACKS;

/// One of the real-time signals; the VMM itself uses the first.
const SIGNAL: i32 = 42;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["attack", pid, thread, attack] => match send(pid, thread, attack) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("compromised-vmm: {error}");
                ExitCode::FAILURE
            }
        },
        ["list"] => {
            ATTACKS.iter().for_each(|attack| println!("{}", attack.name));
            ExitCode::SUCCESS
        }
        _ => {
            if let Err(error) = install() {
                eprintln!("compromised-vmm: {error}");
                return ExitCode::from(3);
            }
            bulkhead_vmm::process::main()
        }
    }
}

fn install() -> io::Result<()> {
    // SAFETY: zero is a valid sigaction, and the handler has the signature that SA_SIGINFO demands.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = attacked as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        libc::sigaction(SIGNAL, &raw const action, ptr::null_mut())
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

extern "C" fn attacked(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the signal is sent with a value, and by `send` alone.
    let number = unsafe { (*info).si_value().sival_ptr } as usize;
    if let Some(attack) = ATTACKS.get(number) {
        let outcome = (attack.run)();
        for part in [attack.name, ": ", outcome, "\n"] {
            // SAFETY: the pointer is to as many bytes as said.
            unsafe { libc::write(2, part.as_ptr().cast(), part.len()) };
        }
    }
}

/// `siginfo_t` as the kernel takes it from a sender (`_rt`).
#[repr(C)]
struct Queued {
    signal: i32,
    errno: i32,
    code: i32,
    pad: i32,
    pid: i32,
    uid: u32,
    value: usize,
    rest: [u64; 12],
}

/// Sends the signal to the first thread of that name.
fn send(pid: &str, thread: &str, attack: &str) -> io::Result<()> {
    let number = ATTACKS.iter().position(|known| known.name == attack);
    let value = number.ok_or_else(|| io::Error::other(format!("no attack {attack:?}")))?;
    let mut tid = None;
    for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
        let path = entry?.path();
        if fs::read_to_string(path.join("comm"))?.trim() == thread {
            tid = path.file_name().and_then(|name| name.to_str()?.parse::<i32>().ok());
        }
    }
    let tid = tid.ok_or_else(|| io::Error::other(format!("no thread {thread:?}")))?;
    let pid: i32 = pid.parse().map_err(io::Error::other)?;
    let info = Queued { signal: SIGNAL, errno: 0, code: -1, pad: 0, pid: 0, uid: 0, value, rest: [0; 12] };
    // SAFETY: the structure is as long as `siginfo_t`, 128 bytes, and the kernel copies it.
    let result = unsafe { libc::syscall(libc::SYS_rt_tgsigqueueinfo, pid, tid, SIGNAL, &raw const info) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
