use std::path::Path;

use bulkhead_agent_api::SHARED_MEMORY;

use super::*;
use crate::{
    api::types::{
        Empty,
        container::{CreateRequest, Healthcheck, Mount, RestartPolicy},
    },
    config::{Config as DaemonConfig, Options},
    engine::ErrorKind,
};

const ID: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

fn daemon() -> DaemonConfig {
    let file = tempfile::NamedTempFile::new().unwrap();
    DaemonConfig::load(&Options::default(), Some(file.path())).unwrap()
}

fn strings(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|text| (*text).to_owned()).collect()
}

fn request(cmd: &[&str]) -> CreateRequest {
    let config = Config { cmd: Some(strings(cmd)), image: "busybox".into(), ..Config::default() };
    CreateRequest { config, ..CreateRequest::default() }
}

fn spec_of(mut request: CreateRequest) -> ContainerSpec {
    let daemon = daemon();
    fill(&mut request, ID, &daemon);
    validate(&request.config, &request.host_config).unwrap();
    container(&Facts {
        id: ID,
        config: &request.config,
        host: &request.host_config,
        names: &request.host_config,
        pid_of: None,
        ipc_of: None,
        daemon: &daemon,
        network: &NetworkFacts::default(),
        resolv_conf: "# host\nnameserver 192.0.2.1\nsearch example.org\noptions ndots:2\n",
        binds: &[],
    })
    .unwrap()
}

/// A spec with its long lists cut, so that goldens show what is particular.
fn shown(spec: &ContainerSpec) -> serde_json::Value {
    let mut value = serde_json::to_value(&spec.spec).unwrap();
    let count = value["linux"]["seccomp"]["syscalls"][0]["names"].as_array().map_or(0, Vec::len);
    if count > 0 {
        value["linux"]["seccomp"]["syscalls"][0]["names"] = format!("{count} names").into();
    }
    for set in ["bounding", "permitted", "effective"] {
        if let Some(names) = value["process"]["capabilities"][set].as_array_mut() {
            names.sort_by_key(|name| name.as_str().map(str::to_owned));
        }
    }
    value
}

#[test]
fn a_plain_container() {
    insta::assert_json_snapshot!(shown(&spec_of(request(&["sh", "-c", "true"]))));
}

#[test]
fn a_container_with_everything() {
    let mut request = request(&["top"]);
    request.config = Config {
        hostname: "web".into(),
        domainname: "example.org".into(),
        user: "app:users".into(),
        tty: true,
        env: Some(strings(&["A=b", "PATH=/bin"])),
        working_dir: "/srv".into(),
        ..request.config
    };
    request.host_config = HostConfig {
        cap_add: Some(strings(&["NET_ADMIN"])),
        cap_drop: Some(strings(&["ALL"])),
        console_size: [24, 80],
        readonly_rootfs: true,
        tmpfs: Some([("/tmp".to_owned(), "size=1m".to_owned())].into()),
        memory: 128 << 20,
        nano_cpus: 500_000_000,
        pids_limit: Some(50),
        sysctls: Some([("net.core.somaxconn".to_owned(), "9".to_owned())].into()),
        security_opt: Some(strings(&["no-new-privileges", "seccomp=unconfined"])),
        group_add: Some(strings(&["audio", "44"])),
        oom_score_adj: 7,
        init: Some(true),
        annotations: Some(
            [("a".to_owned(), "b".to_owned()), ("org.bulkhead.x".to_owned(), "y".to_owned())].into(),
        ),
        ..HostConfig::default()
    };
    insta::assert_json_snapshot!(shown(&spec_of(request)));
}

#[test]
fn a_privileged_container() {
    let mut request = request(&["sh"]);
    request.host_config.privileged = true;
    let spec = spec_of(request).spec;
    let linux = spec.linux().as_ref().unwrap();
    assert!(linux.seccomp().is_none());
    assert_eq!(linux.masked_paths().as_deref(), Some(&[][..]));
    let capabilities = spec.process().as_ref().unwrap().capabilities().clone().unwrap();
    assert_eq!(capabilities.bounding().as_ref().unwrap().len(), 41);
}

fn contents(spec: &ContainerSpec) -> BTreeMap<String, String> {
    spec.files.iter().map(|file| (file.path.clone(), file.content.clone())).collect()
}

