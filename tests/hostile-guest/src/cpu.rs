//! Instructions: ports, device memory by width, model-specific registers, and the ends that a machine can come to.

use core::arch::{asm, global_asm, naked_asm};

use crate::memory;

/// Nothing but this is mapped: the first 8 GiB, each address to itself.
const MAPPED_GIB: u64 = 8;

#[repr(align(4096))]
struct Tables(#[allow(dead_code, reason = "written by address")] [[u64; 512]; 2 + MAPPED_GIB as usize]);

static mut TABLES: Tables = Tables([[0; 512]; 2 + MAPPED_GIB as usize]);

#[repr(align(16))]
struct Idt(#[allow(dead_code, reason = "written by address")] [u64; 64]);

static mut IDT: Idt = Idt([0; 64]);

/// Where a trap goes on: instruction and stack pointer. Zero: nowhere.
static mut RECOVER: [u64; 2] = [0; 2];

#[repr(C, packed)]
struct Pointer {
    limit: u16,
    base: u64,
}

/// Maps all of the address space that matters, and catches traps.
pub fn take_over() {
    let tables = &raw mut TABLES as u64;
    let table = |index: u64| tables + index * 4096;
    memory::write(table(0), table(1) | 3);
    for gib in 0..MAPPED_GIB {
        memory::write(table(1) + gib * 8, table(2 + gib) | 3);
        for entry in 0..512 {
            memory::write(table(2 + gib) + entry * 8, (gib << 30) | (entry << 21) | 0x83);
        }
    }
    let idt = &raw mut IDT as u64;
    let handler = trap as *const () as u64;
    for vector in 0..32 {
        // A 64-bit interrupt gate into the VMM's own code segment.
        let low = (handler & 0xffff) | (0x10 << 16) | (0x8e00 << 32) | ((handler & 0xffff_0000) << 32);
        memory::write(idt + vector * 16, low);
        memory::write(idt + vector * 16 + 8, handler >> 32);
    }
    let pointer = Pointer { limit: 32 * 16 - 1, base: idt };
    // SAFETY: the tables map everything that was mapped before to the same place, and live for ever.
    unsafe {
        asm!("mov cr3, {}", in(reg) tables);
        asm!("lidt [{}]", in(reg) &raw const pointer);
    }
}

/// The physical address of the page tables, for other processors.
#[must_use]
pub fn page_tables() -> u64 {
    &raw mut TABLES as u64
}

/// Any exception: goes on at [`RECOVER`], or pulls the reset line after a word on the console.
// SAFETY: the body never returns; it finds its stack in RECOVER or aligns the one it was entered on.
#[unsafe(naked)]
extern "C" fn trap() {
    naked_asm!(
        "cmp qword ptr [rip + {recover}], 0",
        "je 2f",
        "mov rsp, [rip + {recover} + 8]",
        "jmp qword ptr [rip + {recover}]",
        "2:",
        "and rsp, -16",
        "call {fatal}",
        recover = sym RECOVER,
        fatal = sym fatal,
    )
}

extern "C" fn fatal() -> ! {
    panic!("an exception")
}

/// Runs one instruction that may trap; whether it did not.
macro_rules! guarded {
    ($instruction:literal, $($operands:tt)*) => {{
        let done: u64;
        // SAFETY: a trap goes on at the label with the stack as it was; registers are those of the operands.
        unsafe {
            asm!(
                "lea {done}, [rip + 2f]",
                "mov [rip + {recover}], {done}",
                "mov [rip + {recover} + 8], rsp",
                "mov {done:e}, 0",
                $instruction,
                "mov {done:e}, 1",
                "2:",
                "mov qword ptr [rip + {recover}], 0",
                done = out(reg) done,
                recover = sym RECOVER,
                $($operands)*
            );
        }
        done == 1
    }};
}

/// Writes a model-specific register; false where that is refused.
pub fn write_msr(msr: u32, value: u64) -> bool {
    guarded!("wrmsr", in("ecx") msr, in("eax") value as u32, in("edx") (value >> 32) as u32)
}

/// Reads a model-specific register, for its side effects; false where that is refused.
pub fn read_msr(msr: u32) -> bool {
    guarded!("rdmsr", in("ecx") msr, out("eax") _, out("edx") _)
}

/// Calls the hypervisor; false where there is no such instruction.
pub fn hypercall(number: u64, argument: u64) -> bool {
    guarded!(
        "vmmcall",
        inout("rax") number => _,
        in("rcx") argument,
        in("rdx") argument,
        in("rsi") argument
    )
}

/// `out`.
pub fn out8(port: u16, value: u8) {
    // SAFETY: a port access touches no memory.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack)) }
}

/// `out` of two bytes.
pub fn out16(port: u16, value: u16) {
    // SAFETY: as for `out8`.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nomem, nostack)) }
}

/// `out` of four bytes.
pub fn out32(port: u16, value: u32) {
    // SAFETY: as for `out8`.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack)) }
}

/// `in`.
#[must_use]
pub fn in8(port: u16) -> u8 {
    let value;
    // SAFETY: as for `out8`.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack)) }
    value
}

/// `in` of two bytes.
#[must_use]
pub fn in16(port: u16) -> u16 {
    let value;
    // SAFETY: as for `out8`.
    unsafe { asm!("in ax, dx", in("dx") port, out("ax") value, options(nomem, nostack)) }
    value
}

/// `in` of four bytes.
#[must_use]
pub fn in32(port: u16) -> u32 {
    let value;
    // SAFETY: as for `out8`.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack)) }
    value
}

/// `rep outsb`.
pub fn out_string(port: u16, bytes: &[u8]) {
    // SAFETY: the instruction reads the slice's bytes and nothing else.
    unsafe {
        asm!(
            "rep outsb",
            in("dx") port,
            inout("rsi") bytes.as_ptr() => _,
            inout("rcx") bytes.len() => _,
            options(nostack)
        );
    }
}

/// `rep insd` into the buffers.
pub fn in_string32(port: u16, address: u64, count: u64) {
    // SAFETY: the instruction writes plain memory of the buffers, which nothing refers to.
    unsafe {
        asm!("rep insd", in("dx") port, inout("rdi") address => _, inout("rcx") count => _, options(nostack));
    }
}

/// One load of this width in bytes (1, 2, 4, 8; 16 through a vector register) from a device.
pub fn load(address: u64, width: u64) -> u64 {
    let value: u64;
    // SAFETY: a device's registers are not memory of this program.
    unsafe {
        match width {
            1 => asm!("movzx {v:e}, byte ptr [{a}]", a = in(reg) address, v = out(reg) value),
            2 => asm!("movzx {v:e}, word ptr [{a}]", a = in(reg) address, v = out(reg) value),
            4 => asm!("mov {v:e}, [{a}]", a = in(reg) address, v = out(reg) value),
            8 => asm!("mov {v}, [{a}]", a = in(reg) address, v = out(reg) value),
            _ => {
                asm!("movdqu {x}, [{a}]", a = in(reg) address, x = out(xmm_reg) _);
                value = 0;
            }
        }
    }
    value
}

/// One store of this width, as for [`load`].
pub fn store(address: u64, width: u64, value: u64) {
    // SAFETY: as for `load`.
    unsafe {
        match width {
            1 => asm!("mov [{a}], {v}", a = in(reg) address, v = in(reg_byte) value as u8),
            2 => asm!("mov [{a}], {v:x}", a = in(reg) address, v = in(reg) value),
            4 => asm!("mov [{a}], {v:e}", a = in(reg) address, v = in(reg) value),
            8 => asm!("mov [{a}], {v}", a = in(reg) address, v = in(reg) value),
            _ => {
                asm!("movq {x}, {v}", "movdqu [{a}], {x}", a = in(reg) address, v = in(reg) value, x = out(xmm_reg) _);
            }
        }
    }
}

/// Waits a little, as a polling processor should.
pub fn relax() {
    core::hint::spin_loop();
}

/// Ends the machine in order.
pub fn power_off() -> ! {
    out8(0x64, 0xfe);
    halt()
}

/// Stops this processor for good.
pub fn halt() -> ! {
    loop {
        // SAFETY: interrupts are off; nothing goes on.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) }
    }
}

/// A fault with no table to handle it.
pub fn triple_fault() -> ! {
    let pointer = Pointer { limit: 0, base: 0 };
    // SAFETY: ends the machine, as is meant.
    unsafe { asm!("lidt [{}]", "ud2", in(reg) &raw const pointer, options(noreturn)) }
}

/// Goes on at an address, whatever is there.
pub fn jump(address: u64) -> ! {
    // SAFETY: ends the machine or this program, as is meant.
    unsafe { asm!("jmp {}", in(reg) address, options(noreturn)) }
}

// Where other processors begin, in real mode at 0x8000: straight into long mode with the tables of the first. What they
// need lies at 0x8800, put there by `smp::start`: tables, number begun, entry, stacks, a pointer to the GDT.
global_asm!(
    ".section .text.trampoline, \"ax\"",
    ".globl hostile_trampoline",
    ".globl hostile_trampoline_end",
    ".code16",
    "hostile_trampoline:",
    "cli",
    "xor ax, ax",
    "mov ds, ax",
    "mov eax, cr4",
    "or eax, 0x620",
    "mov cr4, eax",
    "mov eax, dword ptr [0x8800]",
    "mov cr3, eax",
    "mov ecx, 0xc0000080",
    "rdmsr",
    "or eax, 0x100",
    "wrmsr",
    "lgdt [0x8818]",
    "mov eax, cr0",
    "and eax, 0x9ffffffb",
    "or eax, 0x80000003",
    "mov cr0, eax",
    ".byte 0x66, 0xea",
    ".long 0x8000 + hostile_trampoline_long - hostile_trampoline",
    ".word 0x10",
    ".code64",
    "hostile_trampoline_long:",
    "mov ax, 0x18",
    "mov ds, ax",
    "mov es, ax",
    "mov ss, ax",
    "mov eax, 1",
    "lock xadd dword ptr [0x8804], eax",
    "mov edi, eax",
    "inc eax",
    "shl rax, 14",
    "mov rsp, qword ptr [0x8810]",
    "add rsp, rax",
    "mov rax, qword ptr [0x8808]",
    "call rax",
    "hlt",
    "hostile_trampoline_end:",
);
