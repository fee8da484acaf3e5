//! The channel: calls taken by workers, answered in any order.
//!
//! ```text
//!   VMM ── Call ──▶ channel ──▶ one of the workers ──▶ dispatch ──▶ slot ── Return ──▶ VMM
//!                                      │ the lock is another's: PutOff      ▲ Settled
//!                                      └──▶ waiting ── a thread of its own ─┘
//! ```
//!
//! A call that is none is dropped: its VMM is not ours any more.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use bulkhead_vmm_api::share::{Call, Return, SLOT_SIZE};
use rustix::io::Errno;

use super::{
    area::{Area, Slot},
    dispatch::{self, MAX_BODY, Reply, Request},
    locks::Waiting,
    server::Server,
};
use crate::devices::virtio::fs::wire::{self, InHeader, OutHeader, Wire, opcode};

/// What all threads share.
pub(super) struct Service {
    pub(super) server: Server,
    pub(super) area: Area,
    pub(super) channel: OwnedFd,
    /// By ticket.
    waiting: Waiting<(u32, Request)>,
}

impl Service {
    pub(super) fn new(server: Server, area: Area, channel: OwnedFd) -> Self {
        Self { server, area, channel, waiting: Waiting::default() }
    }

    /// A worker: serves until the VMM has closed the channel.
    pub(super) fn work(&self) {
        let mut datagram = [0; Call::SIZE + 1];
        loop {
            match receive(&self.channel, &mut datagram) {
                Ok(0) => break,
                Ok(length) => {
                    if let Some(call) = datagram.get(..length).and_then(Call::decode) {
                        self.serve(call);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        self.waiting.close();
    }

    /// Lets the thread return that tries again for those who wait for locks.
    #[cfg(test)]
    pub(super) fn stop(&self) {
        self.waiting.close();
    }

    /// The thread that tries again for those who wait for locks.
    pub(super) fn wait_for_locks(&self) {
        self.waiting.run(|(ticket, request)| {
            let error = match dispatch::set_lock(&self.server, request) {
                Err(Errno::AGAIN) => return false,
                Err(errno) => errno.raw_os_error().cast_unsigned(),
                Ok(()) => 0,
            };
            self.tell(Return::Settled { ticket: *ticket, error });
            true
        });
    }

    pub(super) fn serve(&self, call: Call) {
        let Some(slot) = self.area.slot(call.slot) else { return };
        let Some(request) = take_request(slot, call) else {
            // No request: there is nobody to be answered.
            return self.give_back(call.slot, 0);
        };
        let reply = match dispatch::serve(&self.server, &request, slot) {
            Reply::Waits if self.waiting.is_full() => Reply::Error(Errno::NOLCK),
            Reply::Waits => {
                // First: whoever settles it must not overtake this.
                self.tell(Return::PutOff { slot: call.slot });
                return self.waiting.add((call.ticket, request));
            }
            reply => reply,
        };
        self.answer(call.slot, slot, &request.header, &reply);
        if ends_locks(&request) {
            self.waiting.stir();
        }
    }

    fn answer(&self, number: u32, slot: Slot<'_>, header: &InHeader, reply: &Reply) {
        let (error, payload, length): (i32, &[u8], usize) = match reply {
            Reply::None | Reply::Waits => return self.give_back(number, 0),
            Reply::Error(errno) => (-errno.raw_os_error(), &[], 0),
            Reply::Bytes(bytes) => (0, bytes, bytes.len()),
            Reply::Filled(length) => (0, &[], *length),
        };
        let len = u32::try_from(OutHeader::SIZE + length).unwrap_or(0);
        let head = wire::encode(&OutHeader { len, error, unique: header.unique });
        let fits = slot.write(0, &head) && slot.write(OutHeader::SIZE, payload);
        self.give_back(number, if fits { len } else { 0 });
    }

    fn give_back(&self, slot: u32, reply: u32) {
        self.tell(Return::Done { slot, reply });
    }

    fn tell(&self, back: Return) {
        let datagram = back.encode();
        // SAFETY: the buffer is as long as said.
        let _ = unsafe {
            libc::send(self.channel.as_raw_fd(), datagram.as_ptr().cast(), datagram.len(), libc::MSG_NOSIGNAL)
        };
    }
}

/// Copies a request out of its slot; None where there is none.
fn take_request(slot: Slot<'_>, call: Call) -> Option<Request> {
    let length = (call.request as usize).min(SLOT_SIZE);
    let mut head = [0; InHeader::SIZE];
    if length < head.len() || !slot.read(0, &mut head) {
        return None;
    }
    let mut header = InHeader::take(&mut &head[..])?;
    let named = (header.len as usize).min(length);
    header.len = u32::try_from(named).unwrap_or(0);
    let body = named.checked_sub(head.len())?;
    let body = if header.opcode == opcode::WRITE { body.min(wire::WriteIn::SIZE) } else { body };
    let mut bytes = vec![0; body.min(MAX_BODY)];
    slot.read(head.len(), &mut bytes);
    let room = (call.room as usize).min(SLOT_SIZE).saturating_sub(OutHeader::SIZE);
    Some(Request { header, body: bytes, room })
}

/// Whether somebody else may have the lock now that they wait for.
fn ends_locks(request: &Request) -> bool {
    match request.header.opcode {
        opcode::RELEASE | opcode::FLUSH => true,
        opcode::SETLK | opcode::SETLKW => wire::LkIn::take(&mut request.body.as_slice())
            .is_some_and(|asked| asked.lock.kind == libc::F_UNLCK as u32),
        _ => false,
    }
}

fn receive(channel: &OwnedFd, datagram: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the buffer is as long as said.
    let length = unsafe { libc::recv(channel.as_raw_fd(), datagram.as_mut_ptr().cast(), datagram.len(), 0) };
    usize::try_from(length).map_err(|_| io::Error::last_os_error())
}
