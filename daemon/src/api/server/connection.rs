//! One connection: HTTP/1.1 until it ends, or until it is taken over.

use std::{
    convert::Infallible,
    io,
    panic::AssertUnwindSafe,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use futures_util::FutureExt;
use http::{
    Request, Response,
    header::{CONNECTION, HeaderName, HeaderValue, SERVER as SERVER_HEADER},
};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::watch,
};

use super::{
    SERVER,
    listen::{Duplex, Socket, has_gone},
};
use crate::{
    api::{
        error,
        request::{Call, Query},
        response::{Body, Reply, status},
        router::{self, Lifetime},
        stream::hijack::{Hijack, Taken},
        version,
    },
    engine::{Engine, Error, Result},
};

/// How long a request's head may take, and a connection be idle: dockerd's.
const HEAD_TIMEOUT: Duration = Duration::from_secs(300);

/// How often a half-closed, silent connection is looked at.
const GONE_CHECK: Duration = Duration::from_secs(5);

/// What a handler leaves for the connection when it takes it over.
#[derive(Default)]
struct Handover {
    hijack: Mutex<Option<Hijack>>,
    /// From now on what hyper writes is not for the client.
    swallow: AtomicBool,
}

/// Serves a connection to its end.
pub(super) async fn serve(engine: Arc<Engine>, socket: Socket, mut stop: watch::Receiver<bool>) {
    let handover = Arc::new(Handover::default());
    let gate = Gate { stream: socket.stream, handover: Arc::clone(&handover) };
    let for_requests = Arc::clone(&handover);
    let service = service_fn(move |request: Request<Incoming>| {
        let (engine, handover) = (Arc::clone(&engine), Arc::clone(&for_requests));
        Box::pin(async move { Ok::<_, Infallible>(respond(engine, request, &handover).await) })
    });
    let mut connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .serve_connection(TokioIo::new(gate), service);
    let mut stopping = false;
    loop {
        let served = tokio::select! {
            served = std::future::poll_fn(|context| connection.poll_without_shutdown(context)) => served,
            _ = stop.wait_for(|stop| *stop), if !stopping => {
                stopping = true;
                Pin::new(&mut connection).graceful_shutdown();
                continue;
            }
        };
        match served {
            Ok(()) => break,
            Err(error) => return tracing::debug!(%error, "a connection ended early"),
        }
    }
    let parts = connection.into_parts();
    let hijack = handover.hijack.lock().unwrap_or_else(PoisonError::into_inner).take();
    let stream = parts.io.into_inner().stream;
    match hijack {
        Some(hijack) => {
            let (reader, writer) = tokio::io::split(stream);
            let (reader, writer) = (Box::new(reader), Box::new(writer));
            let gone = Box::pin(wait_until_gone(socket.watch));
            hijack.run(Taken { early: parts.read_buf, reader, writer, gone }).await;
        }
        None => {
            let mut stream = stream;
            let _ = tokio::io::AsyncWriteExt::shutdown(&mut stream).await;
        }
    }
}

async fn wait_until_gone(socket: Option<std::os::fd::OwnedFd>) {
    let Some(socket) = socket else { return std::future::pending().await };
    while !has_gone(&socket) {
        tokio::time::sleep(GONE_CHECK).await;
    }
}

async fn respond(engine: Arc<Engine>, request: Request<Incoming>, handover: &Handover) -> Response<Body> {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let mut response = match handle(engine, request).await {
        Ok(Reply::Response(response)) => response,
        Ok(Reply::Hijack(hijack)) => {
            *handover.hijack.lock().unwrap_or_else(PoisonError::into_inner) = Some(hijack);
            handover.swallow.store(true, Ordering::Release);
            // hyper is to let the connection go after this response, which nobody sees.
            let mut response = status(http::StatusCode::OK);
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            response
        }
        Err(error) => error::response(&error),
    };
    tracing::debug!(%method, path, status = response.status().as_u16(), "served");
    common_headers(&mut response);
    response
}

/// What every response says.
fn common_headers(response: &mut Response<Body>) {
    let headers = response.headers_mut();
    let mut set = |name: HeaderName, value: String| {
        if let Ok(value) = HeaderValue::try_from(value) {
            headers.insert(name, value);
        }
    };
    set(SERVER_HEADER, SERVER.to_string());
    set(HeaderName::from_static("api-version"), version::CURRENT.to_string());
    set(HeaderName::from_static("ostype"), "linux".to_owned());
    set(HeaderName::from_static("docker-experimental"), "false".to_owned());
}

async fn handle(engine: Arc<Engine>, request: Request<Incoming>) -> Result<Reply> {
    let found = router::find(request.method(), request.uri().path())?;
    let query = Query::parse(request.uri().query().unwrap_or_default())?;
    let (head, body) = request.into_parts();
    let call = Call { engine, version: found.version, params: found.params, query, head, body };
    let handled = (found.route.handler)(call);
    // A bug in one request is that request's error.
    let handled = AssertUnwindSafe(handled).catch_unwind();
    let handled =
        async { handled.await.unwrap_or_else(|_| Err(Error::internal("the daemon failed: see its log"))) };
    match found.route.lifetime {
        Lifetime::WhileConnected => handled.await,
        // hyper drops this future when the client goes; the task goes on.
        Lifetime::ToEnd => match tokio::spawn(handled).await {
            Ok(handled) => handled,
            Err(error) => Err(Error::internal(error.to_string())),
        },
    }
}

/// A stream that hyper reads and writes, until its writes are swallowed.
struct Gate {
    stream: Box<dyn Duplex>,
    handover: Arc<Handover>,
}

impl AsyncRead for Gate {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buf)
    }
}

impl AsyncWrite for Gate {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.handover.swallow.load(Ordering::Acquire) {
            return Poll::Ready(Ok(buf.len()));
        }
        Pin::new(&mut self.stream).poll_write(context, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
