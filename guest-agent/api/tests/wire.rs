//! The wire is frozen: every kind of message stands in `wire.txt` as it is sent. An agent of an older
//! daemon must go on understanding a newer one, so lines are added there and never changed; a change that
//! this test shows is a new version.

use bulkhead_agent_api::{
    AgentError, Answer, Call, ContainerIdentity, ContainerState, CopyUp, CpuStats, Create, Disk, ErrorKind,
    Event, Exit, ForwardedSocket, FromAgent, Gateway, Hello, Identity, InjectedFile, Interface,
    InterfaceAddress, IoStats, KnownOutput, MemoryStats, NetworkStats, ProcessDetail, ProcessId, ProcessInfo,
    ProcessState, Rootfs, SharedMemory, Stats, Stdio, StreamKind, StreamOpen, StreamReady, ToAgent,
    VolumeDisk,
    files::{Change, ChangeKind, FilesDone, FilesOpen, FilesReady, FilesRequest, PathStat},
};
use serde::{Serialize, de::DeserializeOwned};

const FROZEN: &str = include_str!("wire.txt");

/// The messages as text, in the order of the file; each was read back as the same.
#[derive(Default)]
struct Wire {
    lines: String,
}

impl Wire {
    fn message<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(&mut self, message: &T) {
        let text = serde_json::to_string(message).unwrap();
        assert_eq!(&serde_json::from_str::<T>(&text).unwrap(), message, "{text}");
        self.lines.push_str(&text);
        self.lines.push('\n');
    }
}

fn init() -> ProcessId {
    ProcessId { container: "c1".into(), exec: None }
}

fn exec() -> ProcessId {
    ProcessId { container: "c1".into(), exec: Some("e1".into()) }
}

fn calls() -> Vec<Call> {
    let spec = r#"{"ociVersion":"1.2.0","process":{"user":{"uid":0,"gid":0},"cwd":"/"}}"#;
    let process = r#"{"user":{"uid":0,"gid":0,"username":"web:audio"},"args":["a"],"cwd":"/"}"#;
    let stdio = Stdio { terminal: true, size: Some((24, 80)), stdin: true, stdout: true, stderr: false };
    vec![
        Call::Create(Box::new(Create {
            container: "c1".into(),
            rootfs: Rootfs {
                tag: "layers".into(),
                layers: vec!["top".into(), "base".into()],
                disk: Disk { id: "disk0".into(), size: 1 << 30 },
            },
            spec: Box::new(serde_json::from_str(spec).unwrap()),
            files: vec![InjectedFile { path: "/etc/hosts".into(), content: "x\n".into(), mode: 0o644 }],
            shares: None,
            copy_up: Vec::new(),
            sockets: Vec::new(),
            disks: Vec::new(),
            shared_memory: None,
        })),
        Call::Start { container: "c1".into(), stdio: Stdio::default() },
        Call::Exec { process: exec(), spec: Box::new(serde_json::from_str(process).unwrap()), stdio },
        Call::Signal { process: init(), signal: 15 },
        Call::Resize { process: exec(), rows: 24, columns: 80 },
        Call::CloseStdin { process: init() },
        Call::State,
        Call::Processes { container: "c1".into() },
        Call::Delete { process: init() },
        Call::SetClock { unix_ns: 1_800_000_000_000_000_001 },
        Call::Shutdown,
        Call::NetworkConnect(Box::new(Interface {
            device: [2, 66, 172, 17, 0, 2],
            mac: [2, 66, 172, 17, 0, 3],
            name: "eth0".into(),
            mtu: 1500,
            addresses: vec![
                InterfaceAddress { address: "172.17.0.2".parse().unwrap(), prefix: 16 },
                InterfaceAddress { address: "fd00::2".parse().unwrap(), prefix: 64 },
            ],
        })),
        Call::NetworkDisconnect { mac: [2, 66, 172, 17, 0, 2] },
        Call::NetworkRoutes {
            gateways: vec![Gateway { mac: [2, 66, 172, 17, 0, 2], address: "172.17.0.1".parse().unwrap() }],
        },
        Call::NetworkFiles {
            container: "c1".into(),
            files: vec![InjectedFile { path: "/etc/hosts".into(), content: "x\n".into(), mode: 0o644 }],
        },
    ]
}

