//! What the guest knows: node ids, and where each file lies.
//!
//! A node is named by its share, its parent and its name there, and holds no file descriptor; its path is
//! put together when the file must be opened. Two names of one file (hard links) are one node, the name
//! found first.
//!
//! ```text
//!              LOOKUP: lookups += 1
//!   unknown ─────────────────────────▶ known ── FORGET: lookups -= n, and 0, and no child known ──▶ gone
//! ```
//!
//! Linux forgets a directory after what is in it. A guest that does not gets its directory kept for as long
//! as a child is known, so that no child is ever without a path. Node ids count up and never come back.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use super::wire::ROOT_ID;

/// What a node costs beside its name, in bytes: its entries in both tables, which may be half empty.
const NODE_COST: usize = 208;
/// The least that a name costs, and what its allocation adds to it.
const NAME_COST: usize = 32;
const NAME_OVERHEAD: usize = 24;

/// The most that the tables of a device may cost, whatever its guest's memory, in bytes.
const MOST: usize = 128 << 20;

/// How much the tables may cost, in bytes, for a guest of so much memory. Linux spends more than a KiB of the
/// guest's memory on each file that it knows, and forgets when memory becomes scarce: it can never hold
/// what this allows. A guest that forgets nothing gets ENFILE.
pub(crate) fn budget(guest_memory: u64) -> usize {
    usize::try_from(guest_memory / 4).unwrap_or(MOST).min(MOST)
}

/// Names a share for the device's life; never used again.
pub(super) type ShareId = u32;

/// A file that the guest knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Node {
    pub(super) share: ShareId,
    /// The directory it was found in; [`ROOT_ID`] for a share's root.
    pub(super) parent: u64,
    /// Its name there; a share's root has none.
    pub(super) name: Box<[u8]>,
    /// The file's identity on the host: its inode number.
    pub(super) key: u64,
    /// The type of file, as the `S_IFMT` bits that the guest sees.
    pub(super) kind: u32,
    /// It is known to have no extended attributes, and never to get any.
    pub(super) bare: bool,
    lookups: u64,
    /// Known nodes whose parent this is.
    children: u64,
}

impl Node {
    fn cost(&self) -> usize {
        cost(&self.name)
    }
}

fn cost(name: &[u8]) -> usize {
    NODE_COST + (name.len() + NAME_OVERHEAD).max(NAME_COST)
}

/// All nodes but the root, which is always there.
#[derive(Debug)]
pub(super) struct Inodes {
    nodes: HashMap<u64, Node>,
    by_key: HashMap<(ShareId, u64), u64>,
    /// How many nodes each share has; none of 0.
    in_share: HashMap<ShareId, u64>,
    last: u64,
    /// What the nodes cost together, and may cost, in bytes.
    cost: usize,
    budget: usize,
}

/// The table is full.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Full;

impl Inodes {
    /// An empty table that may cost so many bytes.
    pub(super) fn new(budget: usize) -> Self {
        Self {
            nodes: HashMap::new(),
            by_key: HashMap::new(),
            in_share: HashMap::new(),
            last: ROOT_ID,
            cost: 0,
            budget,
        }
    }

    /// Sets what the table may cost. What it holds already it keeps.
    pub(super) fn set_budget(&mut self, budget: usize) {
        self.budget = budget;
    }

    /// What the table may cost, in bytes.
    pub(super) fn budget(&self) -> usize {
        self.budget
    }

    pub(super) fn get(&self, id: u64) -> Option<&Node> {
        self.nodes.get(&id)
    }

    /// The node of a file that was found under a name, known or new; its look-up count rises.
    pub(super) fn found(
        &mut self,
        share: ShareId,
        parent: u64,
        name: &[u8],
        key: u64,
        kind: u32,
    ) -> Result<u64, Full> {
        if let Some(&id) = self.by_key.get(&(share, key))
            && let Some(node) = self.nodes.get_mut(&id)
        {
            node.lookups = node.lookups.saturating_add(1);
            return Ok(id);
        }
        if self.cost + cost(name) > self.budget {
            return Err(Full);
        }
        self.last += 1;
        let node = Node { share, parent, name: name.into(), key, kind, bare: false, lookups: 1, children: 0 };
        self.insert(self.last, node);
        Ok(self.last)
    }

    /// Remembers that a node has no extended attributes.
    pub(super) fn mark_bare(&mut self, id: u64) {
        if let Some(node) = self.nodes.get_mut(&id) {
            node.bare = true;
        }
    }

