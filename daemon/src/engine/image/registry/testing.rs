//! A registry on loopback that can be told to misbehave, for tests.

use std::{
    collections::{HashMap, VecDeque},
    convert::Infallible,
    io::Write,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard},
};

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::{HeaderMap, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::{
    body::{Frame, Incoming},
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;

use crate::engine::image::Digest;

type Body = BoxBody<Bytes, std::io::Error>;

/// How the registry misbehaves.
#[derive(Default)]
pub(crate) struct Manners {
    /// Tokens are needed; these get one (user, password), or anyone if there is no password.
    pub(crate) tokens: Option<(String, String)>,
    /// Tokens do not suffice for anything.
    pub(crate) deny: bool,
    /// `Basic` is asked for, in this form.
    pub(crate) basic: Option<String>,
    /// Each blob's body is cut after so many bytes, so many times in all.
    pub(crate) cut: Option<(usize, usize)>,
    /// `Range` is not honoured.
    pub(crate) ignore_range: bool,
    /// The next answers below /v2/<name>, before anything else: status, Retry-After.
    pub(crate) refuse: VecDeque<(u16, Option<&'static str>)>,
    /// Blobs are elsewhere: the base of a URL.
    pub(crate) redirect: Option<String>,
    /// Blobs stop after so many bytes and never go on.
    pub(crate) stall: Option<usize>,
}

#[derive(Default)]
pub(crate) struct State {
    pub(crate) manners: Manners,
    manifests: HashMap<String, Bytes>,
    blobs: HashMap<String, Bytes>,
    /// `METHOD path [Range] [auth]`.
    pub(crate) log: Vec<String>,
}

/// The registry; it ends with the test's runtime.
#[derive(Clone)]
pub(crate) struct TestRegistry {
    pub(crate) address: SocketAddr,
    state: Arc<Mutex<State>>,
}

/// An image to serve.
pub(crate) struct TestImage {
    pub(crate) config: Vec<u8>,
    /// Uncompressed digest, compressed bytes.
    pub(crate) layers: Vec<(Digest, Vec<u8>)>,
}

impl TestImage {
    /// A layer for each list of files.
    pub(crate) fn new(layers: &[&[(&str, &[u8])]]) -> Self {
        Self::for_platform(layers, "amd64")
    }

    pub(crate) fn for_platform(layers: &[&[(&str, &[u8])]], architecture: &str) -> Self {
        let layers: Vec<_> = layers
            .iter()
            .map(|files| {
                let tar = tar_of(files);
                (Digest::of(&tar), gzip(&tar))
            })
            .collect();
        let ids: Vec<_> = layers.iter().map(|(id, _)| id.to_string()).collect();
        let config = serde_json::json!({
            "architecture": architecture, "os": "linux", "created": "2024-01-02T03:04:05Z",
            "config": {"Cmd": ["sh"], "Env": ["PATH=/bin"], "Labels": {"kind": "test"}},
            "rootfs": {"type": "layers", "diff_ids": ids},
            "history": ids.iter().map(|_| serde_json::json!({"created_by": "ADD"})).collect::<Vec<_>>(),
        });
        Self { config: config.to_string().into_bytes(), layers }
    }

    pub(crate) fn id(&self) -> Digest {
        Digest::of(&self.config)
    }

    pub(crate) fn manifest(&self) -> Vec<u8> {
        let layers: Vec<_> = self
            .layers
            .iter()
            .map(|(_, bytes)| descriptor("application/vnd.oci.image.layer.v1.tar+gzip", bytes))
            .collect();
        serde_json::json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": descriptor("application/vnd.oci.image.config.v1+json", &self.config), "layers": layers,
        })
        .to_string()
        .into_bytes()
    }
}

pub(crate) fn descriptor(kind: &str, bytes: &[u8]) -> serde_json::Value {
    serde_json::json!({"mediaType": kind, "digest": Digest::of(bytes), "size": bytes.len()})
}

pub(crate) fn tar_of(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, data) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, *data).unwrap();
    }
    tar.into_inner().unwrap()
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Bytes that gzip cannot make smaller.
pub(crate) fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

impl TestRegistry {
    pub(crate) async fn start() -> Self {
        Self::serve(None).await
    }

    /// The same behind TLS.
    pub(crate) async fn start_tls(config: rustls::ServerConfig) -> Self {
        Self::serve(Some(tokio_rustls::TlsAcceptor::from(Arc::new(config)))).await
    }