#[test]
fn files() {
    let mut request = request(&["sh"]);
    request.host_config.extra_hosts = Some(strings(&["db:192.0.2.7", "six:[2001:db8::1]"]));
    let plain = contents(&spec_of(request.clone()));
    assert_eq!(plain["/etc/hostname"], "0123456789ab\n");
    assert!(plain["/etc/hosts"].ends_with("192.0.2.7\tdb\n2001:db8::1\tsix\n"));
    assert_eq!(plain["/etc/resolv.conf"], "nameserver 192.0.2.1\nsearch example.org\noptions ndots:2\n");
    request.host_config.dns = Some(strings(&["192.0.2.9"]));
    request.host_config.dns_search = Some(strings(&["."]));
    assert_eq!(contents(&spec_of(request))["/etc/resolv.conf"], "nameserver 192.0.2.9\noptions ndots:2\n");
}

#[test]
fn an_exec_is_its_containers_process_with_changes() {
    let mut request = request(&["sh"]);
    request.config.env = Some(strings(&["A=1", "B=2"]));
    request.config.user = "app".into();
    let spec = spec_of(request).spec;
    let plain =
        exec(&spec, &exec::CreateRequest { cmd: Some(strings(&["ls"])), ..Default::default() }).unwrap();
    assert_eq!(plain.args().as_deref().unwrap(), ["ls"]);
    assert_eq!(plain.user().username().as_deref(), Some("app"));
    let changed = exec::CreateRequest {
        cmd: Some(strings(&["ls"])),
        env: Some(strings(&["A=9", "B"])),
        user: "0:0".into(),
        working_dir: "/w".into(),
        tty: true,
        privileged: true,
        console_size: Some([5, 6]),
        ..Default::default()
    };
    let process = exec(&spec, &changed).unwrap();
    let env = process.env().clone().unwrap();
    assert_eq!(&env[1..], ["HOSTNAME=0123456789ab", "A=9", "TERM=xterm"]);
    assert_eq!((process.cwd().as_path(), process.terminal()), (Path::new("/w"), Some(true)));
    assert_eq!(process.console_size().unwrap().height(), 5);
    assert_eq!(process.capabilities().as_ref().unwrap().effective().as_ref().unwrap().len(), 41);
    for wrong in [
        exec::CreateRequest::default(),
        exec::CreateRequest { cmd: Some(vec![]), ..Default::default() },
        exec::CreateRequest { cmd: Some(strings(&["ls"])), working_dir: "w".into(), ..Default::default() },
        exec::CreateRequest { cmd: Some(strings(&["l\0s"])), ..Default::default() },
    ] {
        assert_eq!(exec(&spec, &wrong).unwrap_err().kind, ErrorKind::Invalid);
    }
}

#[test]
fn an_image_fills_what_is_open() {
    let image = Config {
        user: "app".into(),
        env: Some(strings(&["PATH=/x", "A=image"])),
        cmd: Some(strings(&["serve"])),
        entrypoint: Some(strings(&["/entry"])),
        working_dir: "/srv".into(),
        labels: Some([("a".to_owned(), "image".to_owned()), ("b".to_owned(), "image".to_owned())].into()),
        exposed_ports: Some([("80/tcp".to_owned(), Empty {})].into()),
        stop_signal: "SIGQUIT".into(),
        healthcheck: Some(Healthcheck {
            test: Some(strings(&["CMD", "t"])),
            retries: 3,
            ..Default::default()
        }),
        ..Config::default()
    };
    let merged = |config: Config| {
        let mut config = config;
        merge_image(&mut config, &image);
        config
    };
    let open = merged(Config::default());
    assert_eq!(command(&open).unwrap(), ("/entry".to_owned(), strings(&["serve"])));
    assert_eq!((open.user.as_str(), open.stop_signal.as_str()), ("app", "SIGQUIT"));
    assert_eq!(open.env, image.env);

    let own = merged(Config {
        env: Some(strings(&["A=own"])),
        cmd: Some(strings(&["other"])),
        labels: Some([("a".to_owned(), "own".to_owned())].into()),
        healthcheck: Some(Healthcheck { retries: 1, ..Default::default() }),
        ..Config::default()
    });
    assert_eq!(command(&own).unwrap(), ("/entry".to_owned(), strings(&["other"])));
    assert_eq!(own.env.unwrap(), ["A=own", "PATH=/x"]);
    assert_eq!(own.labels.unwrap().into_values().collect::<Vec<_>>(), ["own", "image"]);
    let check = own.healthcheck.unwrap();
    assert_eq!((check.retries, check.test), (1, Some(strings(&["CMD", "t"]))));

    let entry = merged(Config { entrypoint: Some(strings(&["sh"])), ..Config::default() });
    assert_eq!(command(&entry).unwrap(), ("sh".to_owned(), vec![]));
    let none =
        merged(Config { entrypoint: Some(strings(&[""])), cmd: Some(strings(&["ls"])), ..Config::default() });
    assert_eq!(command(&none).unwrap(), ("ls".to_owned(), vec![]));
    assert_eq!(command(&Config::default()).unwrap_err().message, "no command specified");
}

