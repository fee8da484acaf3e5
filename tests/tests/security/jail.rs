//! A VMM that its guest owns has nothing: what each process is confined by, and what one that attacks comes to.

use anyhow::{Context, ensure};
use bulkhead_tests::{Container, Daemon, DaemonOptions, Docker, Host, Suite, with_daemon};

use crate::Test;

/// Stands for the real VMM, and does what it is told to by a signal.
const COMPROMISED: &str = env!("CARGO_BIN_EXE_compromised-vmm");

const NAMESPACES: [&str; 6] = ["user", "mnt", "pid", "net", "ipc", "uts"];

fn options() -> anyhow::Result<DaemonOptions> {
    Ok(Suite::from_env()?.daemon_options())
}

fn sleeper(docker: &Docker) -> anyhow::Result<Container> {
    docker.run_detached(&["busybox", "sleep", "10000"])
}

/// A VMM, by the files in /proc.
struct Vmm {
    host: Host,
    pid: String,
}

impl Vmm {
    fn of(docker: &Docker, container: &Container) -> anyhow::Result<Vmm> {
        Ok(Vmm { host: Host::from_env()?, pid: docker.inspect(container.name(), "{{.State.Pid}}")? })
    }

    fn sh(&self, script: &str) -> anyhow::Result<String> {
        self.host.sh(&format!("cd /proc/$1 && {script}"), &[&self.pid])
    }

    fn namespaces(&self) -> anyhow::Result<Vec<String>> {
        let links: Vec<String> = NAMESPACES.iter().map(|name| format!("ns/{name}")).collect();
        Ok(self.sh(&format!("readlink {}", links.join(" ")))?.lines().map(str::to_owned).collect())
    }

    /// A field of a status file, once for each thread.
    fn of_each_thread(&self, field: &str) -> anyhow::Result<Vec<String>> {
        let lines = self.sh(&format!("grep -h '^{field}:' task/*/status"))?;
        let value = |line: &str| {
            line.split_once(':').map(|(_, value)| value.split_whitespace().collect::<Vec<_>>().join(" "))
        };
        Ok(lines.lines().filter_map(value).collect())
    }
}

#[test]
fn a_vmm_has_an_identity_namespaces_and_a_root_of_its_own_and_no_privilege() -> Test {
    with_daemon(options()?, |daemon| {
        let docker = daemon.docker();
        docker.ok(&["pull", "-q", "busybox"])?;
        let (one, other) = (sleeper(&docker)?, sleeper(&docker)?);
        let (one, other) = (Vmm::of(&docker, &one)?, Vmm::of(&docker, &other)?);
        let host = Vmm { host: Host::from_env()?, pid: "1".into() };

        for vmm in [&one, &other] {
            for (field, expected) in [
                ("CapInh", "0000000000000000"),
                ("CapPrm", "0000000000000000"),
                ("CapEff", "0000000000000000"),
                ("CapBnd", "0000000000000000"),
                ("CapAmb", "0000000000000000"),
                ("NoNewPrivs", "1"),
                ("Seccomp", "2"),
                ("Groups", ""),
            ] {
                let found = vmm.of_each_thread(field)?;
                ensure!(found.len() > 4 && found.iter().all(|value| value == expected), "{field}: {found:?}");
            }
            let uid = vmm.of_each_thread("Uid")?.pop().context("no thread")?;
            let number: u32 = uid.split(' ').next().context("no id")?.parse()?;
            ensure!(number >= 0x7000_0000, "{uid}");
            assert_eq!(uid, vec![number.to_string(); 4].join(" "), "in each thread, in each way");
            assert_eq!(vmm.of_each_thread("Gid")?.pop(), Some(uid));
            assert_eq!(vmm.sh("sed -n 's/^NSpid:.*\\t//p' status")?, "1", "it sees itself alone");
            assert_eq!(vmm.sh("ls -A root/")?, "");
            assert_eq!(vmm.sh("wc -l <mountinfo")?, "1");
            assert!(vmm.sh("cut -d' ' -f6 mountinfo")?.starts_with("ro,nosuid,nodev,noexec"));
            assert_eq!(vmm.sh("tr '\\0' ' ' <environ")?, "");
            let arguments = vmm.sh("tr '\\0' ' ' <cmdline")?;
            let number = arguments.trim().strip_prefix("bulkhead-vmm --config-fd ").context("arguments")?;
            number.parse::<u32>()?;
            assert!(vmm.sh("cat cgroup")?.starts_with("0::/bulkhead/"));
            assert_eq!(vmm.sh("awk '/^Max core file size/ {print $5, $6}' limits")?, "0 0");
            // KVM's own worker is counted, and is listed or not by the kernel's version: at most one is free.
            let threads: u64 = vmm.sh("ls task | wc -l")?.parse()?;
            let most: u64 = vmm.sh("awk '/^Max processes/ {print $4}' limits")?.parse()?;
            assert!((threads..=threads + 1).contains(&most), "no more threads: {most} of {threads}");
            assert_eq!(vmm.sh("stat -c %u:%g status")?, "0:0", "not dumpable: /proc belongs to root");
            // With `..` it comes no further: the network is a namespace with a loopback that is down.
            assert_eq!(vmm.sh("tail -n +3 net/dev | cut -d: -f1 | tr -d ' '")?, "lo");
        }
        let (ours, theirs, hosts) = (one.namespaces()?, other.namespaces()?, host.namespaces()?);
        for ((name, one), (other, host)) in NAMESPACES.iter().zip(&ours).zip(theirs.iter().zip(&hosts)) {
            assert!(one != other && one != host && other != host, "{name}: {one} {other} {host}");
        }
        assert_ne!(one.of_each_thread("Uid")?, other.of_each_thread("Uid")?);
        Ok(())
    })
}

