//! The Engine API itself, byte by byte where it matters.

mod authorization;
mod bollard;
mod operations;
mod websocket;

use bulkhead_tests::Suite;
use bulkhead_tests::http::{Client, Response};
use serde_json::{Value, json};
use std::io::{Read, Write};

/// An error fails the test, with its whole story.
type Test = anyhow::Result<()>;

fn api() -> anyhow::Result<Client> {
    Ok(Suite::from_env()?.api())
}

fn get(path: &str) -> anyhow::Result<Response> {
    api()?.request("GET", path, &[], b"")
}

/// The status, and a message in Docker's form.
fn assert_refused(answer: &Response, status: u16) -> anyhow::Result<String> {
    assert_eq!(answer.head.status, status, "{}", answer.text());
    let body = answer.json()?;
    let keys: Vec<&String> = body.as_object().map(|object| object.keys().collect()).unwrap_or_default();
    assert_eq!(keys, ["message"]);
    Ok(body["message"].as_str().unwrap_or_default().to_owned())
}

/// Removed when dropped.
struct Created(String);

impl Created {
    fn new(body: &Value) -> anyhow::Result<Created> {
        let answer = api()?.json("POST", "/v1.50/containers/create", body)?;
        assert_eq!(answer.head.status, 201, "{}", answer.text());
        Ok(Created(answer.json()?["Id"].as_str().unwrap_or_default().to_owned()))
    }

    fn path(&self, rest: &str) -> String {
        format!("/v1.50/containers/{}/{rest}", self.0)
    }
}

impl Drop for Created {
    fn drop(&mut self) {
        if let Ok(api) = api() {
            let _ = api.request("DELETE", &format!("/containers/{}?force=1&v=1", self.0), &[], b"");
        }
    }
}

#[test]
fn ping_says_ok_and_which_api_it_is() -> Test {
    for path in ["/_ping", "/v1.50/_ping", "/v1.24/_ping"] {
        let answer = get(path)?;
        assert_eq!((answer.head.status, answer.text().as_str()), (200, "OK"));
        assert_eq!(answer.head.header("Api-Version"), Some("1.50"));
        assert_eq!(answer.head.header("Ostype"), Some("linux"));
        assert!(answer.head.header("Server").is_some_and(|server| server.ends_with("(linux)")));
        assert!(answer.head.header("Cache-Control").is_some_and(|cache| cache.contains("no-cache")));
    }
    let head = api()?.request("HEAD", "/_ping", &[], b"")?;
    assert_eq!((head.head.status, head.body.len()), (200, 0));
    Ok(())
}

#[test]
fn versions_out_of_range_are_refused() -> Test {
    let message = assert_refused(&get("/v1.10/version")?, 400)?;
    assert!(message.contains("too old"), "{message}");
    let message = assert_refused(&get("/v9.99/version")?, 400)?;
    assert!(message.contains("too new"), "{message}");
    Ok(())
}

#[test]
fn unknown_paths_and_methods_are_not_found() -> Test {
    assert_eq!(assert_refused(&get("/v1.50/nothing/here")?, 404)?, "page not found");
    assert_eq!(assert_refused(&api()?.request("PUT", "/v1.50/version", &[], b"")?, 404)?, "page not found");
    Ok(())
}

#[test]
fn malformed_bodies_are_refused_and_create_nothing() -> Test {
    let before = get("/containers/json?all=1")?.json()?.as_array().map(Vec::len);
    for body in ["{", "[]", "{\"Image\": 7}", "\"text\"", "{\"Image\":\"busybox\"}{", ""] {
        let headers = [("Content-Type", "application/json")];
        let answer =
            api()?.request("POST", "/v1.50/containers/create?name=malformed", &headers, body.as_bytes())?;
        assert_refused(&answer, 400)?;
    }
    assert_refused(&get("/containers/malformed/json")?, 404)?;
    assert!(before.is_some());
    Ok(())
}

