//! bulkheadd with directories of its own.

use std::env;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::docker::Docker;
use crate::host::{Forward, Host, Scratch};
use crate::http::Client;
use crate::registry::spawn_logged;

/// Names the directory of the built programs in the environment of tests.
pub const BUNDLE_VARIABLE: &str = "BULKHEAD_BUNDLE";

/// How a daemon is started.
#[derive(Debug, Clone, Default)]
pub struct DaemonOptions {
    /// A registry in the host that stands for Docker Hub and needs no TLS.
    pub registry: Option<String>,
    /// More arguments.
    pub arguments: Vec<String>,
    /// A command that runs the daemon, e.g. in a mount namespace of its own.
    pub wrapper: Vec<String>,
    /// Another VMM than the bundle's.
    pub vmm: Option<String>,
    /// Puts the data root on a file system of this many MiB.
    pub data_limit_mib: Option<u32>,
    /// The guest kernel. Default: the bundle's.
    pub kernel: Option<PathBuf>,
}

/// A daemon that runs while this lives, and, dropped or not, leaves nothing behind.
#[derive(Debug)]
pub struct Daemon {
    host: Host,
    options: DaemonOptions,
    bundle: PathBuf,
    scratch: Scratch,
    exec_root: String,
    forward: Forward,
    process: Option<Child>,
    /// Its end ends the thread that waits for a test which hangs.
    _alive: mpsc::Sender<()>,
}

/// After so long, a little before the runner ends a test, the test's output gets the daemon's log.
const HANGS_AFTER: Duration = Duration::from_secs(570);

impl Daemon {
    /// Starts one and waits until it answers.
    ///
    /// # Errors
    /// When it does not, with its log.
    pub fn start(host: &Host, options: DaemonOptions) -> Result<Daemon> {
        let bundle =
            env::var_os(BUNDLE_VARIABLE).context("no directory of built programs: `cargo xtask test e2e`")?;
        Daemon::start_from(host, Path::new(&bundle), options)
    }

    /// Starts the one of the bundle directory.
    ///
    /// # Errors
    /// When it does not answer, with its log.
    pub fn start_from(host: &Host, bundle: &Path, options: DaemonOptions) -> Result<Daemon> {
        let scratch = host.scratch()?;
        let exec_root = host.sh("mktemp -d /run/bulkhead-XXXXXX", &[])?;
        host.sh("mkdir \"$1\"", &[&scratch.join("data")])?;
        if let Some(limit) = options.data_limit_mib {
            host.sh(
                "mount -t tmpfs -o \"size=$2m\" tmpfs \"$1\"",
                &[&scratch.join("data"), &limit.to_string()],
            )?;
        }
        let forward = host.forward(&format!("{exec_root}/d.sock"))?;
        let bundle = bundle.to_owned();
        let (alive, over) = mpsc::channel();
        let (host, process) = (host.clone(), None);
        let mut daemon =
            Daemon { host, options, bundle, scratch, exec_root, forward, process, _alive: alive };
        if env::var_os("NEXTEST").is_some() {
            tell_of_a_hang(daemon.host.clone(), daemon.log_path(), over);
        }
        daemon.start_again()?;
        Ok(daemon)
    }

    /// Starts it on the directories of before, after [`Daemon::kill`] or [`Daemon::stop`].
    ///
    /// # Errors
    /// When it does not answer, with its log.
    pub fn start_again(&mut self) -> Result<()> {
        let mut words = self.options.wrapper.clone();
        words.push(self.bundle.join("bulkheadd").display().to_string());
        let file = |name: &str| self.bundle.join(name).display().to_string();
        words.extend(["--data-root".into(), self.data_root(), "--exec-root".into(), self.exec_root.clone()]);
        words.extend([
            "--host".into(),
            format!("unix://{}/d.sock", self.exec_root),
            "--pidfile".into(),
            self.pidfile(),
        ]);
        let kernel = self.options.kernel.as_ref();
        let kernel = kernel.map_or_else(|| file("vmlinux"), |kernel| kernel.display().to_string());
        let vmm = self.options.vmm.clone().unwrap_or_else(|| file("bulkhead-vmm"));
        words.extend(["--vmm".into(), vmm, "--kernel".into(), kernel]);
        words.extend(["--initramfs".into(), file("initramfs.cpio"), "--debug".into()]);
        if let Some(registry) = &self.options.registry {
            words.extend(["--registry-mirror".into(), format!("http://{registry}")]);
            words.extend(["--insecure-registry".into(), registry.clone()]);
        }
        words.extend(self.options.arguments.iter().cloned());
        let (program, arguments) = words.split_first().context("no program")?;
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let mut process = spawn_logged(&self.host, &self.log_path(), program, &arguments)?;
        let answers = self.wait_until_it_answers(&mut process);
        self.process = Some(process);
        answers
    }

