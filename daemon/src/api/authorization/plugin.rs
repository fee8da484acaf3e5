//! One plugin: where it listens, and what it answers.
//!
//! Docker's plugin protocol: `POST /METHOD` with JSON, HTTP over the socket that is found by the plugin's name.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use http::{
    Request, StatusCode,
    header::{ACCEPT, CONTENT_LENGTH, CONTENT_TYPE, HOST},
};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::net::{TcpStream, UnixStream};

use crate::api::types::json;

/// What asks whether a request may be carried out.
pub(super) const REQUEST: &str = "AuthZPlugin.AuthZReq";
/// What asks whether an answer may go out.
pub(super) const RESPONSE: &str = "AuthZPlugin.AuthZRes";

/// What a plugin must say that it implements.
const KIND: &str = "authz";

const MEDIA_TYPE: &str = "application/vnd.docker.plugins.v1.2+json";

/// How long a plugin may take.
const TIMEOUT: Duration = Duration::from_secs(30);

/// The longest answer of a plugin.
const MAX_ANSWER: usize = 1 << 20;

/// Where sockets of plugins are, and files that say where else.
const SOCKETS: &str = "/run/docker/plugins";
const SPECS: [&str; 2] = ["/etc/docker/plugins", "/usr/lib/docker/plugins"];

/// Why a plugin did not answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum PluginError {
    /// Nothing has its name.
    #[error("plugin not found")]
    NotFound,
    /// A file that should say where it is.
    #[error("{}: {what}", path.display())]
    Spec {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// It cannot be reached.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The connection broke.
    #[error("{0}")]
    Http(#[from] hyper::Error),
    /// It takes too long.
    #[error("no answer within {} seconds", TIMEOUT.as_secs())]
    Late,
    /// It answers with an error.
    #[error("{0}")]
    Refused(String),
    /// It answers what is no answer.
    #[error("its answer is not valid: {0}")]
    Invalid(String),
}

/// A plugin.
#[derive(Debug)]
pub(super) struct Plugin {
    name: String,
    sockets: PathBuf,
    specs: Vec<PathBuf>,
}

/// What a plugin says to a request or an answer.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Verdict {
    pub(super) allow: bool,
    pub(super) message: String,
}

#[derive(Debug, PartialEq, Eq)]
enum Address {
    Unix(PathBuf),
    Tcp(String),
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    #[serde(default)]
    allow: bool,
    #[serde(default)]
    msg: String,
    #[serde(default)]
    err: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Manifest {
    #[serde(default)]
    implements: Vec<String>,
}

impl Plugin {
    pub(super) fn new(name: &str) -> Self {
        Self { name: name.to_owned(), sockets: SOCKETS.into(), specs: SPECS.map(PathBuf::from).to_vec() }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Hears whether it is an authorization plugin at all.
    ///
    /// # Errors
    /// It is none, or cannot be asked.
    pub(super) async fn activate(&self) -> Result<(), PluginError> {
        let manifest: Manifest = self.call("Plugin.Activate", Bytes::new()).await?;
        if manifest.implements.iter().any(|kind| kind == KIND) {
            return Ok(());
        }
        Err(PluginError::Refused(format!("plugin does not implement {KIND:?}")))
    }

    /// Asks by a method.
    ///
    /// # Errors
    /// It cannot be asked, or says that it failed.
    pub(super) async fn ask(&self, method: &str, message: &impl Serialize) -> Result<Verdict, PluginError> {
        let text = serde_json::to_vec(message).map_err(|error| PluginError::Invalid(error.to_string()))?;
        let answer: Answer = self.call(method, text.into()).await?;
        if !answer.err.is_empty() {
            return Err(PluginError::Refused(answer.err));
        }
        Ok(Verdict { allow: answer.allow, message: answer.msg })
    }

    async fn call<T: DeserializeOwned>(&self, method: &str, body: Bytes) -> Result<T, PluginError> {
        let address = self.address()?;
        let asked = tokio::time::timeout(TIMEOUT, exchange(&address, method, body));
        let (status, text) = asked.await.map_err(|_| PluginError::Late)??;
        if status != StatusCode::OK {
            let told = json::from_slice::<Answer>(&text).ok().map(|answer| answer.err);
            let told = told.filter(|told| !told.is_empty());
            let told = told.unwrap_or_else(|| String::from_utf8_lossy(&text).trim().to_owned());
            return Err(PluginError::Refused(format!("{method}: {status}: {told}")));
        }
        json::from_slice(&text).map_err(|error| PluginError::Invalid(error.to_string()))
    }

    /// `NAME.sock`, below a directory of its own or not, or what `NAME.spec` says.
    fn address(&self) -> Result<Address, PluginError> {
        let name = &self.name;
        if name.is_empty() || name.contains('/') || name.starts_with('.') {
            return Err(PluginError::NotFound);
        }
        let socket = format!("{name}.sock");
        for path in [self.sockets.join(&socket), self.sockets.join(name).join(&socket)] {
            if path.exists() {
                return Ok(Address::Unix(path));
            }
        }
        let spec = format!("{name}.spec");
        for directory in &self.specs {
            for path in [directory.join(&spec), directory.join(name).join(&spec)] {
                match std::fs::read_to_string(&path) {
                    Ok(text) => return parse(&path, text.trim()),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => return Err(PluginError::Spec { path, what: error.to_string() }),
                }
            }
        }
        Err(PluginError::NotFound)
    }
}

fn parse(path: &Path, text: &str) -> Result<Address, PluginError> {
    match text.split_once("://") {
        Some(("unix", socket)) if socket.starts_with('/') => Ok(Address::Unix(socket.into())),
        Some(("tcp", host)) if host.contains(':') => Ok(Address::Tcp(host.to_owned())),
        _ => Err(PluginError::Spec {
            path: path.to_owned(),
            what: format!("unix://PATH or tcp://HOST:PORT is expected, not {text:?}"),
        }),
    }
}

async fn exchange(address: &Address, method: &str, body: Bytes) -> Result<(StatusCode, Bytes), PluginError> {
    let request = Request::post(format!("/{method}"))
        .header(HOST, "plugin")
        .header(ACCEPT, MEDIA_TYPE)
        .header(CONTENT_TYPE, MEDIA_TYPE)
        // Of a body that is empty too, which hyper would leave out: plugins read as much as they are told.
        .header(CONTENT_LENGTH, body.len())
        .body(Full::new(body))
        .map_err(|error| PluginError::Invalid(error.to_string()))?;
    match address {
        Address::Unix(path) => send(TokioIo::new(UnixStream::connect(path).await?), request).await,
        Address::Tcp(host) => send(TokioIo::new(TcpStream::connect(host).await?), request).await,
    }
}

async fn send<S>(stream: S, request: Request<Full<Bytes>>) -> Result<(StatusCode, Bytes), PluginError>
where
    S: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(stream).await?;
    // Its error is the request's.
    tokio::spawn(async move { drop(connection.await) });
    let response = sender.send_request(request).await?;
    let status = response.status();
    let text = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
    Ok((status, text.map_err(|error| PluginError::Invalid(error.to_string()))?.to_bytes()))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::json;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::UnixListener,
    };

