//! Names at 127.0.0.11, and the files that Docker writes.

use crate::{Network, Test, docker, serve, unique};

#[test]
fn a_neighbour_is_found_by_name_alias_short_id_and_host_name() -> Test {
    let docker = docker()?;
    let network = Network::create(&docker, &[])?;
    let web =
        serve(&docker, &["--network", &network.name, "--network-alias", "the-alias", "-h", "walrus"], "web")?;
    let id = docker.inspect(web.name(), "{{.Id}}")?;
    let short = id.get(..12).unwrap_or_default();
    let qualified = format!("{}.{}", web.name(), network.name);
    let script = "cat /etc/resolv.conf; for name; do wget -qO- http://$name || echo failed $name; done";
    let words = ["run", "--rm", "--network", &network.name, "busybox", "sh", "-c", script, "sh"];
    let names = [web.name(), "the-alias", short, "walrus", "THE-ALIAS", &qualified];
    let text = docker.ok(&[words.as_slice(), &names].concat())?;
    assert!(text.starts_with("nameserver 127.0.0.11\n"), "{text}");
    assert!(text.contains("ndots:0"), "{text}");
    assert_eq!(text.matches("web").count(), names.len(), "{text}");
    Ok(())
}

#[test]
fn names_lead_to_addresses_of_both_families() -> Test {
    let docker = docker()?;
    let network =
        Network::create(&docker, &["--ipv6", "--subnet", "fd00:78::/64", "--subnet", "10.219.0.0/24"])?;
    let web = serve(&docker, &["--network", &network.name, "--network-alias", "both"], "web")?;
    let script =
        "for family in -4 -6; do for name; do ping $family -c 1 -W 60 $name | grep ^PING; done; done";
    let words =
        ["run", "--rm", "--network", &network.name, "busybox", "sh", "-c", script, "sh", "both", web.name()];
    let text = docker.ok(&words)?;
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 4, "{text}");
    assert!(lines[..2].iter().all(|line| line.contains("(10.219.0.2)")), "{text}");
    assert!(lines[2..].iter().all(|line| line.contains("(fd00:78::2)")), "{text}");
    Ok(())
}

#[test]
fn an_alias_of_several_is_each_in_turn_and_addresses_have_names() -> Test {
    let docker = docker()?;
    let network = Network::create(&docker, &[])?;
    let options = ["--network", network.name.as_str(), "--network-alias", "shared"];
    let (one, two) = (serve(&docker, &options, "one")?, serve(&docker, &options, "two")?);
    let address =
        |name: &str| docker.inspect(name, "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}");
    let (first, second) = (address(one.name())?, address(two.name())?);
    let script = format!("nslookup shared 127.0.0.11; nslookup {first} 127.0.0.11");
    let text =
        docker.run(&["run", "--rm", "--network", &network.name, "busybox", "sh", "-c", &script])?.text();
    assert!(text.contains(&first) && text.contains(&second), "{text}");
    assert!(text.contains(&format!("{}.{}", one.name(), network.name)), "{text}");
    Ok(())
}

#[test]
fn a_name_of_another_network_is_unknown_and_a_name_server_of_ones_own_can_be_run() -> Test {
    let docker = docker()?;
    let (one, two) = (Network::create(&docker, &[])?, Network::create(&docker, &[])?);
    let web = serve(&docker, &["--network", &one.name], "web")?;
    let lookup = format!("ping -c 1 {} || echo unknown", web.name());
    let text = docker.run(&["run", "--rm", "--network", &two.name, "busybox", "sh", "-c", &lookup])?;
    assert_eq!(text.text().trim(), "unknown", "{}", text.stderr);
    // Port 53 is the workload's own.
    let image = crate::spoof::image(&docker)?;
    let script = "frame names 0.0.0.0:53 10.1.2.3 & until nslookup served 127.0.0.1 2>/dev/null | grep 10.1.2.3; do sleep 0.1; done";
    let text = docker.ok(&["run", "--rm", "--network", &one.name, &image, "sh", "-c", script])?;
    assert!(text.contains("10.1.2.3"), "{text}");
    docker.ok(&["rmi", "-f", &image]).map(drop)
}

