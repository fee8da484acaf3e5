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

/// How long a VMM may take for an answer, unless the request takes time by itself. One that does not come is a
/// VMM that hangs.
pub(crate) const ANSWER_WITHIN: Duration = Duration::from_secs(30);

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
    /// Asks, with the descriptors that belong to the request, and waits for the answer.
    pub(crate) async fn call(
        &self,
        dir: &SandboxDir,
        request: &Request,
        fds: &[BorrowedFd<'_>],
        within: Duration,
    ) -> Result<Response, ControlError> {
        let mut answers = self.exchange(dir, &[(request, fds)], within).await?;
        answers.pop().unwrap_or_else(|| Err(ControlError::Invalid("there is none".into())))
    }

    /// Asks for several things without waiting in between, each with at most one descriptor. All are done in
    /// order; the first that is refused is the error.
    pub(crate) async fn call_all(
        &self,
        dir: &SandboxDir,
        requests: &[(Request, Option<BorrowedFd<'_>>)],
    ) -> Result<(), ControlError> {
        let requests: Vec<_> = requests.iter().map(|(request, fd)| (request, fd.as_slice())).collect();
        let answers = self.exchange(dir, &requests, ANSWER_WITHIN).await?;
        answers.into_iter().try_for_each(|answer| answer.map(drop))
    }

    async fn exchange(
        &self,
        dir: &SandboxDir,
        requests: &[(&Request, &[BorrowedFd<'_>])],
        within: Duration,
    ) -> Result<Vec<Result<Response, ControlError>>, ControlError> {
        let mut slot = self.connection.lock().await;
        let connection = match slot.take() {
            Some(connection) => connection,
            None => {
                watch(dir.connect(CONTROL, SocketType::SEQPACKET)?, Interest::READABLE | Interest::WRITABLE)?
            }
        };
        let ask = async {
            for (request, fds) in requests {
                send(&connection, &serde_json::to_vec(request).map_err(io::Error::from)?, fds).await?;
            }
            Ok::<_, io::Error>(())
        };
        let hear = async {
            let mut answers = Vec::with_capacity(requests.len());
            for _ in requests {
                answers.push(receive(&connection).await?);
            }
            Ok::<_, io::Error>(answers)
        };
        // At once: a VMM whose answers nobody takes takes no more requests.
        let exchanged = async { tokio::try_join!(ask, hear) };
        let ((), answers) = tokio::time::timeout(within, exchanged)
            .await
            .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "no answer"))??;
        *slot = Some(connection);
        Ok(answers.iter().map(|answer| parse(answer)).collect())
    }
}

fn parse(answer: &[u8]) -> Result<Response, ControlError> {
    match serde_json::from_slice(answer) {
        Ok(Response::Error { message }) => Err(ControlError::Refused(message)),
        Ok(response) => Ok(response),
        Err(error) => Err(ControlError::Invalid(error.to_string())),
    }
}

/// The most descriptors of one request.
const MAX_FDS: usize = 2;

async fn send(socket: &AsyncFd<OwnedFd>, message: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    loop {
        let mut guard = socket.writable().await?;
        let sent = guard.try_io(|socket| {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
                return Err(io::ErrorKind::InvalidInput.into());
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
        assert_eq!(control.call(&dir, &attach, &[disk.as_fd()], ANSWER_WITHIN).await.unwrap(), Response::Ok);
        let error = control.call(&dir, &Request::Pause, &[], ANSWER_WITHIN).await.unwrap_err();
        assert!(matches!(error, ControlError::Refused(message) if message == "no slot \"x\""));

        let seen = server.join().unwrap();
        assert_eq!(seen, vec![(attach, Some("a disk".into())), (Request::Pause, None)]);
    }

    #[tokio::test]
    async fn several_requests_go_out_at_once_and_the_first_refusal_counts() {
        let base = tempfile::tempdir().unwrap();
        let dir = SandboxDir::create(base.path().join("s")).unwrap();
        let listener = dir.listen(CONTROL, SocketType::SEQPACKET).unwrap();
        let refused = |message: &str| Response::Error { message: message.into() };
        let answers = vec![Response::Ok, refused("one"), refused("two"), Response::Ok];
        let server = std::thread::spawn(move || serve(&listener, answers));
        let control = Control::default();
        let path = base.path().join("disk");
        std::fs::write(&path, "a disk").unwrap();
        let disk = File::open(&path).unwrap();
        let attach = Request::AttachDisk { id: "root".into(), read_only: true };
        let requests =
            [(attach.clone(), Some(disk.as_fd())), (Request::Pause, None), (Request::Resume, None)];
        let error = control.call_all(&dir, &requests).await.unwrap_err();
        assert!(matches!(error, ControlError::Refused(message) if message == "one"));
        // The connection is still good.
        let answer = control.call(&dir, &Request::Kill, &[], ANSWER_WITHIN).await.unwrap();
        assert_eq!(answer, Response::Ok);
        let seen = server.join().unwrap();
        let expected = [attach, Request::Pause, Request::Resume, Request::Kill];
        assert!(seen.iter().map(|(request, _)| request).eq(&expected));
        assert_eq!(seen[0].1.as_deref(), Some("a disk"));
    }

    #[tokio::test]
    async fn a_call_that_was_given_up_does_not_leave_its_answer_to_the_next() {
        let base = tempfile::tempdir().unwrap();
        let dir = SandboxDir::create(base.path().join("s")).unwrap();
        let listener = dir.listen(CONTROL, SocketType::SEQPACKET).unwrap();
        let control = Control::default();
        {
            let call = control.call(&dir, &Request::Pause, &[], ANSWER_WITHIN);
            tokio::pin!(call);
            assert!(futures_util::poll!(&mut call).is_pending());
        }
        // Its answer would go to the old connection, which nobody reads any more.
        drop(rustix::net::accept(&listener).unwrap());
        let server = std::thread::spawn(move || serve(&listener, vec![Response::Ok]));
        assert_eq!(control.call(&dir, &Request::Resume, &[], ANSWER_WITHIN).await.unwrap(), Response::Ok);
        server.join().unwrap();
    }
}
