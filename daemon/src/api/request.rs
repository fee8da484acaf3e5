//! What handlers get: a request, parsed as far as every handler wants it.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, header::CONTENT_TYPE, request::Parts};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use jiff::Timestamp;
use serde::de::DeserializeOwned;

use super::{types, version::ApiVersion};
use crate::engine::{Engine, Error, Result};

/// The longest body that is read whole. Streams (image archives) are not read whole.
pub const MAX_BODY: usize = 16 << 20;

/// A request on its way through a handler.
pub struct Call {
    /// The engine.
    pub engine: Arc<Engine>,
    /// What the path named, or the current one.
    pub version: ApiVersion,
    /// The path's wildcards, decoded.
    pub params: Vec<String>,
    /// The query.
    pub query: Query,
    /// Method, headers…
    pub head: Parts,
    /// The body, not yet read.
    pub body: RequestBody,
}

/// A request's body. One that a handler leaves unread is read to its end and forgotten, within limits:
/// many clients write all of their request before they look at the answer, and a connection closed under
/// their hands would cost them the reason of a refusal.
pub struct RequestBody(Content);

enum Content {
    None,
    /// As it comes.
    Incoming(Incoming),
    /// What has been read already.
    Whole(Bytes),
}

/// How much of an unread body is read and forgotten.
const MAX_DRAIN: usize = 64 << 20;

/// How long that may take.
const DRAIN_TIME: Duration = Duration::from_secs(30);

impl RequestBody {
    /// A body that has just come.
    pub fn new(body: Incoming) -> Self {
        Self(Content::Incoming(body))
    }

    /// Reads all of it, and keeps it for who reads it next.
    ///
    /// # Errors
    /// None where it is longer than [`MAX_BODY`]. Invalid: the client went away.
    pub async fn whole(&mut self) -> Result<Bytes, Option<Error>> {
        let bytes = collect(self).await?;
        self.0 = Content::Whole(bytes.clone());
        Ok(bytes)
    }
}

impl Drop for RequestBody {
    fn drop(&mut self) {
        let Content::Incoming(mut body) = std::mem::replace(&mut self.0, Content::None) else { return };
        if body.is_end_stream() {
            return;
        }
        let drain = async move {
            let mut left = MAX_DRAIN;
            while let Some(Ok(frame)) = body.frame().await {
                match left.checked_sub(frame.data_ref().map_or(0, Bytes::len)) {
                    Some(rest) => left = rest,
                    None => return,
                }
            }
        };
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(tokio::time::timeout(DRAIN_TIME, drain));
        }
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match &mut self.0 {
            Content::Incoming(body) => Pin::new(body).poll_frame(context),
            Content::Whole(bytes) => {
                let bytes = std::mem::take(bytes);
                Poll::Ready((!bytes.is_empty()).then(|| Ok(Frame::data(bytes))))
            }
            Content::None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            Content::Incoming(body) => body.is_end_stream(),
            Content::Whole(bytes) => bytes.is_empty(),
            Content::None => true,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            Content::Incoming(body) => body.size_hint(),
            Content::Whole(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Content::None => SizeHint::with_exact(0),
        }
    }
}

impl Call {
    /// The path's first wildcard.
    pub fn name(&self) -> &str {
        self.params.first().map_or("", String::as_str)
    }

    /// The request's headers.
    pub fn headers(&self) -> &HeaderMap {
        &self.head.headers
    }

    /// The whole body.
    ///
    /// # Errors
    /// Invalid: longer than [`MAX_BODY`], or the client went away.
    pub async fn bytes(&mut self) -> Result<Bytes> {
        collect(&mut self.body).await.map_err(|error| {
            error.unwrap_or_else(|| Error::invalid(format!("request body is larger than {MAX_BODY} bytes")))
        })
    }

    /// The body's JSON text, None when there is no body. As dockerd does, a body must say that it is JSON.
    ///
    /// # Errors
    /// Invalid.
    pub async fn json_text(&mut self) -> Result<Option<Bytes>> {
        let bytes = self.bytes().await?;
        if bytes.is_empty() {
            return Ok(None);
        }
        require_json(self.headers())?;
        Ok(Some(bytes))
    }

