//! Who asks: credentials of the client, and what registries ask for in `WWW-Authenticate`.

use base64::{Engine as _, engine::general_purpose};
use serde::Deserialize;

/// The most of an `X-Registry-Auth` header that is read, in bytes.
const MAX_HEADER: usize = 64 << 10;

/// What `X-Registry-Auth` carries.
#[derive(Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Credentials {
    /// The account.
    pub username: String,
    /// Its password.
    pub password: String,
    /// Both, as base64 of `username:password`.
    pub auth: String,
    /// A refresh token, from which tokens for one repository are made.
    #[serde(rename = "identitytoken")]
    pub identity_token: String,
    /// A bearer token, to be used as it is.
    #[serde(rename = "registrytoken")]
    pub registry_token: String,
}

impl std::fmt::Debug for Credentials {
    /// Nothing secret.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials").field("username", &self.username).finish_non_exhaustive()
    }
}

impl Credentials {
    /// Reads the header; None for an anonymous client, and (as in Docker) for a header that is none.
    pub fn from_header(header: &str) -> Option<Self> {
        if header.is_empty() || header.len() > MAX_HEADER {
            return None;
        }
        let text = header.trim_end_matches('=');
        let bytes = general_purpose::URL_SAFE_NO_PAD
            .decode(text)
            .or_else(|_| general_purpose::STANDARD_NO_PAD.decode(text))
            .ok()?;
        let mut credentials: Self = crate::api::types::json::from_slice(&bytes).ok()?;
        if credentials.username.is_empty() && !credentials.auth.is_empty() {
            let pair = general_purpose::STANDARD.decode(&credentials.auth).ok()?;
            let (username, password) = std::str::from_utf8(&pair).ok()?.split_once(':')?;
            credentials.username = username.to_owned();
            credentials.password = password.trim_end_matches('\0').to_owned();
        }
        credentials.auth.clear();
        (credentials != Self::default()).then_some(credentials)
    }

    /// The value of an `Authorization: Basic` header, if there is a password.
    pub fn basic(&self) -> Option<String> {
        (!self.username.is_empty() && !self.password.is_empty()).then(|| {
            let pair = format!("{}:{}", self.username, self.password);
            format!("Basic {}", general_purpose::STANDARD.encode(pair))
        })
    }
}

/// A challenge of `WWW-Authenticate`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Challenge {
    /// Get a token there.
    Bearer(Bearer),
    /// Say who you are.
    Basic,
}

/// A bearer challenge's parameters (RFC 6750, and the distribution specification's).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Bearer {
    /// URL of the token server.
    pub realm: String,
    /// How it calls the registry.
    pub service: String,
    /// What a token must allow.
    pub scope: String,
    /// Why the one that was sent did not do.
    pub error: String,
    /// The same for people.
    pub error_description: String,
}

impl Bearer {
    /// The text of a refusal that no other token will change.
    pub(super) fn denied(&self) -> Option<String> {
        (self.error == "insufficient_scope").then(|| {
            let text = super::error::shortened(&self.error_description);
            if text.is_empty() { "requested access to the resource is denied".to_owned() } else { text }
        })
    }
}

/// Reads the challenges of one header; unknown schemes are left out, a malformed rest ends it.
pub(super) fn challenges(header: &str) -> Vec<Challenge> {
    let mut found = Vec::new();
    let mut rest = header;
    loop {
        rest = rest.trim_start_matches([',', ' ', '\t']);
        let end = rest.find([',', ' ', '\t']).unwrap_or(rest.len());
        if end == 0 {
            return found;
        }
        let (scheme, after) = rest.split_at(end);
        rest = after.trim_start();
        let mut bearer = Bearer::default();
        while let Some((name, value, after)) = parameter(rest) {
            match name.to_ascii_lowercase().as_str() {
                "realm" => bearer.realm = value,
                "service" => bearer.service = value,
                "scope" => bearer.scope = value,
                "error" => bearer.error = value,
                "error_description" => bearer.error_description = value,
                _ => {}
            }
            rest = after;
        }
        match scheme.to_ascii_lowercase().as_str() {
            "bearer" => found.push(Challenge::Bearer(bearer)),
            "basic" => found.push(Challenge::Basic),
            _ => {}
        }
    }
}

