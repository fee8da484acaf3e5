//! TLS of TCP sockets.

use std::{
    future::Future,
    io,
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll, ready},
    time::Duration,
};

use rustls::{
    RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::WebPkiClientVerifier,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use crate::config::Tls;

/// How long a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// What the configuration says, None when TCP is plain.
///
/// # Errors
/// A file cannot be read, or is not what it should be.
pub(super) fn acceptor(tls: &Tls) -> io::Result<Option<TlsAcceptor>> {
    let Tls::On { cert, key, client_ca } = tls else { return Ok(None) };
    let told = |path: &std::path::Path, error: &dyn std::fmt::Display| {
        io::Error::other(format!("TLS: {}: {error}", path.display()))
    };
    let certificates = |path: &std::path::Path| -> io::Result<Vec<_>> {
        CertificateDer::pem_file_iter(path)
            .and_then(Iterator::collect::<Result<Vec<_>, _>>)
            .map_err(|error| told(path, &error))
    };
    let chain = certificates(cert)?;
    let key_der = PrivateKeyDer::from_pem_file(key).map_err(|error| told(key, &error))?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?;
    let builder = match client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let mut roots = RootCertStore::empty();
            for certificate in certificates(path)? {
                roots.add(certificate).map_err(|error| told(path, &error))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                .build()
                .map_err(|error| told(path, &error))?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let config = builder.with_single_cert(chain, key_der).map_err(|error| told(cert, &error))?;
    Ok(Some(TlsAcceptor::from(Arc::new(config))))
}

/// Who a client is, by the certificate chain that it has shown and that was verified.
#[derive(Debug, Clone, Default)]
pub struct Peer(Arc<OnceLock<Vec<CertificateDer<'static>>>>);

impl Peer {
    /// Its chain, its own first: empty until the handshake is over, and for who shows none.
    pub fn certificates(&self) -> &[CertificateDer<'static>] {
        self.0.get().map_or(&[], Vec::as_slice)
    }
}

type Handshake = Pin<Box<dyn Future<Output = io::Result<TlsStream<TcpStream>>> + Send>>;

/// A connection whose handshake happens when it is first used: in its own task, not in the listener's.
pub(super) struct Lazy {
    state: State,
    peer: Peer,
}

enum State {
    Handshake(Handshake),
    Ready(Box<TlsStream<TcpStream>>),
}

impl Lazy {
    /// A connection that was just accepted.
    pub(super) fn new(tls: &TlsAcceptor, stream: TcpStream, peer: Peer) -> Self {
        let handshake = tokio::time::timeout(HANDSHAKE, tls.accept(stream));
        let handshake = Box::pin(async { handshake.await.map_err(io::Error::from)? });
        Self { state: State::Handshake(handshake), peer }
    }

    fn ready(&mut self, context: &mut Context<'_>) -> Poll<io::Result<Pin<&mut TlsStream<TcpStream>>>> {
        if let State::Handshake(handshake) = &mut self.state {
            let stream = ready!(handshake.as_mut().poll(context))?;
            if let Some(chain) = stream.get_ref().1.peer_certificates() {
                let _ = self.peer.0.set(chain.iter().map(|one| one.clone().into_owned()).collect());
            }
            self.state = State::Ready(Box::new(stream));
        }
        match &mut self.state {
            State::Ready(stream) => Poll::Ready(Ok(Pin::new(stream))),
            State::Handshake(_) => Poll::Pending,
        }
    }
}

impl AsyncRead for Lazy {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        ready!(self.ready(context))?.poll_read(context, buf)
    }
}

impl AsyncWrite for Lazy {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(self.ready(context))?.poll_write(context, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.ready(context))?.poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.ready(context))?.poll_shutdown(context)
    }
}