    /// The body as a value, the default when there is no body.
    ///
    /// # Errors
    /// Invalid.
    pub async fn json<T: DeserializeOwned + Default>(&mut self) -> Result<T> {
        match self.json_text().await? {
            None => Ok(T::default()),
            Some(text) => types::json::from_slice(&text).map_err(|error| invalid_json(&error)),
        }
    }

    /// The filters of the query; keys outside `accepted` are refused.
    ///
    /// # Errors
    /// Invalid.
    pub fn filters(&self, accepted: &[&str]) -> Result<types::Filters> {
        Ok(types::Filters::parse(self.query.get("filters").unwrap_or_default(), accepted)?)
    }
}

/// Reads a body to its end; the error is None where it is longer than [`MAX_BODY`].
async fn collect(body: &mut RequestBody) -> Result<Bytes, Option<Error>> {
    match Limited::new(body, MAX_BODY).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(None),
        Err(error) => Err(Some(Error::invalid(format!("request body could not be read: {error}")))),
    }
}

/// How a malformed body is told.
pub fn invalid_json(error: &serde_json::Error) -> Error {
    if error.is_eof() {
        Error::invalid("invalid JSON: got EOF while reading request body")
    } else {
        Error::invalid(format!("invalid JSON: {error}"))
    }
}

/// Whether a body is said to be JSON.
pub fn is_json(headers: &HeaderMap) -> bool {
    content_type(headers)
        .split(';')
        .next()
        .unwrap_or_default()
        .trim()
        .eq_ignore_ascii_case("application/json")
}

fn content_type(headers: &HeaderMap) -> &str {
    headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default()
}

fn require_json(headers: &HeaderMap) -> Result<()> {
    let content_type = content_type(headers);
    if is_json(headers) {
        Ok(())
    } else if content_type.is_empty() {
        Err(Error::invalid("malformed Content-Type header (): mime: no media type"))
    } else {
        Err(Error::invalid(format!(
            "unsupported Content-Type header ({content_type}): must be 'application/json'"
        )))
    }
}

/// A query string, decoded.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Query(Vec<(String, String)>);

impl Query {
    /// From what follows the `?`.
    ///
    /// # Errors
    /// Invalid: a `%` that is no escape, or bytes that are not UTF-8.
    pub fn parse(text: &str) -> Result<Self> {
        let pairs = text.split('&').filter(|pair| !pair.is_empty()).map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            Ok((decode(name, true)?, decode(value, true)?))
        });
        pairs.collect::<Result<_>>().map(Self)
    }

    /// The first value.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.all(name).next()
    }

    /// The first value, None when it is empty.
    pub fn non_empty(&self, name: &str) -> Option<&str> {
        self.get(name).filter(|value| !value.is_empty())
    }

    /// Every value.
    pub fn all<'a, 'n>(&'a self, name: &'n str) -> impl Iterator<Item = &'a str> + use<'a, 'n> {
        self.0.iter().filter(move |(have, _)| have == name).map(|(_, value)| value.as_str())
    }

    /// A boolean as Docker reads it; absent is `default`.
    pub fn boolean(&self, name: &str, default: bool) -> bool {
        self.get(name).map_or(default, is_true)
    }

    /// A number, None when it is absent or empty.
    ///
    /// # Errors
    /// Invalid.
    pub fn number<T: std::str::FromStr>(&self, name: &str) -> Result<Option<T>> {
        self.non_empty(name)
            .map(|text| {
                text.parse().map_err(|_| Error::invalid(format!("invalid value for {name}: {text:?}")))
            })
            .transpose()
    }

    /// A time as `seconds[.nanoseconds]` since the Unix epoch, None when it is absent or empty. (The docker
    /// CLI turns every other form into it.)
    ///
    /// # Errors
    /// Invalid.
    pub fn time(&self, name: &str) -> Result<Option<Timestamp>> {
        self.non_empty(name).map(timestamp).transpose()
    }
}

