use std::io::Write;

use clap::Parser;

use super::*;

#[derive(Parser)]
struct Flags {
    #[command(flatten)]
    options: Options,
}

fn flags(arguments: &[&str]) -> Options {
    Flags::parse_from([&["bulkheadd"], arguments].concat()).options
}

/// The config of these flags and this file.
fn load(arguments: &[&str], file: &str) -> Result<Config, String> {
    let mut daemon_json = tempfile::NamedTempFile::new().unwrap();
    daemon_json.write_all(file.as_bytes()).unwrap();
    Config::load(&flags(arguments), Some(daemon_json.path())).map_err(|error| {
        let error = error.to_string();
        let prefix = format!("unable to configure the daemon with file {}: ", daemon_json.path().display());
        error.strip_prefix(&prefix).unwrap_or(&error).to_owned()
    })
}

#[test]
fn nothing_said_is_all_defaults() {
    let config = load(&[], "").unwrap();
    assert_eq!(config.hosts, [Host::Unix("/run/bulkhead.sock".into())]);
    assert_eq!(config.layout.data_root, Path::new("/var/lib/bulkhead"));
    assert_eq!(config.layout.exec_root, Path::new("/run/bulkhead"));
    assert_eq!(config.log_driver, "json-file");
    assert_eq!(config.group, ("docker".into(), false));
    let vcpus = std::thread::available_parallelism().map_or(1, |cpus| cpus.get().min(2));
    assert_eq!((config.vm.memory_mib, usize::from(config.vm.vcpus), config.vm.disk_gib), (512, vcpus, 10));
    assert_eq!(config.vm.reclaim_below_percent, 10);
    assert_eq!(config.shm_size, 64 << 20);
    assert_eq!(load(&[], "{}").unwrap(), config);
}

#[test]
fn flags_and_file_say_the_same_in_their_own_form() {
    let by_flags = load(
        &[
            "-H",
            "unix:///a.sock",
            "--data-root=/d",
            "--registry-mirror=http://m:5000/",
            "-D",
            "--kernel=/k",
            "--insecure-registry",
            "r:5000",
            "--label=a=b",
            "--default-memory-mib=256",
            "--init",
        ],
        "",
    );
    let by_file = load(
        &[],
        r#"{"hosts":["unix:///a.sock"],"data-root":"/d","registry-mirrors":["http://m:5000"],"debug":true,
            "insecure-registries":["r:5000"],"labels":["a=b"],"init":true,
            "bulkhead":{"kernel":"/k","default-memory-mib":256}}"#,
    );
    assert_eq!(by_flags, by_file);
    let config = by_file.unwrap();
    assert_eq!(config.log_level, tracing::Level::DEBUG);
    assert_eq!(config.registry_mirrors, ["http://m:5000"]);
}

