//! Classic BPF for seccomp: from verdicts to instructions, and into the kernel.
//!
//! ```text
//!   load architecture ── unknown ──▶ the caller's answer
//!     │ one block for each
//!     ▼
//!   load call number, binary search over ranges that share a verdict
//!     └─▶ rules on arguments, the first that holds decides, else the verdict's `otherwise`
//! ```
//!
//! A search tree, because the kernel runs the filter for every call number when it is installed, to find those
//! that are always allowed: what counts at start is the depth.
//!
//! Code is put together from its end: a piece knows how long what follows is, so jumps, which only go
//! forward, need no labels. Inside a rule a jump is at most a few dozen instructions; between the halves of
//! the search tree it may exceed the 255 of a conditional jump, and is then an unconditional one.

#[cfg(any(test, feature = "testing"))]
pub mod interpreter;

use std::{collections::BTreeMap, io};

/// The longest program the kernel takes (`BPF_MAXINSNS`).
pub const MAX_PROGRAM: usize = 4096;

/// `struct sock_filter`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instruction {
    /// Operation.
    pub code: u16,
    /// Instructions to skip when true.
    pub jt: u8,
    /// Instructions to skip when false.
    pub jf: u8,
    /// Operand.
    pub k: u32,
}

/// `BPF_LD | BPF_W | BPF_ABS`
const LOAD: u16 = 0x20;
/// `BPF_ALU | BPF_AND | BPF_K`
const AND: u16 = 0x54;
/// `BPF_JMP | BPF_JA`
const JUMP: u16 = 0x05;
/// `BPF_JMP | BPF_JEQ | BPF_K`
const EQUAL: u16 = 0x15;
/// `BPF_JMP | BPF_JGT | BPF_K`
const GREATER: u16 = 0x25;
/// `BPF_JMP | BPF_JGE | BPF_K`
const AT_LEAST: u16 = 0x35;
/// `BPF_RET | BPF_K`
const RETURN: u16 = 0x06;

/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

/// How an argument is compared, as 64-bit numbers without sign.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operator {
    /// `argument == value`
    Equal,
    /// `argument != value`
    NotEqual,
    /// `argument > value`
    Greater,
    /// `argument >= value`
    AtLeast,
    /// `argument < value`
    Less,
    /// `argument <= value`
    AtMost,
    /// `argument & value == masked`
    Masked,
}

/// A comparison of one 64-bit argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Condition {
    argument: u8,
    operator: Operator,
    /// The value, or the mask.
    value: u64,
    /// The value after masking.
    masked: u64,
}

/// What is said of a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// Conditions and what to return when all of them hold; the first such decides.
    pub rules: Vec<(Vec<Condition>, u32)>,
    /// What to return when none does: a `SECCOMP_RET_*` with its data.
    pub otherwise: u32,
}

impl Verdict {
    /// Whatever the arguments are.
    #[must_use]
    pub fn always(otherwise: u32) -> Self {
        Self { rules: Vec::new(), otherwise }
    }
}

/// The whole space of call numbers: where each range begins, and its verdict.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ranges(Vec<(u32, Verdict)>);

impl Ranges {
    /// The verdicts of single calls, and `otherwise` for all others.
    #[must_use]
    pub fn new(calls: BTreeMap<u32, Verdict>, otherwise: u32) -> Self {
        let mut ranges = Self(vec![(0, Verdict::always(otherwise))]);
        for (number, verdict) in calls {
            ranges.begin(number, verdict);
            ranges.begin(number + 1, Verdict::always(otherwise));
        }
        ranges
    }

    /// From this number on another verdict holds. Numbers are given in ascending order.
    pub fn begin(&mut self, start: u32, verdict: Verdict) {
        match self.0.last_mut() {
            Some((at, last)) if *at == start => *last = verdict,
            Some((_, last)) if *last == verdict => {}
            _ => self.0.push((start, verdict)),
        }
    }
}

impl Condition {
    /// None: there is no such argument.
    #[must_use]
    pub fn new(argument: usize, operator: Operator, value: u64, masked: u64) -> Option<Self> {
        let argument = u8::try_from(argument).ok().filter(|argument| *argument < 6)?;
        Some(Self { argument, operator, value, masked })
    }

    /// Which argument, 0 to 5.
    #[must_use]
    pub fn argument(&self) -> usize {
        usize::from(self.argument)
    }

