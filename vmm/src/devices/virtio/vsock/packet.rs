//! The header before every packet, both ways (virtio 1.3, 5.10.6): 44 bytes, little-endian.

/// Bytes of a header.
pub(super) const HEADER: usize = 44;
/// The host's context id.
pub(super) const HOST_CID: u64 = 2;
/// The socket type of a byte stream.
pub(super) const STREAM: u16 = 1;

/// In a SHUTDOWN: the sender receives no more.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
/// In a SHUTDOWN: the sender sends no more.
pub(super) const SHUTDOWN_SEND: u32 = 2;

/// What a packet says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Op {
    Request = 1,
    Response = 2,
    Reset = 3,
    Shutdown = 4,
    Data = 5,
    CreditUpdate = 6,
    CreditRequest = 7,
}

impl Op {
    fn from_wire(value: u16) -> Option<Self> {
        Some(match value {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// A header. `op` is None where the wire says nothing that exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    /// Bytes of payload.
    pub(super) len: u32,
    pub(super) kind: u16,
    pub(super) op: Option<Op>,
    pub(super) flags: u32,
    /// Bytes of the sender's receive buffer for this connection.
    pub(super) buf_alloc: u32,
    /// Bytes that the sender has taken out of that buffer since the connection began; wraps.
    pub(super) fwd_cnt: u32,
}

impl Header {
    pub(super) fn parse(bytes: &[u8; HEADER]) -> Self {
        let mut fields = Fields(bytes);
        Self {
            src_cid: u64::from_le_bytes(fields.take()),
            dst_cid: u64::from_le_bytes(fields.take()),
            src_port: u32::from_le_bytes(fields.take()),
            dst_port: u32::from_le_bytes(fields.take()),
            len: u32::from_le_bytes(fields.take()),
            kind: u16::from_le_bytes(fields.take()),
            op: Op::from_wire(u16::from_le_bytes(fields.take())),
            flags: u32::from_le_bytes(fields.take()),
            buf_alloc: u32::from_le_bytes(fields.take()),
            fwd_cnt: u32::from_le_bytes(fields.take()),
        }
    }

    pub(super) fn bytes(&self) -> [u8; HEADER] {
        let op = self.op.map_or(0, |op| op as u16);
        let fields: [&[u8]; 10] = [
            &self.src_cid.to_le_bytes(),
            &self.dst_cid.to_le_bytes(),
            &self.src_port.to_le_bytes(),
            &self.dst_port.to_le_bytes(),
            &self.len.to_le_bytes(),
            &self.kind.to_le_bytes(),
            &op.to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.buf_alloc.to_le_bytes(),
            &self.fwd_cnt.to_le_bytes(),
        ];
        let mut bytes = [0; HEADER];
        for (byte, value) in bytes.iter_mut().zip(fields.into_iter().flatten()) {
            *byte = *value;
        }
        bytes
    }
}

/// Takes fields off the front.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        match self.0.split_first_chunk() {
            Some((field, rest)) => {
                self.0 = rest;
                *field
            }
            None => [0; N],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wire_is_as_the_standard_lays_it_out() {
        let header = Header {
            src_cid: 0x0102_0304_0506_0708,
            dst_cid: HOST_CID,
            src_port: 0x1112_1314,
            dst_port: 0x2122_2324,
            len: 0x3132_3334,
            kind: STREAM,
            op: Some(Op::Data),
            flags: 0x4142_4344,
            buf_alloc: 0x5152_5354,
            fwd_cnt: 0x6162_6364,
        };
        let wire = [
            8, 7, 6, 5, 4, 3, 2, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0x14, 0x13, 0x12, 0x11, 0x24, 0x23, 0x22, 0x21,
            0x34, 0x33, 0x32, 0x31, 1, 0, 5, 0, 0x44, 0x43, 0x42, 0x41, 0x54, 0x53, 0x52, 0x51, 0x64, 0x63,
            0x62, 0x61,
        ];
        assert_eq!(header.bytes(), wire);
        assert_eq!(Header::parse(&wire), header);
    }

    #[test]
    fn unknown_operations_are_none() {
        for op in [0u8, 8, 255] {
            let mut wire = [0; HEADER];
            wire[30] = op;
            assert_eq!(Header::parse(&wire).op, None);
        }
    }
}
