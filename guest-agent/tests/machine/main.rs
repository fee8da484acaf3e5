//! The agent as PID 1 of a real machine, driven over the wire as the daemon does.
//!
//! Needs usable KVM, a VMM, a guest kernel and an initramfs with the agent, named by `BULKHEAD_VMM`,
//! `BULKHEAD_KERNEL` and `BULKHEAD_INITRAMFS`; without them it says so and does nothing. One machine, one
//! container after the other: `cargo test -p bulkhead-agent --test machine [NAME]`.

mod join;
mod limits;
mod sandbox;
mod snapshots;

use std::{
    io::{Read, Write},
    path::Path,
    process::ExitCode,
    time::Instant,
};

use bulkhead_agent_api::{
    Answer, Call, Create, Disk, ErrorKind, Event, Exit, InjectedFile, ProcessId, ProcessState, Rootfs, Stdio,
    StreamKind,
};
use sandbox::{DISK, DISK_SIZE, Machine, Needs, TAG, new_disk};
use serde_json::{Value, json};

const PIPES: Stdio = Stdio { terminal: false, size: None, stdin: false, stdout: true, stderr: true };

type Test = fn(&mut Machine);

const TESTS: [(&str, Test); 19] = [
    ("output_and_exit_code", output_and_exit_code),
    ("writes_stay_and_layers_do_not_change", writes_stay),
    ("start_failures_have_runcs_words", start_failures),
    ("signals_and_codes", signals),
    ("stdin_to_its_end", stdin_to_its_end),
    ("much_output_under_back_pressure", much_output),
    ("execs_join_the_container", execs),
    ("an_execs_grandchild_does_not_hold_its_output", grandchild),
    ("a_new_daemon_goes_on", new_daemon),
    ("terminal", terminal),
    ("container_init", container_init),
    ("isolation", isolation),
    ("identity_and_limits", identity),
    ("seccomp", seccomp),
    ("memory_limit", memory_limit),
    ("injected_files", injected_files),
    ("pause_update_and_stats", limits::limits),
    ("short_runs_lose_nothing", short_runs),
    ("a_second_container_joins_and_leaves", join::joins_and_leaves),
];

/// The whole run as one test, for nextest, which asks for names and then for one by its name.
const ALL: &str = "machine";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.iter().any(|argument| argument == "--list") {
        if !arguments.iter().any(|argument| argument == "--ignored") {
            println!("{ALL}: test");
        }
        return ExitCode::SUCCESS;
    }
    let needs = match Needs::from_environment() {
        Ok(needs) => needs,
        Err(reason) => {
            eprintln!("SKIPPED: the agent's machine tests did not run: {reason}");
            return ExitCode::SUCCESS;
        }
    };
    let filter = arguments.into_iter().find(|argument| !argument.starts_with('-') && argument != ALL);
    let directory = tempfile::tempdir().expect("directory");
    let begun = Instant::now();
    let mut machine = Machine::boot(&needs, directory.path());
    println!(
        "kernel {}, agent after {} us of guest time, ready after {:?}",
        machine.hello.kernel,
        machine.hello.started_us,
        begun.elapsed()
    );
    // A create may come before its disk.
    let early = machine.send(create(&machine, "early", json!({})));
    machine.vmm.attach_disk(&new_disk(directory.path()));
    machine.answer(early).expect("create");
    delete(&mut machine, "early");
    for (name, test) in TESTS {
        if filter.as_ref().is_none_or(|filter| name.contains(filter.as_str())) {
            let begun = Instant::now();
            test(&mut machine);
            println!("ok {name} ({:?})", begun.elapsed());
        }
    }
    let report = machine.shut_down();
    assert_eq!(report.reason, bulkhead_vmm_api::ExitReason::PoweredOff, "{report:?}");
    println!("ok shut_down");
    check_disk(&directory.path().join("disk"));
    for (name, test) in snapshots::TESTS {
        if filter.as_ref().is_none_or(|filter| name.contains(filter.as_str())) {
            let begun = Instant::now();
            test(&needs);
            println!("ok {name} ({:?})", begun.elapsed());
        }
    }
    ExitCode::SUCCESS
}

