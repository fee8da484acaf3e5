//! The program is run by an interpreter and compared with a direct reading of the profile.

use bulkhead_bpf::interpreter::run;
use oci_spec::runtime::{
    LinuxSeccompArgBuilder, LinuxSeccompBuilder, LinuxSeccompOperator as Op, LinuxSyscallBuilder,
};
use proptest::prelude::*;

use super::*;

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const EPERM: u32 = libc::SECCOMP_RET_ERRNO | 1;
const X86_64: u32 = 0xc000_003e;
const I386: u32 = 0x4000_0003;

fn rule(names: &[&str], action: LinuxSeccompAction, args: Vec<LinuxSeccompArg>) -> LinuxSyscall {
    let names: Vec<String> = names.iter().map(ToString::to_string).collect();
    LinuxSyscallBuilder::default().names(names).action(action).args(args).build().unwrap()
}

fn arg(index: usize, op: Op, value: u64, two: u64) -> LinuxSeccompArg {
    LinuxSeccompArgBuilder::default().index(index).op(op).value(value).value_two(two).build().unwrap()
}

fn profile(rules: Vec<LinuxSyscall>) -> LinuxSeccomp {
    LinuxSeccompBuilder::default()
        .default_action(LinuxSeccompAction::ScmpActErrno)
        .default_errno_ret(1u32)
        .architectures(vec![Arch::ScmpArchX86_64, Arch::ScmpArchX86, Arch::ScmpArchX32])
        .syscalls(rules)
        .build()
        .unwrap()
}

fn allow(names: &[&str]) -> LinuxSyscall {
    rule(names, LinuxSeccompAction::ScmpActAllow, vec![])
}

#[test]
fn calls_are_told_apart_by_architecture_and_number() {
    let filter =
        compile(&profile(vec![allow(&["read", "write", "exit_group", "statx", "nosuchcall"])])).unwrap();
    let verdict = |architecture, number| run(&filter.program, architecture, number, [0; 6]);
    assert_eq!(verdict(X86_64, 0), ALLOW);
    assert_eq!(verdict(X86_64, 1), ALLOW);
    assert_eq!(verdict(X86_64, 2), EPERM);
    assert_eq!(verdict(X86_64, 231), ALLOW);
    assert_eq!(verdict(I386, 3), ALLOW);
    assert_eq!(verdict(I386, 0), EPERM);
    assert_eq!(verdict(0x4000_0028, 3), KILL_PROCESS);
}

#[test]
fn calls_newer_than_the_profile_do_not_exist() {
    let filter = compile(&profile(vec![allow(&["read", "statx"])])).unwrap();
    let statx = 332;
    assert_eq!(run(&filter.program, X86_64, statx, [0; 6]), ALLOW);
    assert_eq!(run(&filter.program, X86_64, statx + 1, [0; 6]), ENOSYS);
    assert_eq!(run(&filter.program, X86_64, FIRST_FOREIGN, [0; 6]), ENOSYS);
}

#[test]
fn conditions_on_one_argument_are_alternatives_and_on_several_a_conjunction() {
    let personality = vec![arg(0, Op::ScmpCmpEq, 8, 0), arg(0, Op::ScmpCmpEq, u64::MAX, 0)];
    let socket = vec![arg(0, Op::ScmpCmpNe, 40, 0), arg(1, Op::ScmpCmpLt, 5, 0)];
    let filter = compile(&profile(vec![
        rule(&["personality"], LinuxSeccompAction::ScmpActAllow, personality),
        rule(&["socket"], LinuxSeccompAction::ScmpActAllow, socket),
    ]))
    .unwrap();
    let call = |number, args: [u64; 2]| run(&filter.program, X86_64, number, [args[0], args[1], 0, 0, 0, 0]);
    assert_eq!([call(135, [8, 0]), call(135, [u64::MAX, 0]), call(135, [9, 0])], [ALLOW, ALLOW, EPERM]);
    assert_eq!([call(41, [2, 1]), call(41, [40, 1]), call(41, [2, 5])], [ALLOW, EPERM, EPERM]);
}

