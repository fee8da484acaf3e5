//! Elements of the packet filter's sets and maps (nf_tables), changed in one transaction.
//!
//! ```text
//!   BATCH_BEGIN  NEWSETELEM | DELSETELEM, one a set and at most 256 elements …  BATCH_END   ──▶ kernel
//!   an answer to each: 0, or an error number ◀── all of it, or nothing
//! ```

use std::{collections::BTreeSet, io};

use rustix::net::netlink;

use super::{
    Netlink,
    message::{self, Message, constant as nl},
};

/// `NFNL_SUBSYS_NFTABLES`.
const NFTABLES: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
/// `NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWSETELEM`, and `NFT_MSG_DELSETELEM`.
const ADD: u16 = NFTABLES << 8 | 12;
const DELETE: u16 = NFTABLES << 8 | 14;
const NFTA_SET_ELEM_LIST_TABLE: u16 = 1;
const NFTA_SET_ELEM_LIST_SET: u16 = 2;
const NFTA_SET_ELEM_LIST_ELEMENTS: u16 = 3;
const NFTA_LIST_ELEM: u16 = 1;
const NFTA_SET_ELEM_KEY: u16 = 1;
const NFTA_SET_ELEM_DATA: u16 = 2;
const NFTA_DATA_VALUE: u16 = 1;

/// Elements in one message, whose length two bytes must tell.
const AT_ONCE: usize = 256;

/// The most elements of one transaction: what is sent is to fit the buffer that a socket has by default.
pub const MAX_ELEMENTS: usize = 1000;

/// The longest key or value, in bytes: the kernel's registers.
const MAX_BYTES: usize = 64;

/// Which packets a table sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum TableFamily {
    /// Routed packets of both families.
    Inet,
    /// Frames.
    Bridge,
}

impl TableFamily {
    fn number(self) -> u8 {
        match self {
            Self::Inet => 1,
            Self::Bridge => 7,
        }
    }
}

/// What is to change of one set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetChange<'a> {
    /// The table's family.
    pub family: TableFamily,
    /// The table's name.
    pub table: &'a str,
    /// The set's name.
    pub set: &'a str,
    /// Whether the elements come or go.
    pub adds: bool,
    /// Keys as the kernel has them, each field padded to four bytes; with what they map to, in a map.
    pub elements: Vec<(Vec<u8>, Option<Vec<u8>>)>,
}

/// Changes elements of sets, in this order: all of them, or none.
///
/// # Errors
/// There is no such set; one that is to go is not there; one that is to come is there and leads elsewhere; more
/// than [`MAX_ELEMENTS`]; the kernel's.
pub fn change_elements(changes: &[SetChange<'_>]) -> io::Result<()> {
    let count: usize = changes.iter().map(|change| change.elements.len()).sum();
    if count > MAX_ELEMENTS {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many elements for one transaction"));
    }
    let messages = messages(changes)?;
    if messages.is_empty() {
        return Ok(());
    }
    Netlink::of(Some(netlink::NETFILTER))?.transaction(messages)
}

fn messages(changes: &[SetChange<'_>]) -> io::Result<Vec<Message>> {
    let mut messages = Vec::new();
    for change in changes {
        for elements in change.elements.chunks(AT_ONCE) {
            let flags = if change.adds { nl::NLM_F_ACK | nl::NLM_F_CREATE } else { nl::NLM_F_ACK };
            let mut request = Message::new(if change.adds { ADD } else { DELETE }, flags);
            // struct nfgenmsg: family, version, no resource.
            request.bytes(&[change.family.number(), 0, 0, 0]);
            request.text(NFTA_SET_ELEM_LIST_TABLE, change.table)?;
            request.text(NFTA_SET_ELEM_LIST_SET, change.set)?;
            let mut fits = true;
            request.nest(NFTA_SET_ELEM_LIST_ELEMENTS | nl::NLA_F_NESTED, |list| {
                for (key, data) in elements {
                    fits &=
                        key.len() <= MAX_BYTES && data.as_ref().is_none_or(|data| data.len() <= MAX_BYTES);
                    list.nest(NFTA_LIST_ELEM | nl::NLA_F_NESTED, |element| {
                        value(element, NFTA_SET_ELEM_KEY, key);
                        // What leaves is known by its key.
                        if let Some(data) = data.as_ref().filter(|_| change.adds) {
                            value(element, NFTA_SET_ELEM_DATA, data);
                        }
                    });
                }
            });
            if !fits {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, "an element is too long"));
            }
            messages.push(request);
        }
    }
    Ok(messages)
}