/// `seconds[.nanoseconds]`, or RFC 3339 for clients that do not convert.
fn timestamp(text: &str) -> Result<Timestamp> {
    let parse = || {
        let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
        let digits: String = fraction.chars().chain("000000000".chars()).take(9).collect();
        let (seconds, nanoseconds) = (seconds.parse::<i64>().ok()?, digits.parse::<i32>().ok()?);
        Timestamp::new(seconds, nanoseconds).ok()
    };
    parse()
        .or_else(|| text.parse().ok())
        .ok_or_else(|| Error::invalid(format!("failed to parse value as time or duration: {text:?}")))
}

/// Go's reading of a flag: everything but these words is true.
fn is_true(text: &str) -> bool {
    !matches!(text.trim().to_ascii_lowercase().as_str(), "" | "0" | "no" | "false" | "none")
}

/// Decodes `%XX`, and with `plus` also `+` as a space.
///
/// # Errors
/// Invalid.
pub fn decode(text: &str, plus: bool) -> Result<String> {
    let wrong = || Error::invalid(format!("invalid URL escape in {text:?}"));
    let mut decoded = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        rest = tail;
        decoded.push(match byte {
            b'+' if plus => b' ',
            b'%' => {
                let digits = rest.split_at_checked(2).and_then(|(digits, tail)| {
                    rest = tail;
                    std::str::from_utf8(digits).ok()
                });
                let digits = digits.filter(|digits| digits.bytes().all(|digit| digit.is_ascii_hexdigit()));
                u8::from_str_radix(digits.ok_or_else(wrong)?, 16).map_err(|_| wrong())?
            }
            byte => byte,
        });
    }
    String::from_utf8(decoded).map_err(|_| wrong())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn booleans() {
        for (text, expected) in [
            ("", false),
            ("0", false),
            ("no", false),
            ("False", false),
            (" none ", false),
            ("1", true),
            ("true", true),
            ("yes", true),
            ("anything", true),
        ] {
            assert_eq!(is_true(text), expected, "{text:?}");
        }
        let query = Query::parse("a=1&b&c=false").unwrap();
        assert_eq!([true, true, true, true].map(|default| query.boolean("d", default)), [true; 4]);
        assert!(query.boolean("a", false) && !query.boolean("b", true) && !query.boolean("c", true));
    }

    #[test]
    fn queries() {
        let query = Query::parse("type=a&&type=b+c&n%61me=%2Fx%C3%A9&empty=&t=3").unwrap();
        assert_eq!(query.all("type").collect::<Vec<_>>(), ["a", "b c"]);
        assert_eq!(query.get("name"), Some("/xé"));
        assert_eq!((query.get("empty"), query.non_empty("empty")), (Some(""), None));
        assert_eq!(query.number::<i64>("t").unwrap(), Some(3));
        assert_eq!(query.number::<i64>("none").unwrap(), None);
        assert!(query.number::<i64>("name").is_err());
        for wrong in ["a=%", "a=%1", "a=%zz", "a=%+1", "a=%ff"] {
            assert!(Query::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn times() {
        let time = |text: &str| timestamp(text).map(Timestamp::as_nanosecond).map_err(|error| error.message);
        assert_eq!(time("5"), Ok(5_000_000_000));
        assert_eq!(time("5.5"), Ok(5_500_000_000));
        assert_eq!(time("1700000000.000000001"), Ok(1_700_000_000_000_000_001));
        assert_eq!(time("1970-01-01T00:00:01Z"), Ok(1_000_000_000));
        for wrong in ["x", "1.x", "99999999999999999999", "10m"] {
            assert!(time(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn json_must_be_said_to_be_json() {
        let headers = |value: &str| HeaderMap::from_iter([(CONTENT_TYPE, value.parse().unwrap())]);
        assert!(require_json(&headers("application/json; charset=utf-8")).is_ok());
        assert!(require_json(&headers("text/plain")).is_err());
        assert!(require_json(&HeaderMap::new()).is_err());
    }

    proptest! {
        #[test]
        fn every_text_survives_encoding(text in ".{0,40}") {
            let encoded: String = text.bytes().map(|byte| format!("%{byte:02x}")).collect();
            prop_assert_eq!(decode(&encoded, true).unwrap(), text);
        }

        #[test]
        fn no_query_is_a_panic(text in ".{0,60}") {
            let _ = Query::parse(&text);
        }
    }
}