    /// Lowers a node's look-up count. The nodes that are gone with it are passed to `gone`.
    pub(super) fn forget(&mut self, id: u64, count: u64, mut gone: impl FnMut(u64, &Node)) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        node.lookups = node.lookups.saturating_sub(count);
        let mut next = id;
        while let Some(node) = self.nodes.get(&next)
            && (node.lookups, node.children) == (0, 0)
            && let Some(node) = self.nodes.remove(&next)
        {
            self.by_key.remove(&(node.share, node.key));
            self.count(node.share, |count| count - 1);
            self.cost -= node.cost();
            gone(next, &node);
            next = node.parent;
            if let Some(parent) = self.nodes.get_mut(&next) {
                parent.children -= 1;
            }
        }
    }

    /// Forgets everything, but never a node id. The tables' memory is given back.
    pub(super) fn clear(&mut self) {
        *self = Self { last: self.last, ..Self::new(self.budget) };
    }

    /// A node's path relative to its share's root.
    pub(super) fn path(&self, id: u64) -> Option<Vec<u8>> {
        let mut names: Vec<&[u8]> = Vec::new();
        let mut node = self.nodes.get(&id)?;
        while node.parent != ROOT_ID {
            names.push(&node.name);
            node = self.nodes.get(&node.parent)?;
        }
        names.reverse();
        Some(if names.is_empty() { b".".to_vec() } else { names.join(&b'/') })
    }

    /// The nodes of a share.
    pub(super) fn of_share(&self, share: ShareId) -> Vec<u64> {
        self.nodes.iter().filter(|(_, node)| node.share == share).map(|(&id, _)| id).collect()
    }

    /// Whether any node of a share is known.
    pub(super) fn knows_share(&self, share: ShareId) -> bool {
        self.in_share.contains_key(&share)
    }

    /// Gives a node another identity on the host: its share has been put on another copy.
    pub(super) fn set_key(&mut self, id: u64, key: u64) {
        if let Some(node) = self.nodes.get_mut(&id) {
            if self.by_key.get(&(node.share, node.key)) == Some(&id) {
                self.by_key.remove(&(node.share, node.key));
            }
            node.key = key;
            node.bare = false;
            self.by_key.insert((node.share, key), id);
        }
    }

    /// Everything, for a saved state: the last id given and the nodes in the order of their ids, so that a
    /// parent stands before its children.
    pub(super) fn save(&self) -> (u64, Vec<(u64, Node)>) {
        let mut nodes: Vec<_> = self.nodes.iter().map(|(&id, node)| (id, node.clone())).collect();
        nodes.sort_unstable_by_key(|(id, _)| *id);
        (self.last, nodes)
    }

    /// The table again. None when the saved state contradicts itself, or costs more than it may.
    pub(super) fn restore(last: u64, nodes: Vec<(u64, Node)>, budget: usize) -> Option<Self> {
        let mut table = Self { last, ..Self::new(budget) };
        for (id, mut node) in nodes {
            // A parent has the lower number, so no path goes in circles.
            let parent_known = node.parent == ROOT_ID
                || node.parent < id
                    && table.nodes.get(&node.parent).is_some_and(|parent| parent.share == node.share);
            if id <= ROOT_ID || id > last || !parent_known || table.nodes.contains_key(&id) {
                return None;
            }
            if table.cost + node.cost() > budget {
                return None;
            }
            node.children = 0;
            table.insert(id, node);
        }
        Some(table)
    }

    fn insert(&mut self, id: u64, node: Node) {
        if let Some(parent) = self.nodes.get_mut(&node.parent) {
            parent.children += 1;
        }
        self.by_key.insert((node.share, node.key), id);
        self.count(node.share, |count| count + 1);
        self.cost += node.cost();
        self.nodes.insert(id, node);
    }

    fn count(&mut self, share: ShareId, change: fn(u64) -> u64) {
        let count = self.in_share.entry(share).or_default();
        *count = change(*count);
        if *count == 0 {
            self.in_share.remove(&share);
        }
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.nodes.len()
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    const DIR: u32 = 0o040_000;

    fn gone(table: &mut Inodes, id: u64, count: u64) -> Vec<u64> {
        let mut ids = Vec::new();
        table.forget(id, count, |id, _| ids.push(id));
        ids
    }

    #[test]
    fn paths_lead_from_the_shares_root() {
        let mut table = Inodes::new(MOST);
        let root = table.found(7, ROOT_ID, b"", 100, DIR).unwrap();
        let a = table.found(7, root, b"a", 101, DIR).unwrap();
        let b = table.found(7, a, b"b", 102, DIR).unwrap();
        assert_eq!(table.path(root).unwrap(), b".");
        assert_eq!(table.path(b).unwrap(), b"a/b");
        assert_eq!(table.path(99), None);
    }

    #[test]
    fn hard_links_are_one_node() {
        let mut table = Inodes::new(MOST);
        let root = table.found(1, ROOT_ID, b"", 1, DIR).unwrap();
        let a = table.found(1, root, b"a", 5, 0).unwrap();
        assert_eq!(table.found(1, root, b"b", 5, 0), Ok(a));
        assert_ne!(table.found(2, root, b"b", 5, 0), Ok(a));
        assert_eq!(gone(&mut table, a, 1), Vec::<u64>::new());
        assert_eq!(gone(&mut table, a, 1), [a]);
    }

    #[test]
    fn a_directory_stays_while_a_child_is_known() {
        let mut table = Inodes::new(MOST);
        let root = table.found(1, ROOT_ID, b"", 1, DIR).unwrap();
        let a = table.found(1, root, b"a", 2, DIR).unwrap();
        let b = table.found(1, a, b"b", 3, 0).unwrap();
        assert_eq!(gone(&mut table, root, u64::MAX), Vec::<u64>::new());
        assert_eq!(gone(&mut table, a, 9), Vec::<u64>::new());
        assert_eq!(table.path(b).unwrap(), b"a/b");
        assert_eq!(gone(&mut table, b, 1), [b, a, root]);
        assert_eq!(table.len(), 0);
        assert!(table.found(1, ROOT_ID, b"", 1, DIR).unwrap() > b, "an id came back");
    }

    #[test]
    fn a_saved_state_that_contradicts_itself_is_refused() {
        let mut table = Inodes::new(MOST);
        let root = table.found(1, ROOT_ID, b"", 1, DIR).unwrap();
        table.found(1, root, b"a", 2, DIR).unwrap();
        let (last, nodes) = table.save();
        assert!(Inodes::restore(last, nodes.clone(), MOST).is_some());
        assert!(Inodes::restore(last - 1, nodes.clone(), MOST).is_none());
        let mut circle = nodes.clone();
        circle[1].1.parent = circle[1].0;
        assert!(Inodes::restore(last, circle, MOST).is_none());
        assert!(Inodes::restore(last, nodes.into_iter().skip(1).collect(), MOST).is_none());
    }

    #[test]
    fn a_guest_that_forgets_nothing_comes_to_an_end() {
        let mut table = Inodes::new(budget(1 << 20));
        let root = table.found(1, ROOT_ID, b"", 1, DIR).unwrap();
        let names = (0..).map(|number: u64| (number, format!("{number:0255}")));
        let known = names
            .map_while(|(number, name)| table.found(1, root, name.as_bytes(), number + 2, 0).ok())
            .collect::<Vec<_>>();
        assert!(known.len() as u64 * 487 <= 1 << 18, "{} nodes", known.len());
        // What is known is known still, and there is room again once something is forgotten.
        assert_eq!(table.found(1, root, b"again", 2, 0), Ok(known[0]));
        assert_eq!(table.found(1, root, &[b'x'; 255], 1 << 40, 0), Err(Full));
        assert_eq!(gone(&mut table, known[0], 2), [known[0]]);
        assert!(table.found(1, root, &[b'x'; 255], 1 << 40, 0).is_ok());
        let (last, nodes) = table.save();
        assert!(Inodes::restore(last, nodes.clone(), table.budget()).is_some());
        assert!(Inodes::restore(last, nodes, table.budget() / 2).is_none());
        table.clear();
        assert_eq!(table.cost, 0);
    }

    #[test]
    fn what_a_table_may_cost_is_a_part_of_the_guests_memory() {
        assert_eq!(budget(128 << 20), 32 << 20);
        assert_eq!(budget(u64::MAX), MOST);
    }

    proptest! {
        /// Whatever the guest looks up and forgets: every known node has a path, and when all is forgotten
        /// nothing is left.
        #[test]
        fn nothing_is_lost_and_nothing_left(steps in vec((any::<bool>(), 0..12_u64, 0..12_u64, 0..3_u64), 0..200)) {
            let mut table = Inodes::new(MOST);
            let root = table.found(1, ROOT_ID, b"", 0, DIR).unwrap();
            for (look_up, parent, key, count) in steps {
                let parent = root + parent;
                if look_up && table.get(parent).is_some() {
                    table.found(1, parent, key.to_string().as_bytes(), key + 1, DIR).unwrap();
                } else {
                    table.forget(parent, count, |_, _| {});
                }
                for (id, _) in table.save().1 {
                    prop_assert!(table.path(id).is_some());
                }
            }
            let (last, nodes) = table.save();
            let restored = Inodes::restore(last, nodes.clone(), MOST).unwrap();
            prop_assert_eq!(restored.save(), (last, nodes.clone()));
            for (id, _) in nodes {
                table.forget(id, u64::MAX, |_, _| {});
            }
            prop_assert_eq!(table.len(), 0);
            prop_assert!(table.by_key.is_empty() && table.in_share.is_empty());
            prop_assert_eq!(table.cost, 0);
        }
    }
}
