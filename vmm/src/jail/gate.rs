//! The gate before the guest: it opens when every thread that was announced is confined.
//!
//! ```text
//!   builder ── pass(kind) ──▶ thread ── Pass::confine ──▶ confined, or why not
//!      └────── wait ◀───────────────────────────────────────┘
//! ```

use std::{
    io,
    sync::{Arc, Condvar, Mutex, PoisonError},
};

use super::{JailError, landlock};
use crate::seccomp::{self, Kind};

/// Counts the threads that are not confined yet.
#[derive(Debug, Default)]
pub struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    waiting: usize,
    failed: Option<JailError>,
}

/// A thread's duty to confine itself before it does anything else.
#[derive(Debug)]
pub struct Pass(Option<(Arc<Gate>, Kind)>);

impl Gate {
    /// Announces a thread of this kind.
    #[must_use]
    pub fn pass(self: &Arc<Self>, kind: Kind) -> Pass {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).waiting += 1;
        Pass(Some((Arc::clone(self), kind)))
    }

    /// Waits until all that were announced are confined.
    ///
    /// # Errors
    /// One could not be, or ended before.
    pub fn wait(&self) -> Result<(), JailError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while state.waiting > 0 {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.failed.take().map_or(Ok(()), Err)
    }

    fn settle(&self, result: Result<(), JailError>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.waiting -= 1;
        if let Err(error) = result {
            state.failed.get_or_insert(error);
        }
        self.changed.notify_all();
    }
}

impl Pass {
    /// For threads of no machine: benches and tests of single devices.
    #[must_use]
    pub fn unconfined() -> Self {
        Self(None)
    }

    /// Confines the calling thread. Where that fails the gate knows, and stays shut.
    pub fn confine(mut self) {
        if let Some((gate, kind)) = self.0.take() {
            gate.settle(confine(kind));
        }
    }
}

impl Drop for Pass {
    /// A thread that could not be started.
    fn drop(&mut self) {
        if let Some((gate, _)) = self.0.take() {
            let error = io::Error::other("a thread ended before it was confined");
            gate.settle(Err(JailError::at("threads")(error)));
        }
    }
}

/// Confines the calling thread.
///
/// # Errors
/// The kernel refuses.
pub fn confine(kind: Kind) -> Result<(), JailError> {
    landlock::restrict(kind.files())?;
    seccomp::install(kind).map_err(JailError::at("seccomp"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_never_came_keeps_the_gate_shut() {
        let gate = Arc::new(Gate::default());
        gate.wait().unwrap();
        drop(gate.pass(Kind::Rng));
        assert!(gate.wait().is_err());
    }

    #[test]
    fn the_gate_waits_for_all() {
        let gate = Arc::new(Gate::default());
        let pass = gate.pass(Kind::Rng);
        let waiting = std::thread::spawn({
            let gate = Arc::clone(&gate);
            move || gate.wait()
        });
        std::thread::spawn(move || {
            rustix::thread::set_no_new_privs(true).unwrap();
            pass.confine();
        })
        .join()
        .unwrap();
        waiting.join().unwrap().unwrap();
    }
}
