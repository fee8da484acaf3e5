//! `/volumes`.

use http::{Response, StatusCode};

use crate::{
    api::{
        request::Call,
        response::{Body, json, json_with, no_content},
        router::{Route, table},
        types::volume::CreateRequest,
        version::ApiVersion,
    },
    engine::{
        Error, Result,
        volume::{LIST_FILTERS, PRUNE_FILTERS},
    },
};

pub(super) const ROUTES: &[Route] = table! {
    GET "/volumes" => list,
    POST "/volumes/create" => create,
    POST "/volumes/prune" since 25 => prune,
    GET "/volumes/{name}" => inspect,
    PUT "/volumes/{name}" => update,
    DELETE "/volumes/{name}" => remove,
};

async fn list(call: Call) -> Result<Response<Body>> {
    let filters = call.filters(&LIST_FILTERS)?;
    json(&call.engine.volume_list(&filters)?)
}

async fn create(mut call: Call) -> Result<Response<Body>> {
    let request: CreateRequest = call.json().await?;
    json_with(StatusCode::CREATED, &call.engine.volume_create(request).await?)
}

async fn inspect(call: Call) -> Result<Response<Body>> {
    json(&call.engine.volume_inspect(call.name())?)
}

/// Only volumes of a swarm's cluster can be changed.
async fn update(call: Call) -> Result<Response<Body>> {
    call.engine.volume_inspect(call.name())?;
    Err(Error::unavailable("This node is not a swarm manager: only cluster volumes can be updated."))
}

async fn remove(call: Call) -> Result<Response<Body>> {
    call.engine.volume_remove(call.name(), call.query.boolean("force", false)).await?;
    Ok(no_content())
}

async fn prune(call: Call) -> Result<Response<Body>> {
    let filters = call.filters(&PRUNE_FILTERS)?;
    // Before 1.42 a prune meant all volumes.
    let all = call.version < ApiVersion::new(1, 42);
    json(&call.engine.volume_prune(&filters, all).await?)
}
