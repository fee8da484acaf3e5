//! The real docker CLI.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use anyhow::{Context, Result, bail};

/// A CLI that talks to one daemon, with no configuration of the user's.
#[derive(Debug, Clone)]
pub struct Docker {
    socket: PathBuf,
}

/// What a command did.
#[derive(Debug, Clone)]
pub struct Output {
    /// Its exit code; -1 after a signal.
    pub code: i32,
    /// Its stdout.
    pub stdout: Vec<u8>,
    /// Its stderr.
    pub stderr: String,
}

impl Output {
    /// Stdout as text.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Stdout, trimmed, if the command succeeded.
    ///
    /// # Errors
    /// Else, with stderr.
    pub fn ok(self) -> Result<String> {
        if self.code != 0 {
            bail!("exit code {}\nstdout: {}\nstderr: {}", self.code, self.text(), self.stderr);
        }
        Ok(self.text().trim_end().to_owned())
    }
}

impl Docker {
    /// For the daemon behind the unix socket.
    #[must_use]
    pub fn new(socket: impl Into<PathBuf>) -> Docker {
        Docker { socket: socket.into() }
    }

    /// `docker ARGS`, not yet started.
    #[must_use]
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("docker");
        command.args(args);
        command.env("DOCKER_HOST", format!("unix://{}", self.socket.display()));
        command.env("DOCKER_CONFIG", "/nonexistent").env("DOCKER_CLI_HINTS", "false");
        command.env_remove("DOCKER_CONTEXT").env_remove("DOCKER_TLS_VERIFY").env_remove("DOCKER_API_VERSION");
        command
    }

    /// Runs it with an empty stdin.
    ///
    /// # Errors
    /// When there is no docker CLI. A failing command is no error.
    pub fn run(&self, args: &[&str]) -> Result<Output> {
        self.run_with(args, Vec::new())
    }

    /// Runs it with this stdin.
    ///
    /// # Errors
    /// When there is no docker CLI.
    pub fn run_with(&self, args: &[&str], stdin: Vec<u8>) -> Result<Output> {
        let mut child = self.spawn(args)?;
        let input = child.stdin.take();
        let writer = thread::spawn(move || input.map(|mut input| input.write_all(&stdin)));
        let output = child.wait_with_output()?;
        let _ = writer.join();
        Ok(Output {
            code: output.status.code().unwrap_or(-1),
            stdout: output.stdout,
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// Runs it; gives stdout, trimmed.
    ///
    /// # Errors
    /// When it fails, with stderr.
    pub fn ok(&self, args: &[&str]) -> Result<String> {
        self.run(args)?.ok().with_context(|| format!("docker {}", args.join(" ")))
    }

    /// Starts it with pipes.
    ///
    /// # Errors
    /// When there is no docker CLI.
    pub fn spawn(&self, args: &[&str]) -> Result<Child> {
        let mut command = self.command(args);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().context("start docker")
    }

    /// `docker inspect` of one thing with a Go template.
    ///
    /// # Errors
    /// When it fails.
    pub fn inspect(&self, name: &str, template: &str) -> Result<String> {
        self.ok(&["inspect", "--format", template, name])
    }

    /// What happened since the daemon began, until now by its own clock: `docker events` with these filters, each
    /// event by a Go template, a line each. The clock of the host is not always ours.
    ///
    /// # Errors
    /// When it fails.
    pub fn events(&self, filters: &[&str], format: &str) -> Result<String> {
        let now = self.ok(&["info", "--format", "{{.SystemTime}}"])?;
        let fixed = ["events", "--since", "1", "--until", &now, "--format", format];
        let filters = filters.iter().flat_map(|filter| ["--filter", filter]);
        self.ok(&fixed.into_iter().chain(filters).collect::<Vec<_>>())
    }

    /// A container of this name, removed by force when dropped.
    #[must_use]
    pub fn container(&self) -> Container {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        Container { docker: self.clone(), name: format!("t{}-{number}", std::process::id()) }
    }

    /// A container that somebody else has made, removed by force when dropped.
    #[must_use]
    pub fn adopt(&self, name: &str) -> Container {
        Container { docker: self.clone(), name: name.to_owned() }
    }

    /// `docker run -d` of the arguments, the container removed by force when dropped.
    ///
    /// # Errors
    /// When it does not start.
    pub fn run_detached(&self, args: &[&str]) -> Result<Container> {
        let container = self.container();
        let all = [&["run", "-d", "--name", &container.name], args].concat();
        self.ok(&all)?;
        Ok(container)
    }
}

/// A container's name that nobody else uses; whatever has it is removed when this is dropped.
#[derive(Debug)]
pub struct Container {
    docker: Docker,
    name: String,
}

impl Container {
    /// The name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// `docker exec` of the words in it.
    ///
    /// # Errors
    /// When it fails.
    pub fn exec(&self, words: &[&str]) -> Result<String> {
        self.docker.ok(&[&["exec", &self.name], words].concat())
    }

    /// Makes a file that the workload waits for. Detached: where the workload then ends, that ends its execs,
    /// this one maybe before its own end.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn touch(&self, path: &str) -> Result<()> {
        self.docker.ok(&["exec", "-d", &self.name, "touch", path]).map(drop)
    }

    /// Runs `docker COMMAND NAME`.
    ///
    /// # Errors
    /// When it fails.
    pub fn docker(&self, command: &[&str]) -> Result<String> {
        self.docker.ok(&[command, &[&self.name]].concat())
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let _ = self.docker.run(&["rm", "-f", "-v", &self.name]);
    }
}