    use super::*;

    fn plugin(directory: &Path, name: &str) -> Plugin {
        Plugin {
            name: name.to_owned(),
            sockets: directory.join("sockets"),
            specs: vec![directory.join("specs")],
        }
    }

    /// Answers each request with the next of these, whatever it is.
    fn serve(path: &Path, answers: Vec<&'static str>) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let listener = UnixListener::bind(path).unwrap();
        tokio::spawn(async move {
            for answer in answers {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut read = [0; 4096];
                let length = stream.read(&mut read).await.unwrap();
                let read = String::from_utf8_lossy(&read[..length]).to_lowercase();
                assert!(read.starts_with("post /") && read.contains("content-length:"), "{read}");
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        });
    }

    #[test]
    fn a_plugin_is_found_by_its_name_alone() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| plugin(directory.path(), name).address().map_err(|error| error.to_string());
        fs::create_dir_all(directory.path().join("sockets/inner")).unwrap();
        fs::create_dir_all(directory.path().join("specs")).unwrap();
        for (path, text) in [
            ("sockets/one.sock", ""),
            ("sockets/inner/inner.sock", ""),
            ("specs/far.spec", "tcp://127.0.0.1:99\n"),
            ("specs/near.spec", "unix:///x"),
            ("specs/odd.spec", "http://x"),
        ] {
            fs::write(directory.path().join(path), text).unwrap();
        }
        assert_eq!(at("one"), Ok(Address::Unix(directory.path().join("sockets/one.sock"))));
        assert_eq!(at("inner"), Ok(Address::Unix(directory.path().join("sockets/inner/inner.sock"))));
        assert_eq!(at("far"), Ok(Address::Tcp("127.0.0.1:99".into())));
        assert_eq!(at("near"), Ok(Address::Unix("/x".into())));
        assert!(
            at("odd").unwrap_err().ends_with("unix://PATH or tcp://HOST:PORT is expected, not \"http://x\"")
        );
        for none in ["none", "", "../sockets/one", "."] {
            assert_eq!(at(none).unwrap_err(), "plugin not found", "{none}");
        }
    }

    #[tokio::test]
    async fn answers_are_taken_as_they_are_meant_and_anything_else_is_no() {
        let directory = tempfile::tempdir().unwrap();
        let ok = |body: &str| {
            let text = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
            &*text.leak()
        };
        let answers = vec![
            ok(r#"{"Implements":["VolumeDriver","authz"]}"#),
            ok(r#"{"Implements":["VolumeDriver"]}"#),
            ok(r#"{"allow":true,"Msg":"why not","Err":null}"#),
            ok(r#"{"Allow":false,"Msg":"not you"}"#),
            ok("{}"),
            ok(r#"{"Allow":true,"Err":"the database is gone"}"#),
            ok("yes"),
            "HTTP/1.1 500 Oops\r\ncontent-length: 14\r\n\r\n{\"Err\":\"oh no\"}",
            "HTTP/1.1 404 No\r\ncontent-length: 4\r\n\r\nnone",
            "nonsense",
        ];
        serve(&directory.path().join("sockets/judge.sock"), answers);
        let judge = plugin(directory.path(), "judge");
        judge.activate().await.unwrap();
        assert_eq!(judge.activate().await.unwrap_err().to_string(), "plugin does not implement \"authz\"");
        let verdict = |allow, message: &str| Verdict { allow, message: message.to_owned() };
        let message = json!({"RequestMethod": "GET"});
        assert_eq!(judge.ask(REQUEST, &message).await.unwrap(), verdict(true, "why not"));
        assert_eq!(judge.ask(REQUEST, &message).await.unwrap(), verdict(false, "not you"));
        assert_eq!(judge.ask(RESPONSE, &message).await.unwrap(), verdict(false, ""));
        for expected in
            ["the database is gone", "its answer is not valid", "oh no", "404 Not Found: none", ""]
        {
            let error = judge.ask(REQUEST, &message).await.unwrap_err().to_string();
            assert!(error.contains(expected), "{error:?} does not say {expected:?}");
        }
        // It is gone.
        fs::remove_file(directory.path().join("sockets/judge.sock")).unwrap();
        assert_eq!(judge.ask(REQUEST, &message).await.unwrap_err().to_string(), "plugin not found");
    }
}
