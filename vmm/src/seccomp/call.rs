//! The words of the tables.

use bulkhead_bpf::{Condition, Operator};
use libc::c_long;

/// A call that is allowed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Call {
    number: c_long,
    /// One of these lists must hold, all of it. None: whatever the arguments are.
    when: Option<&'static [&'static [Arg]]>,
}

/// What an argument must be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Arg {
    at: usize,
    test: Test,
}

#[derive(Debug, Clone, Copy)]
enum Test {
    /// The low 32 bits, which are all that the kernel looks at in an `int`.
    Int(u32),
    /// None of these bits.
    Lacks(u64),
    /// A null pointer.
    Null,
    /// This process's id.
    Process,
}

/// A call with whatever arguments, and why.
pub(super) const fn call(number: c_long, _why: &'static str) -> Call {
    Call { number, when: None }
}

/// A call where one of the lists holds, and why.
pub(super) const fn call_if(number: c_long, when: &'static [&'static [Arg]], _why: &'static str) -> Call {
    Call { number, when: Some(when) }
}

/// Argument `at` as an `int`.
pub(super) const fn int(at: usize, value: i32) -> Arg {
    Arg { at, test: Test::Int(value.cast_unsigned()) }
}

/// Argument 1 of `ioctl`.
pub(super) const fn request(number: u32) -> Arg {
    Arg { at: 1, test: Test::Int(number) }
}

/// Argument `at` without any of these bits.
pub(super) const fn lacks(at: usize, bits: i32) -> Arg {
    Arg { at, test: Test::Lacks(bits.cast_unsigned() as u64) }
}

/// Argument `at` as a null pointer.
pub(super) const fn null(at: usize) -> Arg {
    Arg { at, test: Test::Null }
}

/// Argument `at` as this process's id.
pub(super) const fn this_process(at: usize) -> Arg {
    Arg { at, test: Test::Process }
}

impl Call {
    pub(super) fn number(&self) -> u32 {
        u32::try_from(self.number).unwrap_or(u32::MAX)
    }

    /// The lists as conditions; None where there are none.
    pub(super) fn alternatives(&self, process: u64) -> Option<impl Iterator<Item = Vec<Condition>>> {
        let all = move |list: &&[Arg]| list.iter().filter_map(|arg| arg.condition(process)).collect();
        self.when.map(|lists| lists.iter().map(all))
    }
}

impl Arg {
    fn condition(&self, process: u64) -> Option<Condition> {
        let (mask, value) = match self.test {
            Test::Int(value) => (u64::from(u32::MAX), u64::from(value)),
            Test::Lacks(bits) => (bits, 0),
            Test::Null => (u64::MAX, 0),
            Test::Process => (u64::from(u32::MAX), process),
        };
        Condition::new(self.at, Operator::Masked, mask, value)
    }
}
