//! HTTP as registries need it: redirects that leak nothing, bounded retries, timeouts, capped bodies.

use std::{
    collections::HashMap,
    error::Error as StdError,
    io,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri, header, uri::Scheme};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_rustls::HttpsConnector;
use hyper_util::{client::legacy, rt::TokioExecutor};

use super::{RegistryError, dial::Dialer, endpoint::Insecure, tls};

/// Hops of one request.
const MAX_REDIRECTS: usize = 10;

/// Patience with registries.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// Tries of one request, the first included.
    pub attempts: u32,
    /// The pause after the first failure; it doubles.
    pub pause: Duration,
    /// The longest pause, also if the registry asks for a longer one by `Retry-After`.
    pub longest_pause: Duration,
    /// For a connection to come about, for an answer to begin, and between two pieces of its body.
    pub idle: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self { attempts: 5, pause: seconds(1), longest_pause: seconds(30), idle: seconds(60) }
    }
}

/// What is sent, and to where.
#[derive(Debug, Clone)]
pub(crate) struct Outgoing {
    /// The whole URL.
    pub url: String,
    /// POST this form; else GET.
    pub form: Option<String>,
    /// Another method, and what it carries. Never sent along a redirect.
    pub upload: Option<(Method, Bytes)>,
    /// `Accept`, `Range`.
    pub headers: HeaderMap,
    /// `Authorization`: goes to this URL's host only.
    pub authorization: Option<HeaderValue>,
    /// Whether the first host is trusted without a proof.
    pub insecure: bool,
    /// Whether a failure is worth another try.
    pub retry: bool,
}

impl Outgoing {
    /// A GET.
    pub(crate) fn get(url: String, insecure: bool) -> Self {
        Self {
            url,
            form: None,
            upload: None,
            headers: HeaderMap::new(),
            authorization: None,
            insecure,
            retry: true,
        }
    }
}

type Connector = HttpsConnector<Dialer>;
type Http = legacy::Client<Connector, Full<Bytes>>;

/// The way to all registries. One a daemon: it keeps connections.
pub(crate) struct Client {
    dialer: Dialer,
    insecure: Insecure,
    certificates: Option<PathBuf>,
    patience: Patience,
    unverified: Http,
    verified: Mutex<HashMap<String, Http>>,
}

impl Client {
    /// `certificates` is Docker's `certs.d`: authorities for one host each.
    pub(crate) fn new(insecure: Insecure, certificates: Option<PathBuf>, patience: Patience) -> Self {
        let dialer = Dialer::new(patience.idle.min(Duration::from_secs(30)));
        let unverified = http_client(&dialer, tls::unverified());
        Self { dialer, insecure, certificates, patience, unverified, verified: Mutex::default() }
    }

    /// How patient it is.
    pub(crate) fn patience(&self) -> &Patience {
        &self.patience
    }

    /// Which registries need no proof.
    pub(crate) fn insecure(&self) -> &Insecure {
        &self.insecure
    }

    /// Sends a request, follows redirects, tries again what may pass. Any status but those is an answer.
    ///
    /// # Errors
    /// [`RegistryError::Transport`].
    pub(crate) async fn send(&self, outgoing: &Outgoing) -> Result<Response<Incoming>, RegistryError> {
        let attempts = if outgoing.retry { self.patience.attempts.max(1) } else { 1 };
        for attempt in 1.. {
            let result = self.follow(outgoing).await;
            let pause = match &result {
                Ok(response) if is_passing(response.status()) => retry_after(response.headers()),
                Ok(_) => return result,
                Err(_) => None,
            };
            if attempt >= attempts {
                return result;
            }
            tokio::time::sleep(self.pause(attempt, pause)).await;
        }
        unreachable!("the loop ends at the last attempt")
    }

    /// The pause before the attempt after `attempt`.
    pub(crate) fn pause(&self, attempt: u32, asked: Option<Duration>) -> Duration {
        let doubled = self.patience.pause.saturating_mul(1 << attempt.saturating_sub(1).min(16));
        asked.unwrap_or(doubled).min(self.patience.longest_pause)
    }

