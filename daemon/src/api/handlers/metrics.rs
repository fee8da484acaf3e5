//! `GET /metrics`: not of Docker's API, where it is another server's, but named and worded as there.

use http::{HeaderValue, Response, header::CONTENT_TYPE};

use crate::{
    api::{
        request::Call,
        response::{Body, full},
        router::{Route, table},
        server::requests,
    },
    engine::{Engine, Result},
    metrics::{MEDIA_TYPE, Text},
};

pub(super) const ROUTES: &[Route] = table! {
    GET "/metrics" => metrics,
};

async fn metrics(call: Call) -> Result<Response<Body>> {
    Ok(render(&call.engine))
}

/// Everything there is to tell.
pub fn render(engine: &Engine) -> Response<Body> {
    let mut text = Text::default();
    engine.metrics(&mut text);
    requests::metrics(&mut text);
    let mut response = Response::new(full(text.finish()));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(MEDIA_TYPE));
    response
}
