//! Asking registries without taking anything: who we are (`docker login`), what stands behind a name
//! (`docker manifest inspect`, `docker service create`), and what there is (`docker search`).

use http::StatusCode;
use serde::Deserialize;

use super::{
    ImageStore, Platform, Reference,
    config::MAX_CONFIG,
    reference::HUB,
    registry::{
        Credentials, Endpoint, RegistryError, Session, Wanted,
        manifest::{Descriptor, ImageManifest, Manifest},
    },
};
use crate::{
    api::types::{
        Filters,
        image::{Descriptor as ApiDescriptor, Distribution, SearchResult},
    },
    engine::{Error, Result},
};

/// Docker Hub's index, which is searched and logged in to.
const INDEX: &str = "index.docker.io";

/// The keys that a search can be filtered by.
pub const SEARCH_FILTERS: [&str; 3] = ["is-automated", "is-official", "stars"];

/// How many results a search has, when nobody says and at most.
const RESULTS: i64 = 25;
const MAX_RESULTS: i64 = 100;

/// The most that is read of an index's answer, in bytes.
const MAX_ANSWER: usize = 4 << 20;

impl ImageStore {
    /// Checks credentials at the registry of an address, Docker Hub's when empty. Answers the identity token that it
    /// gave instead of the password; mostly none.
    ///
    /// # Errors
    /// Unauthorized: they are not good; the registry does not answer.
    pub async fn login(&self, server: &str, credentials: &Credentials) -> Result<String> {
        let domain = server_of(server)?;
        let mut last = Error::internal(format!("no endpoints found for {domain}"));
        for endpoint in self.registries.endpoints(&domain).await.into_iter().filter(|e| !e.mirror) {
            let (tls, url) = (endpoint.scheme == "https", endpoint.url(""));
            match Session::login(&self.registries, endpoint, credentials).await {
                Ok(token) => return Ok(token.unwrap_or_default()),
                Err(error) => {
                    let refused = is_refusal(&error);
                    let text = match &error {
                        RegistryError::Transport { .. } => error.to_string(),
                        _ => format!("Get \"{url}\": {error}"),
                    };
                    if refused {
                        return Err(Error::unauthorized(text));
                    }
                    last = Error::internal(text);
                    if tls && error.is_answer() {
                        break;
                    }
                }
            }
        }
        Err(last)
    }

    /// What a registry has under a name: `GET /distribution/{name}/json`.
    ///
    /// # Errors
    /// There is none, or no access to it.
    pub async fn distribution(&self, name: &str, credentials: Option<&Credentials>) -> Result<Distribution> {
        let reference = Reference::parse(name)?.or_latest();
        let repository = reference.repository();
        let mut told: Option<RegistryError> = None;
        for endpoint in self.registries.endpoints(repository.domain()).await {
            let (mirror, tls) = (endpoint.mirror, endpoint.scheme == "https");
            let session = Session::open(&self.registries, endpoint, repository.path(), credentials).await;
            let (error, spoke) = match session {
                Ok(session) => match inspect(&session, &reference).await {
                    Ok(found) => return Ok(found),
                    Err(error) => (error, true),
                },
                Err(error) => (error, false),
            };
            let over = !mirror && (spoke || error.is_answer());
            if told.as_ref().is_none_or(|before| !before.is_answer() || error.is_answer()) {
                told = Some(error);
            }
            if over && (spoke || tls) {
                break;
            }
        }
        Err(match told {
            None => Error::internal(format!("no endpoints found for {}", reference.familiar())),
            Some(error) => match &error {
                RegistryError::Answer { code, .. }
                    if matches!(code.as_str(), "MANIFEST_UNKNOWN" | "NAME_UNKNOWN") =>
                {
                    Error::not_found(error.to_string())
                }
                RegistryError::Answer { code, .. } if code == "DENIED" => Error::forbidden(error.to_string()),
                _ if is_refusal(&error) => Error::unauthorized(error.to_string()),
                RegistryError::Invalid(_) => Error::invalid(error.to_string()),
                _ => Error::internal(error.to_string()),
            },
        })
    }

