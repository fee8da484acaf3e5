//! The control socket: the daemon's requests, answered in order, until the machine ends.
//!
//! One thread, no time-outs: it waits for the machine's end, a termination signal, a new client, or a
//! request. A client is dropped when it sends what is no request at all or does not read its answers; a
//! request that cannot be done is answered with an error.

use std::{
    io,
    io::{IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use bulkhead_vmm_api::{ExitReason, MAX_MESSAGE, Request, Response};
use rustix::{
    event::{PollFd, PollFlags, poll},
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendFlags,
        SocketFlags, accept_with, recvmsg, sendmsg,
    },
};

use super::{
    Machine, devices::AttachError, elastic::ElasticError, signals::Signals, snapshot::SnapshotError,
};
use crate::{devices::virtio::net::NetIdentity, recorder::Rare};

/// Clients at a time; more wait in the socket's backlog.
const MAX_CLIENTS: usize = 16;
/// Descriptors that come with one request; more are closed by the kernel, and the request is refused.
const MAX_FDS: usize = 4;

/// Serves requests until the machine has ended, and says why it has.
///
/// # Errors
/// Waiting itself fails.
pub fn serve(machine: &Machine, listener: &OwnedFd, signals: &Signals) -> io::Result<ExitReason> {
    let mut clients: Vec<OwnedFd> = Vec::new();
    loop {
        let ready = wait(machine, listener, signals, &clients)?;
        if let Some(reason) = machine.end().reason() {
            return Ok(reason);
        }
        if ready.signal {
            return Ok(ExitReason::Killed);
        }
        let mut index = 0;
        clients.retain(|client| {
            let ready = ready.clients.get(index).copied().unwrap_or(false);
            index += 1;
            !ready || handle(machine, client.as_fd())
        });
        // A client that has gone away by itself is no failure of the socket.
        if ready.listener
            && let Ok(client) = accept_with(listener, SocketFlags::CLOEXEC)
        {
            clients.push(client);
        }
    }
}

/// What there is to do.
struct Ready {
    signal: bool,
    listener: bool,
    clients: Vec<bool>,
}

fn wait(machine: &Machine, listener: &OwnedFd, signals: &Signals, clients: &[OwnedFd]) -> io::Result<Ready> {
    let accepting = if clients.len() < MAX_CLIENTS { PollFlags::IN } else { PollFlags::empty() };
    let mut fds = vec![
        PollFd::new(machine.end().as_ref(), PollFlags::IN),
        PollFd::new(signals, PollFlags::IN),
        PollFd::new(listener, accepting),
    ];
    fds.extend(clients.iter().map(|client| PollFd::new(client, PollFlags::IN)));
    while let Err(error) = poll(&mut fds, None) {
        if error != rustix::io::Errno::INTR {
            return Err(error.into());
        }
    }
    let mut ready = fds.iter().map(|fd| !fd.revents().is_empty()).skip(1);
    let (signal, listener) = (ready.next().unwrap_or(false), ready.next().unwrap_or(false));
    Ok(Ready { signal, listener, clients: ready.collect() })
}

/// Receives one request and answers it. False when the client is to be dropped.
fn handle(machine: &Machine, client: BorrowedFd<'_>) -> bool {
    let response = match receive(client) {
        Ok(None) => return true,
        Ok(Some(message)) => match serde_json::from_slice::<Request>(&message.bytes) {
            Ok(request) => recorded(machine, request, message.fds),
            Err(error) => Response::Error { message: format!("malformed request: {error}") },
        },
        Err(_) => return false,
    };
    let bytes = encode(response);
    let mut control = SendAncillaryBuffer::default();
    sendmsg(client, &[IoSlice::new(&bytes)], &mut control, SendFlags::DONTWAIT | SendFlags::NOSIGNAL).is_ok()
}

struct Message {
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
}

/// One datagram; None when there is none after all.
fn receive(client: BorrowedFd<'_>) -> io::Result<Option<Message>> {
    let mut bytes = vec![0; MAX_MESSAGE];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let received = match recvmsg(client, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags) {
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(None),
        other => other?,
    };
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    if received.bytes == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "message too long"));
    }
    bytes.truncate(received.bytes);
    Ok(Some(Message { bytes, fds }))
}