    /// Stops it and starts it again with another guest kernel. Containers that run go on with theirs.
    ///
    /// # Errors
    /// When it does not end, or does not answer again, with its log.
    pub fn change_kernel(&mut self, kernel: &Path) -> Result<()> {
        self.stop()?;
        self.options.kernel = Some(kernel.to_owned());
        self.start_again()
    }

    /// Its resident memory in KiB.
    ///
    /// # Errors
    /// When it does not run.
    pub fn memory_kib(&self) -> Result<u64> {
        let script = "grep VmRSS \"/proc/$(cat \"$1\")/status\" | tr -dc 0-9";
        Ok(self.host.sh(script, &[&self.pidfile()])?.parse()?)
    }

    /// The CLI here.
    #[must_use]
    pub fn docker(&self) -> Docker {
        Docker::new(self.forward.address())
    }

    /// Its API.
    #[must_use]
    pub fn api(&self) -> Client {
        Client::new(self.forward.address())
    }

    /// Its socket here.
    #[must_use]
    pub fn socket(&self) -> &str {
        self.forward.address()
    }

    /// Its socket in the host.
    #[must_use]
    pub fn inner_socket(&self) -> String {
        format!("{}/d.sock", self.exec_root)
    }

    /// Its exec root, in the host.
    #[must_use]
    pub fn exec_root(&self) -> &str {
        &self.exec_root
    }

    /// Its data root, in the host.
    #[must_use]
    pub fn data_root(&self) -> String {
        self.scratch.join("data")
    }

    /// Its log so far.
    ///
    /// # Errors
    /// When the host is gone.
    pub fn log(&self) -> Result<String> {
        self.host.sh("cat \"$1\"", &[&self.log_path()])
    }

    fn log_tail(&self) -> String {
        let log = self.log().unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        let tail = lines.get(lines.len().saturating_sub(60)..).unwrap_or_default();
        format!("--- end of the daemon's log\n{}", tail.join("\n"))
    }

    /// SIGKILL: what runs in microVMs goes on.
    ///
    /// # Errors
    /// When it had ended before.
    pub fn kill(&mut self) -> Result<()> {
        self.signal("KILL")?;
        self.wait()
    }

    /// SIGTERM, and its end.
    ///
    /// # Errors
    /// When it had ended before.
    pub fn stop(&mut self) -> Result<()> {
        self.signal("TERM")?;
        self.wait()
    }

    /// Waits until a template is ready, and gives the number of those that were ever.
    ///
    /// # Errors
    /// When none was made.
    pub fn await_template(&self, count: usize) -> Result<()> {
        let arguments = ["events", "--since", "1", "--filter", "type=daemon", "--filter", "event=template"];
        let format =
            ["--format", "{{index .Actor.Attributes \"status\"}} {{index .Actor.Attributes \"error\"}}"];
        let mut events = self.docker().spawn(&[&arguments[..], &format].concat())?;
        let lines = BufReader::new(events.stdout.take().context("stdout")?).lines();
        let mut built = 0;
        for line in lines {
            let line = line?;
            if line.starts_with("built") {
                built += 1;
            } else if line.starts_with("failed") {
                bail!("a template: {line}");
            }
            if built == count {
                break;
            }
        }
        events.kill()?;
        events.wait()?;
        Ok(())
    }

