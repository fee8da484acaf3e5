//! A call that is not allowed: the handler of SIGSYS writes the report, which says by whom and which, and has
//! the process killed.
//!
//! It runs in a process that somebody else may own: it allocates nothing, takes no lock, and whatever it is
//! made to do, the call it was raised for is not made. The parts of the report around the call's number are
//! put together when a thread goes under its filter.

use std::{
    cell::Cell,
    io,
    os::fd::{AsRawFd, BorrowedFd},
    sync::{
        OnceLock,
        atomic::{AtomicI32, Ordering},
    },
};

use bulkhead_vmm_api::{ExitReason, Report};

use super::Kind;

/// The call by which the handler ends the process: every filter kills whoever makes it, and nothing else in
/// a VMM ever does.
pub(super) const LAST_CALL: u32 = libc::SYS_kill as u32;

/// Stands for the call's number while a report is put together.
const PLACEHOLDER: i32 = i32::MAX;

/// Where in `siginfo_t` the number of the call stands (`_sigsys._syscall`).
const CALL_OFFSET: usize = 24;

/// The report file.
static REPORT: AtomicI32 = AtomicI32::new(-1);

/// What comes before and behind the number.
type Parts = (Vec<u8>, Vec<u8>);

thread_local! {
    static PARTS: Cell<Option<&'static Parts>> = const { Cell::new(None) };
}

/// From now on violations are reported to this file, which stays open until the process ends.
///
/// # Errors
/// The handler cannot be installed.
pub fn watch(report: BorrowedFd<'_>) -> io::Result<()> {
    REPORT.store(report.as_raw_fd(), Ordering::SeqCst);
    // SAFETY: zero is a valid sigaction: no flags, no signals blocked.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = violated as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: the structure is initialised, and the handler has the signature that SA_SIGINFO demands.
    if unsafe { libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Makes the calling thread's part of a report.
pub(super) fn prepare(kind: Kind) -> io::Result<()> {
    static PARTS_OF: [OnceLock<Parts>; Kind::ALL.len()] = [const { OnceLock::new() }; Kind::ALL.len()];
    let slot = PARTS_OF.get(kind as usize).ok_or(io::ErrorKind::NotFound)?;
    let parts = match slot.get() {
        Some(parts) => parts,
        None => {
            let parts = parts(kind)?;
            slot.get_or_init(|| parts)
        }
    };
    PARTS.set(Some(parts));
    Ok(())
}

fn parts(kind: Kind) -> io::Result<Parts> {
    let reason = ExitReason::Violation { thread: kind.name().to_owned(), call: PLACEHOLDER };
    let text =
        serde_json::to_string(&Report { reason, console: String::new(), uptime_us: 0, recent: Vec::new() })?;
    let (before, behind) = text.split_once(&PLACEHOLDER.to_string()).ok_or(io::ErrorKind::InvalidData)?;
    Ok((before.into(), behind.into()))
}

extern "C" fn violated(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel gives a whole siginfo_t, and in that of a SIGSYS an int at this offset. A SIGSYS that
    // somebody sent has another content there, which is still a number.
    let call = unsafe { info.cast::<u8>().add(CALL_OFFSET).cast::<i32>().read_unaligned() };
    if let Some((before, behind)) = PARTS.get() {
        let mut digits = [0; 11];
        let mut offset = 0;
        for part in [before.as_slice(), decimal(call, &mut digits), behind.as_slice()] {
            // SAFETY: the pointer is to as many bytes as said.
            unsafe {
                let report = REPORT.load(Ordering::SeqCst);
                libc::syscall(libc::SYS_pwrite64, report, part.as_ptr(), part.len(), offset);
            }
            offset += part.len();
        }
    }
    // SAFETY: takes plain numbers; where a filter is installed, which alone raises this signal, it does not
    // return, and where a filter is not, somebody sent the signal, and the process ends as by default.
    unsafe {
        libc::syscall(libc::SYS_kill, libc::getpid(), libc::SIGKILL);
        libc::_exit(libc::SIGSYS);
    }
}

/// A number's digits, at the buffer's end.
fn decimal(number: i32, buffer: &mut [u8; 11]) -> &[u8] {
    let mut rest = number.unsigned_abs();
    let mut at = buffer.len();
    loop {
        at -= 1;
        if let Some(digit) = buffer.get_mut(at) {
            *digit = b'0' + (rest % 10) as u8;
        }
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    if number < 0 {
        at -= 1;
        if let Some(sign) = buffer.get_mut(at) {
            *sign = b'-';
        }
    }
    buffer.get(at..).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written() {
        for number in [0, 7, 59, 462, -1, i32::MAX, i32::MIN] {
            assert_eq!(decimal(number, &mut [0; 11]), number.to_string().as_bytes());
        }
    }

    #[test]
    fn the_parts_around_a_number_are_a_report() {
        for kind in Kind::ALL {
            let (before, behind) = parts(kind).unwrap();
            let text = [before.as_slice(), b"59", &behind].concat();
            let report: Report = serde_json::from_slice(&text).unwrap();
            let thread = kind.name().to_owned();
            assert_eq!(report.reason, ExitReason::Violation { thread, call: 59 });
        }
    }
}