/// The guest unmounted it: nothing is left to be replayed or repaired.
fn check_disk(disk: &Path) {
    let output = std::process::Command::new("e2fsck")
        .args(["-f", "-n"])
        .arg(disk)
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .output()
        .expect("e2fsck");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    println!("ok the disk is clean");
}

/// A spec as Docker makes it, with `changes` merged in.
fn spec(changes: Value) -> Value {
    let caps = json!([
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FSETID",
        "CAP_FOWNER",
        "CAP_MKNOD",
        "CAP_NET_RAW",
        "CAP_SETGID",
        "CAP_SETUID",
        "CAP_SETFCAP",
        "CAP_SETPCAP",
        "CAP_NET_BIND_SERVICE",
        "CAP_SYS_CHROOT",
        "CAP_KILL",
        "CAP_AUDIT_WRITE"
    ]);
    let mut spec = json!({
        "ociVersion": "1.2.0",
        "process": {
            "user": {"uid": 0, "gid": 0, "username": "0"},
            "args": ["sh"], "cwd": "/",
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOSTNAME=box"],
            "capabilities": {"bounding": caps, "effective": caps, "permitted": caps},
        },
        "hostname": "box",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs",
             "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
             "options": ["ro", "nosuid", "noexec", "nodev"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
             "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
             "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=67108864"]},
        ],
        "linux": {
            "namespaces": [{"type": "mount"}, {"type": "uts"}, {"type": "pid"}, {"type": "ipc"}, {"type": "cgroup"}],
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware", "/proc/nosuch"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
            "sysctl": {"net.ipv4.ip_unprivileged_port_start": "0"},
        },
    });
    merge(&mut spec, changes);
    spec
}

fn merge(into: &mut Value, from: Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (into, from) => *into = from,
    }
}

fn create(machine: &Machine, id: &str, changes: Value) -> Call {
    Call::Create(Box::new(Create {
        container: id.into(),
        rootfs: Rootfs {
            tag: TAG.into(),
            layers: vec![machine.layer.clone()],
            disk: Disk { id: DISK.into(), size: DISK_SIZE },
        },
        spec: Box::new(serde_json::from_value(spec(changes)).expect("spec")),
        files: vec![InjectedFile {
            path: "/etc/hosts".into(),
            content: "127.0.0.1 box\n".into(),
            mode: 0o644,
        }],
        shares: None,
        copy_up: Vec::new(),
        sockets: Vec::new(),
        disks: Vec::new(),
        shared_memory: None,
    }))
}

fn first(id: &str) -> ProcessId {
    ProcessId { container: id.into(), exec: None }
}

fn delete(machine: &mut Machine, id: &str) {
    assert_eq!(machine.call(Call::Delete { process: first(id) }), Ok(Answer::Done));
    machine.forget(id);
}

/// Creates and starts.
fn start(machine: &mut Machine, id: &str, changes: Value, stdio: Stdio) -> ProcessId {
    let create = create(machine, id, changes);
    assert_eq!(machine.call(create), Ok(Answer::Done));
    let answer = machine.call(Call::Start { container: id.into(), stdio });
    assert!(matches!(answer, Ok(Answer::Started { .. })), "{answer:?}");
    first(id)
}

fn args(args: &[&str]) -> Value {
    json!({"process": {"args": args}})
}

fn sh(script: &str) -> Value {
    args(&["sh", "-c", script])
}

/// Runs to the end: exit, stdout, stderr.
fn run(machine: &mut Machine, changes: Value) -> (Exit, String, String) {
    let process = start(machine, "c", changes, PIPES);
    let exit = machine.exit(&process);
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    let out = text(machine.read_all(&process, StreamKind::Stdout));
    let err = text(machine.read_all(&process, StreamKind::Stderr));
    delete(machine, "c");
    (exit, out, err)
}

