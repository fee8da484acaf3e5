//! Where connections to pinned addresses go: each is looked at before it is passed on.
//!
//! ```text
//!   guest ─▶ accepted ─▶ first bytes ─┬─ a TLS client's: the server's name ─┬─▶ judge ─▶ passed on, or ended
//!                                     ├─ something else ────────────────────┤
//!                                     └─ nothing, and the server speaks ────┘
//! ```

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    sync::Arc,
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinSet,
};

use super::hello::{self, Hello};

/// Connections of one endpoint at a time.
const MAX_CONNECTIONS: usize = 512;

/// How long the other side may take to accept, and the guest to say what it wants where it must.
const CONNECT_WITHIN: Duration = Duration::from_secs(30);
const HELLO_WITHIN: Duration = Duration::from_secs(30);

/// The port on which nothing but TLS is expected.
const HTTPS: u16 = 443;

/// Decides about connections to pinned addresses.
pub trait Judge: Send + Sync + 'static {
    /// Whether a TLS client may reach this server there; None: it names none.
    fn permits_server(&self, to: SocketAddr, server: Option<&str>) -> bool;

    /// Whether something that is not TLS may be sent there.
    fn permits_plain(&self, to: SocketAddr) -> bool;
}

/// Serves an endpoint, which has these addresses, for ever.
pub(super) async fn serve(listener: TcpListener, guest: Vec<IpAddr>, judge: Arc<dyn Judge>) {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    // Dropped with this task: connections end with their endpoint.
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
        let (client, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            // Out of descriptors, for instance: it may pass.
            Err(error) => {
                tracing::warn!(%error, "an egress proxy cannot accept");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        // The port can be seen by others, who have no business here.
        if !guest.contains(&from.ip()) {
            continue;
        }
        let judge = Arc::clone(&judge);
        connections.spawn(async move {
            let _permit = permit;
            if let Err(error) = judged(client, &*judge).await {
                tracing::debug!(%from, %error, "a connection through an egress proxy has ended");
            }
        });
    }
}

async fn judged(client: TcpStream, judge: &dyn Judge) -> io::Result<()> {
    let to = original_destination(client.as_fd(), client.local_addr()?.is_ipv4())?;
    // Nobody led it here.
    if to == client.local_addr()? {
        return Ok(());
    }
    pass(client, to, judge).await
}

async fn pass(mut client: TcpStream, to: SocketAddr, judge: &dyn Judge) -> io::Result<()> {
    // Where a server may be the first to speak, it must be there to do so.
    let early = if to.port() == HTTPS { None } else { Some(connect(to).await?) };
    let mut held = Vec::new();
    let asked = async {
        loop {
            match hello::read(&held) {
                Hello::Incomplete => {}
                told => return Ok::<_, io::Error>(told),
            }
            tokio::select! {
                read = client.read_buf(&mut held) => if read? == 0 { return Ok(Hello::Other) },
                () = spoken(early.as_ref()) => return Ok(Hello::Other),
            }
        }
    };
    let asked = if early.is_some() {
        asked.await?
    } else {
        tokio::time::timeout(HELLO_WITHIN, asked).await.map_err(|_| io::ErrorKind::TimedOut)??
    };
    let permitted = match &asked {
        Hello::Client(server) => judge.permits_server(to, server.as_deref()),
        Hello::Other | Hello::Incomplete => to.port() != HTTPS && judge.permits_plain(to),
    };
    if !permitted {
        return Ok(());
    }
    let mut server = match early {
        Some(server) => server,
        None => connect(to).await?,
    };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    server.write_all(&held).await?;
    tokio::io::copy_bidirectional(&mut client, &mut server).await.map(drop)
}

async fn connect(to: SocketAddr) -> io::Result<TcpStream> {
    let connected = tokio::time::timeout(CONNECT_WITHIN, TcpStream::connect(to)).await;
    connected.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

/// Returns when a server that is there has spoken, or has ended.
async fn spoken(server: Option<&TcpStream>) {
    match server {
        Some(server) => drop(server.readable().await),
        None => std::future::pending().await,
    }
}

/// Where a connection was meant to go before the packet filter led it here.
fn original_destination(socket: BorrowedFd<'_>, ipv4: bool) -> io::Result<SocketAddr> {
    /// `SO_ORIGINAL_DST` and `IP6T_SO_ORIGINAL_DST`.
    const ORIGINAL_DESTINATION: libc::c_int = 80;
    // SAFETY: zero is a valid sockaddr_storage.
    let mut address: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
    let mut length = libc::socklen_t::try_from(size_of_val(&address)).map_err(io::Error::other)?;
    let level = if ipv4 { libc::SOL_IP } else { libc::SOL_IPV6 };
    // SAFETY: the kernel writes at most `length` bytes to `address`, which is that long.
    let got = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            ORIGINAL_DESTINATION,
            (&raw mut address).cast(),
            &raw mut length,
        )
    };
    if got < 0 {
        return Err(io::Error::last_os_error());
    }
    if ipv4 {
        // SAFETY: of this level, the kernel has written a sockaddr_in, for which a sockaddr_storage is large and
        // aligned enough.
        let address: libc::sockaddr_in = unsafe { (&raw const address).cast::<libc::sockaddr_in>().read() };
        let ip = Ipv4Addr::from(u32::from_be(address.sin_addr.s_addr));
        Ok(SocketAddr::new(ip.into(), u16::from_be(address.sin_port)))
    } else {
        // SAFETY: of this level, a sockaddr_in6, as above.
        let address: libc::sockaddr_in6 = unsafe { (&raw const address).cast::<libc::sockaddr_in6>().read() };
        let ip = Ipv6Addr::from(address.sin6_addr.s6_addr);
        Ok(SocketAddr::new(ip.into(), u16::from_be(address.sin6_port)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Permits plain text, and a server named `good`.
    struct Named;

    impl Judge for Named {
        fn permits_server(&self, _: SocketAddr, server: Option<&str>) -> bool {
            server == Some("good")
        }

        fn permits_plain(&self, _: SocketAddr) -> bool {
            true
        }
    }

    struct Nobody;

    impl Judge for Nobody {
        fn permits_server(&self, _: SocketAddr, _: Option<&str>) -> bool {
            false
        }

        fn permits_plain(&self, _: SocketAddr) -> bool {
            false
        }
    }

    /// A guest's connection, and the server that it is for.
    async fn pair(judge: impl Judge) -> (TcpStream, TcpListener) {
        let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(proxy.local_addr().unwrap()).await.unwrap();
        let (accepted, _) = proxy.accept().await.unwrap();
        let to = server.local_addr().unwrap();
        tokio::spawn(async move { pass(accepted, to, &judge).await });
        (client, server)
    }

    async fn through(judge: impl Judge, first: &[u8]) -> Vec<u8> {
        let (mut client, server) = pair(judge).await;
        client.write_all(first).await.unwrap();
        client.shutdown().await.unwrap();
        let (mut inside, _) = server.accept().await.unwrap();
        let mut got = Vec::new();
        inside.read_to_end(&mut got).await.unwrap();
        got
    }

    #[tokio::test]
    async fn what_is_permitted_arrives_whole_and_nothing_else_does() {
        let good = hello::tests::client(&[hello::tests::named("good")], 50);
        let evil = hello::tests::client(&[hello::tests::named("evil")], 50);
        assert_eq!(through(Named, &good).await, good);
        assert_eq!(through(Named, b"GET / HTTP/1.0\r\n\r\n").await, b"GET / HTTP/1.0\r\n\r\n");
        assert_eq!(through(Named, &evil).await, b"");
        assert_eq!(through(Nobody, &good).await, b"");
        assert_eq!(through(Nobody, b"hello").await, b"");
    }

    #[tokio::test]
    async fn a_server_may_speak_first() {
        let (mut client, server) = pair(Named).await;
        let (mut inside, _) = server.accept().await.unwrap();
        inside.write_all(b"220 ready").await.unwrap();
        let mut got = [0; 9];
        client.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"220 ready");
        client.write_all(b"HELO").await.unwrap();
        let mut got = [0; 4];
        inside.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"HELO");
    }
}
