//! A device's worker: the thread that runs its queues and its event sources.
//!
//! ```text
//!            kick eventfds ──┐
//!   device's event sources ──┼─▶ epoll ─▶ lock the device ─▶ queue_event / source_event
//!                     wake ──┘                                        │ DeviceError
//!                                                                     ▼
//!        failed: DEVICE_NEEDS_RESET, configuration interrupt, the machine is told;
//!        nothing is called any more until the driver resets the device
//! ```
//!
//! Whether a device is active or has failed changes only while its lock is held, so a kick that was already
//! under way when the driver reset the device finds it inactive and is dropped.

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use bulkhead_vmm_api::{DeviceFigures, Traffic};
use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd},
};

use super::device::{DeviceError, Interrupt, VirtioDevice};
use crate::{
    jail::gate::Pass,
    recorder::{Frequent, Place, Rare},
};

/// Device status bits (virtio 1.3, 2.1).
pub mod status {
    /// The guest has noticed the device.
    pub const ACKNOWLEDGE: u32 = 1;
    /// The guest has a driver for it.
    pub const DRIVER: u32 = 2;
    /// The driver is ready; the device is active.
    pub const DRIVER_OK: u32 = 4;
    /// The features are agreed upon.
    pub const FEATURES_OK: u32 = 8;
    /// The device has failed; set by the device alone.
    pub const DEVICE_NEEDS_RESET: u32 = 64;
    /// The driver has given up.
    pub const FAILED: u32 = 128;
}

/// Told of a device that broke: its name and what happened.
pub type FailureHandler = Arc<dyn Fn(&str, &DeviceError) + Send + Sync>;

/// A device with what its transport and its worker share: the lock, the kicks, the interrupt, the status.
pub struct Port {
    name: String,
    device: Arc<Mutex<dyn VirtioDevice>>,
    interrupt: Arc<Interrupt>,
    kicks: Vec<EventFd>,
    status: AtomicU32,
    wake: EventFd,
    stop: AtomicBool,
    /// Threads other than the worker that wait for the device.
    waiting: AtomicUsize,
    on_failure: FailureHandler,
    place: Place,
    counters: Counters,
}

/// What a port counts.
#[derive(Debug, Default)]
struct Counters {
    kicks: AtomicU64,
    resets: AtomicU64,
    /// Waits for a rate limit, as far as they were recorded.
    throttled: AtomicU64,
}

