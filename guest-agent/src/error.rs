//! The agent's one error is the wire's [`AgentError`]: a kind for callers and a text for people. It crosses
//! two borders as it is, from a starting child to the agent and from the agent to the daemon.

use std::{fmt::Display, io};

use bulkhead_agent_api::{AgentError, ErrorKind};

/// The agent's result.
pub type Result<T, E = AgentError> = std::result::Result<T, E>;

/// The spec or call asks for something that is not valid or cannot be had.
pub fn invalid(message: impl Into<String>) -> AgentError {
    AgentError { kind: ErrorKind::Invalid, message: message.into() }
}

/// There is no such thing.
pub fn not_found(message: impl Into<String>) -> AgentError {
    AgentError { kind: ErrorKind::NotFound, message: message.into() }
}

/// The call does not fit the state.
pub fn conflict(message: impl Into<String>) -> AgentError {
    AgentError { kind: ErrorKind::Conflict, message: message.into() }
}

/// Anything else.
pub fn internal(message: impl Into<String>) -> AgentError {
    AgentError { kind: ErrorKind::Internal, message: message.into() }
}

/// An errno in the words of Go's runtime, which Docker's users and the docker CLI know: lower case and
/// without a number.
pub fn errno_text(error: &io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or_default().to_lowercase()
}

/// Adds what was being done to a failed system call.
pub trait Context<T> {
    /// `what: no such file or directory`, of kind [`ErrorKind::Internal`].
    fn context(self, what: impl Display) -> Result<T>;
}

impl<T, E: Into<io::Error>> Context<T> for Result<T, E> {
    fn context(self, what: impl Display) -> Result<T> {
        self.map_err(|error| internal(format!("{what}: {}", errno_text(&error.into()))))
    }
}
