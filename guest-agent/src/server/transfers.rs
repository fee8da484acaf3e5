//! Transfers of files: a child each, from the connection's first frame to the child's end.

use std::{
    collections::BTreeMap,
    os::fd::{AsFd, OwnedFd},
};

use bulkhead_agent_api::{
    AgentError,
    files::{FilesOpen, FilesReady},
    frame,
};
use rustix::net::SendFlags;

use super::{Key, Server, calls::no_container, saving::Stillness};
use crate::{
    container::Phase,
    error::{Context, conflict},
    files::{self, Transfer},
    log,
    poll::Watched,
    stdio::hang_up,
    sys::{self, Child},
};

/// Transfers at a time. Each may hold some memory of the guest's.
const MAX_TRANSFERS: usize = 32;

/// The children that serve transfers.
#[derive(Default)]
pub(super) struct Transfers(BTreeMap<i32, Ongoing>);

struct Ongoing {
    container: String,
    pidfd: OwnedFd,
}

impl Transfers {
    /// Whether there is none.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A child has been waited for.
    pub(super) fn ended(&mut self, pid: i32) {
        self.0.remove(&pid);
    }

    /// Whether one of a container's goes on.
    pub(super) fn of(&self, container: &str) -> bool {
        self.0.values().any(|transfer| transfer.container == container)
    }

    /// Kills those of a container.
    pub(super) fn kill(&self, container: &str) {
        for transfer in self.0.values().filter(|transfer| transfer.container == container) {
            // One that has ended by itself is waited for like the others.
            let _ = sys::pidfd_send_signal(&transfer.pidfd, libc::SIGKILL);
        }
    }
}

impl Server {
    /// Begins a transfer, or says why not.
    pub(super) fn open_files(&mut self, connection: &Watched<Key>, open: &FilesOpen) {
        if let Err(error) = self.begin_transfer(connection, open) {
            let refusal = FilesReady { error: Some(error), stat: None };
            // The first bytes on a fresh connection: they fit, or the peer is not to be reached.
            let sent = frame::encode(&refusal)
                .map(|frame| rustix::net::send(connection, &frame, SendFlags::NOSIGNAL) == Ok(frame.len()));
            if !matches!(sent, Ok(true)) {
                log::warn("a refusal of a transfer is lost");
            }
            hang_up(connection);
        }
    }

    fn begin_transfer(&mut self, connection: &Watched<Key>, open: &FilesOpen) -> Result<(), AgentError> {
        files::validate(open)?;
        if self.stillness != Stillness::Awake {
            return Err(conflict("the machine is being saved"));
        }
        if self.transfers.0.len() >= MAX_TRANSFERS {
            return Err(conflict("too many files are being copied at once"));
        }
        let container = self.containers.get(&open.container).ok_or_else(no_container)?;
        let init = match &container.init {
            Some(init) => match init.phase {
                Phase::Running => Some(&init.pidfd),
                Phase::Starting(_) => return Err(conflict("the container is being started")),
                Phase::Exited(_) => None,
            },
            None => None,
        };
        let connection = connection.as_fd().try_clone_to_owned().context("dup")?;
        let transfer = Transfer {
            request: &open.request,
            container: &container.spec,
            mounted: container.mounted(),
            init,
            connection: &connection,
        };
        let Child { pid, pidfd } = sys::fork_into(0, None, || files::run(&transfer)).context("clone3")?;
        self.transfers.0.insert(pid, Ongoing { container: open.container.clone(), pidfd });
        Ok(())
    }
}
