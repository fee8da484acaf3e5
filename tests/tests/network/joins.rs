//! Containers in the microVM of another: `--network container:`, `--pid container:`, `--ipc container:`.

use crate::{Network, Test, docker, serve, unique};

/// Puts a container into another's microVM and waits until it is up.
fn beside(
    docker: &bulkhead_tests::Docker,
    other: &str,
    options: &[&str],
) -> anyhow::Result<bulkhead_tests::docker::Container> {
    let network = format!("container:{other}");
    let script = "trap 'exit 9' TERM; echo own >>/own; touch /up; while :; do sleep 0.2; done";
    let words = [&["--network", &network], options, &["busybox", "sh", "-c", script]].concat();
    let container = docker.run_detached(&words)?;
    container.exec(&["sh", "-c", "while [ ! -e /up ]; do sleep 0.1; done"])?;
    Ok(container)
}

#[test]
fn a_second_container_has_the_first_s_network_names_and_processes_and_a_root_of_its_own() -> Test {
    let docker = docker()?;
    let network = Network::create(&docker, &[])?;
    let web = serve(&docker, &["--network", &network.name, "-h", "walrus"], "web")?;
    let neighbour = serve(&docker, &["--network", &network.name], "neighbour")?;
    let side = beside(&docker, web.name(), &["--pid", &format!("container:{}", web.name())])?;

    let id = docker.inspect(web.name(), "{{.Id}}")?;
    let modes = docker
        .inspect(side.name(), "{{.HostConfig.NetworkMode}} {{.HostConfig.PidMode}} {{.Config.Hostname}}")?;
    assert_eq!(modes, format!("container:{id} container:{id} walrus"));
    assert_eq!(docker.inspect(side.name(), "{{len .NetworkSettings.Networks}}")?, "0");
    let address = "ip -4 -o addr show eth0 | cut -d' ' -f7";
    assert_eq!(side.exec(&["sh", "-c", address])?, web.exec(&["sh", "-c", address])?);
    assert_eq!(side.exec(&["sh", "-c", "hostname; wget -qO- http://127.0.0.1"])?, "walrus\nweb");
    let page = format!("wget -qO- http://{}", neighbour.name());
    assert_eq!(side.exec(&["sh", "-c", &page])?, "neighbour");
    assert_eq!(side.exec(&["cat", "/etc/hosts"])?, web.exec(&["cat", "/etc/hosts"])?);

    // The web server's processes are there, and its files are not.
    let processes = side.exec(&["ps", "-o", "args"])?;
    assert!(processes.contains("httpd -f -p 80") && processes.contains("while :"), "{processes}");
    let namespace = ["readlink", "/proc/self/ns/pid"];
    assert_eq!(side.exec(&namespace)?, web.exec(&namespace)?);
    assert_eq!(side.exec(&["sh", "-c", "ls -d /www; cat /own"])?, "own");
    assert_eq!(web.exec(&["sh", "-c", "ls -d /own || echo none"])?, "none");
    // Of the host's it is one process, and each has its own figures.
    assert_eq!(docker.inspect(side.name(), "{{.State.Pid}}")?, docker.inspect(web.name(), "{{.State.Pid}}")?);
    let top = docker.ok(&["top", side.name()])?;
    assert!(top.contains("while :") && !top.contains("httpd"), "{top}");
    // Its end is its own.
    assert_eq!(docker.ok(&["stop", side.name()])?, side.name());
    assert_eq!(docker.inspect(side.name(), "{{.State.ExitCode}}")?, "9");
    assert_eq!(web.exec(&["wget", "-qO-", "http://127.0.0.1"])?, "web");
    docker.ok(&["start", side.name()])?;
    side.exec(&["sh", "-c", "until [ $(wc -l </own) = 2 ]; do sleep 0.1; done"]).map(drop)
}

#[test]
fn it_outlives_the_one_whose_microvm_it_shares_and_gives_back_what_it_had() -> Test {
    let docker = docker()?;
    let web = serve(&docker, &[], "web")?;
    let volume = unique("joined");
    let at = format!("{volume}:/data");
    let memory = "grep MemTotal /proc/meminfo | tr -dc 0-9";
    let before: u64 = web.exec(&["sh", "-c", memory])?.parse()?;
    let (one, two) = (beside(&docker, web.name(), &["-v", &at])?, beside(&docker, web.name(), &["-v", &at])?);
    assert!(web.exec(&["sh", "-c", memory])?.parse::<u64>()? > before, "a machine grows with its containers");
    one.exec(&["sh", "-c", "echo shared >/data/file"])?;
    assert_eq!(two.exec(&["cat", "/data/file"])?, "shared");
    // A third comes and goes where the second was, with other options.
    docker.ok(&["rm", "-f", two.name()])?;
    let network = format!("container:{}", web.name());
    let words = [
        "run",
        "--rm",
        "--network",
        &network,
        "-v",
        &at,
        "-m",
        "64m",
        "busybox",
        "sh",
        "-c",
        "cat /data/file; exit 5",
    ];
    let third = docker.run(&words)?;
    assert_eq!((third.text().trim(), third.code), ("shared", 5), "{}", third.stderr);

    docker.ok(&["rm", "-f", web.name()])?;
    let still = "cat /own; wget -T 2 -qO- http://127.0.0.1 || echo nobody; cat /data/file";
    assert_eq!(one.exec(&["sh", "-c", still])?, "own\nnobody\nshared");
    assert_eq!(docker.ok(&["stop", one.name()])?, one.name());
    let alone = docker.run(&["start", one.name()])?;
    assert!(alone.code != 0, "it has nobody to join");
    docker.ok(&["rm", one.name()])?;
    docker.ok(&["volume", "rm", &volume]).map(drop)
}

