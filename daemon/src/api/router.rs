//! Routes as data, and how a request finds its route.

use std::pin::Pin;

use http::Method;

use super::{
    error::page_not_found,
    handlers,
    request::{Call, decode},
    response::Reply,
    version::{self, ApiVersion},
};
use crate::engine::{Error, Result};

/// What a handler's call becomes.
pub type Handled = Pin<Box<dyn Future<Output = Result<Reply>> + Send>>;

/// Whether a handler goes on when its client has gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lifetime {
    /// It changes something: it is carried to its end.
    ToEnd,
    /// It only tells something, or must stop with its client.
    WhileConnected,
}

/// An operation of the API.
pub struct Route {
    /// The method.
    pub method: Method,
    /// The path without its version. `{name}` stands for one or more segments: names may hold slashes.
    pub path: &'static str,
    /// The version that brought it.
    pub since: ApiVersion,
    /// What happens when the client goes.
    pub lifetime: Lifetime,
    /// What it does.
    pub handler: fn(Call) -> Handled,
}

/// A table of routes: `METHOD "/path" => handler,`, with `since NN` for operations that came with API 1.NN,
/// and `[WhileConnected]`.
macro_rules! table {
    ($($method:ident $path:literal $(since $minor:literal)? $([$lifetime:ident])? => $handler:expr),* $(,)?) => {
        &[$($crate::api::router::Route {
            method: ::http::Method::$method,
            path: $path,
            since: $crate::api::router::table!(@since $($minor)?),
            lifetime: $crate::api::router::table!(@lifetime $($lifetime)?),
            handler: |call| Box::pin(async move { $handler(call).await.map(Into::into) }),
        }),*]
    };
    (@since) => { $crate::api::version::MINIMUM };
    (@since $minor:literal) => { $crate::api::version::ApiVersion::new(1, $minor) };
    (@lifetime) => { $crate::api::router::Lifetime::ToEnd };
    (@lifetime $lifetime:ident) => { $crate::api::router::Lifetime::$lifetime };
}
pub(in crate::api) use table;

/// A request's route.
pub struct Found {
    /// The route.
    pub route: &'static Route,
    /// The path's version, or the current one.
    pub version: ApiVersion,
    /// The path's wildcards, decoded.
    pub params: Vec<String>,
}

/// All routes.
pub fn routes() -> impl Iterator<Item = &'static Route> {
    handlers::TABLES.iter().copied().flatten()
}

/// The route of a request. Unknown paths and wrong methods are both "page not found", as with dockerd.
///
/// # Errors
/// NotFound, or Invalid for a version that is not served.
pub fn find(method: &Method, path: &str) -> Result<Found> {
    let segments = path
        .split('/')
        // Go's clients double the slash of names that begin with one.
        .filter(|segment| !segment.is_empty())
        .map(|segment| decode(segment, false))
        .collect::<Result<Vec<_>>>()?;
    let (version, segments) = match segments.split_first() {
        Some((first, rest)) if is_version(first) => (Some(&first[1..]), rest),
        _ => (None, segments.as_slice()),
    };
    for route in routes().filter(|route| route.method == *method) {
        let pattern: Vec<&str> = route.path.split('/').filter(|segment| !segment.is_empty()).collect();
        let mut params = Vec::new();
        if !matches(&pattern, segments, &mut params) {
            continue;
        }
        let version = version.map_or(Ok(version::CURRENT), ApiVersion::negotiate)?;
        if version < route.since {
            return Err(page_not_found());
        }
        return Ok(Found { route, version, params });
    }
    Err(page_not_found())
}

/// `v1.41`: a `v`, digits and dots.
fn is_version(segment: &str) -> bool {
    segment.strip_prefix('v').is_some_and(|rest| {
        rest.starts_with(|c: char| c.is_ascii_digit())
            && rest.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.')
    })
}

fn matches(pattern: &[&str], path: &[String], params: &mut Vec<String>) -> bool {
    let Some((first, pattern)) = pattern.split_first() else { return path.is_empty() };
    if !first.starts_with('{') {
        return path
            .split_first()
            .is_some_and(|(have, path)| have == first && matches(pattern, path, params));
    }
    // A wildcard leaves at least one segment for each that follows in the pattern.
    let most = path.len().saturating_sub(pattern.len());
    for taken in 1..=most {
        params.push(path[..taken].join("/"));
        if matches(pattern, &path[taken..], params) {
            return true;
        }
        params.pop();
    }
    false
}

