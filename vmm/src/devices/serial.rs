//! The serial port (16550, COM1): the guest kernel's console. Output only; nothing is ever typed into it.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
};

use vm_superio::{Serial, Trigger, serial::NoEvents};
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
