//! The life of a container: its transitions by example, its laws by property.

use proptest::prelude::*;

use super::*;

const NO: Rules = Rules { policy: Policy::Never, auto_remove: false };
const RM: Rules = Rules { policy: Policy::Never, auto_remove: true };

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

fn started(second: i64) -> Event {
    let (sandbox, place) = ("s".into(), Place::default());
    Event::Started { sandbox, pid: 42, log_start: 0, at: at(second), guest: None, place }
}

fn exited(code: i32, second: i64) -> Event {
    Event::Exited(Exit { code, oom_killed: false, error: String::new(), at: at(second) })
}

/// Takes the events in order; all must fit. The last one's effects.
fn run(rules: Rules, events: impl IntoIterator<Item = Event>) -> (Lifecycle, Vec<Effect>) {
    let mut last = (Lifecycle::default(), vec![]);
    for event in events {
        last = last.0.step(rules, event.clone()).unwrap_or_else(|refusal| panic!("{event:?}: {refusal:?}"));
    }
    last
}

#[test]
fn an_exit_is_told_flushed_and_kept() {
    let (life, effects) = run(NO, [Event::Start, started(100), exited(7, 130)]);
    assert_eq!(effects, [Effect::Ended(7), Effect::ShutDown]);
    let State::Resting(Rest::Exited(ended)) = life.state else { panic!("{life:?}") };
    assert_eq!((ended.code, ended.started_at, ended.finished_at), (7, at(100), at(130)));
}

#[test]
fn a_container_with_rm_is_deleted_after_its_exit_and_after_a_failed_start() {
    let (_, effects) = run(RM, [Event::Start, started(1), exited(0, 2)]);
    assert_eq!(effects, [Effect::Ended(0), Effect::Destroy, Effect::Delete]);
    let failure = Failure { code: 127, error: "no".into() };
    let (life, effects) = run(RM, [Event::Start, Event::StartFailed(failure.clone())]);
    assert_eq!(effects, [Effect::Delete]);
    assert_eq!(life.state, State::Removing(Rest::Created(Some(failure))));
}

#[test]
fn a_restart_of_a_container_with_rm_does_not_delete_it() {
    let (life, effects) = run(RM, [Event::Start, started(1), Event::Restart, exited(143, 2)]);
    assert_eq!(effects, [Effect::Ended(143), Effect::ShutDown, Effect::Boot]);
    assert!(matches!(life.state, State::Starting(_)));
}

#[test]
fn a_restart_takes_a_stop_back() {
    let rules = Rules { policy: Policy::UnlessStopped, auto_remove: false };
    let (life, _) = run(rules, [Event::Start, started(1), Event::Stop, Event::Restart]);
    assert!(!life.manually_stopped, "the user wants it to run, after the daemon's restart too");
}

#[test]
fn a_failed_start_of_a_container_that_ran_keeps_its_times() {
    let failure = Failure { code: 126, error: "denied".into() };
    let events = [Event::Start, started(5), exited(0, 6), Event::Start, Event::StartFailed(failure)];
    let State::Resting(Rest::Exited(ended)) = run(NO, events).0.state else { panic!() };
    assert_eq!((ended.code, ended.error.as_str(), ended.started_at), (126, "denied", at(5)));
}

#[test]
fn delays_double_to_a_minute_and_a_good_run_starts_them_again() {
    let rules = Rules { policy: Policy::Always, auto_remove: false };
    let (mut life, _) = run(rules, [Event::Start]);
    let mut delays = vec![];
    for _ in 0..12 {
        life = life.step(rules, started(0)).unwrap().0;
        let (next, effects) = life.step(rules, exited(1, 1)).unwrap();
        let Some(Effect::BackOff(delay)) = effects.last() else { panic!("{effects:?}") };
        delays.push(delay.as_millis());
        life = next.step(rules, Event::BackOffOver).unwrap().0;
    }
    assert_eq!(delays, [100, 200, 400, 800, 1600, 3200, 6400, 12800, 25600, 51200, 60000, 60000]);
    assert_eq!(life.restart_count, 12);
    life = life.step(rules, started(0)).unwrap().0;
    let (_, effects) = life.step(rules, exited(1, 10)).unwrap();
    assert_eq!(effects.last(), Some(&Effect::BackOff(FIRST_DELAY)));
}

#[test]
fn a_stop_ends_automatic_restarts_until_the_next_start_or_daemon() {
    for policy in [Policy::Always, Policy::UnlessStopped] {
        let rules = Rules { policy, auto_remove: false };
        let (life, effects) = run(rules, [Event::Start, started(1), Event::Stop, exited(143, 2)]);
        assert_eq!(effects, [Effect::Ended(143), Effect::ShutDown]);
        let (_, effects) = life.step(rules, Event::Found(at(9))).unwrap();
        assert_eq!(effects.contains(&Effect::Boot), policy == Policy::Always);
        let (life, _) = life.step(rules, Event::Start).unwrap();
        assert!(!life.manually_stopped);
    }
}

