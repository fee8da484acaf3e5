//! Which CPU an emulator runs on. QEMU 7.2 changes `interrupt_request` in VMRUN and #VMEXIT without its lock, by one
//! instruction that is not atomic between CPUs. What a device's thread had just asked for is lost then, though the
//! virtual CPU is told to look: it stands still. It may also deliver the interrupt that a guest was given last once more,
//! with interrupts off: that is what the stack of a rare panic looked like (`hrtimer_interrupt` before `hres_active`),
//! which nobody has made happen at will. On one CPU there is no "between": all threads of an emulator get the same one.

use std::fs;
use std::sync::{Mutex, PoisonError};

use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_getaffinity};

/// As the kernel shortens the name.
const EMULATOR: &str = "qemu-system-x86";

/// Two that start at the same time would both find the same CPU free.
static CHOICE: Mutex<()> = Mutex::new(());

/// Starts something on the CPU on which the fewest emulators run. It is given none where that is not to be found out.
pub(super) fn on_a_cpu<T>(start: impl FnOnce(Option<CpuSet>) -> T) -> T {
    let _choosing = CHOICE.lock().unwrap_or_else(PoisonError::into_inner);
    start(choose())
}

fn choose() -> Option<CpuSet> {
    let allowed = sched_getaffinity(None).ok()?;
    let taken: Vec<usize> =
        emulators().filter_map(|pid| only_cpu(&sched_getaffinity(Some(pid)).ok()?)).collect();
    let cpu = quietest(&cpus(&allowed), &taken)?;
    let mut chosen = CpuSet::new();
    chosen.set(cpu);
    Some(chosen)
}

fn emulators() -> impl Iterator<Item = Pid> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes.filter_map(|process| {
        let pid = Pid::from_raw(process.file_name().to_str()?.parse().ok()?)?;
        let name = fs::read_to_string(process.path().join("comm")).ok()?;
        (name.trim_end() == EMULATOR).then_some(pid)
    })
}

fn cpus(set: &CpuSet) -> Vec<usize> {
    (0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).collect()
}

fn only_cpu(set: &CpuSet) -> Option<usize> {
    match cpus(set)[..] {
        [cpu] => Some(cpu),
        _ => None,
    }
}

fn quietest(allowed: &[usize], taken: &[usize]) -> Option<usize> {
    allowed.iter().copied().min_by_key(|cpu| taken.iter().filter(|taken| *taken == cpu).count())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_with_the_fewest_emulators_is_chosen() {
        assert_eq!(quietest(&[0, 1, 2], &[]), Some(0));
        assert_eq!(quietest(&[0, 1, 2], &[0, 1, 0]), Some(2));
        assert_eq!(quietest(&[2, 3], &[2, 0, 0]), Some(3));
        assert_eq!(quietest(&[], &[1]), None);
    }
}
