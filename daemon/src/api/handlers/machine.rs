//! What Bulkhead has beyond Docker's API, below `/bulkhead`: the `bulkhead` program asks for it.

use futures_util::StreamExt;
use http::Response;

use super::containers::pieces;
use crate::{
    api::{
        request::Call,
        response::{Body, json, streamed},
        router::{Route, table},
    },
    engine::Result,
};

pub(super) const ROUTES: &[Route] = table! {
    GET "/bulkhead/containers/{name}/vmm" [WhileConnected] => figures,
    GET "/bulkhead/containers/{name}/console" [WhileConnected] => console,
};

async fn figures(call: Call) -> Result<Response<Body>> {
    json(&call.engine.container_machine(call.name()).await?)
}

async fn console(call: Call) -> Result<Response<Body>> {
    let parts = call.engine.container_console(call.name(), call.query.boolean("follow", false)).await?;
    Ok(streamed("text/plain; charset=utf-8", pieces(parts).map(Ok)))
}
