//! The device rules of a container's cgroup, as an eBPF program.
//!
//! cgroup v2 has no file for them: the kernel asks a program at every `open` and `mknod` of a device node.
//! This is what keeps a container from the disks of the guest, its own writable layer's block device first
//! (CVE-2020-2023, CVE-2026-24834): the nodes are not in its `/dev`, and making one does not help.
//!
//! The rules are the OCI spec's, the last that matches decides. Before the spec's come two that deny
//! everything and that allow to *make* any node (many images do); after them come the nodes that every
//! container has.

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use crate::{
    error::{Result, invalid},
    sys::BpfInstruction,
};

/// Access bits as the kernel gives them.
const MKNOD: u32 = 1;
const READ: u32 = 2;
const WRITE: u32 = 4;
const ALL: u32 = MKNOD | READ | WRITE;

/// Device types likewise.
const BLOCK: u32 = 1;
const CHARACTER: u32 = 2;

/// The most rules of one container.
const MAX_RULES: usize = 1024;

/// A rule. None stands for all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    allow: bool,
    kind: Option<u32>,
    major: Option<u32>,
    minor: Option<u32>,
    access: u32,
}

/// Nodes that every container may use: null, zero, full, tty, random, urandom; console, ptmx; all of pts.
const DEFAULTS: [(u32, Option<u32>); 9] = [
    (1, Some(3)),
    (1, Some(5)),
    (1, Some(7)),
    (1, Some(8)),
    (1, Some(9)),
    (5, Some(0)),
    (5, Some(1)),
    (5, Some(2)),
    (136, None),
];

/// The rules for a container, in the order in which they apply.
///
/// # Errors
/// Of kind `Invalid`: numbers or access letters that mean nothing, or too many rules.
pub fn rules(spec: &[LinuxDeviceCgroup]) -> Result<Vec<Rule>> {
    if spec.len() > MAX_RULES {
        return Err(invalid("too many device rules"));
    }
    let all = Rule { allow: false, kind: None, major: None, minor: None, access: ALL };
    let mut rules = vec![all, Rule { allow: true, access: MKNOD, ..all }];
    for rule in spec {
        rules.push(parse(rule)?);
    }
    for (major, minor) in DEFAULTS {
        rules.push(Rule { allow: true, kind: Some(CHARACTER), major: Some(major), minor, access: ALL });
    }
    Ok(rules)
}

fn parse(rule: &LinuxDeviceCgroup) -> Result<Rule> {
    let kind = match rule.typ().unwrap_or_default() {
        LinuxDeviceType::A => None,
        LinuxDeviceType::B => Some(BLOCK),
        LinuxDeviceType::C | LinuxDeviceType::U => Some(CHARACTER),
        LinuxDeviceType::P => return Err(invalid("a device rule for a fifo")),
    };
    // Docker writes -1 for all.
    let number = |number: Option<i64>| match number {
        None | Some(-1) => Ok(None),
        Some(number) => u32::try_from(number).map(Some).map_err(|_| invalid("a device number out of range")),
    };
    let mut access = 0;
    for letter in rule.access().as_deref().unwrap_or("rwm").chars() {
        access |= match letter {
            'r' => READ,
            'w' => WRITE,
            'm' => MKNOD,
            _ => {
                return Err(invalid(format!("the access {letter:?} of a device rule is not one of r, w, m")));
            }
        };
    }
    Ok(Rule { allow: rule.allow(), kind, major: number(rule.major())?, minor: number(rule.minor())?, access })
}

// eBPF: operations that are used, and registers: 1 is the context on entry, 0 the answer on exit.
const LOAD_WORD: u8 = 0x61;
const MOVE: u8 = 0xb7;
const MOVE_REGISTER: u8 = 0xbf;
const AND: u8 = 0x57;
const SHIFT_RIGHT: u8 = 0x77;
const JUMP_NOT_EQUAL: u8 = 0x55;
const JUMP_EQUAL: u8 = 0x15;
const EXIT: u8 = 0x95;

