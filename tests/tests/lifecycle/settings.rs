//! What the daemon is started with, what it takes over while it runs, and who may speak to it how.

use std::path::Path;

use bulkhead_tests::{DaemonOptions, Host, Suite, with_daemon};
use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};

use crate::Test;

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
    let good = validate(r#"{"log-driver": "local", "registry-mirrors": ["http://m"]}"#)?;
    assert_eq!(good, "configuration OK\ntaken");
    for (text, why) in [
        (r#"{"nonsense": 1}"#, "nonsense"),
        (r#"{"log-opts": {"max-size": "much"}}"#, "invalid size"),
        (r#"{"authorization-plugins": ["x"]}"#, "authorization"),
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