/// Stdout of a run that must succeed.
fn output(machine: &mut Machine, changes: Value) -> String {
    let (exit, out, err) = run(machine, changes);
    assert_eq!((exit.code, err.as_str()), (0, ""), "{out}");
    out
}

fn output_and_exit_code(machine: &mut Machine) {
    let (exit, out, err) = run(machine, sh("echo out; echo err >&2; exit 7"));
    assert_eq!((exit.code, exit.oom_killed, out.as_str(), err.as_str()), (7, false, "out\n", "err\n"));
    assert_eq!(output(machine, args(&["hostname"])), "box\n");
}

fn writes_stay(machine: &mut Machine) {
    output(machine, sh("echo kept > /kept; echo changed >> /etc/shells"));
    assert_eq!(output(machine, sh("cat /kept; cat /etc/shells")), "kept\n/bin/sh\nchanged\n");
}

fn start_failures(machine: &mut Machine) {
    for (changes, kind, message) in [
        (args(&["nosuch"]), ErrorKind::NotFound, "exec: \"nosuch\": executable file not found in $PATH"),
        (
            args(&["/nosuch"]),
            ErrorKind::NotFound,
            "exec: \"/nosuch\": stat /nosuch: no such file or directory",
        ),
        (args(&["/etc/passwd"]), ErrorKind::NotExecutable, "exec: \"/etc/passwd\": permission denied"),
        (args(&["/etc"]), ErrorKind::NotExecutable, "exec: \"/etc\": is a directory"),
        (args(&["garbage"]), ErrorKind::NotExecutable, "exec /bin/garbage: exec format error"),
        (args(&["orphan"]), ErrorKind::NotFound, "exec /bin/orphan: no such file or directory"),
        (
            json!({"process": {"user": {"username": "nobody"}}}),
            ErrorKind::Invalid,
            "unable to find user nobody: no matching entries in passwd file",
        ),
    ] {
        let create = create(machine, "c", changes);
        machine.call(create).expect("create");
        let error = machine.call(Call::Start { container: "c".into(), stdio: PIPES }).unwrap_err();
        assert_eq!((error.kind, error.message.as_str()), (kind, message));
        delete(machine, "c");
    }
    let refused = create(machine, "c", json!({"process": {"apparmorProfile": "x"}}));
    assert_eq!(machine.call(refused).unwrap_err().kind, ErrorKind::Invalid);
    let bad = create(machine, "../c", json!({}));
    assert_eq!(machine.call(bad).unwrap_err().kind, ErrorKind::Invalid);
}

fn signals(machine: &mut Machine) {
    for (script, signal, code) in
        [("echo up; sleep 100", 9, 137), ("trap 'exit 5' TERM; echo up; while :; do sleep 0.05; done", 15, 5)]
    {
        // Up with its handler: before, PID 1 would not get the signal at all.
        let process = start(machine, "c", sh(script), PIPES);
        let mut up = [0; 3];
        machine.stream(&process, StreamKind::Stdout, 0).unwrap().read_exact(&mut up).unwrap();
        assert_eq!(machine.call(Call::Signal { process: process.clone(), signal }), Ok(Answer::Done));
        assert_eq!(machine.exit(&process).code, code);
        let again = machine.call(Call::Signal { process, signal }).unwrap_err();
        assert_eq!(again.kind, ErrorKind::NotFound);
        delete(machine, "c");
    }
}

fn stdin_to_its_end(machine: &mut Machine) {
    let stdio = Stdio { stdin: true, ..PIPES };
    let process = start(machine, "c", args(&["sha256sum"]), stdio);
    let data: Vec<u8> = (0..8_000_000u32).map(|index| (index * 7 % 251) as u8).collect();
    let mut stdin = machine.stream(&process, StreamKind::Stdin, 0).unwrap();
    stdin.write_all(&data[..4_000_000]).unwrap();
    // The agent hangs up when it has taken everything.
    stdin.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(stdin.read(&mut [0]).unwrap(), 0);
    let mut stdin = machine.stream(&process, StreamKind::Stdin, 0).unwrap();
    stdin.write_all(&data[4_000_000..]).unwrap();
    stdin.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(machine.call(Call::CloseStdin { process: process.clone() }), Ok(Answer::Done));
    assert_eq!(machine.exit(&process).code, 0);
    let out = String::from_utf8(machine.read_all(&process, StreamKind::Stdout)).unwrap();
    assert_eq!(out.split(' ').next().unwrap(), sha256(&data));
    delete(machine, "c");
}

