//! `/containers`.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::{FutureExt, StreamExt, stream};
use http::{Response, StatusCode, header::CONTENT_LENGTH};

use super::checkpoints;
use crate::{
    api::{
        request::{Call, invalid_json},
        response::{Body, Reply, json, json_with, no_content, status, streamed},
        router::{Route, table},
        stream::{
            Hijack,
            detach::{Detach, DetachKeys},
            media_type,
        },
        types::container::{CreateRequest, HostConfig, WaitResponse},
        version::ApiVersion,
    },
    engine::{
        AttachOptions, Error, Result, WaitCondition,
        container::{LIST_FILTERS, ListOptions},
    },
};

pub(super) const ROUTES: &[Route] = table! {
    GET "/containers/json" => list,
    POST "/containers/create" => create,
    POST "/containers/prune" since 25 => prune,
    GET "/containers/{name}/json" => inspect,
    GET "/containers/{name}/top" => top,
    POST "/containers/{name}/start" => start,
    POST "/containers/{name}/stop" => stop,
    POST "/containers/{name}/restart" => restart,
    POST "/containers/{name}/kill" => kill,
    POST "/containers/{name}/update" => update,
    POST "/containers/{name}/pause" => pause,
    POST "/containers/{name}/unpause" => unpause,
    POST "/containers/{name}/rename" => rename,
    POST "/containers/{name}/resize" => resize,
    POST "/containers/{name}/wait" [WhileConnected] => wait,
    POST "/containers/{name}/attach" => attach,
    GET "/containers/{name}/attach/ws" => websocket,
    DELETE "/containers/{name}" => remove,
};

async fn list(call: Call) -> Result<Response<Body>> {
    let options = ListOptions {
        all: call.query.boolean("all", false),
        // -1 is what old clients send for "no limit".
        limit: call
            .query
            .number::<i64>("limit")?
            .and_then(|limit| usize::try_from(limit).ok())
            .filter(|n| *n > 0),
        size: call.query.boolean("size", false),
        filters: call.filters(&LIST_FILTERS)?,
    };
    json(&call.engine.container_list(options).await?)
}

async fn create(mut call: Call) -> Result<Response<Body>> {
    let text = call
        .json_text()
        .await?
        .ok_or_else(|| Error::invalid("invalid JSON: got EOF while reading request body"))?;
    let mut request = CreateRequest::from_slice(&text).map_err(|error| invalid_json(&error))?;
    if call.version < ApiVersion::new(1, 25) {
        // There the client removes it.
        request.host_config.auto_remove = false;
    }
    check_platform(call.query.get("platform").unwrap_or_default())?;
    let created = call.engine.container_create(call.query.non_empty("name"), request).await?;
    json_with(StatusCode::CREATED, &created)
}

/// `--platform`: what the guests are, or nothing.
fn check_platform(platform: &str) -> Result<()> {
    let matches = match platform.split('/').collect::<Vec<_>>().as_slice() {
        [""] | ["linux" | "amd64" | "x86_64" | "x86-64"] => true,
        ["linux", "amd64" | "x86_64" | "x86-64"] => true,
        ["linux", "amd64" | "x86_64" | "x86-64", level] => matches!(*level, "" | "v1"),
        _ => false,
    };
    if matches {
        Ok(())
    } else {
        Err(Error::invalid(format!(
            "the requested platform ({platform}) does not match the guest platform (linux/amd64), and there is no \
             emulation"
        )))
    }
}

async fn inspect(call: Call) -> Result<Response<Body>> {
    json(&call.engine.container_inspect(call.name(), call.query.boolean("size", false)).await?)
}

async fn top(call: Call) -> Result<Response<Body>> {
    let arguments = call.query.non_empty("ps_args").unwrap_or("-ef");
    json(&call.engine.container_top(call.name(), arguments).await?)
}

async fn start(call: Call) -> Result<Response<Body>> {
    // The shortest JSON object with a field has 7 bytes; a body of unknown length may be longer.
    let length =
        call.headers().get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    let chunked = call.headers().contains_key(http::header::TRANSFER_ENCODING);
    if chunked || length.is_some_and(|length| length > 7) {
        return Err(Error::invalid(
            "starting container with non-empty request body was deprecated since API v1.22 and removed in v1.24",
        ));
    }
    checkpoints::refuse_directory(call.query.get("checkpoint-dir"))?;
    match call.query.non_empty("checkpoint") {
        Some(checkpoint) => call.engine.container_start_from(call.name(), checkpoint).await?,
        None => call.engine.container_start(call.name()).await?,
    }
    Ok(no_content())
}

async fn stop(call: Call) -> Result<Response<Body>> {
    let timeout = call.query.number("t")?;
    call.engine.container_stop(call.name(), stop_signal(&call), timeout).await?;
    Ok(no_content())
}

async fn restart(call: Call) -> Result<Response<Body>> {
    let timeout = call.query.number("t")?;
    call.engine.container_restart(call.name(), stop_signal(&call), timeout).await?;
    Ok(no_content())
}

fn stop_signal(call: &Call) -> Option<&str> {
    call.query.non_empty("signal").filter(|_| call.version >= ApiVersion::new(1, 42))
}

async fn kill(call: Call) -> Result<Response<Body>> {
    call.engine.container_kill(call.name(), call.query.non_empty("signal")).await?;
    Ok(no_content())
}

