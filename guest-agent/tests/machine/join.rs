//! A container that joins another's machine while it runs, in slots that were empty until then, and leaves it.

use std::{fs, io::Read};

use bulkhead_agent_api::{Answer, Call, Create, Disk, ErrorKind, ProcessId, ProcessState, StreamKind};
use bulkhead_vmm_api::{Request, Response};
use serde_json::json;

use super::{
    PIPES, create, delete, first,
    sandbox::{DISK_SIZE, LATE_DISK, LATE_TAG, Machine, ShareServer, new_disk},
    sh, spec, start,
};

/// The first container's process, told by its command line from those that join it.
const FIRST: &str = ": the first; trap 'exit 4' TERM; echo up; while :; do sleep 0.05; done";

/// Whether that is PID 1. Whoever asks does not find itself.
const SEE_FIRST: &str = "ps | grep -q '^ *1 .*the [f]irst'";

pub(crate) fn joins_and_leaves(machine: &mut Machine) {
    let host = start(machine, "c", sh(FIRST), PIPES);
    let mut up = [0; 3];
    machine.stream(&host, StreamKind::Stdout, 0).unwrap().read_exact(&mut up).unwrap();
    let pid = pid_of(machine, "c");
    let layer = format!("1-{}", machine.layer);

    for (turn, id) in ["second", "third"].into_iter().enumerate() {
        let place = tempfile::tempdir().expect("directory");
        let shared = place.path().join("shared");
        fs::create_dir(&shared).expect("directory");
        fs::write(shared.join("in"), id).expect("file");
        let disk = new_disk(place.path());
        let server = machine.vmm.serve(LATE_TAG, &shared);
        machine.attach_layer_as(&layer);
        let join = joining(machine, id, pid, &layer);
        if turn == 0 {
            // Nothing tells the agent of a disk in a slot that it has found empty.
            let early = machine.send(join);
            machine.vmm.attach_disk_to(LATE_DISK, &disk);
            assert_eq!(machine.answer(early), Ok(Answer::Done));
        } else {
            machine.vmm.attach_disk_to(LATE_DISK, &disk);
            assert_eq!(machine.call(join), Ok(Answer::Done));
        }
        let again = machine.call(joining(machine, "intruder", pid, &layer)).unwrap_err();
        assert_eq!(again.kind, ErrorKind::Conflict, "disk and share are another's: {again:?}");
        run_joined(machine, id);
        leave(machine, id, &layer, server);
        assert_eq!(fs::read_to_string(shared.join("out")).unwrap(), id, "each had its own server");
        super::check_disk(&disk);
        // The first is there, alone again.
        let Answer::State { containers } = machine.call(Call::State).unwrap() else { panic!() };
        let ids: Vec<&str> = containers.iter().map(|state| state.container.as_str()).collect();
        assert_eq!((ids, pid_of(machine, "c")), (vec!["c"], pid));
        assert!(commands(machine, "c").iter().any(|line| line.contains("the first")));
    }

    // Whoever ends the namespace ends all that are in it.
    let place = tempfile::tempdir().expect("directory");
    let server = machine.vmm.serve(LATE_TAG, place.path());
    machine.attach_layer_as(&layer);
    machine.vmm.attach_disk_to(LATE_DISK, &new_disk(place.path()));
    let join = joining(machine, "last", pid, &layer);
    assert_eq!(machine.call(join), Ok(Answer::Done));
    let answer = machine.call(Call::Start { container: "last".into(), stdio: PIPES });
    assert!(matches!(answer, Ok(Answer::Started { .. })), "{answer:?}");
    assert_eq!(machine.call(Call::Signal { process: host.clone(), signal: 15 }), Ok(Answer::Done));
    assert_eq!(machine.exit(&host).code, 4);
    assert_eq!(machine.exit(&first("last")).code, 137);
    leave(machine, "last", &layer, server);
    delete(machine, "c");
}

/// What joins: it is not PID 1, sees who is, and has a disk and a share of its own. Some of it is not its children.
fn joined() -> String {
    format!(
        "(test $$ != 1 && {SEE_FIRST} && test $(readlink /proc/1/ns/pid) = $(readlink /proc/$$/ns/pid) \
          && test ! -e /left && echo mine > /left && cat /data/in > /data/out && echo joined; sleep 1000) & \
         sleep 1001 & wait"
    )
}

