//! Where errors meet HTTP.

use http::{Response, StatusCode};
use serde::Serialize;

use super::response::{Body, json_with, status as only_status};
use crate::engine::{Error, ErrorKind};

/// The body of every error.
#[derive(Serialize)]
struct ErrorBody<'a> {
    message: &'a str,
}

/// The status of a kind of error.
pub fn status(kind: ErrorKind) -> StatusCode {
    match kind {
        ErrorKind::NotFound => StatusCode::NOT_FOUND,
        ErrorKind::Invalid => StatusCode::BAD_REQUEST,
        ErrorKind::Conflict => StatusCode::CONFLICT,
        ErrorKind::NotModified => StatusCode::NOT_MODIFIED,
        ErrorKind::Unauthorized => StatusCode::UNAUTHORIZED,
        ErrorKind::Forbidden => StatusCode::FORBIDDEN,
        ErrorKind::NotImplemented => StatusCode::NOT_IMPLEMENTED,
        ErrorKind::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        ErrorKind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// An error as a response.
pub fn response(error: &Error) -> Response<Body> {
    let status = status(error.kind);
    if status.is_server_error() && error.kind != ErrorKind::NotImplemented {
        tracing::error!(error = %error.message, "a request failed");
    } else {
        tracing::debug!(error = %error.message, %status, "a request was refused");
    }
    if status == StatusCode::NOT_MODIFIED {
        // It can have no body.
        return only_status(status);
    }
    json_with(status, &ErrorBody { message: &error.message }).unwrap_or_else(|_| only_status(status))
}

/// Unknown paths and wrong methods.
pub fn page_not_found() -> Error {
    Error::not_found("page not found")
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;

    #[tokio::test]
    async fn errors_as_clients_see_them() {
        let mut seen = Vec::new();
        for error in [
            Error::not_found("No such container: x"),
            Error::invalid("bad <\"quotes\">"),
            Error::conflict("it runs"),
            Error::not_modified("it runs already"),
            Error::unauthorized("who are you"),
            Error::forbidden("no"),
            Error::not_implemented("not yet"),
            Error::unavailable("not now"),
            Error::internal("no space left on device"),
        ] {
            let response = response(&error);
            let status = response.status().as_u16();
            let body = response.into_body().collect().await.unwrap().to_bytes();
            seen.push(format!("{status} {}", String::from_utf8_lossy(&body).trim_end()));
        }
        insta::assert_snapshot!(seen.join("\n"));
    }
}
