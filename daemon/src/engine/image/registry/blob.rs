//! A blob as a stream of chunks that survives cut connections.
//!
//! ```text
//!  open ─ 200 ─▶ reading ── chunk ─▶ …  ── all bytes ─▶ end
//!                   │ cut, stalled
//!                   ▼
//!                pause ─▶ GET with Range: bytes=<had>- ─ 206 ─▶ reading
//!                                                        200 ─▶ skip what we had ─▶ reading
//! ```
//! The descriptor's size is binding: more is an error, less is a cut. Digests are the caller's.

use bytes::{Buf, Bytes};
use http::{HeaderMap, HeaderValue, StatusCode, header};
use http_body_util::BodyExt;
use hyper::body::Incoming;

use super::{RegistryError, Session, client::cause};
use crate::engine::image::digest::Digest;

/// Bytes that must have come before a further cut counts as the first again.
const PROGRESS: u64 = 4 << 20;

/// See the module.
pub struct Blob<'a> {
    session: &'a Session<'a>,
    digest: Digest,
    size: u64,
    offset: u64,
    /// What of the present body is to be thrown away: it began anew.
    skip: u64,
    body: Option<Incoming>,
    failures: u32,
    /// Where the count of failures began.
    mark: u64,
}

impl<'a> Blob<'a> {
    pub(super) async fn open(
        session: &'a Session<'a>,
        digest: Digest,
        size: u64,
    ) -> Result<Self, RegistryError> {
        let mut blob = Self { session, digest, size, offset: 0, skip: 0, body: None, failures: 0, mark: 0 };
        blob.request().await?;
        Ok(blob)
    }

    /// The next piece; None after the last.
    ///
    /// # Errors
    /// The connection was cut too often, or the registry sends something else.
    pub async fn next(&mut self) -> Result<Option<Bytes>, RegistryError> {
        loop {
            if self.offset == self.size {
                return Ok(None);
            }
            let problem = match self.read().await {
                Ok(Some(chunk)) => return Ok(Some(chunk)),
                Ok(None) => "unexpected EOF".to_owned(),
                Err(Cut::Over) => {
                    return Err(RegistryError::Invalid(format!(
                        "blob {} has more than the {} bytes that its manifest names",
                        self.digest, self.size
                    )));
                }
                Err(Cut::Broken(problem)) => problem,
            };
            self.recover(problem).await?;
        }
    }

    /// Bytes that came so far.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    async fn read(&mut self) -> Result<Option<Bytes>, Cut> {
        let idle = self.session.registries().client().patience().idle;
        let Some(body) = &mut self.body else { return Ok(None) };
        loop {
            let frame = tokio::time::timeout(idle, body.frame()).await;
            let frame = frame.map_err(|_| Cut::Broken("timeout reading the body".to_owned()))?;
            let Some(frame) = frame else { return Ok(None) };
            let frame = frame.map_err(|error| Cut::Broken(cause(&error)))?;
            let Ok(mut data) = frame.into_data() else { continue };
            let skipped = self.skip.min(data.len() as u64);
            data.advance(usize::try_from(skipped).unwrap_or(data.len()));
            self.skip -= skipped;
            if data.is_empty() {
                continue;
            }
            let after = self.offset + data.len() as u64;
            if after > self.size {
                return Err(Cut::Over);
            }
            self.offset = after;
            return Ok(Some(data));
        }
    }

    /// Pauses and asks for the rest.
    async fn recover(&mut self, problem: String) -> Result<(), RegistryError> {
        let client = self.session.registries().client();
        self.body = None;
        if self.offset - self.mark >= PROGRESS {
            (self.mark, self.failures) = (self.offset, 0);
        }
        self.failures += 1;
        if self.failures >= client.patience().attempts {
            return Err(self.failed(problem));
        }
        tracing::debug!(blob = %self.digest, offset = self.offset, problem, "a blob's transfer was cut");
        tokio::time::sleep(client.pause(self.failures, None)).await;
        self.request().await
    }

    async fn request(&mut self) -> Result<(), RegistryError> {
        let mut headers = HeaderMap::new();
        if self.offset > 0 {
            let range = format!("bytes={}-", self.offset);
            headers.insert(
                header::RANGE,
                HeaderValue::from_str(&range).map_err(|e| self.failed(e.to_string()))?,
            );
        }
        let response = self.session.get(&self.url_path(), headers).await?;
        self.skip = match response.status() {
            StatusCode::PARTIAL_CONTENT => {
                let range =
                    response.headers().get(header::CONTENT_RANGE).and_then(|value| value.to_str().ok());
                let start =
                    range.and_then(|range| range.strip_prefix("bytes ")?.split('-').next()?.parse().ok());
                if start != Some(self.offset) {
                    return Err(
                        self.failed(format!("the registry sent another range: {:.100}", range.unwrap_or("")))
                    );
                }
                0
            }
            _ => self.offset,
        };
        self.body = Some(response.into_body());
        Ok(())
    }

    fn url_path(&self) -> String {
        format!("{}/blobs/{}", self.session.path(), self.digest)
    }

    fn failed(&self, cause: String) -> RegistryError {
        let url = self.session.endpoint().url(&self.url_path());
        RegistryError::Transport { method: "Get", url, cause }
    }
}

enum Cut {
    /// More came than there should be.
    Over,
    /// It can be asked for again.
    Broken(String),
}
