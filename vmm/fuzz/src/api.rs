//! What clients of the API send: any bytes as each of the texts and bodies that the daemon reads before it knows who
//! speaks.

use std::sync::OnceLock;

use bulkhead_daemon::api::request::Query;
use bulkhead_daemon::api::router;
use bulkhead_daemon::api::stream::detach::DetachKeys;
use bulkhead_daemon::api::types::container::CreateRequest;
use bulkhead_daemon::api::types::{Filters, exec};
use bulkhead_daemon::config::{Config, Options};
use bulkhead_daemon::engine::events::FILTER_KEYS;
use bulkhead_daemon::engine::image::{Credentials, Platform, Reference};
use bulkhead_daemon::engine::logs;
use bulkhead_daemon::engine::spec::{self, Facts, NetworkFacts};
use bulkhead_vmm::fuzzing::Target;

pub(super) const TARGETS: [(&str, Target); 5] = [
    ("api_route", route),
    ("api_filters", filters),
    ("api_reference", reference),
    ("api_auth", auth),
    ("api_create", create),
];

/// A request's first line: method, path and query.
fn route(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let (method, target) = text.split_once(' ').unwrap_or(("GET", text));
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    if let Ok(method) = method.parse()
        && let Ok(found) = router::find(&method, path)
    {
        // What was taken for names is all of the path that is not the route's.
        let length: usize = found.params.iter().map(String::len).sum();
        assert!(length <= path.len(), "{path}");
        assert_eq!(found.route.method, method);
    }
    if let Ok(query) = Query::parse(query) {
        let _ = (query.time("since"), query.number::<i64>("t"), query.boolean("all", false));
        let _ = query.get("detachKeys").map(DetachKeys::parse);
        let _ = query.get("platform").map(Platform::parse);
    }
}

/// The `filters` parameter, in both of its forms.
fn filters(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(filters) = Filters::parse(text, &FILTER_KEYS) {
        for key in FILTER_KEYS {
            let values: Vec<&str> = filters.get(key).collect();
            assert!(values.iter().all(|value| filters.exact(key, value)), "{text}");
            assert!(values.iter().all(|value| filters.prefix(key, value)), "{text}");
            let _ = filters.boolean(key, false);
        }
    }
}

/// A name of an image: what is read is written as what it was, and read again as the same.
fn reference(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(reference) = Reference::parse(text) {
        let (full, familiar) = (reference.to_string(), reference.familiar());
        assert_eq!(Reference::parse(&full).expect("its own name"), reference, "{text}");
        assert_eq!(Reference::parse(&familiar).expect("its familiar name"), reference, "{text}");
        assert!(full.is_ascii() && !full.contains(char::is_whitespace), "{text}");
        let _ = reference.matches("*busybox*");
    }
}

/// The `X-Registry-Auth` header.
fn auth(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Some(credentials) = Credentials::from_header(text) {
        if let Some(basic) = credentials.basic() {
            assert!(basic.starts_with("Basic ") && basic.is_ascii());
        }
        // It stands in logs.
        let shown = format!("{credentials:?}");
        assert!(credentials.password.len() < 9 || !shown.contains(&credentials.password));
    }
}

/// The body of a create, and of an exec: what passes the checks makes a runtime spec.
fn create(bytes: &[u8]) {
    static DAEMON: OnceLock<Config> = OnceLock::new();
    let daemon =
        DAEMON.get_or_init(|| Config::load(&Options::default(), None).expect("the default configuration"));
    let Ok(mut request) = CreateRequest::from_slice(bytes) else { return };
    let id = "ab".repeat(32);
    spec::fill(&mut request, &id, daemon);
    let CreateRequest { config, host_config, .. } = &request;
    let options = host_config.log_config.config.clone().unwrap_or_default();
    let _ = logs::validate(&host_config.log_config.kind, &options);
    if spec::validate(config, host_config).is_ok() {
        let facts = Facts {
            id: &id,
            config,
            host: host_config,
            names: host_config,
            pid_of: None,
            ipc_of: None,
            daemon,
            network: &NetworkFacts::default(),
            resolv_conf: "nameserver 192.0.2.1\n",
            binds: &[],
        };
        let made = spec::container(&facts).expect("what is valid can be made");
        let mut exec = exec::CreateRequest {
            tty: config.tty,
            cmd: config.cmd.clone(),
            ..exec::CreateRequest::default()
        };
        exec.env.clone_from(&config.env);
        let _ = spec::exec(&made.spec, &exec);
    }
}
