//! Netlink messages: a header, a body, attributes; every length checked on the way in.

use std::io;

/// Numbers of `linux/netlink.h`, `linux/rtnetlink.h`, `linux/if_link.h` and `linux/if_addr.h`.
pub(crate) mod constant {
    pub(crate) const NLMSG_ERROR: u16 = 2;
    pub(crate) const NLMSG_DONE: u16 = 3;
    pub(crate) const NLM_F_REQUEST: u16 = 1;
    pub(crate) const NLM_F_MULTI: u16 = 2;
    pub(crate) const NLM_F_ACK: u16 = 4;
    pub(crate) const NLM_F_DUMP: u16 = 0x300;
    pub(crate) const NLM_F_REPLACE: u16 = 0x100;
    pub(crate) const NLM_F_EXCL: u16 = 0x200;
    pub(crate) const NLM_F_CREATE: u16 = 0x400;
    pub(crate) const NLA_F_NESTED: u16 = 0x8000;
    pub(crate) const NLA_TYPE_MASK: u16 = 0x3fff;

    pub(crate) const RTM_NEWLINK: u16 = 16;
    pub(crate) const RTM_DELLINK: u16 = 17;
    pub(crate) const RTM_GETLINK: u16 = 18;
    pub(crate) const RTM_SETLINK: u16 = 19;
    pub(crate) const RTM_NEWADDR: u16 = 20;
    pub(crate) const RTM_DELADDR: u16 = 21;
    pub(crate) const RTM_GETADDR: u16 = 22;
    pub(crate) const RTM_NEWROUTE: u16 = 24;
    pub(crate) const RTM_DELROUTE: u16 = 25;
    pub(crate) const RTM_GETROUTE: u16 = 26;

    pub(crate) const AF_UNSPEC: u8 = 0;
    pub(crate) const AF_INET: u8 = 2;
    pub(crate) const AF_BRIDGE: u8 = 7;
    pub(crate) const AF_INET6: u8 = 10;

    pub(crate) const IFF_UP: u32 = 1;
    pub(crate) const IFLA_ADDRESS: u16 = 1;
    pub(crate) const IFLA_IFNAME: u16 = 3;
    pub(crate) const IFLA_MTU: u16 = 4;
    pub(crate) const IFLA_MASTER: u16 = 10;
    pub(crate) const IFLA_PROTINFO: u16 = 12;
    pub(crate) const IFLA_LINKINFO: u16 = 18;
    pub(crate) const IFLA_IFALIAS: u16 = 20;
    pub(crate) const IFLA_INFO_KIND: u16 = 1;
    pub(crate) const IFLA_BRPORT_MODE: u16 = 4;
    pub(crate) const IFLA_BRPORT_ISOLATED: u16 = 33;

    pub(crate) const IFA_ADDRESS: u16 = 1;
    pub(crate) const IFA_LOCAL: u16 = 2;
    pub(crate) const IFA_FLAGS: u16 = 8;
    pub(crate) const IFA_F_NODAD: u32 = 2;

    pub(crate) const RTA_DST: u16 = 1;
    pub(crate) const RTA_OIF: u16 = 4;
    pub(crate) const RTA_GATEWAY: u16 = 5;
    pub(crate) const RT_TABLE_MAIN: u8 = 254;
    pub(crate) const RTPROT_BOOT: u8 = 3;
    pub(crate) const RT_SCOPE_UNIVERSE: u8 = 0;
    pub(crate) const RT_SCOPE_NOWHERE: u8 = 255;
    pub(crate) const RTN_UNICAST: u8 = 1;
    pub(crate) const RTNH_F_ONLINK: u32 = 4;
}

use constant::{NLA_TYPE_MASK, NLM_F_REQUEST};

const HEADER: usize = 16;
const ATTRIBUTE: usize = 4;

fn aligned(length: usize) -> usize {
    length.next_multiple_of(4)
}

/// A request in the making.
pub(crate) struct Message {
    bytes: Vec<u8>,
}

