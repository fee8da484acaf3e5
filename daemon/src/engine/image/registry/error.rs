//! What can go wrong between here and a registry, in the words of Docker and its registry client.

use serde::Deserialize;

use crate::engine::{
    Error,
    image::{digest::Digest, platform::Platform, reference::Reference},
};

/// Why a registry did not give what was asked for.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RegistryError {
    /// No HTTP came about, or it broke off.
    #[error("{method} \"{url}\": {cause}")]
    Transport {
        /// `Get`, `Post`.
        method: &'static str,
        /// Of what.
        url: String,
        /// Why, in Go's words where users know them.
        cause: String,
    },
    /// The registry said no and why.
    #[error("{}: {message}", words(code))]
    Answer {
        /// Of the distribution specification: `MANIFEST_UNKNOWN`.
        code: String,
        /// The registry's text.
        message: String,
    },
    /// A status that means nothing here.
    #[error("received unexpected HTTP status: {0}")]
    Status(String),
    /// An error's body that is none of the specification.
    #[error("error parsing HTTP {status} response body: {problem}: {body:?}")]
    Body {
        /// The status.
        status: u16,
        /// Why it could not be read.
        problem: String,
        /// Its beginning.
        body: String,
    },
    /// What came is not what its digest promises.
    #[error("{what} verification failed for digest {digest}")]
    Digest {
        /// `manifest`, `filesystem layer`, `image config`.
        what: &'static str,
        /// What was expected.
        digest: Digest,
    },
    /// What came cannot be used.
    #[error("{0}")]
    Invalid(String),
    /// An index that has nothing for the platform.
    #[error("no matching manifest for {0} in the manifest list entries")]
    NoPlatform(Platform),
    /// The cause is on this side.
    #[error("{0}")]
    Local(Error),
}

/// `MANIFEST_UNKNOWN` as Docker prints it.
fn words(code: &str) -> String {
    code.to_ascii_lowercase().replace('_', " ")
}

impl RegistryError {
    /// Whether a registry gave a definite answer about the image (then it is the one to report if others
    /// could not be reached).
    pub fn is_answer(&self) -> bool {
        !matches!(self, Self::Transport { .. } | Self::Status(_) | Self::Body { .. })
    }

    /// For the user who asked for `reference`.
    pub fn for_pull(self, reference: &Reference) -> Error {
        let code = match &self {
            Self::Answer { code, .. } => code.as_str(),
            _ => "",
        };
        let name = reference.repository().familiar();
        match (&self, code) {
            (_, "DENIED") => Error::not_found(format!(
                "pull access denied for {name}, repository does not exist or may require 'docker login': {self}"
            )),
            (_, "MANIFEST_UNKNOWN") => {
                Error::not_found(format!("manifest for {} not found: {self}", reference.familiar()))
            }
            (_, "NAME_UNKNOWN") => Error::not_found(format!("repository {name} not found: {self}")),
            (Self::NoPlatform(_), _) => Error::not_found(self.to_string()),
            (Self::Invalid(text), _) => Error::invalid(text.clone()),
            (Self::Local(error), _) => error.clone(),
            // dockerd answers 500 to the rest, "unauthorized" among it: on 401 its client would ask for a
            // password.
            _ => Error::internal(self.to_string()),
        }
    }
}

impl RegistryError {
    /// For the user who pushes `reference`.
    pub fn for_push(self, reference: &Reference) -> Error {
        match &self {
            Self::Answer { code, .. } if matches!(code.as_str(), "DENIED" | "UNAUTHORIZED") => {
                Error::forbidden(format!(
                    "push access denied for {}, or a login is required: {self}",
                    reference.repository().familiar()
                ))
            }
            Self::Local(error) => error.clone(),
            _ => Error::internal(self.to_string()),
        }
    }
}

#[derive(Deserialize)]
struct Errors {
    #[serde(default)]
    errors: Vec<Entry>,
    #[serde(default)]
    details: Option<String>,
}

#[derive(Deserialize)]
struct Entry {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
}

/// The longest text of a registry that is passed on to users, in bytes.
const MAX_TEXT: usize = 1024;