    async fn serve(tls: Option<tokio_rustls::TlsAcceptor>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let this = Self { address: listener.local_addr().unwrap(), state: Arc::default() };
        let registry = this.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (registry, tls) = (registry.clone(), tls.clone());
                tokio::spawn(async move {
                    let service = service_fn(move |request| {
                        let registry = registry.clone();
                        async move { Ok::<_, Infallible>(registry.answer(&request)) }
                    });
                    let http = hyper::server::conn::http1::Builder::new();
                    match tls {
                        None => drop(http.serve_connection(TokioIo::new(stream), service).await),
                        Some(tls) => {
                            if let Ok(stream) = tls.accept(stream).await {
                                drop(http.serve_connection(TokioIo::new(stream), service).await);
                            }
                        }
                    }
                });
            }
        });
        this
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub(crate) fn name(&self, rest: &str) -> String {
        format!("{}/{rest}", self.address)
    }

    pub(crate) fn add_blob(&self, bytes: &[u8]) {
        self.state().blobs.insert(Digest::of(bytes).to_string(), Bytes::copy_from_slice(bytes));
    }

    /// A blob that is not what its digest says.
    pub(crate) fn corrupt_blob(&self, digest: &Digest, bytes: &[u8]) {
        self.state().blobs.insert(digest.to_string(), Bytes::copy_from_slice(bytes));
    }

    /// `name` is `repository:tag`; the manifest is there by its digest too.
    pub(crate) fn add_manifest(&self, name: &str, bytes: &[u8]) -> Digest {
        let digest = Digest::of(bytes);
        let (repository, _) = name.rsplit_once(':').unwrap();
        let bytes = Bytes::copy_from_slice(bytes);
        let mut state = self.state();
        state.manifests.insert(format!("{repository}:{digest}"), bytes.clone());
        state.manifests.insert(name.to_owned(), bytes);
        digest
    }

    pub(crate) fn add(&self, name: &str, image: &TestImage) -> Digest {
        self.add_blob(&image.config);
        for (_, bytes) in &image.layers {
            self.add_blob(bytes);
        }
        self.add_manifest(name, &image.manifest())
    }

    /// Requests whose line contains `part`.
    pub(crate) fn seen(&self, part: &str) -> usize {
        self.state().log.iter().filter(|line| line.contains(part)).count()
    }

    fn answer(&self, request: &Request<Incoming>) -> Response<Body> {
        let mut state = self.state();
        let path = request.uri().path().to_owned();
        let header = |name| request.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or("");
        let (range, auth) = (header(header::RANGE).to_owned(), header(header::AUTHORIZATION).to_owned());
        state.log.push(format!("{} {} {range} {auth}", request.method(), request.uri()));
        if path == "/token" {
            return token(&state, &auth, request.uri().query().unwrap_or(""));
        }
        if path == "/v1/search" {
            return plain(
                StatusCode::OK,
                r#"{"num_results":2,"results":[{"name":"official","is_official":true,"star_count":1},
                    {"name":"starred","star_count":5,"description":"d"}]}"#,
            );
        }
        let below = path.strip_prefix("/v2/").unwrap_or("");
        if !below.is_empty()
            && let Some((status, retry)) = state.manners.refuse.pop_front()
        {
            let mut response = error(status, "TOOMANYREQUESTS", "slow down");
            if let Some(retry) = retry {
                response.headers_mut().insert(header::RETRY_AFTER, retry.parse().unwrap());
            }
            return response;
        }
        if let Some(refusal) = self.refusal(&state, &auth) {
            return refusal;
        }
        if below.is_empty() {
            return plain(StatusCode::OK, "{}");
        }
        if let Some((repository, name)) = below.split_once("/manifests/") {
            return match state.manifests.get(&format!("{repository}:{name}")) {
                Some(bytes) => plain(StatusCode::OK, bytes.clone()),
                None => error(404, "MANIFEST_UNKNOWN", "manifest unknown"),
            };
        }
        if let Some((repository, _)) = below.split_once("/tags/list") {
            let prefix = format!("{repository}:");
            let mut tags: Vec<_> = (state.manifests.keys())
                .filter_map(|name| name.strip_prefix(&prefix))
                .filter(|tag| !tag.contains(':'))
                .collect();
            tags.sort_unstable();
            return plain(StatusCode::OK, serde_json::json!({"name": repository, "tags": tags}).to_string());
        }
        let Some((_, digest)) = below.split_once("/blobs/") else { return error(404, "NAME_UNKNOWN", "no") };
        if let Some(base) = &state.manners.redirect {
            let mut response = plain(StatusCode::TEMPORARY_REDIRECT, "");
            let location = format!("{base}{path}");
            response.headers_mut().insert(header::LOCATION, location.parse().unwrap());
            return response;
        }
        match state.blobs.get(digest).cloned() {
            Some(bytes) => blob(&mut state.manners, &bytes, &range),
            None => error(404, "BLOB_UNKNOWN", "blob unknown to registry"),
        }
    }

    fn refusal(&self, state: &State, auth: &str) -> Option<Response<Body>> {
        let manners = &state.manners;
        let challenge = if let Some(basic) = &manners.basic {
            (auth != basic).then(|| "Basic realm=\"test\"".to_owned())
        } else if manners.tokens.is_some() || manners.deny {
            let realm = format!("Bearer realm=\"http://{}/token\",service=\"test registry\"", self.address);
            if auth != "Bearer secret-token" {
                Some(realm)
            } else {
                manners.deny.then(|| format!("{realm},error=\"insufficient_scope\""))
            }
        } else {
            None
        };
        challenge.map(|challenge| {
            let mut response = error(401, "UNAUTHORIZED", "authentication required");
            response.headers_mut().insert(header::WWW_AUTHENTICATE, challenge.parse().unwrap());
            response
        })
    }
}

