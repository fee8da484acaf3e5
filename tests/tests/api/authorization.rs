//! Authorization plugins: one that the test has written, asked by a real daemon for a real client.

use anyhow::{Context, ensure};
use bulkhead_tests::{Daemon, DaemonOptions, Host, Suite, host::Scratch, with_daemon};
use serde_json::json;

use crate::Test;

/// Lets nobody create privileged containers, nor see images when there is one of the name `hidden`.
const PLUGIN: &str = r#"
import base64, http.server, json, os, socketserver, sys
class Plugin(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        told = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        answer = {"Allow": True}
        if self.path == "/Plugin.Activate":
            answer = {"Implements": ["authz"]}
        elif self.path == "/AuthZPlugin.AuthZReq":
            body = base64.b64decode(told.get("RequestBody", ""))
            if "/containers/create" in told["RequestUri"] and json.loads(body or b"{}").get("HostConfig", {}).get("Privileged"):
                answer = {"Allow": False, "Msg": "no privileged containers"}
        elif "/images/json" in told["RequestUri"] and b"hidden" in base64.b64decode(told.get("ResponseBody", "")):
            answer = {"Allow": False, "Msg": "status %d is not for you" % told["ResponseStatusCode"]}
        text = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
    def log_message(self, *_):
        pass
    def address_string(self):
        return "daemon"
class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
os.makedirs(os.path.dirname(sys.argv[1]), exist_ok=True)
Server(sys.argv[1], Plugin).serve_forever()
"#;

/// The plugin, while it runs.
struct Plugin {
    host: Host,
    scratch: Scratch,
    name: String,
}

impl Plugin {
    fn start() -> anyhow::Result<Plugin> {
        let host = Host::from_env()?;
        let plugin = Plugin { scratch: host.scratch()?, host, name: format!("judge-{}", std::process::id()) };
        let script = "python3 -c \"$1\" \"$2\" >/dev/null 2>&1 & echo $! >\"$3\"; until [ -S \"$2\" ]; do sleep 0.1; done";
        plugin.host.sh(script, &[PLUGIN, &plugin.socket(), &plugin.scratch.join("pid")])?;
        Ok(plugin)
    }

    fn socket(&self) -> String {
        format!("/run/docker/plugins/{}.sock", self.name)
    }
}

impl Drop for Plugin {
    fn drop(&mut self) {
        let end = "kill \"$(cat \"$1\")\"; rm -f \"$2\"";
        let _ = self.host.sh(end, &[&self.scratch.join("pid"), &self.socket()]);
    }
}

#[test]
fn what_a_plugin_forbids_is_not_done_and_without_its_word_nothing_is() -> Test {
    let plugin = Plugin::start()?;
    let options = DaemonOptions {
        arguments: vec![format!("--authorization-plugin={}", plugin.name)],
        ..Suite::from_env()?.daemon_options()
    };
    with_daemon(options, |daemon| {
        judged(daemon, &plugin.name)?;
        // While it is away nobody is let in; when it is back, all goes on.
        let away = format!("{}.away", plugin.socket());
        plugin.host.sh("mv \"$1\" \"$2\"", &[&plugin.socket(), &away])?;
        let refused = daemon.api().request("GET", "/containers/json", &[], b"")?;
        ensure!(refused.head.status == 500, "{}", refused.text());
        let expected = format!("plugin {} failed with error: plugin not found", plugin.name);
        ensure!(refused.text().contains(&expected), "{}", refused.text());
        plugin.host.sh("mv \"$2\" \"$1\"", &[&plugin.socket(), &away])?;
        ensure!(daemon.docker().ok(&["ps", "-aq"])?.is_empty());
        Ok(())
    })
}

fn judged(daemon: &Daemon, name: &str) -> Test {
    let docker = daemon.docker();
    docker.ok(&["pull", "-q", "busybox"])?;
    ensure!(docker.ok(&["info", "--format", "{{json .Plugins.Authorization}}"])? == format!("[\"{name}\"]"));
    ensure!(docker.ok(&["run", "--rm", "busybox", "echo", "as ever"])? == "as ever");
    let denied = docker.run(&["run", "--rm", "--privileged", "busybox", "true"])?;
    let expected = format!("authorization denied by plugin {name}: no privileged containers");
    ensure!(denied.code == 125 && denied.stderr.contains(&expected), "{}", denied.stderr);

    // A body is told however its kind is written, and whole or not at all.
    let api = daemon.api();
    let create =
        |body: &[u8], kind: &str| api.request("POST", "/containers/create", &[("Content-Type", kind)], body);
    let privileged = json!({"Image": "busybox", "HostConfig": {"Privileged": true}}).to_string();
    let answer = create(privileged.as_bytes(), "Application/JSON; charset=utf-8")?;
    ensure!(answer.head.status == 403, "{}", answer.text());
    let answer = create(privileged.as_bytes(), "text/plain")?;
    ensure!(answer.head.status == 400, "{}", answer.text());
    for path in ["/containers//create", "/containers/create/"] {
        let headers = [("Content-Type", "application/json")];
        let answer = api.request("POST", path, &headers, privileged.as_bytes())?;
        ensure!(answer.head.status == 404, "{path}: {}", answer.text());
    }
    let long = format!("{{\"Image\": \"busybox\", \"Labels\": {{\"x\": \"{}\"}}}}", "x".repeat(17 << 20));
    let answer = create(long.as_bytes(), "application/json")?;
    ensure!(answer.text().contains("request body too large for authorization plugin"), "{}", answer.text());
    ensure!(docker.ok(&["ps", "-aq"])?.is_empty(), "something was made");

    // An answer can be kept back too.
    docker.ok(&["tag", "busybox", "hidden"])?;
    let kept = docker.run(&["images"])?;
    ensure!(kept.stderr.contains("status 200 is not for you"), "{}", kept.stderr);
    docker.ok(&["rmi", "hidden"]).map(drop).context("what is not kept back")
}
