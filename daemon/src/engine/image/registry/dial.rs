//! Connections: TCP, through a proxy where the environment names one, with errors in Go's words.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use http::Uri;
use hyper_util::{
    client::{legacy::connect::proxy::Tunnel, proxy::matcher::Matcher},
    rt::TokioIo,
};
use tokio::net::TcpStream;
use tower_service::Service;

use super::endpoint::host_of;

/// Makes connections. `HTTP_PROXY`, `HTTPS_PROXY` and `NO_PROXY` of the daemon's environment are honoured
/// (by `CONNECT`), as dockerd does.
#[derive(Clone)]
pub(super) struct Dialer {
    proxies: Arc<Matcher>,
    timeout: Duration,
}

type Connecting = Pin<Box<dyn Future<Output = io::Result<TokioIo<TcpStream>>> + Send>>;

impl Dialer {
    /// Gives up on an address after `timeout`.
    pub(super) fn new(timeout: Duration) -> Self {
        Self { proxies: Arc::new(Matcher::from_env()), timeout }
    }
}

impl Service<Uri> for Dialer {
    type Response = TokioIo<TcpStream>;
    type Error = io::Error;
    type Future = Connecting;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, target: Uri) -> Connecting {
        let timeout = self.timeout;
        // Loopback is never behind a proxy.
        let loopback = target.host().is_some_and(|host| {
            let host = host.trim_matches(['[', ']']);
            host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
        });
        match self.proxies.intercept(&target).filter(|_| !loopback) {
            None => Box::pin(connect(target, timeout)),
            Some(proxy) => {
                let mut tunnel = Tunnel::new(proxy.uri().clone(), Direct(timeout));
                if let Some(auth) = proxy.basic_auth() {
                    tunnel = tunnel.with_auth(auth.clone());
                }
                Box::pin(async move {
                    tunnel
                        .call(target)
                        .await
                        .map_err(|error| io::Error::other(format!("proxyconnect tcp: {error}")))
                })
            }
        }
    }
}

/// Without a proxy: the way to the proxy itself.
#[derive(Clone)]
struct Direct(Duration);

impl Service<Uri> for Direct {
    type Response = TokioIo<TcpStream>;
    type Error = io::Error;
    type Future = Connecting;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, target: Uri) -> Connecting {
        Box::pin(connect(target, self.0))
    }
}

async fn connect(target: Uri, timeout: Duration) -> io::Result<TokioIo<TcpStream>> {
    let host = target.authority().map_or("", |authority| host_of(authority.as_str()));
    let port = target.port_u16().unwrap_or(if target.scheme_str() == Some("https") { 443 } else { 80 });
    let addresses = tokio::time::timeout(timeout, tokio::net::lookup_host((host, port))).await;
    let addresses = addresses
        .map_err(|_| io::Error::other(format!("dial tcp: lookup {host}: i/o timeout")))?
        .map_err(|_| io::Error::other(format!("dial tcp: lookup {host}: no such host")))?;
    let mut last = io::Error::other(format!("dial tcp: lookup {host}: no such host"));
    for address in addresses {
        match tokio::time::timeout(timeout, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => {
                stream.set_nodelay(true)?;
                return Ok(TokioIo::new(stream));
            }
            Ok(Err(error)) => {
                last =
                    io::Error::new(error.kind(), format!("dial tcp {address}: connect: {}", reason(&error)));
            }
            Err(_) => last = io::Error::other(format!("dial tcp {address}: i/o timeout")),
        }
    }
    Err(last)
}

fn reason(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => "connection refused".to_owned(),
        io::ErrorKind::HostUnreachable => "no route to host".to_owned(),
        io::ErrorKind::NetworkUnreachable => "network is unreachable".to_owned(),
        io::ErrorKind::ConnectionReset => "connection reset by peer".to_owned(),
        _ => error.to_string(),
    }
}
