//! Image references as Docker's users write them.
//!
//! ```text
//! reference  = name [":" tag] ["@" digest]          busybox, a/b:1, [::1]:5000/x@sha256:…
//! name       = [domain "/"] path
//! domain     = host [":" port]                      host: DNS name, IPv4, or "[" IPv6 "]"
//! path       = component *("/" component)           in all at most 255 characters
//! component  = 1*(a-z 0-9) *(separator 1*(a-z 0-9)) separator: "." "_" "__" or dashes
//! tag        = [A-Za-z0-9_] *127[A-Za-z0-9_.-]
//! ```
//! A name without a domain is Docker Hub's, one without a namespace there is `library/`'s: the *familiar*
//! `busybox` is `docker.io/library/busybox`. What comes before the first slash is a domain if it has a `.` or
//! `:`, has capitals, or is `localhost`.

use std::{borrow::Cow, fmt};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::digest::{Digest, DigestError};

/// Docker Hub's domain in names; it is served by another host.
pub const HUB: &str = "docker.io";
const LEGACY_HUB: &str = "index.docker.io";
const OFFICIAL: &str = "library/";
const MAX_PATH: usize = 255;
const MAX_TAG: usize = 128;

/// Why a text is no reference, in Docker's words.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReferenceError {
    /// It does not follow the grammar.
    #[error("invalid reference format")]
    Format,
    /// It would, in lower case.
    #[error("invalid reference format: repository name ({0}) must be lowercase")]
    Uppercase(String),
    /// It cannot be told from an image's id.
    #[error("invalid repository name ({0}), cannot specify 64-byte hexadecimal strings")]
    Identifier(String),
    /// The path is too long.
    #[error("repository name must not be more than {MAX_PATH} characters")]
    TooLong,
    /// A tag that stands alone does not follow the grammar.
    #[error("invalid tag format")]
    Tag,
    /// What follows the `@`.
    #[error(transparent)]
    Digest(#[from] DigestError),
}

/// A repository: a domain and a path there, both complete.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Repository {
    domain: String,
    path: String,
}

/// A normalised reference; with neither a tag nor a digest it names a whole repository.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reference {
    repository: Repository,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// What a user may name an image by where an id is allowed too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AnyReference {
    /// A full id, with or without its `sha256:`.
    Id(Digest),
    /// A name; it may still turn out to be the beginning of an id.
    Named(Reference),
}

impl Reference {
    /// Parses and normalises `text`.
    ///
    /// # Errors
    /// See [`ReferenceError`].
    pub fn parse(text: &str) -> Result<Self, ReferenceError> {
        if is_identifier(text) {
            return Err(ReferenceError::Identifier(text.to_owned()));
        }
        let (domain, rest) = split_domain(text);
        let remote = rest.split(':').next().unwrap_or_default();
        if remote.chars().any(char::is_uppercase) {
            return Err(ReferenceError::Uppercase(remote.to_owned()));
        }
        let (rest, digest) = match rest.split_once('@') {
            Some((rest, digest)) => (rest, Some(parse_digest(digest)?)),
            None => (rest.as_str(), None),
        };
        let (path, tag) = match rest.split_once(':') {
            Some((path, tag)) if is_tag(tag) => (path, Some(tag.to_owned())),
            Some(_) => return Err(ReferenceError::Format),
            None => (rest, None),
        };
        if !is_domain(domain) || !is_path(path) {
            return Err(ReferenceError::Format);
        }
        if path.len() > MAX_PATH {
            return Err(ReferenceError::TooLong);
        }
        Ok(Self { repository: Repository { domain: domain.to_owned(), path: path.to_owned() }, tag, digest })
    }

    /// Where it lies.
    pub fn repository(&self) -> &Repository {
        &self.repository
    }

    /// The tag, if it has one.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest, if it has one. It is a manifest's, not an image's id.
    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// Whether it names a whole repository.
    pub fn is_name_only(&self) -> bool {
        self.tag.is_none() && self.digest.is_none()
    }

    /// The same, `latest` where there is neither tag nor digest.
    #[must_use]
    pub fn or_latest(mut self) -> Self {
        if self.is_name_only() {
            self.tag = Some("latest".to_owned());
        }
        self
    }

    /// The same repository's `tag`; a digest stays.
    ///
    /// # Errors
    /// [`ReferenceError::Tag`].
    pub fn with_tag(&self, tag: &str) -> Result<Self, ReferenceError> {
        if !is_tag(tag) {
            return Err(ReferenceError::Tag);
        }
        Ok(Self { tag: Some(tag.to_owned()), ..self.clone() })
    }

    /// The same repository's manifest `digest`, without a tag.
    #[must_use]
    pub fn with_digest(&self, digest: Digest) -> Self {
        Self { repository: self.repository.clone(), tag: None, digest: Some(digest) }
    }

    /// As users see it: without what normalisation added.
    pub fn familiar(&self) -> String {
        self.render(&self.repository.familiar())
    }