    /// Searches a registry's index: Docker Hub's, or that of the host that the term begins with.
    ///
    /// # Errors
    /// The limit or a filter is not valid; the index does not answer.
    pub async fn search(
        &self,
        term: &str,
        limit: Option<i64>,
        filters: &Filters,
        credentials: Option<&Credentials>,
    ) -> Result<Vec<SearchResult>> {
        let limit = limit.filter(|limit| *limit != 0).unwrap_or(RESULTS);
        if !(1..=MAX_RESULTS).contains(&limit) {
            return Err(Error::invalid(format!("limit {limit} is outside the range of [1, {MAX_RESULTS}]")));
        }
        if term.contains("://") {
            return Err(Error::invalid(
                "invalid repository name: repository name (".to_owned() + term + ") should not have a scheme",
            ));
        }
        let chosen = Chosen::new(filters)?;
        let (host, term) = index_of(term);
        let mut last = Error::internal("no index to search");
        let endpoints = match host.as_str() {
            INDEX => vec![Endpoint {
                scheme: "https",
                authority: INDEX.to_owned(),
                prefix: String::new(),
                mirror: false,
                insecure: false,
            }],
            host => self.registries.endpoints(host).await,
        };
        for endpoint in endpoints {
            match self.registries.search(&endpoint, &term, limit, credentials).await {
                Ok(bytes) => {
                    let found: Found = serde_json::from_slice(&bytes)
                        .map_err(|error| Error::internal(format!("the index' answer: {error}")))?;
                    let results = found.results.into_iter().take(MAX_RESULTS.unsigned_abs() as usize);
                    return Ok(results.filter(|result| chosen.includes(result)).collect());
                }
                Err(RegistryError::Status(status)) => {
                    return Err(Error::internal(format!("Unexpected status code {status}")));
                }
                Err(error) => last = Error::internal(error.to_string()),
            }
        }
        Err(last)
    }
}

/// The most bytes of an index' answer.
pub(super) const fn max_answer() -> usize {
    MAX_ANSWER
}

/// What an index answers.
#[derive(Deserialize)]
struct Found {
    #[serde(default)]
    results: Vec<SearchResult>,
}

/// A search's filters.
struct Chosen {
    official: Option<bool>,
    automated: Option<bool>,
    stars: i64,
}

impl Chosen {
    fn new(filters: &Filters) -> Result<Self> {
        let flag = |key: &str| -> Result<Option<bool>> {
            if filters.contains(key) { Ok(Some(filters.boolean(key, false)?)) } else { Ok(None) }
        };
        let mut stars = 0;
        for text in filters.get("stars") {
            let least: i64 =
                text.parse().map_err(|_| Error::invalid(format!("invalid filter 'stars=[{text}]'")))?;
            stars = stars.max(least);
        }
        Ok(Self { official: flag("is-official")?, automated: flag("is-automated")?, stars })
    }

    fn includes(&self, result: &SearchResult) -> bool {
        // Docker Hub says of nothing any more that it is built by itself.
        self.official.is_none_or(|official| official == result.is_official)
            && self.automated != Some(true)
            && result.star_count >= self.stars
    }
}

/// The host of an index and what to search there.
fn index_of(term: &str) -> (String, String) {
    let is_host = |first: &str| first.contains(['.', ':']) || first == "localhost";
    match term.split_once('/') {
        Some((first, rest)) if is_host(first) && first != HUB && first != INDEX => {
            (first.to_owned(), rest.to_owned())
        }
        Some((HUB | INDEX, rest)) => (INDEX.to_owned(), rest.trim_start_matches("library/").to_owned()),
        _ => (INDEX.to_owned(), term.trim_start_matches("library/").to_owned()),
    }
}

/// The registry of a server's address as clients write it: a host, or a URL of Docker's old index.
fn server_of(server: &str) -> Result<String> {
    if server.is_empty() {
        return Ok(HUB.to_owned());
    }
    let bare = server.strip_prefix("https://").or_else(|| server.strip_prefix("http://")).unwrap_or(server);
    let host = bare.split(['/', '?', '#']).next().unwrap_or_default();
    if host.is_empty() || host.contains("@") || host.parse::<http::uri::Authority>().is_err() {
        return Err(Error::invalid(format!("unable to parse server address: {server:?}")));
    }
    Ok(if matches!(host, INDEX | "registry-1.docker.io") { HUB.to_owned() } else { host.to_owned() })
}

