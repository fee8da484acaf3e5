//! Real Compose, of both kinds, with a stack of three services that find each other by name.
//!
//! ```text
//!   host ─▶ published port ─▶ web ─(backend)─▶ app ─(database)─▶ store, which keeps its value in a tmpfs
//!                             front            front, back       back, which is internal
//! ```

use std::{fs, process::Command};

use anyhow::{Context, bail};
use bulkhead_tests::Suite;

use crate::{Test, docker, host, unique};

/// Each service's page asks the next service. What is a `$` to the shell is `$$` to Compose.
const STACK: &str = r#"
services:
  web:
    image: busybox
    command: [sh, -c, "mkdir -p /www/cgi-bin; printf '#!/bin/sh\\necho; echo web; wget -qO- http://backend:8080/cgi-bin/page' >/www/cgi-bin/page; chmod +x /www/cgi-bin/page; exec httpd -f -p 80 -h /www"]
    ports: ["80"]
    depends_on: [app]
    networks: [front]
  app:
    image: busybox
    command: [sh, -c, "mkdir -p /www/cgi-bin; printf '#!/bin/sh\\necho; echo app; wget -qO- http://database/value' >/www/cgi-bin/page; chmod +x /www/cgi-bin/page; exec httpd -f -p 8080 -h /www"]
    depends_on: {store: {condition: service_healthy}}
    networks:
      front: {aliases: [backend]}
      back: {}
  store:
    image: busybox
    command: [sh, -c, "echo $$VALUE >/data/value; exec httpd -f -p 80 -h /data"]
    environment: {VALUE: kept}
    tmpfs: [/data]
    healthcheck: {test: [CMD, wget, -qO-, "http://127.0.0.1/value"], interval: 2s, timeout: 60s, retries: 30}
    networks:
      back: {aliases: [database]}
networks:
  front: {}
  back: {internal: true}
"#;

/// A project of the stack; taken down when dropped.
struct Project {
    program: &'static str,
    name: String,
    directory: tempfile::TempDir,
    socket: String,
}

impl Project {
    fn new(program: &'static str) -> anyhow::Result<Self> {
        let directory = tempfile::tempdir()?;
        fs::write(directory.path().join("docker-compose.yml"), STACK)?;
        let socket = Suite::from_env()?.docker_socket;
        Ok(Self { program, name: unique("stack"), directory, socket })
    }

    fn run(&self, words: &[&str]) -> anyhow::Result<String> {
        let mut command = Command::new(self.program);
        command.args(["-p", &self.name]).args(words).current_dir(self.directory.path());
        command.env("DOCKER_HOST", format!("unix://{}", self.socket)).env("DOCKER_CONFIG", "/nonexistent");
        // A start takes an emulated host long.
        command.env("COMPOSE_HTTP_TIMEOUT", "280").env_remove("DOCKER_CONTEXT");
        let output = command.output().with_context(|| self.program)?;
        if !output.status.success() {
            bail!("{} {words:?}: {}", self.program, String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
    }
}

impl Drop for Project {
    fn drop(&mut self) {
        let _ = self.run(&["down", "-v", "-t", "0"]);
    }
}

fn brings_a_stack_up_and_down(program: &'static str) -> Test {
    let docker = docker()?;
    let project = Project::new(program)?;
    project.run(&["up", "-d"])?;
    let published = project.run(&["port", "web", "80"])?;
    let port = published.rsplit(':').next().context("a port")?.to_owned();
    let script = "for i in $(seq 100); do curl -sf \"http://127.0.0.1:$1/cgi-bin/page\" && exit; sleep 0.2; done; exit 1";
    assert_eq!(host()?.sh(script, &[&port])?, "web\napp\nkept");
    // A service is found by its own name, too; and what is internal is out of the reach of what is not in it.
    assert_eq!(project.run(&["exec", "-T", "app", "wget", "-qO-", "http://store/value"])?, "kept");
    let found = project.run(&["exec", "-T", "web", "sh", "-c", "ping -c 1 store || echo unknown"])?;
    assert_eq!(found.lines().last(), Some("unknown"));
    assert_eq!(project.run(&["ps", "-q"])?.lines().count(), 3);
    let label = format!("label=com.docker.compose.project={}", project.name);
    let of_project = |what: &[&str]| docker.ok(&[what, &["-q", "--filter", &label]].concat());
    assert_eq!(of_project(&["network", "ls"])?.lines().count(), 2);
    project.run(&["down", "-v", "-t", "0"])?;
    assert_eq!(of_project(&["ps", "-a"])?, "");
    assert_eq!(of_project(&["network", "ls"])?, "");
    host()?.sh("! nc -z 127.0.0.1 \"$1\"", &[&port])?;
    Ok(())
}

#[test]
fn compose_1_29_brings_a_stack_up_and_down() -> Test {
    brings_a_stack_up_and_down("docker-compose")
}

#[test]
fn compose_5_6_brings_a_stack_up_and_down() -> Test {
    brings_a_stack_up_and_down("docker-compose-5")
}
