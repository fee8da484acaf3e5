//! `/networks`.

use http::{Response, StatusCode};

use crate::{
    api::{
        request::{Call, invalid_json},
        response::{Body, json, json_with, no_content, status},
        router::{Route, table},
        types::{
            json as go_json,
            network::{ConnectRequest, CreateRequest, DisconnectRequest},
        },
        version::ApiVersion,
    },
    engine::{
        Error, Result,
        network::{LIST_FILTERS, PRUNE_FILTERS},
    },
};

pub(super) const ROUTES: &[Route] = table! {
    GET "/networks" => list,
    POST "/networks/create" => create,
    POST "/networks/prune" since 25 => prune,
    GET "/networks/{id}" => inspect,
    POST "/networks/{id}/connect" => connect,
    POST "/networks/{id}/disconnect" => disconnect,
    DELETE "/networks/{id}" => remove,
};

/// A body that must be there.
async fn body<T: serde::de::DeserializeOwned>(call: &mut Call) -> Result<T> {
    let missing = || Error::invalid("invalid JSON: got EOF while reading request body");
    let text = call.json_text().await?.ok_or_else(missing)?;
    go_json::from_slice(&text).map_err(|error| invalid_json(&error))
}

async fn list(call: Call) -> Result<Response<Body>> {
    let filters = call.filters(&LIST_FILTERS)?;
    json(&call.engine.network_list(&filters)?)
}

async fn create(mut call: Call) -> Result<Response<Body>> {
    let mut request: CreateRequest = body(&mut call).await?;
    if call.version < ApiVersion::new(1, 47) {
        // The field came with that version.
        request.enable_ipv4 = None;
    }
    let created = call.engine.network_create(request).await?;
    json_with(StatusCode::CREATED, &created)
}

async fn inspect(call: Call) -> Result<Response<Body>> {
    match call.query.non_empty("scope") {
        None | Some("local") => json(&call.engine.network_inspect(call.name())?),
        Some(_) => Err(Error::not_found(format!("network {} not found", call.name()))),
    }
}

async fn connect(mut call: Call) -> Result<Response<Body>> {
    let request: ConnectRequest = body(&mut call).await?;
    call.engine.network_connect(call.name(), request).await?;
    Ok(status(StatusCode::OK))
}

async fn disconnect(mut call: Call) -> Result<Response<Body>> {
    let request: DisconnectRequest = body(&mut call).await?;
    call.engine.network_disconnect(call.name(), request).await?;
    Ok(status(StatusCode::OK))
}

async fn remove(call: Call) -> Result<Response<Body>> {
    call.engine.network_remove(call.name()).await?;
    Ok(no_content())
}

async fn prune(call: Call) -> Result<Response<Body>> {
    let filters = call.filters(&PRUNE_FILTERS)?;
    json(&call.engine.network_prune(&filters).await?)
}
