//! Published ports.

use anyhow::Context;

use crate::{Network, Test, docker, host, serve};

/// The host's port that `docker port` tells for port 80.
fn published(container: &bulkhead_tests::docker::Container) -> anyhow::Result<String> {
    let lines = container.docker(&[
        "inspect",
        "--format",
        "{{(index (index .NetworkSettings.Ports \"80/tcp\") 0).HostPort}}",
    ])?;
    Ok(lines)
}

#[test]
fn a_published_port_is_reached_by_every_way_and_freed_by_the_stop() -> Test {
    let docker = docker()?;
    let web = serve(&docker, &["-p", "80"], "published")?;
    let port = published(&web)?;
    let told = docker.ok(&["port", web.name()])?;
    assert!(
        told.contains(&format!("80/tcp -> 0.0.0.0:{port}"))
            && told.contains(&format!("80/tcp -> [::]:{port}")),
        "{told}"
    );
    let listed = docker.ok(&["ps", "--filter", &format!("name={}", web.name()), "--format", "{{.Ports}}"])?;
    assert!(listed.contains(&format!("0.0.0.0:{port}->80/tcp")), "{listed}");
    for address in ["127.0.0.1", "[::1]", "10.0.2.15"] {
        assert_eq!(host()?.sh("wget -qO- \"http://$1:$2\"", &[address, &port])?, "published", "{address}");
    }
    // From another container through the host, and from itself.
    let url = format!("http://10.0.2.15:{port}");
    assert_eq!(docker.ok(&["run", "--rm", "busybox", "wget", "-qO-", &url])?, "published");
    let other = Network::create(&docker, &[])?;
    assert_eq!(
        docker.ok(&["run", "--rm", "--network", &other.name, "busybox", "wget", "-qO-", &url])?,
        "published"
    );
    assert_eq!(web.exec(&["wget", "-qO-", &url])?, "published");

    let taken = docker.run(&["run", "--rm", "-p", &format!("{port}:80"), "busybox", "true"])?;
    assert_eq!(taken.code, 125);
    assert!(
        taken.stderr.contains(&format!("Bind for 0.0.0.0:{port} failed: port is already allocated")),
        "{}",
        taken.stderr
    );
    web.docker(&["stop", "-t", "0"])?;
    host()?.sh("! nc -z 127.0.0.1 \"$1\"", &[&port])?;
    let again = serve(&docker, &["-p", &format!("127.0.0.1:{port}:80")], "again")?;
    assert_eq!(host()?.sh("wget -qO- \"http://127.0.0.1:$1\"", &[&port])?, "again");
    host()?.sh("! timeout 5 wget -qO- \"http://10.0.2.15:$1\"", &[&port])?;
    drop(again);
    Ok(())
}

#[test]
fn published_ports_follow_a_running_container_into_its_other_network() -> Test {
    let docker = docker()?;
    let (one, two) = (Network::create(&docker, &[])?, Network::create(&docker, &[])?);
    let web = serve(&docker, &["--network", &one.name, "-p", "80"], "moved")?;
    docker.ok(&["network", "connect", &two.name, web.name()])?;
    docker.ok(&["network", "disconnect", &one.name, web.name()])?;
    let reach = || host()?.sh("wget -qO- \"http://10.0.2.15:$1\"", &[&published(&web)?]);
    assert_eq!(reach()?, "moved");
    // In none, it has none; and then it has them again.
    docker.ok(&["network", "disconnect", &two.name, web.name()])?;
    assert_eq!(docker.ok(&["port", web.name()])?, "");
    docker.ok(&["network", "connect", &one.name, web.name()])?;
    assert_eq!(reach()?, "moved");
    Ok(())
}

#[test]
fn udp_ranges_and_all_exposed_ports() -> Test {
    let docker = docker()?;
    let image = crate::spoof::image(&docker)?;
    let program = crate::spoof::program()?;
    let options = ["-p", "99/udp", "-p", "42300-42310:80", "--expose", "81", "-P"];
    let container = docker.run_detached(&[options.as_slice(), &[&image, "frame", "echo", "99"]].concat())?;
    let ports = docker.inspect(container.name(), "{{json .NetworkSettings.Ports}}")?;
    let ports: serde_json::Value = serde_json::from_str(&ports)?;
    let udp = ports["99/udp"][0]["HostPort"].as_str().context("udp")?;
    assert!(ports["81/tcp"][0]["HostPort"].is_string(), "{ports}");
    let in_range = ports["80/tcp"][0]["HostPort"].as_str().context("range")?.parse::<u16>()?;
    assert!((42300..=42310).contains(&in_range), "{ports}");
    let ask = |address: &str| {
        let program = program.path().join("frame").display().to_string();
        host()?.sh("\"$1\" ask \"$2:$3\" hello", &[&program, address, udp])
    };
    assert_eq!((ask("127.0.0.1")?, ask("10.0.2.15")?), ("hello".into(), "hello".into()));
    // A sender that goes on is led to the next container, not to where the last was.
    drop(container);
    let options = ["-p", &format!("{udp}:98/udp")];
    let _other = docker.run_detached(&["busybox", "sleep", "1000"])?;
    let next = docker.run_detached(&[&options[..], &[&image, "frame", "echo", "98"]].concat())?;
    assert_eq!(ask("10.0.2.15")?, "hello");
    drop(next);
    docker.ok(&["rmi", "-f", &image]).map(drop)
}

#[test]
fn an_exposed_port_is_null_and_sctp_is_refused() -> Test {
    let docker = docker()?;
    let container = docker.run_detached(&["--expose", "81", "busybox", "sleep", "1000"])?;
    assert_eq!(docker.inspect(container.name(), "{{json .NetworkSettings.Ports}}")?, r#"{"81/tcp":null}"#);
    let refused = docker.run(&["run", "--rm", "-p", "80:80/sctp", "busybox", "true"])?;
    assert!(refused.stderr.contains("SCTP is not supported"), "{}", refused.stderr);
    Ok(())
}
