//! The image's entry: what a kernel finds when the VMM enters it, and what is left when it panics.

#![no_std]
#![no_main]

use core::{
    arch::{asm, global_asm},
    panic::PanicInfo,
};

use bulkhead_hostile_guest::{console, cpu, run};

// Interrupts are off and stay off. SSE is switched on first, since the compiler uses it for copies.
global_asm!(
    ".section .text._start, \"ax\"",
    ".globl _start",
    "_start:",
    "cli",
    "mov rax, cr4",
    "or rax, 0x600",
    "mov cr4, rax",
    "mov rax, cr0",
    "and rax, -5",
    "or rax, 2",
    "mov cr0, rax",
    "lea rsp, [rip + {stack} + {size}]",
    "mov rdi, rsi",
    "call {main}",
    "2:",
    "hlt",
    "jmp 2b",
    stack = sym STACK,
    size = const STACK_SIZE,
    main = sym main,
);

const STACK_SIZE: usize = 64 << 10;

#[repr(align(16))]
struct Stack(#[allow(dead_code, reason = "only the stack pointer knows it")] [u8; STACK_SIZE]);

static mut STACK: Stack = Stack([0; STACK_SIZE]);

extern "C" fn main(boot_params: u64) -> ! {
    run(boot_params)
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    console::line(format_args!("FAILED: {}", info.message()));
    cpu::power_off()
}

// What the compiler calls for copies and the like: there is no C library here.

/// # Safety
/// As C's.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    // SAFETY: the caller's.
    unsafe { asm!("rep movsb", inout("rdi") to => _, inout("rsi") from => _, inout("rcx") count => _) }
    to
}

/// # Safety
/// As C's.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= count {
        // SAFETY: the caller's; the ends do not overlap in the way of an ascending copy.
        return unsafe { memcpy(to, from, count) };
    }
    // SAFETY: the caller's; backwards, and the direction is as it was afterwards.
    unsafe {
        asm!(
            "std",
            "rep movsb",
            "cld",
            inout("rdi") to.wrapping_add(count).wrapping_sub(1) => _,
            inout("rsi") from.wrapping_add(count).wrapping_sub(1) => _,
            inout("rcx") count => _,
        );
    }
    to
}

/// # Safety
/// As C's.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, count: usize) -> *mut u8 {
    // SAFETY: the caller's.
    unsafe { asm!("rep stosb", inout("rdi") to => _, in("al") byte as u8, inout("rcx") count => _) }
    to
}

/// # Safety
/// As C's.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, count: usize) -> i32 {
    for index in 0..count {
        // SAFETY: the caller's.
        let (a, b) =
            unsafe { (a.wrapping_add(index).read_volatile(), b.wrapping_add(index).read_volatile()) };
        if a != b {
            return i32::from(a) - i32::from(b);
        }
    }
    0
}

/// # Safety
/// As C's.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, count: usize) -> i32 {
    // SAFETY: the caller's.
    unsafe { memcmp(a, b, count) }
}
