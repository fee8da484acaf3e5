//! What block, entropy, network and socket devices share: taking turns with their queues, and the form in
//! which they are saved.

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use virtio_queue::{QueueOwnedT, QueueState, QueueT};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{
    device::{Activation, DeviceError, GuestMemory, Interrupt, Resources, VirtioDevice},
    queue::{Chain, SavedQueue, complete, notify, pop, queue_error},
};

/// How many chains most devices work on before they let go of their lock. A guest that offers buffers as fast
/// as they are used could otherwise keep everybody else out for ever.
pub const TURN: usize = 256;

/// How long a device works before it lets go of its lock, chains left or not: one chain may cost as much as
/// thousands of others (a listing that looks up every name, a flush).
const TURN_TIME: Duration = Duration::from_millis(20);

/// An eventfd with which a device asks its worker for another turn.
#[derive(Debug)]
pub struct Wake(EventFd);

impl Wake {
    /// A wake that is not pending.
    ///
    /// # Errors
    /// No eventfd could be made.
    pub fn new() -> io::Result<Self> {
        EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map(Self)
    }

    /// Asks for another turn.
    pub fn request(&self) {
        // Fails only when the counter is full, and then the wake is pending anyway.
        let _ = self.0.write(1);
    }

    /// Takes what was asked for.
    pub fn take(&self) {
        // Fails when nothing was asked for.
        let _ = self.0.read();
    }
}

impl AsRawFd for Wake {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// What a device makes of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is used; so many bytes were written into it.
    Used(u32),
    /// The device keeps it, and completes it later by itself.
    Kept,
    /// It has to wait, and with it those behind it: it is left in the queue, and the turn is over. The device
    /// sees to it that it gets another.
    Waits,
}

impl From<u32> for Verdict {
    fn from(written: u32) -> Self {
        Self::Used(written)
    }
}

/// Works, for [`TURN_TIME`] at most, on up to `turn` chains of queue `index`: `each` gets a chain and says what came of it. The driver is notified once at the end; where chains may be left, `wake` is requested.
///
/// # Errors
/// The queue is corrupt.
pub fn take_turn<F, V>(
    activation: &mut Activation,
    index: usize,
    turn: usize,
    wake: &Wake,
    mut each: F,
) -> Result<(), DeviceError>
where
    F: FnMut(Chain<'_>, &GuestMemory) -> V,
    V: Into<Verdict>,
{
    let Activation { queues, resources: Resources { memory, interrupt }, .. } = activation;
    let Some(queue) = queues.get_mut(index) else { return Ok(()) };
    let (mut left, begun) = (turn, Instant::now());
    'turn: loop {
        queue.disable_notification(memory).map_err(|error| queue_error(index, &error))?;
        while left > 0
            && let Some(chain) = pop(queue, index, memory)?
        {
            left -= 1;
            let head = chain.head_index();
            match each(chain, memory).into() {
                Verdict::Used(written) => complete(queue, index, memory, head, written)?,
                Verdict::Kept => {}
                Verdict::Waits => {
                    queue.go_to_previous_position();
                    break 'turn;
                }
            }
            if begun.elapsed() >= TURN_TIME {
                left = 0;
            }
        }
        if left == 0 {
            wake.request();
            break;
        }
        if !queue.enable_notification(memory).map_err(|error| queue_error(index, &error))? {
            break;
        }
    }
    notify(queue, index, memory, interrupt)
}

/// Checks that the driver has set up every queue.
///
/// # Errors
/// It has not.
pub fn require_queues(activation: &Activation) -> Result<(), DeviceError> {
    require_first_queues(activation, activation.queues.len())
}

/// Checks that the driver has set up the first `count` queues.
///
/// # Errors
/// It has not.
pub fn require_first_queues(activation: &Activation, count: usize) -> Result<(), DeviceError> {
    match activation.queues.iter().take(count).position(|queue| !queue.ready()) {
        Some(queue) => Err(DeviceError::Queue { queue, message: "not set up by the driver".to_owned() }),
        None => Ok(()),
    }
}

/// Checks that there is a device to be activated.
///
/// # Errors
/// Its slot is empty, and the driver has not cared.
pub fn require_presence(device: &impl VirtioDevice) -> Result<(), DeviceError> {
    if device.present() {
        Ok(())
    } else {
        Err(DeviceError::Invalid("there is no device in the slot".to_owned()))
    }
}

/// The interrupt of an active device.
pub fn interrupt(active: Option<&Activation>) -> Option<&Interrupt> {
    active.map(|active| &*active.resources.interrupt)
}

/// Copies the part of a configuration space that the driver reads.
pub fn read_config(space: &[u8], offset: u64, data: &mut [u8]) {
    let from = usize::try_from(offset).ok().and_then(|offset| space.get(offset..)).unwrap_or_default();
    for (byte, value) in data.iter_mut().zip(from) {
        *byte = *value;
    }
}

/// A device as it is saved: what all have in common, and the state of its kind.
#[derive(Serialize, Deserialize)]
struct Saved<T> {
    device: u32,
    version: u32,
    active: Option<SavedActivation>,
    state: T,
}

#[derive(Serialize, Deserialize)]
struct SavedActivation {
    features: u64,
    queues: Vec<SavedQueue>,
}