#[test]
fn a_link_in_the_default_bridge_is_hosts_and_environment_and_follows_its_container() -> Test {
    let docker = docker()?;
    let child = serve(&docker, &["--expose", "80", "-e", "SECRET=x"], "child")?;
    let link = format!("{}:my-db", child.name());
    let parent = docker.run_detached(&["--link", &link, "busybox", "sleep", "100000"])?;
    let address = docker.inspect(child.name(), "{{.NetworkSettings.IPAddress}}")?;
    let hosts = parent.exec(&["cat", "/etc/hosts"])?;
    let hostname = docker.inspect(child.name(), "{{.Config.Hostname}}")?;
    let line = format!("{address}\tmy-db {hostname} {}", child.name());
    assert!(hosts.lines().any(|found| found == line), "{line}: {hosts}");
    let environment = parent.exec(&["env"])?;
    for expected in [
        format!("MY_DB_PORT=tcp://{address}:80"),
        format!("MY_DB_PORT_80_TCP_ADDR={address}"),
        format!("MY_DB_NAME=/{}/my-db", parent.name()),
        "MY_DB_ENV_SECRET=x".to_owned(),
    ] {
        assert!(environment.lines().any(|found| found == expected), "{expected}: {environment}");
    }
    assert_eq!(
        docker.inspect(parent.name(), "{{json .HostConfig.Links}}")?,
        format!("[\"/{}:/{}/my-db\"]", child.name(), parent.name())
    );
    // At another address, and under another name.
    docker.ok(&["restart", "-t", "0", child.name()])?;
    let address = docker.inspect(child.name(), "{{.NetworkSettings.IPAddress}}")?;
    let follows = "for i in $(seq 60); do grep -q \"^$1\tmy-db \" /etc/hosts && exit; sleep 0.2; done; cat /etc/hosts; exit 1";
    parent.exec(&["sh", "-c", follows, "sh", &address])?;
    docker.ok(&["stop", "-t", "0", child.name()])?;
    let refused = docker.run(&["restart", "-t", "0", parent.name()])?;
    let words =
        format!("Cannot link to a non running container: /{} AS /{}/my-db", child.name(), parent.name());
    assert!(refused.stderr.contains(&words), "{}", refused.stderr);
    // The link is taken away while both run, and nobody waits for the other any more.
    docker.ok(&["start", child.name(), parent.name()])?;
    let link = format!("{}/my-db", parent.name());
    docker.ok(&["rm", "--link", &link])?;
    assert!(!parent.exec(&["cat", "/etc/hosts"])?.contains("my-db"));
    assert_eq!(docker.inspect(parent.name(), "{{json .HostConfig.Links}}")?, "null");
    let again = docker.run(&["rm", "--link", &link])?;
    assert!(again.stderr.contains(&format!("No such container: {link}")), "{}", again.stderr);
    let name = docker.run(&["rm", "--link", parent.name()])?;
    assert!(name.stderr.contains("cannot remove the default link name of the container"), "{}", name.stderr);
    docker.ok(&["stop", "-t", "0", child.name()])?;
    docker.ok(&["restart", "-t", "0", parent.name()])?;
    let unknown = docker.run(&["create", "--link", "nosuch:x", "busybox"])?;
    assert!(unknown.stderr.contains("could not get container for nosuch"), "{}", unknown.stderr);
    Ok(())
}

#[test]
fn links_added_hosts_and_the_files_are_as_docker_has_them() -> Test {
    let docker = docker()?;
    let network = Network::create(&docker, &[])?;
    let web = serve(&docker, &["--network", &network.name], "web")?;
    let link = format!("{}:linked", web.name());
    let name = unique("files");
    let script =
        "wget -qO- http://linked; cat /etc/hosts /etc/hostname; ip -4 -o addr show eth0 | awk '{print $4}'";
    let text = docker.ok(&[
        "run",
        "--rm",
        "--name",
        &name,
        "-h",
        "walrus",
        "--network",
        &network.name,
        "--link",
        &link,
        "--add-host",
        "extra:1.2.3.4",
        "--add-host",
        "outside:host-gateway",
        "busybox",
        "sh",
        "-c",
        script,
    ])?;
    let gateway = docker.ok(&[
        "network",
        "inspect",
        "bridge",
        "--format",
        "{{range .IPAM.Config}}{{.Gateway}}{{end}}",
    ])?;
    let own = text.lines().last().and_then(|line| line.split('/').next()).unwrap_or_default().to_owned();
    assert!(text.starts_with("web\n127.0.0.1\tlocalhost\n"), "{text}");
    for line in [
        "1.2.3.4\textra".to_owned(),
        format!("{gateway}\toutside"),
        format!("{own}\twalrus"),
        "walrus".to_owned(),
    ] {
        assert!(text.lines().any(|found| found == line), "{line}: {text}");
    }
    Ok(())
}
