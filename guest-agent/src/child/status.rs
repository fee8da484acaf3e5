//! How a starting child talks to the agent.
//!
//! ```text
//!   child                                      agent
//!     T + descriptor   the terminal's master     keeps it
//!     E                about to execve
//!     (closed by execve)                         Started
//!     F + JSON         an AgentError             the start has failed
//!     (closed with neither)                      died while starting: the start has failed
//! ```
//!
//! Each message is a datagram of a sequenced-packet socket. One that came after `E` counts too: execve
//! itself may fail.

use std::{
    io::{IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, OwnedFd},
};

use bulkhead_agent_api::AgentError;
use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
    },
};

use crate::error::{Context, Result, internal};

/// The longest message in bytes; a text that is longer is cut.
const MAX_MESSAGE: usize = 4096;

/// What has come.
#[derive(Debug)]
pub enum Message {
    /// The master of the process's terminal.
    Terminal(OwnedFd),
    /// Nothing more is between the process and `execve`.
    Executing,
    /// It could not be started.
    Failed(AgentError),
    /// `execve` has closed the channel, or the child has died.
    Closed,
    /// Nothing yet.
    Nothing,
}

/// The agent's side, which does not block, and the child's.
pub fn channel() -> Result<(OwnedFd, OwnedFd)> {
    let (agent, child) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .context("socketpair")?;
    rustix::io::ioctl_fionbio(&agent, true).context("fionbio")?;
    Ok((agent, child))
}

/// From the child: the terminal's master.
pub fn send_terminal(status: &OwnedFd, master: &OwnedFd) -> Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = [master.as_fd()];
    if !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(internal("no room for a descriptor"));
    }
    rustix::net::sendmsg(status, &[IoSlice::new(b"T")], &mut control, SendFlags::NOSIGNAL).context("send")?;
    Ok(())
}

/// From the child: about to execve.
pub fn send_executing(status: &OwnedFd) -> Result<()> {
    rustix::io::write(status, b"E").context("tell the agent")?;
    Ok(())
}

/// From the child: it has failed. Nothing can be done about a failure to say so: the end of the channel
/// says it too.
pub fn send_failure(status: &OwnedFd, error: &AgentError) {
    let mut error = error.clone();
    let mut text = serde_json::to_vec(&error).unwrap_or_default();
    if text.len() >= MAX_MESSAGE {
        // Escapes make up to six bytes of one.
        let cut = error.message.chars().take(MAX_MESSAGE / 8).collect();
        error.message = cut;
        text = serde_json::to_vec(&error).unwrap_or_default();
    }
    let _ = rustix::io::write(status, &[b"F", text.as_slice()].concat());
}

/// From the agent: the next message.
pub fn receive(status: impl AsFd) -> Message {
    let mut buffer = [0; MAX_MESSAGE];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut buffer)];
    let count = match rustix::net::recvmsg(status, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
        Ok(message) => message.bytes,
        Err(Errno::AGAIN | Errno::INTR) => return Message::Nothing,
        Err(_) => return Message::Closed,
    };
    let descriptor = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    match (buffer.get(..count).and_then(<[u8]>::split_first), descriptor) {
        (Some((b'T', _)), Some(master)) => Message::Terminal(master),
        (Some((b'E', _)), _) => Message::Executing,
        (Some((b'F', text)), _) => Message::Failed(
            serde_json::from_slice(text).unwrap_or_else(|_| internal("the child failed, saying nothing")),
        ),
        (Some(_), _) => Message::Nothing,
        (None, _) => Message::Closed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::invalid;

    #[test]
    fn messages_arrive_in_order_and_then_the_end() {
        let (agent, child) = channel().unwrap();
        assert!(matches!(receive(&agent), Message::Nothing));
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        send_terminal(&child, &reader).unwrap();
        send_executing(&child).unwrap();
        let long = invalid("\u{1}".repeat(100_000));
        send_failure(&child, &long);
        drop(child);
        let Message::Terminal(received) = receive(&agent) else { panic!() };
        rustix::io::write(&writer, b"x").unwrap();
        assert_eq!(rustix::io::read(&received, &mut [0; 4]), Ok(1));
        assert!(matches!(receive(&agent), Message::Executing));
        let Message::Failed(error) = receive(&agent) else { panic!() };
        assert_eq!(error.kind, long.kind);
        assert!(error.message.starts_with("\u{1}\u{1}"));
        assert!(matches!(receive(&agent), Message::Closed));
    }
}
