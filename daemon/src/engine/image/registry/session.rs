//! One repository at one server: who we are there, its manifests and tags.

use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode, header};
use hyper::body::Incoming;
use serde::Deserialize;

use super::{
    Blob, Credentials, Endpoint, Registries, RegistryError,
    auth::{Bearer, Challenge, challenges},
    client::{Outgoing, collect},
    error,
    manifest::{ACCEPT, Descriptor},
};
use crate::engine::image::{digest::Digest, store::MAX_MANIFEST};

/// The most that is read of an error or a token, in bytes.
const MAX_ANSWER: usize = 1 << 20;
/// Tags that are listed, for `pull --all-tags`.
const MAX_TAGS: usize = 10_000;

/// One repository at one server.
pub struct Session<'a> {
    registries: &'a Registries,
    endpoint: Endpoint,
    /// The path of the repository, `library/busybox`.
    path: String,
    credentials: Option<Credentials>,
    /// What a token is to allow.
    actions: &'static str,
    authorization: Mutex<Option<HeaderValue>>,
    identity_token: Mutex<Option<String>>,
}

#[derive(Deserialize)]
struct Token {
    #[serde(default)]
    refresh_token: String,
    #[serde(default)]
    token: String,
    #[serde(default)]
    access_token: String,
}

#[derive(Deserialize)]
struct Tags {
    #[serde(default)]
    tags: Option<Vec<String>>,
}

