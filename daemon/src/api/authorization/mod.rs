//! Authorization plugins: programs of the operator's, each asked before a request is carried out and again before its
//! answer goes out. All must allow both.
//!
//! ```text
//!  request ─▶ AuthZReq, plugin after plugin ─▶ handler ─▶ AuthZRes, plugin after plugin ─▶ answer
//!              no, or no answer: 403, 500                  the same: what was done stays done
//! ```
//!
//! A plugin is told method, URI, headers without credentials, who the client is by its certificate, and a body that is
//! JSON: **whole, or the request is refused**; what it has not seen is not carried out. Bodies that are archives are
//! streams, and not told; neither are those of answers that are streams.

mod plugin;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Mutex,
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use http::{HeaderMap, request::Parts};
use http_body_util::BodyExt;
use hyper::body::Body as _;
use rustls::pki_types::CertificateDer;
use serde::{Serialize, Serializer};

use self::plugin::{Plugin, Verdict};
use super::{
    error,
    request::{MAX_BODY, RequestBody, is_json},
    response::{Reply, full},
    router::Route,
};
use crate::engine::{Error, Result};

/// Headers that hold secrets.
const SECRETS: [&str; 3] = ["authorization", "x-registry-config", "x-registry-auth"];

/// The operation whose body is a secret.
const LOGIN: &str = "/auth";

/// What is known of the plugins of this daemon.
#[derive(Debug, Default)]
pub struct Authorization {
    /// Those that said that they are for this.
    activated: Mutex<BTreeSet<String>>,
}

/// A request that all plugins have allowed, until its answer goes out.
pub struct Allowed<'a> {
    /// Its answer is a secret too.
    is_login: bool,
    authorization: &'a Authorization,
    plugins: Vec<Plugin>,
    message: Message,
}

/// What a plugin is told: JSON as Docker's plugins read it.
#[derive(Debug, Default, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Message {
    #[serde(skip_serializing_if = "String::is_empty")]
    user: String,
    #[serde(rename = "UserAuthNMethod", skip_serializing_if = "str::is_empty")]
    method_of_user: &'static str,
    request_method: String,
    request_uri: String,
    #[serde(skip_serializing_if = "Base64::is_empty")]
    request_body: Base64,
    request_headers: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    request_peer_certificates: Vec<Base64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    response_status_code: Option<u16>,
    #[serde(skip_serializing_if = "Base64::is_empty")]
    response_body: Base64,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    response_headers: BTreeMap<String, String>,
}

/// Bytes in JSON, as Go writes them.
#[derive(Debug, Default, Clone)]
struct Base64(Vec<u8>);

impl Base64 {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Serialize for Base64 {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&BASE64_STANDARD.encode(&self.0))
    }
}

impl Authorization {
    /// Asks every plugin whether a request may be carried out. A body that they are told stays for the handler.
    ///
    /// # Errors
    /// Forbidden: one says no. Invalid: a body is longer than what is told. Internal: a plugin does not answer.
    pub async fn ask(
        &self,
        names: &[String],
        peer: &[CertificateDer<'static>],
        head: &Parts,
        body: &mut RequestBody,
        route: &Route,
    ) -> Result<Allowed<'_>> {
        if !is_plain(head.uri.path()) {
            return Err(Error::not_found("page not found"));
        }
        let is_login = route.path == LOGIN;
        let told = if is_json(&head.headers) && !is_login {
            body.whole().await.map_err(|error| match error {
                Some(error) => error,
                None => Error::invalid(format!(
                    "request body too large for authorization plugin: size exceeds {MAX_BODY} bytes"
                )),
            })?
        } else {
            bytes::Bytes::new()
        };
        let user = peer.first().map_or(Ok(String::new()), common_name)?;
        let message = Message {
            method_of_user: if peer.is_empty() { "" } else { "TLS" },
            user,
            request_method: head.method.to_string(),
            request_uri: head.uri.path_and_query().map_or_else(String::new, ToString::to_string),
            request_body: Base64(told.to_vec()),
            request_headers: flattened(&head.headers),
            request_peer_certificates: peer.iter().map(|certificate| Base64(pem(certificate))).collect(),
            ..Message::default()
        };
        let plugins = names.iter().map(|name| Plugin::new(name)).collect();
        let allowed = Allowed { is_login, authorization: self, plugins, message };
        allowed.all(plugin::REQUEST).await?;
        Ok(allowed)
    }
}

impl Allowed<'_> {
    /// Asks every plugin whether an answer may go out. One that is an error goes out whatever they say.
    ///
    /// # Errors
    /// Forbidden: one says no. Internal: a plugin does not answer. Or the error that the answer is.
    pub async fn answer(mut self, answer: Result<Reply>) -> Result<Reply> {
        match answer {
            Ok(Reply::Response(response)) => {
                let (head, body) = response.into_parts();
                self.message.response_status_code = Some(head.status.as_u16());
                self.message.response_headers = flattened(&head.headers);
                // What has no length yet is a stream: an event may be hours away.
                let told = is_json(&head.headers) && !self.is_login;
                let body = if told && body.size_hint().exact().is_some() {
                    let whole = body.collect().await?.to_bytes();
                    self.message.response_body = Base64(whole.to_vec());
                    full(whole)
                } else {
                    body
                };
                self.all(plugin::RESPONSE).await?;
                Ok(Reply::Response(http::Response::from_parts(head, body)))
            }
            Ok(hijack) => {
                self.message.response_status_code = Some(http::StatusCode::OK.as_u16());
                self.all(plugin::RESPONSE).await?;
                Ok(hijack)
            }
            Err(error) => {
                self.message.response_status_code = Some(error::status(error.kind).as_u16());
                if let Err(refused) = self.all(plugin::RESPONSE).await {
                    tracing::debug!(error = %refused.message, "an error that goes out nonetheless");
                }
                Err(error)
            }
        }
    }

    async fn all(&self, method: &str) -> Result<()> {
        for plugin in &self.plugins {
            let failed = |error: plugin::PluginError| {
                Error::internal(format!("plugin {} failed with error: {error}", plugin.name()))
            };
            let known = &self.authorization.activated;
            let is_known = || known.lock().is_ok_and(|known| known.contains(plugin.name()));
            if !is_known() {
                plugin.activate().await.map_err(failed)?;
                if let Ok(mut known) = known.lock() {
                    known.insert(plugin.name().to_owned());
                }
            }
            let Verdict { allow, message } = plugin.ask(method, &self.message).await.map_err(failed)?;
            if !allow {
                let name = plugin.name();
                return Err(Error::forbidden(format!("authorization denied by plugin {name}: {message}")));
            }
        }
        Ok(())
    }
}

