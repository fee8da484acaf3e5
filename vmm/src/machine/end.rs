//! How a machine ends: whoever notices first says why, and the control loop is woken.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    sync::{Arc, Mutex, PoisonError},
};

use bulkhead_vmm_api::ExitReason;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::{console::Console, recorder::Recorder};

/// The machine's end, shared by all of its threads.
#[derive(Debug)]
pub struct End {
    reason: Mutex<Option<ExitReason>>,
    event: EventFd,
    console: Arc<Console>,
    recorder: Arc<Recorder>,
}

impl End {
    /// A machine that has not ended.
    ///
    /// # Errors
    /// No eventfd could be made.
    pub fn new(console: Arc<Console>, recorder: Arc<Recorder>) -> io::Result<Self> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Self { reason: Mutex::new(None), event, console, recorder })
    }

    /// What happened before it.
    #[must_use]
    pub fn recorder(&self) -> &Arc<Recorder> {
        &self.recorder
    }

    /// The machine has ended; only the first reason counts.
    pub fn report(&self, reason: ExitReason) {
        self.reason.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(reason);
        // Fails only when it is readable anyway.
        let _ = self.event.write(1);
    }

    /// The guest pulled the reset line: in order, or because its kernel panicked.
    pub fn guest_reset(&self) {
        self.report(match self.console.panic() {
            Some(message) => ExitReason::GuestPanic { message },
            None => ExitReason::PoweredOff,
        });
    }

    /// A triple fault. A kernel that panics may end in one when it cannot even pull the reset line.
    pub fn triple_fault(&self) {
        self.report(match self.console.panic() {
            Some(message) => ExitReason::GuestPanic { message },
            None => ExitReason::TripleFault,
        });
    }

    /// The reason, once there is one.
    #[must_use]
    pub fn reason(&self) -> Option<ExitReason> {
        self.reason.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl AsFd for End {
    /// Readable once the machine has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the eventfd is open for as long as `self`, from which the result borrows.
        unsafe { BorrowedFd::borrow_raw(self.event.as_raw_fd()) }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    fn recorder() -> Arc<Recorder> {
        Recorder::new(Instant::now())
    }

    #[test]
    fn the_first_reason_counts() {
        let end = End::new(Arc::default(), recorder()).unwrap();
        assert_eq!(end.reason(), None);
        end.guest_reset();
        end.report(ExitReason::Killed);
        assert_eq!(end.reason(), Some(ExitReason::PoweredOff));
    }

    #[test]
    fn a_panic_before_a_reset_or_a_fault_is_the_reason() {
        for how in [End::guest_reset, End::triple_fault] {
            let console = Arc::new(Console::default());
            let end = End::new(Arc::clone(&console), recorder()).unwrap();
            console.write(b"[    1.0] Kernel panic - not syncing: test\r\n");
            how(&end);
            let message = "Kernel panic - not syncing: test".to_owned();
            assert_eq!(end.reason(), Some(ExitReason::GuestPanic { message }));
        }
    }
}