impl<'a> Session<'a> {
    /// Sees whether a registry answers there.
    ///
    /// # Errors
    /// It does not.
    pub async fn open(
        registries: &'a Registries,
        endpoint: Endpoint,
        path: &str,
        credentials: Option<&Credentials>,
    ) -> Result<Session<'a>, RegistryError> {
        Self::open_for("pull", registries, endpoint, path, credentials).await
    }

    /// The same, for one who also wants to write there.
    ///
    /// # Errors
    /// No registry answers.
    pub async fn open_to_push(
        registries: &'a Registries,
        endpoint: Endpoint,
        path: &str,
        credentials: Option<&Credentials>,
    ) -> Result<Session<'a>, RegistryError> {
        Self::open_for("pull,push", registries, endpoint, path, credentials).await
    }

    async fn open_for(
        actions: &'static str,
        registries: &'a Registries,
        endpoint: Endpoint,
        path: &str,
        credentials: Option<&Credentials>,
    ) -> Result<Session<'a>, RegistryError> {
        let credentials = credentials.filter(|_| !endpoint.mirror).cloned();
        let session = Self {
            registries,
            endpoint,
            path: path.to_owned(),
            credentials,
            actions,
            authorization: Mutex::default(),
            identity_token: Mutex::default(),
        };
        let ping =
            Outgoing { retry: false, ..Outgoing::get(session.endpoint.url(""), session.endpoint.insecure) };
        let answer = registries.client().send(&ping).await?;
        if answer.status() == StatusCode::UNAUTHORIZED {
            // Knowing it beforehand spares a refusal of everything that is asked later.
            session.authorize(answer.headers()).await?;
        }
        Ok(session)
    }

    /// The server.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// The manifest that a tag or digest names, as it came, and its digest.
    ///
    /// # Errors
    /// There is none, it is too large, or it has not the digest.
    pub async fn manifest(&self, wanted: Wanted<'_>) -> Result<(Digest, Bytes), RegistryError> {
        let name = match wanted {
            Wanted::Tag(tag) => tag.to_owned(),
            Wanted::Digest(digest) => digest.to_string(),
        };
        let mut headers = HeaderMap::new();
        headers.insert(header::ACCEPT, HeaderValue::from_static(ACCEPT));
        let response = self.get(&format!("{}/manifests/{name}", self.path), headers).await?;
        let idle = self.registries.client().patience().idle;
        let bytes = collect(response.into_body(), MAX_MANIFEST, idle).await.map_err(|problem| {
            RegistryError::Invalid(format!("the manifest of {name} could not be read: {problem}"))
        })?;
        let digest = Digest::of(&bytes);
        match wanted {
            Wanted::Digest(expected) if expected != digest => {
                Err(RegistryError::Digest { what: "manifest", digest: expected })
            }
            _ => Ok((digest, bytes)),
        }
    }

    /// A blob, from its first byte.
    ///
    /// # Errors
    /// There is none.
    pub async fn blob(&'a self, descriptor: &Descriptor) -> Result<Blob<'a>, RegistryError> {
        Blob::open(self, descriptor.digest, descriptor.size).await
    }

    /// A small blob, whole and checked.
    ///
    /// # Errors
    /// There is none, it is larger than `cap` bytes, or has not its digest.
    pub async fn small_blob(
        &self,
        descriptor: &Descriptor,
        cap: usize,
        what: &'static str,
    ) -> Result<Bytes, RegistryError> {
        if descriptor.size > cap as u64 {
            return Err(RegistryError::Invalid(format!(
                "the {what} has {} bytes, more than {cap}",
                descriptor.size
            )));
        }
        let mut blob = Blob::open(self, descriptor.digest, descriptor.size).await?;
        let mut bytes = bytes::BytesMut::new();
        // The blob gives no more than the size it was opened with.
        while let Some(chunk) = blob.next().await? {
            bytes.extend_from_slice(&chunk);
        }
        if Digest::of(&bytes) == descriptor.digest {
            Ok(bytes.freeze())
        } else {
            Err(RegistryError::Digest { what, digest: descriptor.digest })
        }
    }

    /// Every tag of the repository.
    ///
    /// # Errors
    /// The registry does not tell.
    pub async fn tags(&self) -> Result<Vec<String>, RegistryError> {
        let mut all: Vec<String> = Vec::new();
        loop {
            let mut path = format!("{}/tags/list?n=1000", self.path);
            if let Some(last) = all.last() {
                path.push_str("&last=");
                path.push_str(&encode(last));
            }
            let response = self.get(&path, HeaderMap::new()).await?;
            let more = response.headers().contains_key(header::LINK);
            let idle = self.registries.client().patience().idle;
            let invalid = |problem: String| RegistryError::Invalid(format!("the list of tags: {problem}"));
            let bytes = collect(response.into_body(), MAX_MANIFEST, idle).await.map_err(invalid)?;
            let tags: Tags = serde_json::from_slice(&bytes).map_err(|error| invalid(error.to_string()))?;
            let before = all.len();
            for tag in tags.tags.unwrap_or_default() {
                if all.len() > MAX_TAGS {
                    return Err(invalid(format!("it has more than {MAX_TAGS} entries")));
                }
                if !all.contains(&tag) {
                    all.push(tag);
                }
            }
            if !more || all.len() == before {
                return Ok(all);
            }
        }
    }

    /// Gets something below `/v2/`, as whoever we are.
    pub(super) async fn get(
        &self,
        path: &str,
        headers: HeaderMap,
    ) -> Result<Response<Incoming>, RegistryError> {
        let outgoing = Outgoing { headers, ..Outgoing::get(self.endpoint.url(path), self.endpoint.insecure) };
        let response = self.send(outgoing).await?;
        if response.status().is_success() { Ok(response) } else { Err(self.refusal(response).await) }
    }

    /// Asks for something else than a GET, as whoever we are; any status is an answer. Where the URL is another
    /// server's, it is not told who.
    pub(super) async fn ask(
        &self,
        method: Method,
        url: String,
        headers: HeaderMap,
        bytes: Bytes,
    ) -> Result<Response<Incoming>, RegistryError> {
        // What changes something is tried again by whoever knows how far it came.
        let retry = method == Method::HEAD;
        let upload = Some((method, bytes));
        self.send(Outgoing { headers, upload, retry, ..Outgoing::get(url, self.endpoint.insecure) }).await
    }

    async fn send(&self, mut outgoing: Outgoing) -> Result<Response<Incoming>, RegistryError> {
        let ours = outgoing.url.starts_with(&self.endpoint.url(""));
        if ours {
            outgoing.authorization = self.authorization();
        }
        let mut response = self.registries.client().send(&outgoing).await?;
        if ours && response.status() == StatusCode::UNAUTHORIZED && self.may_ask_again(&response) {
            self.authorize(response.headers()).await?;
            outgoing.authorization = self.authorization();
            response = self.registries.client().send(&outgoing).await?;
        }
        Ok(response)
    }

    pub(super) fn registries(&self) -> &'a Registries {
        self.registries
    }

    /// The repository's path.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// What a login gets instead of the password, once it is through.
    pub(super) fn identity_token(&self) -> Option<String> {
        self.identity_token.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether it is about no repository but about who we are.
    fn is_login(&self) -> bool {
        self.path.is_empty()
    }

    fn authorization(&self) -> Option<HeaderValue> {
        self.authorization.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether another token could change the answer: none was sent, or it has expired. What the server
    /// simply does not allow it will not allow the next time.
    fn may_ask_again(&self, response: &Response<Incoming>) -> bool {
        let denied = bearer(response.headers()).is_some_and(|bearer| bearer.denied().is_some());
        self.authorization().is_none() || !denied
    }

    pub(super) async fn refusal(&self, response: Response<Incoming>) -> RegistryError {
        let idle = self.registries.client().patience().idle;
        refusal(response, idle).await
    }

    /// Gets what the server's challenge asks for.
    async fn authorize(&self, headers: &HeaderMap) -> Result<(), RegistryError> {
        let offered: Vec<_> = headers
            .get_all(header::WWW_AUTHENTICATE)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(challenges)
            .collect();
        let bearer = offered.iter().find_map(|challenge| match challenge {
            Challenge::Bearer(bearer) => Some(bearer),
            Challenge::Basic => None,
        });
        let value = match bearer {
            Some(bearer) => format!("Bearer {}", self.token(bearer).await?),
            None if offered.contains(&Challenge::Basic) => {
                let basic = self.credentials.as_ref().and_then(Credentials::basic);
                basic.ok_or_else(|| self.failed(self.endpoint.url(""), "no basic auth credentials"))?
            }
            // Asking on without will tell what it is about.
            None => return Ok(()),
        };
        let value = HeaderValue::from_str(&value)
            .map_err(|_| self.failed(self.endpoint.url(""), "the token is no valid header"))?;
        *self.authorization.lock().unwrap_or_else(PoisonError::into_inner) = Some(value);
        Ok(())
    }

    async fn token(&self, bearer: &Bearer) -> Result<String, RegistryError> {
        let credentials = self.credentials.clone().unwrap_or_default();
        if !credentials.registry_token.is_empty() {
            return Ok(credentials.registry_token);
        }
        let outgoing = self.token_request(bearer, &credentials).await?;
        let url = outgoing.url.clone();
        let response = self.registries.client().send(&outgoing).await?;
        if !response.status().is_success() {
            let error = self.refusal(response).await;
            return Err(match error {
                RegistryError::Answer { .. } => self.failed(url, &error.to_string()),
                error => error,
            });
        }
        let idle = self.registries.client().patience().idle;
        let body = collect(response.into_body(), MAX_ANSWER, idle)
            .await
            .map_err(|p| self.failed(url.clone(), &p))?;
        let token: Token = serde_json::from_slice(&body).map_err(|error| {
            self.failed(url.clone(), &format!("unable to decode token response: {error}"))
        })?;
        if self.is_login() && !token.refresh_token.is_empty() {
            *self.identity_token.lock().unwrap_or_else(PoisonError::into_inner) = Some(token.refresh_token);
        }
        let token = if token.token.is_empty() { token.access_token } else { token.token };
        if token.is_empty() {
            Err(self.failed(url, "authorization server did not include a token in the response"))
        } else {
            Ok(token)
        }
    }

    async fn token_request(
        &self,
        bearer: &Bearer,
        credentials: &Credentials,
    ) -> Result<Outgoing, RegistryError> {
        let realm = bearer.realm.as_str();
        let authority =
            realm.parse::<http::Uri>().ok().and_then(|uri| uri.authority().map(ToString::to_string));
        let Some(authority) = authority.filter(|_| realm.starts_with("http")) else {
            return Err(self.failed(realm.to_owned(), "the token server's URL is malformed"));
        };
        let insecure = self.registries.client().insecure().contains(&authority).await
            || (self.endpoint.insecure && authority == self.endpoint.authority);
        if realm.starts_with("http:") && !insecure {
            return Err(self.failed(realm.to_owned(), "a token server without TLS is not trusted"));
        }
        let scope = format!("repository:{}:{}", self.path, self.actions);
        if !credentials.identity_token.is_empty() {
            let mut form = vec![
                ("grant_type", "refresh_token"),
                ("service", bearer.service.as_str()),
                ("client_id", "docker"),
                ("scope", scope.as_str()),
                ("refresh_token", credentials.identity_token.as_str()),
            ];
            form.retain(|(name, _)| *name != "scope" || !self.is_login());
            let form = Some(query(&form));
            return Ok(Outgoing { form, ..Outgoing::get(realm.to_owned(), insecure) });
        }
        let mut parameters = match self.is_login() {
            true => vec![("client_id", "docker"), ("offline_token", "true")],
            false => vec![("scope", scope.as_str())],
        };
        if !bearer.service.is_empty() {
            parameters.push(("service", bearer.service.as_str()));
        }
        if !credentials.username.is_empty() {
            parameters.insert(0, ("account", credentials.username.as_str()));
        }
        let separator = if realm.contains('?') { '&' } else { '?' };
        let mut outgoing = Outgoing::get(format!("{realm}{separator}{}", query(&parameters)), insecure);
        let basic = credentials.basic().map(|value| HeaderValue::from_str(&value));
        outgoing.authorization = basic
            .transpose()
            .map_err(|_| self.failed(realm.to_owned(), "the credentials are no valid header"))?;
        Ok(outgoing)
    }

    fn failed(&self, url: String, cause: &str) -> RegistryError {
        RegistryError::Transport { method: "Get", url, cause: cause.to_owned() }
    }
}

/// What to ask for.
#[derive(Debug, Clone, Copy)]
pub enum Wanted<'a> {
    /// Whatever has the tag now.
    Tag(&'a str),
    /// Exactly this.
    Digest(Digest),
}

/// What an answer that is no success says.
async fn refusal(response: Response<Incoming>, idle: std::time::Duration) -> RegistryError {
    let status = response.status();
    if !status.is_client_error() {
        return RegistryError::Status(status.to_string());
    }
    let denied = bearer(response.headers()).and_then(|bearer| bearer.denied());
    let kind =
        response.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or("");
    let json = ["application/json", "application/vnd.api+json"].iter().any(|known| kind.starts_with(known));
    match collect(response.into_body(), MAX_ANSWER, idle).await {
        Ok(body) => error::from_body(status.as_u16(), json, &body, denied),
        Err(_) => RegistryError::Status(status.to_string()),
    }
}

fn bearer(headers: &HeaderMap) -> Option<Bearer> {
    let values = headers.get_all(header::WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(challenges).find_map(|challenge| match challenge {
        Challenge::Bearer(bearer) => Some(bearer),
        Challenge::Basic => None,
    })
}

fn query(parameters: &[(&str, &str)]) -> String {
    let pairs: Vec<_> = parameters.iter().map(|(name, value)| format!("{name}={}", encode(value))).collect();
    pairs.join("&")
}

/// Percent-encodes all but what a query may always hold.
pub(super) fn encode(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'~') {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}