impl Port {
    /// A port for `device`, known as `name` in thread names and reports. `interrupt` gets its line from the
    /// machine.
    ///
    /// # Errors
    /// No eventfd could be made.
    pub fn new(
        name: String,
        device: Arc<Mutex<dyn VirtioDevice>>,
        interrupt: Arc<Interrupt>,
        on_failure: FailureHandler,
    ) -> io::Result<Self> {
        let queues = lock(&device).queue_max_sizes().len();
        let eventfd = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        let kicks = (0..queues).map(|_| eventfd()).collect::<io::Result<_>>()?;
        let (status, stop, waiting) = (AtomicU32::new(0), AtomicBool::new(false), AtomicUsize::new(0));
        let (wake, place, counters) = (eventfd()?, Place::default(), Counters::default());
        Ok(Self { name, device, interrupt, kicks, status, wake, stop, waiting, on_failure, place, counters })
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where its events are recorded.
    #[must_use]
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// What the device has done so far.
    #[must_use]
    pub fn figures(&self) -> DeviceFigures {
        let [read, write] = self.device().traffic().unwrap_or_default();
        DeviceFigures {
            name: self.name.clone(),
            active: self.active(),
            kicks: self.counters.kicks.load(Ordering::Relaxed),
            interrupts: self.interrupt.raised(),
            resets: self.counters.resets.load(Ordering::Relaxed),
            read,
            write,
        }
    }

    /// Records that something has begun to wait for its rate limit; called with the device's lock held, after
    /// each of its events.
    fn record_throttling(&self, device: &dyn VirtioDevice) {
        let Some(traffic) = device.traffic() else { return };
        let waits = traffic.iter().map(|Traffic { throttled, .. }| throttled).sum();
        if self.counters.throttled.swap(waits, Ordering::Relaxed) != waits {
            self.place.frequent(Frequent::Throttled, u32::try_from(waits).unwrap_or(u32::MAX));
        }
    }

    /// The driver has reset the device; called with its lock held.
    pub(super) fn count_reset(&self) {
        self.counters.resets.fetch_add(1, Ordering::Relaxed);
        self.place.rare(Rare::Reset);
    }

    /// Locks the device. A panic of one thread does not keep the others from it: the panicking one reports
    /// the device as failed.
    pub fn device(&self) -> MutexGuard<'_, dyn VirtioDevice + 'static> {
        self.before_the_worker(&self.device)
    }

    /// Locks this port's device under whatever type the caller knows it by. The worker lets it go first.
    pub fn before_the_worker<'a, D: ?Sized>(&self, device: &'a Mutex<D>) -> MutexGuard<'a, D> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let guard = device.lock().unwrap_or_else(PoisonError::into_inner);
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        guard
    }

    /// Locks the device for the worker, after those who wait already: a mutex gives no turns, and a guest
    /// that keeps its worker busy must not keep the control thread out. Not for ever, since the guest's vCPUs
    /// are among those who may wait.
    fn after_the_others(&self) -> MutexGuard<'_, dyn VirtioDevice + 'static> {
        for _ in 0..Self::PATIENCE {
            if self.waiting.load(Ordering::SeqCst) == 0 {
                break;
            }
            thread::sleep(Duration::from_micros(50));
        }
        lock(&self.device)
    }

    /// How often the worker lets others go first before it insists.
    const PATIENCE: usize = 1000;

    /// The device's interrupt.
    #[must_use]
    pub fn interrupt(&self) -> &Arc<Interrupt> {
        &self.interrupt
    }

    /// One eventfd for each queue: readable after the driver has kicked it.
    #[must_use]
    pub fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    /// Kicks a queue as the driver does; an index that does not exist is ignored.
    pub fn kick(&self, queue: usize) {
        if let Some(kick) = self.kicks.get(queue) {
            // Fails only when the counter is full, and then the kick is pending anyway.
            let _ = kick.write(1);
        }
    }

    /// The device status register.
    #[must_use]
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// Sets bits of the status; called with the device's lock held.
    pub(super) fn set_status(&self, bits: u32) {
        self.status.fetch_or(bits, Ordering::SeqCst);
    }

    /// Puts the status back to `value`, for a reset (0) or a restore; called with the device's lock held.
    pub(super) fn replace_status(&self, value: u32) {
        let old = self.status.swap(value, Ordering::SeqCst);
        if old & status::DEVICE_NEEDS_RESET != 0 {
            let _ = self.wake.write(1);
        }
    }

    /// Marks the device as failed and tells the driver and the machine; called with the device's lock held.
    pub(super) fn fail(&self, error: &DeviceError) {
        let old = self.status.fetch_or(status::DEVICE_NEEDS_RESET, Ordering::SeqCst);
        if old & status::DEVICE_NEEDS_RESET != 0 {
            return;
        }
        // Before DRIVER_OK the driver is not to be interrupted (virtio 1.3, 2.1.2).
        if old & status::DRIVER_OK != 0 {
            self.interrupt.config_changed();
        }
        self.place.rare(Rare::Failed(error.to_string().into()));
        (self.on_failure)(&self.name, error);
    }

    fn failed(&self) -> bool {
        self.status() & status::DEVICE_NEEDS_RESET != 0
    }

    fn active(&self) -> bool {
        self.status() & (status::DRIVER_OK | status::DEVICE_NEEDS_RESET) == status::DRIVER_OK
    }
}

