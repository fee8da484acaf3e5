//! The control client: one datagram of JSON and descriptors out, one datagram of JSON back.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{BorrowedFd, OwnedFd},
    time::Duration,
};

use bulkhead_vmm_api::{MAX_MESSAGE, Request, Response};
use rustix::net::{
    RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketType,
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::Mutex,
};

use super::watch;
use crate::sandbox::dir::{CONTROL, SandboxDir};

/// How long a VMM may take for one answer. All of its answers are quick; one that does not come is a VMM
/// that hangs.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);

/// Why a VMM did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// It refused.
    #[error("{0}")]
    Refused(String),
    /// It could not be asked.
    #[error("the VMM's control socket: {0}")]
    Io(#[from] io::Error),
    /// Its answer is not in its contract.
    #[error("the VMM's answer is not valid: {0}")]
    Invalid(String),
}

/// A client of one VMM's control socket.
#[derive(Debug, Default)]
pub(crate) struct Control {
    /// None before the first call and after one that did not get its answer: a late answer must not be
    /// taken for the next call's.
    connection: Mutex<Option<AsyncFd<OwnedFd>>>,
}

impl Control {
    /// Asks, with at most one descriptor, and waits for the answer.
    pub(crate) async fn call(
        &self,
        dir: &SandboxDir,
        request: &Request,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<Response, ControlError> {
        let message = serde_json::to_vec(request).map_err(io::Error::from)?;
        let mut slot = self.connection.lock().await;
        let connection = match slot.take() {
            Some(connection) => connection,
            None => {
                watch(dir.connect(CONTROL, SocketType::SEQPACKET)?, Interest::READABLE | Interest::WRITABLE)?
            }
        };
        let exchange = async {
            send(&connection, &message, fd).await?;
            receive(&connection).await
        };
        let answer = tokio::time::timeout(ANSWER_WITHIN, exchange)
            .await
            .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "no answer"))??;
        *slot = Some(connection);
        match serde_json::from_slice(&answer) {
            Ok(Response::Error { message }) => Err(ControlError::Refused(message)),
            Ok(response) => Ok(response),
            Err(error) => Err(ControlError::Invalid(error.to_string())),
        }
    }
}

async fn send(socket: &AsyncFd<OwnedFd>, message: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    loop {
        let mut guard = socket.writable().await?;
        let sent = guard.try_io(|socket| {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let fds = fd.map(|fd| [fd]);
            if let Some(fds) = &fds {
                control.push(SendAncillaryMessage::ScmRights(fds));
            }
            let flags = SendFlags::NOSIGNAL;
            Ok(rustix::net::sendmsg(socket.get_ref(), &[IoSlice::new(message)], &mut control, flags)?)
        });
        if let Ok(sent) = sent {
            return sent.map(drop);
        }
    }
}

async fn receive(socket: &AsyncFd<OwnedFd>) -> io::Result<Vec<u8>> {
    let mut answer = vec![0; MAX_MESSAGE];
    loop {
        let mut guard = socket.readable().await?;
        let received = guard.try_io(|socket| {
            let mut control = RecvAncillaryBuffer::default();
            let mut buffers = [IoSliceMut::new(&mut answer)];
            let flags = RecvFlags::CMSG_CLOEXEC;
            Ok(rustix::net::recvmsg(socket.get_ref(), &mut buffers, &mut control, flags)?.bytes)
        });
        match received {
            Ok(Ok(0)) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(Ok(length)) => {
                answer.truncate(length);
                return Ok(answer);
            }
            Ok(Err(error)) => return Err(error),
            Err(_would_block) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Read, os::fd::AsFd};

    use rustix::net::RecvAncillaryMessage;

    use super::*;

    /// Answers one request after another: what it was asked, and the first bytes of what it was given.
    fn serve(listener: &OwnedFd, answers: Vec<Response>) -> Vec<(Request, Option<String>)> {
        let connection = rustix::net::accept(listener).unwrap();
        let mut seen = Vec::new();
        for answer in answers {
            let mut message = vec![0; MAX_MESSAGE];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut buffers = [IoSliceMut::new(&mut message)];
            let received =
                rustix::net::recvmsg(&connection, &mut buffers, &mut control, RecvFlags::empty()).unwrap();
            let given = control.drain().find_map(|message| match message {
                RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
                _ => None,
            });
            let given = given.map(|fd| {
                let mut text = String::new();
                File::from(fd).read_to_string(&mut text).unwrap();
                text
            });
            seen.push((serde_json::from_slice(&message[..received.bytes]).unwrap(), given));
            rustix::net::send(&connection, &serde_json::to_vec(&answer).unwrap(), SendFlags::empty())
                .unwrap();
        }
        seen
    }

    #[tokio::test]
    async fn requests_carry_their_descriptor_and_get_their_own_answer() {
        let base = tempfile::tempdir().unwrap();
        let dir = SandboxDir::create(base.path().join("s")).unwrap();
        let listener = dir.listen(CONTROL, SocketType::SEQPACKET).unwrap();
        let answers = vec![Response::Ok, Response::Error { message: "no slot \"x\"".into() }];
        let server = std::thread::spawn(move || serve(&listener, answers));

        let path = base.path().join("disk");
        std::fs::write(&path, "a disk").unwrap();
        let disk = File::open(&path).unwrap();
        let control = Control::default();
        let attach = Request::AttachDisk { id: "root".into(), read_only: true };
        assert_eq!(control.call(&dir, &attach, Some(disk.as_fd())).await.unwrap(), Response::Ok);
        let error = control.call(&dir, &Request::Pause, None).await.unwrap_err();
        assert!(matches!(error, ControlError::Refused(message) if message == "no slot \"x\""));

        let seen = server.join().unwrap();
        assert_eq!(seen, vec![(attach, Some("a disk".into())), (Request::Pause, None)]);
    }

    #[tokio::test]
    async fn a_call_that_was_given_up_does_not_leave_its_answer_to_the_next() {
        let base = tempfile::tempdir().unwrap();
        let dir = SandboxDir::create(base.path().join("s")).unwrap();
        let listener = dir.listen(CONTROL, SocketType::SEQPACKET).unwrap();
        let control = Control::default();
        {
            let call = control.call(&dir, &Request::Pause, None);
            tokio::pin!(call);
            assert!(futures_util::poll!(&mut call).is_pending());
        }
        // Its answer would go to the old connection, which nobody reads any more.
        drop(rustix::net::accept(&listener).unwrap());
        let server = std::thread::spawn(move || serve(&listener, vec![Response::Ok]));
        assert_eq!(control.call(&dir, &Request::Resume, None).await.unwrap(), Response::Ok);
        server.join().unwrap();
    }
}
