use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use virtio_queue::QueueT;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{
    super::{
        block::Block,
        device::{DeviceType, Interrupt},
        queue::SavedQueue,
        testing::{Driver, memory},
    },
    *,
};

const FEATURE: u64 = 1 << 5;

/// Two queues, one feature, eight bytes of configuration, one shared memory region.
#[derive(Default)]
struct Probe {
    config: [u8; 8],
    fail_activation: bool,
    features: Option<u64>,
    queues: Vec<Queue>,
    resets: u32,
}

impl VirtioDevice for Probe {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }
    fn queue_max_sizes(&self) -> &[u16] {
        &[256, 64]
    }
    fn features(&self) -> u64 {
        VIRTIO_F_VERSION_1 | VIRTIO_RING_F_EVENT_IDX | FEATURE
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            if let Ok(at) = usize::try_from(offset) {
                *byte = at.checked_add(index).and_then(|at| self.config.get(at)).copied().unwrap_or(0);
            }
        }
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        for (index, byte) in (offset..).zip(data) {
            if let Some(slot) = usize::try_from(index).ok().and_then(|index| self.config.get_mut(index)) {
                *slot = *byte;
            }
        }
    }
    fn shared_memory(&self, id: u8) -> Option<(u64, u64)> {
        (id == 1).then_some((0x12_3456_7000, 0x1_0000_0000))
    }
    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        if self.fail_activation {
            return Err(DeviceError::Invalid("told to".to_owned()));
        }
        self.features = Some(activation.features);
        self.queues = activation.queues;
        Ok(())
    }
    fn reset(&mut self) {
        self.features = None;
        self.queues.clear();
        self.resets += 1;
    }
    fn queue_event(&mut self, _: usize) -> Result<(), DeviceError> {
        Ok(())
    }
    fn save(&self) -> Result<Vec<u8>, DeviceError> {
        let queues: Vec<SavedQueue> = self.queues.iter().map(SavedQueue::from).collect();
        Ok(postcard::to_stdvec(&(self.features, queues)).unwrap())
    }
    fn restore(&mut self, state: &[u8], resources: Resources) -> Result<(), DeviceError> {
        let (features, queues): (_, Vec<SavedQueue>) =
            postcard::from_bytes(state).map_err(|error| DeviceError::Invalid(error.to_string()))?;
        self.features = features;
        self.queues = SavedQueue::restore_all(&queues, &[256, 64], &resources.memory)?;
        Ok(())
    }
}

struct Guest {
    transport: MmioTransport,
    device: Arc<Mutex<Probe>>,
    failures: Arc<Mutex<Vec<String>>>,
}

impl Guest {
    fn new() -> Self {
        let device = Arc::new(Mutex::new(Probe::default()));
        let failures = Arc::new(Mutex::new(Vec::new()));
        let interrupt = Arc::new(Interrupt::new(EventFd::new(EFD_NONBLOCK).unwrap()));
        let dynamic: Arc<Mutex<dyn VirtioDevice>> = Arc::<Mutex<Probe>>::clone(&device);
        let seen = Arc::clone(&failures);
        let handler = Arc::new(move |_: &str, error: &DeviceError| {
            seen.lock().unwrap().push(error.to_string());
        });
        let port = Port::new("probe".to_owned(), dynamic, interrupt, handler).unwrap();
        Self { transport: MmioTransport::new(Arc::new(port), memory()), device, failures }
    }

