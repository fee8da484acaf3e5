//! Bad input: Docker's status and words, and nothing left behind.

use crate::{Network, Test, docker, unique};

#[test]
fn what_makes_no_sense_is_refused_in_dockers_words() -> Test {
    let docker = docker()?;
    let network = Network::create(&docker, &["--subnet", "10.213.0.0/29"])?;
    let name = unique("bad");
    for (arguments, words) in [
        (vec!["--subnet", "10.213.0.0/24"], "Pool overlaps with other one on this address space"),
        (vec!["--subnet", "10.214.0.1/24"], "invalid subnet 10.214.0.1/24: it should be 10.214.0.0/24"),
        (
            vec!["--subnet", "10.214.0.0/24", "--gateway", "10.215.0.1"],
            "no matching subnet for gateway 10.215.0.1",
        ),
        (vec!["-d", "nosuch"], "nosuch"),
        (vec!["-o", "com.docker.network.bridge.enable_icc=maybe"], "is not a bool"),
    ] {
        let output = docker.run(&[&["network", "create"], arguments.as_slice(), &[&name]].concat())?;
        assert_ne!(output.code, 0, "{arguments:?}");
        assert!(output.stderr.contains(words), "{arguments:?}: {}", output.stderr);
    }
    for (arguments, words) in [
        (vec!["create", network.name.as_str()], "already exists"),
        (vec!["create", "host"], "operation is not permitted on predefined host network"),
        (vec!["rm", "bridge"], "bridge is a pre-defined network and cannot be removed"),
        (vec!["rm", "nosuch-network"], "network nosuch-network not found"),
        (vec!["connect", "nosuch-network", "nosuch"], "network nosuch-network not found"),
    ] {
        let output = docker.run(&[&["network"], arguments.as_slice()].concat())?;
        assert!(output.stderr.contains(words), "{arguments:?}: {}", output.stderr);
    }
    for (options, words) in [
        (
            vec!["--network", network.name.as_str(), "--ip", "10.213.9.9"],
            "no configured subnet contains IP address 10.213.9.9",
        ),
        (vec!["--ip", "172.17.0.9"], "supported on user defined networks only"),
        (vec!["--network", "nosuch-network"], "network nosuch-network not found"),
        (vec!["--network", "host"], "--network host cannot be honoured"),
        (vec!["--mac-address", "01:00:00:00:00:01"], "not a valid mac address"),
    ] {
        let output = docker.run(&[&["run", "--rm"], options.as_slice(), &["busybox", "true"]].concat())?;
        assert_eq!(output.code, 125, "{options:?}: {}", output.stderr);
        assert!(output.stderr.contains(words), "{options:?}: {}", output.stderr);
    }
    assert!(!docker.ok(&["network", "ls", "--format", "{{.Name}}"])?.contains(&name));
    Ok(())
}

#[test]
fn an_address_is_one_containers_and_a_network_in_use_stays() -> Test {
    let docker = docker()?;
    let network = Network::create(&docker, &["--subnet", "10.216.0.0/29"])?;
    let options =
        ["--network", network.name.as_str(), "--ip", "10.216.0.2", "--mac-address", "02:aa:bb:cc:dd:ee"];
    let first = docker.run_detached(&[options.as_slice(), &["busybox", "sleep", "1000"]].concat())?;
    assert!(first.exec(&["ip", "link", "show", "eth0"])?.contains("02:aa:bb:cc:dd:ee"));
    let again =
        docker.run(&["run", "--rm", "--network", &network.name, "--ip", "10.216.0.2", "busybox", "true"])?;
    assert!(again.stderr.contains("Address already in use"), "{}", again.stderr);
    let removed = docker.run(&["network", "rm", &network.name])?;
    assert!(removed.stderr.contains("has active endpoints"), "{}", removed.stderr);
    // Four are left of the eight: network, gateway, broadcast and the one above are taken.
    let others: Vec<_> = (0..4)
        .map(|_| docker.run_detached(&["--network", &network.name, "busybox", "sleep", "1000"]))
        .collect::<Result<_, _>>()?;
    let exhausted = docker.run(&["run", "--rm", "--network", &network.name, "busybox", "true"])?;
    assert!(
        exhausted.stderr.contains("no available IPv4 addresses on this network's address pools"),
        "{}",
        exhausted.stderr
    );
    drop(others);
    let freed = docker.ok(&["run", "--rm", "--network", &network.name, "busybox", "true"]);
    freed.map(drop)
}

#[test]
fn lists_are_filtered_and_a_prune_takes_what_nobody_is_in() -> Test {
    let docker = docker()?;
    let network = Network::create(&docker, &["--label", "team=a"])?;
    let ls = |filter: &str| docker.ok(&["network", "ls", "--format", "{{.Name}}", "--filter", filter]);
    assert_eq!(ls("label=team=a")?, network.name);
    assert_eq!(ls("type=builtin")?, "bridge\nhost\nnone");
    assert_eq!(ls(&format!("name={}", network.name))?, network.name);
    assert_eq!(ls("driver=null")?, "none");
    assert!(ls("dangling=true")?.contains(&network.name));
    let container = docker.run_detached(&["--network", &network.name, "busybox", "sleep", "1000"])?;
    assert!(!ls("dangling=true")?.contains(&network.name));
    let label = ["--filter", "label=team=a"];
    assert!(!docker.ok(&[&["network", "prune", "-f"], label.as_slice()].concat())?.contains(&network.name));
    drop(container);
    assert!(docker.ok(&[&["network", "prune", "-f"], label.as_slice()].concat())?.contains(&network.name));
    assert_eq!(ls("label=team=a")?, "");
    Ok(())
}