    /// Whether the shell pattern `pattern` matches the familiar form, with or without tag and digest. Docker's
    /// `reference` filter.
    ///
    /// # Errors
    /// The pattern is malformed.
    pub fn matches(&self, pattern: &str) -> Result<bool, super::pattern::PatternError> {
        use super::pattern::matches;
        Ok(matches(pattern, &self.familiar())? || matches(pattern, &self.repository.familiar())?)
    }

    fn render(&self, name: &str) -> String {
        let mut text = name.to_owned();
        if let Some(tag) = &self.tag {
            text.push(':');
            text.push_str(tag);
        }
        if let Some(digest) = &self.digest {
            text.push('@');
            text.push_str(&digest.to_string());
        }
        text
    }
}

impl fmt::Display for Reference {
    /// The complete form, which [`Reference::parse`] reads back as it is.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.render(&self.repository.to_string()))
    }
}

impl Repository {
    /// The registry's domain, `docker.io` for Docker Hub.
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// The path at the registry, `library/busybox`.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// As users see it: `busybox`, `user/app`, `localhost:5000/x`.
    pub fn familiar(&self) -> Cow<'_, str> {
        if self.domain != HUB {
            return Cow::Owned(self.to_string());
        }
        let short = match self.path.strip_prefix(OFFICIAL) {
            Some(name) if !name.contains('/') => name,
            _ => &self.path,
        };
        // One whose short form would be read as another's, `docker.io/a.b/c`, is told in full.
        match Reference::parse(short) {
            Ok(read) if read.repository == *self => Cow::Borrowed(short),
            _ => Cow::Owned(self.to_string()),
        }
    }
}

impl fmt::Display for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.domain, self.path)
    }
}

impl AnyReference {
    /// Reads an id, or else a name.
    ///
    /// # Errors
    /// It is neither.
    pub fn parse(text: &str) -> Result<Self, ReferenceError> {
        if let Ok(id) = Digest::from_hex(text).or_else(|_| text.parse()) {
            return Ok(Self::Id(id));
        }
        Reference::parse(text).map(Self::Named)
    }
}

impl Serialize for Reference {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Reference {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <Cow<'de, str>>::deserialize(deserializer)?;
        Self::parse(&text).map_err(de::Error::custom)
    }
}

/// The domain and what comes after it, with the parts that users leave out.
fn split_domain(text: &str) -> (&str, String) {
    let (domain, rest) = match text.split_once('/') {
        None => (HUB, text),
        Some((LEGACY_HUB, rest)) => (HUB, rest),
        Some((first, rest))
            if first == "localhost"
                || first.contains(['.', ':'])
                || first.chars().any(char::is_uppercase) =>
        {
            (first, rest)
        }
        Some(_) => (HUB, text),
    };
    if domain == HUB && !rest.contains('/') {
        (domain, format!("{OFFICIAL}{rest}"))
    } else {
        (domain, rest.to_owned())
    }
}

fn is_identifier(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// A digest of the grammar that is none we can check gets its own error; what is not one at all is bad format.
fn parse_digest(text: &str) -> Result<Digest, ReferenceError> {
    let well_formed = text.split_once(':').is_some_and(|(algorithm, digits)| {
        algorithm.split(['-', '_', '+', '.']).all(|part| {
            part.starts_with(|c: char| c.is_ascii_alphabetic())
                && part.bytes().all(|b| b.is_ascii_alphanumeric())
        }) && digits.len() >= 32
            && digits.bytes().all(|byte| byte.is_ascii_hexdigit())
    });
    if well_formed { Ok(text.parse()?) } else { Err(ReferenceError::Format) }
}

fn is_tag(text: &str) -> bool {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    text.len() <= MAX_TAG
        && text.bytes().next().is_some_and(word)
        && text.bytes().all(|byte| word(byte) || matches!(byte, b'.' | b'-'))
}

fn is_domain(text: &str) -> bool {
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let Some((address, port)) = rest.split_once(']') else { return false };
            if address.is_empty() || !address.bytes().all(|b| b.is_ascii_hexdigit() || b == b':') {
                return false;
            }
            (None, port)
        }
        None => text.find(':').map_or((Some(text), ""), |colon| (Some(&text[..colon]), &text[colon..])),
    };
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    let port_is_fine = port.is_empty()
        || port.strip_prefix(':').is_some_and(|p| !p.is_empty() && p.bytes().all(|b| b.is_ascii_digit()));
    port_is_fine && host.is_none_or(|host| host.split('.').all(label))
}

fn is_path(text: &str) -> bool {
    text.split('/').all(is_component)
}

/// Runs of letters and digits, between them one separator each.
fn is_component(text: &str) -> bool {
    let alphanumeric = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    if !text.starts_with(alphanumeric) || !text.ends_with(alphanumeric) {
        return false;
    }
    text.split(alphanumeric)
        .filter(|separator| !separator.is_empty())
        .all(|separator| matches!(separator, "." | "_" | "__") || separator.bytes().all(|byte| byte == b'-'))
}

#[cfg(test)]
mod tests;