#[test]
fn unknown_things_are_not_found_by_name() -> Test {
    for (path, word) in
        [("/containers/ghost/json", "ghost"), ("/images/ghost/json", "ghost"), ("/exec/ghost/json", "ghost")]
    {
        let message = assert_refused(&get(path)?, 404)?;
        assert!(message.contains(word), "{message}");
    }
    let message =
        assert_refused(&api()?.json("POST", "/containers/create", &json!({"Image": "ghost"}))?, 404)?;
    assert!(message.contains("No such image: ghost"), "{message}");
    Ok(())
}

#[test]
fn bad_references_names_and_filters_are_400() -> Test {
    assert_refused(&api()?.request("POST", "/images/create?fromImage=Not%20Valid", &[], b"")?, 400)?;
    let create = json!({"Image": "busybox"});
    assert_refused(&api()?.json("POST", "/containers/create?name=no%2Fslash", &create)?, 400)?;
    assert_refused(&get("/containers/json?filters=%7B%22nonsense%22%3A%5B%22x%22%5D%7D")?, 400)?;
    assert_refused(&get("/containers/json?filters=%7B")?, 400)?;
    Ok(())
}

#[test]
fn a_taken_name_is_a_conflict_that_names_its_owner() -> Test {
    let name = format!("taken-{}", std::process::id());
    let path = format!("/containers/create?name={name}");
    let first = api()?.json("POST", &path, &json!({"Image": "busybox"}))?.success()?;
    let first = Created(first.json()?["Id"].as_str().unwrap_or_default().to_owned());
    let message = assert_refused(&api()?.json("POST", &path, &json!({"Image": "busybox"}))?, 409)?;
    assert!(message.contains(&name) && message.contains(&first.0), "{message}");
    Ok(())
}

#[test]
fn starting_twice_and_stopping_twice_change_nothing() -> Test {
    let container = Created::new(&json!({"Image": "busybox", "Cmd": ["sleep", "1000"]}))?;
    let post =
        |what: &str| api()?.request("POST", &container.path(what), &[], b"").map(|answer| answer.head.status);
    assert_eq!([post("start")?, post("start")?, post("stop?t=0")?, post("stop?t=0")?], [204, 304, 204, 304]);
    Ok(())
}

#[test]
fn attach_and_wait_work_before_start_and_the_stream_is_framed() -> Test {
    let container =
        Created::new(&json!({"Image": "busybox", "Cmd": ["sh", "-c", "echo out; echo err >&2; exit 3"]}))?;
    let upgrade = [("Connection", "Upgrade"), ("Upgrade", "tcp")];
    let (head, mut stream) =
        api()?.open("POST", &container.path("attach?stream=1&stdout=1&stderr=1"), &upgrade, b"")?;
    assert_eq!(head.status, 101);
    assert_eq!(head.header("Content-Type"), Some("application/vnd.docker.multiplexed-stream"));
    // Its head comes before the container ends, or this would not return.
    let (head, mut wait) = api()?.open("POST", &container.path("wait?condition=next-exit"), &[], b"")?;
    assert_eq!(head.status, 200);
    api()?.request("POST", &container.path("start"), &[], b"")?.success()?;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes)?;
    let frames = frames(&bytes);
    assert!(
        frames.contains(&(1, b"out\n".to_vec())) && frames.contains(&(2, b"err\n".to_vec())),
        "{frames:?}"
    );
    let ended: Value = serde_json::from_slice(&wait.read_body(&head)?)?;
    assert_eq!(ended["StatusCode"], 3);
    Ok(())
}

