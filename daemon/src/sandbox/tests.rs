//! A sandbox against a fake VMM: a process that sleeps, its sockets served by the test.

use std::{os::fd::OwnedFd, process::Command};

use rustix::net::SocketType;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
};

use super::{
    dir::{CONTROL, VSOCK},
    fake::{FakeAgent, hello},
    vmm::process::boot_id,
    *,
};

/// A sandbox's directory with sockets, and a process of that identity.
fn running(parent: &Path, id: &str) -> (UnixListener, OwnedFd, std::process::Child) {
    let dir = SandboxDir::create(parent.join(id)).unwrap();
    let vsock = dir.listen(VSOCK, SocketType::STREAM).unwrap();
    let control = dir.listen(CONTROL, SocketType::SEQPACKET).unwrap();
    let child = Command::new("sleep").arg("1000").spawn().unwrap();
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap();
    std::fs::write(dir.path().join(IDENTITY), format!("{}\n{stat}", boot_id().unwrap())).unwrap();
    let vsock = std::os::unix::net::UnixListener::from(vsock);
    vsock.set_nonblocking(true).unwrap();
    (UnixListener::from_std(vsock).unwrap(), control, child)
}

/// Takes the next connection and answers its first line.
async fn accept(vsock: &UnixListener) -> (String, UnixStream) {
    let (mut stream, _) = vsock.accept().await.unwrap();
    let mut line = String::new();
    BufReader::with_capacity(1, &mut stream).read_line(&mut line).await.unwrap();
    stream.write_all(b"OK 1024\n").await.unwrap();
    (line, stream)
}

async fn adopted(parent: &Path, id: &str, vsock: &UnixListener) -> (Sandbox, FakeAgent) {
    let (sandbox, agent) = tokio::join!(Sandbox::adopt(parent, id), async {
        let (line, stream) = accept(vsock).await;
        assert_eq!(line, "LISTEN 1024\n");
        let mut agent = FakeAgent::new(stream);
        agent.send(&hello()).await;
        agent
    });
    (sandbox.unwrap().0, agent)
}

#[tokio::test]
async fn a_running_sandbox_is_adopted_used_and_shut_down_without_a_trace() {
    let base = tempfile::tempdir().unwrap();
    let (vsock, _control, mut child) = running(base.path(), "s1");
    let (sandbox, mut agent) = adopted(base.path(), "s1", &vsock).await;
    assert_eq!(sandbox.pid(), i32::try_from(child.id()).unwrap());

    let process = ProcessId { container: "c".into(), exec: None };
    let (output, mut far) = tokio::join!(sandbox.output(process, StreamKind::Stdout, Some(7)), async {
        let (line, mut stream) = accept(&vsock).await;
        assert_eq!(line, "CONNECT 1025\n");
        let length = stream.read_u32_le().await.unwrap();
        let mut body = vec![0; length as usize];
        stream.read_exact(&mut body).await.unwrap();
        assert_eq!(serde_json::from_slice::<StreamOpen>(&body).unwrap().from, Some(7));
        let ready = bulkhead_agent_api::StreamReady { error: None, from: 7 };
        stream.write_all(&bulkhead_agent_api::frame::encode(&ready).unwrap()).await.unwrap();
        stream
    });
    far.write_all(b"out").await.unwrap();
    assert_eq!(output.unwrap().next().await.unwrap().unwrap(), "out");

    let off = async {
        assert_eq!(agent.next_call().await.unwrap().call, Call::Shutdown);
        child.kill().unwrap();
        drop(agent);
    };
    tokio::join!(sandbox.shut_down(Duration::from_secs(60)), off);
    assert!(!base.path().join("s1").exists());
}

#[tokio::test]
async fn a_guest_that_does_not_power_off_is_killed() {
    let base = tempfile::tempdir().unwrap();
    let (vsock, _control, _child) = running(base.path(), "s1");
    let (sandbox, _agent) = adopted(base.path(), "s1", &vsock).await;
    sandbox.shut_down(Duration::ZERO).await;
    assert!(!base.path().join("s1").exists());
}

#[tokio::test]
async fn a_dead_sandbox_is_not_adopted_and_its_report_is_told() {
    let base = tempfile::tempdir().unwrap();
    let (_vsock, _control, mut child) = running(base.path(), "s1");
    child.kill().unwrap();
    child.wait().unwrap();
    let report = r#"{"reason":{"kind":"triple_fault"},"console":"","uptime_us":1}"#;
    std::fs::write(base.path().join("s1").join(dir::REPORT), report).unwrap();
    let error = Sandbox::adopt(base.path(), "s1").await.err().unwrap();
    assert!(matches!(&error, AdoptError::Dead(death) if death.to_string().contains("triple fault")));
    assert!(matches!(Sandbox::adopt(base.path(), "nosuch").await, Err(AdoptError::Dead(_))));
}

#[tokio::test]
async fn the_sweep_kills_what_nobody_knows_and_spares_the_rest() {
    let base = tempfile::tempdir().unwrap();
    let (_v1, _c1, mut known) = running(base.path(), "known");
    let (_v2, _c2, mut stray) = running(base.path(), "stray");
    sweep(base.path(), &HashSet::from(["known".to_owned()])).await.unwrap();
    assert!(stray.wait().is_err(), "it was killed, and reaped by its pidfd");
    assert!(!base.path().join("stray").exists());
    assert!(known.try_wait().unwrap().is_none());
    assert!(base.path().join("known").exists());
    known.kill().unwrap();
    known.wait().unwrap();
}
