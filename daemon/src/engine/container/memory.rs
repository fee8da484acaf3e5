//! A running container's memory: how much its sandbox needs, and a limit that changes.
//!
//! ```text
//!   more:  host's limit ──▶ guest's memory ──▶ container's limit      never a limit without the memory for it
//!   less:  container's limit ──▶ guest's memory ──▶ host's limit      never memory gone that may be in use
//! ```

use std::future::Future;

use crate::{
    api::types::container::HostConfig,
    config::VmDefaults,
    engine::{Error, Result},
    sandbox::{Memory, ResizeError, Sandbox, region_mib, total_mib},
};

/// The memory of a container's sandbox.
pub(crate) fn of(host: &HostConfig, vm: &VmDefaults) -> Memory {
    Memory::of(limit(host), vm.memory_mib, region_mib())
}

/// Changes a running container's limits to those of `host` by `change`, and its sandbox's memory with them,
/// in the right order.
///
/// # Errors
/// Those of `change`; or internal, when the guest does not get what it is to have: then nothing is changed.
pub(crate) async fn resize<F>(
    (sandbox, container): (&Sandbox, &str),
    host: &HostConfig,
    vm: &VmDefaults,
    change: F,
) -> Result<()>
where
    F: Future<Output = Result<()>>,
{
    let before = sandbox.memory().await.map_err(|error| failure(&error))?;
    let own = total_mib(limit(host), vm.memory_mib);
    let after = before.of_total(own.saturating_add(sandbox.others_mib(container)), region_mib());
    if after.plugged_mib > before.plugged_mib
        && let Err(error) = sandbox.set_memory(after).await
    {
        undo(sandbox, before).await;
        return Err(failure(&error));
    }
    if let Err(error) = change.await {
        if after.plugged_mib > before.plugged_mib {
            undo(sandbox, before).await;
        }
        return Err(error);
    }
    sandbox.note_memory(container, own);
    if after.plugged_mib < before.plugged_mib {
        // The new limit holds already; the guest gives up what it can spare, now or later.
        sandbox.set_memory(after).await.map_err(|error| failure(&error))?;
    }
    Ok(())
}

async fn undo(sandbox: &Sandbox, memory: Memory) {
    if let Err(error) = sandbox.set_memory(memory).await {
        tracing::warn!(sandbox = sandbox.id(), %error, "a guest keeps memory that it was given in vain");
    }
}

/// Bytes that its workload may use.
pub(super) fn limit(host: &HostConfig) -> Option<u64> {
    u64::try_from(host.memory).ok().filter(|limit| *limit > 0)
}

fn failure(error: &ResizeError) -> Error {
    Error::internal(format!("the guest's memory cannot be changed: {error}"))
}
