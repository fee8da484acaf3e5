//! vCPUs: a thread each, which runs guest code until something needs the VMM.
//!
//! ```text
//!              start()             pause()              resume()
//!   created ───────────▶ running ───────────▶ paused ───────────▶ running
//!                           │                    │
//!                           └──── stop() ────────┴──▶ stopped (the thread has ended)
//! ```
//!
//! A request reaches a vCPU by a signal whose handler sets `immediate_exit` in that vCPU's `kvm_run`: it then
//! leaves KVM_RUN, or does not enter it, and looks at the wanted state. A vCPU parks only there, after
//! KVM_RUN has been called once more: that is what completes a port or memory access which was answered.
//!
//! A parked thread saves its vCPU when asked to ([`Vcpus::save`]).

use std::{
    cell::Cell,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, Once, OnceLock, PoisonError,
        atomic::{AtomicU8, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use bulkhead_vmm_api::ExitReason;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::end::End;
use crate::{
    arch::x86_64::state::{Abilities, StateError, VcpuState},
    bus::Bus,
    jail::gate::Gate,
    seccomp::Kind,
    window::Window,
};

/// What all vCPUs of a machine share.
pub struct Shared {
    /// Port I/O.
    pub ports: Bus,
    /// Memory-mapped I/O.
    pub mmio: Bus,
    /// Where the machine's end is reported.
    pub end: Arc<End>,
    /// Exits to user space.
    pub exits: ExitCounts,
    /// When the first vCPU first entered the guest, after the start of the process.
    pub entered: OnceLock<Duration>,
    /// When the process started.
    pub started: Instant,
    /// What there is to save of a vCPU.
    pub abilities: Abilities,
    /// The window, whose files may be cut short.
    pub window: Option<Arc<Window>>,
    wanted: Mutex<Wanted>,
    changed: Condvar,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Running,
    Paused,
    Stopped,
}

/// What the vCPUs are to do, and what they have done of it.
struct Wanted {
    state: State,
    /// How many are not running guest code.
    parked: usize,
    /// How many of those have ended.
    ended: usize,
    /// For each vCPU, while all are to be saved: what has come of it.
    saves: Vec<Option<Result<VcpuState, StateError>>>,
}

impl Wanted {
    /// Whether a vCPU is to be saved and was not yet.
    fn wants_save(&self, index: usize) -> bool {
        self.saves.get(index).is_some_and(Option::is_none)
    }
}

/// Why the vCPUs cannot be saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// One has ended.
    #[error("a vCPU has ended")]
    Ended,
    /// The state of one cannot be read.
    #[error("vCPU {index}: {source}")]
    State {
        /// Its index.
        index: usize,
        /// Why not.
        source: StateError,
    },
}

impl Shared {
    /// For vCPUs that are not running yet.
    #[must_use]
    pub fn new(
        ports: Bus,
        mmio: Bus,
        end: Arc<End>,
        started: Instant,
        abilities: Abilities,
        window: Option<Arc<Window>>,
    ) -> Self {
        Self {
            ports,
            mmio,
            end,
            exits: ExitCounts::default(),
            entered: OnceLock::new(),
            started,
            abilities,
            window,
            wanted: Mutex::new(Wanted { state: State::Paused, parked: 0, ended: 0, saves: Vec::new() }),
            changed: Condvar::new(),
        }
    }

    fn wanted(&self) -> MutexGuard<'_, Wanted> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits, parked, while the machine is paused. False when the vCPU is to end.
    fn park(&self, vcpu: &VcpuFd, index: usize) -> bool {
        let mut wanted = self.wanted();
        if wanted.state == State::Paused {
            wanted.parked += 1;
            self.changed.notify_all();
            while wanted.state == State::Paused {
                if wanted.wants_save(index) {
                    drop(wanted);
                    let saved = VcpuState::save(vcpu, &self.abilities);
                    wanted = self.wanted();
                    if let Some(slot) = wanted.saves.get_mut(index) {
                        *slot = Some(saved);
                    }
                    self.changed.notify_all();
                } else {
                    wanted = self.changed.wait(wanted).unwrap_or_else(PoisonError::into_inner);
                }
            }
            wanted.parked -= 1;
            // The guest is told that it did not run for a while, so that its watchdogs do not take that for a
            // lock-up. One that has no paravirtual clock (yet) is not to be told.
            let _ = vcpu.kvmclock_ctrl();
        }
        wanted.state == State::Running
    }

    /// A vCPU ends by itself: it counts as parked for ever.
    fn leave(&self) {
        let mut wanted = self.wanted();
        wanted.parked += 1;
        wanted.ended += 1;
        drop(wanted);
        self.changed.notify_all();
    }
}

/// The vCPUs of a machine.
pub struct Vcpus {
    shared: Arc<Shared>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Vcpus {
    /// Starts a thread for each vCPU, which has to pass the gate. They wait until [`Vcpus::resume`].
    ///
    /// # Errors
    /// The signal's handler cannot be installed, or a thread cannot be started.
    pub fn start(shared: Arc<Shared>, vcpus: Vec<VcpuFd>, gate: &Arc<Gate>) -> io::Result<Self> {
        install_handler()?;
        let mut this = Self { shared, threads: Vec::new() };
        for (index, vcpu) in vcpus.into_iter().enumerate() {
            let shared = Arc::clone(&this.shared);
            let pass = gate.pass(Kind::Vcpu);
            let thread = thread::Builder::new().name(format!("vcpu{index}")).spawn(move || {
                pass.confine();
                thread_main(vcpu, index, &shared);
            })?;
            this.threads.push(thread);
        }
        Ok(this)
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.threads.len()
    }

    /// Lets the vCPUs run; nothing if they do.
    pub fn resume(&self) {
        self.shared.wanted().state = State::Running;
        self.shared.changed.notify_all();
    }

    /// Stops every vCPU between two instructions and waits until it has.
    pub fn pause(&self) {
        self.shared.wanted().state = State::Paused;
        self.kick();
        let mut wanted = self.shared.wanted();
        while wanted.parked < self.threads.len() {
            wanted = self.shared.changed.wait(wanted).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Saves the vCPUs, each on its own thread: the kernel has the state of a vCPU at hand there. They are
    /// paused, and stay so.
    ///
    /// # Errors
    /// See [`SaveError`].
    pub fn save(&self) -> Result<Vec<VcpuState>, SaveError> {
        let mut wanted = self.shared.wanted();
        wanted.saves = self.threads.iter().map(|_| None).collect();
        self.shared.changed.notify_all();
        while wanted.ended == 0 && wanted.saves.iter().any(Option::is_none) {
            wanted = self.shared.changed.wait(wanted).unwrap_or_else(PoisonError::into_inner);
        }
        let saves = std::mem::take(&mut wanted.saves);
        drop(wanted);
        let saved = saves.into_iter().enumerate().map(|(index, saved)| match saved {
            None => Err(SaveError::Ended),
            Some(saved) => saved.map_err(|source| SaveError::State { index, source }),
        });
        saved.collect()
    }

    /// Whether the vCPUs are paused.
    #[must_use]
    pub fn paused(&self) -> bool {
        self.shared.wanted().state == State::Paused
    }

    /// What they share.
    #[must_use]
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    fn kick(&self) {
        for thread in &self.threads {
            // Fails only when the thread has ended.
            let _ = thread.kill(SIGRTMIN());
        }
    }
}

impl Drop for Vcpus {
    /// Ends the threads and waits for them.
    fn drop(&mut self) {
        self.shared.wanted().state = State::Stopped;
        self.shared.changed.notify_all();
        self.kick();
        for thread in self.threads.drain(..) {
            // A panic was reported when it happened.
            let _ = thread.join();
        }
    }
}

thread_local! {
    /// `immediate_exit` of this thread's vCPU; null when there is none.
    static IMMEDIATE_EXIT: Cell<*const AtomicU8> = const { Cell::new(std::ptr::null()) };
}

extern "C" fn kicked(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    IMMEDIATE_EXIT.with(|pointer| {
        // SAFETY: the pointer is null or to a byte of the `kvm_run` that the vCPU on this very thread keeps
        // mapped; the thread sets it back to null before it unmaps that (`Kick::drop`).
        if let Some(immediate_exit) = unsafe { pointer.get().as_ref() } {
            immediate_exit.store(1, Ordering::SeqCst);
        }
    });
}

fn install_handler() -> io::Result<()> {
    static ONCE: Once = Once::new();
    let mut result = Ok(());
    ONCE.call_once(|| {
        result = register_signal_handler(SIGRTMIN(), kicked)
            .map_err(|error| io::Error::from_raw_os_error(error.errno()));
    });
    result
}

/// Makes the signal reach the vCPU of this thread, for as long as it lives.
struct Kick;

impl Kick {
    fn new(vcpu: &mut VcpuFd) -> Self {
        let immediate_exit = &raw mut vcpu.get_kvm_run().immediate_exit;
        IMMEDIATE_EXIT.with(|pointer| pointer.set(immediate_exit.cast::<AtomicU8>().cast_const()));
        Self
    }
}

impl Drop for Kick {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.with(|pointer| pointer.set(std::ptr::null()));
    }
}

fn thread_main(mut vcpu: VcpuFd, index: usize, shared: &Shared) {
    let kick = Kick::new(&mut vcpu);
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        if shared.park(&vcpu, index) {
            shared.entered.get_or_init(|| shared.started.elapsed());
            run(&mut vcpu, index, shared);
        }
    }));
    drop(kick);
    if outcome.is_err() {
        shared.end.report(ExitReason::Kvm { message: format!("the thread of vCPU {index} panicked") });
    }
    shared.leave();
}

