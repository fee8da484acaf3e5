//! The test host: real KVM guests on a machine whose KVM cannot boot Linux.
//!
//! ```text
//!  outer machine                               test host (QEMU, software CPU with AMD SVM)
//!   cargo xtask host exec ──┐ TCP on loopback   PID 1 (init.rs): overlay over the outer `/`, reaps
//!   docker → forward ───────┴──────────────────▶ command server (serve.rs): exec, connect, power off
//!   target/host/NAME/: state, token, logs         /dev/kvm, target/ shared and writable
//! ```

mod affinity;
mod client;
mod clock;
mod forward;
pub(crate) mod init;
mod network;
mod qemu;
mod relay;
pub(crate) mod serve;
mod state;
mod wire;

use std::env;
use std::ffi::OsString;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};

use self::client::Client;
use self::forward::Forward;
use self::qemu::Machine;
use self::state::{Process, Started, StateDir};
use self::wire::{Address, Exec};
use crate::kernel;
use crate::tree::Tree;

/// Names the test host's kernel where `--kernel` does not.
const KERNEL_VARIABLE: &str = "BULKHEAD_TESTHOST_KERNEL";

#[derive(Args)]
pub(crate) struct HostArgs {
    /// Which test host: several can be up at once.
    #[arg(long, global = true, default_value = "main", value_name = "NAME")]
    name: String,
    #[command(subcommand)]
    command: HostCommand,
}

#[derive(Subcommand)]
enum HostCommand {
    /// Start the test host, unless it is up.
    Up(MachineArgs),
    /// Run a program in it, starting it first if needed. Stdin, stdout, stderr, directory, environment and
    /// exit code are those of a program run here.
    Exec(ExecArgs),
    /// Run one program in a test host of its own, and stop that.
    Run {
        #[command(flatten)]
        machine: MachineArgs,
        #[command(flatten)]
        exec: ExecArgs,
    },
    /// Make a socket of the test host reachable here, until interrupted.
    Forward(ForwardArgs),
    /// Say whether it is up, and with what.
    Status,
    /// Stop the test host.
    Down,
}

#[derive(Args)]
struct MachineArgs {
    /// The kernel (also $BULKHEAD_TESTHOST_KERNEL). Default: what `cargo xtask kernel testhost` built.
    #[arg(long, value_name = "VMLINUX")]
    kernel: Option<PathBuf>,
    /// Memory in MiB.
    #[arg(long, default_value_t = 4096, value_name = "MIB")]
    memory: u32,
    /// CPUs. More than one is less reliable under emulation.
    #[arg(long, default_value_t = 1, value_name = "N")]
    cpus: u32,
    /// A disk for data roots, in GiB; without it they lie in memory.
    #[arg(long, default_value_t = 0, value_name = "GIB")]
    disk: u32,
}

#[derive(Args)]
struct ExecArgs {
    /// Give the program a terminal.
    #[arg(short, long)]
    tty: bool,
    /// The directory to run it in. Default: this one.
    #[arg(long, value_name = "DIR")]
    cwd: Option<PathBuf>,
    /// Set a variable beside the ones of this environment.
    #[arg(short, long = "env", value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// The program and its arguments.
    #[arg(last = true, required = true, value_name = "CMD")]
    argv: Vec<OsString>,
}

#[derive(Args)]
struct ForwardArgs {
    /// Where to listen outside: a path, or ADDRESS:PORT.
    #[arg(long, value_name = "SOCKET")]
    listen: Address,
    /// What to connect to inside: a path, or ADDRESS:PORT.
    #[arg(long, value_name = "SOCKET")]
    to: Address,
    /// Return once it listens; the forward then ends with the test host.
    #[arg(long)]
    background: bool,
}

