//! Giving a registry what it has not: blobs and manifests.
//!
//! ```text
//!  has(digest)                HEAD blobs/<digest>
//!  Upload::begin              POST blobs/uploads/            202, where to send it
//!         begin(mount)        POST …?mount=<digest>&from=…   201: it was there in another repository
//!         send(piece)         PATCH, the piece's range       202 ── cut ─▶ GET: how far it came ─▶ PATCH the rest
//!         finish(digest)      PUT ?digest=…                  201
//!  put_manifest               PUT manifests/<tag>
//! ```
//! A piece is kept until the registry has it, so a cut connection costs the rest of one piece.

use bytes::{Buf, Bytes};
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode, header};
use hyper::body::Incoming;

use super::{RegistryError, Session};
use crate::engine::image::digest::Digest;

/// A blob that is being uploaded.
pub struct Upload<'a> {
    session: &'a Session<'a>,
    location: String,
    sent: u64,
}

/// What comes of the wish for an upload.
pub enum Begun<'a> {
    /// It must be sent.
    Upload(Upload<'a>),
    /// The registry has it, from another of its repositories.
    Mounted,
}

impl Session<'_> {
    /// Whether the repository has a blob, and how large it is.
    ///
    /// # Errors
    /// The registry does not tell.
    pub async fn blob_size(&self, digest: &Digest) -> Result<Option<u64>, RegistryError> {
        let url = self.endpoint().url(&format!("{}/blobs/{digest}", self.path()));
        let answer = self.ask(Method::HEAD, url, HeaderMap::new(), Bytes::new()).await?;
        match answer.status() {
            StatusCode::NOT_FOUND => Ok(None),
            status if status.is_success() => {
                let length = answer.headers().get(header::CONTENT_LENGTH);
                Ok(length.and_then(|length| length.to_str().ok()?.parse().ok()))
            }
            _ => Err(self.refusal(answer).await),
        }
    }

    /// Begins to upload a blob, which another repository of the registry may have.
    ///
    /// # Errors
    /// The registry refuses.
    pub async fn begin_upload(&self, mount: Option<(&Digest, &str)>) -> Result<Begun<'_>, RegistryError> {
        let mut path = format!("{}/blobs/uploads/", self.path());
        if let Some((digest, from)) = mount {
            path.push_str(&format!("?mount={digest}&from={}", super::session::encode(from)));
        }
        let answer =
            self.ask(Method::POST, self.endpoint().url(&path), HeaderMap::new(), Bytes::new()).await?;
        match answer.status() {
            StatusCode::CREATED if mount.is_some() => Ok(Begun::Mounted),
            StatusCode::ACCEPTED => {
                let location = self.location(&answer)?;
                Ok(Begun::Upload(Upload { session: self, location, sent: 0 }))
            }
            _ => Err(self.refusal(answer).await),
        }
    }

    /// Gives the repository a manifest under a tag or its digest.
    ///
    /// # Errors
    /// The registry refuses: a blob is missing, for instance.
    pub async fn put_manifest(
        &self,
        name: &str,
        kind: &'static str,
        bytes: Bytes,
    ) -> Result<(), RegistryError> {
        let url = self.endpoint().url(&format!("{}/manifests/{name}", self.path()));
        let headers = HeaderMap::from_iter([(header::CONTENT_TYPE, HeaderValue::from_static(kind))]);
        let answer = self.ask(Method::PUT, url, headers, bytes).await?;
        if answer.status().is_success() { Ok(()) } else { Err(self.refusal(answer).await) }
    }

    fn location(&self, answer: &Response<Incoming>) -> Result<String, RegistryError> {
        let location = answer.headers().get(header::LOCATION).and_then(|value| value.to_str().ok());
        let base = self.endpoint().url("").parse().ok();
        let joined = location.zip(base).and_then(|(location, base)| super::client::join(&base, location));
        let joined = joined
            .ok_or_else(|| RegistryError::Invalid("the registry names no place for an upload".to_owned()))?;
        // What was asked for over TLS is not sent in the clear.
        if joined.scheme_str() != Some("https") && self.endpoint().scheme == "https" {
            return Err(RegistryError::Invalid(
                "the registry's place for an upload is without TLS".to_owned(),
            ));
        }
        Ok(joined.to_string())
    }
}

impl Upload<'_> {
    /// Sends the next bytes.
    ///
    /// # Errors
    /// The registry refuses, or the connection was cut too often.
    pub async fn send(&mut self, piece: Bytes) -> Result<(), RegistryError> {
        let end = self.sent + piece.len() as u64;
        let patience = *self.session.registries().client().patience();
        let mut failures = 0;
        while self.sent < end {
            let mut rest = piece.clone();
            rest.advance(piece.len() - usize::try_from(end - self.sent).unwrap_or(piece.len()));
            let mut headers = HeaderMap::new();
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
            let range = format!("{}-{}", self.sent, end - 1);
            let range = HeaderValue::try_from(range).map_err(|_| unusable("range"))?;
            headers.insert(header::CONTENT_RANGE, range);
            let answer = self.session.ask(Method::PATCH, self.location.clone(), headers, rest).await;
            let problem = match answer {
                Ok(answer) if answer.status() == StatusCode::ACCEPTED => {
                    self.location = self.session.location(&answer)?;
                    self.sent = end;
                    return Ok(());
                }
                Ok(answer) if answer.status().is_server_error() => self.session.refusal(answer).await,
                // It has another idea of how far it came, which it tells.
                Ok(answer) if answer.status() == StatusCode::RANGE_NOT_SATISFIABLE => {
                    self.session.refusal(answer).await
                }
                Ok(answer) => return Err(self.session.refusal(answer).await),
                Err(problem) => problem,
            };
            failures += 1;
            if failures >= patience.attempts.max(1) {
                return Err(problem);
            }
            tracing::info!(%problem, "an upload goes on where it was cut");
            tokio::time::sleep(self.session.registries().client().pause(failures, None)).await;
            let begin = end - piece.len() as u64;
            self.sent = self.came_to().await?.clamp(begin, end);
        }
        Ok(())
    }

    /// How many bytes the registry has.
    async fn came_to(&mut self) -> Result<u64, RegistryError> {
        let answer =
            self.session.ask(Method::GET, self.location.clone(), HeaderMap::new(), Bytes::new()).await?;
        if answer.status() != StatusCode::NO_CONTENT {
            return Err(self.session.refusal(answer).await);
        }
        let range = answer.headers().get(header::RANGE).and_then(|range| range.to_str().ok());
        let last =
            range.and_then(|range| range.trim_start_matches("bytes=").split_once('-')?.1.parse::<u64>().ok());
        if answer.headers().contains_key(header::LOCATION) {
            self.location = self.session.location(&answer)?;
        }
        // `0-0` is what registries say of nothing and of one byte.
        Ok(last.filter(|last| *last > 0).map_or(0, |last| last + 1))
    }

    /// Says that this was all, and what it is.
    ///
    /// # Errors
    /// The registry has something else.
    pub async fn finish(self, digest: &Digest) -> Result<(), RegistryError> {
        let separator = if self.location.contains('?') { '&' } else { '?' };
        let url =
            format!("{}{separator}digest={}", self.location, super::session::encode(&digest.to_string()));
        let mut headers = HeaderMap::new();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        let answer = self.session.ask(Method::PUT, url, headers, Bytes::new()).await?;
        if answer.status().is_success() { Ok(()) } else { Err(self.session.refusal(answer).await) }
    }
}

fn unusable(what: &str) -> RegistryError {
    RegistryError::Invalid(format!("an upload's {what} cannot be said"))
}