/// How often in a row a vCPU may meet a missing page where nothing was to be mended.
const MOST_FAULTS: u32 = 16;

/// Runs guest code until the machine ends or the vCPU is to stop.
fn run(vcpu: &mut VcpuFd, index: usize, shared: &Shared) {
    let exits = &shared.exits;
    let mut faults = 0;
    loop {
        let outcome = vcpu.run();
        if !matches!(&outcome, Err(error) if error.errno() == libc::EFAULT) {
            faults = 0;
        }
        match outcome {
            Ok(VcpuExit::IoOut(port, data)) => {
                exits.count(Exit::PortWrite);
                shared.ports.write(u64::from(port), data);
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                exits.count(Exit::PortRead);
                shared.ports.read(u64::from(port), data);
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                exits.count(Exit::MmioWrite);
                shared.mmio.write(address, data);
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                exits.count(Exit::MmioRead);
                shared.mmio.read(address, data);
            }
            Ok(VcpuExit::Intr) => exits.count(Exit::Signal),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                exits.count(Exit::Signal);
                vcpu.set_kvm_immediate_exit(0);
                if !shared.park(vcpu, index) {
                    return;
                }
            }
            Ok(VcpuExit::Shutdown) => {
                shared.end.triple_fault();
                return;
            }
            Ok(other) => {
                let message = fatal_exit(&other);
                let message = message.unwrap_or_else(|| internal_error(vcpu));
                shared.end.report(ExitReason::Kvm { message });
                return;
            }
            // The guest has looked behind the end of a file that has been cut short.
            Err(error)
                if error.errno() == libc::EFAULT
                    && shared.window.as_ref().is_some_and(|window| mend(window, &mut faults)) => {}
            Err(error) => {
                shared.end.report(ExitReason::Kvm { message: format!("KVM_RUN: {error}") });
                return;
            }
        }
    }
}