impl Message {
    pub(crate) fn new(kind: u16, flags: u16) -> Self {
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&(flags | NLM_F_REQUEST).to_ne_bytes());
        Self { bytes }
    }

    /// Appends what follows the header.
    pub(crate) fn bytes(&mut self, bytes: &[u8]) {
        self.bytes.extend(bytes);
    }

    /// Appends an attribute.
    pub(crate) fn attribute(&mut self, kind: u16, value: &[u8]) {
        self.nest(kind, |message| message.bytes(value));
    }

    /// Appends an attribute that holds what `fill` appends.
    pub(crate) fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) {
        let start = self.bytes.len();
        self.bytes.extend([0, 0]);
        self.bytes.extend(kind.to_ne_bytes());
        fill(self);
        // Everything that is put in here is far shorter than what two bytes can tell.
        let length = u16::try_from(self.bytes.len() - start).unwrap_or(u16::MAX);
        self.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self.bytes.resize(aligned(self.bytes.len()), 0);
    }

    /// Appends an interface's name, ended by a zero.
    pub(crate) fn name(&mut self, kind: u16, name: &str) -> io::Result<()> {
        if name.is_empty() || name.len() > super::MAX_NAME || name.contains('\0') {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not an interface's name"));
        }
        self.text(kind, name)
    }

    /// Appends a text, ended by a zero.
    pub(crate) fn text(&mut self, kind: u16, text: &str) -> io::Result<()> {
        if text.contains('\0') {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a zero in a text"));
        }
        self.nest(kind, |message| {
            message.bytes(text.as_bytes());
            message.bytes(&[0]);
        });
        Ok(())
    }

    /// The whole message.
    pub(crate) fn finish(mut self, sequence: u32) -> io::Result<Vec<u8>> {
        let length = u32::try_from(self.bytes.len()).map_err(io::Error::other)?;
        self.bytes[0..4].copy_from_slice(&length.to_ne_bytes());
        self.bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
        Ok(self.bytes)
    }
}

/// One message of a datagram.
pub(crate) struct Part<'a> {
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    pub(crate) sequence: u32,
    pub(crate) body: &'a [u8],
}

/// Takes the next message off a datagram; None at its end, or where it makes no sense any more.
pub(crate) fn next<'a>(datagram: &mut &'a [u8]) -> Option<Part<'a>> {
    let header = datagram.first_chunk::<HEADER>()?;
    let [l0, l1, l2, l3, k0, k1, f0, f1, s0, s1, s2, s3, ..] = *header;
    let length = u32::from_ne_bytes([l0, l1, l2, l3]) as usize;
    let body = datagram.get(HEADER..length)?;
    *datagram = datagram.get(aligned(length)..).unwrap_or_default();
    Some(Part {
        kind: u16::from_ne_bytes([k0, k1]),
        flags: u16::from_ne_bytes([f0, f1]),
        sequence: u32::from_ne_bytes([s0, s1, s2, s3]),
        body,
    })
}

/// What an error message says; its number 0 is success.
pub(crate) fn outcome(body: &[u8]) -> io::Result<()> {
    let Some(number) = body.first_chunk::<4>().map(|bytes| i32::from_ne_bytes(*bytes)) else {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a netlink error without a number"));
    };
    if number == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(number.wrapping_neg())) }
}

/// The attributes in some bytes, flags taken off their types.
pub(crate) struct Attributes<'a>(&'a [u8]);

impl<'a> Attributes<'a> {
    pub(crate) fn of(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }
}

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let [l0, l1, k0, k1] = *self.0.first_chunk::<ATTRIBUTE>()?;
        let length = usize::from(u16::from_ne_bytes([l0, l1]));
        let value = self.0.get(ATTRIBUTE..length)?;
        self.0 = self.0.get(aligned(length)..).unwrap_or_default();
        Some((u16::from_ne_bytes([k0, k1]) & NLA_TYPE_MASK, value))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn attributes_are_read_back_as_they_were_written() {
        let mut message = Message::new(7, 8);
        message.attribute(1, b"abc");
        message.nest(2 | constant::NLA_F_NESTED, |inner| inner.attribute(3, &[]));
        message.name(4, "eth0").unwrap();
        let bytes = message.finish(42).unwrap();
        let mut rest = bytes.as_slice();
        let part = next(&mut rest).unwrap();
        assert_eq!((part.kind, part.flags, part.sequence), (7, 8 | NLM_F_REQUEST, 42));
        let read: Vec<_> = Attributes::of(part.body).collect();
        assert_eq!(read, [(1, &b"abc"[..]), (2, &[4, 0, 3, 0][..]), (4, &b"eth0\0"[..])]);
        assert!(next(&mut rest).is_none());
    }

    #[test]
    fn errors_are_the_kernels_numbers() {
        assert!(outcome(&0i32.to_ne_bytes()).is_ok());
        assert_eq!(outcome(&(-17i32).to_ne_bytes()).unwrap_err().raw_os_error(), Some(17));
        assert!(outcome(&[0]).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_are_a_panic_or_an_endless_list(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut rest = bytes.as_slice();
            let mut parts = 0;
            while let Some(part) = next(&mut rest) {
                prop_assert!(Attributes::of(part.body).count() <= 50);
                parts += 1;
                prop_assert!(parts <= 13);
            }
            prop_assert!(Attributes::of(&bytes).count() <= 50);
        }
    }
}
