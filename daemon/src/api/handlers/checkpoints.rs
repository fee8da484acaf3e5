//! `/containers/{name}/checkpoints` as Docker has it, and forks, which are our own.

use http::{Response, StatusCode};

use crate::{
    api::{
        request::Call,
        response::{Body, json, json_with, no_content, status},
        router::{Route, table},
        types::container::{CheckpointRequest, CheckpointSummary, ForkRequest},
    },
    engine::{Error, Result},
};

pub(super) const ROUTES: &[Route] = table! {
    GET "/containers/{name}/checkpoints" since 25 => list,
    POST "/containers/{name}/checkpoints" since 25 => create,
    DELETE "/containers/{name}/checkpoints/{checkpoint}" since 25 => delete,
    POST "/bulkhead/containers/{name}/fork" => fork,
};

async fn list(call: Call) -> Result<Response<Body>> {
    refuse_directory(call.query.get("dir"))?;
    let names = call.engine.checkpoint_list(call.name())?;
    json(&names.into_iter().map(|name| CheckpointSummary { name }).collect::<Vec<_>>())
}

async fn create(mut call: Call) -> Result<Response<Body>> {
    let request: CheckpointRequest = call.json().await?;
    refuse_directory(Some(&request.checkpoint_dir))?;
    call.engine.checkpoint_create(call.name(), &request.checkpoint_id, request.exit).await?;
    Ok(status(StatusCode::CREATED))
}

async fn delete(call: Call) -> Result<Response<Body>> {
    refuse_directory(call.query.get("dir"))?;
    let checkpoint = call.params.get(1).map_or("", String::as_str);
    call.engine.checkpoint_delete(call.name(), checkpoint).await?;
    Ok(no_content())
}

/// A directory of the client's choice would have the daemon, as root, write and read wherever it is told.
pub(super) fn refuse_directory(directory: Option<&str>) -> Result<()> {
    match directory {
        None | Some("") => Ok(()),
        Some(_) => Err(Error::invalid(
            "a checkpoint directory of one's own is not supported: checkpoints lie with their container",
        )),
    }
}

async fn fork(mut call: Call) -> Result<Response<Body>> {
    let request: ForkRequest = call.json().await?;
    let names = if request.names.is_empty() { vec![String::new()] } else { request.names };
    json_with(StatusCode::CREATED, &call.engine.container_fork(call.name(), &names).await?)
}