fn token(state: &State, auth: &str, query: &str) -> Response<Body> {
    let login = query.contains("offline_token=true");
    // A refresh token comes in a form, which is not looked into.
    let known = query.is_empty();
    assert!(known || query.contains("service=test%20registry"), "{query}");
    assert!(known || login != query.contains("scope=repository%3A"), "{query}");
    if known {
        return plain(StatusCode::OK, r#"{"access_token":"secret-token","expires_in":300}"#);
    }
    if let Some((user, password)) = state.manners.tokens.as_ref().filter(|(_, password)| !password.is_empty())
    {
        use base64::Engine as _;
        let pair = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
        if auth != format!("Basic {pair}") {
            return error(401, "UNAUTHORIZED", "incorrect username or password");
        }
    }
    match login {
        true => plain(StatusCode::OK, r#"{"token":"secret-token","refresh_token":"identity"}"#),
        false => plain(StatusCode::OK, r#"{"token":"secret-token","expires_in":300}"#),
    }
}

fn blob(manners: &mut Manners, bytes: &Bytes, range: &str) -> Response<Body> {
    let start = range.strip_prefix("bytes=").and_then(|range| range.strip_suffix('-')?.parse::<usize>().ok());
    let start = start.filter(|_| !manners.ignore_range).unwrap_or(0);
    let total = bytes.len();
    let rest = bytes.slice(start.min(total)..);
    let mut headers = HeaderMap::new();
    headers.insert(header::CONTENT_LENGTH, rest.len().into());
    let status = if start > 0 {
        headers
            .insert(header::CONTENT_RANGE, format!("bytes {start}-{}/{total}", total - 1).parse().unwrap());
        StatusCode::PARTIAL_CONTENT
    } else {
        StatusCode::OK
    };
    let sent = |length: usize| rest.slice(..length.min(rest.len()));
    let frames = |bytes: Bytes| stream::iter([Ok(Frame::data(bytes))]);
    let body = if let Some(length) = manners.stall {
        BodyExt::boxed(StreamBody::new(frames(sent(length)).chain(stream::pending())))
    } else if let Some((length, times @ 1..)) = manners.cut {
        manners.cut = Some((length, times - 1));
        let broken = stream::iter([Err(std::io::Error::other("cut"))]);
        // The piece goes out before the connection breaks.
        let pause = stream::once(async {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            Ok(Frame::data(Bytes::new()))
        });
        BodyExt::boxed(StreamBody::new(frames(sent(length)).chain(pause).chain(broken)))
    } else {
        full(rest.clone())
    };
    let mut response = Response::new(body);
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    response
}

fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed()
}

fn plain(status: StatusCode, body: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(full(body));
    *response.status_mut() = status;
    response
}

fn error(status: u16, code: &str, message: &str) -> Response<Body> {
    let body = serde_json::json!({"errors": [{"code": code, "message": message}]}).to_string();
    let mut response = plain(StatusCode::from_u16(status).unwrap(), body);
    response.headers_mut().insert(header::CONTENT_TYPE, "application/json".parse().unwrap());
    response
}