/// The CLI looks for the keys itself, and sends none: other clients leave it to the daemon.
#[test]
fn the_keys_that_leave_a_terminal_are_the_daemon_s_too_and_are_events() -> Test {
    let terminal = json!({"Image": "busybox", "Cmd": ["sh"], "Tty": true, "OpenStdin": true});
    let container = Created::new(&terminal)?;
    let upgrade = [("Connection", "Upgrade"), ("Upgrade", "tcp"), ("Content-Type", "application/json")];
    let leave = |path: &str, body: &[u8]| -> Test {
        let (head, mut stream) = api()?.open("POST", path, &upgrade, body)?;
        assert_eq!(head.status, 101);
        stream.write_all(b"echo typed\x18\x19")?;
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest)?;
        Ok(())
    };
    api()?.request("POST", &container.path("start"), &[], b"")?.success()?;
    leave(&container.path("attach?stream=1&stdin=1&stdout=1&detachKeys=ctrl-x,ctrl-y"), b"")?;
    let exec = json!({"Cmd": ["sh"], "Tty": true, "AttachStdin": true, "AttachStdout": true, "DetachKeys": "ctrl-x,ctrl-y"});
    let exec = api()?.json("POST", &container.path("exec"), &exec)?.success()?.json()?;
    leave(&format!("/exec/{}/start", exec["Id"].as_str().unwrap_or_default()), br#"{"Tty": true}"#)?;
    let inspect = api()?.request("GET", &container.path("json"), &[], b"")?.success()?.json()?;
    assert_eq!(inspect["State"]["Running"], true);
    assert_eq!(inspect["ExecIDs"], json!([exec["Id"]]));
    let mine = format!("container={}", inspect["Id"].as_str().unwrap_or_default());
    let events =
        Suite::from_env()?.docker().events(&["event=detach", "event=exec_detach", &mine], "{{.Action}}")?;
    assert_eq!(events, "detach\nexec_detach");
    Ok(())
}

fn frames(mut bytes: &[u8]) -> Vec<(u8, Vec<u8>)> {
    let mut frames = Vec::new();
    while let [kind, 0, 0, 0, a, b, c, d, rest @ ..] = bytes {
        let length = u32::from_be_bytes([*a, *b, *c, *d]) as usize;
        let (payload, after) = rest.split_at(length.min(rest.len()));
        frames.push((*kind, payload.to_vec()));
        bytes = after;
    }
    assert_eq!(bytes, b"", "bytes outside of frames");
    frames
}

#[test]
fn logs_need_a_stream_and_lists_are_never_null() -> Test {
    let container = Created::new(&json!({"Image": "busybox"}))?;
    assert_refused(&get(&container.path("logs"))?, 400)?;
    let inspect = get(&container.path("json"))?.json()?;
    for pointer in ["/Mounts", "/NetworkSettings/Ports", "/NetworkSettings/Networks"] {
        assert!(inspect.pointer(pointer).is_some_and(|value| !value.is_null()), "{pointer}: {inspect}");
    }
    assert!(inspect["Image"].as_str().is_some_and(|image| image.starts_with("sha256:")));
    Ok(())
}

#[test]
fn oversized_and_endless_requests_do_not_hurt_the_daemon() -> Test {
    let huge = format!("{{\"Image\":\"busybox\",\"Cmd\":[\"{}\"]}}", "x".repeat(20 << 20));
    let headers = [("Content-Type", "application/json")];
    let answer = api()?.request("POST", "/containers/create", &headers, huge.as_bytes());
    assert!(answer.map_or(true, |answer| (400..500).contains(&answer.head.status)));
    let long = format!("/containers/{}/json", "a".repeat(200_000));
    assert!(get(&long).map_or(true, |answer| (400..500).contains(&answer.head.status)));
    assert_eq!(get("/_ping")?.text(), "OK");
    Ok(())
}

#[test]
fn info_and_version_describe_this_daemon() -> Test {
    let version = get("/version")?.json()?;
    assert_eq!(
        (version["ApiVersion"].as_str(), version["MinAPIVersion"].as_str()),
        (Some("1.50"), Some("1.24"))
    );
    let info = get("/info")?.json()?;
    assert_eq!(info["DockerRootDir"], Suite::from_env()?.data_root);
    assert_eq!(info["OSType"], "linux");
    assert_eq!(info["Swarm"]["LocalNodeState"], "inactive");
    Ok(())
}
