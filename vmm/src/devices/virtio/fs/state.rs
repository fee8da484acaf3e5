//! How a device is saved besides its queues: its shares by name and kind, and every node that the guest
//! knows.
//!
//! Directories are not part of it. A restored share waits for its directory, which comes by `attach_share`
//! under the same name; until then its files are stale. Nodes are found again by their paths.

use bulkhead_vmm_api::ShareKind;
use serde::{Deserialize, Serialize};

use super::{
    super::device::DeviceError,
    inodes::{Inodes, Node, ShareId},
    server::Server,
    shares::Share,
};

/// Changes whenever [`SavedServer`] does.
pub(super) const VERSION: u32 = 3;

#[derive(Debug, Serialize, Deserialize)]
struct SavedShare {
    id: ShareId,
    name: String,
    kind: ShareKind,
    attached: bool,
}

/// A server as it is saved.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct SavedServer {
    last_share: ShareId,
    shares: Vec<SavedShare>,
    last_node: u64,
    nodes: Vec<(u64, Node)>,
    /// Place in the window, node, place in the file.
    mappings: Vec<(u64, u64, u64)>,
}

/// What is to be saved of a server.
pub(super) fn save(server: &Server) -> SavedServer {
    let (last_node, nodes) = server.inodes.save();
    let shares = server.shares.iter().map(|(&id, share)| SavedShare {
        id,
        name: share.name.clone(),
        kind: share.kind,
        attached: share.attached,
    });
    SavedServer {
        last_share: server.last_share,
        shares: shares.collect(),
        last_node,
        nodes,
        mappings: server.mappings.list(),
    }
}

/// Brings a server to a saved state. Shares that are attached already keep their directories when the state
/// names them, and stay as further ones when it does not.
///
/// # Errors
/// The state contradicts itself.
pub(super) fn restore(server: &mut Server, saved: SavedServer) -> Result<(), DeviceError> {
    let invalid = |what: &str| DeviceError::Invalid(format!("saved file system: {what}"));
    let inodes = Inodes::restore(saved.last_node, saved.nodes, server.inodes.budget());
    let inodes = inodes.ok_or_else(|| invalid("damaged nodes"))?;
    let present = std::mem::take(&mut server.shares);
    server.forget_all();
    server.inodes = inodes;
    server.last_share = saved.last_share;
    for SavedShare { id, name, kind, attached } in saved.shares {
        if id == 0 || id > saved.last_share {
            return Err(invalid("damaged shares"));
        }
        if server.shares.insert(id, Share::new(name, kind, None, attached)).is_some() {
            return Err(invalid("damaged shares"));
        }
    }
    if !server.remember_mappings(saved.mappings) {
        return Err(invalid("damaged mappings"));
    }
    for (name, root, kind) in present.into_values().filter_map(Share::into_parts) {
        server.attach(&name, root, kind).map_err(|error| invalid(&error.to_string()))?;
    }
    Ok(())
}