/// Why a request is not done.
#[derive(Debug, thiserror::Error)]
enum RequestError {
    #[error("the request needs {wanted} file descriptors, {found} came with it")]
    Descriptors { wanted: usize, found: usize },
    #[error("the machine was not saved: {0}")]
    Snapshot(#[from] SnapshotError),
    #[error(transparent)]
    Attach(#[from] AttachError),
    #[error(transparent)]
    Elastic(#[from] ElasticError),
}

/// Performs a request, and records it if it is one that changes something.
fn recorded(machine: &Machine, request: Request, fds: Vec<OwnedFd>) -> Response {
    let changes = !matches!(
        request,
        Request::Status | Request::Console | Request::ConsolePart { .. } | Request::Recent
    );
    let text = if changes { Rare::text(&request) } else { Box::default() };
    let recorder = machine.end().recorder();
    match perform(machine, request, fds) {
        Ok(response) => {
            if changes {
                recorder.machine(Rare::Done(text));
            }
            response
        }
        Err(error) => {
            let message = error.to_string();
            recorder.machine(Rare::Refused(format!("{message}: {text}").into()));
            Response::Error { message }
        }
    }
}

fn perform(machine: &Machine, request: Request, fds: Vec<OwnedFd>) -> Result<Response, RequestError> {
    let wanted = match &request {
        Request::AttachDisk { .. } | Request::AttachShare { .. } | Request::AttachTap { .. } => 1,
        Request::Snapshot | Request::AttachServer { .. } => 2,
        _ => 0,
    };
    let found = fds.len();
    let error = RequestError::Descriptors { wanted, found };
    if found != wanted {
        return Err(error);
    }
    let mut fds = fds.into_iter();
    match request {
        Request::Status => return Ok(Response::Status(machine.status())),
        Request::Console => return Ok(Response::Console { text: machine.console().tail() }),
        Request::AttachDisk { id, read_only } => {
            machine.attach_disk(&id, fds.next().ok_or(error)?.into(), read_only)?;
        }
        Request::DetachDisk { id } => machine.detach_disk(&id)?,
        Request::AttachShare { tag, name, kind } => {
            machine.attach_share(&tag, &name, fds.next().ok_or(error)?, kind)?;
        }
        Request::AttachServer { tag } => {
            let (channel, area) = fds.next().zip(fds.next()).ok_or(error)?;
            machine.attach_server(&tag, channel, area)?;
        }
        Request::DetachServer { tag } => machine.detach_server(&tag)?,
        Request::DetachShare { tag, name } => machine.detach_share(&tag, &name)?,
        Request::AttachTap { id, mac, mtu } => {
            machine.attach_tap(&id, fds.next().ok_or(error)?, NetIdentity { mac, mtu })?;
        }
        Request::DetachTap { id } => machine.detach_tap(&id)?,
        Request::SetMemory { plugged_mib } => machine.set_memory(plugged_mib)?,
        Request::SetBalloon { mib } => machine.set_balloon(mib)?,
        Request::SetRateLimit { device, limits } => machine.set_rate_limit(&device, limits)?,
        Request::ConsolePart { from } => {
            let (text, next) = machine.console().part(from);
            return Ok(Response::ConsolePart { text, next });
        }
        Request::Recent => return Ok(Response::Recent { events: machine.end().recorder().recent() }),
        Request::Pause => machine.pause(),
        Request::Resume => machine.resume(),
        Request::Snapshot => {
            let (state, memory) = fds.next().zip(fds.next()).ok_or(error)?;
            machine.snapshot(state.into(), &memory.into())?;
        }
        Request::Kill => machine.end().report(ExitReason::Killed),
    }
    Ok(Response::Ok)
}

/// A response as a datagram. What is full of characters that JSON escapes can be longer than a message may be:
/// then its beginning is cut.
fn encode(mut response: Response) -> Vec<u8> {
    loop {
        let bytes = serde_json::to_vec(&response).unwrap_or_default();
        match &mut response {
            Response::Console { text } if bytes.len() > MAX_MESSAGE => {
                let half = text.ceil_char_boundary(text.len().div_ceil(2));
                text.drain(..half);
            }
            Response::Recent { events } if bytes.len() > MAX_MESSAGE => {
                events.drain(..events.len().div_ceil(2));
            }
            _ => return bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_vmm_api::{RECENT, Recorded};
    use rustix::net::{AddressFamily, SendAncillaryMessage, SocketType, socketpair};

    use super::*;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
    }

    fn send(socket: &OwnedFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::empty()).unwrap();
    }

    #[test]
    fn a_message_comes_with_its_descriptors() {
        let (ours, theirs) = pair();
        let file = tempfile::tempfile().unwrap();
        send(&theirs, b"{}", &[file.as_fd(), file.as_fd()]);
        let message = receive(ours.as_fd()).unwrap().unwrap();
        assert_eq!((message.bytes.as_slice(), message.fds.len()), (&b"{}"[..], 2));
        assert!(receive(ours.as_fd()).unwrap().is_none());
        drop(theirs);
        assert!(receive(ours.as_fd()).is_err());
    }

    #[test]
    fn too_much_is_refused() {
        let (ours, theirs) = pair();
        send(&theirs, &vec![b' '; MAX_MESSAGE + 1], &[]);
        assert!(receive(ours.as_fd()).is_err());
        let file = tempfile::tempfile().unwrap();
        send(&theirs, b"{}", &[file.as_fd(); MAX_FDS + 3]);
        assert!(receive(ours.as_fd()).is_err());
    }

    #[test]
    fn a_console_of_control_characters_still_fits() {
        let text = "\u{1}".repeat(bulkhead_vmm_api::CONSOLE_TAIL);
        let bytes = encode(Response::Console { text });
        assert!(bytes.len() <= MAX_MESSAGE);
        let Response::Console { text } = serde_json::from_slice(&bytes).unwrap() else { panic!() };
        assert!(text.len() >= bulkhead_vmm_api::CONSOLE_TAIL / 4);
    }

    #[test]
    fn the_latest_events_fit() {
        let event = |at_us| Recorded { at_us, text: "\u{1}".repeat(200) };
        let bytes = encode(Response::Recent { events: (0..RECENT as u64).map(event).collect() });
        assert!(bytes.len() <= MAX_MESSAGE);
        let Response::Recent { events } = serde_json::from_slice(&bytes).unwrap() else { panic!() };
        assert_eq!(events.last().unwrap().at_us, RECENT as u64 - 1);
        assert!(events.len() >= 16);
    }
}
