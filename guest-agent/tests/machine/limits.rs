//! A container is paused, watched, and its limits are changed while it runs.

use bulkhead_agent_api::{Answer, Call, ErrorKind, ProcessId, StreamKind};
use serde_json::{Value, json};

use crate::{PIPES, delete, sandbox::Machine, sh, start};

const CONTAINER: &str = "c";

fn update(machine: &mut Machine, resources: Value) -> Result<Answer, ErrorKind> {
    let resources = serde_json::from_value(resources).expect("resources");
    let call = Call::Update { container: CONTAINER.into(), resources: Box::new(resources) };
    machine.call(call).map_err(|error| error.kind)
}

fn exec(machine: &mut Machine, id: &str, script: &str) -> Result<String, ErrorKind> {
    let process = ProcessId { container: CONTAINER.into(), exec: Some(id.into()) };
    let spec = json!({"user": {"uid": 0, "gid": 0, "username": "0"}, "args": ["sh", "-c", script], "cwd": "/",
        "env": ["PATH=/bin"]});
    let spec = serde_json::from_value(spec).expect("process");
    let call = Call::Exec { process: process.clone(), spec: Box::new(spec), stdio: PIPES };
    machine.call(call).map_err(|error| error.kind)?;
    machine.exit(&process);
    let text = machine.read_all(&process, StreamKind::Stdout);
    assert_eq!(machine.call(Call::Delete { process }), Ok(Answer::Done));
    Ok(String::from_utf8_lossy(&text).trim().to_owned())
}

pub(crate) fn limits(machine: &mut Machine) {
    let process = start(machine, CONTAINER, sh("while :; do usleep 10000; done"), PIPES);
    let container = || CONTAINER.to_owned();
    let calls = |machine: &mut Machine, call| assert_eq!(machine.call(call), Ok(Answer::Done));

    calls(machine, Call::Pause { container: container() });
    calls(machine, Call::Pause { container: container() });
    assert_eq!(exec(machine, "e0", "true"), Err(ErrorKind::Conflict));
    let Ok(Answer::State { containers }) = machine.call(Call::State) else { panic!("state") };
    assert!(containers.iter().any(|state| state.container == CONTAINER && state.paused));
    calls(machine, Call::Resume { container: container() });
    calls(machine, Call::Resume { container: container() });

    assert_eq!(update(machine, json!({"pids": {"limit": 50}, "cpu": {"quota": 30000}})), Ok(Answer::Done));
    let shown = "cat /sys/fs/cgroup/pids.max /sys/fs/cgroup/cpu.max";
    assert_eq!(exec(machine, "e1", shown).as_deref(), Ok("50\n30000 100000"));
    // What cannot be set takes the rest along, and back.
    let wrong = json!({"pids": {"limit": 60}, "unified": {"memory.nosuch": "1"}});
    assert_eq!(update(machine, wrong), Err(ErrorKind::Invalid));
    assert_eq!(exec(machine, "e2", shown).as_deref(), Ok("50\n30000 100000"));

    let Ok(Answer::Stats(stats)) = machine.call(Call::Stats { container: container() }) else {
        panic!("stats")
    };
    assert!(stats.cpu.usage_us > 0 && stats.cpu.online > 0 && stats.cpu.periods > 0, "{stats:?}");
    assert!(stats.memory.usage > 0 && stats.memory.total > 32 << 20, "{stats:?}");
    assert!(stats.memory.stat.iter().any(|(name, _)| name == "inactive_file"), "{stats:?}");
    assert_eq!((stats.pids >= 1, stats.pids_limit), (true, Some(50)));

    // A paused container dies of a signal that cannot be caught.
    calls(machine, Call::Pause { container: container() });
    calls(machine, Call::Signal { process: process.clone(), signal: 9 });
    assert_eq!(machine.exit(&process).code, 137);
    delete(machine, CONTAINER);
    for call in [Call::Pause { container: container() }, Call::Stats { container: container() }] {
        assert_eq!(machine.call(call).map_err(|error| error.kind), Err(ErrorKind::NotFound));
    }
}