    /// Falls through when the condition holds, else skips `rest` instructions behind itself.
    fn code(&self, rest: u8) -> Vec<Instruction> {
        let low = ARGUMENTS + 8 * u32::from(self.argument);
        let high = low + 4;
        let [value, masked] = [self.value, self.masked].map(halves);
        let both = |last: Instruction| {
            vec![load(high), op(GREATER, value.1, 3, 0), op(EQUAL, value.1, 0, 2 + rest), load(low), last]
        };
        let neither = |last: Instruction| {
            vec![load(high), op(GREATER, value.1, 3 + rest, 0), op(EQUAL, value.1, 0, 2), load(low), last]
        };
        match self.operator {
            Operator::Equal => {
                vec![load(high), op(EQUAL, value.1, 0, 2 + rest), load(low), op(EQUAL, value.0, 0, rest)]
            }
            Operator::NotEqual => {
                vec![load(high), op(EQUAL, value.1, 0, 2), load(low), op(EQUAL, value.0, rest, 0)]
            }
            Operator::Greater => both(op(GREATER, value.0, 0, rest)),
            Operator::AtLeast => both(op(AT_LEAST, value.0, 0, rest)),
            Operator::Less => neither(op(AT_LEAST, value.0, rest, 0)),
            Operator::AtMost => neither(op(GREATER, value.0, rest, 0)),
            Operator::Masked => vec![
                load(high),
                op(AND, value.1, 0, 0),
                op(EQUAL, masked.1, 0, 3 + rest),
                load(low),
                op(AND, value.0, 0, 0),
                op(EQUAL, masked.0, 0, rest),
            ],
        }
    }
}

/// The whole program: a block of ranges for each architecture (`AUDIT_ARCH_*`), `unknown` for any other.
#[must_use]
pub fn program(blocks: &[(u32, Ranges)], unknown: u32) -> Vec<Instruction> {
    let mut code = vec![load(ARCHITECTURE)];
    for (architecture, ranges) in blocks {
        let mut block = vec![load(NUMBER)];
        block.extend(tree(&ranges.0));
        code.push(op(EQUAL, *architecture, 1, 0));
        code.push(jump(block.len()));
        code.extend(block);
    }
    code.push(ret(unknown));
    code
}

/// Puts the calling thread, for ever, under a program, with `SECCOMP_FILTER_FLAG_*`. Allocates nothing and
/// takes no lock, so that it may be called between fork and exec.
///
/// # Errors
/// The kernel refuses it: it is too long, or the thread may still gain privileges.
pub fn install(program: &[Instruction], flags: u64) -> io::Result<()> {
    #[repr(C)]
    struct Program {
        length: u16,
        instructions: *const Instruction,
    }
    let length = u16::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let program = Program { length, instructions: program.as_ptr() };
    // SAFETY: Program is `struct sock_fprog`, Instruction `struct sock_filter`; length counts what the
    // pointer refers to, and the kernel copies both.
    let result =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A search tree over ranges in ascending order; the first contains the lowest number that gets here.
fn tree(ranges: &[(u32, Verdict)]) -> Vec<Instruction> {
    let (left, right) = ranges.split_at(ranges.len() / 2);
    let Some((start, verdict)) = right.first() else { return Vec::new() };
    if left.is_empty() {
        return leaf(verdict);
    }
    let (below, above) = (tree(left), tree(right));
    let mut code = match u8::try_from(below.len()) {
        Ok(skip) => vec![op(AT_LEAST, *start, skip, 0)],
        Err(_) => vec![op(AT_LEAST, *start, 0, 1), jump(below.len())],
    };
    code.extend(below);
    code.extend(above);
    code
}

fn leaf(verdict: &Verdict) -> Vec<Instruction> {
    let mut code = Vec::new();
    for (conditions, action) in &verdict.rules {
        let mut rule = vec![ret(*action)];
        for condition in conditions.iter().rev() {
            // Six conditions of six instructions at most.
            let mut whole = condition.code(u8::try_from(rule.len()).unwrap_or(u8::MAX));
            whole.append(&mut rule);
            rule = whole;
        }
        code.extend(rule);
    }
    code.push(ret(verdict.otherwise));
    code
}

fn halves(value: u64) -> (u32, u32) {
    (value as u32, (value >> 32) as u32)
}

fn op(code: u16, k: u32, jt: u8, jf: u8) -> Instruction {
    Instruction { code, jt, jf, k }
}

fn load(offset: u32) -> Instruction {
    op(LOAD, offset, 0, 0)
}

fn jump(skip: usize) -> Instruction {
    op(JUMP, u32::try_from(skip).unwrap_or(u32::MAX), 0, 0)
}

fn ret(action: u32) -> Instruction {
    op(RETURN, action, 0, 0)
}

#[cfg(test)]
mod tests;