/// What is refused, how, and the words that tell it.
#[test]
fn a_container_in_another_s_machine_asks_the_other_s_name_servers_and_may_see_its_processes() {
    let mut own = request(&["true"]);
    let mut other = HostConfig { dns: Some(strings(&["192.0.2.9"])), ..HostConfig::default() };
    other.extra_hosts = Some(strings(&["db:192.0.2.5"]));
    let daemon = daemon();
    own.host_config.network_mode = format!("container:{ID}");
    fill(&mut own, ID, &daemon);
    validate(&own.config, &own.host_config).unwrap();
    let spec = container(&Facts {
        id: ID,
        config: &own.config,
        host: &own.host_config,
        names: &other,
        pid_of: Some(17),
        ipc_of: Some(&IpcDonor { process: 18, guest: "donor".into() }),
        daemon: &daemon,
        network: &NetworkFacts::default(),
        resolv_conf: "nameserver 192.0.2.1\n",
        binds: &[],
    })
    .unwrap();
    let files = contents(&spec);
    assert_eq!(files["/etc/resolv.conf"], "nameserver 192.0.2.9\n");
    assert!(files["/etc/hosts"].contains("192.0.2.5\tdb"));
    let namespaces = spec.spec.linux().as_ref().unwrap().namespaces().clone().unwrap();
    let paths: Vec<_> = namespaces.iter().filter_map(|namespace| namespace.path().clone()).collect();
    assert_eq!(paths, ["/proc/17/ns/pid", "/proc/18/ns/ipc"].map(std::path::PathBuf::from));
    assert_eq!(spec.shared_memory, Some(SharedMemory::Of("donor".into())));
    let mounts = spec.spec.mounts().clone().unwrap();
    let shm = mounts.iter().find(|mount| mount.destination() == std::path::Path::new("/dev/shm")).unwrap();
    assert_eq!(shm.source().as_ref().unwrap(), &std::path::Path::new(SHARED_MEMORY).join(ID));
}