pub(crate) fn run(tree: &Tree, args: HostArgs) -> Result<ExitCode> {
    let dir = |name: &str| StateDir::new(&tree.target(), name);
    match args.command {
        HostCommand::Up(machine) => {
            up(tree, &dir(&args.name)?, &machine)?;
            Ok(ExitCode::SUCCESS)
        }
        HostCommand::Exec(exec) => {
            let dir = dir(&args.name)?;
            let client = match Client::of(&dir) {
                Ok(client) if dir.started().is_some_and(|started| started.qemu.is_alive()) => client,
                _ => up(tree, &dir, &MachineArgs::default())?,
            };
            client.exec(exec.resolve()?)
        }
        HostCommand::Run { machine, exec } => {
            let dir = dir(&format!("run-{}", std::process::id()))?;
            let outcome = up(tree, &dir, &machine).and_then(|client| client.exec(exec.resolve()?));
            let stopped = down(&dir);
            dir.remove();
            stopped.and(outcome)
        }
        HostCommand::Forward(args_of_forward) => forward(&dir(&args.name)?, args_of_forward),
        HostCommand::Status => Ok(status(&dir(&args.name)?)),
        HostCommand::Down => down(&dir(&args.name)?).map(|()| ExitCode::SUCCESS),
    }
}

impl Default for MachineArgs {
    fn default() -> Self {
        MachineArgs { kernel: None, memory: 4096, cpus: 1, disk: 0 }
    }
}

impl MachineArgs {
    fn resolve(&self, tree: &Tree) -> Result<Machine> {
        let kernel = match self.kernel.clone().or_else(|| env::var_os(KERNEL_VARIABLE).map(PathBuf::from)) {
            Some(kernel) => kernel,
            None => kernel::cached(tree, kernel::Set::Testhost)?,
        };
        let kernel = kernel.canonicalize().with_context(|| {
            format!("test host kernel {} (`cargo xtask kernel testhost` builds it)", kernel.display())
        })?;
        if self.cpus == 0 || self.memory < 512 {
            bail!("a test host needs a CPU and 512 MiB");
        }
        Ok(Machine { kernel, memory_mib: self.memory, cpus: self.cpus, disk_gib: self.disk })
    }
}

impl ExecArgs {
    fn resolve(self) -> Result<Exec> {
        let mut env: Vec<(OsString, OsString)> = env::vars_os().collect();
        for variable in &self.env {
            let (name, value) =
                variable.split_once('=').with_context(|| format!("--env {variable}: NAME=VALUE"))?;
            env.retain(|(known, _)| known != name);
            env.push((name.into(), value.into()));
        }
        Ok(Exec {
            argv: self.argv,
            env,
            cwd: match self.cwd {
                Some(dir) => dir,
                None => env::current_dir()?,
            },
            tty: self.tty.then(client::terminal_size),
        })
    }
}

/// A test host that another chore started for itself; stopped when dropped.
pub(crate) struct Running {
    dir: StateDir,
}

/// What a chore's test host has.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Equipment {
    pub(crate) memory_mib: u32,
    /// For data roots; 0: they lie in memory.
    pub(crate) disk_gib: u32,
}

/// Starts a test host, in place of one of this name that an earlier, broken off chore may have left.
pub(crate) fn start(tree: &Tree, name: &str, equipment: Equipment) -> Result<Running> {
    let dir = StateDir::new(&tree.target(), name)?;
    down(&dir)?;
    let Equipment { memory_mib, disk_gib } = equipment;
    up(tree, &dir, &MachineArgs { memory: memory_mib, disk: disk_gib, ..MachineArgs::default() })?;
    Ok(Running { dir })
}

impl Running {
    /// What its console has shown.
    pub(crate) fn console(&self) -> String {
        let text = std::fs::read(self.dir.console()).unwrap_or_default();
        String::from_utf8_lossy(&text).into_owned()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Err(error) = down(&self.dir) {
            eprintln!("xtask: stop the test host: {error:#}");
        }
    }
}