/// Whether a vCPU that has met a missing page may go on. Where nothing was to be mended, another thread may have done it
/// in the meantime; not again and again.
fn mend(window: &Window, faults: &mut u32) -> bool {
    *faults = if window.mend() { 0 } else { *faults + 1 };
    *faults <= MOST_FAULTS
}

/// What a fatal exit says; None for an internal error, whose numbers are in `kvm_run`.
fn fatal_exit(exit: &VcpuExit<'_>) -> Option<String> {
    match exit {
        VcpuExit::FailEntry(reason, cpu) => {
            Some(format!("KVM_EXIT_FAIL_ENTRY, hardware reason {reason:#x} on CPU {cpu}"))
        }
        VcpuExit::InternalError => None,
        other => Some(format!("unexpected exit {other:?}")),
    }
}

fn internal_error(vcpu: &mut VcpuFd) -> String {
    let run = vcpu.get_kvm_run();
    // SAFETY: the exit reason is KVM_EXIT_INTERNAL_ERROR, for which KVM fills this member of the union.
    let internal = unsafe { run.__bindgen_anon_1.internal };
    let data = internal.data.get(..internal.ndata as usize).unwrap_or(&[]);
    format!("KVM_EXIT_INTERNAL_ERROR, suberror {}, data {data:x?}", internal.suberror)
}

/// Why a vCPU left the guest for user space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Exit {
    PortRead,
    PortWrite,
    MmioRead,
    MmioWrite,
    Signal,
}

/// How often the vCPUs left the guest for user space.
#[derive(Debug, Default)]
pub struct ExitCounts([AtomicU64; 5]);

impl ExitCounts {
    const NAMES: [&str; 5] = ["port_read", "port_write", "mmio_read", "mmio_write", "signal"];

    fn count(&self, exit: Exit) {
        if let Some(counter) = self.0.get(exit as usize) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Counts by name, the largest first; without those that are zero.
    #[must_use]
    pub fn by_frequency(&self) -> Vec<(String, u64)> {
        let counts = self.0.iter().map(|counter| counter.load(Ordering::Relaxed));
        let mut counts: Vec<_> = Self::NAMES
            .iter()
            .zip(counts)
            .filter(|(_, count)| *count > 0)
            .map(|(name, count)| ((*name).to_owned(), count))
            .collect();
        counts.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exits_are_counted_by_name() {
        let counts = ExitCounts::default();
        counts.count(Exit::MmioRead);
        counts.count(Exit::Signal);
        counts.count(Exit::Signal);
        assert_eq!(counts.by_frequency(), [("signal".to_owned(), 2), ("mmio_read".to_owned(), 1)]);
    }

    #[test]
    fn fatal_exits_carry_their_numbers() {
        let message = fatal_exit(&VcpuExit::FailEntry(0x21, 1)).unwrap();
        assert!(message.contains("0x21") && message.contains("CPU 1"), "{message}");
        assert!(fatal_exit(&VcpuExit::Hlt).unwrap().contains("Hlt"));
        assert!(fatal_exit(&VcpuExit::InternalError).is_none());
    }
}
