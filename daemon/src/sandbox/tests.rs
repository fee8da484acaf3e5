//! A sandbox against a fake machine.

use super::{fake::FakeMachine, *};

#[tokio::test]
async fn a_running_sandbox_is_adopted_used_and_shut_down_without_a_trace() {
    let base = tempfile::tempdir().unwrap();
    let mut machine = FakeMachine::start(base.path(), "s1");
    let (sandbox, _events, mut agent) = machine.adopted(base.path(), "s1").await;
    assert_eq!(sandbox.pid(), i32::try_from(machine.process.id()).unwrap());

    let process = ProcessId { container: "c".into(), exec: None };
    let (output, (open, mut far)) =
        tokio::join!(sandbox.output(process.clone(), StreamKind::Stdout, Some(7)), machine.stream());
    assert_eq!(open, StreamOpen { process, stream: StreamKind::Stdout, from: Some(7) });
    tokio::io::AsyncWriteExt::write_all(&mut far, b"out").await.unwrap();
    let mut output = output.unwrap();
    assert_eq!(output.next().await.unwrap().unwrap(), "out");
    assert_eq!(output.taken(), 10);

    let off = async {
        assert_eq!(agent.next_call().await.unwrap().call, Call::Shutdown);
        machine.process.kill().unwrap();
        drop(agent);
    };
    tokio::join!(sandbox.shut_down(Duration::from_secs(60)), off);
    assert!(!base.path().join("s1").exists());
}

#[tokio::test]
async fn a_guest_whose_disk_is_whole_is_killed_and_not_waited_for() {
    let base = tempfile::tempdir().unwrap();
    let mut machine = FakeMachine::start(base.path(), "s1");
    let (sandbox, _events, mut agent) = machine.adopted(base.path(), "s1").await;
    let end = async {
        let call = agent.next_call().await.unwrap();
        assert_eq!(call.call, Call::Shutdown);
        assert!(machine.process.try_wait().unwrap().is_none(), "it is not killed before its word");
        agent.answer(call.id, Ok(Answer::Done)).await;
    };
    tokio::join!(sandbox.shut_down(Duration::MAX), end);
    assert!(!base.path().join("s1").exists());
}

#[tokio::test]
async fn a_guest_that_does_not_power_off_is_killed() {
    let base = tempfile::tempdir().unwrap();
    let machine = FakeMachine::start(base.path(), "s1");
    let (sandbox, _events, _agent) = machine.adopted(base.path(), "s1").await;
    sandbox.shut_down(Duration::ZERO).await;
    assert!(!base.path().join("s1").exists());
}

#[tokio::test]
async fn a_dead_sandbox_is_not_adopted_and_its_report_is_told() {
    let base = tempfile::tempdir().unwrap();
    let mut machine = FakeMachine::start(base.path(), "s1");
    machine.process.kill().unwrap();
    machine.process.wait().unwrap();
    let report = r#"{"reason":{"kind":"triple_fault"},"console":"","uptime_us":1}"#;
    std::fs::write(base.path().join("s1").join(dir::REPORT), report).unwrap();
    let error = Sandbox::adopt(base.path(), "s1").await.err().unwrap();
    assert!(matches!(&error, AdoptError::Dead(death) if death.to_string().contains("triple fault")));
    assert!(matches!(Sandbox::adopt(base.path(), "nosuch").await, Err(AdoptError::Dead(_))));
}

#[tokio::test]
async fn the_sweep_ends_what_nobody_knows_and_spares_the_rest() {
    let base = tempfile::tempdir().unwrap();
    let mut known = FakeMachine::start(base.path(), "known");
    let mut stray = FakeMachine::start(base.path(), "stray");
    sweep(base.path(), &HashSet::from(["known".to_owned()]), Duration::ZERO, &Confinement::default())
        .await
        .unwrap();
    assert!(stray.process.wait().is_err(), "it was killed, and reaped by its pidfd");
    assert!(!base.path().join("stray").exists());
    assert!(known.process.try_wait().unwrap().is_none());
    assert!(base.path().join("known").exists());
}

#[tokio::test]
async fn the_sweep_lets_a_guest_that_answers_power_off_in_order() {
    let base = tempfile::tempdir().unwrap();
    let mut machine = FakeMachine::start(base.path(), "ending");
    let nobody = HashSet::new();
    let confinement = Confinement::default();
    let off = async {
        let mut agent = machine.agent().await;
        assert_eq!(agent.next_call().await.unwrap().call, Call::Shutdown);
        machine.process.kill().unwrap();
    };
    let (swept, ()) = tokio::join!(sweep(base.path(), &nobody, Duration::from_secs(60), &confinement), off);
    swept.unwrap();
    assert!(!base.path().join("ending").exists());
}

