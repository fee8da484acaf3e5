//! The engine's error: a kind where callers branch, and the text that the user sees.

/// What went wrong, for callers; `api::error` maps it to an HTTP status in one place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// 404
    NotFound,
    /// 400
    Invalid,
    /// 409
    Conflict,
    /// 304
    NotModified,
    /// 401
    Unauthorized,
    /// 403
    Forbidden,
    /// 501
    NotImplemented,
    /// 503
    Unavailable,
    /// 500
    Internal,
}

/// An error in the words that Docker's users and clients know.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// The kind.
    pub kind: ErrorKind,
    /// The text, complete: causes are already in it.
    pub message: String,
}

/// The engine's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

macro_rules! constructors {
    ($($(#[$doc:meta])* $name:ident => $kind:ident),* $(,)?) => {
        impl Error {
            $($(#[$doc])* pub fn $name(message: impl Into<String>) -> Self {
                Self { kind: ErrorKind::$kind, message: message.into() }
            })*
        }
    };
}

constructors! {
    /// There is no such thing.
    not_found => NotFound,
    /// The caller asked for something that is not valid.
    invalid => Invalid,
    /// It does not fit the present state.
    conflict => Conflict,
    /// It is so already.
    not_modified => NotModified,
    /// Credentials are missing or wrong.
    unauthorized => Unauthorized,
    /// Not allowed.
    forbidden => Forbidden,
    /// Docker has it and Bulkhead does not.
    not_implemented => NotImplemented,
    /// Not now.
    unavailable => Unavailable,
    /// Our fault, or the host's.
    internal => Internal,
}

impl From<std::io::Error> for Error {
    fn from(error: std::io::Error) -> Self {
        Self::internal(error.to_string())
    }
}
