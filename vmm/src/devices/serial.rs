//! The serial port (16550, COM1): the guest kernel's console. Output only; nothing is ever typed into it.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
};

use serde::{Deserialize, Serialize};
use vm_superio::{Serial, SerialState, Trigger, serial::NoEvents};
use vmm_sys_util::eventfd::EventFd;

use crate::{bus::BusDevice, console::Console};

/// First port of COM1.
pub const PORT: u64 = 0x3f8;
/// Number of ports.
pub const PORTS: u64 = 8;
/// COM1's interrupt line.
pub const IRQ: u32 = 4;

struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

struct Output(Arc<Console>);

impl io::Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// COM1.
pub struct SerialPort {
    uart: Mutex<Serial<Line, NoEvents, Output>>,
}

impl SerialPort {
    /// A port that writes to `console` and interrupts through `irqfd`.
    #[must_use]
    pub fn new(irqfd: EventFd, console: Arc<Console>) -> Self {
        Self { uart: Mutex::new(Serial::new(Line(irqfd), Output(console))) }
    }
}

/// The port's registers as they are saved. It never has input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedSerial {
    divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
}

impl SerialPort {
    /// A port in a saved state; an interrupt that was pending is raised.
    ///
    /// # Errors
    /// The interrupt cannot be raised.
    pub fn restore(saved: &SavedSerial, irqfd: EventFd, console: Arc<Console>) -> io::Result<Self> {
        let [baud_divisor_low, baud_divisor_high] = saved.divisor;
        let state = SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable: saved.interrupt_enable,
            interrupt_identification: saved.interrupt_identification,
            line_control: saved.line_control,
            line_status: saved.line_status,
            modem_control: saved.modem_control,
            modem_status: saved.modem_status,
            scratch: saved.scratch,
            in_buffer: Vec::new(),
        };
        let uart = Serial::from_state(&state, Line(irqfd), NoEvents, Output(console));
        let uart = uart.map_err(|error| io::Error::other(error.to_string()))?;
        Ok(Self { uart: Mutex::new(uart) })
    }

    /// The port's registers.
    #[must_use]
    pub fn save(&self) -> SavedSerial {
        let state = self.uart.lock().unwrap_or_else(PoisonError::into_inner).state();
        SavedSerial {
            divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
        }
    }
}

impl BusDevice for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut uart = self.uart.lock().unwrap_or_else(PoisonError::into_inner);
        for byte in data {
            *byte = u8::try_from(offset).map_or(0xff, |offset| uart.read(offset));
        }
    }

    /// More than one byte comes from a string instruction, which repeats on one port.
    fn write(&self, offset: u64, data: &[u8]) {
        let Ok(offset) = u8::try_from(offset) else { return };
        let mut uart = self.uart.lock().unwrap_or_else(PoisonError::into_inner);
        for byte in data {
            // An interrupt that cannot be raised is pending already.
            let _ = uart.write(offset, *byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    #[test]
    fn bytes_reach_the_console() {
        let console = Arc::new(Console::default());
        let port = SerialPort::new(EventFd::new(EFD_NONBLOCK).unwrap(), Arc::clone(&console));
        port.write(0, b"hello");
        port.write(3, &[0x80]);
        port.write(0, b"divisor, not data");
        assert_eq!(console.tail(), "hello");
    }

    #[test]
    fn a_restored_port_goes_on_and_keeps_its_interrupt() {
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let port = SerialPort::new(line.try_clone().unwrap(), Arc::default());
        port.write(7, &[0x5a]);
        port.write(1, &[0x02]);
        line.read().unwrap();
        let console = Arc::new(Console::default());
        let again =
            SerialPort::restore(&port.save(), line.try_clone().unwrap(), Arc::clone(&console)).unwrap();
        assert!(line.read().is_ok(), "the interrupt is pending still");
        let mut scratch = [0];
        again.read(7, &mut scratch);
        again.write(0, b"hello");
        assert_eq!((scratch, console.tail().as_str()), ([0x5a], "hello"));
    }

    #[test]
    fn the_transmitter_is_always_ready_and_interrupts_when_asked() {
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let port = SerialPort::new(line.try_clone().unwrap(), Arc::new(Console::default()));
        let mut status = [0];
        port.read(5, &mut status);
        assert_eq!(status[0] & 0x60, 0x60);
        assert!(line.read().is_err());
        port.write(1, &[0x02]);
        assert!(line.read().is_ok());
    }
}
