//! How a device is saved: its queues, its shares by name and kind, and every node that the guest knows.
//!
//! Directories are not part of it. A restored share waits for its directory, which comes by `attach_share`
//! under the same name; until then its files are stale. Nodes are found again by their paths.

use bulkhead_vmm_api::ShareKind;
use serde::{Deserialize, Serialize};

use super::{
    super::{device::DeviceError, queue::SavedQueue},
    inodes::{Inodes, Node, ShareId},
    server::{Server, Share},
};

const VERSION: u32 = 1;

/// An active device's queues.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct SavedActivation {
    pub(super) features: u64,
    pub(super) queues: Vec<SavedQueue>,
}

#[derive(Debug, Serialize, Deserialize)]
struct SavedShare {
    id: ShareId,
    name: String,
    kind: ShareKind,
    attached: bool,
}

#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    version: u32,
    active: Option<SavedActivation>,
    last_share: ShareId,
    shares: Vec<SavedShare>,
    last_node: u64,
    nodes: Vec<(u64, Node)>,
}

/// A server and its queues as bytes.
pub(super) fn save(server: &Server, active: Option<SavedActivation>) -> Result<Vec<u8>, DeviceError> {
    let (last_node, nodes) = server.inodes.save();
    let shares = server.shares.iter().map(|(&id, share)| SavedShare {
        id,
        name: share.name.clone(),
        kind: share.kind,
        attached: share.attached,
    });
    let saved = Saved {
        version: VERSION,
        active,
        last_share: server.last_share,
        shares: shares.collect(),
        last_node,
        nodes,
    };
    postcard::to_stdvec(&saved)
        .map_err(|error| DeviceError::Invalid(format!("saving a file system: {error}")))
}

/// Brings a server to a saved state, and answers with the queues.
///
/// Shares that were attached already keep their directories when the state names them too.
pub(super) fn restore(server: &mut Server, bytes: &[u8]) -> Result<Option<SavedActivation>, DeviceError> {
    let invalid = |what: &str| DeviceError::Invalid(format!("saved file system: {what}"));
    let saved: Saved = postcard::from_bytes(bytes).map_err(|error| invalid(&error.to_string()))?;
    if saved.version != VERSION {
        return Err(invalid("another version"));
    }
    let inodes = Inodes::restore(saved.last_node, saved.nodes).ok_or_else(|| invalid("damaged nodes"))?;
    let present = std::mem::take(&mut server.shares);
    server.forget_all();
    server.inodes = inodes;
    server.last_share = saved.last_share;
    for SavedShare { id, name, kind, attached } in saved.shares {
        if id == 0 || id > saved.last_share {
            return Err(invalid("damaged shares"));
        }
        let share = Share::new(name, kind, None, attached);
        if server.shares.insert(id, share).is_some() {
            return Err(invalid("damaged shares"));
        }
    }
    for (name, root, kind) in present.into_values().filter_map(Share::into_parts) {
        server.attach(&name, root, kind).map_err(|error| invalid(&error.to_string()))?;
    }
    Ok(saved.active)
}
