//! Serving the API on sockets.
//!
//! One task a connection; what goes wrong in one is not seen by another. HTTP is hyper's until a handler
//! answers with a hijack: then hyper's own answer is swallowed, the socket is taken back from it, and
//! [`super::stream::hijack`] writes to it what dockerd would have written. (hyper's upgrades know only
//! `101`; Docker's clients may also ask without `Upgrade`, and get a plain `200` followed by raw bytes.)

mod connection;
mod listen;
mod metrics;
pub mod requests;
mod tls;

use std::{sync::Arc, time::Duration};

pub use listen::Listener;
pub use metrics::serve_metrics;
use rustix::process::{Resource, getrlimit};
use tokio::sync::{Semaphore, watch};

use super::{authorization::Authorization, version};
use crate::{
    config::Config,
    engine::{Engine, Error, Result},
};

/// What clients take the daemon's operating system from.
pub static SERVER: ServerName = ServerName;

/// `Docker/<version> (linux)`.
pub struct ServerName;

impl std::fmt::Display for ServerName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Docker/{} (linux)", version::DAEMON)
    }
}

/// How many connections are served at once, where as many files may be open; further ones wait.
const MAX_CONNECTIONS: usize = 4096;

/// How long requests may go on after the server was told to stop.
const GRACE: Duration = Duration::from_secs(10);

/// Opens all sockets of the configuration. Nobody is served before [`serve`].
///
/// # Errors
/// An address is taken, a directory or group is not there, a certificate cannot be read.
pub fn bind(config: &Config) -> std::io::Result<Vec<Listener>> {
    let tls = tls::acceptor(&config.tls)?;
    let mut listeners = Vec::new();
    for host in &config.hosts {
        listeners.extend(listen::open(host, config, tls.as_ref())?);
    }
    if listeners.is_empty() {
        return Err(std::io::Error::other("there is no socket to serve the API on"));
    }
    Ok(listeners)
}

/// Serves until `stop` is true, then lets requests under way end.
///
/// # Errors
/// A listener broke.
pub async fn serve(engine: Arc<Engine>, listeners: Vec<Listener>, stop: watch::Receiver<bool>) -> Result<()> {
    let limit = Arc::new(Semaphore::new(max_connections(getrlimit(Resource::Nofile).current)));
    // Dropped by the last connection's task.
    let (alive, mut all_gone) = tokio::sync::mpsc::channel::<()>(1);
    let mut tasks = tokio::task::JoinSet::new();
    let authorization = Arc::new(Authorization::default());
    for listener in listeners {
        let served = (Arc::clone(&engine), Arc::clone(&authorization));
        tasks.spawn(accept(served, listener, Arc::clone(&limit), stop.clone(), alive.clone()));
    }
    drop(alive);
    while let Some(ended) = tasks.join_next().await {
        ended.map_err(|error| Error::internal(format!("a listener failed: {error}")))?;
    }
    let _ = tokio::time::timeout(GRACE, all_gone.recv()).await;
    Ok(())
}

/// The other half of what the process may open is for what clients ask for.
fn max_connections(open_files: Option<u64>) -> usize {
    let half = open_files.map_or(usize::MAX, |limit| usize::try_from(limit / 2).unwrap_or(usize::MAX));
    half.clamp(1, MAX_CONNECTIONS)
}

async fn accept(
    (engine, authorization): (Arc<Engine>, Arc<Authorization>),
    listener: Listener,
    limit: Arc<Semaphore>,
    mut stop: watch::Receiver<bool>,
    alive: tokio::sync::mpsc::Sender<()>,
) {
    loop {
        let Ok(permit) = Arc::clone(&limit).acquire_owned().await else { return };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stop.wait_for(|stop| *stop) => return,
        };
        match accepted {
            Ok(socket) => {
                let (engine, stop, alive) = (Arc::clone(&engine), stop.clone(), alive.clone());
                let authorization = Arc::clone(&authorization);
                tokio::spawn(async move {
                    connection::serve(engine, authorization, socket, stop).await;
                    drop((permit, alive));
                });
            }
            Err(error) => {
                // Too many open files, for instance: others may close theirs.
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_leave_half_of_the_open_files_to_the_engine() {
        for (open_files, connections) in
            [(Some(1024), 512), (Some(524_288), MAX_CONNECTIONS), (None, MAX_CONNECTIONS), (Some(0), 1)]
        {
            assert_eq!(max_connections(open_files), connections);
        }
    }
}
