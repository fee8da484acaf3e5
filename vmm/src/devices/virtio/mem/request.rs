//! Requests and responses of the memory device (virtio 1.3, 5.15.6).
//!
//! ```text
//!   request   type u16 · 6 bytes · address u64 · blocks u16 · 6 bytes          24 bytes
//!   response  type u16 · 6 bytes · state u16                                   10 bytes
//! ```

use super::blocks::Found;

/// Bytes of a request.
pub(super) const REQUEST: usize = 24;
/// Bytes of a response.
pub(super) const RESPONSE: usize = 10;

/// What the driver wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    /// To have blocks plugged.
    Plug(Extent),
    /// To have them unplugged.
    Unplug(Extent),
    /// To have all unplugged.
    UnplugAll,
    /// To know whether they are plugged.
    State(Extent),
}

/// Blocks as the driver names them; neither aligned nor in the region for sure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Extent {
    /// Guest physical address of the first.
    pub address: u64,
    /// How many.
    pub blocks: u16,
}

impl Request {
    /// None for a type that is none.
    #[must_use]
    pub(super) fn parse(bytes: &[u8; REQUEST]) -> Option<Self> {
        let [t0, t1, _, _, _, _, _, _, address @ .., b0, b1, _, _, _, _, _, _] = bytes;
        let extent = Extent { address: u64::from_le_bytes(*address), blocks: u16::from_le_bytes([*b0, *b1]) };
        match u16::from_le_bytes([*t0, *t1]) {
            0 => Some(Self::Plug(extent)),
            1 => Some(Self::Unplug(extent)),
            2 => Some(Self::UnplugAll),
            3 => Some(Self::State(extent)),
            _ => None,
        }
    }
}

/// What the device answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Response {
    /// Done.
    Ack,
    /// Not now: it would be more than was asked for.
    Nack,
    /// The request makes no sense.
    Error,
    /// To [`Request::State`].
    State(Found),
}

impl Response {
    /// As it is written.
    #[must_use]
    pub(super) fn bytes(self) -> [u8; RESPONSE] {
        let (kind, state): (u16, u16) = match self {
            Self::Ack | Self::State(Found::Plugged) => (0, 0),
            Self::State(Found::Unplugged) => (0, 1),
            Self::State(Found::Mixed) => (0, 2),
            Self::Nack => (1, 0),
            Self::Error => (3, 0),
        };
        let mut bytes = [0; RESPONSE];
        bytes[..2].copy_from_slice(&kind.to_le_bytes());
        bytes[RESPONSE - 2..].copy_from_slice(&state.to_le_bytes());
        bytes
    }
}
