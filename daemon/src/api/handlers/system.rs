//! `/_ping`, `/version`, `/info`, `/events`, `/system/df`.

use std::collections::BTreeMap;

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::{
    HeaderValue, Response, StatusCode,
    header::{CACHE_CONTROL, CONTENT_LENGTH, CONTENT_TYPE, HeaderName, PRAGMA},
};

use crate::{
    api::{
        request::Call,
        response::{Body, full, json, status, streamed},
        router::{Route, table},
        types::{
            event::Message,
            system::{Component, DiskUsageKinds, Platform, Version},
        },
        version::{self, ApiVersion},
    },
    engine::{
        Error, Result,
        events::{FILTER_KEYS, Selection},
    },
    phases::Timeline,
};

pub(super) const ROUTES: &[Route] = table! {
    GET "/_ping" => ping,
    HEAD "/_ping" => ping_head,
    GET "/version" => version,
    GET "/info" => info,
    GET "/events" [WhileConnected] => events,
    GET "/system/df" => disk_usage,
    OPTIONS "/{any}" => options,
    GET "/bulkhead/phases" => phases,
    GET "/bulkhead/containers/{name}/phases" => container_phases,
};

/// Our own: where the time of recent creates, starts and ends went.
async fn phases(call: Call) -> Result<Response<Body>> {
    json(&call.engine.phases(None)?.iter().map(AsRef::as_ref).collect::<Vec<&Timeline>>())
}

async fn container_phases(call: Call) -> Result<Response<Body>> {
    json(&call.engine.phases(Some(call.name()))?.iter().map(AsRef::as_ref).collect::<Vec<&Timeline>>())
}

fn ping_headers(mut response: Response<Body>) -> Response<Body> {
    let headers = response.headers_mut();
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache, no-store, must-revalidate"));
    headers.insert(PRAGMA, HeaderValue::from_static("no-cache"));
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    // 1: the classic builder. There is no BuildKit.
    headers.insert(HeaderName::from_static("builder-version"), HeaderValue::from_static("1"));
    headers.insert(HeaderName::from_static("swarm"), HeaderValue::from_static("inactive"));
    response
}

async fn ping(_: Call) -> Result<Response<Body>> {
    Ok(ping_headers(Response::new(full("OK"))))
}

async fn ping_head(_: Call) -> Result<Response<Body>> {
    let mut response = ping_headers(status(StatusCode::OK));
    response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from_static("0"));
    Ok(response)
}

async fn options(_: Call) -> Result<Response<Body>> {
    Ok(status(StatusCode::OK))
}

async fn version(_: Call) -> Result<Response<Body>> {
    let uname = rustix::system::uname();
    let commit = option_env!("BULKHEAD_COMMIT").unwrap_or_default();
    json(&render_version(&uname.release().to_string_lossy(), commit))
}

/// Everything that identifies the daemon; `kernel` is the host's, `commit` the daemon's.
fn render_version(kernel: &str, commit: &str) -> Version {
    let (api, minimum) = (version::CURRENT.to_string(), version::MINIMUM.to_string());
    let details = [
        ("ApiVersion", api.as_str()),
        ("MinAPIVersion", &minimum),
        ("Os", "linux"),
        ("Arch", "amd64"),
        ("GitCommit", commit),
        ("GoVersion", ""),
        ("KernelVersion", kernel),
        ("Experimental", "true"),
        ("BuildTime", ""),
    ];
    let details: BTreeMap<_, _> =
        details.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    Version {
        platform: Platform { name: "Bulkhead".into() },
        components: vec![Component { name: "Engine".into(), version: version::DAEMON.into(), details }],
        version: version::DAEMON.into(),
        api_version: api,
        min_api_version: minimum,
        git_commit: commit.into(),
        go_version: String::new(),
        os: "linux".into(),
        arch: "amd64".into(),
        kernel_version: kernel.into(),
        experimental: true,
        build_time: String::new(),
    }
}

async fn info(call: Call) -> Result<Response<Body>> {
    let mut info = call.engine.info().await;
    if call.version < ApiVersion::new(1, 49) {
        for commit in [&mut info.containerd_commit, &mut info.runc_commit, &mut info.init_commit] {
            commit.expected.clone_from(&commit.id);
        }
    }
    json(&info)
}

async fn disk_usage(call: Call) -> Result<Response<Body>> {
    let mut kinds = DiskUsageKinds::NONE;
    let mut any = false;
    for kind in call.query.all("type") {
        any = true;
        match kind {
            "container" => kinds.containers = true,
            "image" => kinds.images = true,
            "volume" => kinds.volumes = true,
            "build-cache" => kinds.build_cache = true,
            other => return Err(Error::invalid(format!("unknown object type: {other}"))),
        }
    }
    if !any || call.version < ApiVersion::new(1, 42) {
        kinds = DiskUsageKinds::ALL;
    }
    json(&call.engine.disk_usage(kinds).await?)
}

async fn events(call: Call) -> Result<Response<Body>> {
    let selection = Selection {
        since: call.query.time("since")?,
        until: call.query.time("until")?,
        filters: call.filters(&FILTER_KEYS)?,
    };
    if let (Some(since), Some(until)) = (selection.since, selection.until)
        && until < since
    {
        let text = |name| call.query.get(name).unwrap_or_default();
        return Err(Error::invalid(format!(
            "`since` time ({}) cannot be after `until` time ({})",
            text("since"),
            text("until")
        )));
    }
    let subscription = call.engine.events().subscribe(selection);
    // Before API 1.46 there was no such event.
    let hidden = move |message: &Message| {
        call.version < ApiVersion::new(1, 46) && message.kind == "image" && message.action == "create"
    };
    let messages = stream::unfold(subscription, |mut subscription| async {
        subscription.next().await.map(|message| (message, subscription))
    });
    let lines = messages.filter_map(move |message| {
        let line = (!hidden(&message)).then(|| line(&message));
        async { line }
    });
    Ok(streamed("application/json", lines))
}

fn line(message: &Message) -> Result<Bytes> {
    let mut text = serde_json::to_vec(message).map_err(|error| Error::internal(error.to_string()))?;
    text.push(b'\n');
    Ok(text.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_as_clients_see_it() {
        insta::assert_json_snapshot!(render_version("6.1.0", "c0ffee"));
    }

    #[test]
    fn ping_says_what_the_cli_looks_for() {
        let response = ping_headers(status(StatusCode::OK));
        let mut headers: Vec<_> = response
            .headers()
            .iter()
            .map(|(name, value)| format!("{name}: {}", value.to_str().unwrap()))
            .collect();
        headers.sort();
        insta::assert_snapshot!(headers.join("\n"));
    }
}