/// Of machines that are saved and copied.
fn saving() -> Vec<Call> {
    let identity = Identity {
        entropy: vec![0, 1, 255],
        unix_ns: 1_800_000_000_000_000_001,
        hostname: "h1".into(),
        containers: vec![ContainerIdentity {
            container: "c1".into(),
            hostname: "h1".into(),
            files: vec![InjectedFile { path: "/etc/hosts".into(), content: "x\n".into(), mode: 0o644 }],
            end_execs: true,
            known: Some(KnownOutput { stdout: 5, stderr: u64::MAX }),
        }],
    };
    vec![Call::Personalize(Box::new(identity)), Call::Quiesce, Call::Thaw]
}

fn from_agent() -> Vec<FromAgent> {
    let exit = Exit { code: 137, oom_killed: true, unix_ns: 1_800_000_000_000_000_001 };
    let process = ProcessInfo {
        pid: 7,
        ppid: 1,
        uid: 33,
        tty: "?".into(),
        start_unix: 1_800_000_000,
        cpu_ms: 12,
        command: "sleep 1".into(),
        detail: None,
    };
    let container = ContainerState {
        container: "c1".into(),
        init: Some(ProcessState::Running { pid: 5 }),
        execs: vec![("e1".into(), ProcessState::Exited(exit))],
        paused: false,
    };
    let answers = [
        Answer::Done,
        Answer::Started { pid: 5 },
        Answer::State { containers: vec![container] },
        Answer::Processes { processes: vec![process] },
    ];
    let kinds = [
        ErrorKind::NotFound,
        ErrorKind::NotExecutable,
        ErrorKind::Conflict,
        ErrorKind::Invalid,
        ErrorKind::Internal,
    ];
    let answer = |result| FromAgent::Answer { id: 9, result };
    let mut messages: Vec<FromAgent> = answers.map(|given| answer(Ok(given))).into();
    messages.extend(kinds.map(|kind| answer(Err(AgentError { kind, message: "why".into() }))));
    messages.push(FromAgent::Event(Event::Exited { process: init(), exit }));
    messages.push(FromAgent::Event(Event::Oom { container: "c1".into() }));
    messages
}

fn stats() -> Stats {
    Stats {
        cpu: CpuStats { usage_us: 30, user_us: 10, system_us: 20, online: 2, ..CpuStats::default() },
        memory: MemoryStats {
            usage: 4096,
            limit: Some(8192),
            stat: vec![("anon".into(), 5)],
            ..MemoryStats::default()
        },
        pids: 3,
        pids_limit: None,
        io: vec![IoStats { major: 254, read_bytes: 512, ..IoStats::default() }],
        networks: vec![("eth0".into(), NetworkStats { rx_bytes: 100, ..NetworkStats::default() })],
    }
}

