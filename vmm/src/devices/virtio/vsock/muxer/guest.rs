//! The guest's side: packets from it, and packets for it.

use super::{
    super::{
        connection::{Connection, Key, Outcome, Produced, greet},
        packet::{HEADER, HOST_CID, Header, Op, STREAM},
    },
    Client, MAX_WAITING, Muxer, Stage, Waiting,
};
use crate::devices::virtio::{
    device::GuestMemory,
    iovec::{Buffer, copy_in},
};

/// RSTs that the guest has provoked and not fetched.
const MAX_RESETS: usize = 128;

impl Muxer {
    /// Whether the guest is to be kept from sending until it has fetched some of its RSTs.
    pub(in super::super) fn congested(&self) -> bool {
        self.resets.len() >= MAX_RESETS
    }

    /// A packet from the guest: `buffers` hold its header, parsed into `header`, and `available` bytes behind.
    /// What is not from this guest to the host is dropped.
    pub(in super::super) fn receive(
        &mut self,
        header: &Header,
        available: u64,
        memory: &GuestMemory,
        buffers: &[Buffer],
    ) {
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID {
            return;
        }
        let key = Key { host_port: header.dst_port, guest_port: header.src_port };
        let sound = header.kind == STREAM
            && header.op.is_some()
            && (header.op != Some(Op::Data) || u64::from(header.len) <= available);
        if let Some(token) = self.by_key.get(&key).copied() {
            let outcome = match self.clients.get_mut(&token) {
                Some(Client { stream, stage: Stage::Connected(connection) }) if sound => {
                    connection.receive(header, stream, memory, buffers)
                }
                _ => Outcome::Reset,
            };
            self.settle(token, outcome);
            return;
        }
        let waiting = self.waiting.iter().position(|waiting| waiting.key == key);
        let credit = (header.buf_alloc, header.fwd_cnt);
        match (header.op, waiting) {
            (Some(Op::Request), Some(known)) if sound => {
                if let Some(waiting) = self.waiting.get_mut(known) {
                    waiting.credit = credit;
                }
            }
            (Some(Op::Request), None) if sound => self.guest_connects(key, credit),
            (op, waiting) => {
                if let Some(waiting) = waiting {
                    self.waiting.remove(waiting);
                }
                if op != Some(Op::Reset) {
                    self.resets.push_back(key);
                }
            }
        }
    }

    fn guest_connects(&mut self, key: Key, credit: (u32, u32)) {
        while let Some(listener) = self.listening.iter().position(|(port, _)| *port == key.host_port) {
            let Some((_, token)) = self.listening.remove(listener) else { break };
            if self.clients.get(&token).is_some_and(|client| greet(&client.stream, key.guest_port)) {
                self.connect(token, Connection::accepted(key, credit));
                return;
            }
            self.close(token);
        }
        if self.waiting.len() >= MAX_WAITING
            && let Some(oldest) = self.waiting.pop_front()
        {
            self.resets.push_back(oldest.key);
        }
        self.waiting.push_back(Waiting { key, credit });
    }

    /// Whether [`Muxer::next_packet`] may have one.
    pub(in super::super) fn has_packet(&self) -> bool {
        !self.resets.is_empty() || !self.turns.is_empty()
    }

    /// Writes the next packet for the guest into `buffers`, which have room for a header and more; gives its
    /// length. None, and nothing was written, if there is none.
    pub(in super::super) fn next_packet(&mut self, memory: &GuestMemory, buffers: &[Buffer]) -> Option<u32> {
        if let Some(key) = self.resets.pop_front() {
            return self.write(key, Produced { op: Op::Reset, flags: 0, len: 0 }, (0, 0), memory, buffers);
        }
        while let Some(token) = self.turns.pop_front() {
            let Some(Client { stream, stage: Stage::Connected(connection) }) = self.clients.get_mut(&token)
            else {
                continue;
            };
            connection.queued = false;
            let Some(produced) = connection.produce(stream, memory, buffers) else { continue };
            let (key, credit) = (connection.key, connection.announce());
            if produced.op == Op::Reset {
                self.close(token);
            } else {
                self.line_up(token);
            }
            return self.write(key, produced, credit, memory, buffers);
        }
        None
    }

    fn write(
        &self,
        key: Key,
        Produced { op, flags, len }: Produced,
        (buf_alloc, fwd_cnt): (u32, u32),
        memory: &GuestMemory,
        buffers: &[Buffer],
    ) -> Option<u32> {
        let header = Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: key.host_port,
            dst_port: key.guest_port,
            len,
            kind: STREAM,
            op: Some(op),
            flags,
            buf_alloc,
            fwd_cnt,
        };
        // The buffers were checked to be in guest memory and long enough, so this does not fail.
        copy_in(memory, buffers, 0, &header.bytes()).then(|| len.saturating_add(HEADER as u32))
    }
}