#[test]
fn a_vmm_holds_the_descriptors_that_it_was_given_and_no_other() -> Test {
    with_daemon(options()?, |daemon| {
        let docker = daemon.docker();
        docker.ok(&["pull", "-q", "busybox"])?;
        let container = sleeper(&docker)?;
        let vmm = Vmm::of(&docker, &container)?;
        let own = format!("{}/s/", daemon.exec_root());
        let data = daemon.data_root();
        let listing = vmm.sh("for fd in fd/*; do readlink $fd; done")?;
        for (target, count) in
            listing.lines().fold(std::collections::BTreeMap::new(), |mut counts, target| {
                *counts.entry(target).or_insert(0) += 1;
                counts
            })
        {
            let known = match target {
                "/dev/null" => count == 2,
                _ if target.starts_with("anon_inode:") || target.starts_with("socket:[") => true,
                _ if target.starts_with(&own) => {
                    target.ends_with("/report.json") || target.ends_with("/vmm.log")
                }
                _ if target.starts_with(&data) => target.ends_with("/disk.img"),
                // A layer is the root of a mount of its own, or a file below it: no path leads there.
                _ => target == "/" || !target.contains("/var/") && !target.contains("/run/"),
            };
            ensure!(known, "{target} in\n{listing}");
        }
        ensure!(!listing.contains("/dev/kvm"), "KVM itself is let go once the machine is built:\n{listing}");
        Ok(())
    })
}

#[test]
fn what_a_vmm_was_given_is_given_back() -> Test {
    // Where templates are made there is a second VMM for a moment.
    let mut options = options()?;
    options.arguments.push("--templates=false".into());
    with_daemon(options, |daemon| {
        let docker = daemon.docker();
        docker.ok(&["pull", "-q", "busybox"])?;
        let container = sleeper(&docker)?;
        let vmm = Vmm::of(&docker, &container)?;
        let group = vmm.sh("cut -d: -f3 cgroup")?;
        let group = format!("/sys/fs/cgroup{group}");
        let host = Host::from_env()?;
        let exec_root = daemon.exec_root().to_owned();
        let taken = |host: &Host| host.sh("ls \"$1/u\"", &[&exec_root]);
        assert_eq!(taken(&host)?, vmm.of_each_thread("Uid")?[0].split(' ').next().context("no id")?);
        assert_eq!(host.sh("cat \"$1/cgroup.procs\"", &[&group])?, vmm.pid);

        // A daemon that was not there at the start gives it back as well.
        daemon.kill()?;
        daemon.start_again()?;
        container.docker(&["kill"])?;
        container.docker(&["rm", "-f"])?;
        assert_eq!(taken(&host)?, "");
        assert_eq!(host.sh("ls -d \"$1\" 2>/dev/null || true", &[&group])?, "");
        Ok(())
    })
}

#[test]
fn without_the_jail_a_vmm_is_still_under_its_filters() -> Test {
    let mut options = options()?;
    options.arguments.push("--jail=false".into());
    with_daemon(options, |daemon| {
        let docker = daemon.docker();
        docker.ok(&["pull", "-q", "busybox"])?;
        let container = sleeper(&docker)?;
        let vmm = Vmm::of(&docker, &container)?;
        assert!(vmm.of_each_thread("Uid")?.iter().all(|uid| uid == "0 0 0 0"));
        assert!(vmm.of_each_thread("Seccomp")?.iter().all(|mode| mode == "2"));
        assert!(vmm.of_each_thread("NoNewPrivs")?.iter().all(|set| set == "1"));
        Ok(())
    })
}

