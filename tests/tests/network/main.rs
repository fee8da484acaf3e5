//! Networks: containers reach each other, the host and nothing that they must not. With the real docker CLI.

mod compose;
mod daemon;
mod egress;
mod joins;
mod names;
mod ports;
mod reach;
mod refusals;
mod spoof;
mod transfer;

use bulkhead_tests::{Docker, Host, Suite};

/// An error fails the test, with its whole story.
type Test = anyhow::Result<()>;

fn docker() -> anyhow::Result<Docker> {
    Ok(Suite::from_env()?.docker())
}

fn host() -> anyhow::Result<Host> {
    Host::from_env()
}

/// A network that is removed when dropped.
struct Network {
    docker: Docker,
    name: String,
}

impl Network {
    fn create(docker: &Docker, arguments: &[&str]) -> anyhow::Result<Self> {
        let name = unique("net");
        docker.ok(&[&["network", "create"], arguments, &[&name]].concat())?;
        Ok(Self { docker: docker.clone(), name })
    }

    fn inspect(&self, template: &str) -> anyhow::Result<String> {
        self.docker.ok(&["network", "inspect", "--format", template, &self.name])
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let _ = self.docker.run(&["network", "rm", &self.name]);
    }
}

/// The end of a program in the host, which ends with this.
struct Background(Host, String);

impl Background {
    /// Runs a script until this is dropped. It has a directory of its own, which this gives.
    fn start(script: &str) -> anyhow::Result<(Self, String)> {
        let host = host()?;
        let directory = host.sh("mktemp -d", &[])?;
        let wrapped = format!("cd \"$1\"; (setsid sh -c '{script}') >out 2>&1 & echo $! >pid");
        host.sh(&wrapped, &[&directory])?;
        Ok((Self(host, directory.clone()), directory))
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        let _ = self.0.sh(
            "kill -- -$(ps -o pgid= -p $(cat \"$1/pid\") | tr -d ' ') 2>/dev/null || kill $(cat \"$1/pid\")",
            &[&self.1],
        );
    }
}

fn unique(kind: &str) -> String {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("{kind}-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// A workload that serves a page with this text on port 80.
fn server(text: &str) -> Vec<String> {
    let script = format!("mkdir /www; echo {text} >/www/index.html; exec httpd -f -p 80 -h /www");
    ["busybox", "sh", "-c", &script].map(str::to_owned).to_vec()
}

/// Starts a container that serves a page.
fn serve(docker: &Docker, options: &[&str], text: &str) -> anyhow::Result<bulkhead_tests::docker::Container> {
    let server = server(text);
    let words: Vec<&str> = options.iter().copied().chain(server.iter().map(String::as_str)).collect();
    let container = docker.run_detached(&words)?;
    let script = "while ! wget -qO- http://127.0.0.1 >/dev/null 2>&1; do sleep 0.1; done";
    container.exec(&["sh", "-c", script])?;
    Ok(container)
}
