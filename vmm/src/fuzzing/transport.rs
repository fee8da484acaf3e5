//! Registers and ports.

use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{devices, input::Input};
use crate::{
    bus::{Bus, BusDevice},
    console::Console,
    devices::{
        i8042::{self, I8042},
        serial::{self, SerialPort},
        virtio::{
            device::{GuestMemory, Interrupt, VirtioDevice},
            mmio::{MmioTransport, register},
            testing::memory,
            worker::{Port, status},
        },
    },
};

const STEPS: usize = 300;

/// A transport around a device, with no worker: the fuzzer decides when one would run.
pub(super) fn transport(device: Arc<Mutex<dyn VirtioDevice>>, memory: &GuestMemory) -> MmioTransport {
    let interrupt = Arc::new(Interrupt::new(EventFd::new(EFD_NONBLOCK).expect("an eventfd")));
    let port = Port::new("fuzzed".to_owned(), device, interrupt, Arc::new(|_, _| {})).expect("a port");
    MmioTransport::new(Arc::new(port), memory.clone())
}

/// Runs the queues as a worker would, if the device is active; a failing device is reset by its driver.
pub(super) fn work(transport: &mut MmioTransport) {
    let port = Arc::clone(transport.port());
    if port.status() & (status::DRIVER_OK | status::DEVICE_NEEDS_RESET) != status::DRIVER_OK {
        return;
    }
    let outcome = {
        let mut device = port.device();
        (0..port.kicks().len()).try_for_each(|queue| device.queue_event(queue))
    };
    if outcome.is_err() {
        transport.write(register::STATUS, &[0; 4]);
    }
}

pub(super) fn mmio(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let device: Arc<Mutex<dyn VirtioDevice>> = match input.byte() % 3 {
        0 => Arc::new(Mutex::new(devices::new_block())),
        1 => Arc::new(Mutex::new(devices::new_rng())),
        _ => Arc::new(Mutex::new(devices::new_net().0)),
    };
    let memory = memory();
    let mut transport = transport(device, &memory);
    for _ in 0..STEPS {
        let Some(step) = input.next() else { break };
        // Registers are four bytes apart; odd offsets and the rest of the window now and then.
        let offset = match step & 0xc0 {
            0xc0 => u64::from(input.u16() & 0xfff),
            _ => u64::from(step & 0x3f) * 4,
        };
        let how = input.byte();
        let width = [4, 4, 4, 1, 2, 8][usize::from(how & 7) % 6];
        match how >> 6 {
            0 => transport.read(offset, &mut [0; 8][..width]),
            1 => work(&mut transport),
            _ => {
                let value = if how & 8 != 0 { input.u64() } else { u64::from(input.byte()) };
                transport.write(offset, &value.to_le_bytes()[..width]);
            }
        }
    }
    transport.save().expect("saved");
    // Whatever came before, a reset is a reset.
    transport.write(register::STATUS, &[0; 4]);
    let mut status = [0xff; 4];
    transport.read(register::STATUS, &mut status);
    assert_eq!(status, [0; 4]);
}

pub(super) fn ports(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let console = Arc::new(Console::default());
    let line = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
    let mut bus = Bus::default();
    let serial: Arc<dyn BusDevice> = Arc::new(SerialPort::new(line, Arc::clone(&console)));
    bus.insert(serial::PORT, serial::PORTS, serial).expect("a free port");
    bus.insert(i8042::PORT, i8042::PORTS, Arc::new(I8042::new(|| {}))).expect("a free port");
    for _ in 0..STEPS {
        let Some(step) = input.next() else { break };
        let port = match step & 0x70 {
            0x00 => u64::from(input.u16()),
            0x10 => i8042::PORT + u64::from(step & 7),
            _ => serial::PORT + u64::from(step & 15),
        };
        if step & 0x80 == 0 {
            bus.read(port, &mut [0; 8][..usize::from(step & 7) + 1]);
        } else {
            let count = usize::from(input.byte());
            bus.write(port, input.bytes(count));
        }
    }
    let _ = (console.tail(), console.panic());
}
