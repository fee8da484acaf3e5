//! What the daemon is started with, what it takes over while it runs, and who may speak to it how.

use std::path::Path;

use bulkhead_tests::{DaemonOptions, Host, Suite, with_daemon};
use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};

use crate::Test;

/// Opens a thousand connections that say nothing or begin a request and never end it, and then asks: prints the
/// status line.
const CROWD: &str = r#"
import resource, socket, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
crowd = []
for number in range(1000):
    client = socket.socket(socket.AF_UNIX)
    client.connect(sys.argv[1])
    if number % 2:
        client.sendall(b"GET /_ping HTTP/1.1\r\nHost: a\r\nX-Slow: " + b"x" * (number % 100))
    crowd.append(client)
asks = socket.socket(socket.AF_UNIX)
asks.settimeout(60)
asks.connect(sys.argv[1])
asks.sendall(b"GET /_ping HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
print(asks.recv(100).split(b"\r\n")[0].decode())
endless = socket.socket(socket.AF_UNIX)
endless.settimeout(60)
endless.connect(sys.argv[1])
try:
    endless.sendall(b"GET /_ping HTTP/1.1\r\n" + b"A: b\r\n" * 1000000)
    print(endless.recv(100).split(b"\r\n")[0].decode())
except OSError as error:
    print("cut")
"#;

#[test]
fn a_thousand_idle_and_slow_connections_keep_nobody_else_out() -> Test {
    with_daemon(Suite::from_env()?.daemon_options(), |daemon| {
        let host = Host::from_env()?;
        let answers = host.sh("python3 -c \"$1\" \"$2\"", &[CROWD, &daemon.inner_socket()])?;
        let lines: Vec<&str> = answers.lines().collect();
        assert_eq!(lines.first(), Some(&"HTTP/1.1 200 OK"));
        assert!(lines.last().is_some_and(|last| *last == "cut" || last.contains(" 431 ")), "{answers}");
        assert!(daemon.docker().ok(&["version", "--format", "{{.Server.Os}}"])? == "linux");
        Ok(())
    })
}

#[test]
fn a_hangup_reads_the_configuration_anew_and_a_bad_one_changes_nothing() -> Test {
    let host = Host::from_env()?;
    let scratch = host.scratch()?;
    let file = scratch.join("daemon.json");
    let write = |text: &str| host.sh("printf %s \"$1\" > \"$2\"", &[text, &file]);
    write(r#"{"labels": ["a=1"], "log-format": "json", "metrics-addr": "127.0.0.1:19323"}"#)?;
    let options = DaemonOptions {
        arguments: vec!["--config-file".into(), file.clone()],
        ..Suite::from_env()?.daemon_options()
    };
    with_daemon(options, |daemon| {
        let docker = daemon.docker();
        let labels = || docker.ok(&["info", "--format", "{{json .Labels}}"]);
        assert_eq!(labels()?, r#"["a=1"]"#);
        let since = docker.ok(&["info", "--format", "{{.SystemTime}}"])?;
        let hang_up = "kill -HUP \"$(cat \"$1/d.pid\")\"";
        write(r#"{"labels": ["b=2", "c=3"], "log-format": "json", "metrics-addr": "127.0.0.1:19323"}"#)?;
        host.sh(hang_up, &[daemon.exec_root()])?;
        while labels()? != r#"["b=2","c=3"]"# {}
        let events = ["events", "--since", &since, "--until", "0s", "--filter", "event=reload", "--format"];
        let format = "{{.Type}} {{index .Actor.Attributes \"labels\"}}";
        let now = docker.ok(&["info", "--format", "{{.SystemTime}}"])?;
        let events = events.map(|word| if word == "0s" { now.as_str() } else { word });
        assert_eq!(docker.ok(&[&events[..], &[format]].concat())?, r#"daemon ["b=2","c=3"]"#);
        write(r#"{"labels": ["d=4"], "nonsense": true}"#)?;
        host.sh(hang_up, &[daemon.exec_root()])?;
        while !daemon.log()?.contains("the configuration stays as it was") {}
        assert_eq!(labels()?, r#"["b=2","c=3"]"#);
        // Each line of the log is an object, and what belongs to a request has its number.
        let log = daemon.log()?;
        let lines =
            log.lines().map(serde_json::from_str::<serde_json::Value>).collect::<Result<Vec<_>, _>>()?;
        assert!(
            lines.iter().any(|line| line["span"]["id"].is_u64() && line["span"]["path"].is_string()),
            "{log}"
        );
        let get = "python3 -c 'import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1]).read().decode())' \"$1\"";
        let metrics = host.sh(get, &["http://127.0.0.1:19323/metrics"])?;
        assert!(
            metrics.contains("engine_daemon_container_states_containers{state=\"running\"} 0"),
            "{metrics}"
        );
        Ok(())
    })
}

/// What systemd does for a socket unit.
const ACTIVATE: &str = r#"
import os, socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
os.dup2(listener.fileno(), 3)
os.set_inheritable(3, True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", LISTEN_FDNAMES="bulkhead.socket")
os.execvp(sys.argv[2], sys.argv[2:])
"#;

#[test]
fn a_socket_of_systemd_s_is_served_and_stays_when_the_daemon_ends() -> Test {
    let host = Host::from_env()?;
    let scratch = host.scratch()?;
    let socket = scratch.join("passed.sock");
    let options = DaemonOptions {
        wrapper: ["python3", "-c", ACTIVATE, &socket].map(str::to_owned).to_vec(),
        arguments: ["--host", "fd://bulkhead.socket"].map(str::to_owned).to_vec(),
        ..Suite::from_env()?.daemon_options()
    };
    with_daemon(options, |daemon| {
        let forward = host.forward(&socket)?;
        let passed = bulkhead_tests::Docker::new(forward.address());
        let id = |docker: &bulkhead_tests::Docker| docker.ok(&["info", "--format", "{{.ID}}"]);
        assert_eq!(id(&passed)?, id(&daemon.docker())?);
        daemon.stop()?;
        // It is systemd's: clients that come now wait for the next daemon.
        host.sh("test -S \"$1\" && rm \"$1\"", &[&socket])?;
        daemon.start_again()?;
        assert_eq!(id(&passed)?, id(&daemon.docker())?);
        Ok(())
    })
}

#[test]
fn a_configuration_can_be_checked_without_a_daemon() -> Test {
    let host = Host::from_env()?;
    let scratch = host.scratch()?;
    let file = scratch.join("daemon.json");
    let bundle = std::env::var(bulkhead_tests::daemon::BUNDLE_VARIABLE)?;
    let daemon = Path::new(&bundle).join("bulkheadd").display().to_string();
    let validate = |text: &str| {
        host.sh("printf %s \"$1\" > \"$2\"", &[text, &file])?;
        host.sh(
            "\"$1\" --validate --config-file \"$2\" 2>&1 && echo taken || echo refused",
            &[&daemon, &file],
        )
    };
    let good = validate(
        r#"{"log-driver": "local", "registry-mirrors": ["http://m"], "authorization-plugins": ["judge"]}"#,
    )?;
    assert_eq!(good, "configuration OK\ntaken");
    for (text, why) in [
        (r#"{"nonsense": 1}"#, "nonsense"),
        (r#"{"log-opts": {"max-size": "much"}}"#, "invalid size"),
        ("{", "EOF"),
    ] {
        let said = validate(text)?;
        assert!(said.contains(why) && said.ends_with("refused"), "{text}: {said}");
    }
    Ok(())
}

#[test]
fn tls_lets_in_only_clients_of_its_own_ca() -> Test {
    let host = Host::from_env()?;
    let scratch = host.scratch()?;
    write_certificates(&host, &scratch.join(""))?;
    let file = |name: &str| scratch.join(name);
    let address = "127.0.0.1:23761";
    let options = DaemonOptions {
        arguments: [
            "--host",
            &format!("tcp://{address}"),
            "--tlsverify",
            "--tlscacert",
            &file("ca.pem"),
            "--tlscert",
            &file("server.pem"),
            "--tlskey",
            &file("server-key.pem"),
        ]
        .map(str::to_owned)
        .to_vec(),
        ..Suite::from_env()?.daemon_options()
    };
    with_daemon(options, |_| {
        // The network is the host's, and so is this client. It answers its certificate's name and what it heard.
        let ask = r#"
import http.client, ssl, sys
address, ca, cert, key = sys.argv[1:5]
context = ssl.create_default_context(cafile=ca)
if cert:
    context.load_cert_chain(cert, key)
host, port = address.split(":")
try:
    connection = http.client.HTTPSConnection(host, int(port), context=context, timeout=60)
    connection.request("GET", "/_ping")
    print(connection.getresponse().read().decode())
except (ssl.SSLError, OSError) as error:
    print("refused:", error)
"#;
        let ask = |cert: &str, key: &str| {
            host.sh(
                "python3 -c \"$1\" \"$2\" \"$3\" \"$4\" \"$5\"",
                &[ask, address, &file("ca.pem"), cert, key],
            )
        };
        assert_eq!(ask(&file("client.pem"), &file("client-key.pem"))?, "OK");
        for (cert, key) in [("", ""), (&*file("stranger.pem"), &*file("stranger-key.pem"))] {
            let answer = ask(cert, key)?;
            assert!(answer.starts_with("refused:"), "{cert}: {answer}");
        }
        let plain = "import http.client, sys\nc = http.client.HTTPConnection(sys.argv[1], timeout=60)\ntry:\n    c.request('GET', '/_ping'); print(c.getresponse().read())\nexcept Exception as e:\n    print('refused:', e)";
        let answer = host.sh("python3 -c \"$1\" \"$2\"", &[plain, address])?;
        assert!(answer.starts_with("refused:"), "{answer}");
        Ok(())
    })
}

/// An authority, a server's and a client's certificate of it, and a client's of another one.
fn write_certificates(host: &Host, directory: &str) -> Test {
    let authority = |name: &str| -> anyhow::Result<(String, Issuer<'static, KeyPair>)> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate()?;
        let certificate = params.self_signed(&key)?;
        Ok((certificate.pem(), Issuer::new(params, key)))
    };
    let put = |name: &str, text: &str| {
        host.sh("umask 077; printf %s \"$1\" > \"$2\"", &[text, &format!("{directory}/{name}")])
    };
    let issue = |issuer: &Issuer<'_, KeyPair>, name: &str, purpose| -> Test {
        let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()])?;
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages = vec![purpose];
        let key = KeyPair::generate()?;
        put(&format!("{name}.pem"), &params.signed_by(&key, issuer)?.pem())?;
        put(&format!("{name}-key.pem"), &key.serialize_pem())?;
        Ok(())
    };
    let (ca, issuer) = authority("ca")?;
    put("ca.pem", &ca)?;
    issue(&issuer, "server", ExtendedKeyUsagePurpose::ServerAuth)?;
    issue(&issuer, "client", ExtendedKeyUsagePurpose::ClientAuth)?;
    issue(&authority("another")?.1, "stranger", ExtendedKeyUsagePurpose::ClientAuth)
}