#[test]
fn on_failure_counts() {
    let rules = Rules { policy: Policy::OnFailure(Some(1)), auto_remove: false };
    let once = [Event::Start, started(1), exited(1, 2), Event::BackOffOver, started(3)];
    let (life, _) = run(rules, once);
    assert!(matches!(life.step(rules, exited(1, 4)).unwrap().0.state, State::Resting(_)));
    let (life, _) = run(rules, [Event::Start, started(1), exited(0, 2)]);
    assert!(matches!(life.state, State::Resting(_)));
}

#[test]
fn what_runs_is_removed_only_by_force() {
    let (running, _) = run(NO, [Event::Start, started(1)]);
    assert_eq!(running.step(NO, Event::Remove { force: false }), Err(Refusal::Runs("running")));
    let (going, effects) = running.step(NO, Event::Remove { force: true }).unwrap();
    assert_eq!(effects, [Effect::Kill]);
    let (life, effects) = going.step(NO, exited(137, 2)).unwrap();
    assert_eq!(effects, [Effect::Ended(137), Effect::Destroy, Effect::Delete]);
    assert_eq!(life.step(NO, Event::Remove { force: true }), Err(Refusal::BeingRemoved));
    let (dead, _) = life.step(NO, Event::RemoveFailed).unwrap();
    assert_eq!(dead.step(NO, Event::Start), Err(Refusal::Dead));
    assert_eq!(dead.step(NO, Event::Remove { force: false }).unwrap().1, [Effect::Delete]);
}

#[test]
fn a_boot_is_given_up_by_stop_and_by_forced_removal() {
    let (starting, _) = run(NO, [Event::Start]);
    assert_eq!(starting.step(NO, Event::Stop).unwrap().1, [Effect::AbortBoot]);
    let (life, effects) = starting.step(NO, Event::Remove { force: true }).unwrap();
    assert_eq!(effects, [Effect::AbortBoot, Effect::Delete]);
    assert_eq!(life.step(NO, started(1)), Err(Refusal::Stale));
}

#[test]
fn a_lost_workload_is_killed_in_the_books() {
    let (running, _) = run(NO, [Event::Start, started(1)]);
    let (life, _) = running.step(NO, Event::Found(at(5))).unwrap();
    let State::Resting(Rest::Exited(ended)) = life.state else { panic!() };
    assert_eq!((ended.code, ended.finished_at), (137, at(5)));
}

fn rules() -> impl Strategy<Value = Rules> {
    let policy = prop_oneof![
        Just(Policy::Never),
        Just(Policy::Always),
        Just(Policy::UnlessStopped),
        prop::option::of(0u32..4).prop_map(Policy::OnFailure),
    ];
    (policy, any::<bool>()).prop_map(|(policy, auto_remove)| Rules { policy, auto_remove })
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        Just(Event::Start),
        (0i64..100).prop_map(started),
        Just(Event::StartFailed(Failure { code: 127, error: "no".into() })),
        Just(Event::Stop),
        Just(Event::Restart),
        any::<bool>().prop_map(|force| Event::Remove { force }),
        (0i32..256, 0i64..200).prop_map(|(code, second)| exited(code, second)),
        Just(Event::BackOffOver),
        Just(Event::RemoveFailed),
        (0i64..200).prop_map(|second| Event::Found(at(second))),
    ]
}

proptest! {
    #[test]
    fn effects_and_states_go_together(rules in rules(), events in prop::collection::vec(event(), 0..40)) {
        let mut life = Lifecycle::default();
        for event in events {
            let was_found = matches!(event, Event::Found(_));
            let was_exit = matches!(event, Event::Exited(_)) || was_found;
            let Ok((next, effects)) = life.step(rules, event) else { continue };
            let has = |effect: &Effect| effects.contains(effect);
            let was_running = matches!(life.state, State::Running(_));
            let was_starting = matches!(life.state, State::Starting(_));
            let is_starting = matches!(next.state, State::Starting(_));
            let is_removing = matches!(next.state, State::Removing(_));

            prop_assert_eq!(has(&Effect::Boot), is_starting && !was_starting);
            let enters_removal = is_removing && !matches!(life.state, State::Removing(_));
            prop_assert_eq!(has(&Effect::Delete), enters_removal || (is_removing && was_found));
            let ends = effects.iter().filter(|effect| matches!(effect, Effect::Ended(_))).count();
            prop_assert_eq!(ends, usize::from(was_running && was_exit));
            // A sandbox that ran is ended exactly once, and one that never ran not at all.
            prop_assert_eq!(usize::from(has(&Effect::ShutDown)) + usize::from(has(&Effect::Destroy)), ends);
            let leaves_boot = was_starting && !is_starting && !matches!(next.state, State::Running(_));
            prop_assert!(!has(&Effect::AbortBoot) || leaves_boot);
            if let Some(Effect::BackOff(delay)) = effects.last() {
                prop_assert!((FIRST_DELAY..=LONGEST_DELAY).contains(delay));
                prop_assert!(matches!(next.state, State::Restarting(_)));
            }
            if let Policy::OnFailure(Some(limit)) = rules.policy {
                prop_assert!(next.restart_count <= limit);
            }
            let stored = serde_json::to_string(&next).unwrap();
            prop_assert_eq!(serde_json::from_str::<Lifecycle>(&stored).unwrap(), next.clone());
            life = next;
        }
    }
}