fn compromised() -> anyhow::Result<DaemonOptions> {
    Ok(DaemonOptions { vmm: Some(COMPROMISED.into()), ..options()? })
}

/// Has a thread of the container's VMM run an attack.
fn attack(vmm: &Vmm, thread: &str, attack: &str) -> anyhow::Result<()> {
    vmm.host.sh("exec \"$@\"", &[COMPROMISED, "attack", &vmm.pid, thread, attack]).map(drop)
}

/// The violations that were published, as `thread syscall`, of a container.
fn violations(docker: &Docker, container: &Container) -> anyhow::Result<String> {
    let filter = format!("container={}", container.name());
    let format = "{{.Actor.Attributes.thread}} {{.Actor.Attributes.syscall}}";
    docker.events(&[&filter, "event=jail-violation"], format)
}

/// Lets one container for each attack be attacked, and looks at what comes of it.
fn assert_fatal(daemon: &Daemon, attacks: &[(&str, &str, &str)]) -> Test {
    let docker = daemon.docker();
    docker.ok(&["pull", "-q", "busybox"])?;
    let bystander = sleeper(&docker)?;
    for (name, thread, expected) in attacks {
        let container = sleeper(&docker)?;
        let vmm = Vmm::of(&docker, &container)?;
        attack(&vmm, thread, name)?;
        assert_eq!(container.docker(&["wait"])?, "137", "{name}");
        assert_eq!(violations(&docker, &container)?, *expected, "{name}");
        assert_eq!(vmm.host.sh("ls -d /proc/$1 2>/dev/null || true", &[&vmm.pid])?, "", "{name}: gone");
    }
    assert_eq!(bystander.exec(&["echo", "untouched"])?, "untouched");
    Ok(())
}

#[test]
fn a_compromised_vmm_that_reaches_for_files_or_processes_dies_of_it() -> Test {
    with_daemon(compromised()?, |daemon| {
        assert_fatal(
            daemon,
            &[
                ("open", "vcpu0", "vcpu 257"),
                ("open-old", "block0", "block 2"),
                ("fork", "vsock", "vsock 57"),
                ("execute", "fs0", "fs 59"),
                ("ptrace", "rng", "rng 101"),
                ("read-memory", "vcpu0", "vcpu 310"),
                ("kill-thread", "bulkhead-vmm", "control 234"),
                // The one call at which the kernel itself kills, and nothing can be told but that.
                ("kill", "vcpu0", "unknown unknown"),
            ],
        )
    })
}

#[test]
fn a_compromised_vmm_that_reaches_for_networks_or_privileges_dies_of_it() -> Test {
    with_daemon(compromised()?, |daemon| {
        assert_fatal(
            daemon,
            &[
                ("socket-unix", "vsock", "vsock 41"),
                ("socket-tcp", "vcpu0", "vcpu 41"),
                ("mount", "bulkhead-vmm", "control 165"),
                ("setuid", "fs0", "fs 105"),
                ("raise-limit", "block0", "block 302"),
                ("another-machine", "vcpu0", "vcpu 16"),
                ("map-code", "fs0", "fs 9"),
                ("io-uring", "block0", "block 425"),
            ],
        )
    })
}

#[test]
fn a_compromised_vmm_gets_nothing_by_what_it_may_do() -> Test {
    with_daemon(compromised()?, |daemon| {
        let docker = daemon.docker();
        docker.ok(&["pull", "-q", "busybox"])?;
        let container = sleeper(&docker)?;
        let vmm = Vmm::of(&docker, &container)?;
        // The two threads that may open files at all.
        let attacks = ["climb", "own-memory", "root-list", "write-layers"];
        for thread in ["fs0", "bulkhead-vmm"] {
            for name in attacks {
                attack(&vmm, thread, name)?;
            }
        }
        // Its words come in their own time.
        let outcome = || vmm.sh("cat fd/2");
        while outcome()?.lines().count() < 2 * attacks.len() {
            ensure!(vmm.sh("cat status").is_ok(), "it died: {:?}", violations(&docker, &container));
        }
        let outcome = outcome()?;
        for name in attacks {
            let refused = outcome.lines().filter(|line| *line == format!("{name}: refused")).count();
            // The root itself is there, and empty: seeing that is no gain where Landlock does not hide it.
            ensure!(refused == 2 || name == "root-list", "{name}:\n{outcome}");
        }
        assert_eq!(container.exec(&["echo", "still runs"])?, "still runs");
        assert_eq!(violations(&docker, &container)?, "");
        Ok(())
    })
}
