//! Taking a connection over.
//!
//! ```text
//!  client: POST …/attach, Upgrade: tcp         client: POST …/attach
//!  server: HTTP/1.1 101 UPGRADED               server: HTTP/1.1 200 OK
//!  ◀═══════ raw or stdcopy, both ways ════════════▶   (no length, no chunks)
//!
//!  client shuts its side down ─▶ end of the process's input; output goes on
//!  process is done ─▶ rest of the output, server shuts its side down ─▶ reads on until the client closes
//! ```

use std::{future::Future, pin::Pin, time::Duration};

use bytes::{Bytes, BytesMut};
use http::{
    HeaderMap,
    header::{CONNECTION, UPGRADE},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::mpsc,
};

use super::{
    super::version,
    detach::{Detach, Scanned},
    stdcopy, websocket,
};
use crate::engine::{Attachment, Output, Result};

/// How much input is read at once.
const PIECE: usize = 32 << 10;

/// How long a client may take to close after the process is done.
const LINGER: Duration = Duration::from_secs(10);

/// How long the end of a terminal's line is waited for: the terminal writes it (`\r\n`) behind the line, and clients
/// that take what comes at once for a line see one.
const LINE_END: Duration = Duration::from_millis(5);

/// A connection's two directions, with what was already read.
pub struct Taken {
    /// What the client sent behind its request.
    pub early: Bytes,
    /// The client's side.
    pub reader: Box<dyn AsyncRead + Send + Unpin>,
    /// Ours.
    pub writer: Box<dyn AsyncWrite + Send + Unpin>,
    /// Resolves when the client has closed both directions; a half-close alone does not tell.
    pub gone: Pin<Box<dyn Future<Output = ()> + Send>>,
}

/// What is to become of a connection when the server has let go of it.
pub struct Hijack {
    head: Vec<u8>,
    content: Content,
}

enum Content {
    /// A process's stdio.
    Stdio(Attachment, Option<Detach>),
    /// The same in messages.
    WebSocket(Attachment, Option<Detach>),
    /// Those of a process that is still to be started.
    Starting(Starting, Option<Detach>, bool),
}

/// What starts a process when the client knows that it will be.
pub type Starting = Pin<Box<dyn Future<Output = Result<Attachment>> + Send>>;

impl Hijack {
    /// A process's stdio. `request` are the request's headers, `detach` how a user leaves it, which only a terminal
    /// has.
    pub fn stdio(
        request: &HeaderMap,
        media_type: &'static str,
        attachment: Attachment,
        detach: Option<Detach>,
    ) -> Self {
        Self { head: head(request, media_type), content: Content::Stdio(attachment, detach) }
    }

    /// A process's stdio over a WebSocket.
    ///
    /// # Errors
    /// Invalid: the request does not ask for one.
    pub fn websocket(request: &HeaderMap, attachment: Attachment, detach: Option<Detach>) -> Result<Self> {
        Ok(Self { head: websocket::head(request)?, content: Content::WebSocket(attachment, detach) })
    }

    /// A process's stdio, once it is started: that is begun when the head has gone out. (A client that reads the head
    /// with a buffer of its own, as docker-py's does, would lose what comes right behind it.) Why it did not start is
    /// told in place of its output. `raw`: output comes as it is, without frames.
    pub fn starting(
        request: &HeaderMap,
        media_type: &'static str,
        raw: bool,
        detach: Option<Detach>,
        starting: Starting,
    ) -> Self {
        Self { head: head(request, media_type), content: Content::Starting(starting, detach, raw) }
    }

    /// Does it, to the connection's end.
    pub fn run(self, taken: Taken) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(async move {
            let Taken { early, mut reader, mut writer, gone } = taken;
            let told = writer.write_all(&self.head).await.is_ok() && writer.flush().await.is_ok();
            match self.content {
                // It was promised, and is started though nobody hears of it.
                Content::Starting(starting, detach, raw) => match starting.await {
                    Ok(attachment) if told => {
                        let attachment = Attachment { terminal: raw, ..attachment };
                        tokio::select! {
                            () = serve(early, reader, writer, attachment, detach) => {}
                            () = gone => {}
                        }
                    }
                    Err(error) if told => {
                        let text = text(raw, &error.message);
                        if writer.write_all(&text).await.is_ok() && writer.shutdown().await.is_ok() {
                            linger(&mut reader).await;
                        }
                    }
                    _ => {}
                },
                Content::Stdio(attachment, detach) if told => tokio::select! {
                    () = serve(early, reader, writer, attachment, detach) => {}
                    () = gone => {}
                },
                Content::WebSocket(attachment, detach) if told => tokio::select! {
                    () = websocket::serve(early, tokio::io::join(reader, writer), attachment, detach) => {}
                    () = gone => {}
                },
                Content::Stdio(..) | Content::WebSocket(..) => {}
            }
        })
    }
}

