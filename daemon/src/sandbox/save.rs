//! Saves a running sandbox's machine.
//!
//! ```text
//!   agent      VMM                       caller
//!   Quiesce ─▶ Pause ─▶ Snapshot ──────▶ [files]
//!                                        [disk copy]
//!              Resume ◀──────────────────────┘
//!   Thaw ◀────────┘                      unless it is to stay frozen
//! ```
//! Containers stand still from Quiesce to Thaw, the whole machine from Pause to Resume. The disk is copied after the
//! snapshot, never beside it: a write that the snapshot counts as done is then on the copy, and one that it has
//! still in its queue is done again by whoever goes on from it. Whatever fails, the machine runs on as before.

use std::{io, os::fd::AsFd, path::PathBuf, time::Duration};

use bulkhead_agent_api::{Call, ErrorKind};
use bulkhead_vmm_api::Request;

use super::{CallError, ControlError, Sandbox, saved::Writing};

/// How long a guest may take to freeze its containers and flush its disk.
const QUIESCE_WITHIN: Duration = Duration::from_secs(120);

/// How soon a guest in which a process is being started is asked again.
const STARTING: Duration = Duration::from_millis(20);

/// How long a VMM may take to write a machine's memory: 64 GiB to a slow disk.
const SNAPSHOT_WITHIN: Duration = Duration::from_secs(1200);

/// Why a machine was not saved. Nothing of the attempt is left, and the machine runs on.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// The agent could not make the guest quiet, or let it run on.
    #[error("the guest: {0}")]
    Guest(#[from] CallError),
    /// It did not answer.
    #[error("the guest did not become quiet in time")]
    Silent,
    /// The VMM refused.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The files, or the copy of the disk.
    #[error("{0}")]
    Disk(#[from] io::Error),
}

/// What becomes of the machine once it is saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leave {
    /// It runs on.
    Running,
    /// Its containers stay frozen: they are to be killed as they are.
    Frozen,
    /// It stays paused: it is to be destroyed.
    Paused,
}

/// How to save.
#[derive(Debug)]
pub struct SaveOptions {
    /// The directory of the files, which is made.
    pub into: PathBuf,
    /// Afterwards.
    pub leave: Leave,
}

impl Sandbox {
    /// Saves the machine. `copy` is done while it is still paused, in a thread that may block.
    ///
    /// # Errors
    /// [`SaveError`]; the machine runs on.
    pub(crate) async fn save<T: Send + 'static>(
        &self,
        options: SaveOptions,
        copy: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> Result<(Writing, T), SaveError> {
        self.dir.mark_saving()?;
        let quiet = tokio::time::timeout(QUIESCE_WITHIN, self.quiesce()).await;
        let saved = match quiet {
            Ok(Ok(())) => self.save_quiet(&options, copy).await,
            Ok(Err(error)) => Err(error.into()),
            Err(_) => Err(SaveError::Silent),
        };
        let leave = if saved.is_ok() { options.leave } else { Leave::Running };
        if leave == Leave::Running {
            let thawed = tokio::time::timeout(QUIESCE_WITHIN, self.thaw()).await;
            // A machine that stays frozen is of no use to anybody: whoever has it must hear of it.
            match thawed {
                Ok(Ok(())) => {}
                Ok(Err(error)) if saved.is_ok() => return Err(error.into()),
                Err(_) if saved.is_ok() => return Err(SaveError::Silent),
                _ => tracing::error!(sandbox = self.id(), "a machine does not run on after it was saved"),
            }
        }
        saved
    }

    /// A process that is just being started is waited for.
    async fn quiesce(&self) -> Result<(), CallError> {
        loop {
            match self.call(Call::Quiesce).await {
                Err(CallError::Agent(error)) if error.kind == ErrorKind::Conflict => {
                    tokio::time::sleep(STARTING).await;
                }
                other => return other.map(drop),
            }
        }
    }

    async fn save_quiet<T: Send + 'static>(
        &self,
        options: &SaveOptions,
        copy: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> Result<(Writing, T), SaveError> {
        let writing = Writing::create(options.into.clone())?;
        self.control(&Request::Pause).await?;
        let saved = async {
            let files = [writing.state.as_fd(), writing.memory.as_fd()];
            self.control.call(&self.dir, &Request::Snapshot, &files, SNAPSHOT_WITHIN).await?;
            let copied = tokio::task::spawn_blocking(copy).await;
            Ok::<T, SaveError>(copied.unwrap_or_else(|error| Err(io::Error::other(error)))?)
        };
        let saved = saved.await;
        if options.leave != Leave::Paused || saved.is_err() {
            self.control(&Request::Resume).await?;
        }
        Ok((writing, saved?))
    }
}
