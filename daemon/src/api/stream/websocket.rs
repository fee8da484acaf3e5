//! A process's stdio over a WebSocket (RFC 6455), for clients that cannot take a connection over.
//!
//! ```text
//!  client: GET …/attach/ws, Upgrade: websocket, Sec-WebSocket-Key: K
//!  server: 101, Sec-WebSocket-Accept: base64(SHA-1(K + magic))
//!  ◀══ binary messages: output as it comes, never multiplexed │ binary or text messages: input ══▶
//!  process is done ─▶ close     client closes ─▶ end of the process's input; output ends with the connection
//! ```

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use http::{HeaderMap, header};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        Message,
        handshake::derive_accept_key,
        protocol::{Role, WebSocketConfig},
    },
};

use super::{
    super::version,
    detach::{Detach, Scanned},
};
use crate::engine::{Attachment, Error, Result};

/// The longest message that a client may send, in bytes.
const MAX_MESSAGE: usize = 1 << 20;

/// The answer to an upgrade request, as bytes.
///
/// # Errors
/// Invalid: it is none.
pub(super) fn head(request: &HeaderMap) -> Result<Vec<u8>> {
    let says = |name: header::HeaderName, word: &str| {
        let values = request.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
        values.flat_map(|value| value.split(',')).any(|have| have.trim().eq_ignore_ascii_case(word))
    };
    if !says(header::UPGRADE, "websocket") || !says(header::CONNECTION, "upgrade") {
        return Err(Error::invalid("not a WebSocket request: an upgrade to websocket is expected"));
    }
    if !says(header::SEC_WEBSOCKET_VERSION, "13") {
        return Err(Error::invalid("unsupported WebSocket version: 13 is expected"));
    }
    let key = request
        .get(header::SEC_WEBSOCKET_KEY)
        .filter(|key| (16..=64).contains(&key.len()))
        .ok_or_else(|| Error::invalid("a WebSocket request needs a Sec-WebSocket-Key"))?;
    Ok(format!(
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: {}\r\n\
         Api-Version: {}\r\nServer: {}\r\n\r\n",
        derive_accept_key(key.as_bytes()),
        version::CURRENT,
        super::super::server::SERVER,
    )
    .into_bytes())
}

/// Carries a process's stdio until it is done, the client has gone, or the user detached.
pub(super) async fn serve<S>(early: Bytes, stream: S, attachment: Attachment, detach: Option<Detach>)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let config =
        WebSocketConfig::default().max_message_size(Some(MAX_MESSAGE)).max_frame_size(Some(MAX_MESSAGE));
    let socket = WebSocketStream::from_partially_read(stream, early.into(), Role::Server, Some(config)).await;
    let (mut sink, mut messages) = socket.split();
    let Attachment { mut stdin, mut output, .. } = attachment;
    let mut detach = detach;
    loop {
        tokio::select! {
            output = output.recv() => match output {
                Some(output) => {
                    if sink.send(Message::Binary(output.bytes)).await.is_err() {
                        return;
                    }
                }
                None => break,
            },
            message = messages.next() => {
                let bytes: Bytes = match message {
                    Some(Ok(Message::Binary(bytes))) => bytes,
                    Some(Ok(Message::Text(text))) => text.into(),
                    Some(Ok(Message::Close(_)) | Err(_)) | None => return,
                    // Pings are answered by the library.
                    Some(Ok(_)) => continue,
                };
                let (bytes, detached) = match detach.as_mut().map(|detach| detach.scan(&bytes)) {
                    None => (bytes, false),
                    Some(Scanned::Input(bytes)) => (bytes.into(), false),
                    Some(Scanned::Detached(bytes)) => (bytes.into(), true),
                };
                if let Some(sender) = &stdin
                    && !bytes.is_empty()
                {
                    // A process that does not read must not keep its output from the client.
                    tokio::select! {
                        sent = sender.send(bytes) => if sent.is_err() { stdin = None },
                        () = forward(&mut output, &mut sink) => return,
                    }
                }
                if detached {
                    if let Some(detach) = detach.take() {
                        detach.done();
                    }
                    break;
                }
            }
        }
    }
    // The client's answer to it is not waited for: whoever closes the connection flushes.
    let _ = sink.close().await;
}

/// Sends output for as long as the client takes it.
async fn forward<S>(
    output: &mut tokio::sync::mpsc::Receiver<crate::engine::Output>,
    sink: &mut futures_util::stream::SplitSink<WebSocketStream<S>, Message>,
) where
    S: AsyncRead + AsyncWrite + Unpin,
{
    while let Some(piece) = output.recv().await {
        if sink.send(Message::Binary(piece.bytes)).await.is_err() {
            return;
        }
    }
    let _ = sink.close().await;
}

#[cfg(test)]
mod tests {
    use tokio::{io::duplex, sync::mpsc};

    use super::{super::detach::DetachKeys, *};
    use crate::engine::{Output, logs::Stream};

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
    }

    #[test]
    fn the_handshake_is_that_of_the_standard() {
        let all = [
            ("upgrade", "websocket"),
            ("connection", "keep-alive, Upgrade"),
            ("sec-websocket-version", "13"),
            ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
        ];
        let answer = String::from_utf8(head(&headers(&all)).unwrap()).unwrap();
        // The example of RFC 6455.
        assert!(answer.contains("Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"), "{answer}");
        for missing in 0..all.len() {
            let some: Vec<_> =
                all.iter().enumerate().filter(|(at, _)| *at != missing).map(|(_, h)| *h).collect();
            assert!(head(&headers(&some)).is_err(), "without {:?}", all[missing]);
        }
    }

    #[tokio::test]
    async fn output_and_input_are_messages_and_the_processs_end_closes() {
        let (near, far) = duplex(1 << 16);
        let (stdin, mut input) = mpsc::channel(4);
        let (sender, output) = mpsc::channel(4);
        let attachment = Attachment { terminal: false, stdin: Some(stdin), output };
        let served = tokio::spawn(serve(Bytes::new(), far, attachment, None));
        let mut client = WebSocketStream::from_raw_socket(near, Role::Client, None).await;
        client.send(Message::text("typed\n")).await.unwrap();
        assert_eq!(input.recv().await.unwrap(), "typed\n");
        for (stream, text) in [(Stream::Stdout, &b"out"[..]), (Stream::Stderr, b"err")] {
            sender.send(Output { stream, bytes: Bytes::from_static(text) }).await.unwrap();
            assert_eq!(client.next().await.unwrap().unwrap(), Message::binary(text));
        }
        drop(sender);
        assert!(matches!(client.next().await, Some(Ok(Message::Close(_)))));
        served.await.unwrap();
    }

    #[tokio::test]
    async fn a_client_that_closes_ends_the_input() {
        let (near, far) = duplex(1 << 16);
        let (stdin, mut input) = mpsc::channel(4);
        let (_sender, output) = mpsc::channel(4);
        let attachment = Attachment { terminal: true, stdin: Some(stdin), output };
        let keys = Some(Detach::new(DetachKeys::parse("").unwrap(), || {}));
        let served = tokio::spawn(serve(Bytes::new(), far, attachment, keys));
        let mut client = WebSocketStream::from_raw_socket(near, Role::Client, None).await;
        client.send(Message::binary(&b"x"[..])).await.unwrap();
        client.close(None).await.unwrap();
        assert_eq!(input.recv().await.unwrap(), "x");
        assert_eq!(input.recv().await, None);
        served.await.unwrap();
    }
}
