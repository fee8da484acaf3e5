//! Classic BPF for seccomp: from verdicts to instructions.
//!
//! Code is put together from its end: a piece knows how long what follows is, so jumps, which only go
//! forward, need no labels. Inside a rule a jump is at most a few dozen instructions; between the halves of
//! the search tree it may exceed the 255 of a conditional jump, and is then an unconditional one.

use oci_spec::runtime::LinuxSeccompOperator as Operator;

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
pub(super) const LOAD: u16 = 0x20;
/// `BPF_ALU | BPF_AND | BPF_K`
pub(super) const AND: u16 = 0x54;
/// `BPF_JMP | BPF_JA`
pub(super) const JUMP: u16 = 0x05;
/// `BPF_JMP | BPF_JEQ | BPF_K`
pub(super) const EQUAL: u16 = 0x15;
/// `BPF_JMP | BPF_JGT | BPF_K`
pub(super) const GREATER: u16 = 0x25;
/// `BPF_JMP | BPF_JGE | BPF_K`
pub(super) const AT_LEAST: u16 = 0x35;
/// `BPF_RET | BPF_K`
pub(super) const RETURN: u16 = 0x06;

/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

/// What is said of a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Verdict {
    /// The first whose conditions all hold decides.
    pub(super) rules: Vec<(Vec<Condition>, u32)>,
    /// When none does.
    pub(super) otherwise: u32,
}

impl Verdict {
    pub(super) fn always(otherwise: u32) -> Self {
        Self { rules: Vec::new(), otherwise }
    }
}

/// A comparison of one 64-bit argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Condition {
    argument: u8,
    operator: Operator,
    /// The value, or the mask.
    value: u64,
    /// The value after masking.
    masked: u64,
}

impl Condition {
    /// None: there is no such argument.
    pub(super) fn new(argument: usize, operator: Operator, value: u64, masked: u64) -> Option<Self> {
        let argument = u8::try_from(argument).ok().filter(|argument| *argument < 6)?;
        Some(Self { argument, operator, value, masked })
    }

    pub(super) fn argument(&self) -> usize {
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
            Operator::ScmpCmpEq => {
                vec![load(high), op(EQUAL, value.1, 0, 2 + rest), load(low), op(EQUAL, value.0, 0, rest)]
            }
            Operator::ScmpCmpNe => {
                vec![load(high), op(EQUAL, value.1, 0, 2), load(low), op(EQUAL, value.0, rest, 0)]
            }
            Operator::ScmpCmpGt => both(op(GREATER, value.0, 0, rest)),
            Operator::ScmpCmpGe => both(op(AT_LEAST, value.0, 0, rest)),
            Operator::ScmpCmpLt => neither(op(AT_LEAST, value.0, rest, 0)),
            Operator::ScmpCmpLe => neither(op(GREATER, value.0, rest, 0)),
            Operator::ScmpCmpMaskedEq => vec![
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

/// The whole program: a block of ranges for each architecture, `unknown` for any other.
pub(super) fn program(blocks: &[(u32, Vec<(u32, Verdict)>)], unknown: u32) -> Vec<Instruction> {
    let mut code = vec![load(ARCHITECTURE)];
    for (architecture, ranges) in blocks {
        let mut block = vec![load(NUMBER)];
        block.extend(tree(ranges));
        code.push(op(EQUAL, *architecture, 1, 0));
        code.push(jump(block.len()));
        code.extend(block);
    }
    code.push(ret(unknown));
    code
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