#[test]
fn what_is_said_twice_or_not_known_is_refused() {
    for (arguments, file, message) in [
        (
            &["--debug=false", "-H", "unix:///a"][..],
            r#"{"debug":true,"hosts":["unix:///b","fd://"]}"#,
            "the following directives are specified both as a flag and in the configuration file: \
             debug: (from flag: false, from file: true), hosts: (from flag: [unix:///a], from file: [unix:///b fd://])",
        ),
        (
            &[],
            r#"{"a":1,"data-root":"/d","zzz":{}}"#,
            "the following directives don't match any configuration option: a, zzz",
        ),
        (
            &[],
            r#"{"bulkhead":{"debug":true}}"#,
            "the following directives don't match any configuration option: bulkhead.debug",
        ),
        (
            &[],
            r#"{"kernel":"/a","bulkhead":{"kernel":"/b"}}"#,
            "kernel and bulkhead.kernel must not both be specified in the config file",
        ),
        (&[], r#"{"bulkhead":1}"#, "bulkhead: must be an object"),
    ] {
        assert_eq!(load(arguments, file).unwrap_err(), message);
    }
}

#[test]
fn values_that_are_not_valid_are_refused() {
    for (arguments, file, message) in [
        (&["-l", "loud"][..], "", "invalid logging level: loud"),
        (&["--data-root", "d"], "", "data-root must be an absolute path: d"),
        (&["--log-driver", "gelf"], "", "logger: no log driver named 'gelf' is registered"),
        (&["--registry-mirror", "m:5000"], "", "invalid mirror: no scheme"),
        (&["--registry-mirror", "http://u:p@m"], "", "invalid mirror: username/password"),
        (&["--insecure-registry", "http://m"], "", "insecure registry http://m should not contain '://'"),
        (&["--default-vcpus", "65"], "", "invalid default-vcpus 65: must be between 1 and 64"),
        (&["--max-concurrent-downloads=-1"], "", "invalid max concurrent downloads: -1"),
        (&["--dns", "one"], "", "one is not an ip address"),
        (&["--label", "one"], "", "bad attribute format: one"),
        (&["-H", "tcp://127.0.0.1:1"], "", "refusing to serve the API on tcp://127.0.0.1:1 without TLS"),
        (&[], r#"{"debug":"yes"}"#, "debug: invalid type"),
        (&[], "{", "EOF while parsing"),
    ] {
        let error = load(arguments, file).unwrap_err();
        assert!(error.starts_with(message), "{error}");
    }
}

#[test]
fn a_missing_file_matters_only_when_it_was_named() {
    let missing = Path::new("/nonexistent/daemon.json");
    assert!(matches!(Config::load(&Options::default(), Some(missing)), Err(ConfigError::Read { .. })));
}

#[test]
fn tcp_needs_tls_or_a_word_against_it() {
    let plain = load(&["--tls=false", "-H", "tcp://"], "").unwrap();
    assert_eq!((plain.hosts, plain.tls), (vec![Host::Tcp("127.0.0.1:2375".into())], Tls::Off));
    let verified = load(&["--tlsverify", "-H", "tcp://0.0.0.0", "--tlskey=/k"], "").unwrap();
    assert_eq!(verified.hosts, [Host::Tcp("0.0.0.0:2376".into())]);
    let on = Tls::On {
        cert: "/etc/bulkhead/cert.pem".into(),
        key: "/k".into(),
        client_ca: Some("/etc/bulkhead/ca.pem".into()),
    };
    assert_eq!(verified.tls, on);
}

#[test]
fn hosts() {
    let unix = |path: &str| Ok(Host::Unix(path.into()));
    let tcp = |address: &str| Ok(Host::Tcp(address.to_owned()));
    for (text, expected) in [
        ("", unix("/run/bulkhead.sock")),
        ("unix://", unix("/run/bulkhead.sock")),
        (" unix:///a b.sock ", unix("/a b.sock")),
        ("fd://", Ok(Host::Fd(None))),
        ("fd://api.socket", Ok(Host::Fd(Some("api.socket".into())))),
        ("tcp://:7777", tcp("127.0.0.1:7777")),
        ("localhost:7777", tcp("localhost:7777")),
        ("0.0.0.0", tcp("0.0.0.0:2375")),
        ("tcp://[::1]", tcp("[::1]:2375")),
        ("tcp://[::1]:5", tcp("[::1]:5")),
        ("tcp://::1", Err("an IPv6 address must stand in brackets")),
        ("tcp://a:0", Err("invalid port: 0")),
        ("tcp://a:70000", Err("invalid port: 70000")),
        ("tcp://a:1/path", Err("should not contain a path element")),
        ("udp://a:1", Err("unsupported proto 'udp'")),
        ("unix://tcp://a", Err("invalid unix address: tcp://a")),
        ("unix://relative", Err("must be an absolute path")),
    ] {
        let expected = expected.map_err(|why| format!("invalid bind address ({}): {why}", text.trim()));
        assert_eq!(Host::parse(text, false), expected, "{text}");
    }
}