/// The test host of `dir`, started if it is not up. One that is up stays as it is.
fn up(tree: &Tree, dir: &StateDir, machine: &MachineArgs) -> Result<Client> {
    let _lock = dir.lock()?;
    if let Some(started) = dir.started() {
        if started.qemu.is_alive() && started.wire_version == wire::VERSION {
            let client = Client::of(dir)?;
            if client.ping().is_ok() {
                return Ok(client);
            }
            eprintln!("xtask: the test host no longer answers; starting it anew");
        }
        end(dir, &started);
    }
    let machine = machine.resolve(tree)?;
    dir.create_token()?;
    let (mut qemu, port) = qemu::boot(&machine, &tree.target(), dir)?;
    let started = Process::of(i32::try_from(qemu.id())?)
        .map(|qemu| Started { qemu, port, wire_version: wire::VERSION, machine })
        .and_then(|started| dir.save(&started).map(|()| started));
    if let Err(error) = started {
        let _ = qemu.kill();
        return Err(error);
    }
    let client = Client::of(dir)?;
    client.ping()?;
    Ok(client)
}

fn down(dir: &StateDir) -> Result<()> {
    let _lock = dir.lock()?;
    if let Some(started) = dir.started() {
        if started.qemu.is_alive() && Client::of(dir).and_then(|client| client.power_off()).is_ok() {
            started.qemu.wait();
        }
        end(dir, &started);
    }
    Ok(())
}

/// Ends what is left of a test host.
fn end(dir: &StateDir, started: &Started) {
    started.qemu.kill();
    dir.forwards().into_iter().for_each(Process::kill);
    dir.clear();
}

fn status(dir: &StateDir) -> ExitCode {
    match dir.started() {
        Some(started) if started.qemu.is_alive() => {
            let Machine { kernel, memory_mib, cpus, .. } = &started.machine;
            println!(
                "up: {cpus} CPU, {memory_mib} MiB, kernel {}, process {}",
                kernel.display(),
                started.qemu.pid
            );
            println!("console: {}", dir.console().display());
            ExitCode::SUCCESS
        }
        _ => {
            println!("down");
            ExitCode::FAILURE
        }
    }
}

fn forward(dir: &StateDir, args: ForwardArgs) -> Result<ExitCode> {
    let client = Client::of(dir)?;
    client.ping()?;
    if args.background {
        return forward_in_background(dir, &args);
    }
    let forward = Forward::bind(&args.listen, args.to)?;
    // Whoever started this reads one line to know that it can connect.
    println!("listening on {}", args.listen);
    std::io::stdout().flush()?;
    forward.serve(&client)?;
    Ok(ExitCode::SUCCESS)
}

/// Runs the same command in the foreground of a session of its own, and waits for its first line.
fn forward_in_background(dir: &StateDir, args: &ForwardArgs) -> Result<ExitCode> {
    let name = dir.path().file_name().context("state directory without a name")?;
    let tree = dir.path().ancestors().nth(3).context("state directory outside a work tree")?;
    let mut command = Command::new(env::current_exe()?);
    command.arg("--tree").arg(tree).args(["host", "--name"]).arg(name);
    command.args(["forward", "--listen", &args.listen.to_string(), "--to", &args.to.to_string()]);
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    // SAFETY: setsid is one system call; it neither allocates nor locks.
    unsafe {
        command.pre_exec(|| Ok(rustix::process::setsid().map(|_| ())?));
    }
    let mut child = command.spawn()?;
    let mut line = String::new();
    if let Some(stdout) = child.stdout.take() {
        std::io::BufRead::read_line(&mut std::io::BufReader::new(stdout), &mut line)?;
    }
    if line.is_empty() {
        bail!("the forward did not start: {}", child.wait()?);
    }
    let _lock = dir.lock()?;
    let mut forwards: Vec<Process> =
        dir.forwards().into_iter().filter(|process| process.is_alive()).collect();
    forwards.push(Process::of(i32::try_from(child.id())?)?);
    dir.save_forwards(&forwards)?;
    Ok(ExitCode::SUCCESS)
}
