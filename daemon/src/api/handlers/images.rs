//! `/images`.

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::{Response, StatusCode};
use http_body_util::BodyExt;
use serde::Deserialize;

use crate::{
    api::{
        request::Call,
        response::{Body, full, json, status, streamed},
        router::{Route, refuse, table},
        types::{Filters, image::Summary, json as go_json},
        version::ApiVersion,
    },
    engine::{
        Error, Result,
        image::{
            Credentials, Digest, ImportRequest, LIST_FILTERS, ListOptions, Message, Messages, PRUNE_FILTERS,
            Platform, PullRequest, PushRequest, Reference, RemoveOptions,
        },
    },
};

pub(super) const ROUTES: &[Route] = table! {
    GET "/images/json" => list,
    GET "/images/get" [WhileConnected] => save_several,
    POST "/images/create" [WhileConnected] => create,
    POST "/images/load" [WhileConnected] => load,
    POST "/images/prune" since 25 => prune,
    GET "/images/{name}/json" => inspect,
    GET "/images/{name}/history" => history,
    GET "/images/{name}/get" [WhileConnected] => save,
    POST "/images/{name}/tag" => tag,
    POST "/images/{name}/push" [WhileConnected] => push,
    DELETE "/images/{name}" => remove,
};

const JSON: &str = "application/json";

async fn save(call: Call) -> Result<Response<Body>> {
    saved(&call, &[call.name().to_owned()]).await
}

async fn save_several(call: Call) -> Result<Response<Body>> {
    let names: Vec<String> = call.query.all("names").map(str::to_owned).collect();
    saved(&call, &names).await
}

async fn saved(call: &Call, names: &[String]) -> Result<Response<Body>> {
    let platform = platform_since(call, ApiVersion::new(1, 48))?;
    let archive = call.engine.images().save(names, platform.as_ref()).await?;
    Ok(streamed("application/x-tar", archive))
}

async fn push(call: Call) -> Result<Response<Body>> {
    let name = Reference::parse(call.name())?;
    if name.digest().is_some() {
        return Err(Error::invalid("cannot push a digest reference"));
    }
    let reference = match call.query.non_empty("tag") {
        Some(tag) => name.with_tag(tag)?,
        None => name,
    };
    let request = PushRequest { reference, credentials: credentials(&call) };
    Ok(streamed(JSON, lines(call.engine.images().push(request))))
}

/// The client's, for the registry.
fn credentials(call: &Call) -> Option<Credentials> {
    let value = call.headers().get("x-registry-auth")?.to_str().ok()?;
    Credentials::from_header(value)
}

async fn list(call: Call) -> Result<Response<Body>> {
    let mut filters = call.filters(&LIST_FILTERS)?;
    if call.version < ApiVersion::new(1, 41)
        && let Some(pattern) = call.query.non_empty("filter")
    {
        filters.insert("reference", pattern);
    }
    let options = ListOptions {
        all: call.query.boolean("all", false),
        filters: &filters,
        shared_size: call.version >= ApiVersion::new(1, 42) && call.query.boolean("shared-size", false),
    };
    let mut images = call.engine.images().list(options)?;
    for image in &mut images {
        in_version(image, call.version);
    }
    json(&images)
}

/// A summary as older API versions have it.
fn in_version(image: &mut Summary, version: ApiVersion) {
    if version < ApiVersion::new(1, 51) {
        // Only `/system/df` counted them.
        image.containers = -1;
    }
    if version < ApiVersion::new(1, 44) {
        image.virtual_size = image.size;
    }
    if version < ApiVersion::new(1, 43) && image.repo_tags.is_empty() && image.repo_digests.is_empty() {
        image.repo_tags.push("<none>:<none>".into());
        image.repo_digests.push("<none>@<none>".into());
    }
}

async fn inspect(call: Call) -> Result<Response<Body>> {
    let platform = platform_since(&call, ApiVersion::new(1, 49))?;
    if platform.is_some() && call.query.boolean("manifests", false) {
        return Err(Error::invalid("conflicting options: manifests and platform options cannot both be set"));
    }
    let mut image = call.engine.images().inspect(call.name(), platform.as_ref())?;
    if call.version < ApiVersion::new(1, 44) {
        image.virtual_size = image.size;
        if image.created.is_empty() {
            image.created = "0001-01-01T00:00:00Z".into();
        }
    }
    json(&image)
}