const TYPE: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;
const SCRATCH: u8 = 6;

/// The program: from the last rule to the first, the first that matches answers. An allowing rule matches
/// when it covers all of the access asked for, a denying one when it covers any of it.
pub fn program(rules: &[Rule]) -> Vec<BpfInstruction> {
    // struct bpf_cgroup_dev_ctx: access and type in one word, major, minor.
    let mut code = vec![
        op(LOAD_WORD, TYPE, 1, 0, 0),
        op(AND, TYPE, 0, 0, 0xffff),
        op(LOAD_WORD, ACCESS, 1, 0, 0),
        op(SHIFT_RIGHT, ACCESS, 0, 0, 16),
        op(LOAD_WORD, MAJOR, 1, 4, 0),
        op(LOAD_WORD, MINOR, 1, 8, 0),
    ];
    for rule in rules.iter().rev() {
        code.extend(match_rule(rule));
        if rule.is_unconditional() {
            // The kernel refuses instructions that cannot be reached.
            return code;
        }
    }
    code.extend(answer(false));
    code
}

impl Rule {
    fn is_unconditional(&self) -> bool {
        self.access == ALL && [self.kind, self.major, self.minor].iter().all(Option::is_none)
    }
}

fn match_rule(rule: &Rule) -> Vec<BpfInstruction> {
    let mut tests: Vec<Vec<BpfInstruction>> = Vec::new();
    for (register, wanted) in [(TYPE, rule.kind), (MAJOR, rule.major), (MINOR, rule.minor)] {
        if let Some(wanted) = wanted {
            tests.push(vec![op(JUMP_NOT_EQUAL, register, 0, 0, wanted)]);
        }
    }
    if rule.access != ALL {
        let mask = if rule.allow { ALL & !rule.access } else { rule.access };
        let jump = if rule.allow { JUMP_NOT_EQUAL } else { JUMP_EQUAL };
        tests.push(vec![
            op(MOVE_REGISTER, SCRATCH, ACCESS, 0, 0),
            op(AND, SCRATCH, 0, 0, mask),
            op(jump, SCRATCH, 0, 0, 0),
        ]);
    }
    // Each test ends with a jump over the rest of the rule.
    let mut code: Vec<BpfInstruction> = answer(rule.allow).into();
    for mut test in tests.into_iter().rev() {
        if let Some(jump) = test.last_mut() {
            jump.offset = code.len() as i16;
        }
        test.append(&mut code);
        code = test;
    }
    code
}

fn answer(allow: bool) -> [BpfInstruction; 2] {
    [op(MOVE, 0, 0, 0, u32::from(allow)), op(EXIT, 0, 0, 0, 0)]
}

