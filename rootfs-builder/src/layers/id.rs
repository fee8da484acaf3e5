//! Names of layers.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// A layer's diff id: the sha256 of its uncompressed tar archive. Written `sha256:<64 hex digits>`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DiffId([u8; 32]);

/// A text is not a diff id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a diff id: \"sha256:\" and 64 lower-case hexadecimal digits are expected")]
pub struct DiffIdError(String);

impl DiffId {
    /// From the digest's bytes.
    #[must_use]
    pub const fn from_bytes(digest: [u8; 32]) -> Self {
        Self(digest)
    }

    /// The digest's bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The 64 hexadecimal digits alone, as a layer's directory is named.
    #[must_use]
    pub fn hex(&self) -> String {
        hex::encode(self.0)
    }

    /// The inverse of [`DiffId::hex`].
    pub(super) fn from_hex(text: &str) -> Option<Self> {
        let canonical = text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        let mut digest = [0; 32];
        (canonical && hex::decode_to_slice(text, &mut digest).is_ok()).then_some(Self(digest))
    }
}

impl FromStr for DiffId {
    type Err = DiffIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.strip_prefix("sha256:")
            .and_then(Self::from_hex)
            .ok_or_else(|| DiffIdError(text.chars().take(100).collect()))
    }
}

impl TryFrom<String> for DiffId {
    type Error = DiffIdError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<DiffId> for String {
    fn from(id: DiffId) -> Self {
        id.to_string()
    }
}

impl fmt::Display for DiffId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for DiffId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_canonical_form_is_read() {
        let id = DiffId::from_bytes([0xab; 32]);
        assert_eq!(id.to_string().parse(), Ok(id));
        for wrong in ["", "sha256:", &id.hex(), &id.to_string().to_uppercase(), &format!("{id}0")] {
            assert!(wrong.parse::<DiffId>().is_err(), "{wrong}");
        }
        assert!(format!("sha256:{}", "AB".repeat(32)).parse::<DiffId>().is_err());
    }
}
