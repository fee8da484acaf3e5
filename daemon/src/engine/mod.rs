//! The engine: containers, images, execs, logs and events, as Docker's users know them. Never mentions
//! HTTP or KVM. It may use `api::types` (Docker's vocabulary as data) and `sandbox`.
//!
//! This page is the whole of what handlers may call; each method is one API operation.

pub mod container;
pub mod error;
pub mod events;
pub mod exec;
pub mod image;
pub mod logs;
pub mod spec;
pub mod store;

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::mpsc;

pub use error::{Error, ErrorKind, Result};

use crate::{api::types, config::Config};

/// Names a container in a call: full id, unambiguous prefix of an id, or name (with or without `/`).
pub type Name<'a> = &'a str;

/// A frame of container output, not yet in any wire form.
#[derive(Debug, Clone)]
pub struct Output {
    /// Where it came from.
    pub stream: logs::Stream,
    /// At most 32 KiB.
    pub bytes: Bytes,
}

/// A client's connection to a process's stdio, after `attach` or `exec start`.
pub struct Attachment {
    /// Whether the output is a terminal's (raw on the wire) or multiplexed.
    pub terminal: bool,
    /// Where the client's input goes, None if it asked for none. Bytes sent are the process's; dropping the
    /// sender after the client's half-close is its end of input (by Docker's `StdinOnce` rules).
    pub stdin: Option<mpsc::Sender<Bytes>>,
    /// What the client gets, bounded: a client that does not read holds the process's output back. It ends
    /// when the process has ended and everything was delivered.
    pub output: mpsc::Receiver<Output>,
}

/// What `attach` asks for.
#[derive(Debug, Clone, Copy, Default)]
pub struct AttachOptions {
    /// Replay the log first.
    pub logs: bool,
    /// Follow what comes.
    pub stream: bool,
    /// Send input.
    pub stdin: bool,
    /// Get stdout.
    pub stdout: bool,
    /// Get stderr.
    pub stderr: bool,
}

/// `wait`'s condition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WaitCondition {
    /// Answers at once for a container that does not run (and for a created one).
    #[default]
    NotRunning,
    /// The next exit, whatever the state now.
    NextExit,
    /// The container's removal.
    Removed,
}

/// The engine. Cheap to clone behind `Arc`; every method may be called from any task.
pub struct Engine {
    // fields are the engine's own
    config: Arc<Config>,
}

/*
Contract (names and types fixed; helpers' fields and bodies are the implementers'):

impl Engine {
    /// Loads all state below `config.data_root`, adopts running sandboxes, starts what restart policies say.
    pub async fn open(config: Arc<Config>) -> Result<Arc<Self>>;
    /// Flushes and stops its tasks; containers go on running.
    pub async fn close(&self);
    pub fn config(&self) -> &Config;
    pub fn images(&self) -> &image::ImageStore;                      // engine/image: pull, load, list, inspect, tag, remove …
    pub fn events(&self) -> &events::Events;                         // publish, subscribe(since, until, filters)

    pub async fn container_create(&self, name: Option<&str>, request: types::container::CreateRequest) -> Result<types::container::CreateResponse>;
    pub async fn container_start(&self, name: Name<'_>) -> Result<()>;             // NotModified if it runs
    pub async fn container_stop(&self, name: Name<'_>, signal: Option<&str>, timeout: Option<i64>) -> Result<()>; // seconds; -1 for ever; NotModified if stopped
    pub async fn container_restart(&self, name: Name<'_>, signal: Option<&str>, timeout: Option<i64>) -> Result<()>;
    pub async fn container_kill(&self, name: Name<'_>, signal: Option<&str>) -> Result<()>;
    pub async fn container_remove(&self, name: Name<'_>, force: bool, volumes: bool) -> Result<()>;
    pub async fn container_rename(&self, name: Name<'_>, new: &str) -> Result<()>;
    pub async fn container_resize(&self, name: Name<'_>, rows: u16, columns: u16) -> Result<()>;
    pub async fn container_inspect(&self, name: Name<'_>, size: bool) -> Result<types::container::Inspect>;
    pub async fn container_list(&self, options: container::ListOptions) -> Result<Vec<types::container::Summary>>;
    pub async fn container_top(&self, name: Name<'_>, ps_args: &str) -> Result<types::container::Top>;
    /// Registered when this returns; the future resolves with the exit code.
    pub async fn container_wait(&self, name: Name<'_>, condition: WaitCondition) -> Result<impl Future<Output = types::container::WaitResponse> + Send + 'static>;
    pub async fn container_attach(&self, name: Name<'_>, options: AttachOptions) -> Result<Attachment>;
    /// Whether the container has a terminal decides the wire form.
    pub async fn container_logs(&self, name: Name<'_>, options: logs::ReadOptions) -> Result<(bool, mpsc::Receiver<logs::Record>)>;
    pub async fn container_prune(&self, filters: &types::Filters) -> Result<types::container::PruneResponse>;

    pub async fn exec_create(&self, container: Name<'_>, request: types::exec::CreateRequest) -> Result<String>;
    pub async fn exec_start(&self, id: &str, request: types::exec::StartRequest) -> Result<Option<Attachment>>;  // None when detached
    pub async fn exec_resize(&self, id: &str, rows: u16, columns: u16) -> Result<()>;
    pub async fn exec_inspect(&self, id: &str) -> Result<types::exec::Inspect>;

    pub async fn info(&self) -> types::system::Info;
    pub async fn disk_usage(&self, kinds: types::system::DiskUsageKinds) -> Result<types::system::DiskUsage>;
}
*/
