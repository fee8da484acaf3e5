//! The contract between the daemon and a share server: the process that reads and writes volumes and bind mounts
//! for one sandbox; and what it has in common with that sandbox's VMM.
//!
//! ```text
//!  daemon                     share server                               VMM
//!    │ --share-config-fd N ────▶ reads one [`ShareConfig`] (JSON)           │
//!    │ AttachServer + 2 fds ────────────────────────────────────────────────▶
//!    │                           │◀── [`Call`]: a request lies in a slot ───│  channel: a pair of
//!    │                           │─── [`Return`]: the reply lies there ────▶│  seqpacket sockets
//!    │                           │─── or: put off; later: settled ─────────▶│
//!    │                           └──── [`SLOTS`] slots of shared memory ────┘  area: a sealed memory file
//! ```
//!
//! A slot is the VMM's until its number is sent and again from its return on. A call is returned once, in any
//! order. One that has to wait for a lock is put off, and settled later by its ticket: a slot is held by nobody who
//! waits, since whoever ends the wait needs one. The server ends when the channel does.

use serde::{Deserialize, Serialize};

use crate::{FdNumber, Jail};

/// Version of [`ShareConfig`]. A server refuses another.
pub const VERSION: u32 = 2;

/// How many requests can be under way.
pub const SLOTS: u32 = 16;

/// Bytes of a slot: a WRITE or READ of 1 MiB and its headers.
pub const SLOT_SIZE: usize = (1 << 20) + 4096;

/// Bytes of the shared memory: slots and nothing else.
pub const AREA_SIZE: usize = SLOTS as usize * SLOT_SIZE;

/// Everything that a share server is given.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShareConfig {
    /// [`VERSION`].
    pub version: u32,
    /// How the process confines itself before it serves anything.
    pub jail: Jail,
    /// One end of a pair of `SOCK_SEQPACKET` Unix sockets, whose other the VMM has.
    pub channel: FdNumber,
    /// A memory file of [`AREA_SIZE`] bytes, sealed against growing and shrinking.
    pub area: FdNumber,
    /// The guest's memory: how much the server keeps of what the guest knows is bounded by it.
    pub memory_mib: u32,
    /// What it serves, by unique names.
    pub shares: Vec<Share>,
}

/// A share: a directory, or a single file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Share {
    /// Its name in the file system's root: 1 to 255 bytes, no `/`, not `.` or `..`.
    pub name: String,
    /// An `O_PATH` descriptor; jailed, of a mount that has no parent.
    pub root: FdNumber,
    /// Whether nothing in it may be changed.
    pub read_only: bool,
    /// What the guest may keep.
    pub caching: Caching,
}

/// What a guest may keep of a share without asking again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Caching {
    /// No content and no sizes: what host and guests write, all see at once. Names, and what directories are,
    /// for a second.
    #[default]
    Consistent,
    /// Everything for a second, and content until a file's time or size is seen to have changed.
    Cached,
}

/// From the VMM: a request lies at the beginning of a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    /// Below [`SLOTS`].
    pub slot: u32,
    /// Bytes of the request.
    pub request: u32,
    /// Bytes that the guest has room for, the reply's header among them.
    pub room: u32,
    /// A number of the VMM's that no other call has which is under way or put off.
    pub ticket: u32,
}

/// From the server: what became of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Return {
    /// It is done.
    Done {
        /// As it was called.
        slot: u32,
        /// Bytes of the reply at the slot's beginning; 0: there is none.
        reply: u32,
    },
    /// It waits for a lock. The slot is free, and has no reply.
    PutOff {
        /// As it was called.
        slot: u32,
    },
    /// One that was put off is done. Its reply has no content.
    Settled {
        /// As it was called.
        ticket: u32,
        /// An error number of Linux's; 0: none.
        error: u32,
    },
}

impl Call {
    /// Length of its datagram.
    pub const SIZE: usize = 16;

    /// The datagram.
    #[must_use]
    pub fn encode(self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        let numbers = [self.slot, self.request, self.room, self.ticket];
        for (part, number) in bytes.chunks_exact_mut(4).zip(numbers) {
            part.copy_from_slice(&number.to_le_bytes());
        }
        bytes
    }

    /// None where it is no such datagram.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let [slot, request, room, ticket] = numbers(bytes)?;
        Some(Self { slot, request, room, ticket })
    }
}

impl Return {
    /// Length of its datagram.
    pub const SIZE: usize = 12;

    /// The datagram.
    #[must_use]
    pub fn encode(self) -> [u8; Self::SIZE] {
        let numbers = match self {
            Self::Done { slot, reply } => [0, slot, reply],
            Self::PutOff { slot } => [1, slot, 0],
            Self::Settled { ticket, error } => [2, ticket, error],
        };
        let mut bytes = [0; Self::SIZE];
        for (part, number) in bytes.chunks_exact_mut(4).zip(numbers) {
            part.copy_from_slice(&number.to_le_bytes());
        }
        bytes
    }

    /// None where it is no such datagram.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        match numbers(bytes)? {
            [0, slot, reply] => Some(Self::Done { slot, reply }),
            [1, slot, 0] => Some(Self::PutOff { slot }),
            [2, ticket, error] => Some(Self::Settled { ticket, error }),
            _ => None,
        }
    }
}

fn numbers<const N: usize>(bytes: &[u8]) -> Option<[u32; N]> {
    let (parts, rest) = bytes.as_chunks::<4>();
    let parts: &[[u8; 4]; N] = parts.try_into().ok()?;
    rest.is_empty().then(|| parts.map(u32::from_le_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn datagrams_are_read_as_they_were_written_and_not_otherwise() {
        let call = Call { slot: 1, request: u32::MAX, room: 3, ticket: 4 };
        assert_eq!(Call::decode(&call.encode()), Some(call));
        for back in [
            Return::Done { slot: 7, reply: 16 },
            Return::PutOff { slot: 7 },
            Return::Settled { ticket: 9, error: 37 },
        ] {
            assert_eq!(Return::decode(&back.encode()), Some(back));
            assert_eq!(Call::decode(&back.encode()), None);
        }
        assert_eq!(Return::decode(&[3; 12]), None);
        assert_eq!(Return::decode(&call.encode()), None);
        assert_eq!(Call::decode(&call.encode()[..11]), None);
    }
}