#[test]
fn memory_is_shared_where_it_is_offered_and_outlives_who_offered_it() -> Test {
    let docker = docker()?;
    let donor = serve(&docker, &["--ipc", "shareable", "--shm-size", "8m"], "donor")?;
    let ipc_of = |container: &bulkhead_tests::docker::Container| format!("container:{}", container.name());
    let side = beside(&docker, donor.name(), &["--ipc", &ipc_of(&donor)])?;
    let id = docker.inspect(donor.name(), "{{.Id}}")?;
    assert_eq!(docker.inspect(side.name(), "{{.HostConfig.IpcMode}}")?, format!("container:{id}"));
    let namespace = ["readlink", "/proc/self/ns/ipc"];
    assert_eq!(side.exec(&namespace)?, donor.exec(&namespace)?);
    donor.exec(&["sh", "-c", "echo the donor >/dev/shm/who; touch /dev/mqueue/queue"])?;
    assert_eq!(side.exec(&["sh", "-c", "cat /dev/shm/who; ls /dev/mqueue"])?, "the donor\nqueue");
    let size = "df -m /dev/shm | awk 'END { print $2 }'";
    assert_eq!(side.exec(&["sh", "-c", size])?, "8");

    // Who does not ask for it has its own, and who does not offer it keeps it.
    let apart = beside(&docker, donor.name(), &[])?;
    assert_ne!(apart.exec(&namespace)?, donor.exec(&namespace)?);
    assert_eq!(apart.exec(&["ls", "/dev/shm", "/dev/mqueue"])?, "/dev/mqueue:\n\n/dev/shm:");
    let network = ipc_of(&donor);
    let words = ["run", "--rm", "--network", &network, "--ipc", &ipc_of(&apart), "busybox", "true"];
    let refused = docker.run(&words)?;
    assert!(refused.stderr.contains("non-shareable IPC (hint: use IpcMode:shareable"), "{}", refused.stderr);

    // One that has joined passes it on, also when the donor has ended, whose files are to be had still.
    let third = beside(&docker, donor.name(), &["--ipc", &ipc_of(&side)])?;
    docker.ok(&["stop", "-t", "0", donor.name()])?;
    let here = tempfile::tempdir()?;
    docker.ok(&[
        "cp",
        &format!("{}:/etc/passwd", donor.name()),
        &here.path().join("passwd").display().to_string(),
    ])?;
    third.exec(&["sh", "-c", "echo the third >/dev/shm/who"])?;
    assert_eq!(side.exec(&["cat", "/dev/shm/who"])?, "the third");
    Ok(())
}

#[test]
fn what_cannot_be_shared_is_refused_in_dockers_words() -> Test {
    let docker = docker()?;
    let web = serve(&docker, &[], "web")?;
    let (network, pid) = (format!("container:{}", web.name()), format!("container:{}", web.name()));
    let with_network = |more: &[&'static str]| -> Vec<String> {
        ["--network", &network].iter().copied().chain(more.iter().copied()).map(str::to_owned).collect()
    };
    for (options, words) in [
        (with_network(&["-h", "other"]), "conflicting options: hostname and the network mode"),
        (
            with_network(&["-p", "80"]),
            "conflicting options: port publishing and the container type network mode",
        ),
        (
            with_network(&["--expose", "80"]),
            "conflicting options: port exposing and the container type network mode",
        ),
        (with_network(&["--dns", "10.0.0.1"]), "conflicting options: dns and the network mode"),
        (with_network(&["--add-host", "a:10.0.0.1"]), "conflicting options: custom host-to-IP mapping"),
        (
            vec!["--network".into(), "container:nosuch-container".into()],
            "No such container: nosuch-container",
        ),
        (vec!["--pid".into(), pid.clone()], "--pid container: needs --network container: too"),
        (vec!["--ipc".into(), pid], "--ipc container: needs --network container: too"),
    ] {
        let words_given: Vec<&str> = options.iter().map(String::as_str).collect();
        let output =
            docker.run(&[&["run", "--rm"], words_given.as_slice(), &["busybox", "true"]].concat())?;
        assert_eq!(output.code, 125, "{options:?}: {}", output.stderr);
        assert!(output.stderr.contains(words), "{options:?}: {}", output.stderr);
    }
    let side = beside(&docker, web.name(), &[])?;
    let connected = docker.run(&["network", "connect", "bridge", side.name()])?;
    assert!(
        connected.stderr.contains("container sharing network namespace with another container"),
        "{}",
        connected.stderr
    );
    docker.ok(&["stop", "-t", "0", side.name(), web.name()])?;
    let started = docker.run(&["start", side.name()])?;
    let words = format!(
        "cannot join network namespace of a non running container: container {} is exited",
        web.name()
    );
    assert!(started.stderr.contains(&words), "{}", started.stderr);
    Ok(())
}
