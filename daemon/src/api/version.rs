//! Versions of the API, and the daemon's own.

use std::str::FromStr;

use crate::engine::Error;

/// A version of the API, `1.50` for instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ApiVersion {
    major: u16,
    minor: u16,
}

/// The highest version served, and what a request without a version gets.
pub const CURRENT: ApiVersion = ApiVersion::new(1, 50);

/// The lowest version served.
pub const MINIMUM: ApiVersion = ApiVersion::new(1, 24);

/// The daemon's own version.
pub const DAEMON: &str = env!("CARGO_PKG_VERSION");

impl ApiVersion {
    /// From its numbers.
    pub const fn new(major: u16, minor: u16) -> Self {
        Self { major, minor }
    }

    /// The version that a path's `v…` segment names, if it is served.
    ///
    /// # Errors
    /// Invalid, in Docker's words.
    pub fn negotiate(text: &str) -> Result<Self, Error> {
        let version: Self =
            text.parse().map_err(|()| Error::invalid(format!("client version {text} is not a version")))?;
        if version < MINIMUM {
            return Err(Error::invalid(format!(
                "client version {version} is too old. Minimum supported API version is {MINIMUM}, please upgrade \
                 your client to a newer version"
            )));
        }
        if version > CURRENT {
            return Err(Error::invalid(format!(
                "client version {version} is too new. Maximum supported API version is {CURRENT}"
            )));
        }
        Ok(version)
    }
}

impl FromStr for ApiVersion {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (major, minor) = text.split_once('.').unwrap_or((text, "0"));
        let number = |text: &str| {
            let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            if digits { text.parse().map_err(drop) } else { Err(()) }
        };
        Ok(Self { major: number(major)?, minor: number(minor)? })
    }
}

impl std::fmt::Display for ApiVersion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_out_of_range_are_refused_in_dockers_words() {
        let negotiate = |text| ApiVersion::negotiate(text).map_err(|error| error.message);
        for text in ["1.24", "1.41", "1.50"] {
            assert_eq!(negotiate(text).unwrap().to_string(), text);
        }
        let old = "client version 1.23 is too old. Minimum supported API version is 1.24, please upgrade your client \
                   to a newer version";
        assert_eq!(negotiate("1.23").unwrap_err(), old);
        let new = "client version 1.51 is too new. Maximum supported API version is 1.50";
        assert_eq!(negotiate("1.51").unwrap_err(), new);
        assert!(negotiate("2").unwrap_err().contains("2.0 is too new"));
        assert!(negotiate("1.100").is_err());
        for text in ["", ".", "1.", "1.2.3", "+1.3", "1.99999999"] {
            assert!(negotiate(text).is_err(), "{text}");
        }
    }

    #[test]
    fn they_are_ordered_by_number() {
        assert!(ApiVersion::new(1, 9) < ApiVersion::new(1, 24));
    }
}