    async fn follow(&self, outgoing: &Outgoing) -> Result<Response<Incoming>, RegistryError> {
        let method = match (&outgoing.upload, &outgoing.form) {
            (Some((method, _)), _) => method.clone(),
            (None, Some(_)) => Method::POST,
            (None, None) => Method::GET,
        };
        let failed = |url: &str, cause: String| RegistryError::Transport {
            method: go_name(&method),
            url: url.to_owned(),
            cause,
        };
        let first = parse(&outgoing.url).map_err(|cause| failed(&outgoing.url, cause))?;
        let (mut target, mut insecure) = (first.clone(), outgoing.insecure);
        for _ in 0..=MAX_REDIRECTS {
            let mut request = Request::new(Full::default());
            *request.method_mut() = method.clone();
            *request.uri_mut() = target.clone();
            *request.headers_mut() = outgoing.headers.clone();
            if let Some(form) = &outgoing.form {
                *request.body_mut() = Full::from(form.clone());
                let kind = HeaderValue::from_static("application/x-www-form-urlencoded");
                request.headers_mut().insert(header::CONTENT_TYPE, kind);
            }
            if let Some((_, bytes)) = &outgoing.upload {
                *request.body_mut() = Full::from(bytes.clone());
            }
            let agent = HeaderValue::from_static(concat!("bulkhead/", env!("CARGO_PKG_VERSION")));
            request.headers_mut().insert(header::USER_AGENT, agent);
            if let Some(value) = outgoing.authorization.as_ref().filter(|_| same_origin(&first, &target)) {
                let mut value = value.clone();
                value.set_sensitive(true);
                request.headers_mut().insert(header::AUTHORIZATION, value);
            }
            let url = target.to_string();
            let http = self.http(&target, insecure);
            let response = match tokio::time::timeout(self.patience.idle, http.request(request)).await {
                Ok(Ok(response)) => response,
                Ok(Err(error)) => return Err(failed(&url, cause(&error))),
                Err(_) => return Err(failed(&url, "timeout awaiting response headers".to_owned())),
            };
            // A form carries secrets: where it is sent on to is not ours to know.
            let head = method == Method::HEAD;
            if !is_redirect(response.status())
                || outgoing.form.is_some()
                || (outgoing.upload.is_some() && !head)
            {
                return Ok(response);
            }
            let location = response.headers().get(header::LOCATION).and_then(|value| value.to_str().ok());
            let next = location.and_then(|location| join(&target, location));
            let next = next.ok_or_else(|| failed(&url, "redirect without a usable Location".to_owned()))?;
            let authority = next.authority().map_or("", http::uri::Authority::as_str);
            let next_insecure =
                if same_origin(&target, &next) { insecure } else { self.insecure.contains(authority).await };
            if next.scheme() == Some(&Scheme::HTTP)
                && target.scheme() == Some(&Scheme::HTTPS)
                && !next_insecure
            {
                return Err(failed(&url, format!("redirect from https to {next} is refused")));
            }
            (target, insecure) = (next, next_insecure);
        }
        Err(failed(&outgoing.url, format!("stopped after {MAX_REDIRECTS} redirects")))
    }

    fn http(&self, target: &Uri, insecure: bool) -> Http {
        if insecure {
            return self.unverified.clone();
        }
        let authority = target.authority().map_or("", http::uri::Authority::as_str);
        // A host of its own authorities gets a client of its own, all others share one.
        let own = self.certificates.as_ref().map(|root| root.join(authority)).filter(|path| path.is_dir());
        let key = if own.is_some() { authority } else { "" };
        let mut clients = self.verified.lock().unwrap_or_else(PoisonError::into_inner);
        clients
            .entry(key.to_owned())
            .or_insert_with(|| http_client(&self.dialer, tls::verified(own.as_deref())))
            .clone()
    }
}

/// As Go's client calls a method in its errors.
fn go_name(method: &Method) -> &'static str {
    match *method {
        Method::POST => "Post",
        Method::PUT => "Put",
        Method::PATCH => "Patch",
        Method::HEAD => "Head",
        _ => "Get",
    }
}

fn http_client(dialer: &Dialer, config: Arc<rustls::ClientConfig>) -> Http {
    let connector = hyper_rustls::HttpsConnectorBuilder::new()
        .with_tls_config(Arc::unwrap_or_clone(config))
        .https_or_http()
        .enable_http1()
        .wrap_connector(dialer.clone());
    legacy::Client::builder(TokioExecutor::new()).pool_max_idle_per_host(8).build(connector)
}

