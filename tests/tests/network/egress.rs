//! Egress policies: a container reaches what its label names, and nothing else.

use anyhow::Context;
use bulkhead_tests::{Suite, docker::Container};

use crate::{Background, Network, Test, docker, host, serve};

/// The test host's own address.
const HOST: &str = "10.0.2.15";

fn fetch(docker: &bulkhead_tests::Docker, options: &[&str], url: &str) -> anyhow::Result<bool> {
    let fetch = ["busybox", "timeout", "5", "wget", "-qO-", url];
    let output = docker.run(&[&["run", "--rm"], options, fetch.as_slice()].concat())?;
    if output.code == 125 {
        anyhow::bail!("{}", output.stderr);
    }
    Ok(output.code == 0)
}

#[test]
fn the_host_and_other_networks_are_reached_where_the_policy_allows() -> Test {
    let docker = docker()?;
    let (one, two) = (Network::create(&docker, &[])?, Network::create(&docker, &[])?);
    let on_host = Background::start("echo page >page; exec busybox httpd -f -p 10.0.2.15:8099 -h .")?;
    let other = serve(&docker, &["--network", &two.name, "-p", "80"], "other")?;
    let neighbour = serve(&docker, &["--network", &one.name], "neighbour")?;
    let port = other.docker(&[
        "inspect",
        "--format",
        "{{(index (index .NetworkSettings.Ports \"80/tcp\") 0).HostPort}}",
    ])?;
    let (host_url, other_url) = (format!("http://{HOST}:8099/page"), format!("http://{HOST}:{port}"));
    let to_neighbour = format!("http://{}", neighbour.name());
    for (policy, host, other) in [
        (None, true, true),
        (Some("deny".to_owned()), false, false),
        (Some(format!("allow:{HOST}:8099")), true, false),
        (Some(format!("allow:{HOST}:{port},192.0.2.0/24")), false, true),
    ] {
        let label = policy.map(|policy| format!("bulkhead.egress={policy}"));
        let mut options = vec!["--network", one.name.as_str()];
        options.extend(label.iter().flat_map(|label| ["--label", label.as_str()]));
        assert_eq!(fetch(&docker, &options, &host_url)?, host, "{label:?}: the host");
        assert_eq!(fetch(&docker, &options, &other_url)?, other, "{label:?}: another network");
        assert!(fetch(&docker, &options, &to_neighbour)?, "{label:?}: a neighbour");
    }
    let wrong = docker.run(&["create", "--label", "bulkhead.egress=allow:a b", "busybox"])?;
    assert!(wrong.stderr.contains("invalid egress policy"), "{}", wrong.stderr);
    drop(on_host);
    Ok(())
}

/// A TLS client's first message that asks for this server, as `printf` takes it.
fn client_hello(server: &str) -> String {
    let vector = |length: usize, content: &[u8]| {
        [&(content.len() as u32).to_be_bytes()[4 - length..], content].concat()
    };
    let name = vector(2, &[&[0], vector(2, server.as_bytes()).as_slice()].concat());
    let extension = [&[0, 0], vector(2, &name).as_slice()].concat();
    let parts =
        [&[3, 3], [7; 32].as_slice(), &[0], &[0, 2, 0x13, 1], &[1, 0], &vector(2, &extension)].concat();
    let message = [&[1], vector(3, &parts).as_slice()].concat();
    let record = [&[22, 3, 1], vector(2, &message).as_slice()].concat();
    record.iter().map(|byte| format!("\\{byte:03o}")).collect()
}

#[test]
fn an_allowed_name_leads_to_its_server_and_to_no_other_at_the_same_address() -> Test {
    let docker = docker()?;
    let network = Network::create(&docker, &[])?;
    // Both names lead to one address, at which one server writes down what it is sent.
    let program = crate::spoof::program()?;
    let program = program.path().join("frame").display().to_string();
    let (_names, _) = Background::start(&format!("exec {program} names 127.0.0.54:53 {HOST}"))?;
    let (_server, directory) =
        Background::start("while :; do busybox nc -l -p 443 >>got; echo . >>ends; done")?;
    let options = ["--network", network.name.as_str(), "--dns", "127.0.0.54"];
    let policy = ["--label", "bulkhead.egress=allow:internal:good.test"];
    let container = docker.run_detached(&[&options[..], &policy, &["busybox", "sleep", "1000"]].concat())?;
    let sh = |script: &str| container.exec(&["sh", "-c", script]);
    let before = sh("nc -w 5 10.0.2.15 443 </dev/null && echo reached; true")?;
    assert_eq!(before, "", "an address that no allowed name led to");
    let lookups = sh("nslookup good.test 127.0.0.11; nslookup evil.test 127.0.0.11; true")?;
    assert!(lookups.contains(HOST) && lookups.contains("REFUSED"), "{lookups}");
    let send = |server: &str| sh(&format!("printf '{}' | nc -w 5 good.test 443; true", client_hello(server)));
    send("evil.test")?;
    send("good.test")?;
    let got = "until [ -s \"$1/ends\" ] && grep -q . \"$1/got\"; do sleep 0.1; done; cat \"$1/got\"";
    let got = host()?.sh(got, &[&directory])?;
    assert!(got.contains("good.test") && !got.contains("evil.test"), "{got:?}");
    sh("nc -w 5 10.0.2.15 444 </dev/null; ping -c 1 -W 2 10.0.2.15; true")?;
    let refused = told(
        &container,
        &[
            "tcp 10.0.2.15:443",
            "name evil.test",
            "tls evil.test at 10.0.2.15:443",
            "tcp 10.0.2.15:444",
            "others",
        ],
    )?;
    assert!(!refused.contains("good.test at"), "{refused}");
    Ok(())
}

/// Reads the events of what was refused until all of these were told of.
fn told(container: &Container, wanted: &[&str]) -> anyhow::Result<String> {
    use std::io::{BufRead, BufReader};
    let name = format!("container={}", container.name());
    let arguments = ["events", "--since", "1", "--filter", &name, "--filter", "event=egress-refused"];
    let format = ["--format", "{{.Actor.Attributes.destination}} × {{.Actor.Attributes.count}}"];
    let docker = Suite::from_env()?.docker();
    let mut events = docker.spawn(&[&arguments[..], &format].concat())?;
    let mut all = String::new();
    for line in BufReader::new(events.stdout.take().context("stdout")?).lines() {
        all += &format!("{}\n", line?);
        if wanted.iter().all(|wanted| all.contains(&format!("{wanted} × "))) {
            break;
        }
    }
    events.kill()?;
    events.wait()?;
    Ok(all)
}
