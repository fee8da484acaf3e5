//! The virtio-mmio transport, version 2 (virtio 1.3, section 4.2).
//!
//! ```text
//!  status 0 ─ACKNOWLEDGE, DRIVER─▶ features are written ─FEATURES_OK─▶ queues are set up ─DRIVER_OK─▶ active
//!     ▲                                  (refused: the bit stays clear)       │ invalid queue,        │
//!     │                                                                       ▼ device error          ▼
//!     └──────────────── status 0 is written ◀───────────────────────── DEVICE_NEEDS_RESET ◀───────────┘
//! ```
//!
//! The driver is not trusted. A register can be written only in the state that it belongs to: features before
//! FEATURES_OK, a queue's registers between FEATURES_OK and DRIVER_OK and only while that queue is not ready;
//! every other write is ignored. So what a device got at its activation is what was validated. Registers take
//! accesses of four aligned bytes; any other width reads as zeroes and writes nothing.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

use super::{
    device::{
        Activation, DeviceError, GuestMemory, Resources, VIRTIO_F_VERSION_1, VIRTIO_RING_F_EVENT_IDX,
        VirtioDevice,
    },
    worker::{Port, status},
};
use crate::recorder::Rare;

/// Bytes of address space that a device takes.
pub const WINDOW: u64 = 0x1000;

/// Register offsets (virtio 1.3, table 4.1).
pub mod register {
    #![allow(missing_docs)]
    pub const MAGIC: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_ID: u64 = 0x008;
    pub const VENDOR_ID: u64 = 0x00c;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub const QUEUE_SEL: u64 = 0x030;
    pub const QUEUE_SIZE_MAX: u64 = 0x034;
    pub const QUEUE_SIZE: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_STATUS: u64 = 0x060;
    pub const INTERRUPT_ACK: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESC_LOW: u64 = 0x080;
    pub const QUEUE_DESC_HIGH: u64 = 0x084;
    pub const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x094;
    pub const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
    pub const SHM_SEL: u64 = 0x0ac;
    pub const SHM_LEN_LOW: u64 = 0x0b0;
    pub const SHM_LEN_HIGH: u64 = 0x0b4;
    pub const SHM_BASE_LOW: u64 = 0x0b8;
    pub const SHM_BASE_HIGH: u64 = 0x0bc;
    pub const CONFIG_GENERATION: u64 = 0x0fc;
    pub const CONFIG: u64 = 0x100;
}

const MAGIC_VALUE: u32 = 0x7472_6976;
const VERSION_2: u32 = 2;
/// "BLKH"
const VENDOR: u32 = 0x484b_4c42;

/// How much of the configuration space is compared to notice a change: more than any device has.
const CONFIG_COMPARED: usize = 256;

/// What the driver has written about one queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct QueueRegisters {
    size: u32,
    ready: bool,
    descriptors: u64,
    driver: u64,
    device: u64,
}

impl QueueRegisters {
    const RESET: Self = Self { size: 0, ready: false, descriptors: 0, driver: 0, device: 0 };

    /// The queue as a device gets it: checked whole, since no later write can change it.
    fn validate(&self, max_size: u16, event_idx: bool, memory: &GuestMemory) -> Result<Queue, String> {
        let mut queue = Queue::new(max_size).map_err(|error| error.to_string())?;
        if !self.ready {
            return Ok(queue);
        }
        let size = u16::try_from(self.size).unwrap_or(0);
        queue.try_set_size(size).map_err(|_| format!("size {} of at most {max_size}", self.size))?;
        for (outcome, ring, address) in [
            (
                queue.try_set_desc_table_address(GuestAddress(self.descriptors)),
                "descriptor",
                self.descriptors,
            ),
            (queue.try_set_avail_ring_address(GuestAddress(self.driver)), "driver", self.driver),
            (queue.try_set_used_ring_address(GuestAddress(self.device)), "device", self.device),
        ] {
            outcome.map_err(|_| format!("{ring} area at {address:#x} is not aligned"))?;
        }
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        // virtio-queue takes a driver area at 0 for a queue that was never set up.
        if self.driver == 0 || !queue.is_valid(memory) {
            return Err(format!(
                "areas at {:#x}, {:#x}, {:#x} are not in guest memory",
                self.descriptors, self.driver, self.device
            ));
        }
        Ok(queue)
    }
}

