//! Sockets of the host that containers reach: for each connection that a guest makes to such a mount's port, one
//! to the socket.
//!
//! ```text
//!   guest ── vsock port ──▶ VMM ──▶ task here ──▶ the host's socket, by its path
//! ```

use std::{os::unix::fs::FileTypeExt, sync::Arc, time::Duration};

use tokio::{io::copy_bidirectional, net::UnixStream, sync::Semaphore, task::JoinSet};

use super::{Mount, Source, plan::first_port};
use crate::sandbox::{Place, Sandbox};

/// Connections at a time, of one socket.
const MOST: usize = 256;

/// How long to wait after a VMM that did not listen.
const AGAIN: Duration = Duration::from_millis(200);

/// Who listens for a container; nobody does any more when this is dropped. Connections that are open stay so.
#[derive(Debug, Default)]
pub(crate) struct Forwards {
    _listeners: JoinSet<()>,
}

/// Serves the mounts that are sockets, until the sandbox has ended.
pub(crate) fn serve(sandbox: &Arc<Sandbox>, mounts: &[Mount], place: &Place) -> Forwards {
    let mut listeners = JoinSet::new();
    for (port, mount) in (first_port(place)..).zip(mounts) {
        let Source::Bind { path, .. } = &mount.source else { continue };
        if !std::fs::metadata(path).is_ok_and(|meta| meta.file_type().is_socket()) {
            continue;
        }
        let (sandbox, path) = (Arc::clone(sandbox), path.clone());
        listeners.spawn(async move {
            tokio::select! {
                _ = sandbox.ended() => {}
                () = accept(&sandbox, port, &path) => {}
            }
        });
    }
    Forwards { _listeners: listeners }
}

async fn accept(sandbox: &Sandbox, port: u32, path: &str) {
    let room = Arc::new(Semaphore::new(MOST));
    loop {
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else { return };
        let mut guest = match sandbox.accept(port).await {
            Ok(guest) => guest,
            Err(error) => {
                tracing::debug!(port, %error, "a forwarded socket could not be listened for");
                tokio::time::sleep(AGAIN).await;
                continue;
            }
        };
        let path = path.to_owned();
        tokio::spawn(async move {
            let _permit = permit;
            match UnixStream::connect(&path).await {
                // Either end may go at any moment.
                Ok(mut host) => drop(copy_bidirectional(&mut guest, &mut host).await),
                Err(error) => tracing::debug!(path, %error, "a forwarded socket does not answer"),
            }
        });
    }
}
