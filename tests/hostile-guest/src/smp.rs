//! Other processors.

use core::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};

use crate::{cpu, memory};

/// The local APIC.
pub const LAPIC: u64 = 0xfee0_0000;
/// The I/O APIC.
pub const IOAPIC: u64 = 0xfec0_0000;

const TRAMPOLINE: u64 = 0x8000;
const DATA: u64 = 0x8800;
const MOST: usize = 3;
const STACK: usize = 16 << 10;

#[repr(align(16))]
struct Stacks(#[allow(dead_code, reason = "only the stack pointers know it")] [u8; STACK * (MOST + 1)]);

static mut STACKS: Stacks = Stacks([0; STACK * (MOST + 1)]);

static WORK: AtomicUsize = AtomicUsize::new(0);
static RUNNING: AtomicU32 = AtomicU32::new(0);
static STOP: AtomicBool = AtomicBool::new(false);

// SAFETY: labels of the trampoline in `cpu`; only their addresses are used.
unsafe extern "C" {
    static hostile_trampoline: u8;
    static hostile_trampoline_end: u8;
}

/// Starts every other processor on `work`, which is called again and again until [`stop`]; gives their number once
/// `wanted` run.
pub fn start(work: fn(u32), wanted: u32) {
    WORK.store(work as usize, Ordering::SeqCst);
    let begin = &raw const hostile_trampoline as u64;
    let length = &raw const hostile_trampoline_end as u64 - begin;
    for offset in 0..length {
        memory::write::<u8>(TRAMPOLINE + offset, memory::read(begin + offset));
    }
    memory::write(DATA, cpu::page_tables() as u32);
    memory::write(DATA + 4, 0u32);
    memory::write(DATA + 8, entry as *const () as u64);
    memory::write(DATA + 16, &raw mut STACKS as u64);
    memory::write(DATA + 24, 31u16);
    memory::write(DATA + 26, DATA as u32 + 32);
    for (index, segment) in (0..).zip([0u64, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff]) {
        memory::write(DATA + 32 + index * 8, segment);
    }
    // INIT, then start-up at page 8, to all but this one.
    cpu::store(LAPIC + 0xf0, 4, 0x1ff);
    cpu::store(LAPIC + 0x300, 4, 0xc_4500);
    cpu::store(LAPIC + 0x300, 4, 0xc_4608);
    while RUNNING.load(Ordering::SeqCst) < wanted {
        cpu::relax();
    }
}

/// Lets the other processors end what they do and waits until they have.
pub fn stop() {
    STOP.store(true, Ordering::SeqCst);
    while RUNNING.load(Ordering::SeqCst) > 0 {
        cpu::relax();
    }
}

extern "C" fn entry(index: u32) -> ! {
    RUNNING.fetch_add(1, Ordering::SeqCst);
    let work = WORK.load(Ordering::SeqCst);
    // SAFETY: `start` put a function of this type there before this processor was started.
    let work = unsafe { core::mem::transmute::<usize, fn(u32)>(work) };
    while !STOP.load(Ordering::SeqCst) {
        work(index);
    }
    RUNNING.fetch_sub(1, Ordering::SeqCst);
    cpu::halt()
}