/// Answers the agent's calls in this order.
async fn expect(agent: &mut fake::FakeAgent, calls: &[Call]) {
    for expected in calls {
        let call = agent.next_call().await.unwrap();
        assert_eq!(&call.call, expected);
        agent.answer(call.id, Ok(Answer::Done)).await;
    }
}

fn refused(message: &str) -> Response {
    Response::Error { message: message.into() }
}

#[tokio::test]
async fn a_machine_is_saved_while_it_stands_still_and_runs_on() {
    let base = tempfile::tempdir().unwrap();
    let machine = FakeMachine::start(base.path(), "s1");
    let (sandbox, _events, mut agent) = machine.adopted(base.path(), "s1").await;
    let server = machine.control(vec![Response::Ok; 3], |request, fds| {
        let expected = if *request == Request::Snapshot { 2 } else { 0 };
        assert_eq!(fds.len(), expected);
        for (mut file, text) in fds.into_iter().map(File::from).zip(["state", "memory"]) {
            std::io::Write::write_all(&mut file, text.as_bytes()).unwrap();
        }
    });
    let into = base.path().join("new");
    let options = SaveOptions { into: into.clone(), leave: Leave::Running };
    let saving = base.path().join("s1/saving");
    let meanwhile = {
        let saving = saving.clone();
        move || Ok(saving.exists())
    };
    let (saved, ()) =
        tokio::join!(sandbox.save(options, meanwhile), expect(&mut agent, &[Call::Quiesce, Call::Thaw]));
    let (writing, noted) = saved.unwrap();
    assert!(
        noted && !saving.exists(),
        "a later daemon knows that the machine may stand still, while it does"
    );
    assert_eq!(server.join().unwrap(), [Request::Pause, Request::Snapshot, Request::Resume]);
    assert_eq!(std::fs::read_to_string(into.join("memory")).unwrap(), "memory");
    drop(writing);
    assert!(!into.exists());
}

#[tokio::test]
async fn a_machine_that_cannot_be_saved_runs_on_and_leaves_nothing() {
    for (answers, copied, leave) in [
        (vec![Response::Ok, refused("no"), Response::Ok], true, Leave::Frozen),
        (vec![Response::Ok, Response::Ok, Response::Ok], false, Leave::Paused),
        (vec![refused("no")], true, Leave::Running),
    ] {
        let base = tempfile::tempdir().unwrap();
        let machine = FakeMachine::start(base.path(), "s1");
        let (sandbox, _events, mut agent) = machine.adopted(base.path(), "s1").await;
        let server = machine.control(answers.clone(), |_, _| {});
        let into = base.path().join("new");
        let options = SaveOptions { into: into.clone(), leave };
        let meanwhile = move || if copied { Ok(()) } else { Err(io::ErrorKind::StorageFull.into()) };
        let (saved, ()) =
            tokio::join!(sandbox.save(options, meanwhile), expect(&mut agent, &[Call::Quiesce, Call::Thaw]));
        assert!(saved.is_err());
        assert_eq!(server.join().unwrap().len(), answers.len());
        assert!(!into.exists() && !base.path().join("s1/saving").exists());
    }
}

#[tokio::test]
async fn a_machine_that_a_dead_daemon_was_saving_is_woken_and_named_again() {
    let base = tempfile::tempdir().unwrap();
    let machine = FakeMachine::start(base.path(), "s1");
    std::fs::write(base.path().join("s1/saving"), "").unwrap();
    let status =
        r#"{"response":"status","name":"s1","paused":true,"entered_guest_us":0,"phases":[],"exits":[]}"#;
    let status: Response = serde_json::from_str(status).unwrap();
    let server = machine.control(vec![status, Response::Ok], |_, _| {});
    let woken = async {
        let mut agent = machine.agent().await;
        let call = agent.next_call().await.unwrap();
        let Call::Personalize(identity) = call.call else { panic!("{:?}", call.call) };
        assert!(identity.entropy.len() >= 64 && identity.containers.is_empty());
        agent.answer(call.id, Ok(Answer::Done)).await;
        expect(&mut agent, &[Call::Thaw]).await;
        agent
    };
    let (adopted, _agent) = tokio::join!(Sandbox::adopt(base.path(), "s1"), woken);
    adopted.unwrap();
    assert_eq!(server.join().unwrap(), [Request::Status, Request::Resume]);
    assert!(!base.path().join("s1/saving").exists());
}
