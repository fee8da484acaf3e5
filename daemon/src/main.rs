//! `bulkheadd`: the process. Flags, log, pid file, engine, sockets, signals.

use std::{
    io::{IsTerminal, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use anyhow::Context;
use bulkhead_daemon::{
    api::{server, version},
    check,
    config::{Config, Options},
    data_root::DataRoot,
    engine::Engine,
    hostnet::HostNetwork,
};
use clap::Parser;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};
use tracing_subscriber::{Layer, layer::SubscriberExt, reload, util::SubscriberInitExt};

/// Serves the Docker Engine API; every container runs in a microVM of its own.
#[derive(Parser)]
#[command(name = "bulkheadd", version = version::DAEMON, args_conflicts_with_subcommands = false)]
struct Flags {
    #[command(flatten)]
    options: Options,
    /// Configuration file
    #[arg(long, value_name = "FILE", global = true)]
    config_file: Option<PathBuf>,
    /// Check the configuration and exit
    #[arg(long)]
    validate: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Say whether containers can run on this machine, and what to do if not (exit code 1)
    Check {
        /// For programs
        #[arg(long)]
        json: bool,
        /// KVM alone
        #[arg(long)]
        kvm: bool,
    },
    /// Remove the bridges and packet filter rules of this data root's networks; nothing of it may run
    PurgeNetworks,
}

fn main() -> ExitCode {
    let flags = Flags::parse();
    match run(&flags) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("bulkheadd: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(flags: &Flags) -> anyhow::Result<ExitCode> {
    let config = Config::load(&flags.options, flags.config_file.as_deref())?;
    Engine::validate(&config).map_err(|error| anyhow::anyhow!(error.message))?;
    if flags.validate {
        println!("configuration OK");
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(Command::Check { json, kvm }) = flags.command {
        let report = check::run(&config, kvm);
        let text = if json { format!("{}\n", serde_json::to_string_pretty(&report)?) } else { report.text() };
        std::io::stdout().write_all(text.as_bytes())?;
        return Ok(if report.usable { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    let (filter, filters) = reload::Layer::new(log_filter(&config));
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_target(false);
    let lines = match config.log_json {
        true => lines.json().boxed(),
        false => lines.with_ansi(std::io::stderr().is_terminal()).boxed(),
    };
    tracing_subscriber::registry().with(filter).with(lines).init();
    open_many_files();
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("bulkheadd").build()?;
    if let Some(Command::PurgeNetworks) = flags.command {
        runtime.block_on(purge_networks(&config))?;
        return Ok(ExitCode::SUCCESS);
    }
    let reread = || -> anyhow::Result<Config> {
        let config = Config::load(&flags.options, flags.config_file.as_deref())?;
        filters.reload(log_filter(&config))?;
        Ok(config)
    };
    runtime.block_on(daemon(Arc::new(config), reread))?;
    Ok(ExitCode::SUCCESS)
}

/// Raises the number of files that may be open to the most there may be: each connection, each container is some. The
/// limit that one is started with is often 1024, for programs that use select(2). VMMs set their own.
fn open_many_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, ?limit, "the limit of open files stays as it is");
    }
}

/// What is logged: our own crates at the chosen level, others only when it matters. `RUST_LOG` overrules.
fn log_filter(config: &Config) -> tracing_subscriber::EnvFilter {
    let default = format!(
        "warn,bulkhead_daemon={level},bulkhead_rootfs={level},bulkheadd={level}",
        level = config.log_level
    );
    tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| default.into())
}

/// `reread` reads the configuration anew.
async fn daemon(config: Arc<Config>, reread: impl Fn() -> anyhow::Result<Config>) -> anyhow::Result<()> {
    let mut hangup = signal(SignalKind::hangup())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    // Locked and bound first, so that a second daemon ends before it touches anything; clients wait in the
    // backlog.
    let _data_root = DataRoot::open(&config.layout)?;
    let listeners = server::bind(&config)?;
    let metrics = match &config.metrics {
        Some(address) => {
            let bound = tokio::net::TcpListener::bind(address.as_str()).await;
            Some(bound.with_context(|| format!("cannot serve metrics on {address}"))?)
        }
        None => None,
    };
    let engine = Engine::open(Arc::clone(&config)).await.context("the engine cannot be started")?;
    let _pidfile = PidFile::create(&config.pidfile)?;
    let hosts: Vec<_> = config.hosts.iter().map(ToString::to_string).collect();
    tracing::info!(version = version::DAEMON, hosts = hosts.join(" "), "API listen on");

    let (stop, stopped) = watch::channel(false);
    if let Some(listener) = metrics {
        tokio::spawn(server::serve_metrics(Arc::clone(&engine), listener, stopped.clone()));
    }
    let serving = tokio::spawn(server::serve(Arc::clone(&engine), listeners, stopped));
    notify("READY=1");
    loop {
        tokio::select! {
            _ = terminate.recv() => tracing::info!("terminated"),
            _ = interrupt.recv() => tracing::info!("interrupted"),
            _ = hangup.recv() => {
                notify("RELOADING=1");
                match reread().and_then(|config| engine.reload(&config).map_err(|e| anyhow::anyhow!(e.message))) {
                    Ok(()) => tracing::info!("the configuration was read anew"),
                    Err(error) => tracing::error!("the configuration stays as it was: {error:#}"),
                }
                notify("READY=1");
                continue;
            }
        }
        break;
    }
    notify("STOPPING=1");
    stop.send_replace(true);
    serving.await??;
    engine.close().await;
    Ok(())
}

/// For a host that is to be rid of the daemon: its networks come back with the next start.
async fn purge_networks(config: &Config) -> anyhow::Result<()> {
    let _data_root = DataRoot::open(&config.layout)?;
    let sandboxes = config.layout.sandboxes();
    if std::fs::read_dir(&sandboxes).is_ok_and(|mut entries| entries.next().is_some()) {
        anyhow::bail!("containers are still running: see {}", sandboxes.display());
    }
    let id = match std::fs::read_to_string(config.layout.daemon_id()) {
        // It never ran, so there is nothing of it.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        id => id?,
    };
    HostNetwork::new(&id, &config.layout.exec_root).purge().await?;
    Ok(())
}

/// Tells systemd how it goes, if it wants to know (sd_notify(3)).
fn notify(state: &str) {
    use std::os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixDatagram},
    };
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let address = match path.as_encoded_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(&path),
    };
    let mut text = state.to_owned();
    if state == "RELOADING=1" {
        // Type=notify-reload wants to know since when.
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        text.push_str(&format!("\nMONOTONIC_USEC={}", now.tv_sec * 1_000_000 + now.tv_nsec / 1000));
    }
    let sent = address.and_then(|address| UnixDatagram::unbound()?.send_to_addr(text.as_bytes(), &address));
    if let Err(error) = sent {
        tracing::warn!(%error, "systemd could not be told");
    }
}

/// The daemon's pid in a file, removed at the end.
struct PidFile(PathBuf);

impl PidFile {
    fn create(path: &Path) -> anyhow::Result<Self> {
        if let Some(pid) = std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<i32>().ok())
            && pid != i32::try_from(std::process::id())?
            && is_daemon(pid)
        {
            anyhow::bail!("process with PID {pid} is still running: see {}", path.display());
        }
        if let Some(directory) = path.parent() {
            std::fs::create_dir_all(directory)?;
        }
        std::fs::write(path, std::process::id().to_string())
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self(path.to_owned()))
    }
}

/// Whether a process of that number is one of ours: after a crash the number may be another's.
fn is_daemon(pid: i32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "bulkheadd")
}

impl Drop for PidFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}