/// Pausing, updating and watching a container.
fn pausing_and_stats(wire: &mut Wire) {
    for call in [
        Call::Pause { container: "c1".into() },
        Call::Resume { container: "c1".into() },
        Call::Update {
            container: "c1".into(),
            resources: Box::new(serde_json::from_str(r#"{"pids":{"limit":7}}"#).unwrap()),
        },
        Call::Stats { container: "c1".into() },
    ] {
        wire.message(&ToAgent { id: 9, call });
    }
    let paused = ContainerState { container: "c1".into(), init: None, execs: vec![], paused: true };
    for answer in [Answer::State { containers: vec![paused] }, Answer::Stats(Box::new(stats()))] {
        wire.message(&FromAgent::Answer { id: 9, result: Ok(answer) });
    }
}

fn shares(wire: &mut Wire) {
    let create = Create {
        shares: Some("shares".into()),
        copy_up: vec![CopyUp { share: "0".into(), path: "/data".into() }],
        sockets: vec![ForwardedSocket { path: "/run/s".into(), port: 5000, uid: 1, gid: 2, mode: 0o660 }],
        disks: vec![VolumeDisk {
            disk: Disk { id: "disk0".into(), size: 1 << 30 },
            read_only: false,
            copy_up: Some("/var/lib/db".into()),
        }],
        ..plain("c1")
    };
    wire.message(&ToAgent { id: 12, call: Call::Create(Box::new(create)) });
}

/// A container of no layers, and nothing else.
fn plain(container: &str) -> Create {
    Create {
        container: container.into(),
        rootfs: Rootfs {
            tag: "layers".into(),
            layers: Vec::new(),
            disk: Disk { id: "disk0".into(), size: 1 << 30 },
        },
        spec: Box::new(serde_json::from_str(r#"{"ociVersion":"1.2.0"}"#).unwrap()),
        files: Vec::new(),
        shares: None,
        copy_up: Vec::new(),
        sockets: Vec::new(),
        disks: Vec::new(),
        shared_memory: None,
    }
}

/// Containers that share their `/dev/shm`.
fn shared_memory(wire: &mut Wire) {
    for memory in [SharedMemory::Own(64 << 20), SharedMemory::Of("c1".into())] {
        let create = Create { shared_memory: Some(memory), ..plain("c2") };
        wire.message(&ToAgent { id: 13, call: Call::Create(Box::new(create)) });
    }
}

fn memory(wire: &mut Wire) {
    wire.message(&ToAgent { id: 10, call: Call::AwaitMemory { plugged_mib: 64 } });
    wire.message(&ToAgent { id: 11, call: Call::Reclaim { container: "c1".into(), percent: 25 } });
    wire.message(&FromAgent::Answer { id: 11, result: Ok(Answer::Reclaimed { bytes: 4096 }) });
}

/// A process as a newer agent tells of it.
fn process_detail(wire: &mut Wire) {
    let detail = ProcessDetail {
        name: "sleep".into(),
        state: "S".into(),
        group: 7,
        session: 7,
        foreground: -1,
        nice: 5,
        threads: 1,
        euid: 33,
        gid: 34,
        virtual_bytes: 8192,
        resident_bytes: 4096,
        total_bytes: 1 << 29,
    };
    let process = ProcessInfo {
        pid: 7,
        ppid: 1,
        uid: 33,
        tty: "?".into(),
        start_unix: 1_800_000_000,
        cpu_ms: 12,
        command: "sleep 1".into(),
        detail: Some(detail),
    };
    wire.message(&FromAgent::Answer { id: 12, result: Ok(Answer::Processes { processes: vec![process] }) });
}

/// Transfers of files.
fn files(wire: &mut Wire) {
    let path = || "/etc/".to_owned();
    for request in [
        FilesRequest::Stat { path: path() },
        FilesRequest::Get { path: path() },
        FilesRequest::Put { path: path(), keep_kinds: true, owner: Some("web:5".into()) },
        FilesRequest::Put { path: path(), keep_kinds: false, owner: None },
        FilesRequest::Export,
        FilesRequest::Changes,
        FilesRequest::Diff,
    ] {
        wire.message(&FilesOpen { container: "c1".into(), request });
    }
    let error = || Some(AgentError { kind: ErrorKind::NotFound, message: "why".into() });
    let stat = PathStat {
        name: "etc".into(),
        size: 4096,
        mode: 0o120_777,
        mtime: -1,
        mtime_nsec: 5,
        link_target: "/x".into(),
    };
    wire.message(&FilesReady { error: None, stat: Some(stat) });
    wire.message(&FilesReady { error: error(), stat: None });
    wire.message(&FilesDone { error: None });
    wire.message(&FilesDone { error: error() });
    for kind in [ChangeKind::Modified, ChangeKind::Added, ChangeKind::Deleted] {
        wire.message(&Change { path: "/etc".into(), kind });
    }
}

#[test]
fn every_message_is_as_it_was() {
    let mut wire = Wire::default();
    wire.message(&Hello { version: 1, kernel: "6.12.0".into(), started_us: 250_000 });
    for call in calls() {
        wire.message(&ToAgent { id: 9, call });
    }
    for message in from_agent() {
        wire.message(&message);
    }
    for stream in [StreamKind::Stdin, StreamKind::Stdout, StreamKind::Stderr] {
        wire.message(&StreamOpen { process: exec(), stream, from: Some(4096) });
    }
    wire.message(&StreamReady { error: None, from: 4096 });
    wire.message(&StreamReady {
        from: 0,
        error: Some(AgentError { kind: ErrorKind::Conflict, message: "why".into() }),
    });
    wire.message(&StreamOpen { process: init(), stream: StreamKind::Stdout, from: None });
    pausing_and_stats(&mut wire);
    for call in saving() {
        wire.message(&ToAgent { id: 9, call });
    }
    memory(&mut wire);
    process_detail(&mut wire);
    files(&mut wire);
    shares(&mut wire);
    shared_memory(&mut wire);
    for (now, frozen) in wire.lines.lines().zip(FROZEN.lines()) {
        assert_eq!(now, frozen);
    }
    assert_eq!(wire.lines, FROZEN, "messages were added: put them into wire.txt");
}

#[test]
fn unknown_fields_of_a_newer_peer_are_ignored() {
    let call: ToAgent =
        serde_json::from_str(r#"{"id":1,"new":true,"call":{"call":"state","more":[1]}}"#).unwrap();
    assert_eq!(call, ToAgent { id: 1, call: Call::State });
    let open: StreamOpen =
        serde_json::from_str(r#"{"process":{"container":"c"},"stream":"stdout","new":{}}"#).unwrap();
    assert_eq!(open.from, None);
}
