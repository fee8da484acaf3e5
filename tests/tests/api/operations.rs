//! Every operation of the published API: done, or refused in Docker's form; never a bare 404 or 500.

use bulkhead_tests::Suite;

use super::{Test, api};

const OPERATIONS: &str = include_str!("../../../daemon/src/api/operations.txt");

/// What is no such thing: an operation on it says so by name.
const NOBODY: &str = "nobody-has-this-name";

#[test]
fn every_operation_answers_in_dockers_form() -> Test {
    // Those that end all images or wait for what never comes are tried elsewhere.
    let skipped = ["/events", "/images/prune", "/containers/prune", "/volumes/prune", "/networks/prune"];
    let mut wrong = Vec::new();
    let operations = OPERATIONS.lines().filter(|line| !line.starts_with('#'));
    for (method, path) in operations.filter_map(|line| line.split_once(' ')) {
        if skipped.contains(&path) {
            continue;
        }
        let named = path.replace("{id}", NOBODY).replace("{name}", NOBODY);
        let body: &[u8] = if method == "POST" { b"{}" } else { b"" };
        let headers = [("Content-Type", "application/json")];
        let answer = api()?.request(method, &format!("/v1.50{named}"), &headers, body)?;
        let (status, text) = (answer.head.status, answer.text());
        let in_form = match status {
            // HEAD has no body.
            _ if method == "HEAD" => true,
            200..=399 => true,
            _ => answer.json().is_ok_and(|json| {
                json.as_object().is_some_and(|object| object.len() == 1 && json["message"].is_string())
            }),
        };
        let swarm = ["/swarm", "/nodes", "/services", "/tasks", "/secrets", "/configs"];
        let of_swarm = swarm.iter().any(|part| path.starts_with(part));
        // Their container is in the query or the body, and has no name here; a registry's own words.
        let elsewhere = ["/commit", "/networks/{id}/disconnect", "/distribution/{name}/json"];
        let expected = match status {
            404 => text.contains(NOBODY) || method == "HEAD" || elsewhere.contains(&path),
            501 | 400 | 403 | 409 => true,
            // Docker Hub cannot be asked, and says so.
            500 => ["/auth", "/images/search", "/distribution/{name}/json", "/plugins/privileges"]
                .contains(&path),
            503 => of_swarm,
            other => (200..400).contains(&other),
        };
        if !in_form || !expected {
            wrong.push(format!("{method} {path}: {status} {text}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

#[test]
fn swarm_and_plugins_are_refused_as_by_a_dockerd_without_them() -> Test {
    for path in ["/swarm", "/nodes", "/services", "/tasks", "/secrets", "/configs"] {
        let answer = api()?.request("GET", path, &[], b"")?;
        assert_eq!(answer.head.status, 503, "{path}");
        assert!(answer.text().contains("This node is not a swarm manager"), "{path}: {}", answer.text());
    }
    assert_eq!(api()?.request("GET", "/plugins", &[], b"")?.json()?, serde_json::json!([]));
    Ok(())
}

#[test]
fn metrics_are_prometheus_and_count_what_happens() -> Test {
    Suite::from_env()?.docker().ok(&["run", "--rm", "busybox", "true"])?;
    let answer = api()?.request("GET", "/metrics", &[], b"")?.success()?;
    assert!(
        answer.head.header("Content-Type").is_some_and(|kind| kind.starts_with("text/plain; version=0.0.4"))
    );
    let text = answer.text();
    let value = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.and_then(|value| value.parse::<f64>().ok())
    };
    for name in [
        "engine_daemon_container_states_containers{state=\"running\"}",
        "bulkhead_sandboxes",
        "process_open_fds",
        "engine_daemon_events_subscribers_total",
    ] {
        assert!(value(name).is_some(), "{name} is not in\n{text}");
    }
    for name in [
        "bulkhead_phase_seconds_count{stage=\"started\"}",
        "engine_daemon_container_actions_seconds_count{action=\"start\"}",
        "bulkhead_api_requests_total{status=\"2xx\"}",
        "engine_daemon_events_total",
    ] {
        assert!(value(name).is_some_and(|count| count >= 1.0), "{name} is not in\n{text}");
    }
    Ok(())
}