/// What is answered by an operation that Docker has and Bulkhead does not, or not yet.
pub fn refuse(what: &str) -> Error {
    Error::not_implemented(format!("{what} not supported"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn found(method: &str, path: &str) -> Result<(String, Vec<String>), String> {
        find(&method.parse().unwrap(), path)
            .map(|found| (format!("{} {}", found.version, found.route.path), found.params))
            .map_err(|error| error.message)
    }

    #[test]
    fn paths_find_their_routes() {
        for (method, path, route, params) in [
            ("GET", "/_ping", "1.50 /_ping", &[][..]),
            ("HEAD", "/v1.24/_ping", "1.24 /_ping", &[]),
            ("GET", "/v1.41/containers/json", "1.41 /containers/json", &[]),
            ("GET", "/containers/json/json", "1.50 /containers/{name}/json", &["json"]),
            ("GET", "/containers//web/json", "1.50 /containers/{name}/json", &["web"]),
            ("GET", "/images/json", "1.50 /images/json", &[]),
            ("GET", "/images/host:5000/a/b:1/json", "1.50 /images/{name}/json", &["host:5000/a/b:1"]),
            ("GET", "/images/a%2Fb/json", "1.50 /images/{name}/json", &["a/b"]),
            ("DELETE", "/v1.50/images/a/b@sha256:00", "1.50 /images/{name}", &["a/b@sha256:00"]),
            ("POST", "/containers/prune", "1.50 /containers/prune", &[]),
            ("GET", "/networks/", "1.50 /networks", &[]),
            ("OPTIONS", "/any/thing", "1.50 /{any}", &["any/thing"]),
        ] {
            let expected = (route.to_owned(), params.iter().map(|&param| param.to_owned()).collect());
            assert_eq!(found(method, path), Ok(expected), "{method} {path}");
        }
    }

    #[test]
    fn what_is_no_route_is_no_page() {
        for (method, path) in [
            ("GET", "/nosuch"),
            ("GET", "/"),
            ("PUT", "/info"),
            ("POST", "/v1.99/nosuch"),
            ("GET", "/v1.x/info"),
            ("GET", "/containers/a"),
        ] {
            assert_eq!(found(method, path).unwrap_err(), "page not found", "{method} {path}");
        }
        assert!(found("GET", "/v1.99/info").unwrap_err().contains("too new"));
        assert!(found("GET", "/v1.2/info").unwrap_err().contains("too old"));
    }

    #[test]
    fn no_two_routes_are_the_same_and_every_path_is_well_formed() {
        let all: Vec<_> = routes().map(|route| format!("{} {}", route.method, route.path)).collect();
        let mut sorted = all.clone();
        sorted.sort();
        sorted.dedup();
        assert_eq!(sorted.len(), all.len());
        assert!(routes().all(|route| route.path.starts_with('/') && !route.path.ends_with('/')));
    }

    /// Every operation of the published description has a route of its own, and what has none there is ours.
    #[test]
    fn every_published_operation_is_routed() {
        let published = include_str!("operations.txt").lines().filter(|line| !line.starts_with('#'));
        let published: Vec<(&str, &str)> = published.filter_map(|line| line.split_once(' ')).collect();
        assert_eq!(published.len(), 107);
        let same = |ours: &str, theirs: &str| {
            let wild = |segment: &str| segment.starts_with('{');
            ours.split('/').count() == theirs.split('/').count()
                && ours.split('/').zip(theirs.split('/')).all(|(a, b)| a == b || (wild(a) && wild(b)))
        };
        for (method, path) in &published {
            assert!(
                routes().any(|route| route.method.as_str() == *method && same(route.path, path)),
                "{method} {path} has no route"
            );
        }
        let own = routes().filter(|route| {
            !published.iter().any(|(method, path)| route.method.as_str() == *method && same(route.path, path))
        });
        let mut own: Vec<String> = own.map(|route| format!("{} {}", route.method, route.path)).collect();
        own.sort();
        insta::assert_snapshot!("routes_beside_the_published", own.join("\n"));
    }

    /// The table against the API's reference: what is routed, in one place for the eye.
    #[test]
    fn the_table() {
        let mut table: Vec<_> = routes()
            .map(|route| format!("{:<7} {:<36} {:?}", route.method.as_str(), route.path, route.lifetime))
            .collect();
        table.sort();
        insta::assert_snapshot!(table.join("\n"));
    }

    proptest! {
        #[test]
        fn every_name_reaches_its_handler(name in "[a-z0-9:@._-]{1,9}(/[a-z0-9:@._-]{1,9}){0,4}") {
            let (route, params) = found("GET", &format!("/v1.43/images/{name}/json")).unwrap();
            prop_assert_eq!(route, "1.43 /images/{name}/json");
            prop_assert_eq!(params, [name]);
        }

        #[test]
        fn no_path_is_a_panic(path in "(/.{0,6}){0,6}") {
            let _ = found("GET", &path);
        }
    }
}
