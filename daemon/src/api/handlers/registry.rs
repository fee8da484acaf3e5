//! What is asked of registries and taken nowhere: `/auth`, `/distribution`, `/images/search`.

use http::Response;
use serde::Serialize;

use crate::{
    api::{
        request::Call,
        response::{Body, json},
        router::{Route, table},
        types::system::AuthRequest,
    },
    engine::{
        Result,
        image::{Credentials, SEARCH_FILTERS},
    },
};

pub(super) const ROUTES: &[Route] = table! {
    POST "/auth" => auth,
    GET "/images/search" [WhileConnected] => search,
    GET "/distribution/{name}/json" since 30 [WhileConnected] => distribution,
};

/// The answer to `POST /auth`.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct LoggedIn {
    status: &'static str,
    identity_token: String,
}

async fn auth(mut call: Call) -> Result<Response<Body>> {
    let AuthRequest { username, password, server_address, identity_token, registry_token, .. } =
        call.json().await?;
    let credentials = Credentials { username, password, auth: String::new(), identity_token, registry_token };
    let identity_token = call.engine.images().login(&server_address, &credentials).await?;
    json(&LoggedIn { status: "Login Succeeded", identity_token })
}

/// The credentials that come with a request.
pub(super) fn credentials(call: &Call) -> Option<Credentials> {
    let header = call.headers().get("x-registry-auth")?;
    Credentials::from_header(header.to_str().ok()?)
}

async fn search(call: Call) -> Result<Response<Body>> {
    let filters = call.filters(&SEARCH_FILTERS)?;
    let term = call.query.get("term").unwrap_or_default();
    let limit = call.query.number("limit")?;
    json(&call.engine.images().search(term, limit, &filters, credentials(&call).as_ref()).await?)
}

async fn distribution(call: Call) -> Result<Response<Body>> {
    json(&call.engine.images().distribution(call.name(), credentials(&call).as_ref()).await?)
}