#[test]
fn what_cannot_be_honoured_is_refused() {
    type Change = fn(&mut CreateRequest);
    let cases: [(Change, ErrorKind, &str); 30] = [
        (
            |r| r.host_config.network_mode = "host".into(),
            ErrorKind::Invalid,
            "--network host cannot be honoured",
        ),
        (|r| r.host_config.pid_mode = "host".into(), ErrorKind::Invalid, "--pid host cannot be honoured"),
        (|r| r.host_config.ipc_mode = "host".into(), ErrorKind::Invalid, "--ipc host cannot be honoured"),
        (|r| r.host_config.ipc_mode = "odd".into(), ErrorKind::Invalid, "invalid IPC mode: odd"),
        (
            |r| r.host_config.runtime = "runc".into(),
            ErrorKind::Invalid,
            "unknown or invalid runtime name: runc",
        ),
        (|r| r.host_config.binds = Some(strings(&["/a:/b:what"])), ErrorKind::Invalid, "invalid mode: what"),
        (
            |r| r.host_config.mounts = Some(vec![Mount { kind: "image".into(), ..Mount::default() }]),
            ErrorKind::NotImplemented,
            "mounts of type image",
        ),
        (
            |r| r.host_config.device_requests = Some(vec![Default::default()]),
            ErrorKind::Invalid,
            "could not select device driver \"\" with capabilities: []",
        ),
        (|r| r.host_config.shm_size = -1, ErrorKind::Invalid, "SHM size"),
        (
            |r| r.host_config.oom_score_adj = 1001,
            ErrorKind::Invalid,
            "Invalid value, range for oom score adj",
        ),
        (
            |r| r.host_config.sysctls = Some([("kernel.panic".to_owned(), "1".to_owned())].into()),
            ErrorKind::Invalid,
            "sysctl \"kernel.panic\" is not in a separate kernel namespace",
        ),
        (
            |r| r.host_config.restart_policy = RestartPolicy { name: "maybe".into(), maximum_retry_count: 0 },
            ErrorKind::Invalid,
            "invalid restart policy: unknown policy 'maybe'",
        ),
        (
            |r| {
                r.host_config.auto_remove = true;
                r.host_config.restart_policy.name = "always".into();
            },
            ErrorKind::Invalid,
            "can't create 'AutoRemove' container",
        ),
        (
            |r| r.host_config.log_config.kind = "gelf".into(),
            ErrorKind::Invalid,
            "logger: no log driver named 'gelf'",
        ),
        (
            |r| r.host_config.security_opt = Some(strings(&["apparmor=mine"])),
            ErrorKind::Invalid,
            "--security-opt apparmor=mine cannot be honoured",
        ),
        (
            |r| r.host_config.security_opt = Some(strings(&["odd"])),
            ErrorKind::Invalid,
            "invalid --security-opt",
        ),
        (
            |r| r.host_config.extra_hosts = Some(strings(&["a"])),
            ErrorKind::Invalid,
            "bad format for add-host",
        ),
        (
            |r| r.config.working_dir = "srv".into(),
            ErrorKind::Invalid,
            "the working directory 'srv' is invalid",
        ),
        (|r| r.config.env = Some(strings(&["=x"])), ErrorKind::Invalid, "invalid environment variable: =x"),
        (|r| r.config.hostname = "a b".into(), ErrorKind::Invalid, "invalid hostname: a b"),
        (|r| r.config.cmd = None, ErrorKind::Invalid, "no command specified"),
        (|r| r.config.stop_signal = "SIGODD".into(), ErrorKind::Invalid, "invalid signal: SIGODD"),
        (
            |r| {
                r.host_config.volume_driver = "nfs".into();
                r.host_config.binds = Some(strings(&["data:/data"]));
            },
            ErrorKind::NotFound,
            "error looking up volume plugin nfs",
        ),
        (|r| r.host_config.cgroup = "odd".into(), ErrorKind::Invalid, "invalid cgroup mode: odd"),
        (|r| r.host_config.dns = Some(strings(&["a\nb"])), ErrorKind::Invalid, "invalid DNS server address"),
        (|r| r.host_config.dns_search = Some(strings(&["a\nb"])), ErrorKind::Invalid, "invalid DNS search"),
        (|r| r.host_config.dns_options = Some(strings(&["a b"])), ErrorKind::Invalid, "invalid DNS search"),
        (|r| r.host_config.group_add = Some(strings(&["a,b"])), ErrorKind::Invalid, "invalid group: \"a,b\""),
        (|r| r.host_config.group_add = Some(strings(&[""])), ErrorKind::Invalid, "invalid group: \"\""),
        (
            |r| r.host_config.security_opt = Some(strings(&["systempaths=unconfined"])),
            ErrorKind::Invalid,
            "invalid --security-opt",
        ),
    ];
    for (change, kind, words) in cases {
        let mut request = request(&["sh"]);
        change(&mut request);
        fill(&mut request, ID, &daemon());
        let error = validate(&request.config, &request.host_config).unwrap_err();
        assert!(error.message.starts_with(words), "{words}: {}", error.message);
        assert_eq!(error.kind, kind, "{words}");
    }
}

#[test]
fn what_is_not_quite_honoured_is_told() {
    let mut request = request(&["sh"]);
    fill(&mut request, ID, &daemon());
    assert_eq!(validate(&request.config, &request.host_config).unwrap(), [""; 0]);
    request.host_config.oom_kill_disable = Some(true);
    request.host_config.memory = 64 << 20;
    request.host_config.memory_swap = -1;
    assert_eq!(validate(&request.config, &request.host_config).unwrap().len(), 2);
}
