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
use tracing::Instrument;

use super::{
    SERVER,
    listen::{Duplex, Socket, has_gone},
    requests,
    tls::Peer,
};
use crate::{
    api::{
        authorization::Authorization,
        error,
        request::{Call, Query, RequestBody},
        response::{Body, Reply, status},
        router::{self, Lifetime, Route},
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

/// Serves a connection to its end: requests are the engine's.
pub(super) async fn serve(
    engine: Arc<Engine>,
    authorization: Arc<Authorization>,
    socket: Socket,
    stop: watch::Receiver<bool>,
) {
    let _counted = requests::Connection::new();
    let peer = socket.peer.clone();
    let context = Arc::new((engine, authorization, peer));
    serve_with(socket, stop, move |request| handle(Arc::clone(&context), request)).await;
}

async fn serve_with<H, F>(socket: Socket, mut stop: watch::Receiver<bool>, handle: H)
where
    H: Fn(Request<Incoming>) -> F + Unpin,
    F: Future<Output = Result<Reply>>,
{
    let handover = Arc::new(Handover::default());
    let gate = Gate { stream: socket.stream, handover: Arc::clone(&handover) };
    let for_requests = Arc::clone(&handover);
    let service = service_fn(move |request: Request<Incoming>| {
        let handover = Arc::clone(&for_requests);
        // Whatever is logged for the request's sake carries its number.
        let span = tracing::info_span!(
            "request",
            id = requests::next_id(),
            method = %request.method(),
            path = request.uri().path()
        );
        let handled = span.in_scope(|| handle(request));
        Box::pin(
            async move {
                let response = respond(handled.await, &handover);
                requests::served(response.status());
                tracing::debug!(status = response.status().as_u16(), "served");
                Ok::<_, Infallible>(response)
            }
            .instrument(span),
        )
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

fn respond(handled: Result<Reply>, handover: &Handover) -> Response<Body> {
    let mut response = match handled {
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
    set(HeaderName::from_static("docker-experimental"), "true".to_owned());
}

async fn handle(
    context: Arc<(Arc<Engine>, Arc<Authorization>, Peer)>,
    request: Request<Incoming>,
) -> Result<Reply> {
    let (engine, authorization, peer) = &*context;
    let (head, body) = request.into_parts();
    let mut body = RequestBody::new(body);
    let found = router::find(&head.method, head.uri.path())?;
    let query = Query::parse(head.uri.query().unwrap_or_default())?;
    let settings = engine.settings();
    let plugins = settings.authorization_plugins.as_slice();
    let allowed = match plugins {
        [] => None,
        _ => Some(authorization.ask(plugins, peer.certificates(), &head, &mut body, found.route).await?),
    };
    let engine = Arc::clone(engine);
    let call = Call { engine, version: found.version, params: found.params, query, head, body };
    let answer = answer(found.route, call).await;
    match allowed {
        None => answer,
        Some(allowed) => allowed.answer(answer).await,
    }
}

async fn answer(route: &Route, call: Call) -> Result<Reply> {
    let handled = (route.handler)(call);
    // A bug in one request is that request's error.
    let handled = AssertUnwindSafe(handled).catch_unwind();
    let handled =
        async { handled.await.unwrap_or_else(|_| Err(Error::internal("the daemon failed: see its log"))) };
    match route.lifetime {
        Lifetime::WhileConnected => handled.await,
        // hyper drops this future when the client goes; the task goes on.
        Lifetime::ToEnd => match tokio::spawn(handled.in_current_span()).await {
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

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use bytes::Bytes;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::UnixStream,
        sync::mpsc,
    };

    use super::*;
    use crate::{
        api::{response::no_content, stream::RAW},
        engine::{Attachment, Output, logs::Stream},
    };

    /// A process that says its input in return, in capitals.
    fn shouting() -> Attachment {
        let (stdin, mut input) = mpsc::channel::<Bytes>(4);
        let (sender, output) = mpsc::channel(4);
        tokio::spawn(async move {
            while let Some(bytes) = input.recv().await {
                let bytes = bytes.to_ascii_uppercase().into();
                let _ = sender.send(Output { stream: Stream::Stdout, bytes }).await;
            }
        });
        Attachment { terminal: true, stdin: Some(stdin), output }
    }

    async fn scripted(request: Request<Incoming>) -> Result<Reply> {
        match request.uri().path() {
            "/attach" => Ok(Reply::Hijack(Hijack::stdio(request.headers(), RAW, shouting(), None))),
            "/refuse" => {
                drop(RequestBody::new(request.into_body()));
                Err(Error::conflict("no"))
            }
            _ => Ok(no_content().into()),
        }
    }

    fn client() -> (UnixStream, watch::Sender<bool>) {
        let (client, server) = UnixStream::pair().unwrap();
        let watch = server.as_fd().try_clone_to_owned().ok();
        let (stop, stopped) = watch::channel(false);
        tokio::spawn(serve_with(
            Socket { stream: Box::new(server), watch, peer: Peer::default() },
            stopped,
            scripted,
        ));
        (client, stop)
    }

    async fn head(client: &mut UnixStream) -> String {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(client.read_u8().await.unwrap());
        }
        String::from_utf8(head).unwrap()
    }

    #[tokio::test]
    async fn a_connection_serves_many_requests_and_then_becomes_a_process() {
        for (headers, first_line) in
            [("Upgrade: tcp\r\nConnection: Upgrade\r\n", "HTTP/1.1 101 UPGRADED"), ("", "HTTP/1.1 200 OK")]
        {
            let (mut client, _stop) = client();
            client.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
            let plain = head(&mut client).await.to_lowercase();
            assert!(plain.starts_with("http/1.1 204"), "{plain}");
            for header in
                ["server: docker/", "api-version: 1.50", "ostype: linux", "docker-experimental: true"]
            {
                assert!(plain.contains(header), "{plain}");
            }
            // Input that comes with the request is the process's.
            let request =
                format!("POST /attach HTTP/1.1\r\nHost: a\r\n{headers}Content-Length: 0\r\n\r\nearly ");
            client.write_all(request.as_bytes()).await.unwrap();
            let taken = head(&mut client).await;
            assert_eq!(taken.lines().next(), Some(first_line));
            client.write_all(b"late").await.unwrap();
            client.shutdown().await.unwrap();
            let mut output = String::new();
            client.read_to_string(&mut output).await.unwrap();
            assert_eq!(output, "EARLY LATE");
        }
    }

    #[tokio::test]
    async fn a_refusal_is_heard_though_its_request_has_a_large_body() {
        let (mut client, _stop) = client();
        let body = vec![b'x'; 4 << 20];
        let request = format!("POST /refuse HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n", body.len());
        client.write_all(request.as_bytes()).await.unwrap();
        client.write_all(&body).await.unwrap();
        assert!(head(&mut client).await.starts_with("HTTP/1.1 409"));
        let mut message = [0; 17];
        client.read_exact(&mut message).await.unwrap();
        assert_eq!(&message, b"{\"message\":\"no\"}\n");
        // The connection is good for more.
        client.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
        assert!(head(&mut client).await.starts_with("HTTP/1.1 204"));
    }

    #[tokio::test]
    async fn an_idle_connection_ends_when_the_server_stops() {
        let (mut client, stop) = client();
        stop.send_replace(true);
        assert_eq!(client.read(&mut [0; 1]).await.unwrap(), 0);
    }
}
