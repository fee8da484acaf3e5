//! Who reaches whom.

use crate::{Network, Test, docker, host, serve};

/// The one IPv4 address of a container.
fn address(container: &bulkhead_tests::docker::Container) -> anyhow::Result<String> {
    container.docker(&["inspect", "--format", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"])
}

#[test]
fn on_the_default_bridge_a_container_has_an_address_and_reaches_host_and_neighbour() -> Test {
    let docker = docker()?;
    let web = serve(&docker, &[], "here")?;
    let own = address(&web)?;
    let inside =
        web.exec(&["sh", "-c", "ip -4 -o addr show eth0; ip route; ip -o link show eth1 2>&1; true"])?;
    assert!(inside.contains(&format!("inet {own}/")), "{inside}");
    assert!(inside.contains("default via"), "{inside}");
    assert!(inside.contains("can't find device 'eth1'"), "an empty slot must not be seen: {inside}");
    let fetch = format!("wget -qO- http://{own}");
    assert_eq!(docker.ok(&["run", "--rm", "busybox", "sh", "-c", &fetch])?, "here");
    assert_eq!(host()?.sh(&fetch, &[])?, "here");
    // The host by its own address, from inside.
    assert_eq!(host()?.sh("cat /proc/sys/net/ipv4/ip_forward", &[])?, "1");
    web.exec(&["ping", "-c", "1", "10.0.2.15"])?;
    Ok(())
}

#[test]
fn none_is_loopback_alone() -> Test {
    let text = docker()?.ok(&["run", "--rm", "--network", "none", "busybox", "ip", "-o", "link"])?;
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.contains("lo:"), "{text}");
    Ok(())
}

#[test]
fn networks_do_not_reach_each_other_and_an_internal_one_reaches_nobody() -> Test {
    let docker = docker()?;
    let (one, two) = (Network::create(&docker, &[])?, Network::create(&docker, &["--internal"])?);
    let first = serve(&docker, &["--network", &one.name], "first")?;
    let second = serve(&docker, &["--network", &two.name], "second")?;
    let from = |network: &str, to: &str| {
        docker.run(&[
            "run",
            "--rm",
            "--network",
            network,
            "busybox",
            "timeout",
            "5",
            "wget",
            "-qO-",
            &format!("http://{to}"),
        ])
    };
    assert_eq!(from(&one.name, &address(&first)?)?.ok()?, "first");
    assert_eq!(from(&two.name, &address(&second)?)?.ok()?, "second");
    assert_ne!(from(&two.name, &address(&first)?)?.code, 0);
    assert_ne!(from(&one.name, &address(&second)?)?.code, 0);
    let routes = docker.ok(&["run", "--rm", "--network", &two.name, "busybox", "ip", "route"])?;
    assert!(!routes.contains("default"), "{routes}");
    Ok(())
}

#[test]
fn without_icc_neighbours_are_strangers_and_the_host_is_not() -> Test {
    let docker = docker()?;
    let network = Network::create(&docker, &["-o", "com.docker.network.bridge.enable_icc=false"])?;
    let web = serve(&docker, &["--network", &network.name], "web")?;
    let address = address(&web)?;
    let script = format!(
        "timeout 5 wget -qO- http://{address} && echo reached; \
         ip route add {address}/32 via $(ip route | sed -n 's/default via \\([^ ]*\\).*/\\1/p') && \
         timeout 5 wget -qO- http://{address} && echo by way of the host; ping -c 1 -W 5 $(ip route | sed -n 's/default via \\([^ ]*\\).*/\\1/p') >/dev/null && echo gateway"
    );
    let words =
        ["run", "--rm", "--cap-add", "NET_ADMIN", "--network", &network.name, "busybox", "sh", "-c", &script];
    let text = docker.run(&words)?;
    assert_eq!(text.text().trim(), "gateway", "{}", text.stderr);
    assert_eq!(host()?.sh(&format!("wget -qO- http://{address}"), &[])?, "web");
    Ok(())
}

#[test]
fn ipv6_and_large_frames() -> Test {
    let docker = docker()?;
    let options = ["--ipv6", "--subnet", "fd00:77::/64", "-o", "com.docker.network.driver.mtu=9000"];
    let network = Network::create(&docker, &options)?;
    let web = serve(&docker, &["--network", &network.name, "--ip6", "fd00:77::77"], "six")?;
    let inside = web.exec(&["sh", "-c", "ip -6 -o addr show eth0; ip -o link show eth0"])?;
    assert!(inside.contains("fd00:77::77/64") && inside.contains("mtu 9000"), "{inside}");
    let script = "ping -6 -c 1 fd00:77::77 >/dev/null && ping -s 8900 -c 1 fd00:77::77 >/dev/null && wget -qO- http://[fd00:77::77]";
    assert_eq!(
        docker.ok(&["run", "--rm", "--network", &network.name, "busybox", "sh", "-c", script])?,
        "six"
    );
    Ok(())
}

#[test]
fn a_running_container_is_connected_and_disconnected() -> Test {
    let docker = docker()?;
    let (one, two) = (Network::create(&docker, &[])?, Network::create(&docker, &[])?);
    let web = serve(&docker, &["--network", &one.name], "web")?;
    let fetch = |network: &str| {
        let url = format!("http://{}", web.name());
        docker.run(&["run", "--rm", "--network", network, "busybox", "timeout", "5", "wget", "-qO-", &url])
    };
    assert_ne!(fetch(&two.name)?.code, 0);
    for _ in 0..2 {
        docker.ok(&["network", "connect", "--alias", "other", &two.name, web.name()])?;
        assert_eq!(fetch(&two.name)?.ok()?, "web");
        assert!(web.exec(&["ip", "-o", "link", "show", "eth1"])?.contains("UP"));
        assert!(two.inspect("{{json .Containers}}")?.contains(web.name()));
        docker.ok(&["network", "disconnect", &two.name, web.name()])?;
        assert_ne!(fetch(&two.name)?.code, 0);
        assert_ne!(docker.run(&["exec", web.name(), "ip", "link", "show", "eth1"])?.code, 0);
    }
    assert_eq!(fetch(&one.name)?.ok()?, "web");
    let again = docker.run(&["network", "disconnect", &two.name, web.name()])?;
    assert!(again.stderr.contains("is not connected to network"), "{}", again.stderr);
    // One that does not run, too.
    web.docker(&["stop", "-t", "0"])?;
    docker.ok(&["network", "connect", &two.name, web.name()])?;
    web.docker(&["start"])?;
    let script =
        "while ! wget -qO- http://127.0.0.1 >/dev/null 2>&1; do sleep 0.1; done; ip -o link show eth1";
    web.exec(&["sh", "-c", script])?;
    assert_eq!(fetch(&two.name)?.ok()?, "web");
    Ok(())
}

#[test]
fn inspect_tells_all_of_a_network_and_of_a_container_in_it() -> Test {
    let docker = docker()?;
    let options =
        ["--ipv6", "--subnet", "fd00:79::/64", "--subnet", "10.220.0.0/24", "--ip-range", "10.220.0.128/25"];
    let network = Network::create(&docker, &[options.as_slice(), &["--gateway", "10.220.0.254"]].concat())?;
    let words = [
        "--network",
        network.name.as_str(),
        "--network-alias",
        "a",
        "--expose",
        "81",
        "-p",
        "127.0.0.1:0:80",
    ];
    let container = docker.run_detached(&[&words, ["busybox", "sleep", "1000"].as_slice()].concat())?;
    let settings = container.docker(&["inspect", "--format", "{{json .NetworkSettings}}"])?;
    let settings: serde_json::Value = serde_json::from_str(&settings)?;
    let own = &settings["Networks"][&network.name];
    let text = |field: &str| own[field].as_str().unwrap_or_default();
    assert_eq!((text("IPAddress"), own["IPPrefixLen"].as_u64()), ("10.220.0.128", Some(24)), "{own}");
    assert_eq!((text("Gateway"), text("IPv6Gateway")), ("10.220.0.254", "fd00:79::1"), "{own}");
    assert_eq!(text("GlobalIPv6Address"), "fd00:79::2", "{own}");
    assert_eq!(own["GlobalIPv6PrefixLen"], 64, "{own}");
    assert_eq!((text("EndpointID").len(), text("NetworkID").len()), (64, 64), "{own}");
    assert_eq!(own["Aliases"], serde_json::json!(["a"]));
    assert_eq!(own["DNSNames"][0], container.name());
    assert!(settings["Ports"]["81/tcp"].is_null() && settings["Ports"].get("81/tcp").is_some(), "{settings}");
    assert_eq!(settings["Ports"]["80/tcp"][0]["HostIp"], "127.0.0.1", "{settings}");
    assert!(settings["SandboxID"].is_string() && settings["SandboxKey"].is_string(), "{settings}");
    assert_eq!(settings["IPAddress"], "", "of the default bridge alone: {settings}");
    let inside = container.exec(&["cat", "/sys/class/net/eth0/address"])?;
    assert_eq!(text("MacAddress"), inside);
    let members = network.inspect("{{json .Containers}}")?;
    let members: serde_json::Value = serde_json::from_str(&members)?;
    let id = container.docker(&["inspect", "--format", "{{.Id}}"])?;
    let member = &members[&id];
    assert_eq!(member["Name"], container.name(), "{members}");
    assert_eq!(member["IPv4Address"], "10.220.0.128/24", "{members}");
    assert_eq!(member["EndpointID"], own["EndpointID"], "{members}");
    container.docker(&["stop", "-t", "0"])?;
    let ports = container.docker(&["inspect", "--format", "{{json .NetworkSettings.Ports}}"])?;
    assert_eq!(ports, "{}");
    Ok(())
}