async fn update(mut call: Call) -> Result<Response<Body>> {
    // Its fields are those of a host config, of which it is a part.
    let mut request: HostConfig = call.json().await?;
    if call.version < ApiVersion::new(1, 40) {
        request.pids_limit = None;
    }
    json(&call.engine.container_update(call.name(), request).await?)
}

async fn pause(call: Call) -> Result<Response<Body>> {
    call.engine.container_pause(call.name(), true).await?;
    Ok(no_content())
}

async fn unpause(call: Call) -> Result<Response<Body>> {
    call.engine.container_pause(call.name(), false).await?;
    Ok(no_content())
}

async fn rename(call: Call) -> Result<Response<Body>> {
    call.engine.container_rename(call.name(), call.query.get("name").unwrap_or_default()).await?;
    Ok(no_content())
}

async fn resize(call: Call) -> Result<Response<Body>> {
    let (rows, columns) = size(&call)?;
    call.engine.container_resize(call.name(), rows, columns).await?;
    Ok(status(StatusCode::OK))
}

/// `h` and `w`: rows and columns.
pub(super) fn size(call: &Call) -> Result<(u16, u16)> {
    let number = |name: &str, what: &str| {
        let text = call.query.get(name).unwrap_or_default();
        text.parse().map_err(|_| Error::invalid(format!("invalid resize {what} {text:?}: invalid syntax")))
    };
    Ok((number("h", "height")?, number("w", "width")?))
}

async fn wait(call: Call) -> Result<Response<Body>> {
    let condition = match call.query.get("condition").unwrap_or_default() {
        "" | "not-running" => WaitCondition::NotRunning,
        "next-exit" => WaitCondition::NextExit,
        "removed" => WaitCondition::Removed,
        other => return Err(Error::invalid(format!("invalid condition: {other:?}"))),
    };
    let waited = call.engine.container_wait(call.name(), condition).await?;
    // The head goes out now: it tells the client that its wait is registered, so that it can start.
    Ok(streamed("application/json", waited.map(|response| render_wait(&response)).into_stream()))
}

fn render_wait(response: &WaitResponse) -> Result<Bytes> {
    let mut text = serde_json::to_vec(response).map_err(|error| Error::internal(error.to_string()))?;
    text.push(b'\n');
    Ok(text.into())
}

/// What an attach asks for, and how its terminal is left.
fn attach_options(call: &Call) -> Result<(AttachOptions, Detach)> {
    let flag = |name: &str| call.query.boolean(name, false);
    let options = AttachOptions {
        logs: flag("logs"),
        stream: flag("stream"),
        stdin: flag("stdin"),
        stdout: flag("stdout"),
        stderr: flag("stderr"),
    };
    let keys = DetachKeys::parse(call.query.get("detachKeys").unwrap_or_default())?;
    let (engine, name) = (Arc::clone(&call.engine), call.name().to_owned());
    Ok((options, Detach::new(keys, move || engine.container_detached(&name))))
}

async fn attach(call: Call) -> Result<Reply> {
    let (options, detach) = attach_options(&call)?;
    let attachment = call.engine.container_attach(call.name(), options).await?;
    let media_type = media_type(attachment.terminal, call.version);
    let detach = attachment.terminal.then_some(detach);
    Ok(Reply::Hijack(Hijack::stdio(call.headers(), media_type, attachment, detach)))
}

async fn websocket(call: Call) -> Result<Reply> {
    let (options, detach) = attach_options(&call)?;
    let attachment = call.engine.container_attach(call.name(), options).await?;
    let detach = attachment.terminal.then_some(detach);
    Ok(Reply::Hijack(Hijack::websocket(call.headers(), attachment, detach)?))
}

async fn remove(call: Call) -> Result<Response<Body>> {
    if call.query.boolean("link", false) {
        call.engine.container_unlink(call.name()).await?;
        return Ok(no_content());
    }
    let (force, volumes) = (call.query.boolean("force", false), call.query.boolean("v", false));
    call.engine.container_remove(call.name(), force, volumes).await?;
    Ok(no_content())
}

async fn prune(call: Call) -> Result<Response<Body>> {
    let filters = call.filters(&["label", "label!", "until"])?;
    json(&call.engine.container_prune(&filters).await?)
}

/// Pieces of a channel as a stream.
pub(super) fn pieces<T: Send + 'static>(
    receiver: tokio::sync::mpsc::Receiver<T>,
) -> impl futures_util::Stream<Item = T> + Send + 'static {
    stream::unfold(receiver, |mut receiver| async { receiver.recv().await.map(|item| (item, receiver)) })
        .fuse()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn platforms() {
        for (platform, fits) in [
            ("", true),
            ("linux", true),
            ("linux/amd64", true),
            ("linux/x86_64/v1", true),
            ("amd64", true),
            ("linux/arm64", false),
            ("windows/amd64", false),
            ("linux/amd64/v3", false),
            ("a/b/c/d", false),
        ] {
            assert_eq!(check_platform(platform).is_ok(), fits, "{platform}");
        }
    }

    #[test]
    fn a_wait_is_one_line() {
        let text = |response| String::from_utf8(render_wait(&response).unwrap().to_vec()).unwrap();
        assert_eq!(text(WaitResponse { error: None, status_code: 7 }), "{\"StatusCode\":7}\n");
    }
}
