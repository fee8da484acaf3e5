//! `GET /containers/{name}/stats`.

use bytes::Bytes;
use futures_util::StreamExt;
use http::Response;

use super::containers::pieces;
use crate::{
    api::{
        request::Call,
        response::{Body, streamed},
        router::{Route, table},
        version::ApiVersion,
    },
    engine::{Error, Result, container::StatsMode},
};

pub(super) const ROUTES: &[Route] = table! {
    GET "/containers/{name}/stats" [WhileConnected] => stats,
};

async fn stats(call: Call) -> Result<Response<Body>> {
    let one_shot = call.version >= ApiVersion::new(1, 41) && call.query.boolean("one-shot", false);
    let mode = match (call.query.boolean("stream", true), one_shot) {
        (true, _) => StatsMode::Stream,
        (false, true) => StatsMode::OneShot,
        (false, false) => StatsMode::Pair,
    };
    let samples = call.engine.container_stats(call.name(), mode).await?;
    let lines = pieces(samples).map(|stats| {
        let mut line = serde_json::to_vec(&stats).map_err(|error| Error::internal(error.to_string()))?;
        line.push(b'\n');
        Ok(Bytes::from(line))
    });
    Ok(streamed("application/json", lines))
}
