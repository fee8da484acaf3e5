//! How causes from below become the engine's error, in Docker's words.

use std::io;

use bulkhead_rootfs::layers::{LayerError, LayerErrorKind};

use super::{config::ConfigError, pattern::PatternError, platform::PlatformError, reference::ReferenceError};
use crate::engine::Error;

/// A full disk, in the words that Docker's users search for.
pub(super) const NO_SPACE: &str = "no space left on device";

/// The cause alone: Go has neither capitals nor numbers in it.
pub(super) fn describe_io(error: &io::Error) -> String {
    if is_full(error) { NO_SPACE.to_owned() } else { error.to_string() }
}

/// Whether the disk or a quota is full.
pub(super) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// For the image store's own files.
pub(super) fn storage(error: &io::Error) -> Error {
    Error::internal(describe_io(error))
}

impl From<ReferenceError> for Error {
    fn from(error: ReferenceError) -> Self {
        Self::invalid(error.to_string())
    }
}

impl From<PlatformError> for Error {
    fn from(error: PlatformError) -> Self {
        Self::invalid(error.to_string())
    }
}

impl From<PatternError> for Error {
    fn from(error: PatternError) -> Self {
        Self::invalid(error.to_string())
    }
}

impl From<ConfigError> for Error {
    fn from(error: ConfigError) -> Self {
        match error {
            ConfigError::System(_) => Self::invalid(error.to_string()),
            error => Self::internal(error.to_string()),
        }
    }
}

/// A layer that could not be put into the store.
pub(super) fn layer(error: &LayerError) -> Error {
    match error.kind() {
        LayerErrorKind::NoSpace => Error::internal(format!("failed to register layer: {error}: {NO_SPACE}")),
        LayerErrorKind::Source => Error::internal(format!("failed to register layer: {}", source(error))),
        _ => Error::internal(format!("failed to register layer: {error}")),
    }
}

/// What the reader of a layer said, which is more than that reading failed.
fn source(error: &LayerError) -> String {
    match error {
        LayerError::Source(cause) => describe_io(cause),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_called_so_wherever_it_shows() {
        let full = || io::Error::from_raw_os_error(libc::ENOSPC);
        let quota = io::Error::from_raw_os_error(libc::EDQUOT);
        let in_store = LayerError::NoSpace { path: "/data/layers".into(), source: full() };
        for message in [
            storage(&full()).message,
            storage(&quota).message,
            layer(&in_store).message,
            layer(&LayerError::Source(full())).message,
        ] {
            assert!(message.ends_with(NO_SPACE), "{message}");
        }
        assert!(!storage(&io::Error::from_raw_os_error(libc::EIO)).message.contains(NO_SPACE));
    }
}