    fn get(&mut self, offset: u64) -> u32 {
        let mut data = [0xff; 4];
        self.transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn set(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    fn status(&mut self, bits: u32) {
        let old = self.get(register::STATUS);
        self.set(register::STATUS, old | bits);
    }

    fn negotiate(&mut self, features: u64) -> bool {
        self.set(register::STATUS, 0);
        self.status(status::ACKNOWLEDGE);
        self.status(status::DRIVER);
        for selector in 0..2 {
            self.set(register::DRIVER_FEATURES_SEL, selector);
            self.set(register::DRIVER_FEATURES, half(features, selector));
        }
        self.status(status::FEATURES_OK);
        self.get(register::STATUS) & status::FEATURES_OK != 0
    }

    fn set_up(&mut self, queue: u32, size: u32, (descriptors, driver, device): (u64, u64, u64)) {
        self.set(register::QUEUE_SEL, queue);
        self.set(register::QUEUE_SIZE, size);
        for (offset, address) in [
            (register::QUEUE_DESC_LOW, descriptors),
            (register::QUEUE_DRIVER_LOW, driver),
            (register::QUEUE_DEVICE_LOW, device),
        ] {
            self.set(offset, half(address, 0));
            self.set(offset + 4, half(address, 1));
        }
        self.set(register::QUEUE_READY, 1);
    }

    fn rings(size: u16) -> (u64, u64, u64) {
        Driver::new(&memory(), 0x1000, size).addresses()
    }

    fn active() -> Self {
        let mut guest = Self::new();
        assert!(guest.negotiate(VIRTIO_F_VERSION_1 | VIRTIO_RING_F_EVENT_IDX));
        guest.set_up(0, 128, Self::rings(128));
        guest.status(status::DRIVER_OK);
        assert_eq!(guest.get(register::STATUS), 15);
        guest
    }

    /// The message of the failure that setting up one queue so leads to.
    fn refusal(size: u32, rings: (u64, u64, u64)) -> String {
        let mut guest = Self::new();
        assert!(guest.negotiate(VIRTIO_F_VERSION_1));
        guest.set_up(0, size, rings);
        guest.status(status::DRIVER_OK);
        assert_eq!(guest.get(register::STATUS), 15 | status::DEVICE_NEEDS_RESET);
        assert_eq!(guest.get(register::INTERRUPT_STATUS), 2);
        assert!(guest.device.lock().unwrap().features.is_none());
        guest.failures.lock().unwrap().pop().unwrap()
    }
}

#[test]
fn identity() {
    let mut guest = Guest::new();
    assert_eq!(guest.get(register::MAGIC), u32::from_le_bytes(*b"virt"));
    assert_eq!(guest.get(register::VERSION), 2);
    assert_eq!(guest.get(register::DEVICE_ID), 2);
    assert_eq!(guest.get(register::DEVICE_FEATURES), (FEATURE | VIRTIO_RING_F_EVENT_IDX) as u32);
    guest.set(register::DEVICE_FEATURES_SEL, 1);
    assert_eq!(guest.get(register::DEVICE_FEATURES), 1);
    guest.set(register::DEVICE_FEATURES_SEL, 2);
    assert_eq!(guest.get(register::DEVICE_FEATURES), 0);
    for (queue, size) in [(0, 256), (1, 64), (2, 0), (u32::MAX, 0)] {
        guest.set(register::QUEUE_SEL, queue);
        assert_eq!(guest.get(register::QUEUE_SIZE_MAX), size);
    }
}

#[test]
fn activation_hands_over_what_was_negotiated() {
    let guest = Guest::active();
    let device = guest.device.lock().unwrap();
    assert_eq!(device.features, Some(VIRTIO_F_VERSION_1 | VIRTIO_RING_F_EVENT_IDX));
    assert_eq!((device.queues[0].ready(), device.queues[0].size()), (true, 128));
    assert!(device.queues[0].event_idx_enabled());
    assert!(!device.queues[1].ready());
    assert!(guest.failures.lock().unwrap().is_empty());
}

#[test]
fn features_must_be_offered_and_modern() {
    let mut guest = Guest::new();
    assert!(!guest.negotiate(0));
    assert!(!guest.negotiate(VIRTIO_F_VERSION_1 | 1));
    guest.status(status::DRIVER_OK);
    assert_eq!(guest.get(register::STATUS) & status::DRIVER_OK, 0);
    assert!(guest.negotiate(VIRTIO_F_VERSION_1 | FEATURE));
    guest.set(register::DRIVER_FEATURES_SEL, 0);
    guest.set(register::DRIVER_FEATURES, 0);
    guest.status(status::DRIVER_OK);
    assert_eq!(guest.device.lock().unwrap().features, Some(VIRTIO_F_VERSION_1 | FEATURE));
}

#[test]
fn status_goes_forward_only() {
    let mut guest = Guest::new();
    guest.set(register::STATUS, status::DRIVER);
    assert_eq!(guest.get(register::STATUS), 0);
    guest.set(register::STATUS, status::ACKNOWLEDGE | status::DRIVER_OK);
    assert_eq!(guest.get(register::STATUS), status::ACKNOWLEDGE);
    guest.set(register::STATUS, status::DRIVER);
    assert_eq!(guest.get(register::STATUS), status::ACKNOWLEDGE);
    guest.status(status::DEVICE_NEEDS_RESET);
    assert_eq!(guest.get(register::STATUS), status::ACKNOWLEDGE);
    guest.status(status::FAILED);
    assert_eq!(guest.get(register::STATUS), status::ACKNOWLEDGE | status::FAILED);
}

#[test]
fn queues_outside_the_rules_fail_activation() {
    let good = Guest::rings(16);
    assert!(Guest::refusal(0, good).contains("size 0"));
    assert!(Guest::refusal(24, good).contains("size 24"));
    assert!(Guest::refusal(512, good).contains("size 512"));
    assert!(Guest::refusal(0x1_0010, good).contains("size 65552"));
    assert!(Guest::refusal(16, (good.0 + 8, good.1, good.2)).contains("descriptor area"));
    assert!(Guest::refusal(16, (good.0, good.1 + 1, good.2)).contains("driver area"));
    assert!(Guest::refusal(16, (good.0, good.1, good.2 + 2)).contains("device area"));
    assert!(Guest::refusal(16, (good.0, 0, good.2)).contains("not in guest memory"));
    assert!(Guest::refusal(16, ((4 << 20) - 16, good.1, good.2)).contains("not in guest memory"));
    assert!(Guest::refusal(16, (good.0, 1 << 40, good.2)).contains("not in guest memory"));
    assert!(Guest::refusal(16, (good.0, good.1, u64::MAX - 3)).contains("not in guest memory"));
}

#[test]
fn a_failed_activation_asks_for_a_reset() {
    let mut guest = Guest::new();
    guest.device.lock().unwrap().fail_activation = true;
    assert!(guest.negotiate(VIRTIO_F_VERSION_1));
    guest.status(status::DRIVER_OK);
    assert_eq!(guest.get(register::STATUS), 15 | status::DEVICE_NEEDS_RESET);
    guest.device.lock().unwrap().fail_activation = false;
    guest.set(register::STATUS, 0);
    assert_eq!((guest.get(register::STATUS), guest.get(register::INTERRUPT_STATUS)), (0, 0));
    assert!(guest.negotiate(VIRTIO_F_VERSION_1));
    guest.status(status::DRIVER_OK);
    assert_eq!(guest.get(register::STATUS), 15);
}

#[test]
fn registers_take_aligned_words_only() {
    let mut guest = Guest::new();
    guest.transport.write(register::STATUS, &[1]);
    guest.transport.write(register::STATUS, &[1, 0]);
    guest.transport.write(register::STATUS, &[1, 0, 0, 0, 0, 0, 0, 0]);
    guest.transport.write(register::STATUS + 1, &[1, 0, 0, 0]);
    assert_eq!(guest.get(register::STATUS), 0);
    for width in [1, 2, 8] {
        let mut data = vec![0xff; width];
        guest.transport.read(register::MAGIC, &mut data);
        assert!(data.iter().all(|byte| *byte == 0));
    }
}

#[test]
fn configuration_takes_any_width_and_counts_changes() {
    let mut guest = Guest::new();
    guest.device.lock().unwrap().config = *b"abcdefgh";
    for width in [1usize, 2, 4, 8] {
        let mut data = vec![0; width];
        guest.transport.read(register::CONFIG, &mut data);
        assert_eq!(data, b"abcdefgh"[..width]);
    }
    let mut data = [1; 4];
    guest.transport.read(register::CONFIG + 6, &mut data);
    assert_eq!(data, *b"gh\0\0");
    let before = guest.get(register::CONFIG_GENERATION);
    assert_eq!(guest.get(register::CONFIG_GENERATION), before);
    guest.device.lock().unwrap().config[0] = b'z';
    assert_ne!(guest.get(register::CONFIG_GENERATION), before);
}

#[test]
fn a_change_before_activation_is_told_after_it() {
    let mut guest = Guest::new();
    assert!(guest.negotiate(VIRTIO_F_VERSION_1));
    guest.get(register::CONFIG);
    guest.device.lock().unwrap().config = *b"attached";
    guest.status(status::DRIVER_OK);
    assert_eq!(guest.get(register::INTERRUPT_STATUS), 2);
    guest.set(register::INTERRUPT_ACK, 2);
    assert_eq!(guest.get(register::INTERRUPT_STATUS), 0);
}

#[test]
fn a_look_at_the_status_takes_used_buffers_back_and_nothing_else() {
    let mut guest = Guest::active();
    let interrupt = Arc::clone(guest.transport.port().interrupt());
    interrupt.used_ring();
    interrupt.config_changed();
    assert_eq!(guest.get(register::INTERRUPT_STATUS), 3);
    assert_eq!(guest.get(register::INTERRUPT_STATUS), 2);
    // What is used between the look and its acknowledgement, which the VMM does not hear of, is told of anew.
    interrupt.used_ring();
    guest.set(register::INTERRUPT_ACK, 2);
    assert_eq!(guest.get(register::INTERRUPT_STATUS), 1);
    assert_eq!(guest.get(register::INTERRUPT_STATUS), 0);
}

#[test]
fn shared_memory_is_all_ones_where_there_is_none() {
    let mut guest = Guest::new();
    let registers =
        [register::SHM_LEN_LOW, register::SHM_LEN_HIGH, register::SHM_BASE_LOW, register::SHM_BASE_HIGH];
    assert_eq!(registers.map(|register| guest.get(register)), [u32::MAX; 4]);
    guest.set(register::SHM_SEL, 1);
    assert_eq!(registers.map(|register| guest.get(register)), [0, 1, 0x3456_7000, 0x12]);
    guest.set(register::SHM_SEL, 0x101);
    assert_eq!(registers.map(|register| guest.get(register)), [u32::MAX; 4]);
}

#[test]
fn a_saved_device_comes_back() {
    let guest = Guest::active();
    guest.transport.port().interrupt().used_ring();
    let saved = guest.transport.save().unwrap();
    let bytes = postcard::to_stdvec(&saved).unwrap();

    let mut again = Guest::new();
    again.transport.restore(&postcard::from_bytes(&bytes).unwrap()).unwrap();
    assert_eq!(again.get(register::STATUS), 15);
    assert_eq!(again.get(register::INTERRUPT_STATUS), 1);
    assert_eq!(again.device.lock().unwrap().queues, guest.device.lock().unwrap().queues);

    let outside = SavedTransport { driver_features: 1, ..saved };
    assert!(Guest::new().transport.restore(&outside).is_err());
}

#[test]
fn an_empty_slot_comes_back_empty_and_is_filled_then() {
    let slot = || {
        let device = Arc::new(Mutex::new(Block::new("late").unwrap().late(true)));
        let interrupt = Arc::new(Interrupt::new(EventFd::new(EFD_NONBLOCK).unwrap()));
        let dynamic: Arc<Mutex<dyn VirtioDevice>> = Arc::<Mutex<Block>>::clone(&device);
        let port = Port::new("slot".to_owned(), dynamic, interrupt, Arc::new(|_: &str, _: &DeviceError| {}))
            .unwrap();
        (MmioTransport::new(Arc::new(port), memory()), device)
    };
    let id = |transport: &mut MmioTransport| {
        let mut data = [0xff; 4];
        transport.read(register::DEVICE_ID, &mut data);
        u32::from_le_bytes(data)
    };
    let (mut transport, _) = slot();
    assert_eq!(id(&mut transport), 0);
    let saved = postcard::to_stdvec(&transport.save().unwrap()).unwrap();
    let (mut transport, device) = slot();
    transport.restore(&postcard::from_bytes(&saved).unwrap()).unwrap();
    assert_eq!(id(&mut transport), 0);
    device.lock().unwrap().attach(tempfile::tempfile().unwrap(), false).unwrap();
    assert_eq!(id(&mut transport), DeviceType::Block as u32);
}

#[derive(Debug, Clone)]
enum Access {
    Read(u64, usize),
    Write(u64, Vec<u8>),
}

fn access() -> impl Strategy<Value = Access> {
    let offset = prop_oneof![4 => (0u64..0x50).prop_map(|word| word * 4), 1 => 0u64..WINDOW];
    let width = prop_oneof![6 => Just(4usize), 1 => Just(1), 1 => Just(2), 1 => Just(8)];
    let value = prop_oneof![4 => 0u64..256, 1 => any::<u64>()];
    (any::<bool>(), offset, width, value).prop_map(|(read, offset, width, value)| {
        if read {
            Access::Read(offset, width)
        } else {
            Access::Write(offset, value.to_le_bytes()[..width].to_vec())
        }
    })
}

proptest! {
    #[test]
    fn no_access_panics_or_breaks_an_invariant(accesses in prop::collection::vec(access(), 0..200)) {
        let mut guest = Guest::new();
        for access in accesses {
            match access {
                Access::Read(offset, width) => guest.transport.read(offset, &mut vec![0; width]),
                Access::Write(offset, data) => guest.transport.write(offset, &data),
            }
            let status = guest.get(register::STATUS);
            let device = guest.device.lock().unwrap();
            prop_assert_eq!(device.features.is_some(), status & (4 | 64) == 4);
            if let Some(features) = device.features {
                prop_assert_eq!(features & !device.features(), 0);
                for queue in device.queues.iter().filter(|queue| queue.ready()) {
                    prop_assert!(queue.is_valid(&memory()));
                }
            }
        }
    }

    #[test]
    fn an_active_queue_is_frozen(accesses in prop::collection::vec(access(), 0..100)) {
        let mut guest = Guest::active();
        let before = guest.device.lock().unwrap().queues[0].state();
        let registers = guest.transport.queues.clone();
        for access in accesses {
            if let Access::Write(offset, data) = access {
                let reset = offset == register::STATUS && data == [0; 4];
                if !reset {
                    guest.transport.write(offset, &data);
                }
            }
        }
        prop_assert_eq!(guest.device.lock().unwrap().queues[0].state(), before);
        prop_assert_eq!(&guest.transport.queues, &registers);
    }
}