fn value(element: &mut Message, kind: u16, bytes: &[u8]) {
    element.nest(kind | nl::NLA_F_NESTED, |value| value.attribute(NFTA_DATA_VALUE, bytes));
}

/// Where a transaction begins or ends: `struct nfgenmsg` with the subsystem for its resource.
fn boundary(kind: u16) -> Message {
    let mut message = Message::new(kind, 0);
    let [high, low] = NFTABLES.to_be_bytes();
    message.bytes(&[nl::AF_UNSPEC, 0, high, low]);
    message
}

impl Netlink {
    /// Sends messages as one transaction, and waits for the answer to each.
    fn transaction(&mut self, messages: Vec<Message>) -> io::Result<()> {
        let begin = self.sequence.wrapping_add(1);
        let (mut bytes, mut unanswered) = (Vec::new(), BTreeSet::new());
        let mut sequence = begin;
        bytes.extend(boundary(BATCH_BEGIN).finish(sequence)?);
        for message in messages {
            sequence = sequence.wrapping_add(1);
            unanswered.insert(sequence);
            bytes.extend(message.finish(sequence)?);
        }
        sequence = sequence.wrapping_add(1);
        bytes.extend(boundary(BATCH_END).finish(sequence)?);
        self.sequence = sequence;
        self.send(&bytes)?;
        let mut buffer = vec![0; super::BUFFER];
        while !unanswered.is_empty() {
            let mut datagram = self.receive(&mut buffer)?;
            while let Some(part) = message::next(&mut datagram) {
                // What is wrong with the whole is told of its beginning.
                let known = part.sequence == begin || unanswered.remove(&part.sequence);
                if known && part.kind == nl::NLMSG_ERROR {
                    message::outcome(part.body)?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(elements: Vec<(Vec<u8>, Option<Vec<u8>>)>) -> SetChange<'static> {
        SetChange { family: TableFamily::Bridge, table: "t", set: "s", adds: true, elements }
    }

    #[test]
    fn an_element_is_laid_out_as_the_kernel_reads_it() {
        let mut messages = messages(&[change(vec![(vec![1, 2, 3, 4], Some(vec![5, 6, 7, 8]))])]).unwrap();
        let bytes = messages.remove(0).finish(7).unwrap();
        let nested = |kind: u16| (kind | nl::NLA_F_NESTED).to_ne_bytes();
        let [one, two, three] = [nested(1), nested(2), nested(3)];
        let expected = [
            &[7, 0, 0, 0][..],
            &[6, 0, 1, 0, b't', 0, 0, 0],
            &[6, 0, 2, 0, b's', 0, 0, 0],
            &[32, 0],
            &three,
            &[28, 0],
            &one,
            &[12, 0],
            &one,
            &[8, 0, 1, 0, 1, 2, 3, 4],
            &[12, 0],
            &two,
            &[8, 0, 1, 0, 5, 6, 7, 8],
        ];
        assert_eq!(bytes.get(16..).unwrap(), expected.concat());
        assert_eq!(bytes.get(4..6).unwrap(), ADD.to_ne_bytes());
    }

    #[test]
    fn many_elements_are_several_messages_and_too_many_or_too_long_ones_are_refused() {
        let many = |count: u32| change((0..count).map(|n| (n.to_be_bytes().to_vec(), None)).collect());
        assert_eq!(messages(&[many(600)]).unwrap().len(), 3);
        assert_eq!(messages(&[many(0)]).unwrap().len(), 0);
        let refused = |change: SetChange<'_>| change_elements(&[change]).unwrap_err().kind();
        assert_eq!(refused(many(1001)), io::ErrorKind::InvalidInput);
        assert_eq!(refused(change(vec![(vec![0; 65], None)])), io::ErrorKind::InvalidInput);
    }
}
