//! Published ports' sockets on the host, and what reaches them: connections that the packet filter does not
//! forward, which are those over loopback and those of another family than the container's.
//!
//! A bound socket is what makes a conflict be seen, and what answers from the moment that a start returns.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use tokio::{
    net::{TcpListener, TcpSocket, TcpStream, UdpSocket},
    sync::{Mutex, Semaphore},
    task::{JoinHandle, JoinSet},
};

use super::Forward;

/// Connections of one published port at a time.
const MAX_CONNECTIONS: usize = 1024;

/// Clients of one published UDP port at a time, and how long one may be silent.
const MAX_CLIENTS: usize = 256;
const SILENCE: Duration = Duration::from_secs(90);

/// How long the container may take to accept.
const CONNECT_WITHIN: Duration = Duration::from_secs(30);

/// A bound port. Dropped, it is free.
#[derive(Debug)]
pub(super) struct Bound {
    socket: Socket,
    address: SocketAddr,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Udp(UdpSocket),
}

/// A port that is served. Dropped, it is free.
#[derive(Debug)]
pub(super) struct Served(JoinHandle<()>);

impl Drop for Served {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Served {
    /// Ends it; when this returns the port is free.
    pub(super) async fn end(mut self) {
        self.0.abort();
        let _ = (&mut self.0).await;
    }
}

/// Binds a host's address and port; port 0 for any.
pub(super) fn bind(protocol: &str, address: SocketAddr) -> io::Result<Bound> {
    let socket = if protocol == "udp" {
        let kind = rustix::net::SocketType::DGRAM;
        let family = match address {
            SocketAddr::V4(_) => rustix::net::AddressFamily::INET,
            SocketAddr::V6(_) => rustix::net::AddressFamily::INET6,
        };
        let flags = rustix::net::SocketFlags::CLOEXEC | rustix::net::SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(family, kind, flags, None)?;
        if address.is_ipv6() {
            rustix::net::sockopt::set_ipv6_v6only(&socket, true)?;
        }
        rustix::net::bind(&socket, &address)?;
        Socket::Udp(UdpSocket::from_std(socket.into())?)
    } else {
        let socket = if address.is_ipv6() { TcpSocket::new_v6()? } else { TcpSocket::new_v4()? };
        if address.is_ipv6() {
            rustix::net::sockopt::set_ipv6_v6only(&socket, true)?;
        }
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        Socket::Tcp(socket.listen(1024)?)
    };
    let address = match &socket {
        Socket::Tcp(socket) => socket.local_addr()?,
        Socket::Udp(socket) => socket.local_addr()?,
    };
    Ok(Bound { socket, address })
}

impl Bound {
    /// What it is bound to.
    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Passes on what comes.
    pub(super) fn serve(self, forward: &Forward) -> Served {
        let to = forward.to;
        Served(match self.socket {
            Socket::Tcp(listener) => tokio::spawn(serve_tcp(listener, to)),
            Socket::Udp(socket) => tokio::spawn(serve_udp(socket, to)),
        })
    }
}

async fn serve_tcp(listener: TcpListener, to: SocketAddr) {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    // Dropped with this task: connections end with their port.
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((client, _)) => {
                connections.spawn(async move {
                    let _permit = permit;
                    if let Err(error) = pass(client, to).await {
                        tracing::debug!(%to, %error, "a proxied connection has ended");
                    }
                });
            }
            // Out of descriptors, for instance: it may pass.
            Err(error) => {
                tracing::warn!(%to, %error, "a published port cannot accept");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn pass(mut client: TcpStream, to: SocketAddr) -> io::Result<()> {
    let connect = tokio::time::timeout(CONNECT_WITHIN, TcpStream::connect(to));
    let mut container = connect.await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    let _ = (client.set_nodelay(true), container.set_nodelay(true));
    tokio::io::copy_bidirectional(&mut client, &mut container).await.map(drop)
}

type Clients = Arc<Mutex<HashMap<SocketAddr, Arc<UdpSocket>>>>;

async fn serve_udp(socket: UdpSocket, to: SocketAddr) {
    let socket = Arc::new(socket);
    let clients = Clients::default();
    let mut sessions = JoinSet::new();
    let mut buffer = vec![0; 65_536];
    loop {
        while sessions.try_join_next().is_some() {}
        let Ok((length, client)) = socket.recv_from(&mut buffer).await else {
            // An ICMP error of an earlier datagram.
            continue;
        };
        let known = clients.lock().await.get(&client).cloned();
        let upstream = match known {
            Some(upstream) => upstream,
            None => {
                if clients.lock().await.len() >= MAX_CLIENTS {
                    continue;
                }
                let Ok(upstream) = connect_udp(to).await else { continue };
                let upstream = Arc::new(upstream);
                clients.lock().await.insert(client, Arc::clone(&upstream));
                sessions.spawn(answer(
                    Arc::clone(&socket),
                    Arc::clone(&upstream),
                    client,
                    Arc::clone(&clients),
                ));
                upstream
            }
        };
        let _ = upstream.send(buffer.get(..length).unwrap_or_default()).await;
    }
}

async fn connect_udp(to: SocketAddr) -> io::Result<UdpSocket> {
    let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0u16; 8].into() };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(to).await?;
    Ok(socket)
}

/// Sends the container's answers to one client, until it has been silent for long.
async fn answer(socket: Arc<UdpSocket>, upstream: Arc<UdpSocket>, client: SocketAddr, clients: Clients) {
    let mut buffer = vec![0; 65_536];
    while let Ok(Ok(length)) = tokio::time::timeout(SILENCE, upstream.recv(&mut buffer)).await {
        let _ = socket.send_to(buffer.get(..length).unwrap_or_default(), client).await;
    }
    clients.lock().await.remove(&client);
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    fn any() -> SocketAddr {
        "127.0.0.1:0".parse().unwrap()
    }

    fn forward(protocol: &'static str, to: SocketAddr) -> Forward {
        Forward { protocol, host: any(), to }
    }

    #[tokio::test]
    async fn a_connection_is_passed_on_both_ways_with_its_ends() {
        let container = TcpListener::bind(any()).await.unwrap();
        let bound = bind("tcp", any()).unwrap();
        let address = bound.address();
        assert_eq!(bind("tcp", address).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        let served = bound.serve(&forward("tcp", container.local_addr().unwrap()));
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(b"question").await.unwrap();
        client.shutdown().await.unwrap();
        let (mut inside, _) = container.accept().await.unwrap();
        let mut text = String::new();
        inside.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "question");
        inside.write_all(b"answer").await.unwrap();
        drop(inside);
        text.clear();
        client.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "answer");
        served.end().await;
        bind("tcp", address).unwrap();
    }

    #[tokio::test]
    async fn datagrams_are_passed_on_and_answers_find_their_clients() {
        let container = UdpSocket::bind(any()).await.unwrap();
        let bound = bind("udp", any()).unwrap();
        let address = bound.address();
        let served = bound.serve(&forward("udp", container.local_addr().unwrap()));
        let clients = [UdpSocket::bind(any()).await.unwrap(), UdpSocket::bind(any()).await.unwrap()];
        for (number, client) in clients.iter().enumerate() {
            client.send_to(&[number as u8], address).await.unwrap();
        }
        let mut buffer = [0; 16];
        for _ in 0..2 {
            let (length, from) = container.recv_from(&mut buffer).await.unwrap();
            container.send_to(&[buffer[0] + 10], from).await.unwrap();
            assert_eq!(length, 1);
        }
        for (number, client) in clients.iter().enumerate() {
            client.recv_from(&mut buffer).await.unwrap();
            assert_eq!(usize::from(buffer[0]), number + 10);
        }
        served.end().await;
        bind("udp", address).unwrap();
    }
}