/// Whether a registry, or its token server, does not let us in.
fn is_refusal(error: &RegistryError) -> bool {
    match error {
        RegistryError::Answer { code, .. } => matches!(code.as_str(), "UNAUTHORIZED" | "DENIED"),
        RegistryError::Transport { cause, .. } => {
            cause.starts_with("unauthorized:")
                || cause.starts_with("denied:")
                || cause == "no basic auth credentials"
        }
        RegistryError::Body { status, .. } => *status == StatusCode::UNAUTHORIZED.as_u16(),
        _ => false,
    }
}

async fn inspect(session: &Session<'_>, reference: &Reference) -> Result<Distribution, RegistryError> {
    let wanted = match reference.digest() {
        Some(digest) => Wanted::Digest(digest),
        None => Wanted::Tag(reference.tag().unwrap_or("latest")),
    };
    let (digest, raw) = session.manifest(wanted).await?;
    let manifest = Manifest::parse(&raw)?;
    let platforms = match &manifest {
        Manifest::Index(entries) => entries.iter().filter_map(|entry| entry.platform.clone()).collect(),
        Manifest::Image(manifest) => vec![platform(session, manifest).await?],
    };
    Ok(Distribution {
        descriptor: ApiDescriptor {
            media_type: media_type(&manifest, &raw),
            digest: digest.to_string(),
            size: i64::try_from(raw.len()).unwrap_or(i64::MAX),
        },
        platforms: platforms.into_iter().map(Into::into).collect(),
    })
}

/// The platform of an image as its configuration says.
async fn platform(session: &Session<'_>, manifest: &ImageManifest) -> Result<Platform, RegistryError> {
    let config: &Descriptor = &manifest.config;
    let bytes = session.small_blob(config, MAX_CONFIG, "image config").await?;
    serde_json::from_slice(&bytes)
        .map_err(|error| RegistryError::Invalid(format!("the image config: {error}")))
}

/// What a manifest says it is; the OCI's need not.
fn media_type(manifest: &Manifest, raw: &[u8]) -> String {
    #[derive(Default, Deserialize)]
    #[serde(rename_all = "camelCase", default)]
    struct Typed {
        media_type: String,
    }
    let typed: Typed = serde_json::from_slice(raw).unwrap_or_default();
    match (typed.media_type, manifest) {
        (said, _) if !said.is_empty() => said,
        (_, Manifest::Index(_)) => "application/vnd.oci.image.index.v1+json".into(),
        (_, Manifest::Image(_)) => "application/vnd.oci.image.manifest.v1+json".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_named_in_many_ways() {
        for (server, domain) in [
            ("", HUB),
            ("https://index.docker.io/v1/", HUB),
            ("registry-1.docker.io", HUB),
            ("127.0.0.1:5000", "127.0.0.1:5000"),
            ("http://r.example:5000/v2/", "r.example:5000"),
        ] {
            assert_eq!(server_of(server).unwrap(), domain, "{server}");
        }
        for wrong in ["https://", "a b", "u:p@host"] {
            assert!(server_of(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn terms_name_their_index() {
        for (term, host, rest) in [
            ("busybox", INDEX, "busybox"),
            ("library/busybox", INDEX, "busybox"),
            ("docker.io/library/busybox", INDEX, "busybox"),
            ("someone/busybox", INDEX, "someone/busybox"),
            ("localhost:5000/a/b", "localhost:5000", "a/b"),
            ("r.example/a", "r.example", "a"),
        ] {
            assert_eq!(index_of(term), (host.to_owned(), rest.to_owned()), "{term}");
        }
    }

    #[test]
    fn results_are_filtered_here() {
        let chosen = |json: &str| Chosen::new(&Filters::parse(json, &SEARCH_FILTERS).unwrap());
        let result = SearchResult { is_official: true, star_count: 5, ..SearchResult::default() };
        for (json, included) in [
            ("{}", true),
            (r#"{"is-official":["true"]}"#, true),
            (r#"{"is-official":["false"]}"#, false),
            (r#"{"is-automated":["true"]}"#, false),
            (r#"{"stars":["5"]}"#, true),
            (r#"{"stars":["2","6"]}"#, false),
        ] {
            assert_eq!(chosen(json).unwrap().includes(&result), included, "{json}");
        }
        assert!(chosen(r#"{"stars":["many"]}"#).is_err() && chosen(r#"{"is-official":["odd"]}"#).is_err());
    }
}
