//! Programs are run by the interpreter and compared with a direct reading of what they were made from.

use proptest::prelude::*;

use super::{interpreter::run, *};

const HERE: u32 = 7;
const NO: u32 = 1;
const YES: u32 = 2;
const UNKNOWN: u32 = 3;

fn holds(operator: Operator, value: u64, masked: u64, argument: u64) -> bool {
    match operator {
        Operator::NotEqual => argument != value,
        Operator::Less => argument < value,
        Operator::AtMost => argument <= value,
        Operator::Equal => argument == value,
        Operator::AtLeast => argument >= value,
        Operator::Greater => argument > value,
        Operator::Masked => argument & value == masked,
    }
}

fn operator() -> impl Strategy<Value = Operator> {
    prop::sample::select(vec![
        Operator::NotEqual,
        Operator::Less,
        Operator::AtMost,
        Operator::Equal,
        Operator::AtLeast,
        Operator::Greater,
        Operator::Masked,
    ])
}

/// Values near each other, above and below the 32-bit border.
fn word() -> impl Strategy<Value = u64> {
    prop_oneof![0..4u64, (0..4u64).prop_map(|low| 1 << 32 | low), Just(u64::MAX), Just(u64::from(u32::MAX))]
}

fn condition() -> impl Strategy<Value = (usize, Operator, u64, u64)> {
    (0..6usize, operator(), word(), word())
}

proptest! {
    #[test]
    fn the_first_rule_whose_conditions_all_hold_decides(
        rules in prop::collection::vec(prop::collection::vec(condition(), 0..4), 0..4),
        args in prop::array::uniform6(word()),
    ) {
        let compiled = |conditions: &Vec<(usize, Operator, u64, u64)>| -> Vec<Condition> {
            conditions.iter().filter_map(|(at, op, value, mask)| Condition::new(*at, *op, *value, *mask)).collect()
        };
        let actions = rules.iter().zip(10..);
        let verdict = Verdict { rules: actions.map(|(rule, action)| (compiled(rule), action)).collect(), otherwise: NO };
        let program = program(&[(HERE, Ranges::new(BTreeMap::from([(5, verdict)]), NO))], UNKNOWN);
        let all_hold = |rule: &Vec<(usize, Operator, u64, u64)>| {
            rule.iter().all(|(at, op, value, mask)| holds(*op, *value, *mask, args[*at]))
        };
        let expected = rules.iter().position(all_hold).map_or(NO, |rule| 10 + rule as u32);
        prop_assert_eq!(run(&program, HERE, 5, args), expected);
        prop_assert_eq!(run(&program, HERE, 4, args), NO);
        prop_assert_eq!(run(&program, HERE + 1, 5, args), UNKNOWN);
    }

    #[test]
    fn the_tree_finds_what_the_set_holds(allowed in prop::collection::btree_set(0..500u32, 0..300), number in 0..510u32) {
        let calls = allowed.iter().map(|number| (*number, Verdict::always(YES))).collect();
        let program = program(&[(HERE, Ranges::new(calls, NO))], UNKNOWN);
        let expected = if allowed.contains(&number) { YES } else { NO };
        prop_assert_eq!(run(&program, HERE, number, [0; 6]), expected);
    }
}

#[test]
fn there_is_no_seventh_argument() {
    assert!(Condition::new(5, Operator::Equal, 0, 0).is_some());
    assert!(Condition::new(6, Operator::Equal, 0, 0).is_none());
}
