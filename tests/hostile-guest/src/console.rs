//! The serial port, for lines that the test reads.

use core::fmt::{self, Write};

use crate::cpu;

/// COM1.
pub const PORT: u16 = 0x3f8;

/// Collects text, so that a line is one string instruction and few exits.
struct Line {
    bytes: [u8; 512],
    length: usize,
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if let Some(slot) = self.bytes.get_mut(self.length) {
                *slot = byte;
                self.length += 1;
            }
        }
        Ok(())
    }
}

/// Prints `hostile: ` and a line.
pub fn line(text: fmt::Arguments<'_>) {
    let mut line = Line { bytes: [0; 512], length: 0 };
    // Too much text is cut.
    let _ = write!(line, "hostile: {text}");
    cpu::out_string(PORT, line.bytes.get(..line.length).unwrap_or_default());
    cpu::out8(PORT, b'\n');
}
