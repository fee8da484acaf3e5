//! Termination signals as a file descriptor.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd},
};

use vmm_sys_util::signal::{block_signal, create_sigset};

const TERMINATION: [libc::c_int; 3] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP];

/// Readable when the process was asked to terminate.
#[derive(Debug)]
pub struct Signals(OwnedFd);

impl Signals {
    /// Blocks the termination signals in this thread and those that it starts from now on, and gives them a
    /// descriptor.
    ///
    /// # Errors
    /// The kernel has no descriptor left.
    pub fn block() -> io::Result<Self> {
        for signal in TERMINATION {
            // Fails only when the signal is blocked already.
            let _ = block_signal(signal);
        }
        let set = create_sigset(&TERMINATION).map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        // SAFETY: the set is initialised, and the result is checked before it is used.
        let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and nobody else's.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
