//! Listening sockets: Unix, TCP, and those that systemd passed.

use std::{
    io,
    os::{
        fd::{AsFd, FromRawFd, OwnedFd},
        unix::fs::{FileTypeExt, PermissionsExt},
    },
    path::{Path, PathBuf},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
};
use tokio_rustls::TlsAcceptor;

use super::tls::Peer;
use crate::config::{Config, Host};

/// Both directions of a connection.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// An accepted connection.
pub struct Socket {
    /// Its bytes, in the clear.
    pub stream: Box<dyn Duplex>,
    /// The socket below, to see when its peer has gone.
    pub watch: Option<OwnedFd>,
    /// Who is at its other end.
    pub peer: Peer,
}

/// A listening socket. A Unix socket that we made is unlinked when it is dropped.
pub struct Listener {
    kind: Kind,
    made: Option<PathBuf>,
}

enum Kind {
    Unix(UnixListener),
    Tcp(TcpListener, Option<TlsAcceptor>),
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(path) = &self.made {
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Listener {
    /// The next connection.
    ///
    /// # Errors
    /// The system's. A failed TLS handshake is the connection's own error, told when it is read.
    pub async fn accept(&self) -> io::Result<Socket> {
        match &self.kind {
            Kind::Unix(listener) => {
                let (stream, _) = listener.accept().await?;
                let watch = stream.as_fd().try_clone_to_owned().ok();
                Ok(Socket { stream: Box::new(stream), watch, peer: Peer::default() })
            }
            Kind::Tcp(listener, tls) => {
                let (stream, _) = listener.accept().await?;
                stream.set_nodelay(true)?;
                let watch = stream.as_fd().try_clone_to_owned().ok();
                let peer = Peer::default();
                let stream: Box<dyn Duplex> = match tls {
                    None => Box::new(stream),
                    Some(tls) => Box::new(super::tls::Lazy::new(tls, stream, peer.clone())),
                };
                Ok(Socket { stream, watch, peer })
            }
        }
    }
}

/// Whether a connection is closed in both directions, or broken.
pub(super) fn has_gone(socket: &OwnedFd) -> bool {
    // No events asked for: errors and hang-ups are told anyway.
    let mut fds = [PollFd::new(socket.as_fd(), PollFlags::empty())];
    poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
        && fds[0].revents().is_some_and(|events| events.intersects(PollFlags::POLLHUP | PollFlags::POLLERR))
}

/// Opens a host's sockets.
///
/// # Errors
/// With the address in the text.
pub(super) fn open(host: &Host, config: &Config, tls: Option<&TlsAcceptor>) -> io::Result<Vec<Listener>> {
    let told =
        |error: io::Error| io::Error::new(error.kind(), format!("can't create socket {host}: {error}"));
    match host {
        Host::Unix(path) => Ok(vec![unix(path, config).map_err(told)?]),
        Host::Tcp(address) => {
            let listener = std::net::TcpListener::bind(address.as_str()).map_err(told)?;
            if tls.is_none() {
                tracing::warn!(%address, "the API is served without TLS: whoever reaches it is root on this machine");
            }
            Ok(vec![from_tcp(listener, tls).map_err(told)?])
        }
        Host::Fd(name) => from_systemd(name.as_deref(), tls).map_err(told),
    }
}

fn from_tcp(listener: std::net::TcpListener, tls: Option<&TlsAcceptor>) -> io::Result<Listener> {
    listener.set_nonblocking(true)?;
    Ok(Listener { kind: Kind::Tcp(TcpListener::from_std(listener)?, tls.cloned()), made: None })
}

fn unix(path: &Path, config: &Config) -> io::Result<Listener> {
    remove_stale(path)?;
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)?;
    }
    // Nobody may connect before the mode is set: the socket is born without any.
    let listener = {
        let _umask = Umask::set(0o777);
        UnixListener::bind(path)?
    };
    let made = Listener { kind: Kind::Unix(listener), made: Some(path.to_owned()) };
    let (group, chosen) = &config.group;
    match group_id(group)? {
        Some(gid) => std::os::unix::fs::chown(path, None, Some(gid))?,
        None if *chosen => return Err(io::Error::other(format!("group {group} not found"))),
        None => tracing::debug!(%group, "there is no such group: the socket is root's alone"),
    }
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))?;
    Ok(made)
}

/// The process's file mode mask, set for a moment. Sockets are opened before other threads make files.
struct Umask(nix::sys::stat::Mode);

impl Umask {
    fn set(mask: u32) -> Self {
        Self(nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(mask)))
    }
}

impl Drop for Umask {
    fn drop(&mut self) {
        nix::sys::stat::umask(self.0);
    }
}

/// A socket that a dead daemon left behind is in the way; one that somebody serves is not ours to take.
fn remove_stale(path: &Path) -> io::Result<()> {
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "the path exists and is not a socket"));
        }
        Ok(_) => {}
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path),
        Err(error) => Err(error),
        Ok(_) => Err(io::Error::new(io::ErrorKind::AddrInUse, "another daemon serves it")),
    }
}

fn group_id(name: &str) -> io::Result<Option<u32>> {
    if let Ok(gid) = name.parse() {
        return Ok(Some(gid));
    }
    Ok(nix::unistd::Group::from_name(name)?.map(|group| group.gid.as_raw()))
}

/// The sockets that systemd passed: `LISTEN_PID`, `LISTEN_FDS`, `LISTEN_FDNAMES` (sd_listen_fds(3)).
fn from_systemd(name: Option<&str>, tls: Option<&TlsAcceptor>) -> io::Result<Vec<Listener>> {
    const FIRST: i32 = 3;
    let variable = |name: &str| std::env::var(name).unwrap_or_default();
    let ours = variable("LISTEN_PID").parse() == Ok(std::process::id());
    let count: i32 = if ours { variable("LISTEN_FDS").parse().unwrap_or(0) } else { 0 };
    let names = variable("LISTEN_FDNAMES");
    let mut names = names.split(':');
    let mut listeners = Vec::new();
    for number in FIRST..FIRST.saturating_add(count) {
        if name.is_some_and(|wanted| names.next() != Some(wanted)) {
            continue;
        }
        // SAFETY: by systemd's protocol these descriptors were opened for this very process and nobody here
        // has taken them before: `LISTEN_PID` is ours, and the configuration names `fd://` sockets once.
        let fd = unsafe { OwnedFd::from_raw_fd(number) };
        nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))?;
        let domain: nix::sys::socket::SockaddrStorage =
            nix::sys::socket::getsockname(std::os::fd::AsRawFd::as_raw_fd(&fd))?;
        if domain.as_unix_addr().is_some() {
            let listener = std::os::unix::net::UnixListener::from(fd);
            listener.set_nonblocking(true)?;
            listeners.push(Listener { kind: Kind::Unix(UnixListener::from_std(listener)?), made: None });
        } else {
            listeners.push(from_tcp(fd.into(), tls)?);
        }
    }
    if listeners.is_empty() {
        return Err(io::Error::other(
            "no sockets found via socket activation: make sure the service was started by systemd",
        ));
    }
    Ok(listeners)
}
