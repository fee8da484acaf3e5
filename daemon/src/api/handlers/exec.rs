//! `/containers/{name}/exec` and `/exec`.

use std::sync::Arc;

use http::{Response, StatusCode};

use super::containers::size;
use crate::{
    api::{
        request::Call,
        response::{Body, Reply, json, json_with, status},
        router::{Route, table},
        stream::{
            Hijack,
            detach::{Detach, DetachKeys},
            media_type,
        },
        types::exec::{CreateRequest, CreateResponse, StartRequest},
        version::ApiVersion,
    },
    engine::{Error, Result},
};

pub(super) const ROUTES: &[Route] = table! {
    POST "/containers/{name}/exec" => create,
    POST "/exec/{id}/start" => start,
    POST "/exec/{id}/resize" => resize,
    GET "/exec/{id}/json" => inspect,
};

async fn create(mut call: Call) -> Result<Response<Body>> {
    let mut request: CreateRequest = call.json().await?;
    if call.version < ApiVersion::new(1, 42) {
        request.console_size = None;
    }
    request.detach_keys = encoded_keys(&request.detach_keys)?;
    let id = call.engine.exec_create(call.name(), request).await?;
    json_with(StatusCode::CREATED, &CreateResponse { id })
}

async fn start(mut call: Call) -> Result<Reply> {
    let mut request: StartRequest = call.json().await?;
    if call.version < ApiVersion::new(1, 42) || !request.tty {
        request.console_size = None;
    }
    let id = call.name().to_owned();
    // What is wrong before it starts has a status of its own.
    let exec = call.engine.exec_inspect(&id).await?;
    // Whether it has a terminal was said when it was created; whether its output is to come in frames is said now.
    let (raw, detach) = (request.tty, request.detach);
    let keys = exec_keys(&exec.detach_keys)?;
    let (engine, exec_id) = (Arc::clone(&call.engine), id.clone());
    let keys = Detach::new(keys, move || engine.exec_detached(&exec_id));
    let keys = exec.process_config.tty.then_some(keys);
    let starting = call.engine.exec_start(&id, request)?;
    if detach {
        starting.start().await?;
        return Ok(status(StatusCode::OK).into());
    }
    let attached =
        async move { starting.start().await?.ok_or_else(|| Error::internal("the exec is detached")) };
    let media_type = media_type(raw, call.version);
    Ok(Reply::Hijack(Hijack::starting(call.headers(), media_type, raw, keys, Box::pin(attached))))
}

/// Detach keys as inspect shows them and [`exec_keys`] reads them.
fn encoded_keys(text: &str) -> Result<String> {
    use base64::Engine as _;
    let keys = DetachKeys::parse(text)?;
    let bytes = if text.is_empty() { &[][..] } else { keys.bytes() };
    Ok(base64::engine::general_purpose::STANDARD.encode(bytes))
}

/// The keys that the exec was created with: base64 in its inspect, as Go writes bytes.
fn exec_keys(encoded: &str) -> Result<DetachKeys> {
    use base64::Engine as _;
    let keys = base64::engine::general_purpose::STANDARD.decode(encoded).unwrap_or_default();
    if keys.is_empty() { DetachKeys::parse("") } else { Ok(DetachKeys::from_bytes(keys)) }
}

async fn resize(call: Call) -> Result<Response<Body>> {
    let (rows, columns) = size(&call)?;
    call.engine.exec_resize(call.name(), rows, columns).await?;
    Ok(status(StatusCode::OK))
}

async fn inspect(call: Call) -> Result<Response<Body>> {
    json(&call.engine.exec_inspect(call.name()).await?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_execs_keys_survive_until_its_start() {
        for text in ["", "ctrl-x", "a,ctrl-@"] {
            assert_eq!(exec_keys(&encoded_keys(text).unwrap()).unwrap(), DetachKeys::parse(text).unwrap());
        }
        assert!(encoded_keys("odd").is_err());
    }
}
