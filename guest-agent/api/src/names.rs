//! Name queries of the guest, on a connection to [`crate::NAMES_PORT`].
//!
//! The agent listens at 127.0.0.11, port 53, and hands each DNS message to the daemon as it came; the daemon
//! answers with a DNS message, in any order, or not at all. Both ways:
//!
//! ```text
//!   0      2           3          4        8
//!   ├──────┼───────────┼──────────┼────────┼─── ─ ─
//!   │length│ transport │ reserved │  tag   │ DNS message, `length` bytes
//!   └──────┴───────────┴──────────┴────────┴─── ─ ─      little-endian
//! ```

/// Bytes before each message.
pub const HEADER: usize = 8;

/// What comes before a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Bytes of the message.
    pub length: u16,
    /// How the question came. An answer over UDP has to fit what the question allows.
    pub transport: Transport,
    /// Chosen by the agent; the answer has the question's.
    pub tag: u32,
}

/// How a question came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// In a datagram.
    Udp,
    /// On a connection.
    Tcp,
}

impl Header {
    /// As bytes.
    #[must_use]
    pub fn encode(self) -> [u8; HEADER] {
        let [l0, l1] = self.length.to_le_bytes();
        let [t0, t1, t2, t3] = self.tag.to_le_bytes();
        let transport = match self.transport {
            Transport::Udp => 0,
            Transport::Tcp => 1,
        };
        [l0, l1, transport, 0, t0, t1, t2, t3]
    }

    /// From bytes; None when they are not a header.
    #[must_use]
    pub fn decode(bytes: [u8; HEADER]) -> Option<Self> {
        let [l0, l1, transport, reserved, t0, t1, t2, t3] = bytes;
        let transport = match (transport, reserved) {
            (0, 0) => Transport::Udp,
            (1, 0) => Transport::Tcp,
            _ => return None,
        };
        let (length, tag) = (u16::from_le_bytes([l0, l1]), u32::from_le_bytes([t0, t1, t2, t3]));
        Some(Self { length, transport, tag })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_frozen_and_read_back() {
        let header = Header { length: 0x1234, transport: Transport::Tcp, tag: 0xa1b2_c3d4 };
        assert_eq!(header.encode(), [0x34, 0x12, 1, 0, 0xd4, 0xc3, 0xb2, 0xa1]);
        assert_eq!(Header::decode(header.encode()), Some(header));
        assert_eq!(Header::decode([0, 0, 2, 0, 0, 0, 0, 0]), None);
        assert_eq!(Header::decode([0, 0, 0, 1, 0, 0, 0, 0]), None);
    }
}
