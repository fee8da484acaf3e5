//! One HTTP request to the daemon.

use std::io;

use bytes::Bytes;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::net::{TcpStream, UnixStream};

/// The longest answer that is taken whole.
const MAX_TEXT: usize = 16 << 20;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    /// The address is none.
    #[error("{0:?} is no address of a daemon: unix://PATH or tcp://HOST:PORT is expected")]
    Address(String),
    /// The daemon cannot be reached.
    #[error("cannot reach the daemon at {address}: {source}")]
    Connect {
        /// Where it should be.
        address: String,
        /// Why not.
        source: io::Error,
    },
    /// The connection failed.
    #[error("the daemon's connection: {0}")]
    Http(#[from] hyper::Error),
    /// The daemon says no.
    #[error("{0}")]
    Refused(String),
    /// The answer is not what it should be.
    #[error("the daemon's answer is not valid: {0}")]
    Invalid(String),
    /// Output.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// Where the daemon is.
#[derive(Debug)]
pub(crate) enum Client {
    Unix(String),
    Tcp(String),
}

impl Client {
    /// From an address as docker takes it.
    pub(crate) fn new(address: &str) -> Result<Self, ClientError> {
        match address.split_once("://") {
            Some(("unix", path)) if path.starts_with('/') => Ok(Self::Unix(path.to_owned())),
            Some(("tcp", host)) if host.contains(':') => Ok(Self::Tcp(host.to_owned())),
            _ => Err(ClientError::Address(address.to_owned())),
        }
    }

    /// Gets a path; the answer's body if the daemon agrees.
    pub(crate) async fn get(&self, path: &str) -> Result<Answer, ClientError> {
        self.request(Method::GET, path, Bytes::new()).await
    }

    /// Sends a request with a body of JSON, or none.
    pub(crate) async fn request(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<Answer, ClientError> {
        let invalid = |error: http::Error| ClientError::Invalid(error.to_string());
        let mut request = Request::builder().method(method).uri(path).header("Host", "bulkhead");
        if !body.is_empty() {
            request = request.header("Content-Type", "application/json");
        }
        let request = request.body(Full::new(body)).map_err(invalid)?;
        let failed = |address: &str| {
            let address = address.to_owned();
            |source| ClientError::Connect { address, source }
        };
        let response = match self {
            Self::Unix(path) => {
                exchange(TokioIo::new(UnixStream::connect(path).await.map_err(failed(path))?), request)
                    .await?
            }
            Self::Tcp(host) => {
                exchange(TokioIo::new(TcpStream::connect(host).await.map_err(failed(host))?), request).await?
            }
        };
        let (status, answer) = (response.status(), Answer(response.into_body()));
        if status.is_success() { Ok(answer) } else { Err(refusal(status, &answer.text().await?)) }
    }
}

async fn exchange<S>(
    stream: S,
    request: Request<Full<Bytes>>,
) -> Result<http::Response<Incoming>, ClientError>
where
    S: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(stream).await?;
    // Its error is the request's, or the body's.
    tokio::spawn(async move { drop(connection.await) });
    Ok(sender.send_request(request).await?)
}

/// The daemon's `{"message":"…"}`.
fn refusal(status: StatusCode, text: &[u8]) -> ClientError {
    let message = serde_json::from_slice::<serde_json::Value>(text)
        .ok()
        .and_then(|value| value.get("message")?.as_str().map(str::to_owned));
    ClientError::Refused(message.unwrap_or_else(|| format!("the daemon answers {status}")))
}

/// A body.
#[derive(Debug)]
pub(crate) struct Answer(Incoming);

impl Answer {
    /// The next piece; None at the end.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, ClientError> {
        while let Some(frame) = self.0.frame().await {
            if let Ok(data) = frame?.into_data() {
                return Ok(Some(data));
            }
        }
        Ok(None)
    }

    /// All of it.
    pub(crate) async fn text(mut self) -> Result<Vec<u8>, ClientError> {
        let mut text = Vec::new();
        while let Some(piece) = self.next().await? {
            text.extend_from_slice(&piece);
            if text.len() > MAX_TEXT {
                return Err(ClientError::Invalid(format!("longer than {MAX_TEXT} bytes")));
            }
        }
        Ok(text)
    }
}

/// A value from JSON.
pub(crate) fn parse<T: DeserializeOwned>(text: &[u8]) -> Result<T, ClientError> {
    serde_json::from_slice(text).map_err(|error| ClientError::Invalid(error.to_string()))
}

/// A path of these segments; whatever a user typed stays one segment.
pub(crate) fn path(segments: &[&str]) -> String {
    let mut path = String::new();
    for segment in segments {
        path.push('/');
        for byte in segment.bytes() {
            if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
                path.push(char::from(byte));
            } else {
                path.push_str(&format!("%{byte:02X}"));
            }
        }
    }
    path
}

/// What a guest says, without what would move the reader's terminal: control characters, those beyond ASCII
/// too, but line ends and tabs become dots.
pub(crate) fn printable(bytes: &[u8]) -> String {
    let harmless = |c: char| !c.is_control() || matches!(c, '\n' | '\r' | '\t');
    String::from_utf8_lossy(bytes).chars().map(|c| if harmless(c) { c } else { '.' }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        assert!(matches!(Client::new("unix:///run/x.sock"), Ok(Client::Unix(path)) if path == "/run/x.sock"));
        assert!(matches!(Client::new("tcp://host:2375"), Ok(Client::Tcp(host)) if host == "host:2375"));
        for wrong in ["", "unix://relative", "tcp://host", "ssh://host:22", "/run/x.sock"] {
            assert!(Client::new(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_is_typed_stays_one_segment() {
        assert_eq!(path(&["a", "../b?c#d/e f"]), "/a/..%2Fb%3Fc%23d%2Fe%20f");
    }

    #[test]
    fn a_guest_does_not_move_the_terminal() {
        assert_eq!(printable("a\u{1b}[2Jb\r\n\tc\u{7}\u{7f}\u{9b}2Jé".as_bytes()), "a.[2Jb\r\n\tc...2Jé");
        assert_eq!(printable(b"a\xffb"), "a\u{fffd}b");
    }

    #[test]
    fn refusals_are_the_daemons_words() {
        let text = |body: &[u8]| refusal(StatusCode::CONFLICT, body).to_string();
        assert_eq!(text(br#"{"message":"no"}"#), "no");
        assert_eq!(text(b"x"), "the daemon answers 409 Conflict");
    }
}