fn sha256(data: &[u8]) -> String {
    use std::process::{Command, Stdio};
    let mut child = Command::new("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(data).unwrap();
    let output = child.wait_with_output().unwrap();
    String::from_utf8(output.stdout).unwrap().split(' ').next().unwrap().to_owned()
}

fn much_output(machine: &mut Machine) {
    let process = start(machine, "c", sh("yes 0123456789abcde | head -c 20000000"), PIPES);
    let out = machine.read_all(&process, StreamKind::Stdout);
    assert_eq!(out.len(), 20_000_000);
    assert!(out.chunks(16).all(|line| line == b"0123456789abcde\n"));
    assert_eq!(machine.exit(&process).code, 0);
    delete(machine, "c");
}

fn exec(machine: &mut Machine, id: &str, process: Value, stdio: Stdio) -> Result<ProcessId, String> {
    let process_id = ProcessId { container: "c".into(), exec: Some(id.into()) };
    let mut whole = spec(json!({}))["process"].clone();
    merge(&mut whole, process);
    let spec = Box::new(serde_json::from_value(whole).expect("process"));
    let call = Call::Exec { process: process_id.clone(), spec, stdio };
    machine.call(call).map(|_| process_id).map_err(|error| error.message)
}

fn execs(machine: &mut Machine) {
    let first = start(machine, "c", sh("echo here > /tmp/x; sleep 100"), PIPES);
    // The first process may not have written yet.
    let script = "until [ -s /tmp/x ]; do sleep 0.1; done; cat /tmp/x; hostname; id -u; exit 3";
    let changes = json!({"args": ["sh", "-c", script], "user": {"username": "web"}});
    let process = exec(machine, "e1", changes, PIPES).unwrap();
    assert_eq!(machine.exit(&process).code, 3);
    let out = String::from_utf8(machine.read_all(&process, StreamKind::Stdout)).unwrap();
    assert_eq!(out, "here\nbox\n33\n");
    let missing = exec(machine, "e2", json!({"args": ["nosuch"]}), PIPES).unwrap_err();
    assert_eq!(missing, "exec: \"nosuch\": executable file not found in $PATH");
    let missing = exec(machine, "e3", json!({"args": ["sh"], "cwd": "/nosuch"}), PIPES).unwrap_err();
    assert_eq!(missing, "chdir to cwd (\"/nosuch\") set in config.json failed: no such file or directory");
    let Answer::Processes { processes } = machine.call(Call::Processes { container: "c".into() }).unwrap()
    else {
        panic!()
    };
    assert!(processes.iter().any(|process| process.command == "sleep 100"), "{processes:?}");
    assert_eq!(machine.call(Call::Delete { process }), Ok(Answer::Done));
    let lasting = exec(machine, "e4", json!({"args": ["sleep", "100"]}), PIPES).unwrap();
    machine.call(Call::Signal { process: first.clone(), signal: 9 }).unwrap();
    assert_eq!(machine.exit(&first).code, 137);
    assert_eq!(machine.exit(&lasting).code, 137);
    delete(machine, "c");
}

fn grandchild(machine: &mut Machine) {
    let first = start(machine, "c", args(&["sleep", "100"]), PIPES);
    let changes = json!({"args": ["sh", "-c", "sleep 90 & echo last"]});
    let process = exec(machine, "e", changes, PIPES).unwrap();
    assert_eq!(machine.exit(&process).code, 0);
    assert_eq!(machine.read_all(&process, StreamKind::Stdout), b"last\n");
    machine.call(Call::Signal { process: first.clone(), signal: 9 }).unwrap();
    machine.exit(&first);
    delete(machine, "c");
}

fn new_daemon(machine: &mut Machine) {
    let process = start(machine, "c", sh("echo one; sleep 1; echo two; exit 4"), PIPES);
    let mut stream = machine.stream(&process, StreamKind::Stdout, 0).unwrap();
    let mut one = [0; 4];
    stream.read_exact(&mut one).unwrap();
    stream.write_all(&4u64.to_le_bytes()).unwrap();
    drop(stream);
    machine.reconnect();
    // Whether it ends before the new daemon asks or after, the state comes to tell.
    let exit = loop {
        let Answer::State { containers } = machine.call(Call::State).unwrap() else { panic!() };
        match containers[0].init {
            Some(ProcessState::Exited(exit)) => break exit,
            Some(ProcessState::Running { .. }) => std::thread::sleep(std::time::Duration::from_millis(100)),
            None => panic!("{containers:?}"),
        }
    };
    assert_eq!(exit.code, 4);
    let mut rest = String::new();
    machine.stream(&process, StreamKind::Stdout, 4).unwrap().read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "two\n");
    assert_eq!(machine.stream(&process, StreamKind::Stdout, 0).unwrap_err().kind, ErrorKind::Conflict);
    delete(machine, "c");
}

