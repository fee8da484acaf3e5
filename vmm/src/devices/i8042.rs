//! The keyboard controller's one useful wire: the reset line. The guest kernel is booted with `reboot=k`, so
//! this is how it says that it has ended, in order or after a panic.

use crate::bus::BusDevice;

/// First port.
pub const PORT: u64 = 0x60;
/// Number of ports: data at 0x60, status and command at 0x64.
pub const PORTS: u64 = 5;

const COMMAND: u64 = 4;
const PULSE_RESET_LINE: u8 = 0xfe;

/// A keyboard controller without a keyboard.
pub struct I8042<F> {
    on_reset: F,
}

impl<F: Fn() + Send + Sync> I8042<F> {
    /// Calls `on_reset` when the guest pulls the reset line.
    pub fn new(on_reset: F) -> Self {
        Self { on_reset }
    }
}

impl<F: Fn() + Send + Sync> BusDevice for I8042<F> {
    /// Status and data read as zero: no key, and ready for a command.
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset == COMMAND && data == [PULSE_RESET_LINE] {
            (self.on_reset)();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[test]
    fn only_the_reset_command_resets() {
        let resets = AtomicU32::new(0);
        let controller = I8042::new(|| {
            resets.fetch_add(1, Ordering::SeqCst);
        });
        for (offset, data) in [(4, &[0xd1][..]), (0, &[0xfe]), (3, &[0xfe]), (4, &[0xfe, 0xfe]), (4, &[])] {
            controller.write(offset, data);
        }
        assert_eq!(resets.load(Ordering::SeqCst), 0);
        controller.write(4, &[0xfe]);
        assert_eq!(resets.load(Ordering::SeqCst), 1);
        let mut status = [0xff];
        controller.read(4, &mut status);
        assert_eq!(status, [0]);
    }
}
