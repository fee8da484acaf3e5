//! Responses: JSON, nothing, or a stream.

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use http::{
    Response, StatusCode,
    header::{CONTENT_TYPE, HeaderValue},
};
use http_body_util::{BodyExt, Empty, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::Frame;
use serde::Serialize;

use super::stream::Hijack;
use crate::engine::{Error, Result};

/// A response's body: whole, or as it comes. An error ends the connection without the body's end, so that
/// the client knows.
pub type Body = UnsyncBoxBody<Bytes, Error>;

/// What a handler answers.
pub enum Reply {
    /// An ordinary response.
    Response(Response<Body>),
    /// The connection itself becomes a process's stdio.
    Hijack(Hijack),
}

impl From<Response<Body>> for Reply {
    fn from(response: Response<Body>) -> Self {
        Self::Response(response)
    }
}

/// A whole body.
pub fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

/// A status and nothing else.
pub fn status(status: StatusCode) -> Response<Body> {
    let mut response = Response::new(Empty::new().map_err(|never| match never {}).boxed_unsync());
    *response.status_mut() = status;
    response
}

/// 204.
pub fn no_content() -> Response<Body> {
    status(StatusCode::NO_CONTENT)
}

/// 200 and a value.
///
/// # Errors
/// Internal: the value cannot be JSON.
pub fn json(value: &impl Serialize) -> Result<Response<Body>> {
    json_with(StatusCode::OK, value)
}

/// A status and a value, ended by a newline as Go's encoder ends it.
///
/// # Errors
/// Internal: the value cannot be JSON.
pub fn json_with(status: StatusCode, value: &impl Serialize) -> Result<Response<Body>> {
    let mut text = serde_json::to_vec(value).map_err(|error| Error::internal(error.to_string()))?;
    text.push(b'\n');
    let mut response = Response::new(full(text));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(response)
}

/// 200 and a body that comes piece by piece; each piece is sent at once, the head before the first.
pub fn streamed<S>(content_type: &'static str, pieces: S) -> Response<Body>
where
    S: Stream<Item = Result<Bytes>> + Send + 'static,
{
    let mut response =
        Response::new(StreamBody::new(pieces.map(|piece| piece.map(Frame::data))).boxed_unsync());
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}