fn terminal(machine: &mut Machine) {
    let stdio = Stdio { terminal: true, size: Some((33, 77)), stdin: true, stdout: true, stderr: false };
    let script =
        "stty size; read line; echo got $line; stty size; test -t 0 && test -c /dev/console; exit $?";
    let process = start(machine, "c", sh(script), stdio);
    let mut out = machine.stream(&process, StreamKind::Stdout, 0).unwrap();
    let mut size = [0; 7];
    out.read_exact(&mut size).unwrap();
    assert_eq!(&size, b"33 77\r\n");
    let resize = Call::Resize { process: process.clone(), rows: 10, columns: 20 };
    assert_eq!(machine.call(resize), Ok(Answer::Done));
    machine.stream(&process, StreamKind::Stdin, 0).unwrap().write_all(b"words\n").unwrap();
    let mut rest = String::new();
    out.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "words\r\ngot words\r\n10 20\r\n");
    assert_eq!(machine.exit(&process).code, 0);
    delete(machine, "c");
}

fn container_init(machine: &mut Machine) {
    let init = json!({"annotations": {"org.bulkhead.init": "true"}});
    let with = |script: &str| {
        let mut changes = sh(script);
        merge(&mut changes, init.clone());
        changes
    };
    let (exit, out, _) = run(machine, with("(sleep 0.1 &) ; cat /proc/1/cmdline | head -c 20; exit 6"));
    assert_eq!((exit.code, out.as_str()), (6, "/sbin/docker-init\0--"));
    assert_eq!(run(machine, with("kill -11 $$")).0.code, 139);
    let process = start(machine, "c", with("echo up; sleep 100"), PIPES);
    let mut up = [0; 3];
    machine.stream(&process, StreamKind::Stdout, 0).unwrap().read_exact(&mut up).unwrap();
    machine.call(Call::Signal { process: process.clone(), signal: 15 }).unwrap();
    assert_eq!(machine.exit(&process).code, 143);
    delete(machine, "c");
}