async fn history(call: Call) -> Result<Response<Body>> {
    let platform = platform_since(&call, ApiVersion::new(1, 48))?;
    json(&call.engine.images().history(call.name(), platform.as_ref())?)
}

async fn tag(call: Call) -> Result<Response<Body>> {
    let target = repository_and_tag(&call)?.ok_or_else(|| Error::invalid("repo must not be empty"))?;
    call.engine.images().tag(call.name(), &target).await?;
    Ok(status(StatusCode::CREATED))
}

async fn remove(call: Call) -> Result<Response<Body>> {
    let images = call.engine.images();
    if call.version >= ApiVersion::new(1, 50) {
        let mut platforms = call.query.all("platforms");
        if let Some(platform) = platforms.next() {
            if platforms.next().is_some() {
                return Err(Error::invalid("multiple platforms are not supported"));
            }
            images.inspect(call.name(), Some(&json_platform(platform)?))?;
        }
    }
    let options = RemoveOptions {
        force: call.query.boolean("force", false),
        keep_parents: call.query.boolean("noprune", false),
    };
    json(&images.remove(call.name(), options).await?)
}

async fn prune(call: Call) -> Result<Response<Body>> {
    let filters: Filters = call.filters(&PRUNE_FILTERS)?;
    json(&call.engine.images().prune(&filters).await?)
}

/// `docker pull`, or `docker import`.
async fn create(call: Call) -> Result<Response<Body>> {
    match call.query.non_empty("fromImage") {
        Some(image) => pull(&call, image).await,
        None => import(call).await,
    }
}

async fn pull(call: &Call, image: &str) -> Result<Response<Body>> {
    let request = PullRequest {
        reference: pulled_reference(image, call.query.non_empty("tag"))?,
        platform: call.query.non_empty("platform").map(Platform::parse).transpose()?,
        credentials: credentials(call),
    };
    let mut messages = call.engine.images().pull(request);
    match messages.recv().await {
        // Nothing was promised yet: the error is the answer.
        Some(Err(error)) => Err(error),
        Some(Ok(first)) => {
            Ok(streamed(JSON, stream::iter([Ok(Bytes::from(first.line()))]).chain(lines(messages))))
        }
        None => Err(Error::internal("the pull ended without a word")),
    }
}

async fn import(call: Call) -> Result<Response<Body>> {
    let source = call.query.get("fromSrc").unwrap_or_default();
    if source != "-" {
        return Err(refuse("importing from a URL is"));
    }
    let request = ImportRequest {
        reference: repository_and_tag(&call)?,
        platform: call.query.non_empty("platform").map(Platform::parse).transpose()?,
        message: call
            .query
            .non_empty("message")
            .map_or_else(|| format!("Imported from {source}"), str::to_owned),
        changes: call.query.all("changes").map(str::to_owned).collect(),
    };
    let Call { engine, body, .. } = call;
    let id = engine.images().import(request, body.into_data_stream()).await?;
    Ok(typed(full(Message::status(id.to_string()).line())))
}

async fn load(call: Call) -> Result<Response<Body>> {
    let platform = platform_since(&call, ApiVersion::new(1, 48))?;
    let quiet = call.query.boolean("quiet", true);
    let Call { engine, body, .. } = call;
    let messages = engine.images().load(body.into_data_stream(), platform, quiet);
    Ok(streamed(JSON, lines(messages)))
}

/// Messages as they come; an error is one of them, since the status has gone out.
fn lines(messages: Messages) -> impl stream::Stream<Item = Result<Bytes>> + Send + 'static {
    stream::unfold(messages, |mut messages| async move {
        let message = messages.recv().await?.unwrap_or_else(|error| Message::error(&error));
        Some((Ok(Bytes::from(message.line())), messages))
    })
}

fn typed(body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    response.headers_mut().insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static(JSON));
    response
}

/// What `fromImage` and `tag` name together; the tag may be a digest.
fn pulled_reference(image: &str, tag: Option<&str>) -> Result<Reference> {
    // Clients leave a colon for "all tags".
    let reference = Reference::parse(image.strip_suffix(':').unwrap_or(image))?;
    Ok(match tag {
        None => reference,
        Some(tag) => match tag.parse::<Digest>() {
            Ok(digest) => reference.with_digest(digest),
            Err(_) => reference.with_tag(tag)?,
        },
    })
}

