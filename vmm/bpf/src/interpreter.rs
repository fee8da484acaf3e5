//! Classic BPF as the kernel runs it for seccomp, jumps checked: for tests.

use crate::{AND, AT_LEAST, EQUAL, GREATER, Instruction, JUMP, LOAD, RETURN};

/// What a program returns for a call.
///
/// # Panics
/// It jumps out of itself or holds what the kernel would refuse.
#[must_use]
pub fn run(program: &[Instruction], architecture: u32, number: u32, args: [u64; 6]) -> u32 {
    let mut data = vec![number, architecture, 0, 0];
    data.extend(args.iter().flat_map(|arg| [*arg as u32, (*arg >> 32) as u32]));
    let (mut accumulator, mut at) = (0, 0);
    loop {
        let instruction = program[at];
        at += 1;
        let mut branch = |taken: bool| at += usize::from(if taken { instruction.jt } else { instruction.jf });
        match instruction.code {
            LOAD => accumulator = data[instruction.k as usize / 4],
            AND => accumulator &= instruction.k,
            JUMP => at += instruction.k as usize,
            EQUAL => branch(accumulator == instruction.k),
            GREATER => branch(accumulator > instruction.k),
            AT_LEAST => branch(accumulator >= instruction.k),
            RETURN => return instruction.k,
            code => panic!("{code:#x}"),
        }
    }
}