fn isolation(machine: &mut Machine) {
    // The guest's disk: no node in /dev, and a node of its own making is not to be opened.
    let script =
        "ls /dev/vd* 2>/dev/null; mknod /disk b 254 0 || mknod /disk b 253 0; head -c 1 /disk; echo $?";
    let (_, out, err) = run(machine, sh(script));
    assert_eq!(out, "1\n", "{err}");
    assert!(err.contains("Operation not permitted"), "{err}");
    // Nothing of the agent's mounts or processes.
    let mounts = output(machine, args(&["cat", "/proc/self/mountinfo"]));
    for foreign in ["virtiofs", "ext4", "devtmpfs"] {
        assert!(!mounts.contains(foreign), "{foreign} in\n{mounts}");
    }
    // The shell alone: neither the agent nor anything else of the guest's.
    assert_eq!(output(machine, sh("echo /proc/[0-9]*")), "/proc/1\n");
    assert!(run(machine, sh("echo 1 > /proc/sys/kernel/hostname")).2.contains("Read-only"));
    let readonly = json!({"root": {"path": "", "readonly": true}, "process": {"args": ["touch", "/x"]}});
    assert!(run(machine, readonly).2.contains("Read-only"));
    assert_eq!(output(machine, args(&["cat", "/proc/self/cgroup"])), "0::/\n");
    // No descriptor leaks in: stdio, and what ls itself opened.
    assert_eq!(output(machine, args(&["ls", "/proc/self/fd"])), "0\n1\n2\n3\n");
    assert_eq!(
        output(machine, sh("echo x > /dev/null; head -c 4 /dev/zero | wc -c; readlink /dev/ptmx")),
        "4\npts/ptmx\n"
    );
}

fn identity(machine: &mut Machine) {
    let web = json!({"process": {"args": ["sh", "-c", "id; echo $HOME; pwd"], "cwd": "/made/here",
        "user": {"username": "web"}}, "annotations": {"org.bulkhead.group-add": "50"}});
    assert_eq!(
        output(machine, web),
        "uid=33(web) gid=34(web) groups=29(audio),34(web),50\n/srv\n/made/here\n"
    );
    let limited = json!({"process": {"args": ["sh", "-c",
        "ulimit -n; cat /sys/fs/cgroup/pids.max /sys/fs/cgroup/cpu.max; cat /proc/self/oom_score_adj; grep -E 'Cap(Eff|Bnd)|NoNewPrivs' /proc/self/status"],
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 123, "hard": 456}], "oomScoreAdj": 77, "noNewPrivileges": true,
        "capabilities": {"bounding": ["CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"]}},
        "linux": {"resources": {"pids": {"limit": 55}, "cpu": {"quota": 50000, "period": 100000}}}});
    assert_eq!(
        output(machine, limited),
        "123\n55\n50000 100000\n77\nCapEff:\t0000000000000020\nCapBnd:\t0000000000000020\nNoNewPrivs:\t1\n"
    );
}

fn seccomp(machine: &mut Machine) {
    for confined in [false, true] {
        let profile = json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [{"names": ["mknod", "mknodat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}]});
        let changes = json!({"process": {"args": ["mknod", "/n", "p"], "noNewPrivileges": confined},
            "linux": {"seccomp": profile}});
        let (exit, _, err) = run(machine, changes);
        assert_eq!(exit.code, 1);
        assert!(err.contains("not implemented"), "{err}");
    }
}

fn memory_limit(machine: &mut Machine) {
    let changes = json!({"process": {"args": ["sh", "-c", "head -c 60000000 /dev/zero | tail | wc -c"]},
        "linux": {"resources": {"memory": {"limit": 16 << 20, "swap": 16 << 20}}}});
    let process = start(machine, "c", changes, PIPES);
    let exit = machine.exit(&process);
    assert!(exit.oom_killed, "{exit:?}");
    machine.event(|event| matches!(event, Event::Oom { container } if container == "c").then_some(()));
    delete(machine, "c");
}

fn injected_files(machine: &mut Machine) {
    assert_eq!(
        output(machine, sh("cat /etc/hosts; echo more >> /etc/hosts; tail -n 1 /etc/hosts")),
        "127.0.0.1 box\nmore\n"
    );
    assert_eq!(output(machine, args(&["cat", "/etc/hosts"])), "127.0.0.1 box\n");
}

fn short_runs(machine: &mut Machine) {
    for index in 0..20 {
        let text = format!("line {index}");
        assert_eq!(output(machine, args(&["echo", &text])), format!("{text}\n"));
    }
}