/// A text in place of output, on stdout.
fn text(raw: bool, text: &str) -> Vec<u8> {
    let text = format!("{text}\r\n");
    if raw {
        return text.into_bytes();
    }
    let mut frame = Vec::new();
    stdcopy::frame(&mut frame, crate::engine::logs::Stream::Stdout, text.as_bytes());
    frame
}

/// The response's head, byte for byte as dockerd writes it: clients compare the first line.
fn head(request: &HeaderMap, media_type: &str) -> Vec<u8> {
    let upgrade = request.get(UPGRADE).is_some()
        && request.get_all(CONNECTION).iter().any(|value| {
            value
                .to_str()
                .is_ok_and(|value| value.split(',').any(|word| word.trim().eq_ignore_ascii_case("upgrade")))
        });
    let first = if upgrade {
        format!(
            "HTTP/1.1 101 UPGRADED\r\nContent-Type: {media_type}\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n"
        )
    } else {
        format!("HTTP/1.1 200 OK\r\nContent-Type: {media_type}\r\n")
    };
    format!(
        "{first}Api-Version: {}\r\nDocker-Experimental: true\r\nOstype: linux\r\nServer: {}\r\n\r\n",
        version::CURRENT,
        super::super::server::SERVER,
    )
    .into_bytes()
}

