//! What the boot parameters say (Documentation/arch/x86/zero-page.rst).

use crate::{MARK, SCENARIO, memory};

/// What is known of the machine at its start.
pub struct Boot {
    /// The end of memory below the device gap.
    pub memory_end: u64,
    cmdline: &'static [u8],
}

impl Boot {
    /// Reads `boot_params`.
    #[must_use]
    pub fn read(at: u64) -> Self {
        let entries = u64::from(memory::read::<u8>(at + 0x1e8)).min(128);
        let end = |entry: u64| {
            let entry = at + 0x2d0 + entry * 20;
            memory::read::<u64>(entry) + memory::read::<u64>(entry + 8)
        };
        let memory_end = (0..entries).map(end).filter(|end| *end <= memory::WINDOWS).max().unwrap_or(0);
        let (text, length) = (memory::read::<u32>(at + 0x228), memory::read::<u32>(at + 0x238));
        // SAFETY: the VMM put the command line there, and nothing writes over it.
        let cmdline =
            unsafe { core::slice::from_raw_parts(text as usize as *const u8, length.min(2048) as usize) };
        Self { memory_end, cmdline }
    }

    /// The scenario's name and number.
    #[must_use]
    pub fn scenario(&self) -> (&'static str, u64) {
        // SAFETY: the array is there; it is read as it was loaded, which the compiler cannot know.
        let image: [u8; 64] = unsafe { core::ptr::read_volatile(&raw const SCENARIO) };
        let written = &SCENARIO[MARK.len()..];
        if image[MARK.len()] != 0 {
            return split(core::hint::black_box(written));
        }
        let words = self.cmdline.split(|byte| *byte == b' ');
        split(words.filter_map(|word| word.strip_prefix(b"hostile=")).next().unwrap_or_default())
    }
}

/// `NAME` or `NAME:NUMBER`, up to the first zero.
fn split(text: &'static [u8]) -> (&'static str, u64) {
    let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
    let mut parts = text.splitn(2, |byte| *byte == b':');
    let name = core::str::from_utf8(parts.next().unwrap_or_default()).unwrap_or("");
    let digits = parts.next().unwrap_or_default();
    let number = digits.iter().fold(0u64, |number, digit| {
        number.wrapping_mul(10).wrapping_add(u64::from(digit.wrapping_sub(b'0')))
    });
    (name, number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scenario_has_a_name_and_maybe_a_number() {
        assert_eq!(split(b"storm"), ("storm", 0));
        assert_eq!(split(b"storm:12"), ("storm", 12));
        assert_eq!(split(b"storm:7\0\0rest"), ("storm", 7));
        assert_eq!(split(b""), ("", 0));
    }
}
