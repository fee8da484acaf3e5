//! The host's end of a guest's vsock: the VMM's Unix socket and its one-line commands.

use std::io;

use bulkhead_vmm_api::vsock::MAX_COMMAND;
use rustix::net::SocketType;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

use super::dir::{SandboxDir, VSOCK};

/// Connects to the guest's port.
pub(super) async fn connect(dir: &SandboxDir, port: u32) -> io::Result<UnixStream> {
    command(dir, &format!("CONNECT {port}\n")).await
}

/// Waits until the guest connects to the host's port.
pub(super) async fn listen(dir: &SandboxDir, port: u32) -> io::Result<UnixStream> {
    command(dir, &format!("LISTEN {port}\n")).await
}

async fn command(dir: &SandboxDir, line: &str) -> io::Result<UnixStream> {
    let stream = std::os::unix::net::UnixStream::from(dir.connect(VSOCK, SocketType::STREAM)?);
    let mut stream = UnixStream::from_std(stream)?;
    stream.write_all(line.as_bytes()).await?;
    // Byte by byte: what follows the line is the guest's.
    let mut answer = Vec::with_capacity(MAX_COMMAND);
    while answer.last() != Some(&b'\n') {
        if answer.len() == MAX_COMMAND {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the VMM's vsock answer is too long"));
        }
        match stream.read_u8().await {
            Ok(byte) => answer.push(byte),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(io::Error::new(io::ErrorKind::ConnectionRefused, "the guest does not answer"));
            }
            Err(error) => return Err(error),
        }
    }
    if answer.starts_with(b"OK ") {
        Ok(stream)
    } else {
        Err(io::Error::new(io::ErrorKind::InvalidData, "the VMM's vsock answer is not valid"))
    }
}