/// A body of at most `cap` bytes.
///
/// # Errors
/// It is longer, breaks off, or stalls for `idle`.
pub(super) async fn collect(body: Incoming, cap: usize, idle: Duration) -> Result<Bytes, String> {
    let mut body = body;
    let mut bytes = bytes::BytesMut::new();
    loop {
        let frame = tokio::time::timeout(idle, body.frame()).await.map_err(|_| "timeout reading the body")?;
        match frame {
            None => return Ok(bytes.freeze()),
            Some(Err(error)) => return Err(cause(&error)),
            Some(Ok(frame)) => {
                let Ok(data) = frame.into_data() else { continue };
                if bytes.len() + data.len() > cap {
                    return Err(format!("it has more than {cap} bytes"));
                }
                bytes.extend_from_slice(&data);
            }
        }
    }
}

/// The innermost cause that says something, in Go's words where users know them.
pub(super) fn cause(error: &(dyn StdError + 'static)) -> String {
    let mut deepest: &(dyn StdError + 'static) = error;
    loop {
        if let Some(tls) = deepest.downcast_ref::<rustls::Error>() {
            return describe_tls(tls);
        }
        // An error inside an I/O error is its content, and not always its source.
        let inside = deepest.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        deepest = match inside {
            Some(inside) => inside,
            None => match deepest.source() {
                Some(source) => source,
                None => return deepest.to_string(),
            },
        };
    }
}

fn describe_tls(error: &rustls::Error) -> String {
    use rustls::{CertificateError, Error};
    let certificate = |text: &str| format!("tls: failed to verify certificate: x509: {text}");
    match error {
        Error::InvalidMessage(_) => "http: server gave HTTP response to HTTPS client".to_owned(),
        Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
            certificate("certificate signed by unknown authority")
        }
        Error::InvalidCertificate(problem) => certificate(&problem.to_string()),
        other => format!("tls: {other}"),
    }
}

fn parse(url: &str) -> Result<Uri, String> {
    let uri: Uri = url.parse().map_err(|_| "invalid URL".to_owned())?;
    if uri.authority().is_none() || !matches!(uri.scheme_str(), Some("http" | "https")) {
        return Err("unsupported protocol scheme".to_owned());
    }
    Ok(uri)
}

fn same_origin(one: &Uri, other: &Uri) -> bool {
    one.scheme() == other.scheme() && one.authority() == other.authority()
}

fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

/// Statuses that may be another one the next time.
fn is_passing(status: StatusCode) -> bool {
    matches!(status.as_u16(), 429 | 500 | 502 | 503 | 504)
}

/// `Retry-After` in seconds; a date is not honoured.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim().parse().ok().map(Duration::from_secs)
}

/// The URL that `location` means when it comes from `base`.
pub(super) fn join(base: &Uri, location: &str) -> Option<Uri> {
    let location = location.split('#').next().unwrap_or_default();
    if location.starts_with("http://") || location.starts_with("https://") {
        return parse(location).ok();
    }
    let (scheme, authority) = (base.scheme_str()?, base.authority()?);
    let absolute = if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else if location.starts_with('/') {
        format!("{scheme}://{authority}{location}")
    } else {
        let directory = base.path().rsplit_once('/').map_or("", |(directory, _)| directory);
        format!("{scheme}://{authority}{directory}/{location}")
    };
    parse(&absolute).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_are_joined() {
        let base: Uri = "https://r.example:5000/v2/a/blobs/x?y=z".parse().unwrap();
        for (location, joined) in [
            ("https://cdn.example/b?c", Some("https://cdn.example/b?c")),
            ("/other", Some("https://r.example:5000/other")),
            ("//cdn.example/b", Some("https://cdn.example/b")),
            ("y", Some("https://r.example:5000/v2/a/blobs/y")),
            ("https://", None),
            ("http:// x", None),
        ] {
            assert_eq!(join(&base, location).map(|uri| uri.to_string()).as_deref(), joined, "{location}");
        }
    }

    #[test]
    fn pauses_double_and_are_bounded() {
        let seconds = Duration::from_secs;
        let client = Client::new(Insecure::default(), None, Patience::default());
        assert_eq!([1, 2, 3, 9].map(|attempt| client.pause(attempt, None)), [1, 2, 4, 30].map(seconds));
        assert_eq!(client.pause(1, Some(seconds(7))), seconds(7));
        assert_eq!(client.pause(1, Some(seconds(7000))), seconds(30));
    }
}