/// `name=value` or `name="value"` at the start of `text`, and what comes after it and its comma.
fn parameter(text: &str) -> Option<(&str, String, &str)> {
    let end = text.find(|c: char| !(c.is_ascii_alphanumeric() || matches!(c, '_' | '-')))?;
    let (name, rest) = text.split_at(end);
    let rest = rest.trim_start().strip_prefix('=')?.trim_start();
    if name.is_empty() {
        return None;
    }
    let (value, rest) = match rest.strip_prefix('"') {
        Some(quoted) => {
            let mut value = String::new();
            let mut characters = quoted.char_indices();
            loop {
                match characters.next()? {
                    (at, '"') => break (value, &quoted[at + 1..]),
                    (_, '\\') => value.push(characters.next()?.1),
                    (_, c) => value.push(c),
                }
            }
        }
        None => {
            let end = rest.find([',', ' ', '\t']).unwrap_or(rest.len());
            (rest[..end].to_owned(), &rest[end..])
        }
    };
    Some((name, value, rest.trim_start().strip_prefix(',').unwrap_or(rest).trim_start()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header(json: &str) -> String {
        general_purpose::URL_SAFE.encode(json)
    }

    #[test]
    fn clients_credentials_are_read() {
        assert_eq!(Credentials::from_header("e30="), None);
        assert_eq!(Credentials::from_header("rubbish!"), None);
        let user =
            Credentials::from_header(&header(r#"{"username":"a","password":"b","serveraddress":"c"}"#));
        assert_eq!(user.unwrap().basic().unwrap(), "Basic YTpi");
        let auth = Credentials::from_header(&header(r#"{"auth":"YTpi"}"#)).unwrap();
        assert_eq!((auth.username.as_str(), auth.password.as_str()), ("a", "b"));
        let token = Credentials::from_header(&header(r#"{"identitytoken":"t"}"#)).unwrap();
        assert_eq!((token.identity_token.as_str(), token.basic()), ("t", None));
        assert_eq!(format!("{auth:?}"), r#"Credentials { username: "a", .. }"#);
    }

    #[test]
    fn challenges_are_read() {
        let hub = r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:library/busybox:pull",error="insufficient_scope""#;
        let Challenge::Bearer(bearer) = &challenges(hub)[0] else { panic!("not a bearer challenge") };
        assert_eq!(bearer.realm, "https://auth.docker.io/token");
        assert_eq!(bearer.service, "registry.docker.io");
        assert_eq!(bearer.denied().unwrap(), "requested access to the resource is denied");
        assert_eq!(challenges(r#"Basic realm="a \"b\", c""#), [Challenge::Basic]);
        assert_eq!(challenges(r#"Negotiate, basic realm=x"#).last(), Some(&Challenge::Basic));
        let two = challenges(r#"Basic realm="x", Bearer realm="y",service=z"#);
        assert_eq!(two.len(), 2);
        assert!(matches!(&two[1], Challenge::Bearer(b) if b.realm == "y" && b.service == "z"));
        assert_eq!(challenges(""), []);
    }

    proptest! {
        #[test]
        fn any_header_ends(text in "[ -~]{0,80}") {
            let _ = challenges(&text);
            let _ = Credentials::from_header(&text);
        }

        #[test]
        fn quoted_values_survive(value in "[ -~]{0,30}") {
            let quoted = value.replace('\\', "\\\\").replace('"', "\\\"");
            let found = challenges(&format!("Bearer realm=\"{quoted}\",service=s"));
            let expected = Bearer { realm: value, service: "s".into(), ..Bearer::default() };
            prop_assert_eq!(found, vec![Challenge::Bearer(expected)]);
        }
    }
}
