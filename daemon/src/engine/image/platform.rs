//! Which machine an image is for: `os/architecture[/variant]`.

use std::fmt;

use serde::{Deserialize, Serialize};

/// An operating system, an architecture and its variant, in Go's names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// `linux`.
    #[serde(default)]
    pub os: String,
    /// `amd64`, `arm64`.
    #[serde(default)]
    pub architecture: String,
    /// `v8` of `arm64`; mostly absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

impl From<Platform> for crate::api::types::image::OciPlatform {
    fn from(platform: Platform) -> Self {
        Self { architecture: platform.architecture, os: platform.os, variant: platform.variant }
    }
}

/// A text names no platform.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlatformError {
    /// Bad form.
    #[error("\"{0}\": platform specifier component must match \"^[A-Za-z0-9_.-]+$\": invalid argument")]
    Format(String),
    /// One word that is neither a system nor an architecture.
    #[error("\"{0}\": unknown operating system or architecture: invalid argument")]
    Unknown(String),
}

const SYSTEMS: [&str; 8] =
    ["linux", "windows", "darwin", "freebsd", "netbsd", "openbsd", "solaris", "wasip1"];
const ARCHITECTURES: [&str; 9] =
    ["amd64", "arm64", "386", "arm", "ppc64le", "s390x", "riscv64", "mips64le", "loong64"];

impl Platform {
    /// This host's.
    pub fn host() -> Self {
        Self::normalised("linux", std::env::consts::ARCH, None)
    }

    /// Reads `os`, `architecture`, `os/architecture` or `os/architecture/variant`; what is missing is the
    /// host's.
    ///
    /// # Errors
    /// See [`PlatformError`].
    pub fn parse(text: &str) -> Result<Self, PlatformError> {
        let word = |part: &&str| {
            !part.is_empty()
                && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
        };
        let shown = || text.chars().take(100).collect();
        let parts: Vec<&str> = text.split('/').collect();
        if !parts.iter().all(word) {
            return Err(PlatformError::Format(shown()));
        }
        match parts[..] {
            [one] => {
                let one = one.to_ascii_lowercase();
                let as_architecture = Self::normalised("linux", &one, None);
                if SYSTEMS.contains(&one.as_str()) {
                    Ok(Self { os: one, ..Self::host() })
                } else if ARCHITECTURES.contains(&as_architecture.architecture.as_str()) {
                    Ok(as_architecture)
                } else {
                    Err(PlatformError::Unknown(shown()))
                }
            }
            [os, architecture] => Ok(Self::normalised(os, architecture, None)),
            [os, architecture, variant] => Ok(Self::normalised(os, architecture, Some(variant))),
            _ => Err(PlatformError::Format(shown())),
        }
    }

    /// From parts as images have them, in whatever spelling.
    pub fn normalised(os: &str, architecture: &str, variant: Option<&str>) -> Self {
        let os = match os.to_ascii_lowercase() {
            os if os == "macos" => "darwin".to_owned(),
            os => os,
        };
        let variant = variant.filter(|v| !v.is_empty()).map(str::to_ascii_lowercase);
        let (architecture, variant) = match (architecture.to_ascii_lowercase().as_str(), variant.as_deref()) {
            ("x86_64" | "x86-64" | "amd64", Some("v1") | None) => ("amd64".to_owned(), None),
            ("x86_64" | "x86-64" | "amd64", _) => ("amd64".to_owned(), variant),
            ("aarch64" | "arm64", Some("v8" | "8") | None) => ("arm64".to_owned(), None),
            ("aarch64" | "arm64", _) => ("arm64".to_owned(), variant),
            ("i386" | "i686" | "x86" | "386", _) => ("386".to_owned(), None),
            ("armhf", _) => ("arm".to_owned(), Some("v7".to_owned())),
            ("armel", _) => ("arm".to_owned(), Some("v6".to_owned())),
            (other, _) => (other.to_owned(), variant),
        };
        Self { os, architecture, variant }
    }

    /// Whether an image for `other` runs where this is asked for. An image that names no variant fits every
    /// one.
    pub fn accepts(&self, other: &Self) -> bool {
        self.os == other.os
            && self.architecture == other.architecture
            && (other.variant.is_none() || self.variant == other.variant)
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        self.variant.as_deref().map_or(Ok(()), |variant| write!(f, "/{variant}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings_come_to_one() {
        for (text, shown) in [
            ("linux/amd64", "linux/amd64"),
            ("linux/x86_64", "linux/amd64"),
            ("Linux/AMD64/v1", "linux/amd64"),
            ("amd64", "linux/amd64"),
            ("aarch64", "linux/arm64"),
            ("linux/arm64/v8", "linux/arm64"),
            ("linux/arm/v7", "linux/arm/v7"),
            ("linux/amd64/v3", "linux/amd64/v3"),
        ] {
            assert_eq!(Platform::parse(text).unwrap().to_string(), shown, "{text}");
        }
        assert_eq!(Platform::parse("linux").unwrap(), Platform::host());
        assert_eq!(Platform::parse("plan10"), Err(PlatformError::Unknown("plan10".into())));
        for wrong in ["", "linux/", "a/b/c/d", "linux/a b"] {
            assert!(matches!(Platform::parse(wrong), Err(PlatformError::Format(_))), "{wrong}");
        }
    }

    #[test]
    fn a_missing_variant_fits_every_one() {
        let parse = |text| Platform::parse(text).unwrap();
        assert!(parse("linux/amd64/v3").accepts(&parse("linux/amd64")));
        assert!(!parse("linux/amd64").accepts(&parse("linux/amd64/v3")));
        assert!(!parse("linux/amd64").accepts(&parse("linux/arm64")));
        assert!(!parse("linux/amd64").accepts(&parse("windows/amd64")));
    }
}