/// Reads the body of an answer with status 400 to 499. `denied` is set if the challenge beside it said that
/// the token's scope does not suffice.
pub(super) fn from_body(status: u16, json: bool, body: &[u8], denied: Option<String>) -> RegistryError {
    if let Some(message) = denied {
        return RegistryError::Answer { code: "DENIED".to_owned(), message };
    }
    let plain = |text: &str| {
        let code = match status {
            401 => "UNAUTHORIZED",
            403 => "DENIED",
            429 => "TOOMANYREQUESTS",
            _ => "UNKNOWN",
        };
        RegistryError::Answer { code: code.to_owned(), message: shortened(text) }
    };
    let text = String::from_utf8_lossy(body);
    if !json {
        return match (status, text.trim()) {
            (401, "") => plain("authentication required"),
            (404, "") => RegistryError::Status("404 Not Found".to_owned()),
            (_, text) => plain(text),
        };
    }
    let problem = match serde_json::from_slice::<Errors>(body) {
        Ok(Errors { details: Some(details), .. }) if !details.is_empty() => return plain(&details),
        Ok(Errors { errors, .. }) => match errors.into_iter().next() {
            Some(Entry { code, message }) => {
                let message = if message.is_empty() { words(&code) } else { shortened(&message) };
                let code = code.chars().filter(char::is_ascii_graphic).take(64).collect();
                return RegistryError::Answer { code, message };
            }
            None if status == 401 => return plain("authentication required"),
            None => "no error details found in HTTP response body".to_owned(),
        },
        Err(error) => error.to_string(),
    };
    RegistryError::Body { status, problem, body: shortened(&text) }
}

/// Without control characters, which could draw on a user's terminal.
pub(super) fn shortened(text: &str) -> String {
    let mut end = MAX_TEXT.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].trim().chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::ErrorKind;

    fn told(status: u16, body: &str, denied: Option<&str>) -> (ErrorKind, String) {
        let json = body.starts_with('{');
        let error = from_body(status, json, body.as_bytes(), denied.map(str::to_owned));
        let error = error.for_pull(&Reference::parse("busybox:nosuch").unwrap());
        (error.kind, error.message)
    }

    #[test]
    fn users_read_dockers_words() {
        let errors = |code: &str, message: &str| {
            format!(r#"{{"errors":[{{"code":"{code}","message":"{message}","detail":{{}}}}]}}"#)
        };
        for (status, body, denied, kind, text) in [
            (
                404,
                errors("MANIFEST_UNKNOWN", "manifest unknown"),
                None,
                ErrorKind::NotFound,
                "manifest for busybox:nosuch not found: manifest unknown: manifest unknown",
            ),
            (
                404,
                errors("NAME_UNKNOWN", "repository name not known to registry"),
                None,
                ErrorKind::NotFound,
                "repository busybox not found: name unknown: repository name not known to registry",
            ),
            (
                401,
                errors("UNAUTHORIZED", "authentication required"),
                Some("requested access to the resource is denied"),
                ErrorKind::NotFound,
                "pull access denied for busybox, repository does not exist or may require 'docker login': denied: requested access to the resource is denied",
            ),
            (
                401,
                errors("UNAUTHORIZED", "authentication required"),
                None,
                ErrorKind::Internal,
                "unauthorized: authentication required",
            ),
            (
                429,
                errors("TOOMANYREQUESTS", "You have reached your pull rate limit."),
                None,
                ErrorKind::Internal,
                "toomanyrequests: You have reached your pull rate limit.",
            ),
            (
                403,
                "go away".to_owned(),
                None,
                ErrorKind::NotFound,
                "pull access denied for busybox, repository does not exist or may require 'docker login': denied: go away",
            ),
            (
                400,
                "{}".to_owned(),
                None,
                ErrorKind::Internal,
                "error parsing HTTP 400 response body: no error details found in HTTP response body: \"{}\"",
            ),
            (
                401,
                "{\"details\":\"bad password\"}".to_owned(),
                None,
                ErrorKind::Internal,
                "unauthorized: bad password",
            ),
        ] {
            assert_eq!(told(status, &body, denied), (kind, text.to_owned()));
        }
    }

    #[test]
    fn a_registrys_text_cannot_draw_on_terminals() {
        let (_, text) = told(418, &format!("\u{1b}[2J{}", "x".repeat(5000)), None);
        assert!(!text.contains('\u{1b}') && text.len() < 1200);
    }
}
