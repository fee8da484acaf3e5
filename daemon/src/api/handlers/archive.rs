//! `/containers/{name}/archive` and the other operations on a container's files.

use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};
use http::{HeaderName, HeaderValue, Response, StatusCode};
use http_body_util::BodyExt;

use serde::Serialize;

use super::images;
use crate::{
    api::{
        request::{Call, invalid_json},
        response::{Body, json_with, status, streamed},
        router::{Route, table},
        types::{
            self,
            container::{FileChange, PathStat},
        },
    },
    engine::{Error, Result, files::ExtractOptions, image::CommitRequest},
};

pub(super) const ROUTES: &[Route] = table! {
    GET "/containers/{name}/archive" [WhileConnected] => get,
    HEAD "/containers/{name}/archive" [WhileConnected] => head,
    PUT "/containers/{name}/archive" => put,
    GET "/containers/{name}/export" [WhileConnected] => export,
    GET "/containers/{name}/changes" [WhileConnected] => changes,
    POST "/commit" => commit,
};

const STAT: HeaderName = HeaderName::from_static("x-docker-container-path-stat");

async fn head(call: Call) -> Result<Response<Body>> {
    let stat = call.engine.container_path_stat(call.name(), path(&call)).await?;
    with_stat(status(StatusCode::OK), &stat)
}

async fn get(call: Call) -> Result<Response<Body>> {
    let (stat, archive) = call.engine.container_archive(call.name(), path(&call)).await?;
    with_stat(streamed("application/x-tar", archive.into_stream()), &stat)
}

async fn put(call: Call) -> Result<Response<Body>> {
    let options = ExtractOptions {
        keep_kinds: call.query.boolean("noOverwriteDirNonDir", false),
        as_container_user: call.query.boolean("copyUIDGID", false),
    };
    let Call { engine, params, query, body, .. } = call;
    let name = params.first().map_or("", String::as_str);
    let path = query.get("path").unwrap_or_default();
    engine.container_extract(name, path, options, body.into_data_stream()).await?;
    Ok(status(StatusCode::OK))
}

async fn export(call: Call) -> Result<Response<Body>> {
    let archive = call.engine.container_export(call.name()).await?;
    Ok(streamed("application/octet-stream", archive.into_stream()))
}

async fn changes(call: Call) -> Result<Response<Body>> {
    let changes = call.engine.container_changes(call.name()).await?;
    Ok(streamed("application/json", array(changes)))
}

async fn commit(mut call: Call) -> Result<Response<Body>> {
    let config = match call.json_text().await? {
        Some(text) => types::json::from_slice(&text).map_err(|error| invalid_json(&error))?,
        None => None,
    };
    let text = |key: &str| call.query.get(key).unwrap_or_default().to_owned();
    let request = CommitRequest {
        reference: images::repository_and_tag(&call)?,
        author: text("author"),
        comment: text("comment"),
        changes: call.query.all("changes").map(str::to_owned).collect(),
        config,
    };
    let pause = call.query.boolean("pause", true);
    let container = call.query.get("container").unwrap_or_default();
    let id = call.engine.container_commit(container, pause, request).await?;
    json_with(StatusCode::CREATED, &Created { id: id.to_string() })
}

/// What `POST /commit` answers.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Created {
    id: String,
}

fn path(call: &Call) -> &str {
    call.query.get("path").unwrap_or_default()
}

fn with_stat(mut response: Response<Body>, stat: &PathStat) -> Result<Response<Body>> {
    let json = serde_json::to_vec(stat).map_err(|error| Error::internal(error.to_string()))?;
    let value = HeaderValue::try_from(BASE64_STANDARD.encode(json));
    response.headers_mut().insert(STAT, value.map_err(|error| Error::internal(error.to_string()))?);
    Ok(response)
}

/// A JSON array, item by item; `null` for none, as Go has it.
fn array(
    items: impl Stream<Item = Result<FileChange>> + Send + 'static,
) -> impl Stream<Item = Result<Bytes>> + Send {
    let mut first = true;
    let items = items.map(move |item| {
        let mut text = vec![if std::mem::take(&mut first) { b'[' } else { b',' }];
        serde_json::to_writer(&mut text, &item?).map_err(|error| Error::internal(error.to_string()))?;
        Ok(Bytes::from(text))
    });
    // What the end is depends on whether there was anything.
    stream::unfold((Box::pin(items), Some(false)), |(mut items, began)| async move {
        let began = began?;
        match items.next().await {
            Some(Ok(text)) => Some((Ok(text), (items, Some(true)))),
            Some(Err(error)) => Some((Err(error), (items, None))),
            None => Some((Ok(Bytes::from_static(if began { b"]\n" } else { b"null\n" })), (items, None))),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn changes_are_an_array_or_null() {
        let text = async |items: Vec<Result<FileChange>>| {
            let mut text = Vec::new();
            let mut pieces = std::pin::pin!(array(stream::iter(items)));
            while let Some(piece) = pieces.next().await {
                text.extend(piece?);
            }
            Ok::<_, Error>(String::from_utf8(text).unwrap())
        };
        let change = |path: &str, kind| Ok(FileChange { path: path.into(), kind });
        assert_eq!(text(vec![]).await.unwrap(), "null\n");
        assert_eq!(
            text(vec![change("/a", 0), change("/a/b", 1)]).await.unwrap(),
            "[{\"Path\":\"/a\",\"Kind\":0},{\"Path\":\"/a/b\",\"Kind\":1}]\n"
        );
        assert!(text(vec![change("/a", 0), Err(Error::internal("broken"))]).await.is_err());
    }
}