fn op(code: u8, destination: u8, source: u8, offset: i16, immediate: u32) -> BpfInstruction {
    BpfInstruction { code, registers: source << 4 | destination, offset, immediate: immediate as i32 }
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::LinuxDeviceCgroupBuilder;
    use proptest::prelude::*;

    use super::*;

    /// Runs the program as the kernel would.
    fn run(code: &[BpfInstruction], kind: u32, access: u32, major: u32, minor: u32) -> bool {
        let context = [access << 16 | kind, major, minor];
        let mut registers = [0u64; 11];
        let mut at = 0usize;
        loop {
            let instruction = code[at];
            at += 1;
            let (to, from) =
                (usize::from(instruction.registers & 15), usize::from(instruction.registers >> 4));
            let immediate = u64::from(instruction.immediate as u32);
            let mut jump = |taken: bool| at += if taken { instruction.offset as usize } else { 0 };
            match instruction.code {
                LOAD_WORD => registers[to] = u64::from(context[instruction.offset as usize / 4]),
                MOVE => registers[to] = immediate,
                MOVE_REGISTER => registers[to] = registers[from],
                AND => registers[to] &= immediate,
                SHIFT_RIGHT => registers[to] >>= immediate,
                JUMP_NOT_EQUAL => jump(registers[to] != immediate),
                JUMP_EQUAL => jump(registers[to] == immediate),
                EXIT => return registers[0] != 0,
                code => panic!("{code:#x}"),
            }
        }
    }

    fn spec(allow: bool, typ: LinuxDeviceType, major: i64, minor: i64, access: &str) -> LinuxDeviceCgroup {
        LinuxDeviceCgroupBuilder::default()
            .allow(allow)
            .typ(typ)
            .major(major)
            .minor(minor)
            .access(access)
            .build()
            .unwrap()
    }

    #[test]
    fn the_guests_disks_are_out_of_reach_and_nodes_can_be_made() {
        let code = program(&rules(&[]).unwrap());
        for access in [READ, WRITE, READ | WRITE] {
            assert!(!run(&code, BLOCK, access, 254, 0));
            assert!(!run(&code, CHARACTER, access, 1, 1), "/dev/mem");
            assert!(run(&code, CHARACTER, access, 1, 3), "/dev/null");
            assert!(run(&code, CHARACTER, access, 136, 7), "/dev/pts/7");
        }
        assert!(run(&code, BLOCK, MKNOD, 254, 0));
    }

    #[test]
    fn a_privileged_container_may_use_everything() {
        let code = program(&rules(&[spec(true, LinuxDeviceType::A, -1, -1, "rwm")]).unwrap());
        assert!(run(&code, BLOCK, READ | WRITE, 254, 0));
    }

    #[test]
    fn an_allowed_device_is_allowed_as_far_as_its_letters_go() {
        let code = program(&rules(&[spec(true, LinuxDeviceType::C, 10, 200, "r")]).unwrap());
        assert!(run(&code, CHARACTER, READ, 10, 200));
        assert!(!run(&code, CHARACTER, READ | WRITE, 10, 200));
        assert!(!run(&code, BLOCK, READ, 10, 200));
    }

    /// The jumps of the kernel's own check: every instruction is reached.
    fn all_reachable(code: &[BpfInstruction]) -> bool {
        let mut reached = vec![false; code.len()];
        let mut open = vec![0];
        while let Some(at) = open.pop() {
            if !std::mem::replace(&mut reached[at], true) {
                match code[at].code {
                    EXIT => {}
                    JUMP_EQUAL | JUMP_NOT_EQUAL => open.extend([at + 1, at + 1 + code[at].offset as usize]),
                    _ => open.push(at + 1),
                }
            }
        }
        reached.into_iter().all(|reached| reached)
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(rules(&[spec(true, LinuxDeviceType::C, -2, 0, "r")]).is_err());
        assert!(rules(&[spec(true, LinuxDeviceType::C, 1, 0, "x")]).is_err());
        assert!(rules(&[spec(true, LinuxDeviceType::P, 1, 0, "r")]).is_err());
    }

    fn rule() -> impl Strategy<Value = Rule> {
        let number = || prop::option::of(0..3u32);
        (any::<bool>(), prop::option::of(1..3u32), number(), number(), 1..8u32)
            .prop_map(|(allow, kind, major, minor, access)| Rule { allow, kind, major, minor, access })
    }

    proptest! {
        #[test]
        fn the_program_says_what_the_last_matching_rule_says(
            rules in prop::collection::vec(rule(), 0..12), kind in 1..3u32, major in 0..3u32,
            minor in 0..3u32, access in 1..8u32,
        ) {
            let matches = |rule: &&Rule| {
                let same = |wanted: Option<u32>, is: u32| wanted.is_none_or(|wanted| wanted == is);
                let covered = if rule.allow { access & !rule.access == 0 } else { access & rule.access != 0 };
                same(rule.kind, kind) && same(rule.major, major) && same(rule.minor, minor) && covered
            };
            let expected = rules.iter().rev().find(matches).is_some_and(|rule| rule.allow);
            let code = program(&rules);
            prop_assert!(all_reachable(&code));
            prop_assert_eq!(run(&code, kind, access, major, minor), expected);
        }
    }
}