/// Headers by their names as Go writes them, which plugins look for; of several values the last.
fn flattened(headers: &HeaderMap) -> BTreeMap<String, String> {
    let open = headers.iter().filter(|(name, _)| !SECRETS.contains(&name.as_str()));
    open.map(|(name, value)| {
        (canonical(name.as_str()), String::from_utf8_lossy(value.as_bytes()).into_owned())
    })
    .collect()
}

/// `content-type` as `Content-Type`.
fn canonical(name: &str) -> String {
    let word = |word: &str| match word.split_at_checked(1) {
        Some((first, rest)) => first.to_ascii_uppercase() + rest,
        None => String::new(),
    };
    name.split('-').map(word).collect::<Vec<_>>().join("-")
}

/// The common name of a certificate's subject: of several the last, as Go has it.
///
/// # Errors
/// Forbidden: it cannot be read. Without a name the client would be taken for one without a certificate.
fn common_name(certificate: &CertificateDer<'_>) -> Result<String> {
    let unreadable = || Error::forbidden("the client's certificate has a name that cannot be read");
    let (_, certificate) = x509_parser::parse_x509_certificate(certificate).map_err(|_| unreadable())?;
    let name = certificate.subject().iter_common_name().last();
    name.map_or(Ok(String::new()), |name| name.as_str().map(str::to_owned).map_err(|_| unreadable()))
}

/// Whether a path is written as plugins expect it. The router would find a route for others too, by which a plugin that
/// looks at the path would be led past what it forbids.
fn is_plain(path: &str) -> bool {
    path == "/networks/"
        || path.strip_prefix('/').is_some_and(|path| path.split('/').all(|segment| !segment.is_empty()))
}

/// A certificate as PEM.
fn pem(certificate: &CertificateDer<'_>) -> Vec<u8> {
    let text = BASE64_STANDARD.encode(certificate);
    let mut pem = b"-----BEGIN CERTIFICATE-----\n".to_vec();
    for line in text.as_bytes().chunks(64) {
        pem.extend_from_slice(line);
        pem.push(b'\n');
    }
    pem.extend_from_slice(b"-----END CERTIFICATE-----\n");
    pem
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use rustls::pki_types::pem::PemObject;

    use super::*;

    #[test]
    fn plugins_are_told_headers_by_gos_names_and_no_secrets() {
        let mut headers = HeaderMap::new();
        for (name, value) in
            [("content-type", "application/json"), ("x-registry-auth", "secret"), ("x-a", "1"), ("x-a", "2")]
        {
            headers.append(name, HeaderValue::from_static(value));
        }
        headers.insert("authorization", HeaderValue::from_static("Basic x"));
        let told: Vec<_> = flattened(&headers).into_iter().collect();
        let expected = [("Content-Type", "application/json"), ("X-A", "2")];
        assert_eq!(told, expected.map(|(name, value)| (name.to_owned(), value.to_owned())));
    }

    #[test]
    fn a_client_is_who_its_certificate_says() {
        let mut params = rcgen::CertificateParams::new(vec!["host".to_owned()]).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(rcgen::DnType::CommonName, "Ada Löwe");
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        let told = pem(certificate.der());
        assert_eq!(CertificateDer::from_pem_slice(&told).unwrap(), *certificate.der());
        assert_eq!(common_name(certificate.der()).unwrap(), "Ada Löwe");
        assert!(common_name(&CertificateDer::from(vec![1, 2, 3])).is_err());
    }

    #[test]
    fn paths_have_one_spelling() {
        for path in ["/_ping", "/v1.50/containers/create", "/images/a/b:1/json", "/networks/"] {
            assert!(is_plain(path), "{path}");
        }
        for path in ["//containers/create", "/containers//create", "/containers/create/", "/", "", "*"] {
            assert!(!is_plain(path), "{path}");
        }
    }

    #[test]
    fn a_message_has_the_fields_that_plugins_read() {
        let message = Message {
            user: "ada".into(),
            method_of_user: "TLS",
            request_method: "POST".into(),
            request_uri: "/v1.50/containers/create?name=x".into(),
            request_body: Base64(b"{}".to_vec()),
            request_headers: BTreeMap::from([("Content-Type".into(), "application/json".into())]),
            ..Message::default()
        };
        let told = serde_json::to_value(&message).unwrap();
        let expected = serde_json::json!({
            "User": "ada", "UserAuthNMethod": "TLS", "RequestMethod": "POST",
            "RequestUri": "/v1.50/containers/create?name=x", "RequestBody": "e30=",
            "RequestHeaders": {"Content-Type": "application/json"},
        });
        assert_eq!(told, expected);
    }
}
