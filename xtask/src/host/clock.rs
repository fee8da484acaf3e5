//! The rate of this machine's time stamp counter.
//!
//! QEMU's software CPU hands the outer counter on, and the test host's kernel would calibrate it against an
//! emulated timer: on a loaded machine that hangs the boot. So it is told the rate, measured here.

use std::arch::x86_64::_rdtsc;
use std::thread;
use std::time::{Duration, Instant};

/// The counter's rate in kHz, to a few parts in ten thousand.
pub(crate) fn tsc_khz() -> u64 {
    let (start, from) = reading();
    thread::sleep(Duration::from_millis(50));
    let (end, to) = reading();
    let microseconds = (end - start).as_nanos().max(1) / 1000;
    u64::try_from(u128::from(to.wrapping_sub(from)) * 1000 / microseconds.max(1)).unwrap_or(0)
}

/// The clock and the counter at one moment: of several tries the one that was interrupted least.
fn reading() -> (Instant, u64) {
    let attempt = || {
        let before = Instant::now();
        // SAFETY: every x86_64 CPU has the instruction; reading the counter has no effect on memory.
        let counter = unsafe { _rdtsc() };
        (before.elapsed(), before, counter)
    };
    let (_, moment, counter) =
        (0..16).map(|_| attempt()).min_by_key(|(width, _, _)| *width).unwrap_or_else(attempt);
    (moment, counter)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_rate_is_one_a_cpu_can_have() {
        let khz = super::tsc_khz();
        assert!((100_000..20_000_000).contains(&khz), "{khz} kHz");
    }
}