    /// How many of the daemon's latest runs went on from a saved machine, and how many there were.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn restored_runs(&self) -> Result<(usize, usize)> {
        let answer = self.api().request("GET", "/bulkhead/phases", &[], b"")?.success()?.json()?;
        let timelines = answer.as_array().context("no list")?;
        let runs: Vec<_> = timelines.iter().filter(|timeline| timeline["Kind"] == "run").collect();
        let restored = |timeline: &&&serde_json::Value| {
            let steps = timeline["Steps"].as_array();
            steps.is_some_and(|steps| steps.iter().any(|step| step["Stage"] == "restored"))
        };
        Ok((runs.iter().filter(restored).count(), runs.len()))
    }

    /// What is left of containers: VMM processes, sandbox and container directories, unfinished downloads. Each a
    /// line.
    ///
    /// # Errors
    /// When the host is gone.
    pub fn leftovers(&self) -> Result<String> {
        let script = r#"
            for p in $(ls -l /proc/[0-9]*/exe 2>/dev/null | sed -n 's|.* /proc/\([0-9]*\)/exe -> .*/[a-z]*-vmm.*|\1|p'); do
              if ls -l "/proc/$p/fd" 2>/dev/null | grep -qF "$1/"; then echo "process $p"; fi
            done
            for d in "$1"/s "$1"/u "$2"/containers "$2"/tmp; do
              [ -d "$d" ] || continue
              find "$d" -mindepth 1 -maxdepth 1
            done"#;
        self.host.sh(script, &[&self.exec_root, &self.data_root()])
    }

    /// [`Daemon::leftovers`], once a template that is being made is made.
    ///
    /// # Errors
    /// When the host is gone.
    pub fn settled_leftovers(&self) -> Result<String> {
        let deadline = Instant::now() + Duration::from_secs(120);
        loop {
            let left = self.leftovers()?;
            if left.is_empty() || Instant::now() > deadline {
                return Ok(left);
            }
            thread::sleep(Duration::from_millis(200));
        }
    }

    fn wait_until_it_answers(&self, process: &mut Child) -> Result<()> {
        loop {
            if self.api().request("GET", "/_ping", &[], b"").is_ok_and(|answer| answer.head.status == 200) {
                return Ok(());
            }
            if let Some(status) = process.try_wait()? {
                bail!("bulkheadd ended: {status}\n{}", self.log().unwrap_or_default());
            }
            thread::sleep(Duration::from_millis(50));
        }
    }

    fn signal(&self, name: &str) -> Result<()> {
        self.host.sh("kill -s \"$1\" \"$(cat \"$2\")\"", &[name, &self.pidfile()]).map(drop)
    }

    fn wait(&mut self) -> Result<()> {
        self.process.take().context("the daemon does not run")?.wait()?;
        Ok(())
    }

    fn pidfile(&self) -> String {
        format!("{}/d.pid", self.exec_root)
    }

    fn log_path(&self) -> String {
        self.scratch.join("log")
    }
}

/// Prints the end of the daemon's log if the test is not over in time: the runner then ends it without a word.
fn tell_of_a_hang(host: Host, log: String, over: mpsc::Receiver<()>) {
    thread::spawn(move || {
        if over.recv_timeout(HANGS_AFTER) == Err(mpsc::RecvTimeoutError::Timeout) {
            let tail = host.sh("date; uptime; tail -n 150 \"$1\"", &[&log]);
            println!("--- the test is not over yet; its daemon's log:\n{}", tail.unwrap_or_default());
        }
    });
}

/// Runs a test with a daemon of its own; an error comes with the end of the daemon's log, and a success must leave
/// nothing behind.
///
/// # Errors
/// The test's, or what is left.
pub fn with_daemon(options: DaemonOptions, test: impl FnOnce(&mut Daemon) -> Result<()>) -> Result<()> {
    let mut daemon = Daemon::start(&Host::from_env()?, options)?;
    if let Err(error) = test(&mut daemon) {
        return Err(error.context(daemon.log_tail()));
    }
    let left = daemon.settled_leftovers()?;
    if !left.is_empty() {
        bail!("left behind:\n{left}\n{}", daemon.log_tail());
    }
    Ok(())
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("{}", self.log_tail());
        }
        if let Some(mut process) = self.process.take() {
            let _ = self.signal("KILL");
            let _ = process.kill();
            let _ = process.wait();
        }
        let kill_all = r#"
            for p in $(ls -l /proc/[0-9]*/exe 2>/dev/null | sed -n 's|.* /proc/\([0-9]*\)/exe -> .*/[a-z]*-vmm.*|\1|p'); do
              if ls -l "/proc/$p/fd" 2>/dev/null | grep -qF "$1/"; then kill -9 "$p"; fi
            done
            rm -rf "$1"
            "$2" --data-root "$3" --exec-root "$1" purge-networks
            rm -rf "$1""#;
        let program = self.bundle.join("bulkheadd").display().to_string();
        let _ = self.host.sh(kill_all, &[&self.exec_root, &program, &self.data_root()]);
    }
}