/// The name that `repo` and `tag` give something, None without `repo`.
pub(super) fn repository_and_tag(call: &Call) -> Result<Option<Reference>> {
    let Some(repository) = call.query.non_empty("repo") else { return Ok(None) };
    let reference = Reference::parse(repository)?;
    if reference.digest().is_some() {
        return Err(Error::invalid("cannot import digest reference"));
    }
    Ok(Some(match call.query.non_empty("tag") {
        Some(tag) => reference.with_tag(tag)?,
        None => reference.or_latest(),
    }))
}

/// The query's `platform`, in JSON, for operations that have it since `version`.
fn platform_since(call: &Call, version: ApiVersion) -> Result<Option<Platform>> {
    let mut all = call.query.all("platform").filter(|text| !text.is_empty());
    let Some(text) = all.next().filter(|_| call.version >= version) else { return Ok(None) };
    if all.next().is_some() {
        return Err(Error::invalid("multiple platform parameters not supported"));
    }
    json_platform(text).map(Some)
}

fn json_platform(text: &str) -> Result<Platform> {
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct Parts {
        os: String,
        architecture: String,
        variant: String,
    }
    let parts: Parts = go_json::from_slice(text.as_bytes())
        .map_err(|error| Error::invalid(format!("failed to parse platform: {error}")))?;
    if parts.os.is_empty() || parts.architecture.is_empty() {
        return Err(Error::invalid("both OS and Architecture must be provided"));
    }
    Ok(Platform::normalised(&parts.os, &parts.architecture, Some(&parts.variant)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pulls_parameters_make_one_reference() {
        let hex = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        for (image, tag, expected) in [
            ("busybox", Some("1.36"), "docker.io/library/busybox:1.36".to_owned()),
            ("busybox", None, "docker.io/library/busybox".to_owned()),
            ("busybox:", None, "docker.io/library/busybox".to_owned()),
            ("busybox:old", Some("new"), "docker.io/library/busybox:new".to_owned()),
            ("a.b:5000/c", Some(&format!("sha256:{hex}")), format!("a.b:5000/c@sha256:{hex}")),
        ] {
            assert_eq!(pulled_reference(image, tag).unwrap().to_string(), expected);
        }
        assert_eq!(pulled_reference("busybox", Some("a b")).unwrap_err().message, "invalid tag format");
        assert_eq!(
            pulled_reference("Busybox", None).unwrap_err().message,
            "invalid reference format: repository name (library/Busybox) must be lowercase"
        );
    }

    #[test]
    fn platforms_are_read_from_json() {
        let platform = json_platform(r#"{"OS":"linux","architecture":"x86_64"}"#).unwrap();
        assert_eq!(platform.to_string(), "linux/amd64");
        for wrong in ["", "linux/amd64", "{}", r#"{"os":"linux"}"#] {
            assert!(json_platform(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn summaries_are_those_of_the_clients_version() {
        let mut old = Summary { size: 5, containers: 2, ..Summary::default() };
        let mut new = old.clone();
        in_version(&mut old, ApiVersion::new(1, 24));
        in_version(&mut new, ApiVersion::new(1, 50));
        assert_eq!((old.virtual_size, old.containers), (5, -1));
        assert_eq!(
            (old.repo_tags, old.repo_digests),
            (vec!["<none>:<none>".into()], vec!["<none>@<none>".into()])
        );
        assert_eq!((new.virtual_size, new.repo_tags.len()), (0, 0));
    }

    #[tokio::test]
    async fn an_error_after_the_first_line_is_a_line() {
        let (sender, messages) = tokio::sync::mpsc::channel(4);
        sender.send(Ok(Message::status("Pulling"))).await.unwrap();
        sender.send(Err(Error::internal("no space left on device"))).await.unwrap();
        drop(sender);
        let text: Vec<u8> = lines(messages).map(|line| line.unwrap().to_vec()).concat().await;
        assert_eq!(
            String::from_utf8(text).unwrap(),
            "{\"status\":\"Pulling\"}\r\n{\"errorDetail\":{\"message\":\"no space left on device\"},\"error\":\"no space left on device\"}\r\n"
        );
    }
}