/// One device's registers.
pub struct MmioTransport {
    port: Arc<Port>,
    memory: GuestMemory,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    queues: Vec<QueueRegisters>,
    shm_sel: u32,
    /// Configuration space as it was when the driver last looked at its generation.
    config_seen: Option<Box<[u8; CONFIG_COMPARED]>>,
    config_generation: u32,
}

impl MmioTransport {
    /// The transport of the device behind `port`, freshly reset.
    #[must_use]
    pub fn new(port: Arc<Port>, memory: GuestMemory) -> Self {
        let queues = vec![QueueRegisters::RESET; port.kicks().len()];
        Self {
            port,
            memory,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            queues,
            shm_sel: 0,
            config_seen: None,
            config_generation: 0,
        }
    }

    /// The device behind it.
    #[must_use]
    pub fn port(&self) -> &Arc<Port> {
        &self.port
    }

    /// A read of the guest at `offset` into the window.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(offset) = offset.checked_sub(register::CONFIG) {
            let device = self.port.device();
            if self.config_seen.is_none() {
                self.config_seen = Some(config_of(&*device));
            }
            device.read_config(offset, data);
        } else if let Ok(data) = <&mut [u8; 4]>::try_from(data)
            && offset.is_multiple_of(4)
        {
            *data = self.read_register(offset).to_le_bytes();
        }
    }

    /// A write of the guest at `offset` into the window.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(register::CONFIG) {
            if self.port.status() & status::DRIVER != 0 {
                self.port.device().write_config(offset, data);
            }
        } else if let Ok(data) = <[u8; 4]>::try_from(data)
            && offset.is_multiple_of(4)
        {
            self.write_register(offset, u32::from_le_bytes(data));
        }
    }

    fn read_register(&mut self, offset: u64) -> u32 {
        match offset {
            register::MAGIC => MAGIC_VALUE,
            register::VERSION => VERSION_2,
            register::DEVICE_ID => {
                let device = self.port.device();
                if device.present() { device.device_type() as u32 } else { 0 }
            }
            register::VENDOR_ID => VENDOR,
            register::DEVICE_FEATURES => half(self.port.device().features(), self.device_features_sel),
            register::QUEUE_SIZE_MAX => {
                let queue = usize::try_from(self.queue_sel).unwrap_or(usize::MAX);
                self.port.device().queue_max_sizes().get(queue).map_or(0, |size| u32::from(*size))
            }
            register::QUEUE_READY => usize::try_from(self.queue_sel)
                .ok()
                .and_then(|queue| self.queues.get(queue))
                .map_or(0, |queue| u32::from(queue.ready)),
            register::INTERRUPT_STATUS => self.port.interrupt().look(),
            register::STATUS => self.port.status(),
            register::SHM_LEN_LOW => half(self.shared_memory().1, 0),
            register::SHM_LEN_HIGH => half(self.shared_memory().1, 1),
            register::SHM_BASE_LOW => half(self.shared_memory().0, 0),
            register::SHM_BASE_HIGH => half(self.shared_memory().0, 1),
            register::CONFIG_GENERATION => self.generation(),
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            register::DEVICE_FEATURES_SEL => self.device_features_sel = value,
            register::DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            register::DRIVER_FEATURES => self.write_features(value),
            register::QUEUE_SEL => self.queue_sel = value,
            register::QUEUE_NOTIFY => self.port.kick(usize::try_from(value).unwrap_or(usize::MAX)),
            register::INTERRUPT_ACK => self.port.interrupt().acknowledge(value),
            register::STATUS => self.write_status(value),
            register::SHM_SEL => self.shm_sel = value,
            register::QUEUE_SIZE
            | register::QUEUE_READY
            | register::QUEUE_DESC_LOW
            | register::QUEUE_DESC_HIGH
            | register::QUEUE_DRIVER_LOW
            | register::QUEUE_DRIVER_HIGH
            | register::QUEUE_DEVICE_LOW
            | register::QUEUE_DEVICE_HIGH => self.write_queue(offset, value),
            _ => {}
        }
    }

    /// Address and length of the selected region; all ones when there is none (virtio 1.3, 4.2.2).
    fn shared_memory(&self) -> (u64, u64) {
        let region = u8::try_from(self.shm_sel).ok().and_then(|id| self.port.device().shared_memory(id));
        region.unwrap_or((u64::MAX, u64::MAX))
    }

    /// ConfigGeneration. A device does not count its changes: what the driver could have read before is
    /// compared with what it would read now.
    fn generation(&mut self) -> u32 {
        let now = config_of(&*self.port.device());
        if let Some(seen) = self.config_seen.replace(now)
            && Some(&seen) != self.config_seen.as_ref()
        {
            self.config_generation = self.config_generation.wrapping_add(1);
        }
        self.config_generation
    }

    fn write_features(&mut self, value: u32) {
        if self.port.status() & (status::DRIVER | status::FEATURES_OK) != status::DRIVER {
            return;
        }
        match self.driver_features_sel {
            0 => self.driver_features = (self.driver_features & !0xffff_ffff) | u64::from(value),
            1 => self.driver_features = (self.driver_features & 0xffff_ffff) | (u64::from(value) << 32),
            _ => {}
        }
    }

    fn write_queue(&mut self, offset: u64, value: u32) {
        let setting_up = self.port.status()
            & (status::FEATURES_OK | status::DRIVER_OK | status::DEVICE_NEEDS_RESET | status::FAILED)
            == status::FEATURES_OK;
        let queue = usize::try_from(self.queue_sel).ok().and_then(|queue| self.queues.get_mut(queue));
        let Some(queue) = queue.filter(|_| setting_up) else { return };
        match offset {
            register::QUEUE_READY => queue.ready = value == 1,
            _ if queue.ready => {}
            register::QUEUE_SIZE => queue.size = value,
            register::QUEUE_DESC_LOW => set_half(&mut queue.descriptors, 0, value),
            register::QUEUE_DESC_HIGH => set_half(&mut queue.descriptors, 1, value),
            register::QUEUE_DRIVER_LOW => set_half(&mut queue.driver, 0, value),
            register::QUEUE_DRIVER_HIGH => set_half(&mut queue.driver, 1, value),
            register::QUEUE_DEVICE_LOW => set_half(&mut queue.device, 0, value),
            register::QUEUE_DEVICE_HIGH => set_half(&mut queue.device, 1, value),
            _ => {}
        }
    }

    /// The driver adds bits in order; it cannot take one back but by a reset.
    fn write_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        let old = self.port.status();
        let added = value & !old;
        if old & !value & !status::DEVICE_NEEDS_RESET != 0 {
            return;
        }
        self.port.set_status(added & (status::ACKNOWLEDGE | status::FAILED));
        if added & status::DRIVER != 0 && self.port.status() & status::ACKNOWLEDGE != 0 {
            self.port.set_status(status::DRIVER);
        }
        if added & status::FEATURES_OK != 0
            && self.port.status() & status::DRIVER != 0
            && self.features_acceptable()
        {
            self.port.set_status(status::FEATURES_OK);
        }
        let ready = status::FEATURES_OK | status::DRIVER_OK | status::DEVICE_NEEDS_RESET | status::FAILED;
        if added & status::DRIVER_OK != 0 && old & ready == status::FEATURES_OK {
            self.activate();
        } else {
            self.port.place().rare(Rare::Status(value));
        }
    }

    fn features_acceptable(&self) -> bool {
        let offered = self.port.device().features();
        self.driver_features & !offered == 0 && self.driver_features & VIRTIO_F_VERSION_1 != 0
    }

    fn activate(&mut self) {
        let port = Arc::clone(&self.port);
        let mut device = port.device();
        let outcome = self
            .validated_queues(device.queue_max_sizes())
            .map(|queues| Activation { features: self.driver_features, queues, resources: self.resources() })
            .and_then(|activation| device.activate(activation));
        port.set_status(status::DRIVER_OK);
        port.place().rare(Rare::Activated(self.driver_features));
        if let Err(error) = outcome {
            port.fail(&error);
        } else if self.config_seen.as_ref().is_some_and(|seen| *seen != config_of(&*device)) {
            // It changed after the driver had read it, when the device had no interrupt to say so.
            port.interrupt().config_changed();
        }
    }

    fn validated_queues(&self, max_sizes: &[u16]) -> Result<Vec<Queue>, DeviceError> {
        let event_idx = self.driver_features & VIRTIO_RING_F_EVENT_IDX != 0;
        let validated =
            self.queues.iter().zip(max_sizes).enumerate().map(|(index, (registers, max_size))| {
                registers
                    .validate(*max_size, event_idx, &self.memory)
                    .map_err(|message| DeviceError::Queue { queue: index, message })
            });
        validated.collect()
    }

    fn resources(&self) -> Resources {
        Resources { memory: self.memory.clone(), interrupt: Arc::clone(self.port.interrupt()) }
    }

    fn reset(&mut self) {
        let port = Arc::clone(&self.port);
        let mut device = port.device();
        device.reset();
        port.count_reset();
        port.replace_status(0);
        port.interrupt().acknowledge(u32::MAX);
        self.driver_features = 0;
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.queue_sel = 0;
        self.shm_sel = 0;
        self.queues.fill(QueueRegisters::RESET);
        self.config_seen = None;
    }

    /// The registers and, inside, the device's own state. Called only while every vCPU is paused.
    ///
    /// # Errors
    /// The device cannot be saved now.
    pub fn save(&self) -> Result<SavedTransport, DeviceError> {
        self.save_locked(&*self.port.device())
    }

    /// [`MmioTransport::save`] where the device is locked already.
    ///
    /// # Errors
    /// The device cannot be saved now.
    pub fn save_locked(&self, device: &dyn VirtioDevice) -> Result<SavedTransport, DeviceError> {
        Ok(SavedTransport {
            device_type: device.device_type() as u32,
            status: self.port.status(),
            interrupt_status: self.port.interrupt().status(),
            selectors: [self.device_features_sel, self.driver_features_sel, self.queue_sel, self.shm_sel],
            driver_features: self.driver_features,
            queues: self.queues.clone(),
            config_generation: self.config_generation,
            device: device.save()?,
        })
    }

    /// Brings a fresh transport and its device to a saved state. What may have been pending then is made
    /// pending again: the queues are kicked, the interrupt is raised.
    ///
    /// # Errors
    /// The state is of another kind of device, is impossible, or the device refuses its part.
    pub fn restore(&mut self, saved: &SavedTransport) -> Result<(), DeviceError> {
        let port = Arc::clone(&self.port);
        let mut device = port.device();
        if saved.device_type != device.device_type() as u32 || saved.queues.len() != self.queues.len() {
            return Err(DeviceError::Invalid("the saved state is of another device".to_owned()));
        }
        if saved.driver_features & !device.features() != 0 {
            return Err(DeviceError::Invalid("the saved features are not offered".to_owned()));
        }
        device.restore(&saved.device, self.resources())?;
        [self.device_features_sel, self.driver_features_sel, self.queue_sel, self.shm_sel] = saved.selectors;
        self.driver_features = saved.driver_features;
        self.queues.clone_from(&saved.queues);
        // The configuration may differ from what the driver has seen in its former life.
        self.config_seen = None;
        self.config_generation = saved.config_generation.wrapping_add(1);
        port.replace_status(saved.status);
        port.interrupt().restore(saved.interrupt_status);
        if saved.status & status::DRIVER_OK != 0 {
            (0..port.kicks().len()).for_each(|queue| port.kick(queue));
        }
        Ok(())
    }
}

/// A transport and its device as they are saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedTransport {
    device_type: u32,
    status: u32,
    interrupt_status: u32,
    selectors: [u32; 4],
    driver_features: u64,
    queues: Vec<QueueRegisters>,
    config_generation: u32,
    device: Vec<u8>,
}

fn config_of(device: &(impl VirtioDevice + ?Sized)) -> Box<[u8; CONFIG_COMPARED]> {
    let mut config = Box::new([0; CONFIG_COMPARED]);
    device.read_config(0, &mut *config);
    config
}

/// The low (0) or high (1) word of a 64-bit value; 0 for any other selector.
fn half(value: u64, selector: u32) -> u32 {
    match selector {
        0 => (value & 0xffff_ffff) as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_half(value: &mut u64, selector: u32, word: u32) {
    *value = match selector {
        0 => (*value & !0xffff_ffff) | u64::from(word),
        _ => (*value & 0xffff_ffff) | (u64::from(word) << 32),
    };
}

#[cfg(test)]
#[path = "mmio_tests.rs"]
mod tests;