#[test]
fn what_cannot_be_had_is_refused() {
    let refused = |profile: &LinuxSeccomp| compile(profile).is_err();
    assert!(refused(&profile(vec![rule(&["read"], LinuxSeccompAction::ScmpActNotify, vec![])])));
    let sixth = vec![arg(6, Op::ScmpCmpEq, 0, 0)];
    assert!(refused(&profile(vec![rule(&["read"], LinuxSeccompAction::ScmpActAllow, sixth)])));
    let mut foreign = profile(vec![]);
    foreign.set_architectures(Some(vec![Arch::ScmpArchAarch64]));
    assert!(refused(&foreign));
}

#[test]
fn a_profile_of_every_call_and_a_hundred_rules_fits_the_kernel() {
    let mut names: Vec<&str> = ABIS[0].calls().into_keys().collect();
    names.sort_unstable();
    let filter = compile(&profile(vec![
        allow(&names[100..]),
        rule(&names[..100], LinuxSeccompAction::ScmpActAllow, vec![arg(2, Op::ScmpCmpMaskedEq, 7, 1)]),
    ]));
    assert!(filter.unwrap().program.len() <= MAX_PROGRAM);
}

fn holds(op: Op, value: u64, two: u64, argument: u64) -> bool {
    match op {
        Op::ScmpCmpNe => argument != value,
        Op::ScmpCmpLt => argument < value,
        Op::ScmpCmpLe => argument <= value,
        Op::ScmpCmpEq => argument == value,
        Op::ScmpCmpGe => argument >= value,
        Op::ScmpCmpGt => argument > value,
        Op::ScmpCmpMaskedEq => argument & value == two,
    }
}

fn operator() -> impl Strategy<Value = Op> {
    prop::sample::select(vec![
        Op::ScmpCmpNe,
        Op::ScmpCmpLt,
        Op::ScmpCmpLe,
        Op::ScmpCmpEq,
        Op::ScmpCmpGe,
        Op::ScmpCmpGt,
        Op::ScmpCmpMaskedEq,
    ])
}

/// Values near each other, above and below the 32-bit border.
fn word() -> impl Strategy<Value = u64> {
    prop_oneof![0..4u64, (0..4u64).prop_map(|low| 1 << 32 | low), Just(u64::MAX), Just(u64::from(u32::MAX))]
}

proptest! {
    #[test]
    fn every_comparison_is_that_of_64_bit_numbers(
        op in operator(), index in 0..6usize, value in word(), two in word(), argument in word(),
    ) {
        let args = vec![arg(index, op, value, two)];
        let filter = compile(&profile(vec![rule(&["read"], LinuxSeccompAction::ScmpActAllow, args)])).unwrap();
        let mut given = [0; 6];
        given[index] = argument;
        let expected = if holds(op, value, two, argument) { ALLOW } else { EPERM };
        prop_assert_eq!(run(&filter.program, X86_64, 0, given), expected);
    }

    #[test]
    fn the_tree_finds_what_the_list_says(allowed in prop::collection::btree_set(0..330u32, 0..200), number in 0..462u32) {
        let numbers = ABIS[0].calls();
        let names: Vec<&str> = numbers.iter().filter(|(_, at)| allowed.contains(at)).map(|(name, _)| *name).collect();
        let named: Vec<u32> = names.iter().map(|name| numbers[name]).collect();
        let filter = compile(&profile(vec![allow(&names)])).unwrap();
        let behind = named.iter().max().map_or(0, |last| last + 1);
        let expected = match number {
            _ if named.contains(&number) => ALLOW,
            _ if number >= behind => ENOSYS,
            _ => EPERM,
        };
        prop_assert_eq!(run(&filter.program, X86_64, number, [0; 6]), expected);
    }
}