fn lock<'a>(
    device: &'a Arc<Mutex<dyn VirtioDevice + 'static>>,
) -> MutexGuard<'a, dyn VirtioDevice + 'static> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A running worker. Dropped, it handles the kicks that came before, then ends: so what a guest sent just
/// before it powered off is not lost.
pub struct Worker {
    port: Arc<Port>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Worker {
    /// Starts the worker of a device, which first of all confines itself.
    ///
    /// # Errors
    /// No epoll or thread could be made, or an event source cannot be watched.
    pub fn start(port: Arc<Port>, pass: Pass) -> io::Result<Self> {
        let watch = Watch::new(&port)?;
        let name: String = port.name.chars().take(15).collect();
        let shared = Arc::clone(&port);
        let thread = thread::Builder::new().name(name).spawn(move || {
            pass.confine();
            run(&shared, watch);
        })?;
        Ok(Self { port, thread: Some(thread) })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.port.stop.store(true, Ordering::SeqCst);
        let _ = self.port.wake.write(1);
        if let Some(thread) = self.thread.take() {
            // A panic was reported when it happened.
            let _ = thread.join();
        }
    }
}

/// What has become readable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Event {
    Wake,
    Queue(usize),
    Source(usize),
}

/// The epoll set of a worker. Tokens: 0 is the wake, then the queues, then the sources.
struct Watch {
    epoll: Epoll,
    sources: Vec<RawFd>,
    queues: usize,
    /// Sources are level-triggered: those of a failed device are taken out, or the thread would spin.
    watching_sources: bool,
}

impl Watch {
    /// Events handled a round; the rest is reported by the next.
    const BATCH: usize = 16;

    fn new(port: &Port) -> io::Result<Self> {
        let sources = port.device().event_sources();
        let mut watch =
            Self { epoll: Epoll::new()?, sources, queues: port.kicks.len(), watching_sources: false };
        let fds = std::iter::once(port.wake.as_raw_fd()).chain(port.kicks.iter().map(AsRawFd::as_raw_fd));
        for (token, fd) in (0..).zip(fds) {
            watch.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, token))?;
        }
        watch.watch_sources(true)?;
        Ok(watch)
    }

    fn watch_sources(&mut self, on: bool) -> io::Result<()> {
        if on != self.watching_sources {
            for (token, fd) in (1 + self.queues as u64..).zip(&self.sources) {
                let operation = if on { ControlOperation::Add } else { ControlOperation::Delete };
                self.epoll.ctl(operation, *fd, EpollEvent::new(EventSet::IN, token))?;
            }
            self.watching_sources = on;
        }
        Ok(())
    }

    /// What is readable, waiting at most `timeout` milliseconds for it; -1 waits for ever.
    fn wait(&self, timeout: i32) -> io::Result<Vec<Event>> {
        let mut ready = [EpollEvent::default(); Self::BATCH];
        let count = loop {
            match self.epoll.wait(timeout, &mut ready) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => break other?,
            }
        };
        let event = |ready: &EpollEvent| match usize::try_from(ready.data()).unwrap_or(0) {
            0 => Event::Wake,
            token if token <= self.queues => Event::Queue(token - 1),
            token => Event::Source(token - 1 - self.queues),
        };
        Ok(ready.iter().take(count).map(event).collect())
    }
}

/// Rounds that a worker spends at its end on what came before: enough for every queue to be emptied, and a
/// bound for sources that never fall silent.
const LAST_ROUNDS: usize = 256;

/// How long it spends on them: a queue can be made to fill itself, by requests whose results are written into
/// its ring.
const LAST_TIME: Duration = Duration::from_secs(5);

fn run(port: &Port, mut watch: Watch) {
    while !port.stop.load(Ordering::SeqCst) {
        guarded(port, || round(port, &mut watch, -1));
    }
    let stopped = Instant::now();
    for _ in 0..LAST_ROUNDS {
        if stopped.elapsed() > LAST_TIME
            || port.failed()
            || guarded(port, || round(port, &mut watch, 0)) != Some(true)
        {
            break;
        }
    }
}

/// Runs a round. The worker's own error or panic is the device's failure; then None.
fn guarded(port: &Port, round: impl FnOnce() -> Result<bool, DeviceError>) -> Option<bool> {
    let error = match catch_unwind(AssertUnwindSafe(round)) {
        Ok(Ok(handled)) => return Some(handled),
        Ok(Err(error)) => error,
        Err(_) => DeviceError::Invalid("its worker panicked".to_owned()),
    };
    let _lock = port.device();
    port.fail(&error);
    None
}