/// Saves a device. `returned` says for each queue how many of the chains that the device has popped are to
/// be popped again after a restore, those at the end: none where it is shorter than there are queues.
///
/// # Errors
/// The state cannot be encoded.
pub fn save<T: Serialize>(
    device: &impl VirtioDevice,
    version: u32,
    active: Option<&Activation>,
    returned: &[u16],
    state: T,
) -> Result<Vec<u8>, DeviceError> {
    let active = active.map(|activation| {
        let returned = returned.iter().copied().chain(std::iter::repeat(0));
        let queues = activation.queues.iter().zip(returned).map(|(queue, returned)| {
            let state = queue.state();
            let state = QueueState { next_avail: state.next_avail.wrapping_sub(returned), ..state };
            // A queue's own state makes a queue again, always.
            virtio_queue::Queue::try_from(state)
                .as_ref()
                .map_or_else(|_| SavedQueue::from(queue), SavedQueue::from)
        });
        SavedActivation { features: activation.features, queues: queues.collect() }
    });
    let saved = Saved { device: device.device_type() as u32, version, active, state };
    postcard::to_stdvec(&saved).map_err(|error| DeviceError::Invalid(format!("saving: {error}")))
}

/// What [`save`] of the same version saved for a device of this kind: how it was activated, if it was, and
/// its own state.
///
/// # Errors
/// The bytes are damaged, or of another device or version; or features or queues do not fit this device.
pub fn restore<T: DeserializeOwned>(
    device: &impl VirtioDevice,
    version: u32,
    bytes: &[u8],
    resources: Resources,
) -> Result<(Option<Activation>, T), DeviceError> {
    let invalid = |message: String| DeviceError::Invalid(format!("saved state: {message}"));
    // The header alone first: the rest of another version may look like anything.
    let (id, rest) = postcard::take_from_bytes::<u32>(bytes).map_err(|error| invalid(error.to_string()))?;
    let (found, _) = postcard::take_from_bytes::<u32>(rest).map_err(|error| invalid(error.to_string()))?;
    if id != device.device_type() as u32 {
        return Err(invalid(format!("of device {id}, not {}", device.device_type() as u32)));
    }
    if found != version {
        return Err(invalid(format!("of version {found}, not {version}")));
    }
    let (saved, rest) =
        postcard::take_from_bytes::<Saved<T>>(bytes).map_err(|error| invalid(error.to_string()))?;
    if !rest.is_empty() {
        return Err(invalid(format!("{} bytes too many", rest.len())));
    }
    let activation = match saved.active {
        None => None,
        Some(SavedActivation { features, queues }) => {
            if features & !device.features() != 0 {
                return Err(invalid(format!("features {features:#x} were never offered")));
            }
            let queues = SavedQueue::restore_all(&queues, device.queue_max_sizes(), &resources.memory)?;
            let activation = Activation { features, queues, resources };
            require_first_queues(&activation, device.required_queues(features))?;
            Some(activation)
        }
    };
    Ok((activation, saved.state))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::{
        super::testing::{Desc, Driver, memory},
        *,
    };

    #[test]
    fn a_queue_that_never_empties_ends_a_turn() {
        let memory = memory();
        let mut driver = Driver::new(&memory, 0x1000, 16);
        let interrupt = Arc::new(Interrupt::new(EventFd::new(EFD_NONBLOCK).unwrap()));
        let resources = Resources { memory, interrupt };
        let mut activation = Activation { features: 0, queues: vec![driver.queue()], resources };
        driver.table(0, &[Desc::writable(0x8000, 1)]);
        let wake = Wake::new().unwrap();
        driver.offer(0);
        let mut served = 0;
        // The driver offers the next buffer while the device works on one.
        let mut endless = |_: Chain<'_>, _: &GuestMemory| {
            driver.offer(0);
            served += 1;
            1
        };
        take_turn(&mut activation, 0, TURN, &wake, &mut endless).unwrap();
        take_turn(&mut activation, 0, TURN, &wake, &mut endless).unwrap();
        // Fewer where the machine was so slow that the time was up first.
        assert!((2..=2 * TURN).contains(&served), "{served}");
        assert_eq!(wake.0.read().unwrap(), 2, "each turn asked for another");

        take_turn(&mut activation, 0, TURN, &wake, |_, _| 1).unwrap();
        assert!(wake.0.read().is_err(), "nothing is left to do");
    }

    #[test]
    fn slow_requests_end_a_turn() {
        let memory = memory();
        let mut driver = Driver::new(&memory, 0x1000, 16);
        let interrupt = Arc::new(Interrupt::new(EventFd::new(EFD_NONBLOCK).unwrap()));
        let resources = Resources { memory, interrupt };
        let mut activation = Activation { features: 0, queues: vec![driver.queue()], resources };
        driver.table(0, &[Desc::writable(0x8000, 1)]);
        (0..16).for_each(|_| driver.offer(0));
        let wake = Wake::new().unwrap();
        let mut served = 0;
        take_turn(&mut activation, 0, TURN, &wake, |_, _| {
            served += 1;
            std::thread::sleep(TURN_TIME);
            1
        })
        .unwrap();
        assert_eq!((served, wake.0.read().unwrap()), (1, 1));
    }

    #[test]
    fn no_read_leaves_configuration_space() {
        let mut data = [9; 4];
        read_config(&[1, 2, 3], 1, &mut data);
        assert_eq!(data, [2, 3, 9, 9]);
        read_config(&[1, 2, 3], 3, &mut data);
        read_config(&[1, 2, 3], u64::MAX, &mut data);
        assert_eq!(data, [2, 3, 9, 9]);
    }
}