/// Starts it, and does to it whatever is done to containers, up to its end.
fn run_joined(machine: &mut Machine, id: &str) {
    let process = first(id);
    let answer = machine.call(Call::Start { container: id.into(), stdio: PIPES });
    assert!(matches!(answer, Ok(Answer::Started { .. })), "{answer:?}");
    let mut text = [0; 7];
    machine.stream(&process, StreamKind::Stdout, 0).unwrap().read_exact(&mut text).unwrap();
    assert_eq!(&text, b"joined\n");
    assert!(commands(machine, id).iter().all(|line| !line.contains("the first")), "each has its own");
    assert_eq!(machine.call(Call::Pause { container: id.into() }), Ok(Answer::Done));
    // The other does not stand still with it.
    assert_eq!(exec(machine, "c", "e", &format!("{SEE_FIRST}; echo $?")), "0\n");
    assert_eq!(machine.call(Call::Resume { container: id.into() }), Ok(Answer::Done));
    let script = format!("cat /left; {SEE_FIRST}; echo $?; test $$ != 1; echo $?");
    assert_eq!(exec(machine, id, "e", &script), "mine\n0\n0\n");
    assert_eq!(exec(machine, "c", "f", "test -e /left; echo $?"), "1\n", "not its own disk");

    let early = machine.call(Call::Delete { process: process.clone() }).unwrap_err();
    assert_eq!(early.kind, ErrorKind::Conflict);
    assert_eq!(machine.call(Call::Signal { process: process.clone(), signal: 9 }), Ok(Answer::Done));
    assert_eq!(machine.exit(&process).code, 137);
    assert_eq!(commands(machine, id), Vec::<String>::new(), "its end is that of all of it");
}

/// Deletes a container that has ended, and takes away what it had.
fn leave(machine: &mut Machine, id: &str, layer: &str, server: ShareServer) {
    delete(machine, id);
    machine.vmm.request(&Request::DetachDisk { id: LATE_DISK.into() }, &[]);
    let detach = Request::DetachServer { tag: LATE_TAG.into() };
    machine.vmm.request(&detach, &[]);
    assert!(server.wait().success());
    assert!(matches!(machine.vmm.ask(&detach, &[]), Response::Error { .. }), "there is none any more");
    machine.vmm.detach_layer(layer);
}

/// The call that makes a container beside the one whose first process is `pid`.
fn joining(machine: &Machine, id: &str, pid: i32, layer: &str) -> Call {
    let mut mounts = spec(json!({}))["mounts"].clone();
    let source = format!("/run/bulkhead/fs/{LATE_TAG}/data");
    let data = json!({"destination": "/data", "type": "bind", "source": source, "options": ["rbind"]});
    mounts.as_array_mut().expect("mounts").push(data);
    let changes = json!({
        "process": {"args": ["sh", "-c", joined()]},
        "mounts": mounts,
        "linux": {"namespaces": [
            {"type": "mount"}, {"type": "uts"}, {"type": "ipc"}, {"type": "cgroup"},
            {"type": "pid", "path": format!("/proc/{pid}/ns/pid")},
        ]},
    });
    let Call::Create(mut call) = create(machine, id, changes) else { panic!("not a create") };
    let Create { rootfs, shares, .. } = &mut *call;
    rootfs.layers = vec![layer.to_owned()];
    rootfs.disk = Disk { id: LATE_DISK.into(), size: DISK_SIZE };
    *shares = Some(LATE_TAG.into());
    Call::Create(call)
}

fn pid_of(machine: &mut Machine, id: &str) -> i32 {
    let Answer::State { containers } = machine.call(Call::State).unwrap() else { panic!() };
    let state = containers.into_iter().find(|state| state.container == id).expect("the container");
    match state.init {
        Some(ProcessState::Running { pid }) => pid,
        other => panic!("{other:?}"),
    }
}

fn commands(machine: &mut Machine, id: &str) -> Vec<String> {
    let answer = machine.call(Call::Processes { container: id.into() }).unwrap();
    let Answer::Processes { processes } = answer else { panic!("{answer:?}") };
    processes.into_iter().map(|process| process.command).collect()
}

/// Stdout of a script in a container.
fn exec(machine: &mut Machine, container: &str, id: &str, script: &str) -> String {
    let process = ProcessId { container: container.into(), exec: Some(id.into()) };
    let whole = spec(sh(script))["process"].clone();
    let spec = Box::new(serde_json::from_value(whole).expect("process"));
    let answer = machine.call(Call::Exec { process: process.clone(), spec, stdio: PIPES });
    assert!(matches!(answer, Ok(Answer::Started { .. })), "{answer:?}");
    machine.exit(&process);
    let out = machine.read_all(&process, StreamKind::Stdout);
    assert_eq!(machine.call(Call::Delete { process }), Ok(Answer::Done));
    String::from_utf8(out).expect("text")
}