/// Carries a process's stdio until it is done, the client has gone, or the user detached.
async fn serve<R, W>(
    early: Bytes,
    mut reader: R,
    mut writer: W,
    attachment: Attachment,
    detach: Option<Detach>,
) where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let Attachment { terminal, stdin, output } = attachment;
    let ended = {
        let input = carry_input(early, &mut reader, stdin, detach);
        let output = carry_output(output, &mut writer, terminal);
        tokio::pin!(input, output);
        tokio::select! {
            ended = &mut output => ended,
            left = &mut input => match left {
                // The input has ended; the output goes on.
                Input::Ended => output.await,
                Input::Detached => OutputEnd::Done,
                Input::Broken => OutputEnd::Gone,
            },
        }
    };
    if ended == OutputEnd::Done && writer.shutdown().await.is_ok() {
        linger(&mut reader).await;
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Input {
    /// The client shut its side down.
    Ended,
    /// The user typed the keys.
    Detached,
    /// The connection is broken.
    Broken,
}

async fn carry_input<R: AsyncRead + Unpin>(
    early: Bytes,
    reader: &mut R,
    mut stdin: Option<mpsc::Sender<Bytes>>,
    mut detach: Option<Detach>,
) -> Input {
    let mut buffer = BytesMut::from(early.as_ref());
    loop {
        if buffer.is_empty() {
            buffer.reserve(PIECE);
            match reader.read_buf(&mut buffer).await {
                // Dropping the sender is the end of the process's input.
                Ok(0) => return Input::Ended,
                Ok(_) => {}
                Err(_) => return Input::Broken,
            }
        }
        let piece = buffer.split_to(buffer.len().min(PIECE)).freeze();
        let (piece, detached) = match detach.as_mut().map(|detach| detach.scan(&piece)) {
            None => (piece, false),
            Some(Scanned::Input(bytes)) => (bytes.into(), false),
            Some(Scanned::Detached(bytes)) => (bytes.into(), true),
        };
        // A process that has closed its input, or a client that was not asked for any: read and forget, so
        // that the connection's end is still seen.
        if let Some(sender) = &stdin
            && !piece.is_empty()
            && sender.send(piece).await.is_err()
        {
            stdin = None;
        }
        if detached {
            if let Some(detach) = detach.take() {
                detach.done();
            }
            return Input::Detached;
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum OutputEnd {
    /// Everything was sent.
    Done,
    /// The client is gone.
    Gone,
}

async fn carry_output<W: AsyncWrite + Unpin>(
    mut output: mpsc::Receiver<Output>,
    writer: &mut W,
    terminal: bool,
) -> OutputEnd {
    let mut frames = Vec::with_capacity(PIECE + stdcopy::HEADER);
    while let Some(Output { stream, bytes }) = output.recv().await {
        frames.clear();
        let mut append = |stream, bytes: &[u8]| {
            if terminal {
                frames.extend_from_slice(bytes);
            } else {
                stdcopy::frame(&mut frames, stream, bytes);
            }
            frames.len()
        };
        let mut length = append(stream, &bytes);
        // What is there already goes with it, in one write.
        let mut unfinished = terminal && is_unfinished(&bytes);
        while length < 4 * PIECE {
            let next = match unfinished {
                false => output.try_recv().ok(),
                true => tokio::time::timeout(LINE_END, output.recv()).await.ok().flatten(),
            };
            let Some(Output { stream, bytes }) = next else { break };
            length = append(stream, &bytes);
            unfinished = false;
        }
        if writer.write_all(&frames).await.is_err() || writer.flush().await.is_err() {
            return OutputEnd::Gone;
        }
    }
    OutputEnd::Done
}

/// Whether a terminal's output is a line without its end. The echo of a key, one byte, is not.
fn is_unfinished(bytes: &[u8]) -> bool {
    bytes.len() > 1 && !bytes.ends_with(b"\n")
}

/// Reads until the client has closed, for a while: to close with input unread would reset the connection,
/// and the client could lose the output's end.
async fn linger<R: AsyncRead + Unpin>(reader: &mut R) {
    let drain = async { tokio::io::copy(reader, &mut tokio::io::sink()).await };
    let _ = tokio::time::timeout(LINGER, drain).await;
}

#[cfg(test)]
mod tests {
    use tokio::io::{DuplexStream, duplex};

    use super::{super::detach::DetachKeys, *};
    use crate::engine::logs::Stream;

    struct Process {
        stdin: mpsc::Receiver<Bytes>,
        output: mpsc::Sender<Output>,
        client: DuplexStream,
        gone: tokio::sync::oneshot::Sender<()>,
        detached: tokio::sync::oneshot::Receiver<()>,
        served: tokio::task::JoinHandle<()>,
    }

    /// A scripted process behind a connection.
    fn attach(terminal: bool, early: &'static [u8], upgrade: bool) -> Process {
        let (stdin_sender, stdin) = mpsc::channel(4);
        let (output, output_receiver) = mpsc::channel(4);
        let (client, server) = duplex(1 << 16);
        let attachment = Attachment { terminal, stdin: Some(stdin_sender), output: output_receiver };
        let mut headers = HeaderMap::new();
        if upgrade {
            headers.insert(UPGRADE, "tcp".parse().unwrap());
            headers.insert(CONNECTION, "Upgrade".parse().unwrap());
        }
        let (reader, writer) = tokio::io::split(server);
        let (gone_sender, gone_receiver) = tokio::sync::oneshot::channel();
        let taken = Taken {
            early: Bytes::from_static(early),
            reader: Box::new(reader),
            writer: Box::new(writer),
            gone: Box::pin(async { gone_receiver.await.unwrap_or(()) }),
        };
        let (told, detached) = tokio::sync::oneshot::channel();
        let keys = DetachKeys::parse("").unwrap();
        let keys = terminal.then(|| Detach::new(keys, || told.send(()).unwrap()));
        let hijack = Hijack::stdio(&headers, super::super::RAW, attachment, keys);
        Process {
            stdin,
            output,
            client,
            gone: gone_sender,
            detached,
            served: tokio::spawn(hijack.run(taken)),
        }
    }

    impl Process {
        async fn write(&self, stream: Stream, bytes: &'static [u8]) {
            self.output.send(Output { stream, bytes: Bytes::from_static(bytes) }).await.unwrap();
        }

        async fn head(&mut self) -> String {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(self.client.read_u8().await.unwrap());
            }
            String::from_utf8(head).unwrap()
        }

        async fn input(&mut self) -> Vec<u8> {
            let mut all = Vec::new();
            while let Some(bytes) = self.stdin.recv().await {
                all.extend_from_slice(&bytes);
            }
            all
        }
    }

    #[tokio::test]
    async fn heads_are_those_of_dockerd() {
        let first_lines = |head: String| head.lines().take(4).map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(
            first_lines(attach(false, b"", true).head().await),
            [
                "HTTP/1.1 101 UPGRADED",
                "Content-Type: application/vnd.docker.raw-stream",
                "Connection: Upgrade",
                "Upgrade: tcp",
            ]
        );
        let plain = attach(false, b"", false).head().await;
        assert!(plain.starts_with("HTTP/1.1 200 OK\r\n") && !plain.contains("Upgrade"), "{plain}");
        assert!(!plain.to_lowercase().contains("content-length"), "{plain}");
    }

    #[tokio::test]
    async fn output_is_framed_and_the_end_of_input_does_not_end_it() {
        let mut process = attach(false, b"early ", true);
        process.head().await;
        process.client.write_all(b"late").await.unwrap();
        process.client.shutdown().await.unwrap();
        assert_eq!(process.input().await, b"early late");
        process.write(Stream::Stdout, b"out").await;
        process.write(Stream::Stderr, b"err").await;
        let Process { mut client, output, served, gone: _gone, .. } = process;
        drop(output);
        let mut all = Vec::new();
        client.read_to_end(&mut all).await.unwrap();
        assert_eq!(all, b"\x01\0\0\0\0\0\0\x03out\x02\0\0\0\0\0\0\x03err");
        served.await.unwrap();
    }

    #[tokio::test]
    async fn a_line_of_a_terminal_and_its_end_come_at_once() {
        let mut process = attach(true, b"", true);
        process.head().await;
        process.write(Stream::Stdout, b"hello").await;
        tokio::task::yield_now().await;
        process.write(Stream::Stdout, b"\r\n").await;
        let mut buffer = [0; 16];
        assert_eq!(process.client.read(&mut buffer).await.unwrap(), 7);
    }

    #[tokio::test]
    async fn when_the_process_is_done_the_connection_ends_though_input_still_comes() {
        let mut process = attach(true, b"", true);
        process.head().await;
        process.write(Stream::Stdout, b"bye").await;
        let Process { mut client, output, served, stdin, gone: _gone, .. } = process;
        drop((output, stdin));
        client.write_all(b"unread").await.unwrap();
        let mut all = Vec::new();
        client.read_to_end(&mut all).await.unwrap();
        assert_eq!(all, b"bye");
        drop(client);
        served.await.unwrap();
    }

    #[tokio::test]
    async fn the_keys_detach_from_a_terminal_only() {
        let mut terminal = attach(true, b"", true);
        terminal.head().await;
        terminal.client.write_all(b"x\x10\x11y").await.unwrap();
        let mut rest = Vec::new();
        terminal.client.read_to_end(&mut rest).await.unwrap();
        assert_eq!(terminal.input().await, b"x");
        terminal.detached.await.unwrap();

        let mut plain = attach(false, b"", true);
        plain.head().await;
        plain.client.write_all(b"x\x10\x11y").await.unwrap();
        plain.client.shutdown().await.unwrap();
        assert_eq!(plain.input().await, b"x\x10\x11y");
        assert!(plain.detached.await.is_err(), "nobody was told");
    }

    #[tokio::test]
    async fn a_client_that_goes_lets_the_process_know() {
        let mut process = attach(false, b"", true);
        process.head().await;
        let Process { client, output, gone, served, .. } = process;
        drop(client);
        gone.send(()).unwrap();
        output.closed().await;
        served.await.unwrap();
    }

    #[tokio::test]
    async fn a_start_is_begun_behind_the_head_and_its_failure_takes_the_place_of_output() {
        let (mut client, server) = duplex(1 << 12);
        let (reader, writer) = tokio::io::split(server);
        let gone = Box::pin(std::future::pending());
        let taken = Taken { early: Bytes::new(), reader: Box::new(reader), writer: Box::new(writer), gone };
        let (go, waits) = tokio::sync::oneshot::channel::<()>();
        let starting = Box::pin(async move {
            waits.await.unwrap();
            Err(crate::engine::Error::invalid("why"))
        });
        let hijack = Hijack::starting(&HeaderMap::new(), super::super::RAW, false, None, starting);
        tokio::spawn(hijack.run(taken));
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(client.read_u8().await.unwrap());
        }
        go.send(()).unwrap();
        let mut rest = Vec::new();
        client.read_to_end(&mut rest).await.unwrap();
        assert_eq!(rest, b"\x01\0\0\0\0\0\0\x05why\r\n");
    }

    #[tokio::test]
    async fn what_was_promised_is_started_though_the_client_has_gone() {
        let (client, server) = duplex(1 << 12);
        drop(client);
        let (reader, writer) = tokio::io::split(server);
        let gone = Box::pin(std::future::pending());
        let taken = Taken { early: Bytes::new(), reader: Box::new(reader), writer: Box::new(writer), gone };
        let (done, started) = tokio::sync::oneshot::channel();
        let starting = Box::pin(async move {
            done.send(()).unwrap();
            Err(crate::engine::Error::invalid("why"))
        });
        Hijack::starting(&HeaderMap::new(), super::super::RAW, true, None, starting).run(taken).await;
        started.await.unwrap();
    }
}
