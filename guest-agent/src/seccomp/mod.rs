//! OCI seccomp profiles as BPF programs (crate `bulkhead-bpf`).
//!
//! ```text
//!   architecture ── unknown ──▶ kill
//!     │ one block for each interface of the profile
//!     ▼
//!   call number
//!     ├─▶ allow / errno / kill …
//!     ├─▶ rules on arguments, the first that holds decides, else the call's or the default verdict
//!     └─▶ ENOSYS for calls newer than any that the profile names
//! ```

use std::collections::{BTreeMap, HashMap};

use bulkhead_bpf::{Condition, Instruction, MAX_PROGRAM, Operator, Ranges, Verdict};
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag, LinuxSeccompOperator,
    LinuxSyscall,
};

use crate::{
    arch::{ABIS, Abi, FIRST_FOREIGN},
    error::{Result, invalid},
};

const KILL_PROCESS: u32 = libc::SECCOMP_RET_KILL_PROCESS;
const ENOSYS: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;

/// A filter ready to be installed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter {
    /// The program.
    pub program: Vec<Instruction>,
    /// `SECCOMP_FILTER_FLAG_*`.
    pub flags: u64,
}

/// Translates a profile.
///
/// # Errors
/// Of kind `Invalid`: an action, flag or architecture that cannot be had, or a profile too long.
pub fn compile(profile: &LinuxSeccomp) -> Result<Filter> {
    let default = action(profile.default_action(), profile.default_errno_ret())?;
    let mut blocks = Vec::new();
    for abi in interfaces(profile)? {
        let calls = verdicts(profile, &abi, default)?;
        blocks.push((abi.audit, ranges(calls, default)));
    }
    let program = bulkhead_bpf::program(&blocks, KILL_PROCESS);
    if program.len() > MAX_PROGRAM {
        return Err(invalid("the seccomp profile is too long for the kernel"));
    }
    Ok(Filter { program, flags: flags(profile)? })
}

/// The profile's interfaces among those that this machine has; others cannot occur here. A profile that
/// names none means all.
fn interfaces(profile: &LinuxSeccomp) -> Result<Vec<Abi>> {
    let named = profile.architectures().as_deref().unwrap_or_default();
    let wanted = |abi: &Abi| {
        let native = abi.oci == ABIS[0].oci;
        named.is_empty() || named.contains(&abi.oci) || native && named.contains(&Arch::ScmpArchNative)
    };
    let found: Vec<Abi> = ABIS.into_iter().filter(wanted).collect();
    if found.is_empty() {
        return Err(invalid("the seccomp profile is for other architectures than this one"));
    }
    Ok(found)
}

fn flags(profile: &LinuxSeccomp) -> Result<u64> {
    let mut flags = 0;
    for flag in profile.flags().as_deref().unwrap_or_default() {
        flags |= match flag {
            LinuxSeccompFilterFlag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG,
            LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
            // The filter is installed while there is one thread.
            LinuxSeccompFilterFlag::SeccompFilterFlagTsync => 0,
            LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => {
                return Err(invalid("seccomp notifications are not supported"));
            }
        };
    }
    Ok(flags)
}

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> Result<u32> {
    if action == LinuxSeccompAction::ScmpActNotify {
        return Err(invalid("seccomp notifications are not supported"));
    }
    if errno.is_some_and(|errno| errno > 4095) {
        return Err(invalid("the errno of a seccomp rule is over 4095"));
    }
    Ok(action.as_u32(errno))
}

/// What the profile says of each call that it names.
fn verdicts(profile: &LinuxSeccomp, abi: &Abi, default: u32) -> Result<BTreeMap<u32, Verdict>> {
    let numbers = abi.calls();
    let mut calls: BTreeMap<u32, Verdict> = BTreeMap::new();
    for rule in profile.syscalls().as_deref().unwrap_or_default() {
        let taken = action(rule.action(), rule.errno_ret())?;
        let alternatives = alternatives(rule)?;
        for number in known(rule, &numbers) {
            let verdict = calls.entry(number).or_insert_with(|| Verdict::always(default));
            if alternatives.is_empty() {
                verdict.otherwise = taken;
            } else {
                let rules = alternatives.iter().map(|conditions| (conditions.clone(), taken));
                verdict.rules.extend(rules);
            }
        }
    }
    Ok(calls)
}

/// Names that this kernel's interface does not have are left out: a profile serves many kernels.
fn known<'a>(
    rule: &'a LinuxSyscall,
    numbers: &'a HashMap<&'static str, u32>,
) -> impl Iterator<Item = u32> + 'a {
    rule.names().iter().filter_map(|name| numbers.get(name.as_str()).copied())
}

/// The conditions of a rule: all of one list must hold. Several conditions on one argument are
/// alternatives, as runc reads them.
fn alternatives(rule: &LinuxSyscall) -> Result<Vec<Vec<Condition>>> {
    let args = rule.args().as_deref().unwrap_or_default();
    let conditions = args.iter().map(condition).collect::<Result<Vec<_>>>()?;
    let mut seen = [false; 6];
    let repeated =
        conditions.iter().any(|condition| std::mem::replace(&mut seen[condition.argument()], true));
    Ok(match (conditions.is_empty(), repeated) {
        (true, _) => Vec::new(),
        (false, false) => vec![conditions],
        (false, true) => conditions.into_iter().map(|condition| vec![condition]).collect(),
    })
}

fn condition(arg: &LinuxSeccompArg) -> Result<Condition> {
    Condition::new(arg.index(), operator(arg.op()), arg.value(), arg.value_two().unwrap_or(0))
        .ok_or_else(|| invalid("a seccomp rule names an argument over 5"))
}

fn operator(operator: LinuxSeccompOperator) -> Operator {
    match operator {
        LinuxSeccompOperator::ScmpCmpNe => Operator::NotEqual,
        LinuxSeccompOperator::ScmpCmpLt => Operator::Less,
        LinuxSeccompOperator::ScmpCmpLe => Operator::AtMost,
        LinuxSeccompOperator::ScmpCmpEq => Operator::Equal,
        LinuxSeccompOperator::ScmpCmpGe => Operator::AtLeast,
        LinuxSeccompOperator::ScmpCmpGt => Operator::Greater,
        LinuxSeccompOperator::ScmpCmpMaskedEq => Operator::Masked,
    }
}

/// The whole number space: the named calls, the default, and ENOSYS behind them.
fn ranges(calls: BTreeMap<u32, Verdict>, default: u32) -> Ranges {
    let behind = calls.keys().next_back().map_or(0, |last| last + 1);
    let mut ranges = Ranges::new(calls, default);
    // A program that probes for a new call falls back on ENOSYS, and gives up on EPERM.
    if default & libc::SECCOMP_RET_ACTION_FULL < libc::SECCOMP_RET_TRACE || default == KILL_PROCESS {
        ranges.begin(behind, Verdict::always(ENOSYS));
    }
    ranges.begin(FIRST_FOREIGN, Verdict::always(ENOSYS));
    ranges
}

#[cfg(test)]
mod tests;