/// Calls the device if the queue was kicked.
fn handle_kick(port: &Port, queue: usize) {
    if port.kicks.get(queue).is_none_or(|kick| kick.read().is_err()) {
        return;
    }
    port.counters.kicks.fetch_add(1, Ordering::Relaxed);
    port.place.frequent(Frequent::Kick, u32::try_from(queue).unwrap_or(u32::MAX));
    let mut device = port.after_the_others();
    if port.active() {
        device.queue_event(queue).unwrap_or_else(|error| port.fail(&error));
        port.record_throttling(&*device);
    }
}

/// Waits once and handles what came; whether anything did. A device that fails is marked so under the same
/// lock, so that a reset cannot come between. An error is the worker's own.
fn round(port: &Port, watch: &mut Watch, timeout: i32) -> Result<bool, DeviceError> {
    let epoll_error = |source| DeviceError::Backend { context: "epoll", source };
    watch.watch_sources(!port.failed()).map_err(epoll_error)?;
    let events = watch.wait(timeout).map_err(epoll_error)?;
    for event in &events {
        match *event {
            Event::Wake => {
                let _ = port.wake.read();
            }
            Event::Queue(queue) => handle_kick(port, queue),
            Event::Source(source) => {
                let mut device = port.after_the_others();
                if !port.failed() {
                    device.source_event(source).unwrap_or_else(|error| port.fail(&error));
                    port.record_throttling(&*device);
                }
            }
        }
    }
    Ok(!events.is_empty())
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::{super::testing::memory, *};
    use crate::devices::virtio::device::{Activation, DeviceType, Resources};

    /// Reports every call; fails or panics when told to.
    struct Probe {
        calls: mpsc::Sender<String>,
        source: EventFd,
        fail: bool,
        panic: bool,
    }

    impl VirtioDevice for Probe {
        fn device_type(&self) -> DeviceType {
            DeviceType::Rng
        }
        fn queue_max_sizes(&self) -> &[u16] {
            &[16, 16]
        }
        fn features(&self) -> u64 {
            0
        }
        fn read_config(&self, _: u64, _: &mut [u8]) {}
        fn activate(&mut self, _: Activation) -> Result<(), DeviceError> {
            Ok(())
        }
        fn reset(&mut self) {}
        fn queue_event(&mut self, queue: usize) -> Result<(), DeviceError> {
            assert!(!self.panic, "told to");
            self.calls.send(format!("queue {queue}")).unwrap();
            if self.fail { Err(DeviceError::Invalid("told to".to_owned())) } else { Ok(()) }
        }
        fn event_sources(&self) -> Vec<RawFd> {
            vec![self.source.as_raw_fd()]
        }
        fn source_event(&mut self, source: usize) -> Result<(), DeviceError> {
            self.source.read().unwrap();
            self.calls.send(format!("source {source}")).unwrap();
            Ok(())
        }
        fn save(&self) -> Result<Vec<u8>, DeviceError> {
            Ok(Vec::new())
        }
        fn restore(&mut self, _: &[u8], _: Resources) -> Result<(), DeviceError> {
            Ok(())
        }
    }

    struct Fixture {
        port: Arc<Port>,
        device: Arc<Mutex<Probe>>,
        calls: mpsc::Receiver<String>,
        failures: mpsc::Receiver<String>,
        source: EventFd,
        _worker: Worker,
    }

    fn fixture() -> Fixture {
        let (send, calls) = mpsc::channel();
        let (report, failures) = mpsc::channel();
        let source = EventFd::new(EFD_NONBLOCK).unwrap();
        let probe = Probe { calls: send, source: source.try_clone().unwrap(), fail: false, panic: false };
        let device = Arc::new(Mutex::new(probe));
        let interrupt = Arc::new(Interrupt::new(EventFd::new(EFD_NONBLOCK).unwrap()));
        let report = Mutex::new(report);
        let on_failure: FailureHandler = Arc::new(move |name, error| {
            report.lock().unwrap().send(format!("{name}: {error}")).unwrap();
        });
        let dynamic: Arc<Mutex<dyn VirtioDevice>> = Arc::<Mutex<Probe>>::clone(&device);
        let port = Arc::new(Port::new("probe".to_owned(), dynamic, interrupt, on_failure).unwrap());
        let worker = Worker::start(Arc::clone(&port), Pass::unconfined()).unwrap();
        Fixture { port, device, calls, failures, source, _worker: worker }
    }

    #[test]
    fn kicks_reach_an_active_device_only() {
        let f = fixture();
        f.port.kick(0);
        f.source.write(1).unwrap();
        assert_eq!(f.calls.recv().unwrap(), "source 0");
        f.port.set_status(status::DRIVER_OK);
        f.port.kick(1);
        f.port.kick(9);
        // The kick of queue 0 came before the source's event or is drained as inactive; it may also be seen
        // after activation, which a driver cannot tell from a spurious kick.
        let call = f.calls.recv().unwrap();
        assert!(call == "queue 1" || (call == "queue 0" && f.calls.recv().unwrap() == "queue 1"));
    }

    #[test]
    fn the_worker_lets_others_go_first() {
        let f = fixture();
        let held = f.device.lock().unwrap();
        let (entered, order) = mpsc::channel();
        let first = entered.clone();
        let port = Arc::clone(&f.port);
        let other = thread::spawn(move || {
            let _device = port.device();
            first.send("other").unwrap();
        });
        while f.port.waiting.load(Ordering::SeqCst) == 0 {
            thread::yield_now();
        }
        drop(held);
        let device = f.port.after_the_others();
        entered.send("worker").unwrap();
        drop(device);
        other.join().unwrap();
        assert_eq!(order.recv().unwrap(), "other");
    }

    #[test]
    fn a_failed_device_is_left_alone_until_reset() {
        let f = fixture();
        f.device.lock().unwrap().fail = true;
        f.port.set_status(status::DRIVER_OK);
        f.port.kick(0);
        assert_eq!(f.calls.recv().unwrap(), "queue 0");
        assert_eq!(f.failures.recv().unwrap(), "probe: told to");
        assert_ne!(f.port.status() & status::DEVICE_NEEDS_RESET, 0);
        assert_eq!(f.port.interrupt().status(), 2);
        f.source.write(1).unwrap();
        f.port.kick(1);

        {
            let mut device = f.device.lock().unwrap();
            device.fail = false;
            f.port.replace_status(0);
            f.port.set_status(status::DRIVER_OK);
        }
        // What was pending at the sources while it had failed is seen now; the kick may have been dropped.
        let mut calls = vec![f.calls.recv().unwrap()];
        if calls[0] == "queue 1" {
            calls.push(f.calls.recv().unwrap());
        }
        assert!(calls.contains(&"source 0".to_owned()), "{calls:?}");
        assert!(f.failures.try_recv().is_err());
    }

    #[test]
    fn a_panic_is_a_failure() {
        let f = fixture();
        f.device.lock().unwrap().panic = true;
        f.port.set_status(status::DRIVER_OK);
        f.port.kick(0);
        assert_eq!(f.failures.recv().unwrap(), "probe: its worker panicked");
    }

    #[test]
    fn what_was_kicked_before_the_end_is_handled() {
        let Fixture { port, device, calls, _worker: worker, .. } = fixture();
        port.set_status(status::DRIVER_OK);
        let busy = device.lock().unwrap();
        port.kick(0);
        port.kick(1);
        let ended = thread::spawn(move || drop(worker));
        drop(busy);
        ended.join().unwrap();
        let mut seen: Vec<_> = calls.try_iter().collect();
        seen.sort();
        assert_eq!(seen, ["queue 0", "queue 1"]);
    }

    #[test]
    fn memory_of_the_harness_is_whole() {
        use vm_memory::GuestMemoryBackend;
        assert_eq!(memory().last_addr().0, (4 << 20) - 1);
    }
}
